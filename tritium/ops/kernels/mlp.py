"""The gate of an MLP, a block of one row a program. See `silu_mul` in `tritium.ops.elementwise`.

Shapes: T rows, I columns of the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tritium.ops.kernels.launch import cdiv, launch, parameters, release_next, wait_for_inputs


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _silu_mul(x, y, x_stride, I: tl.constexpr, BLOCK: tl.constexpr, pdl: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(pdl)
    gate = tl.load(x + row * x_stride + i, mask=i < I, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + I + i, mask=i < I, other=0.0).to(tl.float32)
    release_next(pdl)
    tl.store(y + row * I + i, (silu(gate) * up).to(y.dtype.element_ty), mask=i < I)


def silu_mul(*, x_TJ: torch.Tensor) -> torch.Tensor:
    """Rows may be strided; the result is contiguous."""
    T, I = x_TJ.shape[0], x_TJ.shape[1] // 2
    y_TI = torch.empty((T, I), dtype=x_TJ.dtype, device=x_TJ.device)
    found = parameters("silu_mul", x_TJ, I=I)
    block = found.pop("columns")
    launch(_silu_mul, (T, cdiv(I, block)), x_TJ, y_TI, x_TJ.stride(0), I=I, BLOCK=block, **found)
    return y_TI
