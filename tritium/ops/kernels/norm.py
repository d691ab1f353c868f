"""RMS norms, one row a program. See `tritium.ops.norm`.

Shapes: M rows, D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tritium.ops.kernels.launch import launch, parameters, power_of_2, release_next, wait_for_inputs


@triton.jit
def _rms_norm(x, w, y, eps, x_stride, D: tl.constexpr, BLOCK: tl.constexpr, pdl: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    weight = tl.load(w + d, mask=d < D, other=0.0)
    wait_for_inputs(pdl)
    value = tl.load(x + row * x_stride + d, mask=d < D, other=0.0).to(tl.float32)
    out = value * tl.rsqrt(tl.sum(value * value) / D + eps) * (1.0 + weight)
    release_next(pdl)
    tl.store(y + row * D + d, out.to(y.dtype.element_ty), mask=d < D)


def rms_norm(*, x_MD: torch.Tensor, w_D: torch.Tensor, eps: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Rows may be strided; the result is contiguous."""
    shape, size = x_MD.shape, x_MD.shape[-1]
    x_MD = x_MD.reshape(-1, size)
    y_MD = torch.empty(x_MD.shape, dtype=dtype or x_MD.dtype, device=x_MD.device)
    launch(_rms_norm, (len(x_MD),), x_MD, w_D, y_MD, eps, x_MD.stride(0), D=size, BLOCK=power_of_2(size),
           **parameters("norm", x_MD, D=size))  # fmt: skip
    return y_MD.view(shape)
