"""Rows of the embedding, as the residual stream begins.

    x[t] = embed[id[t]]      in float32 (float64 in float64 networks)

Shapes: T tokens, V vocabulary, H hidden. ids_T int64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from tritium.ops.spec import Dims, Op, OpSpec, randn, wide


def _inputs(dims: Dims, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    ids_T = torch.randint(dims["V"], (dims["T"],), generator=generator)
    return {"ids_T": ids_T, "embed_VH": randn(generator, dims["V"], dims["H"], dtype=dtype)}


SPEC = OpSpec(
    name="embed",
    cases=({"T": 1, "V": 9, "H": 64}, {"T": 5, "V": 33, "H": 1100}),
    inputs=_inputs,
    results=lambda arguments, returned: {"x_TH": returned},
    bytes_moved=lambda d, size: d["T"] * d["H"] * (size + 4),
    flops=lambda d: 0,
)


def reference(*, ids_T: torch.Tensor, embed_VH: torch.Tensor) -> torch.Tensor:
    return functional.embedding(ids_T, embed_VH).to(wide(embed_VH.dtype))


embed = Op(SPEC, reference, "embedding:embed")
