"""Routed experts for several tokens: (token, choice) pairs sorted by expert, then grouped products over tiles of pairs.

    route    h = norm(x), logits                       a decode step fuses the norm
    choose   experts and weights of each token         with few tokens the same kernel sorts as well
    place    the order of the pairs, the tiles         every program sums the counts of the blocks before its own
    grouped  silu(gate h) · up h for pairs in order; then down of them, put back to (token, rank)
    combine  x + Σ by falling weight + sigmoid(gate) · shared

The shared expert of the experts' width is a group like any other, its tiles before the rest; another width goes through
`linear`. Nothing depends on the host knowing a choice: there are programs for as many tiles as there can be, and those
beyond the real number end. A pair's products see its own row alone, so a token's result does not depend on the others.

Shapes: T tokens, E experts, K experts a token, H hidden, I expert width. `order` [T K] int32: pair = token · K + rank,
by expert, then token. `tiles`: their number, then from 4 on (expert, first place, end of the expert's places, -) each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tritium.ops.kernels.launch import exact_dot, launch, parameters, release_next, wait_for_inputs
from tritium.ops.kernels.moe import keys, lanes_of, logits_stride, next_expert
from tritium.ops.kernels.norm import rms_norm
from tritium.ops.linear import linear


@triton.jit
def _route(x, norm, router, h, logits, eps, T, H: tl.constexpr, F: tl.constexpr, STRIDE: tl.constexpr,
           TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FUSED: tl.constexpr, STAGES: tl.constexpr,
           PRECISION: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """Logits of TOKENS tokens for ROWS rows of the router. FUSED: x is the stream, and h is written, too, column blocks
    in turn by the programs of a block of tokens; else x is h."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, BLOCK)
    x_at = tl.minimum(tokens, T - 1).to(tl.int64)[:, None] * H + k[None, :]
    w_at = router + tl.minimum(rows, F - 1)[:, None] * H + k[None, :]
    wait_for_inputs(pdl)
    scale = tl.zeros((TOKENS,), tl.float32)
    if FUSED:
        for start in tl.range(0, H, BLOCK, num_stages=STAGES):
            value = tl.load(x + x_at + start, mask=start + k[None, :] < H, other=0.0)
            scale += tl.sum(value * value, axis=1)
        scale = tl.rsqrt(scale / H + eps)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in tl.range(0, H, BLOCK, num_stages=STAGES):
        inside = start + k[None, :] < H
        value = tl.load(x + x_at + start, mask=inside, other=0.0)
        w = tl.load(w_at + start, mask=inside, other=0.0)
        if FUSED:
            weight = tl.load(norm + start + k[None, :], mask=inside, other=0.0)
            value = (value * scale[:, None] * (1.0 + weight)).to(w.dtype)
            mine = tl.where(start // BLOCK % tl.num_programs(0) == tl.program_id(0), T, 0)
            tl.store(h + x_at + start, value, mask=inside & (tokens < mine)[:, None])
        total = tl.dot(value, tl.trans(w), total, input_precision=PRECISION)
    release_next(pdl)
    at = logits + tokens.to(tl.int64)[:, None] * STRIDE + rows[None, :]
    tl.store(at, total, mask=(tokens < T)[:, None] & (rows < F)[None, :])


@triton.jit
def _order(block, token, expert, rank, before, count, order, tiles, K: tl.constexpr, TILE: tl.constexpr):
    """Writes the places of one block's pairs. `rank` [rows, N] is -1 where an expert is not chosen; `before` and
    `count` [N] are the pairs of each expert in earlier blocks and in all; the first block writes the tiles."""
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
def _choose(logits, experts, weights, counts, order, tiles, T, K: tl.constexpr, E: tl.constexpr, STRIDE: tl.constexpr,
            LANES: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr,
            pdl: tl.constexpr):  # fmt: skip
    """Experts and weights (not yet divided by their sum) of TOKENS tokens, by rank. WHOLE: these are all the tokens,
    and their pairs are put in order, too; else `counts` [blocks, LANES PARTS] says how often each expert is chosen."""
    N: tl.constexpr = LANES * PARTS
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real = token < T
    wait_for_inputs(pdl)
    key, expert = keys(logits, tl.minimum(token, T - 1), STRIDE, E, LANES, PARTS)
    rank = tl.full((TOKENS, LANES, PARTS), -1, tl.int32)
    largest = tl.zeros((TOKENS,), tl.float32)
    for j in tl.static_range(K):
        value, who, key = next_expert(key, expert)
        if j == 0:
            largest = value
        rank = tl.where(expert == who[:, None, None], j, rank)
        tl.store(weights + token * K + j, tl.exp(value - largest), mask=real)
        tl.store(experts + token * K + j, who, mask=real)
    release_next(pdl)
    rank = tl.reshape(tl.where(real[:, None, None], rank, -1), (TOKENS, N))
    count = tl.sum((rank >= 0).to(tl.int32), axis=0)
    if WHOLE:
        who = tl.max(tl.reshape(expert, (TOKENS, N)), axis=0)
        _order(0, token, who, rank, count * 0, count, order, tiles, K, TILE)
    else:
        tl.store(counts + tl.program_id(0) * N + tl.arange(0, N), count)


@triton.jit
def _place(experts, counts, order, tiles, T, K: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr,
           TOKENS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """The places of TOKENS tokens' pairs. STEP: blocks whose counts are summed at a time."""
    N: tl.constexpr = LANES * PARTS
    block = tl.program_id(0)
    n = tl.arange(0, N)
    expert = n % PARTS * LANES + n // PARTS
    token = block * TOKENS + tl.arange(0, TOKENS)
    before, count = tl.zeros((N,), tl.int32), tl.zeros((N,), tl.int32)
    rank = tl.full((TOKENS, N), -1, tl.int32)
    wait_for_inputs(pdl)
    for j in tl.static_range(K):
        who = tl.load(experts + token * K + j, mask=token < T, other=-1)
        rank = tl.where(expert[None, :] == who[:, None], j, rank)
    for start in range(0, tl.num_programs(0), STEP):
        other = start + tl.arange(0, STEP)[:, None]
        some = tl.load(counts + other * N + n[None, :], mask=other < tl.num_programs(0), other=0)
        count += tl.sum(some, axis=0)
        before += tl.sum(tl.where(other < block, some, 0), axis=0)
    release_next(pdl)
    _order(block, token, expert, rank, before, count, order, tiles, K, TILE)


@triton.jit
def _grouped(x, w, shared, y, order, tiles, T, shared_tiles, PAIRS, K: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
             TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, UP: tl.constexpr, SWAP: tl.constexpr,
             STAGES: tl.constexpr, PRECISION: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """TOKENS pairs of one expert by ROWS of its N rows of D weights. UP: rows of h by token to silu(gate) · up by
    place; else (down) rows by place to rows by pair. SWAP: the weights are the left factor."""
    blocks: tl.constexpr = (N + ROWS - 1) // ROWS
    tile = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    of_shared = tile < shared_tiles
    wait_for_inputs(pdl)
    if tile < tl.load(tiles) + shared_tiles:
        at = tiles + 4 + 4 * tl.maximum(tile - shared_tiles, 0)
        first = tl.where(of_shared, PAIRS + tile * TOKENS, tl.load(at + 1))
        end = tl.where(of_shared, PAIRS + T, tl.load(at + 2))
        base = tl.where(of_shared, shared, w + tl.load(at).to(tl.int64) * ((1 + UP) * N * D))
        place = first + tl.arange(0, TOKENS)
        real = place < end
        place = tl.minimum(place, end - 1)
        pair = tl.load(order + place, mask=place < PAIRS, other=0)
        if UP:
            x_row, y_row = tl.where(of_shared, place - PAIRS, pair // K), place
        else:
            x_row, y_row = place, tl.where(of_shared, place, pair)
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
                value = tl.load(x_at + start)
                if UP:
                    b = tl.load(w_at + N * D + start)
            else:
                inside = start + k[None, :] < D
                a = tl.load(w_at + start, mask=inside, other=0.0)
                value = tl.load(x_at + start, mask=inside, other=0.0)
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
            total = total / (1.0 + tl.exp(-total)) * total_up
        if SWAP:
            total = tl.trans(total)
        y_at = y + y_row.to(tl.int64)[:, None] * N + row[None, :]
        tl.store(y_at, total.to(y.dtype.element_ty), mask=real[:, None] & (row < N)[None, :])
    else:
        release_next(pdl)


@triton.jit
def _combine(x, logits, weights, routed, shared, y, H: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
             STRIDE: tl.constexpr, BLOCK: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    wait_for_inputs(pdl)
    sum_weights = tl.load(weights + token * K)
    for j in tl.static_range(1, K):
        sum_weights += tl.load(weights + token * K + j)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(K):
        value = tl.load(routed + (token * K + j) * H + column, mask=inside, other=0.0).to(tl.float32)
        total += value * (tl.load(weights + token * K + j) / sum_weights)
    value = tl.load(shared + token * H + column, mask=inside, other=0.0).to(tl.float32)
    total += value / (1.0 + tl.exp(-tl.load(logits + token * STRIDE + E)))
    value = tl.load(x + token * H + column, mask=inside, other=0.0)
    release_next(pdl)
    tl.store(y + token * H + column, value + total, mask=inside)


def grouped(x_TH: torch.Tensor, norm_H: torch.Tensor, eps: float, router_FH: torch.Tensor, gate_up_EJH: torch.Tensor,
            down_EHI: torch.Tensor, shared_gate_up_SH: torch.Tensor, shared_down_HS: torch.Tensor, k: int
            ) -> torch.Tensor:  # fmt: skip
    (T, H), (E, _, I), S = x_TH.shape, down_EHI.shape, shared_down_HS.shape[1]
    pairs, dtype = T * k, down_EHI.dtype
    lanes, parts = lanes_of(E)
    together = S == I
    up = _tiled("moe.grouped_up", x_TH, dtype, H=H, I=I, T=T)
    tile = up["TOKENS"]

    h_TH, logits = _routed(x_TH, norm_H, eps, router_FH, dtype, E)
    weights = x_TH.new_empty(T, k)
    order, experts = (torch.empty(pairs, dtype=torch.int32, device=x_TH.device) for _ in range(2))
    most = (pairs + min(E, pairs) * (tile - 1)) // tile
    tiles = order.new_empty(4 * (most + 1))

    choose = parameters("moe.choose", x_TH, E=E)
    blocks = triton.cdiv(T, choose["TOKENS"])
    counts = order.new_empty(blocks, lanes * parts)
    shape = {"K": k, "LANES": lanes, "PARTS": parts, "TILE": tile}
    launch(_choose, (blocks,), logits, experts, weights, counts, order, tiles, T,
           E=E, STRIDE=logits.shape[1], WHOLE=blocks == 1, **shape, **choose)  # fmt: skip
    if blocks > 1:
        launch(_place, (blocks,), experts, counts, order, tiles, T,
               STEP=min(choose["TOKENS"], triton.next_power_of_2(blocks)), **shape, **choose)  # fmt: skip

    shared_tiles = triton.cdiv(T, tile) if together else 0
    rows = pairs + (T if together else 0)
    inner, out = h_TH.new_empty(rows, I), h_TH.new_empty(rows, H)
    common = {"K": k, "TOKENS": tile, "PRECISION": exact_dot(dtype)}
    up.pop("TOKENS")
    down = _tiled("moe.grouped_down", x_TH, dtype, H=H, I=I, T=T)
    for x, w, shared, y, n, d, options in (
        (h_TH, gate_up_EJH, shared_gate_up_SH, inner, I, H, up),
        (inner, down_EHI, shared_down_HS, out, H, I, down),
    ):
        options["BLOCK"] = min(options["BLOCK"], max(16, triton.next_power_of_2(d)))
        grid = ((shared_tiles + most) * triton.cdiv(n, options["ROWS"]),)
        launch(_grouped, grid, x, w, shared, y, order, tiles, T, shared_tiles, pairs,
               N=n, D=d, UP=x is h_TH, **common, **options)  # fmt: skip

    if together:
        out_shared = out[pairs:]
    else:
        inner_shared = linear(x_MK=h_TH, w_JK=shared_gate_up_SH, gated=True)
        out_shared = linear(x_MK=inner_shared, w_JK=shared_down_HS)
    y_TH = torch.empty_like(x_TH)
    last = parameters("moe.combine", x_TH, T=T)
    last["BLOCK"] = min(last["BLOCK"], triton.next_power_of_2(H))
    launch(_combine, (T, triton.cdiv(H, last["BLOCK"])), x_TH, logits, weights, out, out_shared, y_TH,
           H=H, E=E, K=k, STRIDE=logits.shape[1], **last)  # fmt: skip
    return y_TH


def _routed(x_TH: torch.Tensor, norm_H: torch.Tensor, eps: float, router_FH: torch.Tensor, dtype: torch.dtype,
            experts: int) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(h_TH, logits_TL)."""
    T, H = x_TH.shape
    options = _tiled("moe.route", x_TH, dtype, T=T)
    options["BLOCK"] = min(options["BLOCK"], max(16, triton.next_power_of_2(H)))
    fused = options["FUSED"]
    h_TH = torch.empty_like(x_TH, dtype=dtype) if fused else rms_norm(x_MD=x_TH, w_D=norm_H, eps=eps, dtype=dtype)
    logits = x_TH.new_empty(T, logits_stride(experts))
    grid = triton.cdiv(experts + 1, options["ROWS"]), triton.cdiv(T, options["TOKENS"])
    launch(_route, grid, x_TH if fused else h_TH, norm_H, router_FH, h_TH, logits, eps, T,
           H=H, F=experts + 1, STRIDE=logits.shape[1], PRECISION=exact_dot(dtype), **options)  # fmt: skip
    return h_TH, logits


def _tiled(name: str, x: torch.Tensor, dtype: torch.dtype, **key: int) -> dict[str, Any]:
    """Launch parameters as found for two-byte weights; wider ones take half as many columns at a time."""
    found = dict(parameters(name, x, **key))
    found["BLOCK"] = max(16, found["BLOCK"] * 2 // dtype.itemsize)
    return found
