"""Rows of a weight in fewer bits by one token, on the vector units, for `quantized` and `moe_quantized`.

Rows are words of 32 bits, unpacked in registers; a thread holds four neighbours of a row. Each program rounds x for
itself, by max |x (1 + n)| which the op that made x has left (`Peak`), or which it finds while its first words are on
their way; the rsqrt of a norm meets the result alone.
What a thread has made of its columns goes to those that need it through shared memory.

`KIND`: int8, e4m3, int4, e2m1. `ROUND`: x is rounded to 8 bits of that kind too. Products of int8 are summed as
integers, so all forms give the same bits for the same rounded x.

Shapes: K inputs, W words of a step, G = K / GROUP scales of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tritium.hw import Target
from tritium.ops.handed import Handed, Peak
from tritium.ops.kernels.four_bits import factor_of
from tritium.ops.kernels.launch import target_of
from tritium.ops.kernels.linear import _column
from tritium.ops.quantized import LARGEST, Quantized

KINDS = {"int8": "int8", "fp8": "e4m3", "fp8-block": "e4m3", "int4": "int4", "mxfp4": "e2m1"}
LEAST = tl.constexpr(1e-30)
"""Stands in for the largest magnitude of a token of zeros."""
QUICK = tl.constexpr(2)
"""`NATIVE`: 0 where there are no instructions for these types, else 1; this where one token's products go the shortest
way: with e4m3 as pairs of float16, eight of which are summed as such; with 4 bits as integers, x in two bytes."""


@triton.jit
def split4(x):
    """[.., 4] as four [..]."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _e4m3_bits(value):
    """float32 of at most 448 to the nearest e4m3, ties to even, as an int32 below 256."""
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    # Below 2^-6 there are multiples of 2^-9, which is what float32 resolves from 2^14 on.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 15
    return tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 128)


@triton.jit
def rounded_bits(value, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """float32 of at most the kind's largest number, rounded: int32 of which the low 8 bits count."""
    if KIND == "int8":
        # A number of this size resolves ones, to the nearest even, in its lowest bits.
        bits = (value + 12582912.0).to(tl.int32, bitcast=True) & 255
    elif NATIVE:
        bits = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    else:
        bits = _e4m3_bits(value)
    return bits


@triton.jit
def _e4m3(word):
    """The four e4m3 of words, lowest first, as float32."""
    return _byte(word << 24), _byte(word << 16), _byte(word << 8), _byte(word)


@triton.jit
def _byte(word):
    return ((word >> 4) & -0x78100000).to(tl.float32, bitcast=True) * 2.0**120


@triton.jit
def _nibbles(word, KIND: tl.constexpr):
    """Of the eight numbers of words, lowest first, float32 of n · 2^(p - 149), p as `as_factors` says: the bits
    of a float32 from 24 on are 0, and so the others count. n: of int4 the number + 8, of e2m1 twice the number."""
    values = ()
    for j in tl.static_range(8):
        if KIND == "int4":
            bits = word & (15 << 4 * j) if j < 6 else (word >> 8) & (15 << 4 * (j - 2))
        else:
            bits = (word << (28 - 4 * j)) >> 6 & -0x7E400000
        values += (bits.to(tl.float32, bitcast=True),)  # type: ignore[assignment]
    return values


@triton.jit
def _four(x, norm, at, K: tl.constexpr, EVEN: tl.constexpr, NORM: tl.constexpr):
    """Four neighbours a thread of x (1 + n), and Σ x² by thread."""
    value = _column(x, at, K, EVEN)
    squares = tl.sum(value * value, axis=1)
    if NORM:
        value += value * _column(norm, at, K, EVEN)
    return value, squares


@triton.jit
def _halves(four):
    """Columns of words, each rounded to e4m3, / 64, as four float16. A number of 64 bits, for what a thread computes
    goes to those that need it through shared memory, as few times as may be."""
    return tl.inline_asm_elementwise(
        """{.reg .b16 p, q; .reg .b32 a, b, s; mov.b32 s, 0x24002400;
        cvt.rn.satfinite.e4m3x2.f32 p, $2, $1; cvt.rn.satfinite.e4m3x2.f32 q, $4, $3;
        cvt.rn.f16x2.e4m3x2 a, p; cvt.rn.f16x2.e4m3x2 b, q;
        mul.rn.f16x2 a, a, s; mul.rn.f16x2 b, b, s; mov.b64 $0, {a, b};}""",
        "=l,f,f,f,f", [four[0], four[1], four[2], four[3]], dtype=tl.int64, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _bytes(four):
    """Four columns of words, below 2^15, to the nearest integer: their low bytes, and above them the high ones."""
    return tl.inline_asm_elementwise(
        """{.reg .b32 a, b, c, d; .reg .f32 m; mov.f32 m, 0f4B400000;
        add.f32 a, $1, m; add.f32 b, $2, m; add.f32 c, $3, m; add.f32 d, $4, m;
        prmt.b32 a, a, b, 0x5140; prmt.b32 c, c, d, 0x5140;
        prmt.b32 b, a, c, 0x5410; prmt.b32 d, a, c, 0x7632; mov.b64 $0, {b, d};}""",
        "=l,f,f,f,f", [four[0], four[1], four[2], four[3]], dtype=tl.int64, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _columns(x, norm, k, K: tl.constexpr, W: tl.constexpr, PER: tl.constexpr, EVEN: tl.constexpr, NORM: tl.constexpr):
    """The token's columns of W words of PER from k on, x (1 + n) by fours, and Σ x² by word."""
    at = k + tl.arange(0, W)[:, None] * PER + tl.arange(0, 4)[None, :]
    value, squares = _four(x, norm, at, K, EVEN, NORM)
    values = (value,)
    if PER == 8:
        high, more = _four(x, norm, at + 4, K, EVEN, NORM)
        values += (high,)  # type: ignore[assignment]
        squares += more
    return values, squares


@triton.jit
def _factors(values, factor, KIND: tl.constexpr, ROUND: tl.constexpr, NATIVE: tl.constexpr):
    """`as_factors` of what `_columns` gives, times a factor."""
    value = values[0] * factor
    if len(values) == 2:
        value = split4(value) + split4(values[1] * factor)
    return as_factors(value, KIND, ROUND, NATIVE)


@triton.jit
def as_factors(x, KIND: tl.constexpr, ROUND: tl.constexpr, NATIVE: tl.constexpr):
    """Columns of words, [W, 4] or for 4 bits eight [W], as factors of their numbers (rounded int8: as words; or as
    `_halves` or `_bytes`), and for 4 bits what is too much in each word's product, for int4 comes with 8 added, or the
    scale of `_bytes` by four words."""
    added = x
    if KIND == "int8" or KIND == "e4m3":
        if NATIVE == QUICK:
            out = (_halves(split4(x)),)
        elif ROUND:
            word = tl.sum(rounded_bits(x, KIND, NATIVE) << (8 * tl.arange(0, 4))[None, :], axis=1)
            out = (word,) if KIND == "int8" else _e4m3(word)
        else:
            out = split4(x)
    elif NATIVE == QUICK:
        W: tl.constexpr = x[0].shape[0]
        most = tl.abs(x[0])
        for j in tl.static_range(1, 8):
            most = tl.maximum(most, tl.abs(x[j]))
        most = tl.maximum(tl.max(tl.reshape(most, [W // 4, 4]), axis=1), LEAST)
        added = most * (1 / 32512)
        unit = tl.reshape(tl.broadcast_to((32512 / most)[:, None], [W // 4, 4]), [W])
        scaled = ()
        for j in tl.static_range(8):  # even columns of int4 lie in the low halves of bytes
            scaled += (x[j % 4 * 2 + j // 4 if KIND == "int4" else j] * unit,)  # type: ignore[assignment]
        out = (_bytes(scaled[:4]),)
        out += (_bytes(scaled[4:]),)  # type: ignore[assignment]
    else:
        out, added = (), x[0]  # type: ignore[assignment]
        for j in tl.static_range(8):
            added += x[j] if j > 0 else 0.0
            out += (
                x[j] * 2.0 ** (80 - (22 if KIND == "e2m1" else 4 * j if j < 6 else 4 * j - 8)),  # 2^(80 - p)
            )  # type: ignore[assignment]
        added *= 2.0**-66
    return out, added


def _four_words(kind: str) -> str:
    """PTX: $0 = four words of a weight ($1 to $4) times their columns ($5 on), as `_halves` and `_bytes` leave them. Of
    int4 16 times the numbers are bytes; of e2m1 12 more than twice the numbers, $13 takes back."""
    if kind == "e4m3":
        lines = ["{.reg .b16 a, b; .reg .b32 p, q, x, y; .reg .f32 u; mov.b32 p, 0;"]
        for i in range(4):
            lines.append(f"mov.b32 {{a, b}}, ${1 + i}; mov.b64 {{x, y}}, ${5 + i};")
            for word, pair in ("ax", "by"):
                lines.append(f"cvt.rn.f16x2.e4m3x2 q, {word}; fma.rn.f16x2 p, q, {pair}, p;")
        return "\n".join([*lines, "mov.b32 {a, b}, p; cvt.f32.f16 u, a; cvt.f32.f16 $0, b; add.f32 $0, $0, u;}"])
    lines = ["{.reg .b32 a, b, c, l, h, s, t, v, x, y; mov.b32 c, 0x88888888; mov.b32 h, 0;"]
    if kind == "int4":
        lines.append("mov.b32 l, 0;")
        take = "shl.b32 a, {w}, 4; lop3.b32 a, a, c, 0xF0F0F0F0, 0x28; lop3.b32 b, {w}, c, 0xF0F0F0F0, 0x28;"
    else:
        lines.append("mov.b32 l, $13; mov.b32 s, 0x03020100; mov.b32 t, 0x0C080604;")
        # A byte permutation looks up four of eight bytes; bit 3 of an index, the sign, makes it 0.
        take = "xor.b32 v, {w}, c; prmt.b32 a, s, t, {w}; prmt.b32 b, s, t, v; sub.s32 a, a, b; "
        take += "add.s32 a, a, 0x0C0C0C0C; shr.u32 b, {w}, 16; shr.u32 v, v, 16; prmt.b32 b, s, t, b; "
        take += "prmt.b32 v, s, t, v; sub.s32 b, b, v; add.s32 b, b, 0x0C0C0C0C;"
    sign = "s32" if kind == "int4" else "u32"
    for i in range(4):
        lines.append(take.format(w=f"${1 + i}"))
        for j, number in enumerate("ab"):
            lines.append(f"mov.b64 {{x, y}}, ${5 + 2 * i + j}; dp4a.{sign}.u32 l, {number}, x, l; ")
            lines.append(f"dp4a.{sign}.s32 h, {number}, y, h;")
    return "\n".join([*lines, "mad.lo.s32 l, h, 256, l; cvt.rn.f32.s32 $0, l;}"])


_E4M3_WORDS, _INT4_WORDS, _E2M1_WORDS = (tl.constexpr(_four_words(kind)) for kind in ("e4m3", "int4", "e2m1"))


@triton.jit
def _twelve(x):
    """-12 Σ of the columns that four words meet, which `_bytes` left as these eight."""
    total = tl.zeros(x[0].shape, tl.int32)
    for i in tl.static_range(8):
        total = tl.inline_asm_elementwise(
            """{.reg .b32 c, h, x, y; mov.b32 c, 0xF4F4F4F4; mov.b64 {x, y}, $1; mov.b32 h, 0;
            dp4a.s32.s32 h, c, y, h; mad.lo.s32 h, h, 256, $2; dp4a.s32.u32 $0, c, x, h;}""",
            "=r,l,r", [x[i], total], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return total


@triton.jit
def multiplied(tile, factors, added, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """[ROWS, W] words by the factors of a token: sums of four words' products, which one thread holds, [ROWS, W / 4];
    int32 of rounded int8."""
    FOUR: tl.constexpr = tile.shape[1] // 4
    even, odd = tl.split(tl.reshape(tile, [tile.shape[0], FOUR, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    four = (a, b, c, d)
    mine = ()
    for j in tl.static_range(len(factors)):
        mine += (split4(tl.reshape(factors[j], [FOUR, 4])),)  # type: ignore[assignment]
    if NATIVE == QUICK:
        operands, columns = four, ()
        for i in tl.static_range(4):
            for j in tl.static_range(len(factors)):
                columns += (mine[j][i],)  # type: ignore[assignment,misc]
                operands += (mine[j][i][None, :],)  # type: ignore[assignment,misc]
        FORM: tl.constexpr = "=f,r,r,r,r" + ",l,l,l,l" * len(factors) + (",r" if KIND == "e2m1" else "")
        if KIND == "e2m1":
            operands += (_twelve(columns)[None, :],)  # type: ignore[assignment]
        TEXT: tl.constexpr = _E4M3_WORDS if KIND == "e4m3" else _INT4_WORDS if KIND == "int4" else _E2M1_WORDS
        total = tl.inline_asm_elementwise(TEXT, FORM, operands, dtype=tl.float32, is_pure=True, pack=1)
        if KIND != "e4m3":
            total *= added[None, :]
    else:
        total = tl.zeros([tile.shape[0], FOUR], tl.int32 if KIND == "int8" else tl.float32)
        for i in tl.static_range(4):
            if KIND == "int8":
                x = mine[0][i][None, :]  # type: ignore[misc]
                if NATIVE:
                    total = tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [four[i], x, total],
                                                      dtype=tl.int32, is_pure=True, pack=1)  # fmt: skip
                else:
                    for j in tl.static_range(4):
                        total += ((four[i] << (8 * j)) >> 24) * ((x << (8 * j)) >> 24)
            else:
                values = _e4m3(four[i]) if KIND == "e4m3" else _nibbles(four[i], KIND)
                for j in tl.static_range(len(factors)):
                    total += values[j] * mine[j][i][None, :]  # type: ignore[misc]
        if KIND == "int4":
            total -= tl.sum(tl.reshape(added, [FOUR, 4]), axis=1)[None, :]
    return total


@triton.jit
def words(at, k, rows, WIDTH: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr):
    """W words of each row from word k on. EVEN: all are there."""
    if EVEN:
        out = tl.load(at + k, eviction_policy="evict_first")
    else:
        inside = (k + tl.arange(0, W))[None, :] < WIDTH
        out = tl.load(at + k, mask=rows[:, None] & inside, other=0, eviction_policy="evict_first")
    return out


@triton.jit
def row_scales(at, k, rows, WIDTH: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, PER: tl.constexpr,
               EVEN: tl.constexpr):  # fmt: skip
    """A stored scale for four words of each row from word k on; without GROUP that of the row, [ROWS, 1]."""
    if GROUP:
        # Turned, neighbours of a column are neighbours in memory for the compiler, and threads lie as for the words.
        word = k + tl.arange(0, W // 4) * 4
        turned = at[None, :] + word[:, None] // (GROUP // PER)
        if EVEN:
            out = tl.trans(tl.load(turned))
        else:
            out = tl.trans(tl.load(turned, mask=rows[None, :] & (word < WIDTH)[:, None], other=0))
    else:
        out = tl.load(at[:, None], mask=rows[:, None], other=0.0)
    return out


@triton.jit
def largest(x, norm, K: tl.constexpr, NORM: tl.constexpr, NATIVE: tl.constexpr):
    """max |x (1 + n)| over the columns of a token."""
    BLOCK: tl.constexpr = 2048 if K > 1024 else 1024
    if NATIVE > 0 and not NORM and x.dtype.element_ty == tl.bfloat16 and K % 2 == 0:
        pair = tl.arange(0, BLOCK // 2)
        pairs = tl.zeros([BLOCK // 2], tl.int32)
        for k in tl.range(0, K // 2, BLOCK // 2):
            two = tl.load(x.to(tl.pointer_type(tl.int32)) + k + pair, mask=k + pair < K // 2, other=0)
            pairs = tl.inline_asm_elementwise(
                "{.reg .b32 t; and.b32 t, $2, 0x7FFF7FFF; max.bf16x2 $0, $1, t;}", "=r,r,r", [pairs, two],
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        most = tl.max(tl.maximum(pairs & -65536, pairs << 16)).to(tl.float32, bitcast=True)
    else:
        c = tl.arange(0, BLOCK)
        top = tl.zeros([BLOCK], tl.float32)
        for k in tl.range(0, K, BLOCK):
            value = tl.load(x + k + c, mask=k + c < K, other=0.0).to(tl.float32)
            if NORM:
                value += value * tl.load(norm + k + c, mask=k + c < K, other=0.0)
            top = tl.maximum(top, tl.abs(value))
        most = tl.max(top)
    return tl.maximum(most, LEAST)


@triton.jit
def leave_peak(peak, value, kept):
    """The largest |value| of those `kept` into a `Peak`: all programs' in the end, in whatever order."""
    most = tl.maximum(tl.max(tl.where(kept, tl.abs(value), 0.0)), 0.0)  # whose bits as a NaN would hide an infinity
    tl.atomic_max(peak, most.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def rows_by_token(tiles, scales, at, scale_at, peak, x, norm, rows, K: tl.constexpr, COLUMNS: tl.constexpr,
                  KIND: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, NATIVE: tl.constexpr,
                  FULL: tl.constexpr, NORM: tl.constexpr, PEAK: tl.constexpr):  # fmt: skip
    """Blocks of rows by one token, a [ROWS] of each (x with its norm's rsqrt left out), and Σ x². `at`: pointers to the
    first words of COLUMNS columns of each block, [ROWS, W], `tiles` what is there; `scale_at` and `scales`: so of
    `row_scales`; PEAK: x's `Peak` is there; `rows`: those of a block that exist, FULL: all. What a step needs of x is
    made once for all blocks; a block's next words are on their way as soon as these are multiplied."""
    PER: tl.constexpr = 4 if KIND == "int8" or KIND == "e4m3" else 8
    W: tl.constexpr = COLUMNS // PER
    WIDTH: tl.constexpr = K // PER
    LAST: tl.constexpr = (K - 1) // COLUMNS
    WHOLE: tl.constexpr = K % COLUMNS == 0
    EVEN: tl.constexpr = FULL and WHOLE
    ROUND: tl.constexpr = LARGEST > 0
    BLOCKS: tl.constexpr = len(tiles)
    totals = ()
    for _ in tl.static_range(BLOCKS):
        total = tl.zeros([rows.shape[0], W // 4], tl.int32 if KIND == "int8" else tl.float32)
        totals += (total,)  # type: ignore[assignment]
    known = tl.load(peak, cache_modifier=".cg") if PEAK and ROUND else 0
    top = 1.0 if PEAK or not ROUND else largest(x, norm, K, NORM, NATIVE)
    values, squares = _columns(x, norm, 0, K, W, PER, LAST > 0 or WHOLE, NORM)
    factor, unit = 1.0, 1.0
    if ROUND:
        if PEAK:  # which has come together with the first columns
            top = tl.maximum(known.to(tl.float32, bitcast=True), LEAST)  # type: ignore[union-attr]
            if known == 0:
                top = largest(x, norm, K, NORM, NATIVE)
        factor, unit = LARGEST / top, top / LARGEST * (64.0 if NATIVE == QUICK else 1.0)
    elif PER == 8 and NATIVE == QUICK:
        unit = 0.0625 if KIND == "int4" else 0.5
    elif PER == 8:
        unit = 2.0**69 if KIND == "int4" else 2.0**68
    for i in tl.range(0, LAST):
        k = (i + 1) * W
        factors, added = _factors(values, factor, KIND, ROUND, NATIVE)
        if KIND == "e4m3":  # ahead of the next words, which was measured to pay for these and not for 4 bits
            values, more = _columns(x, norm, (i + 1) * COLUMNS, K, W, PER, WHOLE, NORM)
        next_tiles, next_scales, next_totals = (), (), ()
        for j in tl.static_range(BLOCKS):
            product = multiplied(tiles[j], factors, added, KIND, NATIVE)
            product = product * factor_of(scales[j]) if GROUP else product
            next_totals += (totals[j] + product,)  # type: ignore[assignment,misc]
            if GROUP:
                scale = row_scales(scale_at[j], k, rows, WIDTH, W, GROUP, PER, EVEN)
                next_scales += (scale,)  # type: ignore[assignment]
            next_tiles += (words(at[j], k, rows, WIDTH, W, EVEN),)  # type: ignore[assignment]
        tiles, totals = next_tiles, next_totals
        if GROUP:
            scales = next_scales
        if KIND != "e4m3":
            values, more = _columns(x, norm, (i + 1) * COLUMNS, K, W, PER, WHOLE, NORM)
        squares += more
    factors, added = _factors(values, factor, KIND, ROUND, NATIVE)
    outs = ()
    for j in tl.static_range(BLOCKS):
        product = multiplied(tiles[j], factors, added, KIND, NATIVE)
        total = totals[j] + (product * factor_of(scales[j]) if GROUP else product)
        out = tl.sum(total, axis=1).to(tl.float32) * unit
        outs += (out if GROUP else out * tl.sum(scales[j], axis=1),)  # type: ignore[assignment]
    return outs, tl.sum(squares)


def peak_arguments(given: Handed | None, leave: Handed | None, stand_in: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Arguments of a kernel: x's peak, where to leave the result's, and the norm behind it."""
    parts = [hand.bits_1 if isinstance(hand, Peak) else stand_in for hand in (given, leave)]
    return (*parts, leave.norm_K if isinstance(leave, Peak) and leave.norm_K is not None else stand_in)


def peak_forms(leave: Handed | None) -> dict[str, bool]:
    """The constexprs that say which of those are there."""
    return {"LEAVE": isinstance(leave, Peak), "BEHIND": isinstance(leave, Peak) and leave.norm_K is not None}


def native(target: Target) -> bool:
    """Whether there are instructions for four products of bytes and for e4m3."""
    return target.kind == "cuda" and "dot_fp8" in target.features


def form(w: Quantized) -> dict[str, Any]:
    """The constexprs of kernels that say how a weight is stored."""
    scheme = w.scheme
    group = scheme.group if w.scales.shape[-1] > 1 or scheme.group >= w.shape[-1] else 0
    return {"KIND": KINDS[scheme.name], "GROUP": group, "SHARING": scheme.rows}


def by_token(w: Quantized) -> dict[str, Any]:
    """The constexprs of `rows_by_token` that say how it is multiplied here."""
    rounded = w.scheme.activations == torch.float8_e4m3fn and w.dtype == torch.bfloat16  # of more digits sums need more
    quick = rounded or (w.scheme.bits == 4 and w.dtype.itemsize == 2)
    return {"LARGEST": largest_of(w), "NATIVE": native(target_of(w.values)) * (1 + quick)}


def largest_of(w: Quantized) -> float:
    """What x is scaled to before it is rounded; 0 where it is not."""
    return LARGEST[w.scheme.activations] if w.scheme.activations else 0.0
