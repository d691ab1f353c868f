"""Matrix product with a weight, and what stands right before and after it: y = after(before(x) wᵀ), row by row
independent of the other rows.

    before:  x, or with a norm:  x · rsqrt(mean(x²) + eps) · (1 + n), rounded to the weight's dtype
    product: p[m, j] = Σ_k before(x)[m, k] w[j, k]
    after:   p;  gated: silu(p[m, n]) · p[m, N + n] with w of 2 N rows, gate first;  plus a residual

BLAS libraries choose another order of summation for few rows than for many, so a token's result would depend on how
many tokens share its step. Measured with MKL (torch 2.13, one and two threads): products of a multiple of 8 rows give
every row the same bits whatever their number; 1, 2, 3, 5 and 7 rows do not. So the reference pads rows to a multiple
of 8.

A weight may be quantized, or row blocks stored in more than one way (`tritium.ops.quantized`). Where a block's scheme
rounds activations, `before` is not rounded to the weight's dtype first. A gated weight of blocks of rows that share
scales has no block with rows of both halves.

Shapes: x_MK, w_JK with J = 2 N when gated, else N; norm_K float32, residual_MN, y_MN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from tritium.ops.elementwise import silu_mul
from tritium.ops.handed import MOST, MOST_PARTS, Handed, Peak, Scaled, left
from tritium.ops.norm import reference as rms_norm
from tritium.ops.quantized import (
    FORMS,
    Scheme,
    Weight,
    Weights,
    dequantize,
    quantize,
    quantize_activations,
    row_blocks,
    stored_bytes,
)
from tritium.ops.spec import Dims, Op, OpSpec, randn, wide

ROWS = 8


def scheme_of(dims: Dims) -> Scheme | None:
    return FORMS[dims["scheme"] - 1] if dims.get("scheme") else None


def drawn(generator: torch.Generator, dims: Dims, *shape: int, dtype: torch.dtype) -> Weight:
    """A weight of the scheme that `dims` name: the same stored numbers whatever the dtype."""
    scheme, scale = scheme_of(dims), shape[-1] ** -0.5
    if scheme is None:
        return randn(generator, *shape, dtype=dtype, scale=scale)
    return quantize(randn(generator, *shape, dtype=torch.float32, scale=scale), scheme, dtype)


def settled(x_MK: torch.Tensor, scheme: Scheme | None) -> torch.Tensor:
    """x, near enough to what its tokens are rounded to that no other rounding on the way decides to which."""
    if scheme is None or scheme.activations is None:
        return x_MK
    q, scale = quantize_activations(x_MK, scheme.activations)
    q, off = q.to(scale.dtype), x_MK.to(scale.dtype) / scale - q.to(scale.dtype)
    return ((q + 0.3 * off * (q.abs() < q.abs().amax(-1, keepdim=True))) * scale).to(x_MK.dtype)


def _inputs(dims: Dims, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    m, n, k, gated = dims["M"], dims["N"], dims["K"], bool(dims.get("gated"))
    full, scheme, plain = wide(dtype), scheme_of(dims), dims.get("plain", 0)
    w: Weights = drawn(generator, dims, n * (1 + gated) - plain, k, dtype=dtype)
    if plain:
        w = (w, randn(generator, plain, k, dtype=dtype, scale=k**-0.5))  # type: ignore[assignment]
    inputs: dict[str, Any] = {"w_JK": w}
    if dims.get("norm"):
        norm_K = randn(generator, k, dtype=full, scale=0.3)
        x_MK = settled(randn(generator, m, k, dtype=full) * (1 + norm_K), scheme) / (1 + norm_K)
        inputs |= {"x_MK": x_MK, "eps": 1e-6, "norm_K": norm_K}
    else:
        inputs["x_MK"] = settled(randn(generator, m, k, dtype=torch.float32), scheme).to(dtype)
    if dims.get("residual"):
        inputs["residual_MN"] = randn(generator, m, n, dtype=full)
    if dims.get("handed"):
        behind_N = randn(generator, n, dtype=full, scale=0.3) if dims.get("residual") else None
        inputs |= handed(inputs["x_MK"], inputs.get("norm_K"), behind_N, None if scheme else dtype)
    return inputs | ({"gated": True} if gated else {}) | ({"dtype": full} if dims.get("wide") else {})


def _weight_bytes(dims: Dims, size: int) -> int:
    rows, plain, k, scheme = dims["N"] * (1 + dims.get("gated", 0)), dims.get("plain", 0), dims["K"], scheme_of(dims)
    return plain * k * size + (stored_bytes(scheme, (rows - plain, k)) if scheme else rows * k * size)


_QUANTIZED: tuple[Dims, ...] = (
    {"M": 1, "N": 77, "K": 100},
    {"M": 1, "N": 128, "K": 1024, "norm": 1, "gated": 1},
    {"M": 7, "N": 130, "K": 264, "norm": 1, "wide": 1},
    {"M": 33, "N": 100, "K": 200, "residual": 1},
    {"M": 65, "N": 128, "K": 144, "norm": 1, "gated": 1},
)
_HANDED: tuple[Dims, ...] = (
    {"M": 1, "N": 70, "K": 1160, "norm": 1},
    {"M": 1, "N": 35, "K": 264, "norm": 1, "gated": 1},
    {"M": 1, "N": 77, "K": 640, "residual": 1},
)
_MIXED: tuple[Dims, ...] = (
    {"M": 1, "N": 72, "K": 256, "norm": 1, "plain": 8, "scheme": 2},
    {"M": 1, "N": 75, "K": 1100, "norm": 1, "plain": 5, "scheme": 4},
    {"M": 7, "N": 72, "K": 256, "norm": 1, "plain": 8, "scheme": 1},
    {"M": 65, "N": 72, "K": 256, "norm": 1, "plain": 8, "scheme": 4},
)


def handed(x_MK: torch.Tensor, norm_K: torch.Tensor | None, behind_N: torch.Tensor | None, dtype: torch.dtype | None
           ) -> dict[str, Handed]:  # fmt: skip
    """What the op before leaves of x, and where to leave that of the result: peaks, or in `dtype` scaled tokens."""

    def made(norm: torch.Tensor | None) -> Handed:
        if dtype is None:
            return Peak(torch.zeros(1, dtype=torch.int32), norm)
        assert norm is not None
        return Scaled(norm.new_zeros(MOST, len(norm), dtype=dtype), norm.new_zeros(MOST_PARTS, MOST), norm)

    found = {"given": made(norm_K)} if dtype is None or norm_K is not None else {}
    for given in found.values():
        given.leave(x_MK)
    return found | ({"leave": made(behind_N)} if dtype is None or behind_N is not None else {})


SPEC = OpSpec(
    name="linear",
    cases=(
        {"M": 1, "N": 77, "K": 100},
        {"M": 1, "N": 8, "K": 1024, "norm": 1, "wide": 1},
        {"M": 1, "N": 12, "K": 1024, "norm": 1, "gated": 1},
        {"M": 1, "N": 12, "K": 512, "residual": 1},
        {"M": 1, "N": 11, "K": 1300, "norm": 1, "gated": 1},
        {"M": 1, "N": 96, "K": 130, "norm": 1, "gated": 1},
        {"M": 1, "N": 130, "K": 64, "residual": 1},
        {"M": 2, "N": 64, "K": 256, "norm": 1, "gated": 1},
        {"M": 7, "N": 130, "K": 64, "norm": 1, "wide": 1},
        {"M": 7, "N": 33, "K": 72, "norm": 1, "gated": 1},
        {"M": 33, "N": 100, "K": 200, "residual": 1},
        {"M": 65, "N": 256, "K": 512, "norm": 1, "wide": 1},
        {"M": 65, "N": 33, "K": 40, "norm": 1, "gated": 1},
        {"M": 65, "N": 50, "K": 24, "residual": 1},
        *({**dims, "scheme": number} for number in range(1, len(FORMS) + 1) for dims in _QUANTIZED),
        *_MIXED,
        *({**dims, "handed": 1, "scheme": number} for number in (1, 2) for dims in _HANDED),
        {"M": 7, "N": 130, "K": 72, "norm": 1, "handed": 1},
        {"M": 7, "N": 33, "K": 200, "norm": 1, "gated": 1, "handed": 1},
        {"M": 33, "N": 100, "K": 200, "residual": 1, "handed": 1},
    ),
    inputs=_inputs,
    results=lambda arguments, returned: {"y_MN": returned, **left(arguments, returned)},
    bytes_moved=lambda d, size: size * (d["M"] * d["K"] + d["M"] * d["N"]) + _weight_bytes(d, size),
    flops=lambda d: 2 * d["M"] * (1 + d.get("gated", 0)) * d["N"] * d["K"],
    floor=lambda d: granted(scheme_of(d)),
)


def granted(scheme: Scheme | None) -> float:
    """The matrix units of some chips add up products of e4m3 in fewer bits than float32 has. A token's scale is in all
    of its results, so that the rounding of it does not average out, and counts twice behind a gate."""
    if scheme is None or scheme.activations is None:
        return 0.0
    return 2.0**-11 if scheme.activations == torch.float8_e4m3fn else 2.0**-23


def reference(
    *,
    x_MK: torch.Tensor,
    w_JK: Weights,
    norm_K: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual_MN: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    given: Handed | None = None,
    leave: Handed | None = None,
) -> torch.Tensor:
    """y_MN in `dtype`, else in the residual's, else in w's. (A kernel that gives a wider dtype than w's need not round
    to w's in between.) `given`, `leave`: what the op before left of x, and what to leave of y for the one behind."""
    if norm_K is not None:
        x_MK = rms_norm(x_MD=x_MK, w_D=norm_K, eps=eps)
    parts = [_product(x_MK, block) for block in row_blocks(w_JK)]
    p_MJ = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    y_MN = silu_mul(x_TJ=p_MJ) if gated else p_MJ
    if residual_MN is not None:
        y_MN = residual_MN + y_MN.to(residual_MN.dtype)
    y_MN = y_MN.to(dtype or y_MN.dtype)
    if leave is not None:
        leave.leave(y_MN)
    return y_MN


def _product(x_MK: torch.Tensor, w: Weight) -> torch.Tensor:
    """x wᵀ [M, rows of w] in w's dtype."""
    if isinstance(w, torch.Tensor):
        return _padded(x_MK.to(w.dtype), w)
    kind, compute = w.scheme.activations, wide(w.dtype)
    if kind is None:
        return _padded(x_MK.to(w.dtype).to(compute), dequantize(w, compute)).to(w.dtype)
    q_MK, scale_M1 = quantize_activations(x_MK, kind)
    if kind == torch.int8 and w.device.type == "cpu":
        total_MJ = torch._int_mm(q_MK, w.values.t()).to(compute) * w.scales.t().to(compute)
    else:
        total_MJ = _padded(q_MK.to(compute), dequantize(w, compute))
    return (total_MJ * scale_M1).to(w.dtype)


def _padded(x_MK: torch.Tensor, w_JK: torch.Tensor) -> torch.Tensor:
    rows = x_MK.shape[0]
    if rows % ROWS == 0 or x_MK.device.type != "cpu":
        return F.linear(x_MK, w_JK)
    return F.linear(F.pad(x_MK, (0, 0, 0, -rows % ROWS)), w_JK)[:rows]


linear = Op(SPEC, reference, "linear:linear")
