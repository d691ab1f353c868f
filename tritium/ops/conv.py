"""Causal depthwise convolution over the rows of a step, then SiLU.

    y[t, c] = silu(Σ_j w[c, j] x[t - (W - 1) + j, c]),   inputs before the span come from the row's stored state

A slot keeps raw inputs in a ring: that of position p at p % G, G ≥ W + the most drafts of a row. A step reads the W - 1
before its span and writes its own, so a rejected draft is forgotten by being written over, and no place that a step
writes is one that it reads. Sums run oldest tap first, in float32, so that a token's result does not depend on where
its chunk was cut.

Shapes: T tokens, C channels, W taps; x_TC raw inputs, w_CW float32, state [slots + 1, G, C].
"""

from __future__ import annotations

import torch

from tritium.ops.elementwise import silu
from tritium.ops.spans import Spans
from tritium.ops.spec import wide


def reference(*, x_TC: torch.Tensor, w_CW: torch.Tensor, state: torch.Tensor, spans: Spans) -> torch.Tensor:
    """y_TC in x's dtype; updates `state` in place."""
    (channels, width), ring = w_CW.shape, state.shape[1]
    windows = spans.conv_windows(ring, width)
    flat = state.view(-1, channels)
    history_RWC = flat.index_select(0, windows.history_N).view(spans.num_rows, width - 1, channels)
    for r, context in enumerate(spans.contexts):
        if context < width - 1:
            history_RWC[r, : width - 1 - context] = 0
    inputs = torch.cat([history_RWC.view(-1, channels).to(x_TC.dtype), x_TC])
    compute = wide(x_TC.dtype)

    def tap(j: int) -> torch.Tensor:
        if spans.num_rows == 1:  # one row's inputs stand in order: its taps are views
            inputs_TC = inputs[j : j + len(x_TC)]
        else:
            inputs_TC = inputs.index_select(0, windows.taps_WT[j])
        return inputs_TC.to(compute) * w_CW[:, j]

    y_TC = tap(0)
    for j in range(1, width):
        y_TC = y_TC + tap(j)
    flat.index_copy_(0, windows.kept_to_N, inputs.index_select(0, windows.kept_from_N).to(state.dtype))
    return silu(y_TC).to(x_TC.dtype)
