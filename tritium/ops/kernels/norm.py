"""RMS norms, one row a program. See `tritium.ops.norm`.

Shapes: M rows, D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tritium.ops.kernels.launch import launch, parameters, power_of_2, release_next, wait_for_inputs


@triton.jit
def _rms_norm(x, w, z, y, eps, x_stride, z_stride, D: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr,
              pdl: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    weight = tl.load(w + d, mask=d < D, other=0.0)
    wait_for_inputs(pdl)
    value = tl.load(x + row * x_stride + d, mask=d < D, other=0.0).to(tl.float32)
    unit = value * tl.rsqrt(tl.sum(value * value) / D + eps)
    if GATED:
        gate = tl.load(z + row * z_stride + d, mask=d < D, other=0.0).to(tl.float32)
        out = unit * weight * gate / (1.0 + tl.exp(-gate))
    else:
        out = unit * (1.0 + weight)
    release_next(pdl)
    tl.store(y + row * D + d, out.to(y.dtype.element_ty), mask=d < D)


def rms_norm(*, x_MD: torch.Tensor, w_D: torch.Tensor, eps: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Rows may be strided; the result is contiguous."""
    return _launch(x_MD, w_D, None, eps, dtype or x_MD.dtype)


def gated_rms_norm(*, x_MD: torch.Tensor, z_MD: torch.Tensor, w_D: torch.Tensor, eps: float) -> torch.Tensor:
    return _launch(x_MD, w_D, z_MD, eps, z_MD.dtype)


def _launch(x: torch.Tensor, w_D: torch.Tensor, z: torch.Tensor | None, eps: float, dtype: torch.dtype) -> torch.Tensor:
    size = x.shape[-1]
    x_MD = x.reshape(-1, size)
    z_MD = x_MD if z is None else z.reshape(-1, size)
    y_MD = torch.empty(x_MD.shape, dtype=dtype, device=x.device)
    launch(
        _rms_norm, (len(x_MD),), x_MD, w_D, z_MD, y_MD, eps, x_MD.stride(0), z_MD.stride(0),
        D=size, BLOCK=power_of_2(size), GATED=z is not None, **parameters("norm", x, D=size),
    )  # fmt: skip
    return y_MD.view(x.shape)
