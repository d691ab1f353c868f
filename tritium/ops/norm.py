"""RMS norms.

    rms_norm:        y = x · rsqrt(mean(x²) + eps) · (1 + w)          (zero-centred weight)
    gated_reference: y = x · rsqrt(mean(x²) + eps) · w · silu(z)      (plain weight; GDN output, z the gate)

The mean runs over the last dim, in float32. Shapes: x_MD (any M leading rows), w_D float32, z_MD.
"""

from __future__ import annotations

from typing import Any

import torch

from tritium.ops.elementwise import silu
from tritium.ops.spec import Dims, Op, OpSpec, randn, wide


def _inputs(dims: Dims, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    return {
        "x_MD": randn(generator, dims["M"], dims["D"], dtype=dtype, scale=3.0),
        "w_D": randn(generator, dims["D"], dtype=wide(dtype), scale=0.3),
        "eps": 1e-6,
    }


SPEC = OpSpec(
    name="rms_norm",
    cases=({"M": 1, "D": 64}, {"M": 7, "D": 100}, {"M": 33, "D": 257}),
    inputs=_inputs,
    results=lambda arguments, returned: {"y_MD": returned},
    bytes_moved=lambda d, size: 2 * size * d["M"] * d["D"] + 4 * d["D"],
    flops=lambda d: 4 * d["M"] * d["D"],
)


def _normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.to(wide(x.dtype))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def reference(*, x_MD: torch.Tensor, w_D: torch.Tensor, eps: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    """y_MD in `dtype`, else in x's."""
    return (_normalised(x_MD, eps) * (1.0 + w_D)).to(dtype or x_MD.dtype)


def gated_reference(*, x_MD: torch.Tensor, z_MD: torch.Tensor, w_D: torch.Tensor, eps: float) -> torch.Tensor:
    """In z's dtype; x may be wider (the recurrence hands its output over in float32)."""
    gate = silu(z_MD.to(wide(z_MD.dtype)))
    return (_normalised(x_MD, eps) * w_D * gate).to(z_MD.dtype)


rms_norm = Op(SPEC, reference, "norm:rms_norm")
