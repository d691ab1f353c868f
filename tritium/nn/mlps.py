"""Channel mixers with their norm and the residual: the dense MLP, and routed experts beside a shared one.

Shapes: T tokens, H hidden, E experts.
"""

from __future__ import annotations

from typing import Any

import torch

from tritium.nn.batch import Chain, Parameters
from tritium.ops.linear import linear
from tritium.ops.moe import moe


class Mlp:
    """x + down(silu(gate(h)) · up(h)), h = norm(x); gate and up in one matrix, gate first."""

    def __init__(self, parameters: Parameters, prefix: str, *, norm_H: torch.Tensor, eps: float) -> None:
        self.gate_up = parameters[f"{prefix}.gate_up.weight"]
        self.down = parameters[f"{prefix}.down.weight"]
        self.first: dict[str, Any] = {"norm_K": norm_H, "eps": eps, "gated": True}
        self.last: dict[str, Any] = {}
        self.chain: Chain = [(self.first, self.gate_up, norm_H), (self.last, self.down, None)]

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        inner = linear(x_MK=x_TH, w_JK=self.gate_up, **self.first)
        return linear(x_MK=inner, w_JK=self.down, residual_MN=x_TH, **self.last)


class SparseMoe:
    """x + Σ over the K routed experts + sigmoid(shared gate) · shared expert, all of norm(x)."""

    def __init__(self, parameters: Parameters, prefix: str, *, norm_H: torch.Tensor, eps: float, k: int) -> None:
        self.all: dict[str, Any] = {
            "norm_H": norm_H,
            "eps": eps,
            "router_FH": parameters[f"{prefix}.router.weight"],
            "gate_up_EJH": parameters[f"{prefix}.experts_gate_up.weight"],
            "down_EHI": parameters[f"{prefix}.experts_down.weight"],
            "shared_gate_up_SH": parameters[f"{prefix}.shared_gate_up.weight"],
            "shared_down_HS": parameters[f"{prefix}.shared_down.weight"],
            "k": k,
        }
        self.chain: Chain = [(self.all, self.all["gate_up_EJH"], norm_H)]

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        return moe(x_TH=x_TH, **self.all)
