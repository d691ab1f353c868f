"""Products with a weight of fewer bits: one token (`one_token`), and tiles of tokens. See `tritium.ops.quantized`.

Several tokens: one launch normalises and rounds x, and the product runs on the matrix units, the weight's rows as the M
side; int8 and e4m3 as they are, others as numbers made in registers (`four_bits`). Rows that are not quantized, where a
weight has some, have programs of their own in the same launch.

Shapes: M tokens, N results of a token, K inputs, G = K / GROUP scales of a row; a gated weight has 2 N rows, gate
first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tritium.hw import Target
from tritium.ops.handed import Handed, Peak
from tritium.ops.kernels.four_bits import four_bits
from tritium.ops.kernels.launch import (
    EXACT,
    bucket,
    cdiv,
    counts,
    is_last,
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
from tritium.ops.kernels.one_token import (
    KINDS,
    LEAST,
    by_token,
    form,
    largest_of,
    leave_peak,
    native,
    peak_arguments,
    peak_forms,
    rounded_bits,
    row_scales,
    rows_by_token,
    split4,
    words,
)
from tritium.ops.quantized import Quantized, dequantize

_COUNTS = 1 << 14
"""The most blocks of results whose columns are split between programs."""


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
def _rows(program, w, scales, x, norm, residual, y, peak, leave, behind, eps, N: tl.constexpr, K: tl.constexpr,
          KIND: tl.constexpr, GROUP: tl.constexpr, SHARING: tl.constexpr, LARGEST: tl.constexpr, NATIVE: tl.constexpr,
          ROWS: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr,
          PREFETCH: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, PEAK: tl.constexpr,
          LEAVE: tl.constexpr, BEHIND: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    PER: tl.constexpr = 4 if KIND == "int8" or KIND == "e4m3" else 8
    W: tl.constexpr = COLUMNS // PER
    WIDTH: tl.constexpr = K // PER
    G: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP else 1
    ALL: tl.constexpr = BLOCKS * ROWS
    FULL: tl.constexpr = N >= ALL
    EVEN: tl.constexpr = FULL and K % COLUMNS == 0
    mine = program * ALL
    first = tl.minimum(mine, N - ALL) if FULL else mine  # the last program does again what lacks it
    n = first + tl.arange(0, ROWS)
    rows = n < N
    base = w.to(tl.pointer_type(tl.int32)) + (n.to(tl.int64)[:, None] * WIDTH + tl.arange(0, W)[None, :])
    at, scale_at, tiles, of_rows, weights, before = (), (), (), (), (), ()
    for j in tl.static_range(BLOCKS * (1 + GATED)):
        row = j % BLOCKS * ROWS + j // BLOCKS * N
        words_at, scales_at = base + row * WIDTH, scales + (n + row) // SHARING * G
        at += (words_at,)  # type: ignore[assignment]
        scale_at += (scales_at,)  # type: ignore[assignment]
        of_rows += (row_scales(scales_at, 0, rows, WIDTH, W, GROUP, PER, EVEN),)  # type: ignore[assignment]
        tiles += (words(words_at, 0, rows, WIDTH, W, EVEN),)  # type: ignore[assignment]
    if PREFETCH > 0:
        _prefetch(w, first, N, WIDTH * 4, ALL, W * 4, PREFETCH * W * 4, THREADS)
        if GATED:
            _prefetch(w + N * WIDTH * 4, first, N, WIDTH * 4, ALL, W * 4, PREFETCH * W * 4, THREADS)
    for j in tl.static_range(BLOCKS if BEHIND else 0):
        weight = tl.load(behind + n + j * ROWS, mask=n + j * ROWS < N, other=0.0)
        weights += (weight,)  # type: ignore[assignment]
    wait_for_inputs(pdl)
    for j in tl.static_range(BLOCKS if RESIDUAL else 0):
        value = tl.load(residual + n + j * ROWS, mask=n + j * ROWS < N, other=0.0).to(tl.float32)
        before += (value,)  # type: ignore[assignment]
    outs, squares = rows_by_token(tiles, of_rows, at, scale_at, peak, x, norm, rows, K, COLUMNS, KIND, GROUP, LARGEST,
                                  NATIVE, FULL, NORM, PEAK)  # fmt: skip
    release_next(pdl)
    scale = 1.0 / tl.sqrt(squares / K + eps) if NORM else 1.0
    most = tl.zeros([ROWS], tl.float32)
    for j in tl.static_range(BLOCKS):
        out = outs[j] * scale
        spot = n + j * ROWS
        kept = (spot >= mine) & (spot < N)
        if GATED:
            out = silu(out) * (outs[BLOCKS + j] * scale)
        if RESIDUAL:
            out += before[j]  # type: ignore[misc]
        rounded = out.to(y.dtype.element_ty)
        tl.store(y + spot, rounded, mask=kept)
        if LEAVE:
            value = rounded.to(tl.float32)
            if BEHIND:
                value += value * weights[j]  # type: ignore[misc]
            most = tl.maximum(most, tl.where(kept, tl.abs(value), 0.0))
    if LEAVE:
        leave_peak(leave, most, most >= 0)


@triton.jit
def _one(w, scales, plain, x, norm, residual, y, peak, leave, behind, eps, N: tl.constexpr, PLAIN: tl.constexpr,
         K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SHARING: tl.constexpr, LARGEST: tl.constexpr,
         NATIVE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr,
         PREFETCH: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, PEAK: tl.constexpr,
         LEAVE: tl.constexpr, BEHIND: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """BLOCKS times ROWS results of the one token; their largest goes to `leave`, times 1 + `behind`. PREFETCH more
    tiles go into the L2 cache at once, so that memory is busy while the largest x is looked for. The first programs
    have the PLAIN results that follow, by rows that are not quantized."""
    FIRST: tl.constexpr = (PLAIN + 1) // 2
    if tl.program_id(0) < FIRST:
        _plain(plain, x, norm, y + N, eps, tl.program_id(0) * 2, PLAIN, K, NORM, pdl)
    else:
        _rows(tl.program_id(0) - FIRST, w, scales, x, norm, residual, y, peak, leave, behind, eps, N, K, KIND, GROUP,
              SHARING, LARGEST, NATIVE, ROWS, BLOCKS, COLUMNS, THREADS, PREFETCH, GATED, NORM, RESIDUAL, PEAK, LEAVE,
              BEHIND, pdl)  # fmt: skip


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
            bits = rounded_bits(value * factor, KIND, NATIVE)
            tl.store(q + token * K + k, bits.to(tl.uint8), mask=k < K)  # type: ignore[attr-defined]
        else:
            if HALF:
                rounded = rounded.to(tl.float32) * factor
            planes = split4(tl.reshape(rounded, [BLOCK // 4, 4]))
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
    if EACH:
        spot = m.to(tl.int64)[None, :] * N + n[:, None]
        PARTS: tl.constexpr = (K + EACH - 1) // EACH
        tl.store(parts + tl.program_id(1).to(tl.int64) * M * N + spot, total, mask=kept)
        if is_last(seen + program, PARTS):
            total = tl.zeros([OUT, TOKENS], tl.float32)
            for k in tl.static_range(PARTS):
                total += tl.load(parts + k * M.to(tl.int64) * N + spot, mask=kept, other=0.0, cache_modifier=".cg")
        else:
            kept = kept & False
    if RESIDUAL:
        total += tl.load(residual + m.to(tl.int64)[None, :] * N + n[:, None], mask=kept, other=0.0).to(tl.float32)
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


def packed(target: Target) -> bool:
    """Whether there are instructions for two bfloat16 of a register."""
    return target.kind == "cuda" and "dot_bf16" in target.features


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
        if h_MK is None else h_MK, scales, eps, x_MK.stride(0), K=K, KIND=KINDS[w.scheme.name], LARGEST=most,
        NATIVE=native(target_of(x_MK)), NORM=norm_K is not None, KEEP=h_MK is not None,
        **parameters("quantized.prepare", x_MK, D=K),
    )  # fmt: skip
    return q_MK, scales


def quantized(
    x_MK: torch.Tensor, w: Quantized, norm_K: torch.Tensor | None, eps: float, gated: bool,
    residual_MN: torch.Tensor | None, y_MN: torch.Tensor, plain_PK: torch.Tensor | None = None,
    given: Handed | None = None, leave: Handed | None = None,
) -> None:  # fmt: skip
    """`linear` into y, whose rows may be strided. `plain_PK`: rows of the weight that follow, not quantized."""
    (M, K), N, P = x_MK.shape, w.shape[0] // (1 + gated), 0 if plain_PK is None else len(plain_PK)
    how, values, most = form(w), w.values.view(torch.uint8), largest_of(w)
    key = {"N": N, "K": K, "gated": int(gated), "bits": w.scheme.bits, "group": w.scheme.group,
           "e4m3": int(how["KIND"] == "e4m3")}
    target = target_of(x_MK)
    shared = {"N": N, "K": K, "GATED": gated, "RESIDUAL": residual_MN is not None, **how}
    residual, plain = x_MK if residual_MN is None else residual_MN, x_MK if plain_PK is None else plain_PK
    if w.scheme.bits == 4 and K % 4:
        w_JK = dequantize(w, w.dtype)
        whole = w_JK if plain_PK is None else (w_JK, plain_PK)
        y_MN.copy_(linear(x_MK=x_MK, w_JK=whole, norm_K=norm_K, eps=eps, gated=gated, residual_MN=residual_MN))
        return
    found = parameters("quantized.one", x_MK, **key) if M == 1 and K * w.scheme.bits % 32 == 0 else {"rows": 0}
    if found["rows"]:
        rows, columns = found.pop("rows"), min(found.pop("columns"), max(128, power_of_2(K)))
        blocks = min(found.pop("blocks", 1), max(1, N // rows))  # no block lies beyond N
        prefetch = found.pop("prefetch") * ("dependent_launch" in target.features)
        launch(
            _one, (cdiv(P, 2) + cdiv(N, blocks * rows),), values, w.scales, plain, x_MK,
            x_MK if norm_K is None else norm_K, residual, y_MN, *peak_arguments(given, leave, x_MK), eps, PLAIN=P,
            NORM=norm_K is not None, PEAK=isinstance(given, Peak), **peak_forms(leave), ROWS=rows, BLOCKS=blocks,
            COLUMNS=columns, THREADS=32 * found["num_warps"], PREFETCH=prefetch, **by_token(w), **shared, **found,
        )  # fmt: skip
        return
    found = parameters("quantized.tile", x_MK, M=_bucket(M), **key)
    h_MK = None if plain_PK is None else torch.empty((M, K), dtype=w.dtype, device=x_MK.device)
    q_MK, x_scales = prepare(x_MK, w, norm_K, eps, h_MK)
    if plain_PK is not None and h_MK is not None and M > FEW:
        linear_into(y_MN[:, N:], h_MK, plain_PK, None, 0.0)
        P = 0
    rows, per_core, depth = found.pop("rows"), found.pop("per_core"), found.pop("depth")
    tokens = max(found.pop("tokens"), min(64, power_of_2(M)) if M <= FEW else 0)
    prefetch, splits = found.pop("prefetch", 0) * (found["pdl"] > 0), found.pop("splits", 1)
    if gated or how["KIND"] == "int8":  # whose sums of integers no order changes
        splits = 1
    valid = _fitting(N, rows // (1 + gated), per_core * target.cores // splits)
    depth, programs = depth_of(w, depth), cdiv(N, valid) * cdiv(M, tokens)
    each = cdiv(cdiv(K, depth), splits) * depth % (cdiv(K, depth) * depth) if programs <= _COUNTS else 0
    splits = cdiv(K, each) if each else 1
    parts_PMN = torch.empty((splits, M, N), dtype=torch.float32, device=x_MK.device) if each else y_MN
    launch(
        _tile, (cdiv(P, 16) + programs, splits), values, w.scales, plain, x_MK if h_MK is None else h_MK, q_MK,
        x_scales, residual, y_MN, parts_PMN, counts(x_MK.device, _COUNTS), M, PLAIN=P, Y=y_MN.stride(0), ROUND=most > 0,
        PACKED=packed(target), PRECISION=EXACT, ROWS=rows, VALID=valid, TOKENS=tokens, DEPTH=depth,
        BAND=found.pop("band"), STAGES=found["num_stages"], THREADS=32 * found["num_warps"], PREFETCH=prefetch,
        EACH=each, **shared, **found,
    )  # fmt: skip


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
