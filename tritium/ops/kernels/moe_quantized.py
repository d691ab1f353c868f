"""Routed experts beside a shared one for one token, weights in fewer bits. See `tritium.ops.moe` and `moe` beside this.

Shapes: E experts, K experts a token, H hidden, I expert width, S shared width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tritium.ops.handed import Handed, Peak
from tritium.ops.kernels.four_bits import factor_of
from tritium.ops.kernels.launch import cdiv, launch, parameters, power_of_2, release_next, wait_for_inputs
from tritium.ops.kernels.mlp import silu
from tritium.ops.kernels.moe import _tile, _two_rows, _vector, keys, lanes_of, logits_stride, next_expert
from tritium.ops.kernels.one_token import (
    LEAST,
    QUICK,
    as_factors,
    by_token,
    form,
    leave_peak,
    multiplied,
    peak_arguments,
    peak_forms,
    row_scales,
    rows_by_token,
    split4,
    words,
)
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
    scale_at = scales + (base * ((J + SHARING - 1) // SHARING) + row // SHARING) * G
    scale = row_scales(scale_at, 0, rows, K // PER, W, GROUP, PER, EVEN)
    return at, scale_at, words(at, 0, rows, K // PER, W, EVEN), scale


@triton.jit
def _route_one(x, norm, router, shared, scales, logits, inner, peak, eps, H: tl.constexpr, E: tl.constexpr,
               S: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr,
               GROUP: tl.constexpr, SHARING: tl.constexpr, LARGEST: tl.constexpr, NATIVE: tl.constexpr,
               PEAK: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
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
        sums, squares = rows_by_token((tile, up_tile), (scale, up_scale), (at, up_at), (scale_at, up_scale_at), peak, x,
                                      norm, rows, H, COLUMNS, KIND, GROUP, LARGEST, NATIVE, FULL, True,
                                      PEAK)  # fmt: skip
        release_next(pdl)
        unit = tl.rsqrt(squares / H + eps)
        tl.store(inner + s, (silu(sums[0] * unit) * (sums[1] * unit)).to(inner.dtype.element_ty), mask=rows)
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
def _up_one(x, norm, logits, gate_up, scales, inner, peak, eps, H: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
            I: tl.constexpr, STRIDE: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr, COPIES: tl.constexpr,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SHARING: tl.constexpr,
            LARGEST: tl.constexpr, NATIVE: tl.constexpr, PEAK: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
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
    sums, squares = rows_by_token((tile, up_tile), (scale, up_scale), (at, up_at), (scale_at, up_scale_at), peak, x,
                                  norm, rows, H, COLUMNS, KIND, GROUP, LARGEST, NATIVE, FULL, True, PEAK)  # fmt: skip
    release_next(pdl)
    unit = tl.rsqrt(squares / H + eps)
    value = silu(sums[0] * unit) * (sums[1] * unit) * tl.max(mine / total, axis=0)
    tl.store(inner + rank * I + i, value.to(inner.dtype.element_ty), mask=rows)


@triton.jit
def _as_factors(x, start, at, inside, PARTS: tl.constexpr, KIND: tl.constexpr, LARGEST: tl.constexpr,
                NATIVE: tl.constexpr):  # fmt: skip
    """Of stretches of x that lie in PARTS equal parts of N groups, `as_factors`, by parts what x was scaled
    for, and what products count by [N]. `start` [N, 1] is a stretch's first number; `at` [N, 16] are bytes of a
    weight's row as they lie, which meet one or two numbers of x each, as `inside`, or none."""
    N: tl.constexpr = at.shape[0]
    dtype: tl.constexpr = x.dtype.element_ty
    if KIND == "int8" or KIND == "e4m3":
        values = (tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32),)
    elif dtype == tl.float32:
        values = (tl.load(x + start + 2 * at, mask=inside, other=0.0),)
        values += (tl.load(x + start + 2 * at + 1, mask=inside, other=0.0),)  # type: ignore[assignment]
    else:
        two = tl.load((x + start).to(tl.pointer_type(tl.int32)) + at, mask=inside, other=0)
        values = (two.to(tl.int16).to(dtype, bitcast=True).to(tl.float32),)
        values += ((two >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32),)  # type: ignore[assignment]
    unit = tl.full([N], 1.0, tl.float32)
    if LARGEST > 0:
        most = tl.max(tl.abs(values[0]), axis=1).to(tl.int32, bitcast=True)  # integers sort alike, and faster
        most = tl.max(tl.reshape(most, [PARTS, N // PARTS]), axis=1)
        most = tl.reshape(tl.broadcast_to(most[:, None], [PARTS, N // PARTS]), [N]).to(tl.float32, bitcast=True)
        most = tl.maximum(most, LEAST)
        values = (values[0] * (LARGEST / most)[:, None],)
        unit = most / LARGEST * (64.0 if NATIVE == QUICK else 1.0)
    elif len(values) == 2 and NATIVE == QUICK:
        unit *= 0.0625 if KIND == "int4" else 0.5
    elif len(values) == 2:
        unit *= 2.0**69 if KIND == "int4" else 2.0**68
    value = tl.reshape(values[0], [4 * N, 4])
    if len(values) == 2:
        even, odd = split4(value), split4(tl.reshape(values[1], [4 * N, 4]))
        value = even[0], odd[0], even[1], odd[1], even[2], odd[2], even[3], odd[3]
    factors, added = as_factors(value, KIND, LARGEST > 0, NATIVE)
    return factors, added, unit


@triton.jit
def _product(tile, scale, factors, added, unit, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """[N, 16] bytes of weights, scales and units [N] by factors: [N]."""
    bytes4 = tl.reshape(tile, [tile.shape[0], 4, 4]).to(tl.int32) << (8 * tl.arange(0, 4))[None, None, :]
    out = multiplied(tl.reshape(tl.sum(bytes4, axis=2), [1, 4 * tile.shape[0]]), factors, added, KIND, NATIVE)
    return tl.reshape(out, [tile.shape[0]]).to(tl.float32) * (factor_of(scale) * unit)


@triton.jit
def _joined(rows):
    """A power of 2 of [N] as [N, 2, .. 2], the last of them the lowest bit of a row's number."""
    return tl.join(_joined(rows[0::2]), _joined(rows[1::2])) if len(rows) > 1 else rows[0]


@triton.jit
def _down_one(x, logits, down, scales, shared, shared_scales, inner, inner_shared, y, leave, behind, H: tl.constexpr,
              E: tl.constexpr, K: tl.constexpr, RANKS: tl.constexpr, I: tl.constexpr, S: tl.constexpr,
              STRIDE: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr, COPIES: tl.constexpr, ROWS: tl.constexpr,
              BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
              GROUP_S: tl.constexpr, SHARING: tl.constexpr, LARGEST: tl.constexpr, NATIVE: tl.constexpr,
              EARLY: tl.constexpr, LEAVE: tl.constexpr, BEHIND: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """ROWS of the result, all words of weights on their way at once; EARLY: before the wait, as in `moe`, and what the
    shared expert gives, which the kernel before the last one left. A row of all chosen experts is one of RANKS equal
    parts: groups of four words [N], of which a thread holds the bytes and the numbers of x that they meet."""
    PER: tl.constexpr = 4 if KIND == "int8" or KIND == "e4m3" else 8
    WIDTH: tl.constexpr = I // PER * 4
    WIDTH_S: tl.constexpr = S // PER * 4
    G: tl.constexpr = BLOCK // (4 * PER)
    G_S: tl.constexpr = BLOCK_S // (4 * PER)
    SCALES: tl.constexpr = (I + GROUP - 1) // GROUP if GROUP else 1
    SCALES_S: tl.constexpr = (S + GROUP_S - 1) // GROUP_S if GROUP_S else 1
    first = tl.program_id(0) * ROWS
    byte = tl.arange(0, 16)[None, :]
    n = tl.arange(0, ROWS * G_S)
    row = tl.minimum(first + n // G_S, H - 1)
    group_s = n % G_S
    at_s = group_s[:, None] * 16 + byte
    in_s = at_s < WIDTH_S
    tile_s = tl.load(shared + row[:, None] * WIDTH_S + at_s, mask=in_s, other=0, eviction_policy="evict_first")
    group_s = tl.minimum(group_s * (4 * PER) // GROUP_S, SCALES_S - 1) if GROUP_S else 0
    scale_s = tl.load(shared_scales + row // SHARING * SCALES_S + group_s)
    if not EARLY:
        wait_for_inputs(pdl)
    key, expert = keys(logits, tl.arange(0, COPIES) * 0, 1.0, 0, STRIDE, E, LANES, PARTS, 1)
    gate = tl.load(logits + E)
    n = tl.arange(0, RANKS * G)
    rank = n // G
    group = n % G
    chosen = rank * 0
    for j in tl.static_range(K):
        _, who, key = next_expert(key, expert)
        if COPIES * 32 <= RANKS * G:  # a warp's copy is for what that warp's threads hold of [N]
            who = tl.broadcast_to(who[None, :, None], [RANKS * G // (32 * COPIES), COPIES, 32])
            who = tl.reshape(who, [RANKS * G])
        else:
            who = tl.max(who, axis=0)
        chosen = tl.where(rank == j, who, chosen)
    chosen = chosen.to(tl.int64)
    at = group[:, None] * 16 + byte
    inside = (rank < K)[:, None] & (at < WIDTH)
    group = tl.minimum(group * (4 * PER) // GROUP, SCALES - 1) if GROUP else 0
    tiles, tile_scales, out = (), (), ()
    for r in tl.static_range(ROWS):
        row = tl.minimum(first + r, H - 1)
        tile_at = down + (chosen * H + row)[:, None] * WIDTH + at
        tile = tl.load(tile_at, mask=inside, other=0, eviction_policy="evict_first")
        tiles += (tile,)  # type: ignore[assignment]
        row = chosen * ((H + SHARING - 1) // SHARING) + row // SHARING
        tile_scales += (tl.load(scales + row * SCALES + group),)  # type: ignore[assignment]
    row = first + tl.arange(0, ROWS)
    residual = tl.load(x + row, mask=row < H, other=0.0)
    if BEHIND:
        weight = tl.load(behind + row, mask=row < H, other=0.0)
    factors, added, unit = _as_factors(inner_shared, 0, at_s, in_s, ROWS, KIND, LARGEST, NATIVE)
    of_shared = _product(tile_s, scale_s, factors, added, unit, KIND, NATIVE)
    residual += tl.sum(tl.reshape(of_shared, [ROWS, G_S]), axis=1) / (1.0 + tl.exp(-gate))
    if EARLY:
        wait_for_inputs(pdl)
    factors, added, unit = _as_factors(inner, rank[:, None] * I, at, inside, RANKS, KIND, LARGEST, NATIVE)
    for r in tl.static_range(ROWS):
        out += (_product(tiles[r], tile_scales[r], factors, added, unit, KIND, NATIVE),)  # type: ignore[assignment]
    total = tl.reshape(tl.sum(_joined(out), axis=0), [ROWS])
    release_next(pdl)
    total += residual
    tl.store(y + row, total, mask=row < H)
    if BEHIND:
        total += total * weight
    if LEAVE:
        leave_peak(leave, total, row < H)


def serves(weights: tuple[Any, ...]) -> bool:
    """Whether these can be multiplied by one token here: all of one scheme, in whole words."""
    first = weights[0]
    return isinstance(first, Quantized) and all(
        isinstance(w, Quantized) and w.scheme == first.scheme and w.shape[-1] * w.scheme.bits % 32 == 0 for w in weights
    )


def one(x_TH: torch.Tensor, given: Handed | None, leave: Handed | None, norm_H: torch.Tensor, eps: float,
        router_FH: torch.Tensor, gate_up_EJH: Quantized, down_EHI: Quantized, shared_gate_up_SH: Quantized,
        shared_down_HS: Quantized, k: int) -> torch.Tensor:  # fmt: skip
    (E, H, I), S = down_EHI.shape, shared_down_HS.shape[1]
    lanes, parts = lanes_of(E)
    logits = x_TH.new_empty(logits_stride(E))
    inner, inner_shared = x_TH.new_empty(k, I, dtype=down_EHI.dtype), x_TH.new_empty(S, dtype=down_EHI.dtype)
    y_TH = torch.empty_like(x_TH)
    bits, e4m3 = down_EHI.scheme.bits, int(down_EHI.scheme.values == torch.float8_e4m3fn)
    how, (before, *behind), peak = by_token(down_EHI), peak_arguments(given, leave, x_TH), isinstance(given, Peak)

    route = parameters("quantized.route1", x_TH, H=H, bits=bits)
    _narrowed(route, H)
    programs = cdiv(E + 1, 2 * route["ROWS"]) + cdiv(S, route["ROWS"])
    launch(_route_one, (programs,), x_TH, norm_H, router_FH, *_stored(shared_gate_up_SH), logits, inner_shared,
           before, eps, H=H, E=E, S=S, PEAK=peak, **form(shared_gate_up_SH), **how, **route)  # fmt: skip

    choice = {"E": E, "K": k, "I": I, "H": H, "STRIDE": len(logits), "LANES": lanes, "PARTS": parts}
    up = parameters("quantized.up1", x_TH, H=H, I=I, bits=bits, e4m3=e4m3)
    _narrowed(up, H)
    launch(_up_one, (k * cdiv(I, up["ROWS"]),), x_TH, norm_H, logits, *_stored(gate_up_EJH), inner, before,
           eps, COPIES=up["num_warps"], PEAK=peak, **form(gate_up_EJH), **how, **choice, **up)  # fmt: skip

    down = parameters("quantized.down1", x_TH, H=H, I=I, bits=bits, e4m3=e4m3)
    launch(_down_one, (cdiv(H, down["ROWS"]),), x_TH, logits, *_stored(down_EHI), *_stored(shared_down_HS),
           inner, inner_shared, y_TH, *behind, S=S, RANKS=power_of_2(k), BLOCK=max(64, power_of_2(I)),
           BLOCK_S=max(64, power_of_2(S)), GROUP_S=form(shared_down_HS)["GROUP"], COPIES=down["num_warps"],
           EARLY=up["pdl"] == 1 and down["pdl"] > 0, **peak_forms(leave), **form(down_EHI), **how, **choice,
           **down)  # fmt: skip
    return y_TH


def _stored(w: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    return w.values.view(torch.uint8), w.scales


def _narrowed(found: dict[str, Any], width: int) -> None:
    for name in ("BLOCK", "COLUMNS"):
        if name in found:
            found[name] = min(found[name], max(64, power_of_2(width)))
