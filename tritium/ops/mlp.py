"""The gate of an MLP: y = silu(gate) · up, from one fused projection.

Shapes: x_TJ with J = 2 I (gate first, then up), y_TI.
"""

from __future__ import annotations

import torch

from tritium.ops.elementwise import silu
from tritium.ops.spec import Op, OpSpec, randn, wide

SPEC = OpSpec(
    name="silu_mul",
    cases=({"T": 1, "I": 33}, {"T": 7, "I": 100}, {"T": 65, "I": 257}),
    inputs=lambda d, dtype, generator: {"x_TJ": randn(generator, d["T"], 2 * d["I"], dtype=dtype, scale=2.0)},
    results=lambda arguments, returned: {"y_TI": returned},
    bytes_moved=lambda d, size: 3 * size * d["T"] * d["I"],
    flops=lambda d: 5 * d["T"] * d["I"],
)


def reference(*, x_TJ: torch.Tensor) -> torch.Tensor:
    gate, up = x_TJ.chunk(2, dim=-1)
    compute = wide(x_TJ.dtype)
    return (silu(gate.to(compute)) * up.to(compute)).to(x_TJ.dtype)


silu_mul = Op(SPEC, reference, "mlp:silu_mul")
