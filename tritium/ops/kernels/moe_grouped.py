"""Routed experts for several tokens: grouped products over (token, choice) pairs of one expert, tile by tile.

    route    logits of h = norm(x)                     a decode step fuses the norm: the scale 1 / rms comes later
    choose   experts and weights of each token
    place    the pairs by expert, the tiles            every program sums the counts of the blocks before its own
    grouped  silu(gate h) · up h of each pair; then down of them
    combine  x + Σ by falling weight + sigmoid(gate) · shared

With at most FEW tokens nothing is placed: each program of `grouped` finds its expert and that one's tokens in the
choices of all. The shared expert of the experts' width is a group like any other, before the rest; another width goes
through `linear`. Nothing depends on the host knowing a choice: there are programs for as many tiles as there can be,
and those beyond the real number end. A pair's products see its own row alone, so a token's result does not depend on
the others.

Shapes: T tokens, E experts, K experts a token, H hidden, I expert width. Pair = token · K + rank; the shared expert's
follow. `order` [T K] int32: pairs by expert, then token. `tiles`: their number, then from 4 on (expert, first place,
end of the expert's places, -) each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tritium.ops.kernels.launch import (
    EXACT,
    bucket,
    cdiv,
    launch,
    parameters,
    power_of_2,
    release_next,
    target_of,
    wait_for_inputs,
)
from tritium.ops.kernels.mlp import silu
from tritium.ops.kernels.moe import LOWEST, keys, lanes_of, logits_stride, next_expert
from tritium.ops.kernels.norm import rms_norm
from tritium.ops.kernels.one_token import form, largest_of
from tritium.ops.kernels.quantized import depth_of, packed, prepare, tile_product
from tritium.ops.linear import linear
from tritium.ops.quantized import Quantized, Weight, Weights, row_blocks

FEW = 64
"""Tokens whose choices each program looks through."""


@triton.jit(do_not_specialize=["T"])
def _route(x, norm, router, g, logits, T, H: tl.constexpr, F: tl.constexpr, STRIDE: tl.constexpr, TOKENS: tl.constexpr,
           ROWS: tl.constexpr, BLOCK: tl.constexpr, FUSED: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
           pdl: tl.constexpr):  # fmt: skip
    """Logits of TOKENS tokens for ROWS rows of the router. x is h; FUSED: x is the stream, each program takes BLOCK
    columns of it, and the first of a block of tokens write g = x (1 + norm) and, beside the logits, Σ x²."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    first = tl.program_id(2) * BLOCK
    k = first + tl.arange(0, BLOCK)[None, :]
    real = (tokens < T)[:, None]
    x_at = tokens.to(tl.int64)[:, None] * H + k
    w_at = router + tl.minimum(rows, F - 1)[:, None] * H + k
    at = logits + (tl.program_id(2) * T + tokens).to(tl.int64) * STRIDE
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    if FUSED:
        w = tl.load(w_at, mask=k < H, other=0.0)
        weight = tl.load(norm + k, mask=k < H, other=0.0)
        wait_for_inputs(pdl)
        value = tl.load(x + x_at, mask=real & (k < H), other=0.0)
        writer = tl.where(tl.program_id(0) == 0, T, 0)
        tl.store(at + F, tl.sum(value * value, axis=1), mask=tokens < writer)
        value = (value * (1.0 + weight)).to(w.dtype)
        tl.store(g + x_at, value, mask=(k < H) & (tokens < writer)[:, None])
        total = tl.dot(value, tl.trans(w), total, input_precision=PRECISION)
    else:
        wait_for_inputs(pdl)
        for start in tl.range(0, H, BLOCK, num_stages=STAGES):
            value = tl.load(x + x_at + start, mask=real & (start + k < H), other=0.0)
            w = tl.load(w_at + start, mask=start + k < H, other=0.0)
            total = tl.dot(value, tl.trans(w), total, input_precision=PRECISION)
    release_next(pdl)
    tl.store(at[:, None] + rows[None, :], total, mask=real & (rows < F)[None, :])


@triton.jit(do_not_specialize=["T"])
def _choose(logits, experts, weights, chosen, scales, T, eps, H: tl.constexpr, K: tl.constexpr, RANKS: tl.constexpr,
            E: tl.constexpr, STRIDE: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr,
            STEPS: tl.constexpr, COUNT: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """Experts and weights of TOKENS tokens, by rank, then the shared expert's weight. STEPS above 0: the norm is fused,
    so logits are to be summed and scaled. `chosen`: [T, LANES PARTS / 32] bits of experts; COUNT: how often each
    expert is chosen here, [blocks, LANES PARTS]."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real = token < T
    wait_for_inputs(pdl)
    row = tl.minimum(token, T - 1)
    at = logits + row.to(tl.int64) * STRIDE + E
    gate = tl.load(at)
    if STEPS == 0:
        key, expert = keys(logits, row.to(tl.int64), 1.0, 0, STRIDE, E, LANES, PARTS, 1)
    else:
        squares = tl.load(at + 1)
        for s in tl.static_range(1, STEPS):
            gate += tl.load(at + s * T * STRIDE)
            squares += tl.load(at + s * T * STRIDE + 1)
        scale = tl.rsqrt(squares / H + eps)
        gate *= scale
        key, expert = keys(logits, row, scale[:, None], T * STRIDE, STRIDE, E, LANES, PARTS, STEPS)
    rank = tl.arange(0, RANKS)[None, :]
    largest, who, key = next_expert(key, expert)
    total = tl.full((TOKENS,), 1.0, tl.float32)
    value_TR, who_TR = total[:, None] + rank * 0.0, who[:, None] + rank * 0
    for j in tl.static_range(1, K):
        value, who, key = next_expert(key, expert)
        value = tl.exp(value - largest)
        total += value
        value_TR, who_TR = tl.where(rank == j, value[:, None], value_TR), tl.where(rank == j, who[:, None], who_TR)
    release_next(pdl)
    if STEPS > 0:
        tl.store(scales + token, scale, mask=real)
    tl.store(weights + token * (K + 1) + K, 1.0 / (1.0 + tl.exp(-gate)), mask=real)
    some = real[:, None] & (rank < K)
    tl.store(weights + token[:, None] * (K + 1) + rank, value_TR / total[:, None], mask=some)
    tl.store(experts + token[:, None] * K + rank, who_TR, mask=some)
    mine = ((key == LOWEST) & (expert < E) & real[:, None, None]).to(tl.int32)
    if COUNT:
        n = tl.program_id(0) * (LANES * PARTS) + tl.arange(0, LANES * PARTS)
        tl.store(chosen + n, tl.sum(tl.reshape(mine, (TOKENS, LANES * PARTS)), axis=0))
    else:
        bits = tl.reshape(mine << (expert % 32), (TOKENS, LANES // 32, 32, PARTS))
        word = tl.arange(0, LANES // 32)[:, None] + tl.arange(0, PARTS)[None, :] * (LANES // 32)
        at_bits = chosen + token[:, None, None] * (LANES * PARTS // 32) + word[None, :, :]
        tl.store(at_bits, tl.sum(bits, axis=2), mask=real[:, None, None])


@triton.jit(do_not_specialize=["T"])
def _place(experts, counts, order, tiles, T, K: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr,
           TOKENS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """The places of TOKENS tokens' pairs; the first program writes the tiles. STEP: blocks whose counts are summed at a
    time."""
    N: tl.constexpr = LANES * PARTS
    block = tl.program_id(0)
    n = tl.arange(0, N)
    expert = n % PARTS * LANES + n // PARTS
    token = block * TOKENS + tl.arange(0, TOKENS)
    before, count = tl.zeros((N,), tl.int32), tl.zeros((N,), tl.int32)
    wait_for_inputs(pdl)
    for start in range(0, tl.num_programs(0), STEP):
        other = start + tl.arange(0, STEP)[:, None]
        some = tl.load(counts + other * N + n[None, :], mask=other < tl.num_programs(0), other=0)
        count += tl.sum(some, axis=0)
        before += tl.sum(tl.where(other < block, some, 0), axis=0)
    rank = tl.full((TOKENS, N), -1, tl.int32)
    for j in tl.static_range(K):
        who = tl.load(experts + token * K + j, mask=token < T, other=-1)
        rank = tl.where(expert[None, :] == who[:, None], j, rank)
    release_next(pdl)
    start = tl.cumsum(count, axis=0) - count
    chosen = (rank >= 0).to(tl.int32)
    place = (start + before)[None, :] + tl.cumsum(chosen, axis=0) - chosen
    tl.store(order + place, token[:, None] * K + rank, mask=rank >= 0)
    if block == 0:
        many = (count + TILE - 1) // TILE
        first = tl.cumsum(many, axis=0) - many
        tl.store(tiles, tl.sum(many, axis=0))
        for i in range(tl.max(many, axis=0)):
            at = tiles + 4 + 4 * (first + i)
            tl.store(at, expert, mask=i < many)
            tl.store(at + 1, start + i * TILE, mask=i < many)
            tl.store(at + 2, start + count, mask=i < many)


@triton.jit
def _product(x, base, y, scales, x_row, y_row, real, row, N: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
             ROWS: tl.constexpr, BLOCK: tl.constexpr, UP: tl.constexpr, SCALED: tl.constexpr, SWAP: tl.constexpr,
             STAGES: tl.constexpr, PRECISION: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """TOKENS rows of x by ROWS of the N rows at `base` of D weights."""
    k = tl.arange(0, BLOCK)
    real = real[:, None]
    x_at = x + x_row.to(tl.int64)[:, None] * D + k[None, :]
    w_at = base + tl.minimum(row, N - 1)[:, None] * D + k[None, :]
    if SWAP:
        total = tl.zeros((ROWS, TOKENS), tl.float32)
    else:
        total = tl.zeros((TOKENS, ROWS), tl.float32)
    if UP:
        total_up = total
    for start in tl.range(0, D, BLOCK, num_stages=STAGES):
        if D % BLOCK == 0:
            a = tl.load(w_at + start)
            value = tl.load(x_at + start, mask=real, other=0.0)
            if UP:
                b = tl.load(w_at + N * D + start)
        else:
            inside = start + k[None, :] < D
            a = tl.load(w_at + start, mask=inside, other=0.0)
            value = tl.load(x_at + start, mask=inside & real, other=0.0)
            if UP:
                b = tl.load(w_at + N * D + start, mask=inside, other=0.0)
        if SWAP:
            total = tl.dot(a, tl.trans(value), total, input_precision=PRECISION)
            if UP:
                total_up = tl.dot(b, tl.trans(value), total_up, input_precision=PRECISION)
        else:
            total = tl.dot(value, tl.trans(a), total, input_precision=PRECISION)
            if UP:
                total_up = tl.dot(value, tl.trans(b), total_up, input_precision=PRECISION)
    release_next(pdl)
    if UP:
        if SCALED:
            scale = tl.load(scales + x_row)
            scale = scale[None, :] if SWAP else scale[:, None]
            total, total_up = total * scale, total_up * scale
        total = silu(total) * total_up
    if SWAP:
        total = tl.trans(total)
    y_at = y + y_row.to(tl.int64)[:, None] * N + row[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=real & (row < N)[None, :])


@triton.jit
def _quantized(x, base, w_scales, y, scales, x_row, y_row, real, row, N: tl.constexpr, D: tl.constexpr,
               ROWS: tl.constexpr, BLOCK: tl.constexpr, UP: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
               SHARING: tl.constexpr, ROUND: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr,
               PRECISION: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """As `_product`, with weights in fewer bits; `scales`: of x's rows where it is rounded."""
    TOKENS: tl.constexpr = x_row.shape[0]
    if UP:
        r = tl.arange(0, 2 * ROWS)
        w_row = tl.minimum(tl.min(row, axis=0) + r % ROWS, N - 1) + r // ROWS * N
    else:
        w_row = tl.minimum(row, N - 1)
    total = tile_product(base, w_scales, x, scales, w_row, w_row >= 0, tl.where(real, x_row, 0), 0, D, D, BLOCK, KIND,
                         GROUP, SHARING, ROUND, True, PACKED, PRECISION, STAGES)  # fmt: skip
    release_next(pdl)
    if UP:
        gate, up = tl.split(tl.permute(tl.reshape(total, [2, ROWS, TOKENS]), [1, 2, 0]))
        total = silu(gate) * up
    y_at = y + y_row.to(tl.int64)[None, :] * N + row[:, None]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=real[None, :] & (row < N)[:, None])


@triton.jit(do_not_specialize=["T", "shared_tiles", "PAIRS"])
def _grouped(x, w, w_scales, shared, shared_scales, y, scales, order, tiles, T, shared_tiles, PAIRS, K: tl.constexpr,
             N: tl.constexpr, D: tl.constexpr, EACH: tl.constexpr, EACH_SCALES: tl.constexpr, KIND: tl.constexpr,
             GROUP: tl.constexpr, SHARING: tl.constexpr, ROUND: tl.constexpr, PACKED: tl.constexpr,
             TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, UP: tl.constexpr, SCALED: tl.constexpr,
             SWAP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """TOKENS pairs of one expert by ROWS of its N rows of D weights. UP: rows of h by token to silu(gate) · up by pair;
    else (down) rows by pair to rows by pair. SWAP: the weights are the left factor. An expert has EACH elements and
    EACH_SCALES scales; KIND: none, or how the weights are stored."""
    blocks: tl.constexpr = (N + ROWS - 1) // ROWS
    tile = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    of_shared = tile < shared_tiles
    at = tiles + 4 + 4 * tl.maximum(tile - shared_tiles, 0)
    wait_for_inputs(pdl)
    number, expert, first, end = tl.load(tiles), tl.load(at), tl.load(at + 1), tl.load(at + 2)
    if tile < number + shared_tiles:
        first = tl.where(of_shared, PAIRS + tile * TOKENS, first)
        end = tl.where(of_shared, PAIRS + T, end)
        base = tl.where(of_shared, shared, w + expert.to(tl.int64) * EACH)
        place = first + tl.arange(0, TOKENS)
        real = place < end
        place = tl.minimum(place, end - 1)
        pair = tl.where(of_shared, place, tl.load(order + place, mask=place < PAIRS, other=0))
        x_row = tl.where(of_shared, place - PAIRS, pair // K) if UP else pair
        if KIND != "":
            w_scales = tl.where(of_shared, shared_scales, w_scales + expert.to(tl.int64) * EACH_SCALES)
            _quantized(x, base, w_scales, y, scales, x_row, pair, real, row, N, D, ROWS, BLOCK, UP, KIND, GROUP,
                       SHARING, ROUND, PACKED, STAGES, PRECISION, pdl)  # fmt: skip
        else:
            _product(x, base, y, scales, x_row, pair, real, row, N, D, TOKENS, ROWS, BLOCK, UP, SCALED, SWAP, STAGES,
                     PRECISION, pdl)  # fmt: skip
    release_next(pdl)


@triton.jit(do_not_specialize=["T", "slots", "first_slot", "PAIRS"])
def _grouped_few(x, w, w_scales, shared, shared_scales, y, scales, experts, chosen, T, slots, first_slot, PAIRS,
                 K: tl.constexpr, RANKS: tl.constexpr, WORDS: tl.constexpr, FEW: tl.constexpr, N: tl.constexpr,
                 D: tl.constexpr, EACH: tl.constexpr, EACH_SCALES: tl.constexpr, KIND: tl.constexpr,
                 GROUP: tl.constexpr, SHARING: tl.constexpr, ROUND: tl.constexpr, PACKED: tl.constexpr,
                 TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, UP: tl.constexpr, SCALED: tl.constexpr,
                 SWAP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """As `_grouped`, with the tokens of one chosen expert after the other, `slots` apart; 0 is the shared expert. FEW:
    T or more."""
    blocks: tl.constexpr = (N + ROWS - 1) // ROWS
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    token, rank, word = tl.arange(0, FEW), tl.arange(0, RANKS)[None, :], tl.arange(0, WORDS)[None, :]
    expert = tl.arange(0, 32 * WORDS)
    real = (token < T)[:, None]
    wait_for_inputs(pdl)
    bits = tl.load(chosen + token[:, None] * WORDS + word, mask=real, other=0)
    who = tl.load(experts + token[:, None] * K + rank, mask=real & (rank < K), other=-1)
    any_bits = tl.reduce(bits, 0, _or)
    is_chosen = tl.reshape((any_bits[:, None] >> tl.arange(0, 32)[None, :]) & 1, (32 * WORDS,))
    slot = tl.cumsum(is_chosen, axis=0) * is_chosen
    for mine in range(first_slot + tl.program_id(0) // blocks, tl.max(slot, axis=0) + 1, slots):
        e = tl.sum(tl.where(slot == mine, expert, 0), axis=0)
        here, base, at_scales = who == e, w + e.to(tl.int64) * EACH, w_scales + e.to(tl.int64) * EACH_SCALES
        pair = token * K + tl.sum(tl.where(here, rank, 0), axis=1)
        has = tl.max(here.to(tl.int32), axis=1)
        if mine == 0:
            base, at_scales, pair, has = shared, shared_scales, PAIRS + token, (token < T).to(tl.int32)
        place = tl.cumsum(has, axis=0) * has
        count = tl.sum(has, axis=0)
        for first in range(1, 2 if FEW <= TOKENS else count + 1, TOKENS):
            at = first + tl.arange(0, TOKENS)
            same = at[:, None] == place[None, :]
            y_row = tl.sum(tl.where(same, pair[None, :], 0), axis=1)
            x_row = tl.sum(tl.where(same, token[None, :], 0), axis=1) if UP else y_row
            if KIND != "":
                _quantized(x, base, at_scales, y, scales, x_row, y_row, at <= count, row, N, D, ROWS, BLOCK, UP, KIND,
                           GROUP, SHARING, ROUND, PACKED, STAGES, PRECISION, pdl)  # fmt: skip
            else:
                _product(x, base, y, scales, x_row, y_row, at <= count, row, N, D, TOKENS, ROWS, BLOCK, UP, SCALED,
                         SWAP, STAGES, PRECISION, pdl)  # fmt: skip
    release_next(pdl)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _combine(x, weights, routed, shared, y, H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, pdl: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    wait_for_inputs(pdl)
    weights += token * (K + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(K):
        value = tl.load(routed + (token * K + j) * H + column, mask=inside, other=0.0).to(tl.float32)
        total += value * tl.load(weights + j)
    value = tl.load(shared + token * H + column, mask=inside, other=0.0).to(tl.float32)
    total += value * tl.load(weights + K)
    value = tl.load(x + token * H + column, mask=inside, other=0.0)
    release_next(pdl)
    tl.store(y + token * H + column, value + total, mask=inside)


def grouped(x_TH: torch.Tensor, norm_H: torch.Tensor, eps: float, router_FH: torch.Tensor, gate_up_EJH: Weight,
            down_EHI: Weight, shared_gate_up_SH: Weights, shared_down_HS: Weights, k: int) -> torch.Tensor:  # fmt: skip
    (T, H), (E, _, I) = x_TH.shape, down_EHI.shape
    pairs, dtype, device, like = T * k, down_EHI.dtype, x_TH.device, bucket(T)
    together = row_blocks(shared_down_HS)[0].shape[1] == I and all(
        getattr(routed, "scheme", None) == getattr(shared, "scheme", None) and len(row_blocks(shared)) == 1
        for routed, shared in ((gate_up_EJH, shared_gate_up_SH), (down_EHI, shared_down_HS))
    )
    plain = not isinstance(gate_up_EJH, Quantized)

    route = _tiled("moe.route", x_TH, dtype, H, T=like)
    # float16 has no room for values that are not normalised yet.
    fused = route["FUSED"] = bool(route["FUSED"] and together and plain and dtype != torch.float16)
    steps = cdiv(H, route["BLOCK"]) if fused else 1
    logits = x_TH.new_empty(steps, T, logits_stride(E))
    h_TH = torch.empty_like(x_TH, dtype=dtype)
    given: tuple[torch.Tensor, torch.Tensor | None] = h_TH, None
    if isinstance(gate_up_EJH, Quantized):
        given = prepare(x_TH, gate_up_EJH, norm_H, eps, h_TH)
    elif not fused:
        h_TH = rms_norm(x_MD=x_TH, w_D=norm_H, eps=eps, dtype=dtype)
        given = h_TH, None
    grid: tuple[int, ...] = (cdiv(E + 1, route["ROWS"]), cdiv(T, route["TOKENS"]), steps)
    launch(_route, grid, x_TH if fused else h_TH, norm_H, router_FH, h_TH, logits, T,
           H=H, F=E + 1, STRIDE=logits.shape[2], PRECISION=EXACT, **route)  # fmt: skip

    up, down = (
        _tiled(f"quantized.grouped_{name}", x_TH, dtype, width, H=H, I=I, T=like, bits=w.scheme.bits)
        if isinstance(w, Quantized)
        else _tiled(f"moe.grouped_{name}", x_TH, dtype, width, H=H, I=I, T=like)
        for name, w, width in (("up", gate_up_EJH, H), ("down", down_EHI, I))
    )
    slots, tile, few = up.pop("SLOTS", E), up["TOKENS"], T <= FEW
    most = (pairs + min(E, pairs) * (tile - 1)) // tile
    lanes, parts = lanes_of(E)
    choose = parameters("moe.choose", x_TH, E=E, T=like)
    choose["TOKENS"] = 1 if few else choose["TOKENS"]
    choose["num_warps"] = min(choose["num_warps"], choose["TOKENS"])
    blocks, ranks = cdiv(T, choose["TOKENS"]), power_of_2(k)
    weights, scales = x_TH.new_empty(T, k + 1), x_TH.new_empty(T)
    experts, chosen, order, tiles = (
        torch.empty(n, dtype=torch.int32, device=device) for n in (pairs, blocks * lanes * parts, pairs, 4 * most + 4)
    )
    shape = {"K": k, "LANES": lanes, "PARTS": parts}
    launch(_choose, (blocks,), logits, experts, weights, chosen, scales, T, eps, H=H, E=E, RANKS=ranks,
           STRIDE=logits.shape[2], STEPS=steps if fused else 0, COUNT=not few, **shape, **choose)  # fmt: skip
    if not few:
        step = min(32, power_of_2(blocks))
        launch(_place, (blocks,), experts, chosen, order, tiles, T, TILE=tile, STEP=step, **shape, **choose)

    rows = pairs + (T if together else 0)
    inner, out = h_TH.new_empty(rows, I), h_TH.new_empty(rows, H)
    for is_up, w, shared, y, options in (
        (True, gate_up_EJH, shared_gate_up_SH, inner, up),
        (False, down_EHI, shared_down_HS, out, {**down, "TOKENS": tile}),
    ):
        n, d = y.shape[1], w.shape[2]
        options = {**options, "K": k, "N": n, "D": d, "UP": is_up, "SCALED": fused and is_up, "PRECISION": EXACT}
        if isinstance(w, Quantized):
            if not is_up:
                given = prepare(inner, w, None, eps)
            stored = w.values.view(torch.uint8), w.scales
            of_shared: Any = (shared.values.view(torch.uint8), shared.scales) if together else stored  # type: ignore[union-attr]
            options |= {**form(w), "ROUND": largest_of(w) > 0, "PACKED": packed(target_of(x_TH)),
                        "BLOCK": depth_of(w, options["BLOCK"])}  # fmt: skip
        else:
            given = given if is_up else (inner, None)
            stored, of_shared = (w, w), (shared, shared) if together else (w, w)
            options |= {"KIND": "", "GROUP": 0, "SHARING": 1, "ROUND": False, "PACKED": False}
        options |= {"EACH": stored[0][0].numel(), "EACH_SCALES": stored[1][0].numel()}
        x, x_scales = given[0], scales if given[1] is None else given[1]
        programs = cdiv(n, options["ROWS"])
        if few:
            groups = min(E, pairs, slots) + together
            launch(_grouped_few, (groups * programs,), x, *stored, *of_shared, y, x_scales, experts, chosen, T, groups,
                   1 - together, pairs, RANKS=ranks, WORDS=lanes * parts // 32, FEW=power_of_2(T),
                   **options)  # fmt: skip
        else:
            shared_tiles = cdiv(T, tile) if together else 0
            launch(_grouped, ((shared_tiles + most) * programs,), x, *stored, *of_shared, y, x_scales, order, tiles, T,
                   shared_tiles, pairs, **options)  # fmt: skip
    if together:
        out_shared = out[pairs:]
    else:
        inner_shared = linear(x_MK=h_TH, w_JK=shared_gate_up_SH, gated=True)
        out_shared = linear(x_MK=inner_shared, w_JK=shared_down_HS)

    y_TH = torch.empty_like(x_TH)
    last = parameters("moe.combine", x_TH, T=like)
    last["BLOCK"] = min(last["BLOCK"], power_of_2(H))
    grid = (T, cdiv(H, last["BLOCK"]))
    launch(_combine, grid, x_TH, weights, out, out_shared, y_TH, H=H, K=k, **last)
    return y_TH


def _tiled(name: str, x: torch.Tensor, dtype: torch.dtype, width: int, **key: int) -> dict[str, Any]:
    """Launch parameters as found for two-byte weights; wider ones take half as many rows and half as many of `width`
    columns at a time."""
    found = parameters(name, x, **key)
    found["ROWS"] = max(16, found["ROWS"] * 2 // dtype.itemsize)
    found["BLOCK"] = max(16, min(found["BLOCK"] * 2 // dtype.itemsize, power_of_2(width)))
    return found
