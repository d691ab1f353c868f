"""Routed experts beside a shared one for one token, weights in fewer bits. See `tritium.ops.moe` and `moe` beside this.

Shapes: E experts, K experts a token, H hidden, I expert width, S shared width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tritium.ops.kernels.launch import cdiv, launch, parameters, power_of_2, release_next, wait_for_inputs
from tritium.ops.kernels.mlp import silu
from tritium.ops.kernels.moe import _tile, _two_rows, _vector, keys, lanes_of, logits_stride, next_expert
from tritium.ops.kernels.one_token import LEAST, by_token, form, largest, row_scales, rows_by_token, words
from tritium.ops.quantized import Quantized


@triton.jit
def _first(w, scales, base, row, rows, K: tl.constexpr, J: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr,
           GROUP: tl.constexpr, SHARING: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """Rows of the J of expert `base`: pointers to words and to scales, and the first of both."""
    PER: tl.constexpr = 4 if KIND == "int8" or KIND == "e4m3" else 8
    G: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP else 1
    W: tl.constexpr = COLUMNS // PER
    word = (base * J + row)[:, None] * (K // PER) + tl.arange(0, W)[None, :]
    at = w.to(tl.pointer_type(tl.int32)) + word
    scale_at = scales + (base * ((J + SHARING - 1) // SHARING) + row // SHARING)[:, None] * G
    tile = words(at, 0, rows, K // PER, W, EVEN)
    return at, scale_at, tile, row_scales(scale_at, 0, rows, K // PER, W, GROUP, PER, EVEN)


@triton.jit
def _route_one(x, norm, router, shared, scales, logits, inner, eps, H: tl.constexpr, E: tl.constexpr, S: tl.constexpr,
               ROWS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
               SHARING: tl.constexpr, LARGEST: tl.constexpr, NATIVE: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """The first programs: ROWS of gate and up of the shared expert; the others: 2 ROWS rows of the router each."""
    blocks: tl.constexpr = (S + ROWS - 1) // ROWS
    FULL: tl.constexpr = S % ROWS == 0
    EVEN: tl.constexpr = FULL and H % COLUMNS == 0
    r = tl.arange(0, ROWS)
    if tl.program_id(0) < blocks:
        s = tl.program_id(0) * ROWS + r
        rows = s < S
        base = tl.program_id(0).to(tl.int64) * 0
        at, scale_at, tile, scale = _first(shared, scales, base, s, rows, H, 2 * S, COLUMNS, KIND, GROUP, SHARING, EVEN)
        up_at, up_scale_at, up_tile, up_scale = _first(shared, scales, base, S + s, rows, H, 2 * S, COLUMNS, KIND,
                                                       GROUP, SHARING, EVEN)  # fmt: skip
        wait_for_inputs(pdl)
        top = largest(x, norm, H, True, NATIVE) if LARGEST > 0 else 1.0
        pair, squares = rows_by_token((tile, up_tile), (scale, up_scale), (at, up_at), (scale_at, up_scale_at), top,
                                      x, norm, rows, H, COLUMNS, KIND, GROUP, LARGEST, NATIVE, FULL, True)  # fmt: skip
        release_next(pdl)
        unit = tl.rsqrt(squares / H + eps)
        tl.store(inner + s, (silu(pair[0] * unit) * (pair[1] * unit)).to(inner.dtype.element_ty), mask=rows)
    else:
        e = (tl.program_id(0) - blocks) * (2 * ROWS) + r
        k = tl.arange(0, BLOCK)
        a_at = router + tl.minimum(e, E)[:, None] * H
        b_at = router + tl.minimum(e + ROWS, E)[:, None] * H
        a, b, weight = _tile(a_at, k, H, BLOCK), _tile(b_at, k, H, BLOCK), _vector(norm, k, H, BLOCK)
        wait_for_inputs(pdl)
        a, b = _two_rows(a, b, _vector(x, k, H, BLOCK), weight, a_at, b_at, x, norm, eps, H, ROWS, BLOCK)
        release_next(pdl)
        tl.store(logits + e, a, mask=e <= E)
        tl.store(logits + e + ROWS, b, mask=e + ROWS <= E)


@triton.jit
def _up_one(x, norm, logits, gate_up, scales, inner, eps, H: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
            I: tl.constexpr, STRIDE: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr, COPIES: tl.constexpr,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SHARING: tl.constexpr,
            LARGEST: tl.constexpr, NATIVE: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """ROWS of gate and up of the expert of rank j, times its weight."""
    blocks: tl.constexpr = (I + ROWS - 1) // ROWS
    FULL: tl.constexpr = I % ROWS == 0
    EVEN: tl.constexpr = FULL and H % COLUMNS == 0
    rank = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    rows = i < I
    wait_for_inputs(pdl)
    key, expert = keys(logits, tl.arange(0, COPIES) * 0, 1.0, 0, STRIDE, E, LANES, PARTS, 1)
    first, chosen, key = next_expert(key, expert)
    total = tl.full((COPIES,), 1.0, tl.float32)
    mine = total
    for _ in range(rank):
        value, chosen, key = next_expert(key, expert)
        mine = tl.exp(value - first)
        total += mine
    base = tl.max(chosen, axis=0).to(tl.int64)
    at, scale_at, tile, scale = _first(gate_up, scales, base, i, rows, H, 2 * I, COLUMNS, KIND, GROUP, SHARING, EVEN)
    up_at, up_scale_at, up_tile, up_scale = _first(gate_up, scales, base, I + i, rows, H, 2 * I, COLUMNS, KIND, GROUP,
                                                   SHARING, EVEN)  # fmt: skip
    for _ in range(rank + 1, K):
        value, chosen, key = next_expert(key, expert)
        total += tl.exp(value - first)
    top = largest(x, norm, H, True, NATIVE) if LARGEST > 0 else 1.0
    pair, squares = rows_by_token((tile, up_tile), (scale, up_scale), (at, up_at), (scale_at, up_scale_at), top, x,
                                  norm, rows, H, COLUMNS, KIND, GROUP, LARGEST, NATIVE, FULL, True)  # fmt: skip
    release_next(pdl)
    unit = tl.rsqrt(squares / H + eps)
    value = silu(pair[0] * unit) * (pair[1] * unit) * tl.max(mine / total, axis=0)
    tl.store(inner + rank * I + i, value.to(inner.dtype.element_ty), mask=rows)


@triton.jit
def _down_one(x, logits, down, scales, shared, shared_scales, inner, inner_shared, y, H: tl.constexpr, E: tl.constexpr,
              K: tl.constexpr, RANKS: tl.constexpr, I: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr,
              LANES: tl.constexpr, PARTS: tl.constexpr, COPIES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
              BLOCK_S: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, GROUP_S: tl.constexpr,
              SHARING: tl.constexpr, LARGEST: tl.constexpr, NATIVE: tl.constexpr, EARLY: tl.constexpr,
              pdl: tl.constexpr):  # fmt: skip
    """ROWS of the result, all words of weights on their way at once; EARLY: before the wait, as in `moe`."""
    FULL: tl.constexpr = H % ROWS == 0
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = row < H
    zero = tl.program_id(0).to(tl.int64) * 0
    of_shared = _first(shared, shared_scales, zero, row, rows, S, H, BLOCK_S, KIND, GROUP_S, SHARING,
                       FULL and S == BLOCK_S)  # fmt: skip
    if not EARLY:
        wait_for_inputs(pdl)
    key, expert = keys(logits, tl.arange(0, COPIES) * 0, 1.0, 0, STRIDE, E, LANES, PARTS, 1)
    gate = tl.load(logits + E)
    tiles = ()
    for _ in tl.static_range(K):
        value, who, key = next_expert(key, expert)
        tiles += (_first(down, scales, tl.max(who, axis=0).to(tl.int64), row, rows, I, H, BLOCK, KIND, GROUP, SHARING,
                         FULL and I == BLOCK),)  # type: ignore[assignment] # fmt: skip
    if EARLY:
        wait_for_inputs(pdl)
    residual = tl.load(x + row, mask=rows, other=0.0)
    rank, i = tl.arange(0, RANKS), tl.arange(0, BLOCK)
    tops = tl.zeros((RANKS,), tl.float32)
    top_shared = 1.0
    if LARGEST > 0:
        value = tl.load(inner + rank[:, None] * I + i[None, :], mask=(rank < K)[:, None] & (i < I)[None, :], other=0.0)
        tops = tl.maximum(tl.max(tl.abs(value.to(tl.float32)), axis=1), LEAST)
        top_shared = largest(inner_shared, inner_shared, S, False, NATIVE)
    total = tl.zeros((ROWS,), tl.float32)
    for j in tl.static_range(K):
        at, scale_at, tile, scale = tiles[j]  # type: ignore[var-annotated]
        top = tl.sum(tl.where(rank == j, tops, 0.0), axis=0)
        out, _ = rows_by_token((tile,), (scale,), (at,), (scale_at,), top, inner + j * I, inner, rows, I, BLOCK, KIND,
                               GROUP, LARGEST, NATIVE, FULL, False)  # fmt: skip
        total += out[0]
    at, scale_at, tile, scale = of_shared
    out, _ = rows_by_token((tile,), (scale,), (at,), (scale_at,), top_shared, inner_shared, inner_shared, rows, S,
                           BLOCK_S, KIND, GROUP_S, LARGEST, NATIVE, FULL, False)  # fmt: skip
    release_next(pdl)
    tl.store(y + row, residual + total + out[0] / (1.0 + tl.exp(-gate)), mask=rows)


def serves(weights: tuple[Any, ...]) -> bool:
    """Whether these can be multiplied by one token here: all of one scheme, in whole words."""
    first = weights[0]
    return isinstance(first, Quantized) and all(
        isinstance(w, Quantized) and w.scheme == first.scheme and w.shape[-1] * w.scheme.bits % 32 == 0 for w in weights
    )


def one(x_TH: torch.Tensor, norm_H: torch.Tensor, eps: float, router_FH: torch.Tensor, gate_up_EJH: Quantized,
        down_EHI: Quantized, shared_gate_up_SH: Quantized, shared_down_HS: Quantized, k: int
        ) -> torch.Tensor:  # fmt: skip
    (E, H, I), S = down_EHI.shape, shared_down_HS.shape[1]
    lanes, parts = lanes_of(E)
    logits = x_TH.new_empty(logits_stride(E))
    inner, inner_shared = x_TH.new_empty(k, I, dtype=down_EHI.dtype), x_TH.new_empty(S, dtype=down_EHI.dtype)
    y_TH = torch.empty_like(x_TH)
    bits, e4m3 = down_EHI.scheme.bits, int(down_EHI.scheme.values == torch.float8_e4m3fn)
    how = by_token(down_EHI)

    route = parameters("quantized.route1", x_TH, H=H, bits=bits)
    _narrowed(route, H)
    programs = cdiv(E + 1, 2 * route["ROWS"]) + cdiv(S, route["ROWS"])
    launch(_route_one, (programs,), x_TH, norm_H, router_FH, *_stored(shared_gate_up_SH), logits, inner_shared, eps,
           H=H, E=E, S=S, **form(shared_gate_up_SH), **how, **route)  # fmt: skip

    choice = {"E": E, "K": k, "I": I, "H": H, "STRIDE": len(logits), "LANES": lanes, "PARTS": parts}
    up = parameters("quantized.up1", x_TH, H=H, I=I, bits=bits, e4m3=e4m3)
    _narrowed(up, H)
    launch(_up_one, (k * cdiv(I, up["ROWS"]),), x_TH, norm_H, logits, *_stored(gate_up_EJH), inner, eps,
           COPIES=up["num_warps"], **form(gate_up_EJH), **how, **choice, **up)  # fmt: skip

    down = parameters("quantized.down1", x_TH, H=H, I=I, bits=bits, e4m3=e4m3)
    launch(_down_one, (cdiv(H, down["ROWS"]),), x_TH, logits, *_stored(down_EHI), *_stored(shared_down_HS),
           inner, inner_shared, y_TH, S=S, RANKS=power_of_2(k), BLOCK=max(64, power_of_2(I)),
           BLOCK_S=max(64, power_of_2(S)), GROUP_S=form(shared_down_HS)["GROUP"], COPIES=down["num_warps"],
           EARLY=up["pdl"] == 1 and down["pdl"] > 0, **form(down_EHI), **how, **choice, **down)  # fmt: skip
    return y_TH


def _stored(w: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    return w.values.view(torch.uint8), w.scales


def _narrowed(found: dict[str, Any], width: int) -> None:
    for name in ("BLOCK", "COLUMNS"):
        if name in found:
            found[name] = min(found[name], max(64, power_of_2(width)))
