"""Routed experts beside a shared one: pick K of E for each token, run them, add them up.

    router:   p = softmax(logits) over all E in float32;  top K;  weights renormalised to sum 1
    experts:  y[t] = Σ_j weight[t, j] · down_e(silu(gate_e(h)) · up_e(h)),   e = expert[t, j]
    moe:      x + experts(h) + sigmoid(logit[E]) · shared(h),   h = rms_norm(x),   logits = h routerᵀ

Ties go to the lower expert. The sum runs over j in falling order of weight, whatever else shares the step, then the
shared expert.

Shapes: T tokens, E experts, K experts a token, H hidden, I expert width; logits_TE, expert_TK int64, weight_TK float32,
x_TH, gate_up_EJH with J = 2 I, down_EHI, y_TH; router_FH with F = E + 1, the shared expert's gate last; the shared
expert's shared_gate_up_SH and shared_down_HS' of a width of its own. All of these weights but the router's may be
quantized, each in its own way, as in `linear`.
"""

from __future__ import annotations

from typing import Any

import torch

from tritium.ops.elementwise import sigmoid
from tritium.ops.handed import Handed, left
from tritium.ops.linear import drawn, handed, scheme_of, settled
from tritium.ops.linear import reference as linear
from tritium.ops.norm import reference as rms_norm
from tritium.ops.quantized import FORMS, Weights, dtype_of, expert_of, row_blocks, stored_bytes
from tritium.ops.spec import Dims, Op, OpSpec, randn, wide


def top_k(*, logits_TE: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(expert_TK, weight_TK), by falling weight."""
    p_TE = torch.softmax(logits_TE.to(wide(logits_TE.dtype)), dim=-1)
    weight_TE, expert_TE = torch.sort(p_TE, dim=-1, descending=True, stable=True)
    weight_TK = weight_TE[:, :k]
    return expert_TE[:, :k], weight_TK / weight_TK.sum(-1, keepdim=True)


def experts(
    *,
    x_TH: torch.Tensor,
    expert_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    gate_up_EJH: Weights,
    down_EHI: Weights,
) -> torch.Tensor:
    """y_TH in the weights' dtype."""
    tokens, k = expert_TK.shape
    dtype, num_experts = dtype_of(down_EHI), row_blocks(down_EHI)[0].shape[0]
    order = torch.argsort(expert_TK.reshape(-1), stable=True)
    counts = torch.bincount(expert_TK.reshape(-1), minlength=num_experts).tolist()
    out = x_TH.new_empty(tokens * k, x_TH.shape[1], dtype=dtype)
    begin = 0
    for expert, count in enumerate(counts):
        if count:
            picks = order[begin : begin + count]
            inner = linear(x_MK=x_TH[picks // k], w_JK=expert_of(gate_up_EJH, expert), gated=True)
            out[picks] = linear(x_MK=inner, w_JK=expert_of(down_EHI, expert))
            begin += count
    out_TKH = out.view(tokens, k, -1).to(weight_TK.dtype)
    y_TH = out_TKH[:, 0] * weight_TK[:, :1]
    for j in range(1, k):
        y_TH = y_TH + out_TKH[:, j] * weight_TK[:, j : j + 1]
    return y_TH.to(dtype)


def reference(
    *,
    x_TH: torch.Tensor,
    norm_H: torch.Tensor,
    eps: float,
    router_FH: torch.Tensor,
    gate_up_EJH: Weights,
    down_EHI: Weights,
    shared_gate_up_SH: Weights,
    shared_down_HS: Weights,
    k: int,
    given: Handed | None = None,
    leave: Handed | None = None,
) -> torch.Tensor:
    """y_TH in x's dtype (that of the residual stream). `given`, `leave`: as in `linear`."""
    h_TH = rms_norm(x_MD=x_TH, w_D=norm_H, eps=eps)
    logits_TF = linear(x_MK=h_TH, w_JK=router_FH)
    expert_TK, weight_TK = top_k(logits_TE=logits_TF[:, :-1], k=k)
    routed_TH = experts(x_TH=h_TH, expert_TK=expert_TK, weight_TK=weight_TK, gate_up_EJH=gate_up_EJH, down_EHI=down_EHI)
    shared_TH = linear(x_MK=linear(x_MK=h_TH, w_JK=shared_gate_up_SH, gated=True), w_JK=shared_down_HS)
    y_TH = x_TH + (routed_TH.to(x_TH.dtype) + sigmoid(logits_TF[:, -1:].to(x_TH.dtype)) * shared_TH.to(x_TH.dtype))
    if leave is not None:
        leave.leave(y_TH)
    return y_TH


def _router(h_TH: torch.Tensor, experts: int, generator: torch.Generator) -> torch.Tensor:
    """router_FH of which every token's logits are evenly spaced in some order: a choice that hangs on a rounding could
    not be compared. Needs T < H; random numbers otherwise."""
    (t, h), steps = h_TH.shape, torch.linspace(-3, 3, experts + 1)
    if t >= h:
        return torch.randn(experts + 1, h, generator=generator) * h**-0.5
    logits_TF = torch.stack([steps[torch.randperm(experts + 1, generator=generator)] for _ in range(t)]).double()
    return torch.linalg.solve(h_TH @ h_TH.t(), logits_TF).t() @ h_TH


def _inputs(dims: Dims, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    t, e, h, i, s = (dims[name] for name in ("T", "E", "H", "I", "S"))
    full = wide(dtype)
    norm_H = randn(generator, h, dtype=full, scale=0.3)
    x_TH = settled(randn(generator, t, h, dtype=full) * (1 + norm_H), scheme_of(dims)) / (1 + norm_H)
    h_TH = rms_norm(x_MD=x_TH.double(), w_D=norm_H.double(), eps=1e-6)
    arguments = {
        "x_TH": x_TH,
        "norm_H": norm_H,
        "eps": 1e-6,
        "router_FH": _router(h_TH, e, generator).to(dtype),
        "gate_up_EJH": drawn(generator, dims, e, 2 * i, h, dtype=dtype),
        "down_EHI": drawn(generator, dims, e, h, i, dtype=dtype),
        "shared_gate_up_SH": drawn(generator, dims, 2 * s, h, dtype=dtype),
        "shared_down_HS": drawn(generator, dims, h, s, dtype=dtype),
        "k": dims["K"],
    }
    if dims.get("handed"):
        arguments |= handed(x_TH, norm_H, randn(generator, h, dtype=full, scale=0.3), None)
    return arguments


def _expert_bytes(dims: Dims, width: int, size: int) -> int:
    scheme, shapes = scheme_of(dims), ((2 * width, dims["H"]), (dims["H"], width))
    return sum(stored_bytes(scheme, shape) if scheme else shape[0] * shape[1] * size for shape in shapes)


_QUANTIZED: tuple[Dims, ...] = (
    {"T": 1, "E": 7, "K": 2, "H": 136, "I": 128, "S": 128, "handed": 1},
    {"T": 5, "E": 9, "K": 3, "H": 264, "I": 128, "S": 128},
    {"T": 40, "E": 6, "K": 3, "H": 128, "I": 128, "S": 256},
)

_STEP = {None: 0.0, torch.int8: 2.0**-10, torch.float8_e4m3fn: 2.0**-8}
"""What a few steps of an activation's type make in a result."""

SPEC = OpSpec(
    name="moe",
    cases=(
        {"T": 1, "E": 7, "K": 2, "H": 64, "I": 32, "S": 32},
        {"T": 1, "E": 130, "K": 3, "H": 136, "I": 18, "S": 40},
        {"T": 5, "E": 9, "K": 3, "H": 72, "I": 24, "S": 40},
        {"T": 7, "E": 257, "K": 2, "H": 64, "I": 33, "S": 33},
        {"T": 40, "E": 6, "K": 3, "H": 128, "I": 64, "S": 64},
        {"T": 150, "E": 5, "K": 2, "H": 192, "I": 72, "S": 72},
        *({**dims, "scheme": number} for number in range(1, len(FORMS) + 1) for dims in _QUANTIZED),
    ),
    inputs=_inputs,
    results=lambda arguments, returned: {"y_TH": returned, **left(arguments, returned)},
    bytes_moved=lambda d, size: size * d["H"] * (d["E"] + 1 + 4 * d["T"])
    + min(d["E"], d["T"] * d["K"]) * _expert_bytes(d, d["I"], size) + _expert_bytes(d, d["S"], size),
    flops=lambda d: 2 * d["T"] * d["H"] * (3 * d["I"] * d["K"] + 3 * d["S"] + d["E"] + 1),
    # A choice between experts may hang on a rounding: the reference rounds the logits.
    attest=0.3,
    # Of activations that are rounded in the middle, which neither float32 nor float64 puts on the same side of a tie.
    floor=lambda d: _STEP[getattr(scheme_of(d), "activations", None)],
)

moe = Op(SPEC, reference, "moe:moe")
