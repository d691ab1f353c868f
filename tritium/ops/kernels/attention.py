"""Paged causal attention: short rows split over their keys, long rows in tiles of queries. See `tritium.ops.attention`.

Short rows (decode, drafts): a program takes the query heads of one key / value head, for all tokens of a row, over a
share of the row's pages; a second kernel merges the shares and applies the gate. The grid knows no context: shares are
computed on the device, so one graph serves every step, and a row's result does not depend on the other rows' contexts.
Long rows (prefill): a program takes a tile of one row's tokens and one query head over all pages up to the diagonal.

Shapes: T tokens, R rows, N query heads, G key / value heads, D head dim, Q tokens of a short row at most, S shares.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from tritium.ops.handed import Handed, Peak
from tritium.ops.kernels.launch import (
    bucket,
    cdiv,
    launch,
    parameters,
    power_of_2,
    release_next,
    target_of,
    wait_for_inputs,
)
from tritium.ops.kernels.one_token import leave_peak
from tritium.ops.spans import Spans

LOWEST = tl.constexpr(-1e30)
"""Start of a running maximum: finite, so that a row that sees no key of a page meets no -inf - -inf."""


GROWTH = tl.constexpr(8.0)
"""Powers of 2 that scores may be above the maximum in use: weights of up to 256 are as good as those of up to 1, and
the division by their sum takes them back."""
FADE = tl.constexpr(
    "{.reg .pred p; setp.eq.s32 p, $384, 0; @p bra.uni KEPT;"
    + " ".join(f"mul.f32 ${i}, ${i}, ${256 + i};" for i in range(128))
    + " KEPT: }"
)
"""For 128 numbers of a thread: each times its own factor, or as it is where its own flag is 0. The flag of the first
is asked for all, so the flags must be one number, whatever thread and register has which place of the tensor."""
FADE_FORM = tl.constexpr(",".join(["=f"] * 128 + [str(i) for i in range(128)] + ["f"] * 128 + ["r"] * 128))


@triton.jit
def _rows(base, first, live, d, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr):
    """[KEYS, BLOCK_D] of contiguous rows of D from element `first`. Zeros where a key is not live, if that is given:
    its place may hold anything."""
    at = base + first + tl.arange(0, KEYS)[:, None] * D + d[None, :]
    if live is None:
        rows = tl.load(at) if D == BLOCK_D else tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        rows = tl.load(at, mask=_cells(live, d, D, BLOCK_D), other=0.0)
    return rows


@triton.jit
def _query(queries, asked, d, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr):
    """[M, BLOCK_D], kept for all keys; where heads are multiplied in chunks, nothing."""
    at, cells = queries[:, None] + d[None, :], _cells(asked, d, D, BLOCK_D)
    return 0 if CHUNK < BLOCK_D else tl.load(at, mask=cells, other=0.0)


@triton.jit
def _cells(rows, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    return rows[:, None] if D == BLOCK_D else rows[:, None] & (d < D)[None, :]


@triton.jit
def _scores(query, queries, asked, k_pages, first, d, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr,
            KEYS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """q k [M, KEYS]. In chunks where a whole head of queries and keys would not fit into registers."""
    if CHUNK < BLOCK_D:
        scores = tl.zeros([M, KEYS], tl.float32)
        for c in tl.range(0, D, CHUNK, num_stages=1):
            e = c + tl.arange(0, CHUNK)
            part = tl.load(queries[:, None] + e[None, :], mask=asked[:, None] & (e < D)[None, :], other=0.0)
            at = k_pages + first + tl.arange(0, KEYS)[None, :] * D + e[:, None]
            k = tl.load(at, mask=(e < D)[:, None], other=0.0)
            scores = tl.dot(part, k, scores, input_precision="ieee")
    else:
        scores = tl.dot(query, tl.trans(_rows(k_pages, first, None, d, D, BLOCK_D, KEYS)), input_precision="ieee")
    return scores


@triton.jit
def _softmax(total, top, scores, scale):
    """One step of the running softmax, in powers of two: scores [M, KEYS] yet to be scaled. The maximum is raised
    where it has grown by much: then all that was summed has to be multiplied."""
    found = tl.max(scores, axis=1) * scale
    new_top = tl.where(found - top > GROWTH, found, top)
    weights = tl.exp2(scores * scale - new_top[:, None])
    fade = tl.exp2(top - new_top)
    return weights, fade, total * fade + tl.sum(weights, axis=1), new_top


@triton.jit
def _absorb(o, total, top, scores, v, scale):
    """A step's softmax and its values [KEYS, D]."""
    weights, fade, total, top = _softmax(total, top, scores, scale)
    o = tl.dot(weights.to(v.dtype), v, o * fade[:, None], input_precision="ieee")
    return o, total, top


@triton.jit
def _shares(context, length, since, splits, PAGE: tl.constexpr):
    """(first page, number of pages, pages of a share) of a short row."""
    first = since // PAGE
    count = tl.where(length > 0, tl.cdiv(context + length, PAGE) - first, 0)
    return first, count, tl.cdiv(count, splits)


@triton.jit(do_not_specialize=["splits", "Q"])
def _decode(q, k_pages, v_pages, parts, weights, lengths_R, contexts_R, since_R, starts_R, pages_RP, q_token, q_head,
            width, splits, Q, scale, N: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
            PAGE: tl.constexpr, KEYS: tl.constexpr, TOKENS: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr,
            CHUNK: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    HEADS: tl.constexpr = N // G
    STEPS: tl.constexpr = PAGE // KEYS
    program, r = tl.program_id(0), tl.program_id(1)
    g, share = program % G, program // G % splits
    m, d = tl.arange(0, M), tl.arange(0, BLOCK_D)
    token = program // (G * splits) * TOKENS + m // HEADS
    head = g * HEADS + m % HEADS
    length, context, since = tl.load(lengths_R + r), tl.load(contexts_R + r), tl.load(since_R + r)
    start, stop = tl.load(starts_R + r), context + length
    first, count, each = _shares(context, length, since, splits, PAGE)
    low = first + share * each
    high = tl.minimum(low + each, first + count)
    here = (m < TOKENS * HEADS) & (token < length)
    queries = q + (start + token).to(tl.int64) * q_token + head * q_head
    wait_for_inputs(pdl)
    query = _query(queries, here, d, D, BLOCK_D, CHUNK)
    o = tl.zeros([M, BLOCK_D], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], LOWEST, tl.float32)
    # A tile of tokens that the row does not have has nothing to do.
    end = tl.where(program // (G * splits) * TOKENS < length, tl.minimum(high * STEPS, tl.cdiv(stop, KEYS)), 0)
    for step in tl.range(low * STEPS, end):
        page = tl.load(pages_RP + r * width + step // STEPS).to(tl.int64)
        place = (page * G + g) * (PAGE * D) + step % STEPS * (KEYS * D)
        key = step * KEYS + tl.arange(0, KEYS)
        live = (key >= since) & (key < stop)
        scores = _scores(query, queries, here, k_pages, place, d, D, BLOCK_D, M, KEYS, CHUNK)
        v = _rows(v_pages, place, live, d, D, BLOCK_D, KEYS)
        seen = live[None, :] & (key[None, :] <= (context + token)[:, None])
        o, total, top = _absorb(o, total, top, tl.where(seen, scores, -float("inf")), v, scale)
    release_next(pdl)
    at = (((r * splits + share) * Q + token) * N + head).to(tl.int64)
    # A token that sees no key of this share gives it a weight of next to nothing, and 0 / 1.
    here = here & (token < tl.where(low < high, length, 0))
    tl.store(weights + at, top + tl.log2(tl.where(total > 0, total, 1.0)), mask=here)
    o = o / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(parts + at[:, None] * D + d[None, :], o, mask=_cells(here, d, D, BLOCK_D))


@triton.jit(do_not_specialize=["splits", "Q", "static"])
def _merge(parts, weights, gate, o, leave, lengths_R, contexts_R, since_R, starts_R, gate_token, gate_head, splits, Q,
           static, N: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SHARES: tl.constexpr, DIMS: tl.constexpr,
           LEAVE: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    n, i, r = tl.program_id(0) % N, tl.program_id(1), tl.program_id(2)
    d = tl.program_id(0) // N * DIMS + tl.arange(0, DIMS)
    s = tl.arange(0, SHARES)
    length, context, since = tl.load(lengths_R + r), tl.load(contexts_R + r), tl.load(since_R + r)
    token = (tl.load(starts_R + r) + i).to(tl.int64)
    _, count, each = _shares(context, length, since, splits, PAGE)
    there = i < length
    # Shares in use; the rest of the buffers was never written.
    used = s * each < tl.where(there, count, 0)
    g = tl.load(gate + token * gate_token + n * gate_head + d, mask=d < tl.where(there, D, 0), other=0.0).to(tl.float32)
    at = (((r * splits + s) * Q + i) * N + n).to(tl.int64)
    wait_for_inputs(pdl)
    power = tl.load(weights + at, mask=used, other=-float("inf"))
    part = tl.load(parts + at[:, None] * D + d[None, :], mask=used[:, None] & (d < D)[None, :], other=0.0)
    weight = tl.exp2(power - tl.where(there, tl.max(power, axis=0), 0.0))
    merged = tl.sum(part * weight[:, None], axis=0) / tl.where(there, tl.sum(weight, axis=0), 1.0)
    release_next(pdl)
    # In a graph a token that no row has gets zeros; elsewhere the place belongs to the next row.
    rounded = (merged / (1.0 + tl.exp(-g))).to(o.dtype.element_ty)
    tl.store(o + (token * N + n) * D + d, rounded, mask=d < tl.where(there | (static > 0), D, 0))
    if LEAVE:
        leave_peak(leave, rounded.to(tl.float32), d < D)


@triton.jit
def _pages(o, total, top, query, queries, asked, position, k_pages, v_pages, table, low, high, early, skipped, since,
           stop, g, scale, d, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
           M: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Steps [low, high) of KEYS keys. Where masked, the first `skipped` of them stand for steps from `early` on."""
    STEPS: tl.constexpr = PAGE // KEYS
    for i in tl.range(low, high):
        step = tl.where(i < low + skipped, early + i - low, i) if MASKED else i
        page = tl.load(table + step // STEPS).to(tl.int64)
        place = (page * G + g) * (PAGE * D) + step % STEPS * (KEYS * D)
        scores = _scores(query, queries, asked, k_pages, place, d, D, BLOCK_D, M, KEYS, CHUNK)
        if MASKED:
            key = step * KEYS + tl.arange(0, KEYS)
            live = (key >= since) & (key < stop)
            v = _rows(v_pages, place, live, d, D, BLOCK_D, KEYS)
            scores = tl.where(live[None, :] & (key[None, :] <= position[:, None]), scores, -float("inf"))
        else:
            v = _rows(v_pages, place, None, d, D, BLOCK_D, KEYS)
        o, total, top = _absorb(o, total, top, scores, v, scale)
    return o, total, top


@triton.jit
def _row(table, step, g, G: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr):
    """Of all rows of keys or values, the first of a step."""
    STEPS: tl.constexpr = PAGE // KEYS
    return (tl.load(table + step // STEPS) * G + g) * PAGE + step % STEPS * KEYS


@triton.jit
def _bulk_pages(o, total, top, query, k_rows, v_rows, table, low, high, g, scale, G: tl.constexpr, PAGE: tl.constexpr,
                KEYS: tl.constexpr, BULK: tl.constexpr):  # fmt: skip
    """As `_pages`, not masked, by the copy engine. The order is for Hopper, whose products run beside other work but
    are waited for where a number is first asked for: a step begins with the softmax of scores that are there, while
    the product with the values before and the copies are under way; then the next scores, and o only behind them.
    The last step computes scores once more, for nothing: a loop that may not run at all would set o beside it, and
    the assembler makes products wait for each other where anything else sets what they add to.
    BULK 2: a branch around the product of o with ones; `if` would be moved in front of the scores."""
    if low < high:
        row = _row(table, low, g, G, PAGE, KEYS)
        scores = tl.dot(query, tl.trans(k_rows.load([row, 0])), input_precision="ieee")
        for i in tl.range(low, high, disable_licm=True):  # what is moved in front of it takes registers
            weights, fade, total, top = _softmax(total, top, scores, scale)
            faded = tl.max((fade != 1.0).to(tl.int32), axis=0)
            v = v_rows.load([row, 0])
            row = _row(table, tl.minimum(i + 1, high - 1), g, G, PAGE, KEYS)
            scores = tl.dot(query, tl.trans(k_rows.load([row, 0])), input_precision="ieee")
            if BULK == 2:
                o = tl.inline_asm_elementwise(FADE, FADE_FORM, [o, fade[:, None], faded], tl.float32, True, 128)
            else:
                o *= fade[:, None]
            # Rounded only here: ahead of the wait, the product before still reads the registers that they take.
            o = tl.dot(weights.to(query.dtype), v, o, input_precision="ieee")
    return o, total, top


@triton.jit
def _gated(value, gate, gate_token, o, asked, d, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
           BLOCK_D: tl.constexpr):  # fmt: skip
    """Dims d of M tokens of a head."""
    m, cells = tl.arange(0, M)[:, None], _cells(asked, d, D, BLOCK_D)
    g = tl.load(gate + m * gate_token + d[None, :], mask=cells, other=0.0).to(tl.float32)
    tl.store(o + m * (N * D) + d[None, :], (value / (1.0 + tl.exp(-g))).to(o.dtype.element_ty), mask=cells)


@triton.jit(do_not_specialize=["tiles"])
def _prefill(q, gate, k_pages, v_pages, k_rows, v_rows, o, tiles_2X, contexts_R, lengths_R, since_R, starts_R,
             pages_RP, q_token, q_head, gate_token, gate_head, width, tiles, scale, N: tl.constexpr, G: tl.constexpr,
             D: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr,
             CHUNK: tl.constexpr, BULK: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    HEADS: tl.constexpr = N // G
    # Programs that run side by side read the same keys: heads of a group first, groups last.
    program = tl.program_id(0)
    tile, g = program // HEADS % tiles, program // (HEADS * tiles)
    n = g * HEADS + program % HEADS
    r, offset = tl.load(tiles_2X + tile), tl.load(tiles_2X + tiles + tile)
    context, length, since = tl.load(contexts_R + r), tl.load(lengths_R + r), tl.load(since_R + r)
    m, d = tl.arange(0, M), tl.arange(0, BLOCK_D)
    token = tl.load(starts_R + r) + offset
    asked = (m < length - offset) & (m >= -offset)
    queries = q + token.to(tl.int64) * q_token + n * q_head + m * q_token
    begin, stop = context + offset, context + length
    wait_for_inputs(pdl)
    query = _query(queries, asked, d, D, BLOCK_D, CHUNK)
    o_MD = tl.zeros([M, BLOCK_D], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], LOWEST, tl.float32)
    # Keys that all tokens of the tile see need no mask: steps from `since` to the tile's first token. They come last:
    # what masks need takes no registers by then.
    first, full = since // KEYS, (begin + 1) // KEYS
    skipped = ((since % KEYS > 0) & (first < full)).to(tl.int32)
    tail, table = tl.maximum(first, full), pages_RP + r * width
    for plain in tl.static_range(1 if BULK else 2):
        low = first + skipped if plain else tail - skipped
        high = full if plain else tl.cdiv(tl.minimum(begin + M, stop), KEYS)
        o_MD, total, top = _pages(
            o_MD, total, top, query, queries, asked, begin + m, k_pages, v_pages, table, low, high, first, skipped,
            since, stop, g, scale, d, G, D, PAGE, KEYS, M, BLOCK_D, CHUNK, not plain,
        )  # fmt: skip
    if BULK:
        o_MD, total, top = _bulk_pages(o_MD, total, top, query, k_rows, v_rows, table, first + skipped, full, g, scale,
                                       G, PAGE, KEYS, BULK)  # fmt: skip
    # Read anew: kept beside the loops, they would be more than the registers hold.
    token, asked = tl.load(starts_R + r) + offset, (m < tl.load(lengths_R + r) - offset) & (m >= -offset)
    release_next(pdl)
    o_MD = o_MD * (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    # In halves: a whole tile of gates beside it does not fit into registers.
    left, right = tl.split(tl.permute(tl.reshape(o_MD, [M, 2, BLOCK_D // 2]), (0, 2, 1)))
    gate += token.to(tl.int64) * gate_token + n * gate_head
    o += (token.to(tl.int64) * N + n) * D
    d = tl.arange(0, BLOCK_D // 2)
    _gated(left, gate, gate_token, o, asked, d, M, N, D, BLOCK_D)
    _gated(right, gate, gate_token, o, asked, d + BLOCK_D // 2, M, N, D, BLOCK_D)


def paged_attention(*, q_TND: torch.Tensor, gate_TND: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
                    spans: Spans, leave: Handed | None = None) -> torch.Tensor:  # fmt: skip
    """o_TND in q's dtype, contiguous. Queries and gates may be strided, but within a head."""
    o_TND = torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    if spans.num_short < spans.num_rows:
        _long_rows(q_TND, gate_TND, k_pages, v_pages, spans, o_TND)
    if spans.num_short:
        _short_rows(q_TND, gate_TND, k_pages, v_pages, spans, o_TND, leave)
    return o_TND


def _sizes(q_TND: torch.Tensor, k_pages: torch.Tensor) -> tuple[dict[str, Any], float]:
    """Constants of both kernels that read pages, and the scale of scores that makes exp2 of exp."""
    _, heads, dim = q_TND.shape
    _, groups, page, _ = k_pages.shape
    constants = {"N": heads, "G": groups, "D": dim, "PAGE": page, "BLOCK_D": max(power_of_2(dim), 16)}
    return constants, dim**-0.5 * math.log2(math.e)


def _parameters(op: str, q_TND: torch.Tensor, **key: int) -> dict[str, Any]:
    """Those of `op`; smaller tiles for 32-bit numbers, which no model is served with and no tensor core multiplies."""
    found = parameters(op, q_TND, **key)
    if q_TND.dtype == torch.float32:
        most = {"KEYS": 32, "CHUNK": 64, "BULK": 0, "M": 32, "queries": 32, "num_stages": 1}
        found |= {name: min(value, most[name]) for name, value in found.items() if name in most}
    return found


def _short_rows(q_TND: torch.Tensor, gate_TND: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
                spans: Spans, o_TND: torch.Tensor, leave: Handed | None) -> None:  # fmt: skip
    constants, scale = _sizes(q_TND, k_pages)
    _, heads, dim = q_TND.shape
    groups, rows, table = k_pages.shape[1], spans.num_short, spans.table
    most = max(spans.lengths[:rows])
    static = rows == spans.num_rows and spans.num_tokens == rows * most
    like, size = bucket(rows), max(16, power_of_2(most * heads // groups))
    found = _parameters("attention.decode", q_TND, groups=groups, head_dim=dim, rows=like, queries=size)
    size = max(min(size, found.pop("queries")), power_of_2(heads // groups))
    together = size // (heads // groups)
    tiles = cdiv(most, together)
    # As many programs as the device holds, and never so few for a row that a long one keeps the others waiting.
    programs = int(target_of(q_TND).cores * found.pop("programs"))
    splits = max(programs // (like * groups * tiles), found.pop("splits"))
    parts = torch.empty((rows, splits, most, heads, dim), dtype=torch.float32, device=q_TND.device)
    weights = torch.empty((rows, splits, most, heads), dtype=torch.float32, device=q_TND.device)
    of_rows = (table.lengths_R, table.contexts_R, table.since_R, table.starts_R)
    launch(
        _decode, (groups * splits * tiles, rows), q_TND, k_pages, v_pages, parts, weights, *of_rows, table.pages_RP,
        q_TND.stride(0), q_TND.stride(1), table.pages_RP.stride(0), splits, most, scale,
        TOKENS=together, M=size, **constants, **found,
    )  # fmt: skip
    found = parameters("attention.merge", q_TND, groups=groups, head_dim=dim, rows=like)
    shares = power_of_2(splits)
    dims = min(found.pop("dims"), constants["BLOCK_D"], max(8192 // shares, 1))
    launch(
        _merge, (heads * cdiv(dim, dims), most, rows), parts, weights, gate_TND, o_TND,
        leave.bits_1 if isinstance(leave, Peak) else o_TND, *of_rows, gate_TND.stride(0), gate_TND.stride(1), splits,
        most, int(static), N=heads, D=dim, PAGE=k_pages.shape[2], SHARES=shares, DIMS=dims,
        LEAVE=isinstance(leave, Peak) and len(q_TND) == 1, **found,
    )  # fmt: skip


def _long_rows(q_TND: torch.Tensor, gate_TND: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
               spans: Spans, o_TND: torch.Tensor) -> None:  # fmt: skip
    constants, scale = _sizes(q_TND, k_pages)
    found = _parameters("attention.prefill", q_TND, groups=k_pages.shape[1], head_dim=q_TND.shape[2])
    size, table = found["M"], spans.table
    tiles_2X = spans.cached(f"attention_tiles_{size}", lambda spans: _query_tiles(spans, size))
    tiles = tiles_2X.shape[1]
    rows: Any = (k_pages, v_pages)
    dim = q_TND.shape[2]
    found["BULK"] *= dim == constants["BLOCK_D"]  # a block of the copy engine is as wide as a power of 2
    if found["BULK"]:
        from triton.tools.tensor_descriptor import TensorDescriptor

        rows = [TensorDescriptor.from_tensor(x.view(-1, dim), [found["KEYS"], dim]) for x in (k_pages, v_pages)]
    launch(
        _prefill, (q_TND.shape[1] * tiles,), q_TND, gate_TND, k_pages, v_pages, *rows, o_TND, tiles_2X,
        table.contexts_R, table.lengths_R, table.since_R, table.starts_R, table.pages_RP, q_TND.stride(0),
        q_TND.stride(1), gate_TND.stride(0), gate_TND.stride(1), table.pages_RP.stride(0), tiles, scale, **constants,
        **found,
    )  # fmt: skip


def _query_tiles(spans: Spans, size: int) -> torch.Tensor:
    """Rows and first tokens within them [2, tiles] of the long rows' tiles, those with the most keys first. Tiles begin
    on absolute multiples of `size`, so a row's first may begin before it: the order in which a token's keys are summed
    goes by its tile, and must not go by where its prompt was cut."""
    tiles = [(r, at) for r in range(spans.num_short, spans.num_rows)
             for at in range(-(spans.contexts[r] % size), spans.lengths[r], size)]  # fmt: skip
    since = spans.since or (0,) * spans.num_rows
    tiles.sort(key=lambda tile: since[tile[0]] - spans.contexts[tile[0]] - tile[1])
    return spans.tensor(list(zip(*tiles)), torch.int32)
