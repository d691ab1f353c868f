"""Products with a weight of fewer bits: one token, and tiles of tokens. See `tritium.ops.quantized`.

One token: vector units, as in `linear`; rows of the weight are words of 32 bits, unpacked in registers. Each program
rounds x for itself: it finds max |x (1 + n)| while its first words are on their way; the rsqrt of a norm meets the
result alone. Several tokens: one launch normalises and rounds x, and the product runs on the matrix units, the weight's
rows as the M side; int8 and e4m3 as they are, others as numbers made in registers (`four_bits`).

`KIND`: int8, e4m3, int4, e2m1. `ROUND`: x is rounded to 8 bits of that kind too. Products of int8 are summed as
integers, so all forms give the same bits for the same rounded x.

Shapes: M tokens, N results of a token, K inputs, G = K / GROUP scales of a row; a gated weight has 2 N rows, gate
first.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from tritium.hw import Target
from tritium.ops.kernels.four_bits import factor_of, four_bits
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
from tritium.ops.kernels.linear import FEW, _fitting, _prefetch, linear, linear_into
from tritium.ops.kernels.mlp import silu
from tritium.ops.kernels.norm import rms_norm
from tritium.ops.quantized import LARGEST, Quantized, dequantize

_KINDS = {"int8": "int8", "fp8": "e4m3", "fp8-block": "e4m3", "int4": "int4", "mxfp4": "e2m1"}
_COUNTS = 1 << 14
"""The most blocks of results whose columns are split between programs."""
LEAST = tl.constexpr(1e-30)
"""Stands in for the largest magnitude of a token of zeros."""
QUICK = tl.constexpr(2)
"""`NATIVE`: 0 where there are no instructions for these types, else 1; this where one token's products go the shortest
way: with e4m3 as pairs of float16, eight of which are summed as such; with 4 bits as integers, x in two bytes."""


@triton.jit
def _split4(x):
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
def _rounded(value, KIND: tl.constexpr, NATIVE: tl.constexpr):
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
    """Of the eight numbers of words, lowest first, float32 of n · 2^(p - 149), p as `_places` says: the bits of a
    float32 from 24 on are 0, and so the others count. n: of int4 the number + 8, of e2m1 twice the number."""
    values = ()
    for j in tl.static_range(8):
        if KIND == "int4":
            bits = word & (15 << 4 * j) if j < 6 else (word >> 8) & (15 << 4 * (j - 2))
        else:
            bits = (word << (28 - 4 * j)) >> 6 & -0x7E400000
        values += (bits.to(tl.float32, bitcast=True),)  # type: ignore[assignment]
    return values


@triton.jit
def _places(j, KIND: tl.constexpr):
    """2^(80 - p) of number j of a word."""
    place = 4 * j - tl.where(j < 6, 0, 8) if KIND == "int4" else j * 0 + 22
    return ((127 + 80 - place) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _four(x, norm, at, factor, K: tl.constexpr, EVEN: tl.constexpr, NORM: tl.constexpr):
    """Four neighbours a thread of x (1 + n) times a factor, and Σ x² by thread."""
    if EVEN:
        value = tl.load(x + at).to(tl.float32)
    else:
        value = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
    squares = tl.sum(value * value, axis=1)
    if NORM:
        if EVEN:
            value += value * tl.load(norm + at)
        else:
            value += value * tl.load(norm + at, mask=at < K, other=0.0)
    return value * factor, squares


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
def _token(x, norm, k, factor, K: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, NORM: tl.constexpr,
           KIND: tl.constexpr, ROUND: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """Of W words' columns of the token from k on: x (1 + n) as factors of their numbers (rounded int8: as words; or as
    `_halves` or `_bytes`), Σ x² by word, and for 4 bits what is too much in each word's product, for int4 comes with 8
    added, or the scale of `_bytes` by four words."""
    PER: tl.constexpr = 4 if KIND == "int8" or KIND == "e4m3" else 8
    j = tl.arange(0, 4)
    at = k + tl.arange(0, W)[:, None] * PER + j[None, :]
    value, squares = _four(x, norm, at, factor, K, EVEN, NORM)
    added = squares
    if KIND == "int8" and ROUND:
        out = (tl.sum(_rounded(value, KIND, NATIVE) << (8 * j)[None, :], axis=1),)
    elif PER == 4:
        low = _split4(value)
        if NATIVE == QUICK:
            out = (_halves(low),)
        elif ROUND:
            out = _e4m3(tl.sum(_rounded(value, KIND, NATIVE) << (8 * j)[None, :], axis=1))
        else:
            out = low
    else:
        high, more = _four(x, norm, at + 4, factor, K, EVEN, NORM)
        squares += more
        if NATIVE == QUICK:
            most = tl.max(tl.maximum(tl.abs(value), tl.abs(high)), axis=1)
            most = tl.maximum(tl.max(tl.reshape(most, [W // 4, 4]), axis=1), LEAST)
            added = most * (1 / 32512)
            unit = tl.reshape(tl.broadcast_to((32512 / most)[:, None], [W // 4, 4]), [W])[:, None]
            low, high = _split4(value * unit), _split4(high * unit)
            if KIND == "int4":  # even columns lie in the low halves of bytes
                low, high = (low[0], low[2], high[0], high[2]), (low[1], low[3], high[1], high[3])
            out = (_bytes(low), _bytes(high))  # type: ignore[assignment]
        else:
            added = tl.sum(value + high, axis=1) * 2.0**-66
            low = _split4(value * _places(j, KIND)[None, :])
            high = _split4(high * _places(4 + j, KIND)[None, :])
            out = (low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3])  # type: ignore[assignment]
    return out, squares, added


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
def _multiplied(tile, factors, added, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """[ROWS, W] words by the factors of a token: sums of four words' products, which one thread holds, [ROWS, W / 4];
    int32 of rounded int8."""
    FOUR: tl.constexpr = tile.shape[1] // 4
    even, odd = tl.split(tl.reshape(tile, [tile.shape[0], FOUR, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    four = (a, b, c, d)
    total = tl.zeros([tile.shape[0], FOUR], tl.int32 if KIND == "int8" else tl.float32)
    mine = ()
    for j in tl.static_range(len(factors)):
        mine += (_split4(tl.reshape(factors[j], [FOUR, 4])),)  # type: ignore[assignment]
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
        word = k + tl.arange(0, W // 4) * 4
        if EVEN:
            out = tl.load(at + word[None, :] // (GROUP // PER))
        else:
            inside = rows[:, None] & (word < WIDTH)[None, :]
            out = tl.load(at + word[None, :] // (GROUP // PER), mask=inside, other=0)
    else:
        out = tl.load(at, mask=rows[:, None], other=0.0)
    return out


@triton.jit
def largest(x, norm, K: tl.constexpr, NORM: tl.constexpr, NATIVE: tl.constexpr):
    """max |x (1 + n)| over the columns of a token."""
    BLOCK: tl.constexpr = 4096 if K > 2048 and not NORM else 2048 if K > 1024 else 1024
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
def rows_by_token(tile, up_tile, scale, up_scale, at, up_at, scale_at, up_scale_at, top, x, norm, rows,
                  K: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
                  LARGEST: tl.constexpr, NATIVE: tl.constexpr, FULL: tl.constexpr, TWO: tl.constexpr,
                  NORM: tl.constexpr):  # fmt: skip
    """Rows of one or TWO blocks of a weight by one token, each [ROWS] (x with its norm's rsqrt left out, whose Σ x² is
    the third result). `at`: pointers to the first words of COLUMNS columns, [ROWS, W], `tile` what is there; `scale_at`
    and `scale`: so of `row_scales`; `top`: `largest` where x is rounded; `rows`: those that exist,
    FULL: all. The next words are on their way while some are multiplied."""
    PER: tl.constexpr = 4 if KIND == "int8" or KIND == "e4m3" else 8
    W: tl.constexpr = COLUMNS // PER
    WIDTH: tl.constexpr = K // PER
    LAST: tl.constexpr = (K - 1) // COLUMNS
    WHOLE: tl.constexpr = K % COLUMNS == 0
    EVEN: tl.constexpr = FULL and WHOLE
    ROUND: tl.constexpr = LARGEST > 0
    total = tl.zeros([rows.shape[0], W // 4], tl.int32 if KIND == "int8" else tl.float32)
    up_total = total
    squares = tl.zeros([W], tl.float32)
    factor, unit = 1.0, 1.0
    if ROUND:
        factor, unit = LARGEST / top, top / LARGEST * (64.0 if NATIVE == QUICK else 1.0)
    elif PER == 8 and NATIVE == QUICK:
        unit = 0.0625 if KIND == "int4" else 0.5
    elif PER == 8:
        unit = 2.0**69 if KIND == "int4" else 2.0**68
    for i in tl.range(0, LAST):
        k = (i + 1) * W
        next_tile, next_up, next_scale, next_up_scale = words(at, k, rows, WIDTH, W, EVEN), up_tile, scale, up_scale
        if GROUP:
            next_scale = row_scales(scale_at, k, rows, WIDTH, W, GROUP, PER, EVEN)
        if TWO:
            next_up = words(up_at, k, rows, WIDTH, W, EVEN)
            if GROUP:
                next_up_scale = row_scales(up_scale_at, k, rows, WIDTH, W, GROUP, PER, EVEN)
        factors, more, added = _token(x, norm, i * COLUMNS, factor, K, W, True, NORM, KIND, ROUND, NATIVE)
        squares += more
        product = _multiplied(tile, factors, added, KIND, NATIVE)
        total += product * factor_of(scale) if GROUP else product
        if TWO:
            product = _multiplied(up_tile, factors, added, KIND, NATIVE)
            up_total += product * factor_of(up_scale) if GROUP else product
        tile, up_tile, scale, up_scale = next_tile, next_up, next_scale, next_up_scale
    factors, more, added = _token(x, norm, LAST * COLUMNS, factor, K, W, WHOLE, NORM, KIND, ROUND, NATIVE)
    product = _multiplied(tile, factors, added, KIND, NATIVE)
    total += product * factor_of(scale) if GROUP else product
    out = tl.sum(total, axis=1).to(tl.float32) * unit
    out *= 1.0 if GROUP else tl.sum(scale, axis=1)
    up_out = out
    if TWO:
        product = _multiplied(up_tile, factors, added, KIND, NATIVE)
        up_total += product * factor_of(up_scale) if GROUP else product
        up_out = tl.sum(up_total, axis=1).to(tl.float32) * unit
        up_out *= 1.0 if GROUP else tl.sum(up_scale, axis=1)
    return out, up_out, tl.sum(squares + more)


@triton.jit
def _plain(w, x, norm, y, eps, first, N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, pdl: tl.constexpr):
    """Two results of the one token, by rows that are not quantized."""
    n = first + tl.arange(0, 2)
    c = tl.arange(0, 1024)
    total = tl.zeros([2, 1024], tl.float32)
    squares = tl.zeros([1024], tl.float32)
    wait_for_inputs(pdl)
    for k in tl.range(0, K, 1024):
        value = tl.load(x + k + c, mask=k + c < K, other=0.0).to(tl.float32)
        if NORM:
            squares += value * value
            value += value * tl.load(norm + k + c, mask=k + c < K, other=0.0)
        row = tl.load(w + n[:, None] * K + (k + c)[None, :], mask=(n < N)[:, None] & (k + c < K)[None, :], other=0.0)
        total += row.to(tl.float32) * value[None, :]
    release_next(pdl)
    out = tl.sum(total, axis=1)
    if NORM:
        out *= 1.0 / tl.sqrt(tl.sum(squares) / K + eps)
    tl.store(y + n, out.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def _rows(program, w, scales, x, norm, residual, y, eps, N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr,
          GROUP: tl.constexpr, SHARING: tl.constexpr, LARGEST: tl.constexpr, NATIVE: tl.constexpr,
          ROWS: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr, PREFETCH: tl.constexpr, GATED: tl.constexpr,
          NORM: tl.constexpr, RESIDUAL: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    PER: tl.constexpr = 4 if KIND == "int8" or KIND == "e4m3" else 8
    W: tl.constexpr = COLUMNS // PER
    WIDTH: tl.constexpr = K // PER
    G: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP else 1
    FULL: tl.constexpr = N % ROWS == 0
    EVEN: tl.constexpr = FULL and K % COLUMNS == 0
    first = program * ROWS
    n = first + tl.arange(0, ROWS)
    rows = n < N
    at = w.to(tl.pointer_type(tl.int32)) + (n.to(tl.int64)[:, None] * WIDTH + tl.arange(0, W)[None, :])
    up_at = at + N * WIDTH
    scale_at = scales + (n // SHARING)[:, None] * G
    up_scale_at = scales + ((N + n) // SHARING)[:, None] * G
    tile = words(at, 0, rows, WIDTH, W, EVEN)
    up_tile = words(up_at, 0, rows, WIDTH, W, EVEN) if GATED else tile
    scale = row_scales(scale_at, 0, rows, WIDTH, W, GROUP, PER, EVEN)
    up_scale = row_scales(up_scale_at, 0, rows, WIDTH, W, GROUP, PER, EVEN) if GATED else scale
    if PREFETCH > 0:
        _prefetch(w, first, N, WIDTH * 4, ROWS, W * 4, PREFETCH * W * 4, THREADS)
        if GATED:
            _prefetch(w + N * WIDTH * 4, first, N, WIDTH * 4, ROWS, W * 4, PREFETCH * W * 4, THREADS)
    wait_for_inputs(pdl)
    if RESIDUAL:
        before = tl.load(residual + n, mask=rows, other=0.0).to(tl.float32)
    top = largest(x, norm, K, NORM, NATIVE) if LARGEST > 0 else 1.0
    out, up, squares = rows_by_token(tile, up_tile, scale, up_scale, at, up_at, scale_at, up_scale_at, top, x, norm,
                                     rows, K, COLUMNS, KIND, GROUP, LARGEST, NATIVE, FULL, GATED, NORM)  # fmt: skip
    release_next(pdl)
    scale = 1.0
    if NORM:
        scale = 1.0 / tl.sqrt(squares / K + eps)
        out *= scale
    if GATED:
        out = silu(out) * (up * scale)
    if RESIDUAL:
        out += before
    tl.store(y + n, out.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def _one(w, scales, plain, x, norm, residual, y, eps, N: tl.constexpr, PLAIN: tl.constexpr, K: tl.constexpr,
         KIND: tl.constexpr, GROUP: tl.constexpr, SHARING: tl.constexpr, LARGEST: tl.constexpr, NATIVE: tl.constexpr,
         ROWS: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr, PREFETCH: tl.constexpr, GATED: tl.constexpr,
         NORM: tl.constexpr, RESIDUAL: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """ROWS results of the one token. PREFETCH more tiles go into the L2 cache at once, so that memory is busy while the
    largest x is looked for. The first programs have the PLAIN results that follow, by rows that are not quantized."""
    FIRST: tl.constexpr = (PLAIN + 1) // 2
    if tl.program_id(0) < FIRST:
        _plain(plain, x, norm, y + N, eps, tl.program_id(0) * 2, PLAIN, K, NORM, pdl)
    else:
        _rows(tl.program_id(0) - FIRST, w, scales, x, norm, residual, y, eps, N, K, KIND, GROUP, SHARING, LARGEST,
              NATIVE, ROWS, COLUMNS, THREADS, PREFETCH, GATED, NORM, RESIDUAL, pdl)  # fmt: skip


@triton.jit
def _prepare(x, norm, q, h, scales, eps, x_stride, K: tl.constexpr, KIND: tl.constexpr, LARGEST: tl.constexpr,
             NATIVE: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, pdl: tl.constexpr
             ):  # fmt: skip
    """A token a program, BLOCK columns after the other: q = x, or norm(x), rounded to 8 bits, and its scale; or its
    columns by their rest by 4. KEEP: norm(x), in the compute dtype, in h too.

    For int4 of 16 bits q is float16 times a power of 2, which is the scale, and the sums follow that `four_bits` takes
    from each group's."""
    PARTS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    GROUPS: tl.constexpr = (K + 127) // 128
    HALF: tl.constexpr = KIND == "int4" and q.dtype.element_ty == tl.float16
    STRIDE: tl.constexpr = 1 + GROUPS if HALF else 1
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    g = tl.arange(0, BLOCK // 128)
    quad = tl.arange(0, BLOCK // 4)
    wait_for_inputs(pdl)
    values = ()
    for i in tl.static_range(PARTS):
        at = x + token * x_stride + i * BLOCK + c
        if (i + 1) * BLOCK <= K:
            values += (tl.load(at).to(tl.float32),)  # type: ignore[assignment]
        else:
            values += (tl.load(at, mask=i * BLOCK + c < K, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    squares = tl.zeros([BLOCK], tl.float32)
    top = tl.zeros([BLOCK], tl.float32)
    weighted = ()
    for i in tl.static_range(PARTS):
        value = values[i]  # type: ignore[misc,var-annotated]
        if NORM:
            squares += value * value
            value += value * tl.load(norm + i * BLOCK + c, mask=i * BLOCK + c < K, other=0.0)
        top = tl.maximum(top, tl.abs(value))
        weighted += (value,)  # type: ignore[assignment]
    release_next(pdl)
    unit = 1.0
    if NORM:
        unit = 1.0 / tl.sqrt(tl.sum(squares) / K + eps)
    factor = unit
    if LARGEST > 0:
        most = tl.maximum(tl.max(top), LEAST)
        factor = LARGEST / most
        tl.store(scales + token * STRIDE, most / LARGEST * unit)
    elif HALF:
        # The largest becomes 2^9 or more, below 2^10.
        most = tl.maximum(tl.max(top) * unit, LEAST)
        power = most.to(tl.int32, bitcast=True) & 0x7F800000
        factor = (254 * 8388608 - power).to(tl.float32, bitcast=True) * 2.0**9
        tl.store(scales + token * STRIDE, power.to(tl.float32, bitcast=True) * 2.0**-9)
    for i in tl.static_range(PARTS):
        value = weighted[i]  # type: ignore[misc]
        k = i * BLOCK + c
        if KEEP or HALF or LARGEST == 0:
            rounded = (value * unit).to(h.dtype.element_ty)  # type: ignore[attr-defined]
        if KEEP:
            tl.store(h + token * K + k, rounded, mask=k < K)
        if LARGEST > 0:
            bits = _rounded(value * factor, KIND, NATIVE)
            tl.store(q + token * K + k, bits.to(tl.uint8), mask=k < K)  # type: ignore[attr-defined]
        else:
            if HALF:
                rounded = rounded.to(tl.float32) * factor
            planes = _split4(tl.reshape(rounded, [BLOCK // 4, 4]))
            sums = tl.zeros([BLOCK // 4], tl.float32)
            at = i * (BLOCK // 4) + quad
            for j in tl.static_range(4):
                plane = planes[j]
                if HALF:
                    plane = (plane * (0.0625 if j % 2 else 1.0)).to(tl.float16)
                    sums += plane.to(tl.float32) * (1152.0 if j % 2 else 1032.0)
                tl.store(q + token * K + j * (K // 4) + at, plane, mask=at < K // 4)
            if HALF:
                group = i * (BLOCK // 128) + g
                sums = tl.sum(tl.reshape(sums, [BLOCK // 128, 32]), axis=1)
                tl.store(scales + token * STRIDE + 1 + group, sums, mask=group < GROUPS)


@triton.jit
def tile_product(w, scales, x, x_scales, row, taken, x_row, first, end, K: tl.constexpr, DEPTH: tl.constexpr,
                 KIND: tl.constexpr, GROUP: tl.constexpr, SHARING: tl.constexpr, ROUND: tl.constexpr,
                 FULL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Columns [first, end) of rows `row` of a weight (where `taken`; FULL: all) by rows x_row of x as `_prepare` leaves
    it: [ROWS, TOKENS] float32, all scales in it. `first` is a multiple of DEPTH."""
    if KIND == "int4" or KIND == "e2m1":
        return four_bits(w, scales, x, x_scales, row, taken, x_row, first, end, K, DEPTH, KIND, FULL, PACKED,
                          PRECISION, STAGES)  # fmt: skip
    G: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP else 1
    EVEN: tl.constexpr = K % DEPTH == 0
    c = tl.arange(0, DEPTH)
    if ROUND and KIND == "int8":
        w = w.to(tl.pointer_type(tl.int8))
        x = x.to(tl.pointer_type(tl.int8))
    elif ROUND:
        w = w.to(tl.pointer_type(tl.float8e4nv))
        x = x.to(tl.pointer_type(tl.float8e4nv))
    else:
        w = w.to(tl.pointer_type(tl.uint8))
    w_at = w + row.to(tl.int64)[:, None] * K + c[None, :]
    x_at = x + x_row.to(tl.int64)[:, None] * K + c[None, :]
    scale_at = scales + row // SHARING * G
    if ROUND and KIND == "int8":
        total = tl.zeros((row.shape[0], x_row.shape[0]), tl.int32)
    else:
        total = tl.zeros((row.shape[0], x_row.shape[0]), tl.float32)
    if GROUP:
        scale = tl.load(scale_at + first // GROUP, mask=taken, other=0.0)
    for k in tl.range(first, end, DEPTH, num_stages=STAGES):
        if GROUP:
            next_scale = tl.load(scale_at + min((k + DEPTH) // GROUP, G - 1), mask=taken, other=0.0)
        if FULL and EVEN:
            weight = tl.load(w_at + k)
        elif EVEN:
            weight = tl.load(w_at + k, mask=taken[:, None], other=0.0)
        else:
            weight = tl.load(w_at + k, mask=taken[:, None] & (k + c < K)[None, :], other=0.0)
        if EVEN:
            value = tl.load(x_at + k)
        else:
            value = tl.load(x_at + k, mask=(k + c < K)[None, :], other=0.0)
        if not ROUND:
            half = weight.to(tl.int16)
            half = (half << 8 & -32768) | (half << 7 & 0x3F80)
            weight = (half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(value.dtype)
        if GROUP:
            total += tl.dot(weight, tl.trans(value), input_precision=PRECISION) * scale[:, None]
            scale = next_scale
        elif ROUND and KIND == "int8":
            total = tl.dot(weight, tl.trans(value), total, out_dtype=tl.int32)
        elif ROUND and x_row.shape[0] <= 64:
            # Hopper adds up products of e4m3 in 14 bits: not for long where that costs nothing.
            total += tl.dot(weight, tl.trans(value))
        else:
            total = tl.dot(weight, tl.trans(value), total, input_precision=PRECISION)
    total = total.to(tl.float32)
    if not GROUP:
        total *= tl.load(scale_at, mask=taken, other=0.0)[:, None]
    if ROUND:
        total *= tl.load(x_scales + x_row)[None, :]
    return total


@triton.jit
def _plain_tile(w, x, y, first, M, N: tl.constexpr, K: tl.constexpr, Y: tl.constexpr, TOKENS: tl.constexpr,
                PRECISION: tl.constexpr, STAGES: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """Sixteen results of at most TOKENS tokens, by rows that are not quantized."""
    n, m, c = first + tl.arange(0, 16), tl.arange(0, TOKENS), tl.arange(0, 128)
    total = tl.zeros([16, TOKENS], tl.float32)
    wait_for_inputs(pdl)
    for k in tl.range(0, K, 128, num_stages=STAGES):
        there = (k + c < K)[None, :]
        row = tl.load(w + n[:, None] * K + (k + c)[None, :], mask=(n < N)[:, None] & there, other=0.0)
        value = tl.load(x + m[:, None] * K + (k + c)[None, :], mask=(m < M)[:, None] & there, other=0.0)
        total = tl.dot(row, tl.trans(value), total, input_precision=PRECISION)
    release_next(pdl)
    kept = (n < N)[:, None] & (m < M)[None, :]
    tl.store(y + m.to(tl.int64)[None, :] * Y + n[:, None], total.to(y.dtype.element_ty), mask=kept)


@triton.jit
def _block(program, w, scales, x, x_scales, residual, y, parts, seen, M, N: tl.constexpr, K: tl.constexpr,
           Y: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SHARING: tl.constexpr, ROUND: tl.constexpr,
           PACKED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, VALID: tl.constexpr, TOKENS: tl.constexpr,
           DEPTH: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr, THREADS: tl.constexpr, PREFETCH: tl.constexpr,
           EACH: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """VALID results of TOKENS tokens, from ROWS rows of the weight (gated: one half gate, the other up). Programs go
    through BAND blocks of results for each block of tokens, so that what they read is still in the L2 cache. PREFETCH
    tiles go there while x is prepared. EACH: columns of a program; 0: all. Sums then are parts [.., M, N], which the
    last of a block's programs adds up, in their order; it knows itself by a count `seen`, and sets it back."""
    OUT: tl.constexpr = ROWS // 2 if GATED else ROWS
    FULL: tl.constexpr = (VALID == OUT) and (N % OUT == 0)
    blocks: tl.constexpr = (N + VALID - 1) // VALID
    many = (M + TOKENS - 1) // TOKENS
    band = program // (BAND * many)
    wide = min(BAND, blocks - band * BAND)
    inside = program % (BAND * many)
    first = (band * BAND + inside % wide) * VALID
    m = inside // wide * TOKENS + tl.arange(0, TOKENS)
    r = tl.arange(0, ROWS)
    taken = (r % OUT < VALID) & (first + r % OUT < N)
    row = tl.where(taken, first + r % OUT, 0) + r // OUT * N
    i = tl.arange(0, OUT)
    n = first + i
    kept = ((i < VALID) & (n < N))[:, None] & (m < M)[None, :]
    if PREFETCH > 0:
        BITS: tl.constexpr = 4 if KIND == "int4" or KIND == "e2m1" else 8
        FETCHED: tl.constexpr = min(PREFETCH * DEPTH, EACH if EACH else K) * BITS // 8
        bottom = tl.minimum(first + VALID, N)
        part = w + tl.program_id(1) * (EACH * BITS // 8)
        _prefetch(part, first, bottom, K * BITS // 8, OUT, 0, FETCHED, THREADS)
        if GATED:
            _prefetch(part, first + N, bottom + N, K * BITS // 8, OUT, 0, FETCHED, THREADS)
    wait_for_inputs(pdl)
    left = tl.program_id(1) * EACH if EACH else 0
    right = tl.minimum(left + EACH, K) if EACH else K
    total = tile_product(w, scales, x, x_scales, row, taken, tl.minimum(m, M - 1), left, right, K, DEPTH, KIND, GROUP,
                         SHARING, ROUND, FULL, PACKED, PRECISION, STAGES)  # fmt: skip
    release_next(pdl)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(total, [2, OUT, TOKENS]), [1, 2, 0]))
        total = silu(gate) * up
    spot = m.to(tl.int64)[None, :] * N + n[:, None]
    if EACH:
        PARTS: tl.constexpr = (K + EACH - 1) // EACH
        tl.store(parts + tl.program_id(1).to(tl.int64) * M * N + spot, total, mask=kept)
        tl.debug_barrier()  # all of a program's part is there before it counts
        if tl.atomic_add(seen + program, 1, sem="acq_rel") == PARTS - 1:
            total = tl.zeros([OUT, TOKENS], tl.float32)
            for k in tl.static_range(PARTS):
                total += tl.load(parts + k * M.to(tl.int64) * N + spot, mask=kept, other=0.0, cache_modifier=".cg")
            tl.store(seen + program, 0)
        else:
            kept = kept & False
    if RESIDUAL:
        total += tl.load(residual + spot, mask=kept, other=0.0).to(tl.float32)
    tl.store(y + m.to(tl.int64)[None, :] * Y + n[:, None], total.to(y.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["M"])
def _tile(w, scales, plain, h, x, x_scales, residual, y, parts, seen, M, N: tl.constexpr, PLAIN: tl.constexpr,
          K: tl.constexpr, Y: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SHARING: tl.constexpr,
          ROUND: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, VALID: tl.constexpr,
          TOKENS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr, THREADS: tl.constexpr,
          PREFETCH: tl.constexpr, EACH: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, pdl: tl.constexpr
          ):  # fmt: skip
    """Blocks of results of TOKENS tokens, see `_block`. The first programs have the PLAIN results that follow, of at
    most TOKENS tokens h, by rows that are not quantized."""
    FIRST: tl.constexpr = (PLAIN + 15) // 16
    if tl.program_id(0) < FIRST:
        if tl.program_id(1) == 0:
            _plain_tile(plain, h, y + N, tl.program_id(0) * 16, M, PLAIN, K, Y, TOKENS, PRECISION, STAGES, pdl)
    else:
        _block(tl.program_id(0) - FIRST, w, scales, x, x_scales, residual, y, parts, seen, M, N, K, Y, KIND, GROUP,
               SHARING, ROUND, PACKED, PRECISION, ROWS, VALID, TOKENS, DEPTH, BAND, STAGES, THREADS, PREFETCH, EACH,
               GATED, RESIDUAL, pdl)  # fmt: skip


def native(target: Target) -> bool:
    """Whether there are instructions for four products of bytes and for e4m3."""
    return target.kind == "cuda" and "dot_fp8" in target.features


def packed(target: Target) -> bool:
    """Whether there are instructions for two bfloat16 of a register."""
    return target.kind == "cuda" and "dot_bf16" in target.features


def form(w: Quantized) -> dict[str, Any]:
    """The constexprs of kernels that say how a weight is stored."""
    scheme = w.scheme
    group = scheme.group if w.scales.shape[-1] > 1 or scheme.group >= w.shape[-1] else 0
    return {"KIND": _KINDS[scheme.name], "GROUP": group, "SHARING": scheme.rows}


def by_token(w: Quantized) -> dict[str, Any]:
    """The constexprs of `rows_by_token` that say how it is multiplied here."""
    rounded = w.scheme.activations == torch.float8_e4m3fn and w.dtype == torch.bfloat16  # of more digits sums need more
    quick = rounded or (w.scheme.bits == 4 and w.dtype.itemsize == 2)
    return {"LARGEST": largest_of(w), "NATIVE": native(target_of(w.values)) * (1 + quick)}


def largest_of(w: Quantized) -> float:
    """What x is scaled to before it is rounded; 0 where it is not."""
    return LARGEST[w.scheme.activations] if w.scheme.activations else 0.0


def prepare(x_MK: torch.Tensor, w: Quantized, norm_K: torch.Tensor | None, eps: float, h_MK: torch.Tensor | None = None
            ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x, or norm(x), as `_tile` reads it: (q_MK, its scales). `h_MK`: gets norm(x) too."""
    (M, K), most = x_MK.shape, largest_of(w)
    if not most and w.scheme.bits == 8:
        if norm_K is not None:
            x_MK = rms_norm(x_MD=x_MK, w_D=norm_K, eps=eps, dtype=w.dtype)
        if h_MK is not None:
            h_MK.copy_(x_MK)
        return x_MK.to(w.dtype).contiguous(), x_MK
    half = w.scheme.name == "int4" and w.dtype.itemsize == 2
    q_MK = torch.empty((M, K), dtype=torch.uint8 if most else torch.float16 if half else w.dtype, device=x_MK.device)
    scales = torch.empty(M * (1 + cdiv(K, 128) * half), dtype=torch.float32, device=x_MK.device)
    launch(
        _prepare, (M,), x_MK, x_MK if norm_K is None else norm_K, q_MK, w.values.new_empty(0, dtype=w.dtype)
        if h_MK is None else h_MK, scales, eps, x_MK.stride(0), K=K, KIND=_KINDS[w.scheme.name], LARGEST=most,
        NATIVE=native(target_of(x_MK)), NORM=norm_K is not None, KEEP=h_MK is not None,
        **parameters("quantized.prepare", x_MK, D=K),
    )  # fmt: skip
    return q_MK, scales


def quantized(
    x_MK: torch.Tensor, w: Quantized, norm_K: torch.Tensor | None, eps: float, gated: bool,
    residual_MN: torch.Tensor | None, y_MN: torch.Tensor, plain_PK: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """`linear` into y, whose rows may be strided. `plain_PK`: rows of the weight that follow, not quantized."""
    (M, K), N, P = x_MK.shape, w.shape[0] // (1 + gated), 0 if plain_PK is None else len(plain_PK)
    how, values, most = form(w), w.values.view(torch.uint8), largest_of(w)
    key = {"N": N, "K": K, "gated": int(gated), "bits": w.scheme.bits, "group": w.scheme.group,
           "e4m3": int(how["KIND"] == "e4m3")}
    target = target_of(x_MK)
    shared = {"N": N, "K": K, "GATED": gated, "RESIDUAL": residual_MN is not None, **how}
    residual = x_MK if residual_MN is None else residual_MN
    if w.scheme.bits == 4 and K % 4:
        w_JK = dequantize(w, w.dtype)
        whole = w_JK if plain_PK is None else (w_JK, plain_PK)
        y_MN.copy_(linear(x_MK=x_MK, w_JK=whole, norm_K=norm_K, eps=eps, gated=gated, residual_MN=residual_MN))
        return
    found = parameters("quantized.one", x_MK, **key) if M == 1 and K * w.scheme.bits % 32 == 0 else {"rows": 0}
    if found["rows"]:
        rows, columns = found.pop("rows"), min(found.pop("columns"), max(128, power_of_2(K)))
        prefetch = found.pop("prefetch") * ("dependent_launch" in target.features)
        launch(
            _one, (cdiv(P, 2) + cdiv(N, rows),), values, w.scales, x_MK if plain_PK is None else plain_PK, x_MK,
            x_MK if norm_K is None else norm_K, residual, y_MN, eps, PLAIN=P, NORM=norm_K is not None, ROWS=rows,
            COLUMNS=columns, THREADS=32 * found["num_warps"], PREFETCH=prefetch, **by_token(w), **shared, **found,
        )  # fmt: skip
        return
    found = parameters("quantized.tile", x_MK, M=_bucket(M), **key)
    h_MK = x_MK if plain_PK is None else torch.empty((M, K), dtype=w.dtype, device=x_MK.device)
    q_MK, x_scales = prepare(x_MK, w, norm_K, eps, None if plain_PK is None else h_MK)
    if plain_PK is not None and M > FEW:
        linear_into(y_MN[:, N:], h_MK, plain_PK, None, 0.0)
        P = 0
    rows, per_core, depth = found.pop("rows"), found.pop("per_core"), found.pop("depth")
    valid = _fitting(N, rows // (1 + gated), per_core * target.cores)
    tokens = max(found.pop("tokens"), min(64, power_of_2(M)) if M <= FEW else 0)
    prefetch, splits = found.pop("prefetch", 0) * (found["pdl"] > 0), found.pop("splits", 1)
    if gated or how["KIND"] == "int8":  # whose sums of integers no order changes
        splits = 1
    depth, programs = depth_of(w, depth), cdiv(N, valid) * cdiv(M, tokens)
    each = cdiv(cdiv(K, depth), splits) * depth % (cdiv(K, depth) * depth) if programs <= _COUNTS else 0
    splits = cdiv(K, each) if each else 1
    parts_PMN = torch.empty((splits, M, N), dtype=torch.float32, device=x_MK.device) if each else y_MN
    launch(
        _tile, (cdiv(P, 16) + programs, splits), values, w.scales, h_MK if plain_PK is None else plain_PK, h_MK, q_MK,
        x_scales, residual, y_MN, parts_PMN, _counts(x_MK.device), M, PLAIN=P, Y=y_MN.stride(0), ROUND=most > 0,
        PACKED=packed(target), PRECISION=EXACT, ROWS=rows, VALID=valid, TOKENS=tokens, DEPTH=depth,
        BAND=found.pop("band"), STAGES=found["num_stages"], THREADS=32 * found["num_warps"], PREFETCH=prefetch,
        EACH=each, **shared, **found,
    )  # fmt: skip


@lru_cache
def _counts(device: torch.device) -> torch.Tensor:
    """Zeros, as `_tile` leaves them."""
    return torch.zeros(_COUNTS, dtype=torch.int32, device=device)


def depth_of(w: Quantized, depth: int) -> int:
    """Columns of a tile: of 8 bits no more than share a scale."""
    if w.scheme.bits == 4 and w.dtype.itemsize <= 2:
        return max(128, depth) if w.shape[-1] % max(128, depth) == 0 else 128  # no group's part lies beyond K
    if w.scheme.bits == 4:
        return 64
    if w.scheme.group:
        return min(depth, w.scheme.group)
    return depth if w.dtype.itemsize <= 2 or w.scheme.activations else max(32, depth // 4)


def _bucket(tokens: int) -> int:
    few = 1 if tokens == 1 else max(8, bucket(tokens))
    return few if tokens <= FEW else 256 if tokens <= 256 else 4096
