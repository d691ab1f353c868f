"""Products with a weight: memory-bound forms for one row and for a few, a BLAS for many. See `tritium.ops.linear`.

One row: vector units; a program takes whole rows of the weight, so a step reads it once, in order, without a reduction
between programs. A few rows: tensor cores with the weight's rows as the M side and the tokens as N.
The norm of one row is free: (1 + n) goes onto x before the product, the rsqrt onto the sum after it. With a few rows
every program then reads x as float32, which pays while that is little beside its weights: a launch parameter.

Shapes: M tokens, N results of a token, K inputs; a gated weight has 2 N rows, gate first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from tritium.ops.handed import MOST, MOST_PARTS, Handed, Scaled
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
from tritium.ops.kernels.mlp import silu, silu_mul
from tritium.ops.kernels.norm import rms_norm
from tritium.ops.quantized import Quantized, Weight, Weights, row_blocks

FEW = MOST
"""The most tokens that are still bound by the weight's bytes."""


@triton.jit
def _weights(tile, n, k, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        value = tl.load(tile, eviction_policy="evict_first")
    else:
        value = tl.load(tile, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first")
    return value


@triton.jit
def _column(vector, k, K: tl.constexpr, EVEN: tl.constexpr):
    return (tl.load(vector + k) if EVEN else tl.load(vector + k, mask=k < K, other=0.0)).to(tl.float32)


@triton.jit
def _wide(vector, k, K: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, EIGHTS: tl.constexpr):
    """COLUMNS of a float32 vector. EIGHTS: eight neighbours a thread, as in a tile of 16-bit weights, by two loads of
    four; else threads load one four each, which then go through shared memory."""
    if EVEN and EIGHTS:
        four = vector + k + (tl.arange(0, COLUMNS // 8) * 8)[:, None] + tl.arange(0, 4)[None, :]
        value = tl.reshape(tl.permute(tl.join(tl.load(four), tl.load(four + 4)), [0, 2, 1]), [COLUMNS])
    else:
        value = _column(vector, k + tl.arange(0, COLUMNS), K, EVEN)
    return value


@triton.jit
def by_eights(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of eight neighbours, which one thread holds."""
    return tl.sum(tl.reshape(x, [ROWS, COLUMNS // 8, 8]), axis=2)


@triton.jit
def _prefetch(w, first, end, K: tl.constexpr, ROWS: tl.constexpr, FROM: tl.constexpr, COLUMNS: tl.constexpr,
              THREADS: tl.constexpr):  # fmt: skip
    """Into the L2 cache: COLUMNS columns from FROM on of rows [first, end), at most ROWS, one request a row. NVIDIA,
    sm_90 on."""
    SHARE: tl.constexpr = THREADS // ROWS
    BYTES: tl.constexpr = min(COLUMNS, K - FROM) * w.dtype.element_ty.primitive_bitwidth // 8
    if SHARE > 0 and BYTES > 0 and BYTES % 16 == 0 and K % 16 == 0:
        thread = tl.arange(0, THREADS)
        row = first + thread // SHARE
        size = tl.where((thread % SHARE == 0) & (row < end), BYTES, 0)
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;}",
            "=r,l,r", [w + row.to(tl.int64) * K + FROM, size], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _multiplied(tile, value, PAIRS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr):
    """Sums of eight neighbours of weights times a value a column."""
    if PAIRS:
        if dtype == tl.bfloat16:
            low = (tile << 16).to(tl.float32, bitcast=True)
            high = (tile & -65536).to(tl.float32, bitcast=True)
        else:
            low = tile.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
            high = (tile >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        weight = tl.reshape(tl.join(low, high), [ROWS, COLUMNS])
    else:
        weight = tile.to(tl.float32)
    return by_eights(weight * value[None, :], ROWS, COLUMNS)


@triton.jit
def _one(w, x, norm, residual, y, eps, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
         THREADS: tl.constexpr, PREFETCH: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr,
         RESIDUAL: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """ROWS results of the one token; the next tile is on its way while one is multiplied, the first before the wait.
    PREFETCH more tiles may go into the L2 cache before the wait: right where the kernel before leaves memory idle.
    16-bit weights of even sizes are loaded as PAIRS, which stay one register each until they are multiplied."""
    EVEN: tl.constexpr = (N % ROWS == 0) and (K % COLUMNS == 0)
    EIGHTS: tl.constexpr = COLUMNS >= 8 * THREADS
    HELD: tl.constexpr = 8 if EIGHTS else 4
    LAST: tl.constexpr = (K - 1) // COLUMNS * COLUMNS
    dtype: tl.constexpr = w.dtype.element_ty
    PAIRS: tl.constexpr = EVEN and dtype.primitive_bitwidth == 16
    STEP: tl.constexpr = COLUMNS // 2 if PAIRS else COLUMNS
    WIDTH: tl.constexpr = K // 2 if PAIRS else K
    first = tl.program_id(0) * ROWS
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    n = first + r
    tile = w.to(tl.pointer_type(tl.int32)) if PAIRS else w
    t = tl.arange(0, STEP)
    gate = (tile + first.to(tl.int64) * WIDTH + t)[None, :] + (r * WIDTH)[:, None]
    up = gate + N * WIDTH
    gate_tile = _weights(gate, n, t, N, K, EVEN)
    gate_sum = tl.zeros([ROWS, COLUMNS // 8], tl.float32)
    if GATED:
        up_tile = _weights(up, n, t, N, K, EVEN)
        up_sum = tl.zeros([ROWS, COLUMNS // 8], tl.float32)
    if NORM:
        squares = tl.zeros([COLUMNS // HELD], tl.float32)
    if PREFETCH > 0:
        _prefetch(w, first, N, K, ROWS, COLUMNS, PREFETCH * COLUMNS, THREADS)
        if GATED:
            _prefetch(w + N * K, first, N, K, ROWS, COLUMNS, PREFETCH * COLUMNS, THREADS)
    wait_for_inputs(pdl)
    if RESIDUAL:
        before = tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
    for i in tl.range(0, LAST // COLUMNS):
        k = i * COLUMNS
        if NORM:
            value = _wide(x, k, K, COLUMNS, True, EIGHTS)
            squares += tl.sum(tl.reshape(value * value, [COLUMNS // HELD, HELD]), axis=1)
            value = value * (1.0 + _wide(norm, k, K, COLUMNS, True, EIGHTS))
        else:
            value = _column(x, k + c, K, True)
        next_gate = _weights(gate + (i + 1) * STEP, n, (i + 1) * STEP + t, N, K, EVEN)
        if GATED:
            next_up = _weights(up + (i + 1) * STEP, n, (i + 1) * STEP + t, N, K, EVEN)
        gate_sum += _multiplied(gate_tile, value, PAIRS, ROWS, COLUMNS, dtype)
        gate_tile = next_gate
        if GATED:
            up_sum += _multiplied(up_tile, value, PAIRS, ROWS, COLUMNS, dtype)
            up_tile = next_up
    if NORM:
        value = _wide(x, LAST, K, COLUMNS, EVEN, EIGHTS)
        squares += tl.sum(tl.reshape(value * value, [COLUMNS // HELD, HELD]), axis=1)
        value = value * (1.0 + _wide(norm, LAST, K, COLUMNS, EVEN, EIGHTS))
    else:
        value = _column(x, LAST + c, K, EVEN)
    gate_sum += _multiplied(gate_tile, value, PAIRS, ROWS, COLUMNS, dtype)
    if GATED:
        up_sum += _multiplied(up_tile, value, PAIRS, ROWS, COLUMNS, dtype)
    release_next(pdl)
    out = tl.sum(gate_sum, axis=1)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares) / K + eps)
        out *= scale
    if GATED:
        out = silu(out) * (tl.sum(up_sum, axis=1) * scale)
    if RESIDUAL:
        out += before
    tl.store(y + n, out.to(y.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["M"])
def _few(w, x, norm, residual, y, parts, scaled, behind, left, eps, M, x_stride, y_stride, N: tl.constexpr,
         K: tl.constexpr, ROWS: tl.constexpr, VALID: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
         THREADS: tl.constexpr, PREFETCH: tl.constexpr, MOST: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr,
         RESIDUAL: tl.constexpr, PARTS: tl.constexpr, LEAVE: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """VALID results of every token, from a tile of ROWS rows of the weight (gated: one half gate, the other up).
    PREFETCH tiles may go into the L2 cache before the wait. PARTS: x is a `Scaled`'s, with so many `parts` of its
    squares; LEAVE: the result's go to `scaled` and `left`."""
    OUT: tl.constexpr = ROWS // 2 if GATED else ROWS
    FULL: tl.constexpr = (VALID == OUT) and (N % OUT == 0)
    EVEN: tl.constexpr = K % DEPTH == 0
    first = tl.program_id(0) * VALID
    r = tl.arange(0, ROWS)
    m = tl.arange(0, TOKENS)
    c = tl.arange(0, DEPTH)
    taken = (r % OUT < VALID) & (first + r % OUT < N)
    w_tile = w + (first + r % OUT + r // OUT * N).to(tl.int64)[:, None] * K + c[None, :]
    x_tile = x + m[:, None] * x_stride + c[None, :]
    here = (m < M)[:, None]
    i = tl.arange(0, OUT)
    n = first + i
    spot = m[None, :] * N + n[:, None]
    kept = ((i < VALID) & (n < N))[:, None] & (m < M)[None, :]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    if NORM:
        squares = tl.zeros([TOKENS, DEPTH // 8], tl.float32)
    if PREFETCH > 0:
        end = tl.minimum(first + VALID, N)
        _prefetch(w, first, end, K, OUT, 0, PREFETCH * DEPTH, THREADS)
        if GATED:
            _prefetch(w, first + N, end + N, K, OUT, 0, PREFETCH * DEPTH, THREADS)
    if LEAVE:
        weight_behind = 1.0 + tl.load(behind + n, mask=n < N, other=0.0)
    wait_for_inputs(pdl)
    if PARTS > 0:
        p = tl.arange(0, 1 << (PARTS - 1).bit_length())
        part = tl.load(parts + p[:, None] * MOST + m[None, :], mask=(p < PARTS)[:, None] & (m < M)[None, :], other=0.0)
    if RESIDUAL:
        before = tl.load(residual + spot, mask=kept, other=0.0).to(tl.float32)
    for k in tl.range(0, K, DEPTH):
        if FULL and EVEN:
            weight = tl.load(w_tile + k, eviction_policy="evict_first")
        elif EVEN:
            weight = tl.load(w_tile + k, mask=taken[:, None], other=0.0, eviction_policy="evict_first")
        else:
            inside = taken[:, None] & (k + c < K)[None, :]
            weight = tl.load(w_tile + k, mask=inside, other=0.0, eviction_policy="evict_first")
        if EVEN:
            value = tl.load(x_tile + k, mask=here, other=0.0)
        else:
            value = tl.load(x_tile + k, mask=here & (k + c < K)[None, :], other=0.0)
        if NORM:
            value = value.to(tl.float32)
            squares += by_eights(value * value, TOKENS, DEPTH)
            value = (value * (1.0 + _column(norm, k + c, K, EVEN))[None, :]).to(weight.dtype)
        total = tl.dot(weight, tl.trans(value), total, input_precision="ieee")
    release_next(pdl)
    if NORM:
        total = total * tl.rsqrt(tl.sum(squares, axis=1) / K + eps)[None, :]
    if PARTS > 0:
        total = total * tl.rsqrt(tl.sum(part, axis=0) / K + eps)[None, :]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(total, [2, OUT, TOKENS]), [1, 2, 0]))
        total = silu(gate) * up
    if RESIDUAL:
        total += before
    tl.store(y + m[None, :] * y_stride + n[:, None], total.to(y.dtype.element_ty), mask=kept)
    if LEAVE:
        value = (total * weight_behind[:, None]).to(scaled.dtype.element_ty)
        tl.store(scaled + m[None, :] * N + n[:, None], value, mask=kept)
        total = tl.where(kept, total, 0.0)
        tl.store(left + tl.program_id(0) * MOST + m, tl.sum(total * total, axis=0), mask=m < M)


@triton.jit
def _add(residual, product, size, BLOCK: tl.constexpr, pdl: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(pdl)
    total = tl.load(residual + i, mask=i < size).to(tl.float32) + tl.load(product + i, mask=i < size).to(tl.float32)
    release_next(pdl)
    tl.store(residual + i, total.to(residual.dtype.element_ty), mask=i < size)


def linear(
    *,
    x_MK: torch.Tensor,
    w_JK: Weights,
    norm_K: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual_MN: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    given: Handed | None = None,
    leave: Handed | None = None,
) -> torch.Tensor:
    """y_MN in `dtype`, else in the residual's, else in w's; up to FEW rows are rounded once, to it. All but x (strided
    rows) are contiguous. The result may take the residual's place. Row blocks write their columns, one after the other;
    a gate, whose halves lie in different blocks, and a residual come after."""
    if isinstance(leave, Scaled):
        leave.parts = 0
    w, *more = row_blocks(w_JK)
    dtype = dtype or (w if residual_MN is None else residual_MN).dtype
    if more:
        sizes = [block.shape[0] for block in (w, *more)]
        apart = gated or residual_MN is not None
        p_MJ = x_MK.new_empty(len(x_MK), sum(sizes), dtype=w.dtype if apart else dtype)
        if isinstance(w, Quantized) and len(more) == 1 and isinstance(more[0], torch.Tensor):
            linear_into(p_MJ, x_MK, w, norm_K, eps, plain_PK=more[0], given=given)
        else:
            for block, columns in zip((w, *more), p_MJ.split(sizes, dim=1)):
                linear_into(columns, x_MK, block, norm_K, eps)
        y_MN = silu_mul(x_TJ=p_MJ) if gated else p_MJ
        return (y_MN if residual_MN is None else residual_MN + y_MN).to(dtype)
    if len(x_MK) > FEW and isinstance(w, torch.Tensor):
        return _many(x_MK, w, norm_K, eps, gated, residual_MN).to(dtype)
    y_MN = torch.empty((len(x_MK), w.shape[0] // (1 + gated)), dtype=dtype, device=x_MK.device)
    linear_into(y_MN, x_MK, w, norm_K, eps, gated, residual_MN, given=given, leave=leave)
    return y_MN


def linear_into(
    y_MN: torch.Tensor, x_MK: torch.Tensor, w_JK: Weight, norm_K: torch.Tensor | None, eps: float, gated: bool = False,
    residual_MN: torch.Tensor | None = None, plain_PK: torch.Tensor | None = None, given: Handed | None = None,
    leave: Handed | None = None,
) -> None:  # fmt: skip
    """`linear` into y, whose rows may be strided. `plain_PK`: rows behind those of a quantized weight."""
    (M, K), N = x_MK.shape, y_MN.shape[1]
    if isinstance(w_JK, Quantized):
        from tritium.ops.kernels.quantized import quantized

        return quantized(x_MK, w_JK, norm_K, eps, gated, residual_MN, y_MN, plain_PK, given, leave)
    if M > FEW:
        y_MN.copy_(_many(x_MK, w_JK, norm_K, eps, gated, residual_MN))
        return None
    if M == 1:
        found = parameters("linear.gemv", w_JK, N=N, K=K, gated=int(gated))
        rows = found.pop("rows")
        kernel, grid = _one, cdiv(N, rows)
        sizes = {"ROWS": rows, "COLUMNS": found.pop("columns")}
        strides: tuple[int, ...] = ()
        hands: tuple[torch.Tensor, ...] = ()
    else:
        found = parameters("linear.skinny", w_JK, N=N, K=K, gated=int(gated), M=max(8, bucket(M)))
        parts = given.parts if isinstance(given, Scaled) else 0
        fused = found.pop("fused") and w_JK.dtype != torch.float16  # which x (1 + n) without the rsqrt need not fit
        if isinstance(given, Scaled) and parts:
            x_MK, norm_K, given.parts = given.x_MK[:M], None, 0
        elif not fused:
            x_MK, norm_K = _normalised(x_MK, w_JK, norm_K, eps), None
        rows, depth = found.pop("rows"), found.pop("depth")
        valid = _fitting(N, rows // (1 + gated), found.pop("per_core") * target_of(w_JK).cores)
        kernel, grid, strides = _few, cdiv(N, valid), (M, x_MK.stride(0), y_MN.stride(0))
        hands = (given.squares_PM if isinstance(given, Scaled) else x_MK,)
        leaves = isinstance(leave, Scaled) and not gated and grid <= MOST_PARTS
        if isinstance(leave, Scaled) and leaves:
            hands, leave.parts = (*hands, leave.x_MK, leave.norm_K, leave.squares_PM), grid
        else:
            hands = (*hands, x_MK, x_MK, x_MK)
        # float32 goes without tensor cores: a thread holds its operands, so fewer at a time.
        sizes = {
            "ROWS": rows, "VALID": valid, "TOKENS": max(found.pop("tokens"), power_of_2(M)),
            "DEPTH": max(16, depth // 4) if w_JK.dtype == torch.float32 else depth, "MOST": MOST, "PARTS": parts,
            "LEAVE": leaves,
        }  # fmt: skip
    prefetch = found.pop("prefetch", 0)
    # Only a kernel that starts before its inputs are there has anything to gain.
    sizes |= {"THREADS": 32 * found["num_warps"], "PREFETCH": prefetch if found["pdl"] else 0}
    launch(
        kernel, (grid,), w_JK, x_MK, w_JK if norm_K is None else norm_K, w_JK if residual_MN is None else residual_MN,
        y_MN, *hands, eps, *strides, N=N, K=K, GATED=gated, NORM=norm_K is not None, RESIDUAL=residual_MN is not None,
        **sizes, **found,
    )  # fmt: skip
    return None


def _normalised(x_MK: torch.Tensor, w_JK: torch.Tensor, norm_K: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x_MK if norm_K is None else rms_norm(x_MD=x_MK, w_D=norm_K, eps=eps, dtype=w_JK.dtype)


def _fitting(size: int, tile: int, programs: int) -> int:
    """Rows of a tile that are used, so that tiles of `size` rows fill whole waves of `programs`: a multiple of 4. All
    where `programs` is 0."""
    if not programs:
        return tile
    waves = cdiv(size, tile * programs)
    return min(tile, cdiv(cdiv(size, waves * programs), 4) * 4)


def _many(
    x_MK: torch.Tensor,
    w_JK: torch.Tensor,
    norm_K: torch.Tensor | None,
    eps: float,
    gated: bool,
    residual_MN: torch.Tensor | None,
) -> torch.Tensor:
    x_MK = _normalised(x_MK, w_JK, norm_K, eps)
    # Added as it leaves the matrix units, unrounded, without a pass over both. Long sums in float32 lose more than that
    # gains (8192 tokens on an H200: 0.78 ms for 0.73 + 0.10 where K is 6144; 2.14 for 1.87 + 0.10 where it is 17408).
    narrow = x_MK.is_cuda and torch.version.hip is None and w_JK.dtype != torch.float32 and x_MK.shape[1] <= 8192
    if residual_MN is not None and not gated and narrow:
        return torch.addmm(residual_MN, x_MK, w_JK.t(), out_dtype=residual_MN.dtype, out=residual_MN)
    y_MN = F.linear(x_MK, w_JK)
    if gated:
        y_MN = silu_mul(x_TJ=y_MN)
    if residual_MN is None:
        return y_MN
    found = parameters("linear.add", w_JK)
    block, size = found.pop("columns"), y_MN.numel()
    launch(_add, (cdiv(size, block),), residual_MN, y_MN, size, BLOCK=block, **found)
    return residual_MN
