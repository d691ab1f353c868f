"""Sampling and log-probabilities without a word to the host. See `tritium.ops.sampling`.

A row is worked on in blocks of ids by many programs, then by one:

    peaks    the largest logit of every block
    weigh    the largest of the row: token and end of a greedy row. The others: sums of weights by block, and, where
             top_k or top_p cut, a tally by bins: how many weights and how much weight. A bin is what shares the
             leading bits of a weight as a float, so bins are in order of weights, and a cut lies in one bin
    collect  keys of the bins in which a cut may lie (top_p's waits for top_k's, so it is known up to a bin or two)
    cut      the cut itself: bisection among those keys; over the whole row should they be too many for the list
    sums     kept weight by block
    draw     the block, and the id within it, at which the running sum passes the draw

A block in which nothing can be kept is passed over unread: its largest logit says so, and top_k keeps nothing below
the k-th largest of the blocks' largest. The tally is made by atomic additions of integers, and the list in any order:
neither changes a result.

Shapes: S rows, V vocabulary, B blocks of BLOCK ids, D bins, C keys a list holds, K alternatives, W words of a mask.
`state_S3` int64: the least key kept, the row's largest logit as a key, keys collected.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tritium.ops.kernels.launch import bucket, cdiv, launch, parameters, power_of_2, release_next, wait_for_inputs
from tritium.ops.sampling import Edits, check_vocabulary, edited

_ID_BITS = tl.constexpr(19)
_LAST_ID = tl.constexpr(2**19 - 1)
_ONE = tl.constexpr(2.0**43)
_NOTHING = tl.constexpr(-(2**63))
_LOW = tl.constexpr(0xFFFFFFFF)
_COARSE = tl.constexpr(52 - 5)
"""Trailing bits of a float64 that tell no bins apart: there are 32 bins for every factor of 2."""
_TOP = tl.constexpr((1023 + 43) * 32)
"""Leading bits of 2^43."""
_BINS = 2048


@triton.jit
def _logits(logits, allowed, row, column, stride, words, V: tl.constexpr, MASKED: tl.constexpr):
    """float32; -inf where there is no such token or the row may not draw it."""
    x = tl.load(logits + row * stride + column, mask=column < V, other=float("-inf")).to(tl.float32)
    if MASKED:
        word = tl.load(allowed + row * words + column // 32, mask=column < V, other=0)
        x = tl.where((word >> (column % 32)) & 1 != 0, x, float("-inf"))
    return x


@triton.jit
def _flipped(bits):
    """Between float32 bits and integers of the same order: negative ones have their magnitude turned."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _order(x, column):
    """Unique int64 keys in order of float32 x, the lower of equal ids first; a NaN is the largest."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    rank = tl.where(x != x, 0x7FFFFFFF, _flipped(bits)).to(tl.int64)
    return (rank << _ID_BITS) + (column ^ _LAST_ID)


@triton.jit
def _logit(key):
    """The logit of a key of `_order`."""
    return _flipped((key >> _ID_BITS).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _token(key):
    return (key & _LAST_ID) ^ _LAST_ID


@triton.jit
def _weight(x, peak, temperature):
    return (tl.exp((x.to(tl.float64) - peak.to(tl.float64)) / temperature) * _ONE).to(tl.int64)


@triton.jit
def _bin(weight):
    """0 for the largest weight; beyond the last bin for weight 0."""
    return -(weight.to(tl.float64).to(tl.int64, bitcast=True) >> _COARSE).to(tl.int32) + _TOP


@triton.jit
def _keys(logits, allowed, row, column, stride, words, peak, temperature, least, V: tl.constexpr,
          MASKED: tl.constexpr):  # fmt: skip
    """Keys of weights; 0 for those below `least`."""
    weight = _weight(_logits(logits, allowed, row, column, stride, words, V, MASKED), peak, temperature)
    key = (weight << _ID_BITS) + (column ^ _LAST_ID)
    return tl.where(key >= least, key, 0)


@triton.jit
def _drawn(state, temperature, row):
    """Whether the row draws, its largest logit, its temperature, and the least key kept so far."""
    heat = tl.load(temperature + row)
    peak = _logit(tl.load(state + 3 * row + 1))
    return (heat > 0) & (tl.abs(peak) < float("inf")), peak, heat, tl.load(state + 3 * row)


@triton.jit
def _limits(top_k, top_p, row):
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    return k, p, (k > 0) | (p < 1)


@triton.jit
def _peaks(logits, allowed, best, state, tally, temperature, stride, words, V: tl.constexpr, B: tl.constexpr,
           BLOCK: tl.constexpr, MASKED: tl.constexpr, SHARE: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(pdl)
    key = _order(_logits(logits, allowed, row, column, stride, words, V, MASKED), column)
    release_next(pdl)
    tl.store(best + row * B + block, tl.max(key))
    if tl.load(temperature + row) > 0:
        if block == 0:
            tl.store(state + 3 * row + 2, 0)
        entry = block * SHARE + tl.arange(0, SHARE)
        tl.store(tally + row * (2 * 2048) + entry, tl.zeros([SHARE], tl.int64), mask=entry < 2 * 2048)


@triton.jit
def _weigh(logits, allowed, best, state, tally, sums, token, finite, temperature, top_k, top_p, min_p, stride, words,
           V: tl.constexpr, B: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
           pdl: tl.constexpr):  # fmt: skip
    SPAN: tl.constexpr = 32 if ALL > 32 else ALL
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b = tl.arange(0, ALL)
    wait_for_inputs(pdl)
    heat = tl.load(temperature + row)
    if (heat > 0) | (block == 0):
        key = tl.load(best + row * B + b, mask=b < B, other=_NOTHING)
        top = tl.max(key)
        peak = _logit(top)
        whole = tl.abs(peak) < float("inf")
        if block == 0:
            tl.store(token + row, _token(top))
            tl.store(finite + row, whole.to(tl.int8))
            tl.store(state + 3 * row + 1, top)
        if (heat > 0) & whole:
            k, p, _ = _limits(top_k, top_p, row)
            floor = tl.maximum(tl.ceil(tl.load(min_p + row) * _ONE).to(tl.int64), 1)
            if (k > 0) & (k < B):
                x = tl.where(b < B, _logit(key), float("-inf"))
                ahead = tl.zeros([ALL], tl.int32)
                for start in range(0, ALL, SPAN):
                    other = start + tl.arange(0, SPAN)
                    theirs = _logit(tl.load(best + row * B + other, mask=other < B, other=0))
                    ahead += tl.sum(((theirs[None, :] > x[:, None]) & (other < B)[None, :]).to(tl.int32), 1)
                bound = tl.min(tl.where((ahead < k) & (b < B), x, float("inf")))
                floor = tl.maximum(floor, _weight(bound, peak, heat))
            total = tl.full((), 0, tl.int64)
            if _weight(_logit(tl.load(best + row * B + block)), peak, heat) >= floor:
                column = block * BLOCK + tl.arange(0, BLOCK)
                weight = _weight(_logits(logits, allowed, row, column, stride, words, V, MASKED), peak, heat)
                kept = weight >= floor
                total = tl.sum(tl.where(kept, weight, 0))
                entry = tally + row * (2 * 2048) + tl.where(kept, _bin(weight), 0)
                if k > 0:
                    tl.atomic_add(entry, tl.full([BLOCK], 1, tl.int64), mask=kept, sem="relaxed")
                if p < 1:
                    tl.atomic_add(entry + 2048, weight, mask=kept, sem="relaxed")
            tl.store(sums + row * B + block, total)
            if block == 0:
                tl.store(state + 3 * row, floor << _ID_BITS)
    release_next(pdl)


@triton.jit
def _tallied(tally, row, k):
    """Of every bin the running count and mass, and the bin of the k-th weight (2048: all are kept)."""
    d = tl.arange(0, 2048)
    count = tl.cumsum(tl.load(tally + row * (2 * 2048) + d), 0)
    mass = tl.cumsum(tl.load(tally + row * (2 * 2048) + 2048 + d), 0)
    last = tl.where(k > 0, tl.sum((count < k).to(tl.int32)), 2048)
    return d, count, mass, last


@triton.jit
def _mass_bin(mass, p, total):
    """The bin in which top_p of the total is reached."""
    return tl.sum((mass.to(tl.float64) < p * total.to(tl.float64)).to(tl.int32))


@triton.jit
def _collect(logits, allowed, best, state, tally, listed, temperature, top_k, top_p, stride, words, V: tl.constexpr,
             B: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr, MASKED: tl.constexpr,
             pdl: tl.constexpr):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    wait_for_inputs(pdl)
    drawn, peak, heat, least = _drawn(state, temperature, row)
    k, p, cuts = _limits(top_k, top_p, row)
    if drawn & cuts:
        largest = _weight(_logit(tl.load(best + row * B + block)), peak, heat)
        if largest >= least >> _ID_BITS:
            d, _, mass, count_bin = _tallied(tally, row, k)
            first = _mass_bin(mass, p, tl.max(tl.where(d < count_bin, mass, 0)))
            last = tl.where(p < 1, _mass_bin(mass, p, tl.max(tl.where(d <= count_bin, mass, 0))), -1)
            deepest = tl.maximum(last, tl.where(count_bin < 2048, count_bin, -1))
            if _bin(largest) <= deepest:
                column = block * BLOCK + tl.arange(0, BLOCK)
                key = _keys(logits, allowed, row, column, stride, words, peak, heat, least, V, MASKED)
                where = _bin(key >> _ID_BITS)
                wanted = ((where == count_bin) | ((where >= first) & (where <= last))).to(tl.int64)
                size = tl.sum(wanted)
                if size > 0:
                    start = tl.atomic_add(state + 3 * row + 2, size, sem="relaxed")
                    at = start + tl.cumsum(wanted, 0) - 1
                    tl.store(listed + row * ROOM + at, key, mask=(wanted != 0) & (at < ROOM))
    release_next(pdl)


@triton.jit
def _count(key, chosen, bound):
    """Of the keys in a bin from `bound` up: how many, their weight, the least and the largest."""
    within = (_bin(key >> _ID_BITS) == chosen) & (key >= bound)
    return (
        tl.sum(within.to(tl.int64)),
        tl.sum(tl.where(within, key >> _ID_BITS, 0)),
        tl.min(tl.where(within, key, -(_NOTHING + 1))),
        tl.max(tl.where(within, key, 0)),
    )


@triton.jit
def _count_all(key, size, logits, allowed, row, stride, words, peak, heat, least, chosen, bound, V: tl.constexpr,
               ROOM: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """`_count` of the list, or of the row where the list could not hold all."""
    if size <= ROOM:
        count, mass, low, high = _count(key, chosen, bound)
    else:
        count, mass, low, high = _count(tl.zeros([TILE], tl.int64), chosen, bound)
        for start in range(0, V, TILE):
            column = start + tl.arange(0, TILE)
            part = _keys(logits, allowed, row, column, stride, words, peak, heat, least, V, MASKED)
            n, m, l, h = _count(part, chosen, bound)
            count, mass, low, high = count + n, mass + m, tl.minimum(low, l), tl.maximum(high, h)
    return count, mass, low, high


@triton.jit
def _search(key, size, logits, allowed, row, stride, words, peak, heat, least, chosen, base, target,
            BY_MASS: tl.constexpr, V: tl.constexpr, ROOM: tl.constexpr, TILE: tl.constexpr,
            MASKED: tl.constexpr):  # fmt: skip
    """The cut within a bin: the bound, as high as can be, from which on `base` and the bin together reach the target;
    and the mass of the bin's keys from there on."""
    many, heavy, low, high = _count_all(
        key, size, logits, allowed, row, stride, words, peak, heat, least, chosen, 0, V, ROOM, TILE, MASKED
    )
    high += 1
    few = many * 0
    while (many - few > 1) & (high - low > 1):  # one key between the bounds: it is the last that is kept
        middle = low + ((high - low) >> 1)
        count, mass, _, _ = _count_all(
            key, size, logits, allowed, row, stride, words, peak, heat, least, chosen, middle, V, ROOM, TILE, MASKED
        )
        reached = (base + (mass if BY_MASS else count)).to(tl.float64) >= target
        low, high = tl.where(reached, middle, low), tl.where(reached, high, middle)
        many, few = tl.where(reached, count, many), tl.where(reached, few, count)
        heavy = tl.where(reached, mass, heavy)
    return low, heavy


@triton.jit
def _cut(logits, allowed, state, tally, listed, temperature, top_k, top_p, stride, words, V: tl.constexpr,
         ROOM: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    wait_for_inputs(pdl)
    drawn, peak, heat, least = _drawn(state, temperature, row)
    k, p, cuts = _limits(top_k, top_p, row)
    if drawn & cuts:
        d, count, mass, count_bin = _tallied(tally, row, k)
        size = tl.load(state + 3 * row + 2)
        c = tl.arange(0, ROOM)
        key = tl.load(listed + row * ROOM + c, mask=c < size, other=0)
        total = tl.max(mass)
        last = least
        if count_bin < 2048:
            base = tl.max(tl.where(d < count_bin, count, 0))
            last, heavy = _search(
                key, size, logits, allowed, row, stride, words, peak, heat, least, count_bin, base, k.to(tl.float64),
                False, V, ROOM, TILE, MASKED,
            )  # fmt: skip
            total = tl.max(tl.where(d < count_bin, mass, 0)) + heavy
        if p < 1:
            mass_bin = _mass_bin(mass, p, total)
            base = tl.max(tl.where(d < mass_bin, mass, 0))
            last, heavy = _search(
                key, size, logits, allowed, row, stride, words, peak, heat, least, mass_bin, base,
                p * total.to(tl.float64), True, V, ROOM, TILE, MASKED,
            )  # fmt: skip
        tl.store(state + 3 * row, last)
    release_next(pdl)


@triton.jit
def _sums(logits, allowed, best, state, sums, temperature, top_k, top_p, stride, words, V: tl.constexpr,
          B: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    wait_for_inputs(pdl)
    drawn, peak, heat, least = _drawn(state, temperature, row)
    _, _, cuts = _limits(top_k, top_p, row)
    if drawn & cuts:
        total = tl.full((), 0, tl.int64)
        if _weight(_logit(tl.load(best + row * B + block)), peak, heat) >= least >> _ID_BITS:
            column = block * BLOCK + tl.arange(0, BLOCK)
            key = _keys(logits, allowed, row, column, stride, words, peak, heat, least, V, MASKED)
            total = tl.sum(key >> _ID_BITS)
        tl.store(sums + row * B + block, total)
    release_next(pdl)


@triton.jit
def _uniform(seed, position):
    """Philox4x32-10 in 64-bit words of which the lower halves count."""
    a, b = position & _LOW, (position >> 32) & _LOW
    c, d = a * 0, a * 0
    even, odd = seed & _LOW, (seed >> 32) & _LOW
    for _ in tl.static_range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57  # may wrap into the sign bit: only its bits are used
        a, b = ((second >> 32) & _LOW) ^ b ^ even, second & _LOW
        c, d = ((first >> 32) & _LOW) ^ d ^ odd, first & _LOW
        even, odd = (even + 0x9E3779B9) & _LOW, (odd + 0xBB67AE85) & _LOW
    return ((a << 21) | (b >> 11)).to(tl.float64) * (2.0**-53)


@triton.jit
def _draw(logits, allowed, state, sums, token, temperature, seed, position, stride, words, V: tl.constexpr,
          B: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
          pdl: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, ALL)
    wait_for_inputs(pdl)
    drawn, peak, heat, least = _drawn(state, temperature, row)
    if drawn:
        upto = tl.cumsum(tl.load(sums + row * B + b, mask=b < B, other=0), 0)
        total = tl.max(upto)
        goal = tl.minimum(
            (_uniform(tl.load(seed + row), tl.load(position + row)) * total.to(tl.float64)).to(tl.int64), total - 1
        )
        block = tl.sum((upto <= goal).to(tl.int32))
        goal -= tl.max(tl.where(b < block, upto, 0))
        column = block * BLOCK + tl.arange(0, BLOCK)
        key = _keys(logits, allowed, row, column, stride, words, peak, heat, least, V, MASKED)
        within = tl.sum((tl.cumsum(key >> _ID_BITS, 0) <= goal).to(tl.int32))
        tl.store(token + row, (block * BLOCK + within).to(tl.int64))
    release_next(pdl)


def sample(
    *,
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
    seed_S: torch.Tensor,
    position_S: torch.Tensor,
    edits: Edits | None = None,
    allowed_SW: torch.Tensor | None = None,
    **chosen: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows may be strided. What a graph holds: six launches, whatever the rows ask for. `chosen`: launch parameters
    (`block` ids a program, `room` keys a list holds) in place of those found for the device."""
    check_vocabulary(logits_SV)
    if edits is not None:
        logits_SV = edited(logits_SV, edits)
    rows, vocab = logits_SV.shape
    wide = {**parameters("sample.blocks", logits_SV, V=vocab, S=bucket(rows)), **chosen}
    tall = {**parameters("sample.rows", logits_SV, V=vocab, S=bucket(rows)), **chosen}
    block, room = wide.pop("block"), tall.pop("room")
    wide.pop("room", None), tall.pop("block", None)
    blocks = cdiv(vocab, block)
    size = {"V": vocab, "MASKED": allowed_SW is not None}
    split = {**size, "B": blocks, "BLOCK": block}
    every = power_of_2(blocks)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device=logits_SV.device)

    token_S, finite_S = numbers(rows), torch.empty(rows, dtype=torch.int8, device=logits_SV.device)
    best_SB, sums_SB, state_S3 = numbers(rows, blocks), numbers(rows, blocks), numbers(rows, 3)
    tally_S2D, listed_SC = numbers(rows, 2, _BINS), numbers(rows, room)
    allowed = state_S3 if allowed_SW is None else allowed_SW.contiguous()
    strides = (logits_SV.stride(0), allowed.stride(0))
    grid, limits = (rows, blocks), (top_k_S, top_p_S)
    share = power_of_2(cdiv(2 * _BINS, blocks))
    launch(_peaks, grid, logits_SV, allowed, best_SB, state_S3, tally_S2D, temperature_S, *strides,
           SHARE=share, **split, **wide)  # fmt: skip
    launch(_weigh, grid, logits_SV, allowed, best_SB, state_S3, tally_S2D, sums_SB, token_S, finite_S, temperature_S,
           *limits, min_p_S, *strides, ALL=every, **split, **wide)  # fmt: skip
    launch(_collect, grid, logits_SV, allowed, best_SB, state_S3, tally_S2D, listed_SC, temperature_S, *limits,
           *strides, ROOM=room, **split, **wide)  # fmt: skip
    launch(_cut, (rows,), logits_SV, allowed, state_S3, tally_S2D, listed_SC, temperature_S, *limits, *strides,
           ROOM=room, TILE=block, **size, **tall)  # fmt: skip
    launch(_sums, grid, logits_SV, allowed, best_SB, state_S3, sums_SB, temperature_S, *limits, *strides,
           **split, **wide)  # fmt: skip
    launch(_draw, (rows,), logits_SV, allowed, state_S3, sums_SB, token_S, temperature_S, seed_S, position_S, *strides,
           ALL=every, **split, **tall)  # fmt: skip
    return token_S, finite_S.view(torch.bool)


@triton.jit
def _survey(logits, token, best, sums, ahead, stride, V: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
            pdl: tl.constexpr):  # fmt: skip
    """Of a block: its largest key, Σ exp(x − largest), and how many come before the token."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(pdl)
    x = _logits(logits, logits, row, column, stride, 0, V, False)
    chosen = tl.load(token + row)
    mine = _order(tl.load(logits + row * stride + chosen).to(tl.float32), chosen)
    release_next(pdl)
    key = tl.where(column < V, _order(x, column), _NOTHING)
    top = tl.max(key)
    peak = _logit(top)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(best + row * B + block, top)
    tl.store(sums + row * B + block, tl.sum(tl.exp(x.to(tl.float64) - peak.to(tl.float64))))
    tl.store(ahead + row * B + block, tl.sum((key > mine).to(tl.int64)))


@triton.jit
def _likeliest(logits, token, best, sums, ahead, logprob, rank, top, top_logprob, stride, K, V: tl.constexpr,
               B: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """Of a row: what its blocks add up to; then K times the largest key, whose block gives its next in its place."""
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, ALL)
    wait_for_inputs(pdl)
    key = tl.load(best + row * B + b, mask=b < B, other=_NOTHING)
    peak = _logit(tl.max(key)).to(tl.float64)
    part = tl.load(sums + row * B + b, mask=b < B, other=0.0)
    shift = tl.where(part > 0, _logit(key).to(tl.float64) - peak, 0.0)
    norm = peak + tl.log(tl.sum(part * tl.exp(shift)))
    x = tl.load(logits + row * stride + tl.load(token + row)).to(tl.float64)
    tl.store(logprob + row, (x - norm).to(tl.float32))
    tl.store(rank + row, 1 + tl.sum(tl.load(ahead + row * B + b, mask=b < B, other=0)))
    for i in range(K):
        first = tl.max(key)
        tl.store(top + row * K + i, _token(first))
        tl.store(top_logprob + row * K + i, (_logit(first).to(tl.float64) - norm).to(tl.float32))
        block = (_token(first) // BLOCK).to(tl.int32)
        column = block * BLOCK + tl.arange(0, BLOCK)
        rest = _order(_logits(logits, logits, row, column, stride, 0, V, False), column)
        rest = tl.where((rest < first) & (column < V), rest, _NOTHING)
        key = tl.where(b == block, tl.max(rest), key)
    release_next(pdl)


def logprobs(
    *, logits_SV: torch.Tensor, token_S: torch.Tensor, k: int, **chosen: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows may be strided; `chosen` as for `sample`."""
    check_vocabulary(logits_SV)
    rows, vocab = logits_SV.shape
    wide = {**parameters("sample.blocks", logits_SV, V=vocab, S=bucket(rows)), **chosen}
    block = wide.pop("block")
    blocks, best = cdiv(vocab, block), min(k, vocab)
    device, grid = logits_SV.device, (rows, blocks)
    best_SB, ahead_SB = torch.empty((2, rows, blocks), dtype=torch.int64, device=device)
    sums_SB = torch.empty(grid, dtype=torch.float64, device=device)
    logprob_S, rank_S = torch.empty(rows, device=device), torch.empty(rows, dtype=torch.int64, device=device)
    top_SK = torch.empty((rows, best), dtype=torch.int64, device=device)
    top_logprob_SK = torch.empty((rows, best), device=device)
    launch(_survey, grid, logits_SV, token_S, best_SB, sums_SB, ahead_SB, logits_SV.stride(0),
           V=vocab, B=blocks, BLOCK=block, **wide)  # fmt: skip
    launch(_likeliest, (rows,), logits_SV, token_S, best_SB, sums_SB, ahead_SB, logprob_S, rank_S, top_SK,
           top_logprob_SK, logits_SV.stride(0), best, V=vocab, B=blocks, ALL=power_of_2(blocks),
           BLOCK=block, **wide)  # fmt: skip
    return logprob_S, rank_S, top_SK, top_logprob_SK
