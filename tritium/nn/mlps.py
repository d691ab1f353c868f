"""Channel mixers: the dense MLP, and routed experts beside a shared one.

Shapes: T tokens, H hidden, E experts.
"""

from __future__ import annotations

import torch

from tritium.nn.batch import Parameters
from tritium.ops.elementwise import sigmoid
from tritium.ops.linear import linear
from tritium.ops.mlp import silu_mul
from tritium.ops.moe import experts, router_top_k


class Mlp:
    """down(silu(gate(x)) · up(x)); gate and up in one matrix, gate first."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        self.gate_up, self.down = gate_up, down

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        return linear(x_MK=silu_mul(x_TJ=linear(x_MK=x_TH, w_NK=self.gate_up)), w_NK=self.down)


class SparseMoe:
    """Σ over the K routed experts + sigmoid(shared gate) · shared expert."""

    def __init__(self, parameters: Parameters, prefix: str, experts_per_token: int) -> None:
        self.router = parameters[f"{prefix}.router.weight"]
        self.gate_up_EJH = parameters[f"{prefix}.experts_gate_up.weight"]
        self.down_EHI = parameters[f"{prefix}.experts_down.weight"]
        self.shared_gate = parameters[f"{prefix}.shared_gate.weight"]
        self.shared = Mlp(
            parameters[f"{prefix}.shared_gate_up.weight"], parameters[f"{prefix}.shared_down.weight"]
        )
        self.k = experts_per_token

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        expert_TK, weight_TK = router_top_k(logits_TE=linear(x_MK=x_TH, w_NK=self.router), k=self.k)
        routed_TH = experts(
            x_TH=x_TH,
            expert_TK=expert_TK,
            weight_TK=weight_TK,
            gate_up_EJH=self.gate_up_EJH,
            down_EHI=self.down_EHI,
        )
        gate_T1 = sigmoid(linear(x_MK=x_TH, w_NK=self.shared_gate).float())
        return routed_TH + (gate_T1 * self.shared(x_TH)).to(x_TH.dtype)
