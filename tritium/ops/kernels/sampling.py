"""Sampling and log-probabilities without a word to the host. See `tritium.ops.sampling`.

A row is worked on in blocks of ids by many programs; the last of them to end goes on alone with what all have found:

    peaks    the largest logit of every block
      last   the largest of the row: token and end of a greedy row. The others: a floor below which nothing is kept:
             min_p's, and that of the k-th largest of the blocks' largest
    weigh    of what reaches the floor: sums of weights by block, keys of as many as a short list holds, and, where
             top_k or top_p cut, a tally by bins: how many weights and how much weight. A bin is what shares the leading
             bits of a weight as a float, so bins are in order of weights, and a cut lies in one bin
      last   cut and draw, and the row's end, where nothing cuts or the short list holds all. Else: the bins in which a
             cut may lie (top_p's waits for top_k's, so it is known up to a bin or two)
    collect  keys of those bins; sums of what lies above them by block
      last   the cut: bisection among those keys; over the whole row should they be too many for the list. Draw

A draw finds the block, and the id within it, at which the running sum passes it. A block in which nothing can be kept
is passed over. The tally is made by atomic additions of integers, and lists in any order: neither changes a result.

Shapes: S rows, V vocabulary, B blocks of BLOCK ids, D bins, C keys a list holds (FEW the short one), K alternatives, W
words of a mask. `state_S8` int64: the least key kept, the row's largest logit as a key, how many keys were listed by
weigh and by collect; bins: the k-th weight's, the first and the last in which top_p may cut. `seen`: how many programs
of a row have ended, 0 between launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tritium.ops.kernels.launch import (
    bucket,
    cdiv,
    counts,
    is_last,
    launch,
    parameters,
    power_of_2,
    release_next,
    wait_for_inputs,
)
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
_FEW = 256
"""Keys of a short list: each is compared with each."""


@triton.jit
def _logits(logits, allowed, column, V: tl.constexpr, MASKED: tl.constexpr):
    """Of a row, float32; -inf where there is no such token or the row may not draw it."""
    x = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
    if MASKED:
        word = tl.load(allowed + column // 32, mask=column < V, other=0)
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
def _edge(chosen):
    """The least key of a weight in this bin or one before."""
    bits = (-chosen + _TOP).to(tl.int64) << _COARSE
    return tl.ceil(bits.to(tl.float64, bitcast=True)).to(tl.int64) << _ID_BITS


@triton.jit
def _keys(logits, allowed, column, peak, heat, least, V: tl.constexpr, MASKED: tl.constexpr):
    """Keys of weights; 0 for those below `least`."""
    weight = _weight(_logits(logits, allowed, column, V, MASKED), peak, heat)
    key = (weight << _ID_BITS) + (column ^ _LAST_ID)
    return tl.where(key >= least, key, 0)


@triton.jit
def _state(state, temperature):
    """Whether the row draws, its largest logit, its temperature, and the least key kept so far."""
    heat, peak = tl.load(temperature), _logit(tl.load(state + 1))
    return (heat > 0) & (tl.abs(peak) < float("inf")), peak, heat, tl.load(state)


@triton.jit
def _peaks(logits, allowed, best, state, tally, seen, token, temperature, top_k, min_p, stride, words, V: tl.constexpr,
           B: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, SHARE: tl.constexpr,
           pdl: tl.constexpr):  # fmt: skip
    SPAN: tl.constexpr = 128 if ALL > 128 else ALL
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    best, state = best + row * B, state + row * 8
    column, b = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, ALL)
    wait_for_inputs(pdl)
    heat, k, share = tl.load(temperature + row), tl.load(top_k + row), tl.load(min_p + row)
    x = _logits(logits + row * stride, allowed + row * words, column, V, MASKED)
    release_next(pdl)
    tl.store(best + block, tl.max(_order(x, column)))
    if heat > 0:
        entry = block * SHARE + tl.arange(0, SHARE)
        tl.store(tally + row * (2 * 2048) + entry, tl.zeros([SHARE], tl.int64), mask=entry < 2 * 2048)
    if is_last(seen + row, B):
        key = tl.load(best + b, mask=b < B, other=_NOTHING, cache_modifier=".cg")
        top = tl.max(key)
        peak = _logit(top)
        whole = tl.abs(peak) < float("inf")
        tl.store(token + row, tl.where(whole, _token(top), -1))
        tl.store(state + 1, top)
        tl.store(state + 2 + tl.arange(0, 2), tl.zeros([2], tl.int64))
        if (heat > 0) & whole:
            floor = tl.maximum(tl.ceil(share * _ONE).to(tl.int64), 1)
            if (k > 0) & (k < B):
                largest = tl.where(b < B, _logit(key), float("-inf"))
                ahead = tl.zeros([ALL], tl.int32)
                for start in range(0, ALL, SPAN):
                    other = start + tl.arange(0, SPAN)
                    theirs = _logit(tl.load(best + other, mask=other < B, other=0, cache_modifier=".cg"))
                    ahead += tl.sum(((theirs[:, None] > largest[None, :]) & (other < B)[:, None]).to(tl.int32), 0)
                bound = tl.min(tl.where((ahead < k) & (b < B), largest, float("inf")))
                floor = tl.maximum(floor, _weight(bound, peak, heat))
            tl.store(state, floor << _ID_BITS)


@triton.jit
def _tallied(tally, k):
    """Of every bin the running count and mass, and the bin of the k-th weight (2048: all are kept)."""
    d = tl.arange(0, 2048)
    count = tl.cumsum(tl.load(tally + d, cache_modifier=".cg"), 0)
    mass = tl.cumsum(tl.load(tally + 2048 + d, cache_modifier=".cg"), 0)
    return count, mass, tl.where(k > 0, tl.sum((count < k).to(tl.int32)), 2048)


@triton.jit
def _before(running, chosen):
    """What the bins before the chosen one add up to."""
    return tl.max(tl.where(tl.arange(0, 2048) < chosen, running, 0))


@triton.jit
def _mass_bin(mass, p, total):
    """The bin in which top_p of the total is reached."""
    return tl.sum((mass.to(tl.float64) < p * total.to(tl.float64)).to(tl.int32))


@triton.jit
def _append(listed, size, key, wanted, many, ROOM: tl.constexpr):
    """Puts the wanted keys, `many`, behind the `size` that a list has, as far as there is room."""
    at = tl.atomic_add(size, many.to(tl.int64), sem="relaxed") + tl.cumsum(wanted.to(tl.int32), 0) - 1
    tl.store(listed + at, key, mask=wanted & (at < ROOM))


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
def _goal(share, total):
    return tl.minimum((share * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def _choose(listed, size, k, p, share, FEW: tl.constexpr):
    """Cut and draw among the keys of a short list: the token."""
    c, span = tl.arange(0, FEW), tl.arange(0, 32)
    key = tl.where(c < size, tl.load(listed + c), 0)  # into the L1 cache: is_last has emptied it
    ahead = tl.zeros([FEW], tl.int64)  # the weight of larger keys, and behind it how many
    for start in range(0, size, 32):
        other = tl.load(listed + start + span, mask=start + span < size, other=0)[:, None]
        ahead += tl.sum(tl.where(other > key[None, :], (other >> _ID_BITS << 9) + 1, 0), 0)
    kept = (key > 0) & ((k <= 0) | ((ahead & 511) < k))
    if p < 1:
        target = p * tl.sum(tl.where(kept, key >> _ID_BITS, 0)).to(tl.float64)
        kept = kept & ((ahead == 0) | ((ahead >> 9).to(tl.float64) < target))
    goal = _goal(share, tl.sum(tl.where(kept, key >> _ID_BITS, 0)))
    least = tl.min(tl.where(kept, key, -(_NOTHING + 1)))
    upto = tl.zeros([FEW], tl.int64)
    for start in range(0, size, 32):
        other = tl.load(listed + start + span, mask=start + span < size, other=0)[:, None]
        first = (other >= least) & ((other & _LAST_ID) >= (key & _LAST_ID)[None, :])
        upto += tl.sum(tl.where(first, other >> _ID_BITS, 0), 0)
    return tl.min(tl.where(kept & (upto > goal), _token(key), _LAST_ID))


@triton.jit
def _draw(logits, allowed, sums, peak, heat, least, share, V: tl.constexpr, B: tl.constexpr, ALL: tl.constexpr,
          BLOCK: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """The token, by the sums of what is kept in the row's blocks."""
    b = tl.arange(0, ALL)
    upto = tl.cumsum(tl.load(sums + b, mask=b < B, other=0, cache_modifier=".cg"), 0)
    goal = _goal(share, tl.max(upto))
    block = tl.sum((upto <= goal).to(tl.int32))
    goal -= tl.max(tl.where(b < block, upto, 0))
    key = _keys(logits, allowed, block * BLOCK + tl.arange(0, BLOCK), peak, heat, least, V, MASKED)
    return block * BLOCK + tl.sum((tl.cumsum(key >> _ID_BITS, 0) <= goal).to(tl.int32))


@triton.jit
def _weigh(logits, allowed, best, state, tally, listed, sums, seen, token, temperature, top_k, top_p, seed, position,
           stride, words, V: tl.constexpr, B: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr,
           FEW: tl.constexpr, MASKED: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits, allowed, state, sums = logits + row * stride, allowed + row * words, state + row * 8, sums + row * B
    listed, tally = listed + row * ROOM, tally + row * (2 * 2048)
    column = block * BLOCK + tl.arange(0, BLOCK)
    early = tl.num_programs(0) <= 8  # few rows: what most blocks do not need is read while the one before runs
    x = _logits(logits, allowed, tl.where(early, column, V), V, MASKED)
    wait_for_inputs(pdl)
    drawn, peak, heat, least = _state(state, temperature + row)
    k, p, largest = tl.load(top_k + row), tl.load(top_p + row), tl.load(best + row * B + block)
    share = _uniform(tl.load(seed + row), tl.load(position + row))
    cuts = (k > 0) | (p < 1)
    if drawn:
        total = tl.full((), 0, tl.int64)
        if _weight(_logit(largest), peak, heat) >= least >> _ID_BITS:
            if not early:
                x = _logits(logits, allowed, column, V, MASKED)
            weight = _weight(x, peak, heat)
            kept = weight >= least >> _ID_BITS
            total = tl.sum(tl.where(kept, weight, 0))
            if cuts:
                key = (weight << _ID_BITS) + (column ^ _LAST_ID)
                # Likely ids lie close together, and no block needs more than its k largest: a bound somewhere below.
                many, high = tl.sum(kept.to(tl.int32)), _logit(largest)
                low, tries = tl.min(tl.where(kept, x, high)), 0
                while (k > 0) & (many > k + 32) & (tries < 12):
                    middle = low + (high - low) * 0.5
                    count = tl.sum((x >= middle).to(tl.int32))
                    low, many = tl.where(count >= k, middle, low), tl.where(count >= k, count, many)
                    high, tries = tl.where(count >= k, high, middle), tries + 1
                kept = kept & (weight >= _weight(low, peak, heat))  # with all whose weight is the bound's: ids tell
                _append(listed, state + 2, key, kept, tl.sum(kept.to(tl.int32)), FEW)
                entry = tally + tl.where(kept, _bin(weight), 0)
                if k > 0:
                    tl.atomic_add(entry, tl.full([BLOCK], 1, tl.int64), mask=kept, sem="relaxed")
                if p < 1:
                    tl.atomic_add(entry + 2048, weight, mask=kept, sem="relaxed")
        tl.store(sums + block, total)
        if is_last(seen + row, B):
            size = tl.load(state + 2, cache_modifier=".cg").to(tl.int32)
            if not cuts:
                tl.store(token + row, _draw(logits, allowed, sums, peak, heat, least, share, V, B, ALL, BLOCK, MASKED))
            elif size <= FEW:
                tl.store(token + row, _choose(listed, size, k, p, share, FEW))
            else:
                _, mass, count_bin = _tallied(tally, k)
                tl.store(state + 4, count_bin)
                tl.store(state + 5, tl.where(p < 1, _mass_bin(mass, p, _before(mass, count_bin)), count_bin))
                tl.store(state + 6, tl.where(p < 1, _mass_bin(mass, p, _before(mass, count_bin + 1)), -1))
    release_next(pdl)


@triton.jit
def _search(logits, allowed, listed, size, peak, heat, least, chosen, base, target, BY_MASS: tl.constexpr,
            V: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """The cut within a bin: the bound, as high as can be, from which on `base` and the bin together reach the target;
    and the mass of the bin's keys from there on. Looks at the list, or at the row where the list could not hold all."""
    low, high = _edge(chosen), _edge(chosen - 1)
    middle, end = low + 0, high  # not the same value as `low`: Triton would see no change in `low = middle` below
    heavy, few = base * 0, base * 0
    many = few + 2
    while (many - few > 1) & (high - low > 1):  # one key between the bounds: it is the last that is kept
        count, mass = base * 0, base * 0
        for start in range(0, size if size <= ROOM else V, BLOCK):
            c = start + tl.arange(0, BLOCK)
            if size <= ROOM:
                key = tl.load(listed + c, mask=c < size, other=0, cache_modifier=".cg")
            else:
                key = _keys(logits, allowed, c, peak, heat, least, V, MASKED)
            within = (key >= middle) & (key < end)
            count += tl.sum(within.to(tl.int64))
            mass += tl.sum(tl.where(within, key >> _ID_BITS, 0))
        if (base + (mass if BY_MASS else count)).to(tl.float64) >= target:
            low, many, heavy = middle, count, mass
        else:
            high, few = middle, count
        middle = low + ((high - low) >> 1)
    return low, heavy


@triton.jit
def _cut(logits, allowed, tally, listed, size, k, p, peak, heat, least, V: tl.constexpr, ROOM: tl.constexpr,
         BLOCK: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """The least key that is kept."""
    count, mass, count_bin = _tallied(tally, k)
    total, last = _before(mass, count_bin), least
    if count_bin < 2048:
        last, heavy = _search(logits, allowed, listed, size, peak, heat, least, count_bin, _before(count, count_bin),
                              k.to(tl.float64), False, V, ROOM, BLOCK, MASKED)  # fmt: skip
        total += heavy
    if p < 1:
        _, mass, _ = _tallied(tally, k)  # again: kept meanwhile, it would take too many registers
        mass_bin = _mass_bin(mass, p, total)
        last, _ = _search(logits, allowed, listed, size, peak, heat, least, mass_bin, _before(mass, mass_bin),
                          p * total.to(tl.float64), True, V, ROOM, BLOCK, MASKED)  # fmt: skip
    return last


@triton.jit
def _collect(logits, allowed, best, state, tally, listed, sums, seen, token, temperature, top_k, top_p, seed, position,
             stride, words, V: tl.constexpr, B: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr,
             ROOM: tl.constexpr, FEW: tl.constexpr, MASKED: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits, allowed, state, sums = logits + row * stride, allowed + row * words, state + row * 8, sums + row * B
    listed, tally = listed + row * ROOM, tally + row * (2 * 2048)
    wait_for_inputs(pdl)
    drawn, peak, heat, least = _state(state, temperature + row)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    if drawn & ((k > 0) | (p < 1)) & (tl.load(state + 2) > FEW):
        count_bin, first, last = tl.load(state + 4), tl.load(state + 5), tl.load(state + 6)
        above = tl.full((), 0, tl.int64)
        largest = _weight(_logit(tl.load(best + row * B + block)), peak, heat)
        deepest = tl.where((count_bin < 2048) | (p >= 1), count_bin, last)
        if (largest >= least >> _ID_BITS) & (_bin(largest) <= deepest):
            key = _keys(logits, allowed, block * BLOCK + tl.arange(0, BLOCK), peak, heat, least, V, MASKED)
            where = _bin(key >> _ID_BITS)
            above = tl.sum(tl.where(where < first, key >> _ID_BITS, 0))
            wanted = (where == count_bin) | ((where >= first) & (where <= last))
            many = tl.sum(wanted.to(tl.int32))
            if many > 0:
                _append(listed, state + 3, key, wanted, many, ROOM)
        tl.store(sums + block, above)
        if is_last(seen + row, B):
            size = tl.load(state + 3, cache_modifier=".cg").to(tl.int32)
            least = _cut(logits, allowed, tally, listed, size, k, p, peak, heat, least, V, ROOM, BLOCK, MASKED)
            for start in range(0, size if size <= ROOM else V, BLOCK):
                c = start + tl.arange(0, BLOCK)
                if size <= ROOM:
                    key = tl.load(listed + c, mask=c < size, other=0, cache_modifier=".cg")
                    key = tl.where(key >= least, key, 0)
                    tl.atomic_add(sums + _token(key) // BLOCK, key >> _ID_BITS, mask=key > 0, sem="relaxed")
                else:
                    key = _keys(logits, allowed, c, peak, heat, least, V, MASKED)
                    tl.store(sums + start // BLOCK, tl.sum(key >> _ID_BITS))
            tl.debug_barrier()
            share = _uniform(tl.load(seed + row), tl.load(position + row))
            tl.store(token + row, _draw(logits, allowed, sums, peak, heat, least, share, V, B, ALL, BLOCK, MASKED))
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
    token_S: torch.Tensor | None = None,
    **chosen: int,
) -> torch.Tensor:
    """Rows may be strided. What a graph holds: three launches, whatever the rows ask for. `chosen`: launch parameters
    (`block` ids a program, `room` keys a list holds) in place of those found for the device."""
    check_vocabulary(logits_SV)
    if edits is not None:
        logits_SV = edited(logits_SV, edits)
    rows, vocab = logits_SV.shape
    found = {**parameters("sample", logits_SV, V=vocab, S=bucket(rows)), **chosen}
    block, room = found.pop("block"), found.pop("room")
    blocks = cdiv(vocab, block)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device=logits_SV.device)

    token_S = numbers(rows) if token_S is None else token_S
    best_SB, sums_SB, state_S8 = numbers(rows, blocks), numbers(rows, blocks), numbers(rows, 8)
    tally_S2D, listed_SC = numbers(rows, 2, _BINS), numbers(rows, room)
    seen_S = counts(logits_SV.device, bucket(rows))
    allowed = state_S8 if allowed_SW is None else allowed_SW.contiguous()
    strides = (logits_SV.stride(0), allowed.stride(0))
    shared = {"V": vocab, "MASKED": allowed_SW is not None, "B": blocks, "BLOCK": block, "ALL": power_of_2(blocks)}
    launch(_peaks, (rows, blocks), logits_SV, allowed, best_SB, state_S8, tally_S2D, seen_S, token_S, temperature_S,
           top_k_S, min_p_S, *strides, SHARE=power_of_2(cdiv(2 * _BINS, blocks)), **shared, **found)  # fmt: skip
    for kernel in (_weigh, _collect):
        launch(kernel, (rows, blocks), logits_SV, allowed, best_SB, state_S8, tally_S2D, listed_SC, sums_SB, seen_S,
               token_S, temperature_S, top_k_S, top_p_S, seed_S, position_S, *strides, ROOM=room, FEW=min(room, _FEW),
               **shared, **found)  # fmt: skip
    return token_S


@triton.jit
def _survey(logits, token, best, sums, ahead, stride, V: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
            pdl: tl.constexpr):  # fmt: skip
    """Of a block: its largest key, Σ exp(x − largest), and how many come before the token."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(pdl)
    x = _logits(logits + row * stride, logits, column, V, False)
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
        rest = _order(_logits(logits + row * stride, logits, column, V, False), column)
        rest = tl.where((rest < first) & (column < V), rest, _NOTHING)
        key = tl.where(b == block, tl.max(rest), key)
    release_next(pdl)


def logprobs(
    *, logits_SV: torch.Tensor, token_S: torch.Tensor, k: int, **chosen: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows may be strided; `chosen` as for `sample`."""
    check_vocabulary(logits_SV)
    rows, vocab = logits_SV.shape
    wide = {**parameters("sample", logits_SV, V=vocab, S=bucket(rows)), **chosen}
    block, _ = wide.pop("block"), wide.pop("room")
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
