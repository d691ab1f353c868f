"""Random weights for benchmarks (`--load-format dummy`): a model of the right shape, drawn on the device in seconds."""

from __future__ import annotations

import torch

from tritium.models.config import ModelConfig
from tritium.models.parameters import parameter_shapes

_LOUD = 8.0


def draw_parameters(config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0,
                    text_ids: int = 0) -> dict[str, torch.Tensor]:
    """Every parameter of `config`, each in memory of its own; the same for the same seed and device.

    Matrices keep the variance of their input, so activations and logits are of the size that trained ones have; decay
    (A uniform in [0, 16], dt_bias 1) and the gated norm's weight are as Transformers initialises them. The first
    `text_ids` logits are wide enough to hold the most likely ids, so that what is generated is text to a small
    tokenizer.
    """
    generator = torch.Generator(device).manual_seed(seed)
    parameters = {}
    for name, spec in parameter_shapes(config).items():
        kind = dtype if spec.role == "matrix" else torch.float32
        weight = parameters[name] = torch.empty(spec.shape, dtype=kind, device=device)
        if name.endswith("A_log"):
            weight.uniform_(1e-3, 16.0, generator=generator).log_()
        elif name.endswith(("dt_bias", "gdn.norm.weight")):
            weight.fill_(1.0)
        else:
            scale = 0.1 if len(spec.shape) == 1 else spec.shape[-1] ** -0.5
            weight.normal_(0.0, scale, generator=generator)
    parameters["embed.weight" if config.tied_embeddings else "lm_head.weight"][:text_ids] *= _LOUD
    return parameters
