"""Random weights for benchmarks (`--load-format dummy`): a model of the right shape, drawn on the device in seconds."""

from __future__ import annotations

import torch

from tritium.models.config import ModelConfig
from tritium.models.weights import allocate
from tritium.ops.quantized import Weights, quantize_into, row_blocks

_LOUD = 8.0


def draw_parameters(config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0,
                    text_ids: int = 0) -> dict[str, Weights]:
    """Every parameter of `config`, each in memory of its own; the same for the same seed and device.

    Matrices keep the variance of their input, so activations and logits are of the size that trained ones have; decay
    (A uniform in [0, 16], dt_bias 1) and the gated norm's weight are as Transformers initialises them. The first
    `text_ids` logits are wide enough to hold the most likely ids, so that what is generated is text to a small
    tokenizer. What is quantized is drawn in `dtype` first, one block of one parameter at a time.
    """
    generator = torch.Generator(device).manual_seed(seed)
    parameters = allocate(config, dtype=dtype, device=device)
    head = "embed.weight" if config.tied_embeddings else "lm_head.weight"
    for name, weight in parameters.items():
        for block in row_blocks(weight):
            drawn = block if isinstance(block, torch.Tensor) else torch.empty(block.shape, dtype=dtype, device=device)
            if name.endswith("A_log"):
                drawn.uniform_(1e-3, 16.0, generator=generator).log_()
            elif name.endswith(("dt_bias", "gdn.norm.weight")):
                drawn.fill_(1.0)
            else:
                scale = 0.1 if drawn.dim() == 1 else drawn.shape[-1] ** -0.5
                drawn.normal_(0.0, scale, generator=generator)
            if name == head:
                drawn[:text_ids] *= _LOUD
            if not isinstance(block, torch.Tensor):
                quantize_into(block, drawn)
    return parameters
