"""Activations whose result for an element never depends on where it stands in a tensor.

torch's sigmoid, silu and softplus round differently in the vectorised body and in the scalar tail of a tensor on a
CPU, so a token's value would depend on how many tokens share its step. These are made of exp and log1p, which do not.
"""

from __future__ import annotations

import torch

from tritium.ops.spec import wide


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-x)); any shape, float dtype kept."""
    return 1.0 / (1.0 + torch.exp(-x))


def silu(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(x)."""
    return x / (1.0 + torch.exp(-x))


def silu_mul(*, x_TJ: torch.Tensor) -> torch.Tensor:
    """The gate of an MLP, silu(gate) · up, from one fused projection: J = 2 I columns, gate first, to I."""
    compute = wide(x_TJ.dtype)
    gate, up = x_TJ.to(compute).chunk(2, dim=-1)
    return (silu(gate) * up).to(x_TJ.dtype)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)), without overflow: max(x, 0) + log1p(exp(-|x|))."""
    return x.clamp_min(0) + torch.log1p(torch.exp(-x.abs()))
