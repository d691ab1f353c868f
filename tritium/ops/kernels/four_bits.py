"""Tiles of tokens by a weight of four bits, on the matrix units. See `tritium.ops.kernels.quantized`.

A word of 16 bits holds four columns; what stands in each of its places is a factor as it lies, made in registers, for x
comes with its columns by their rest by 4 (`quantized._prepare`).

Shapes: M tokens, N results of a token, K inputs, G = K / GROUP scales of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOW = tl.constexpr(32)
"""Numbers of e2m1 may meet x as 2^-_LOW of themselves, for then a bfloat16 has all exponents that weights have."""


@triton.jit
def factor_of(scale):
    """Stored scales as float32; those of 8 bits are E8M0."""
    if scale.dtype == tl.uint8:
        bits = scale.to(tl.int32)
        return tl.where(bits == 0, 0x00400000, bits << 23).to(tl.float32, bitcast=True)
    return scale.to(tl.float32)


@triton.jit
def _planes(quads, factor, KIND: tl.constexpr, dtype: tl.constexpr, PACKED: tl.constexpr):
    """Of words of 16 bits the four numbers, lowest first, in a compute dtype. Of int4 in float16, 1024 + n, 1024 + 16 n
    and again; of e2m1 times `factor`. PACKED (NVIDIA): two neighbours, which lie in one register, at once; e2m1 in
    bfloat16 alone, `factor` is the stored exponent e then, and the numbers come times 2^(e - 127 - `_LOW`)."""
    if PACKED and KIND == "int4":
        out = tl.inline_asm_elementwise(
            """{.reg .b32 t; shr.u32 t, $4, 8;
            lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA; lop3.b32 $1, $4, 0x00F000F0, 0x64006400, 0xEA;
            lop3.b32 $2, t, 0x000F000F, 0x64006400, 0xEA; lop3.b32 $3, t, 0x00F000F0, 0x64006400, 0xEA;}""",
            "=&r,=&r,=&r,=&r,r", [quads], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    elif KIND == "int4" and dtype == tl.float16:
        high = quads >> 8
        out = ((quads & 15 | 0x6400).to(dtype, bitcast=True), (quads & 240 | 0x6400).to(dtype, bitcast=True),
               (high & 15 | 0x6400).to(dtype, bitcast=True), (high & 240 | 0x6400).to(dtype, bitcast=True))  # fmt: skip
    elif PACKED:
        # Exponent and mantissa at the end of a bfloat16's exponent make the number times 2^-126. Weights have no scale
        # above 2^33, which is what larger ones count as.
        out = tl.inline_asm_elementwise(
            """{.reg .b32 a, b, c, d, s, t, u, f, z; mov.b32 z, 0x80008000;
            min.u32 f, $5, 0x00A000A0; mad.lo.u32 f, f, 128, 0x2F002F00;
            shl.b32 a, $4, 6; shl.b32 b, $4, 2; shr.u32 c, $4, 2; shr.u32 d, $4, 6;
            shl.b32 s, $4, 12; shl.b32 t, $4, 8; shl.b32 u, $4, 4;
            and.b32 a, a, 0x01C001C0; and.b32 b, b, 0x01C001C0; and.b32 c, c, 0x01C001C0; and.b32 d, d, 0x01C001C0;
            lop3.b32 a, s, 0x80008000, a, 0xEA; lop3.b32 b, t, 0x80008000, b, 0xEA;
            lop3.b32 c, u, 0x80008000, c, 0xEA; lop3.b32 d, $4, 0x80008000, d, 0xEA;
            fma.rn.bf16x2 $0, a, f, z; fma.rn.bf16x2 $1, b, f, z;
            fma.rn.bf16x2 $2, c, f, z; fma.rn.bf16x2 $3, d, f, z;}""",
            "=&r,=&r,=&r,=&r,r,r", [quads, factor], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        out = ()
        for j in tl.static_range(4):
            code = (quads.to(tl.int32) >> (4 * j)) & 15
            if KIND == "int4":
                value = (code - 8).to(dtype)
            else:
                number = ((code << 28) >> 6 & -0x7E400000).to(tl.float32, bitcast=True) * 2.0**126
                value = (number * factor).to(dtype)
            out += (value,)  # type: ignore[assignment]
    return out


@triton.jit
def _exponents(at, k, taken, K: tl.constexpr, SUB: tl.constexpr, FULL: tl.constexpr, PACKED: tl.constexpr):
    """What `_planes` takes for SUB words of e2m1 from word k on: [ROWS, SUB]."""
    G: tl.constexpr = (K + 31) // 32
    g = k // 8 + tl.arange(0, SUB // 8)
    if FULL and K % (4 * SUB) == 0:
        scale = tl.load(at[:, None] + g[None, :])
    else:
        scale = tl.load(at[:, None] + g[None, :], mask=taken[:, None] & (g < G)[None, :], other=0)
    scale = scale.to(tl.int16) if PACKED else factor_of(scale)
    return tl.reshape(tl.broadcast_to(scale[:, :, None], [at.shape[0], SUB // 8, 8]), [at.shape[0], SUB])


@triton.jit
def _group_scales(at, k, taken, K: tl.constexpr, PAIRS: tl.constexpr, SECOND: tl.constexpr):
    """Scales of the group of int4 that word k of 16 bits is in, [ROWS] float32. PAIRS: two groups' are one word."""
    if PAIRS:
        word = tl.load(at.to(tl.pointer_type(tl.int32)) + k // 64, mask=taken, other=0)
        scale = (word & -65536 if SECOND else word << 16).to(tl.float32, bitcast=True)
    else:
        scale = tl.load(at + tl.minimum(k // 32, (K - 1) // 128), mask=taken, other=0.0).to(tl.float32)
    return scale


@triton.jit
def four_bits(w, scales, x, x_scales, row, taken, x_row, first, end, K: tl.constexpr, DEPTH: tl.constexpr,
               KIND: tl.constexpr, FULL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
               STAGES: tl.constexpr):  # fmt: skip
    """As `quantized.tile_product`. Words of 16 bits hold four columns; each of their places is a factor as it lies."""
    WIDTH: tl.constexpr = K // 4
    STEP: tl.constexpr = DEPTH // 4
    SUB: tl.constexpr = min(32, STEP)
    PARTS: tl.constexpr = STEP // SUB
    EVEN: tl.constexpr = WIDTH % STEP == 0
    GROUP: tl.constexpr = 128 if KIND == "int4" else 32
    G: tl.constexpr = (K + GROUP - 1) // GROUP
    HALF: tl.constexpr = KIND == "int4" and x.dtype.element_ty == tl.float16
    FAST: tl.constexpr = PACKED and (HALF or (KIND == "e2m1" and x.dtype.element_ty == tl.bfloat16))
    PAIRS: tl.constexpr = SUB == 32 and PARTS % 2 == 0 and G % 2 == 0
    c = tl.arange(0, SUB)
    w_at = w.to(tl.pointer_type(tl.int16)) + row.to(tl.int64)[:, None] * WIDTH + c[None, :]
    x_at = x + x_row.to(tl.int64)[:, None] * K + c[None, :]
    scale_at = scales + row * G
    if HALF:
        x_scales += x_row * (1 + G)
    total = tl.zeros((row.shape[0], x_row.shape[0]), tl.float32)
    for k in tl.range(first // 4, end // 4, STEP, num_stages=STAGES):
        for i in tl.static_range(PARTS):
            at = k + i * SUB
            if FULL and EVEN:
                quads = tl.load(w_at + at)
            elif EVEN:
                quads = tl.load(w_at + at, mask=taken[:, None], other=0)
            else:
                quads = tl.load(w_at + at, mask=taken[:, None] & (at + c < WIDTH)[None, :], other=0)
            factor = quads
            if KIND == "e2m1":
                factor = _exponents(scale_at, at, taken, K, SUB, FULL, FAST)
            part = tl.zeros((row.shape[0], x_row.shape[0]), tl.float32)
            planes = _planes(quads, factor, KIND, x.dtype.element_ty, FAST)
            for j in tl.static_range(4):
                if EVEN:
                    value = tl.load(x_at + (at + j * WIDTH))
                else:
                    value = tl.load(x_at + (at + j * WIDTH), mask=(at + c < WIDTH)[None, :], other=0.0)
                part = tl.dot(planes[j], tl.trans(value), part, input_precision=PRECISION)
            if KIND == "int4":
                if HALF:
                    part -= tl.load(x_scales + tl.minimum(at // 32 + 1, G))[None, :]
                part *= _group_scales(scale_at, at, taken, K, PAIRS, i % 2 == 1)[:, None]
            total += part
    if HALF:
        total *= tl.load(x_scales)[None, :]
    elif FAST:
        total *= 2.0**_LOW
    return total
