"""Causal depthwise convolution over the rows of a step, then SiLU.

    y[t, c] = silu(Σ_j w[c, j] x[t - (W - 1) + j, c]),   inputs before the span come from the row's stored state

A slot keeps the W - 1 raw inputs before its state's position, then the inputs of up to D draft tokens (see `Spans`): a
rejected draft is forgotten by reading from an earlier place. Sums run oldest tap first, in float32, so that a token's
result does not depend on where its chunk was cut.

Shapes: T tokens, C channels, W taps; x_TC raw inputs, w_CW float32, state [slots + 1, W - 1 + D, C].
"""

from __future__ import annotations

from typing import Any

import torch

from tritium.ops.elementwise import silu
from tritium.ops.spans import Spans
from tritium.ops.spec import Dims, Op, OpSpec, randn, wide


def _inputs(dims: Dims, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    weight = wide(dtype)
    lengths = (dims["T"] - 2, 1, 1) if dims["T"] > 2 else (dims["T"],)
    contexts = (0, 5, 9)[: len(lengths)] if dims["T"] > 2 else (70,)
    rows = len(lengths)
    return {
        "x_TC": randn(generator, dims["T"], dims["C"], dtype=dtype),
        "w_CW": randn(generator, dims["C"], dims["W"], dtype=weight, scale=0.5),
        "state": randn(generator, rows + 2, dims["W"] - 1, dims["C"], dtype=dtype),
        "spans": Spans(lengths, contexts, tuple(range(rows, 0, -1)), ((1,),) * rows, torch.device("cpu")),
    }


SPEC = OpSpec(
    name="causal_conv",
    cases=({"T": 1, "C": 24, "W": 4}, {"T": 5, "C": 40, "W": 4}, {"T": 70, "C": 72, "W": 3}),
    inputs=_inputs,
    results=lambda arguments, returned: {"y_TC": returned, "state": arguments["state"]},
    bytes_moved=lambda d, size: size * (2 * d["T"] * d["C"] + d["C"] * d["W"]),
    flops=lambda d: d["T"] * d["C"] * (2 * d["W"] + 4),
)


def reference(*, x_TC: torch.Tensor, w_CW: torch.Tensor, state: torch.Tensor, spans: Spans) -> torch.Tensor:
    """y_TC in x's dtype; updates `state` in place."""
    width, stored = w_CW.shape[1], state.shape[1]
    kept_RDC = state.index_select(0, spans.sources_R)
    if spans.fresh:
        kept_RDC[list(spans.fresh)] = 0
    inputs = torch.cat([kept_RDC.view(-1, x_TC.shape[1]).to(x_TC.dtype), x_TC])
    windows = spans.conv_windows(stored, width)
    compute = wide(x_TC.dtype)

    def tap(j: int) -> torch.Tensor:
        if spans.num_rows == 1 and stored == width - 1:  # one row's inputs stand in order: its taps are views
            inputs_TC = inputs[j : j + len(x_TC)]
        else:
            inputs_TC = inputs.index_select(0, windows.taps_WT[j])
        return inputs_TC.to(compute) * w_CW[:, j]

    y_TC = tap(0)
    for j in range(1, width):
        y_TC = y_TC + tap(j)
    kept = inputs.index_select(0, windows.kept_NW.view(-1)).view(-1, *state.shape[1:])
    state.index_copy_(0, windows.slots_N, kept.to(state.dtype))
    return silu(y_TC).to(x_TC.dtype)


causal_conv = Op(SPEC, reference)
