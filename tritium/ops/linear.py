"""Matrix product with a weight, and what stands right before and after it: y = after(before(x) wᵀ), row by row
independent of the other rows.

    before:  x, or with a norm:  x · rsqrt(mean(x²) + eps) · (1 + n), rounded to the weight's dtype
    product: p[m, j] = Σ_k before(x)[m, k] w[j, k]
    after:   p;  gated: silu(p[m, n]) · p[m, N + n] with w of 2 N rows, gate first;  plus a residual

BLAS libraries choose another order of summation for few rows than for many, so a token's result would depend on how
many tokens share its step. Measured with MKL (torch 2.13, one and two threads): products of a multiple of 8 rows give
every row the same bits whatever their number; 1, 2, 3, 5 and 7 rows do not. So the reference pads rows to a multiple
of 8.

Shapes: x_MK, w_JK with J = 2 N when gated, else N; norm_K float32, residual_MN, y_MN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from tritium.ops.mlp import reference as silu_mul
from tritium.ops.norm import reference as rms_norm
from tritium.ops.spec import Dims, Op, OpSpec, randn, wide

ROWS = 8


def _inputs(dims: Dims, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    m, n, k, gated = dims["M"], dims["N"], dims["K"], bool(dims.get("gated"))
    full = wide(dtype)
    inputs: dict[str, Any] = {"w_JK": randn(generator, n * (1 + gated), k, dtype=dtype, scale=k**-0.5)}
    if dims.get("norm"):
        inputs |= {"x_MK": randn(generator, m, k, dtype=full), "eps": 1e-6}
        inputs["norm_K"] = randn(generator, k, dtype=full, scale=0.3)
    else:
        inputs["x_MK"] = randn(generator, m, k, dtype=dtype)
    if dims.get("residual"):
        inputs["residual_MN"] = randn(generator, m, n, dtype=full)
    return inputs | ({"gated": True} if gated else {}) | ({"dtype": full} if dims.get("wide") else {})


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
    ),
    inputs=_inputs,
    results=lambda arguments, returned: {"y_MN": returned},
    bytes_moved=lambda d, size: size * (d["M"] * d["K"] + (1 + d.get("gated", 0)) * d["N"] * d["K"] + d["M"] * d["N"]),
    flops=lambda d: 2 * d["M"] * (1 + d.get("gated", 0)) * d["N"] * d["K"],
    tuning_key=("N", "K", "gated", "M"),
)


def reference(
    *,
    x_MK: torch.Tensor,
    w_JK: torch.Tensor,
    norm_K: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual_MN: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y_MN in `dtype`, else in the residual's, else in w's. (A kernel that gives a wider dtype than w's need not round
    to w's in between.)"""
    if norm_K is not None:
        x_MK = rms_norm(x_MD=x_MK, w_D=norm_K, eps=eps, dtype=w_JK.dtype)
    rows = x_MK.shape[0]
    if rows % ROWS == 0 or x_MK.device.type != "cpu":
        p_MJ = F.linear(x_MK, w_JK)
    else:
        p_MJ = F.linear(F.pad(x_MK, (0, 0, 0, -rows % ROWS)), w_JK)[:rows]
    y_MN = silu_mul(x_TJ=p_MJ) if gated else p_MJ
    if residual_MN is not None:
        y_MN = residual_MN + y_MN.to(residual_MN.dtype)
    return y_MN.to(dtype or y_MN.dtype)


linear = Op(SPEC, reference, "linear:linear")
