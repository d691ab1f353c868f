"""Matrix product with a weight: y = x wᵀ, row by row independent of the other rows.

    y[m, n] = Σ_k x[m, k] w[n, k]

BLAS libraries choose another order of summation for few rows than for many, so a token's result would depend on how
many tokens share its step. Measured with MKL (torch 2.13, one and two threads): products of a multiple of 8 rows give
every row the same bits whatever their number; 1, 2, 3, 5 and 7 rows do not. So the rows are padded to a multiple of 8.

Shapes: x_MK, w_NK, y_MN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from tritium.ops.spec import Dims, Op, OpSpec, randn

ROWS = 8


def _inputs(dims: Dims, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    m, n, k = dims["M"], dims["N"], dims["K"]
    return {
        "x_MK": randn(generator, m, k, dtype=dtype),
        "w_NK": randn(generator, n, k, dtype=dtype, scale=k**-0.5),
    }


SPEC = OpSpec(
    name="linear",
    cases=({"M": 1, "N": 77, "K": 100}, {"M": 7, "N": 130, "K": 64}, {"M": 65, "N": 256, "K": 512}),
    inputs=_inputs,
    results=lambda arguments, returned: {"y_MN": returned},
    bytes_moved=lambda d, size: size * (d["M"] * d["K"] + d["N"] * d["K"] + d["M"] * d["N"]),
    flops=lambda d: 2 * d["M"] * d["N"] * d["K"],
    tuning_key=("N", "K"),
)


def reference(*, x_MK: torch.Tensor, w_NK: torch.Tensor) -> torch.Tensor:
    """y_MN in x's dtype."""
    rows = x_MK.shape[0]
    if rows % ROWS == 0 or x_MK.device.type != "cpu":
        return F.linear(x_MK, w_NK)
    return F.linear(F.pad(x_MK, (0, 0, 0, -rows % ROWS)), w_NK)[:rows]


linear = Op(SPEC, reference)
