"""Routed experts: pick K of E for each token, run them, add them up.

    router:   p = softmax(logits) over all E in float32;  top K;  weights renormalised to sum 1
    experts:  y[t] = Σ_j weight[t, j] · down_e(silu(gate_e(x)) · up_e(x)),   e = expert[t, j]

Ties go to the lower expert. The sum runs over j in falling order of weight, whatever else shares the step.

Shapes: T tokens, E experts, K experts a token, H hidden, I expert width; logits_TE, expert_TK int64, weight_TK float32,
x_TH, gate_up_EJH with J = 2 I, down_EHI, y_TH.
"""

from __future__ import annotations

from typing import Any

import torch

from tritium.ops.linear import linear
from tritium.ops.mlp import silu_mul
from tritium.ops.spec import Dims, Op, OpSpec, randn, wide


def _router_inputs(dims: Dims, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    return {"logits_TE": randn(generator, dims["T"], dims["E"], dtype=dtype, scale=2.0), "k": dims["K"]}


def _experts_inputs(dims: Dims, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    t, e, k, h, i = (dims[name] for name in ("T", "E", "K", "H", "I"))
    weight = torch.rand(t, k, generator=generator).to(wide(dtype))
    return {
        "x_TH": randn(generator, t, h, dtype=dtype),
        "expert_TK": torch.stack([torch.randperm(e, generator=generator)[:k] for _ in range(t)]),
        "weight_TK": weight / weight.sum(-1, keepdim=True),
        "gate_up_EJH": randn(generator, e, 2 * i, h, dtype=dtype, scale=h**-0.5),
        "down_EHI": randn(generator, e, h, i, dtype=dtype, scale=i**-0.5),
    }


ROUTER_SPEC = OpSpec(
    name="router_top_k",
    cases=({"T": 1, "E": 7, "K": 2}, {"T": 33, "E": 60, "K": 8}),
    inputs=_router_inputs,
    results=lambda arguments, returned: {"expert_TK": returned[0], "weight_TK": returned[1]},
    bytes_moved=lambda d, size: size * d["T"] * d["E"] + 12 * d["T"] * d["K"],
    flops=lambda d: 5 * d["T"] * d["E"],
    # Rounding the logits may change the choice itself, so only the wide dtype can be compared number by number.
    dtypes=(torch.float32,),
)

EXPERTS_SPEC = OpSpec(
    name="experts",
    cases=({"T": 1, "E": 3, "K": 2, "H": 40, "I": 24}, {"T": 21, "E": 8, "K": 3, "H": 64, "I": 33}),
    inputs=_experts_inputs,
    results=lambda arguments, returned: {"y_TH": returned},
    bytes_moved=lambda d, size: size * (min(d["E"], d["T"] * d["K"]) * 3 * d["I"] * d["H"] + 2 * d["T"] * d["H"]),
    flops=lambda d: 6 * d["T"] * d["K"] * d["I"] * d["H"],
    tuning_key=("E", "K", "H", "I"),
)


def router_reference(*, logits_TE: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(expert_TK, weight_TK), by falling weight."""
    p_TE = torch.softmax(logits_TE.to(wide(logits_TE.dtype)), dim=-1)
    weight_TE, expert_TE = torch.sort(p_TE, dim=-1, descending=True, stable=True)
    weight_TK = weight_TE[:, :k]
    return expert_TE[:, :k], weight_TK / weight_TK.sum(-1, keepdim=True)


def experts_reference(
    *,
    x_TH: torch.Tensor,
    expert_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    gate_up_EJH: torch.Tensor,
    down_EHI: torch.Tensor,
) -> torch.Tensor:
    """y_TH in x's dtype."""
    tokens, k = expert_TK.shape
    order = torch.argsort(expert_TK.reshape(-1), stable=True)
    counts = torch.bincount(expert_TK.reshape(-1), minlength=len(gate_up_EJH)).tolist()
    out = x_TH.new_empty(tokens * k, x_TH.shape[1])
    begin = 0
    for expert, count in enumerate(counts):
        if count:
            picks = order[begin : begin + count]
            inner = silu_mul(x_TJ=linear(x_MK=x_TH[picks // k], w_NK=gate_up_EJH[expert]))
            out[picks] = linear(x_MK=inner, w_NK=down_EHI[expert])
            begin += count
    out_TKH = out.view(tokens, k, -1).to(weight_TK.dtype)
    y_TH = out_TKH[:, 0] * weight_TK[:, :1]
    for j in range(1, k):
        y_TH = y_TH + out_TKH[:, j] * weight_TK[:, j : j + 1]
    return y_TH.to(x_TH.dtype)


router_top_k = Op(ROUTER_SPEC, router_reference)
experts = Op(EXPERTS_SPEC, experts_reference)
