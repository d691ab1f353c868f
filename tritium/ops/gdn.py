"""Gated DeltaNet: the recurrence over the tokens of every row (Yang et al., arXiv:2412.06464).

With q and k L2-normalised per head (eps 1e-6 inside the root), q scaled by dk^-1/2, value head h using key head
h // (nv / nk), and per token and value head, in float32:

    g = -exp(A_log) softplus(a + dt_bias)        β = sigmoid(b)
    S ← exp(g) S;   u = β (v - Sᵀ k);   S ← S + k uᵀ;   o = Sᵀ q

The reference advances token by token: every token sees the same operations however its prompt was cut into chunks and
whatever else shares the step, so results are equal to the bit.

Shapes: T tokens, R rows; qkv_TC with C = 2 nk dk + nv dv (q, k, v, each head-major), a_TN and b_TN with N = nv,
state [slots + 1, nv, dk, dv] (v contiguous), o_TNV [T, nv, dv] in the state's dtype.
"""

from __future__ import annotations

from typing import Any

import torch

from tritium.ops.elementwise import sigmoid, softplus
from tritium.ops.spans import Spans
from tritium.ops.spec import Dims, Op, OpSpec, randn, wide

L2_EPS = 1e-6


def _inputs(dims: Dims, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    lengths = (1, dims["T"] - 2, 1) if dims["T"] > 2 else (dims["T"],)
    contexts = (7, 0, 64)[: len(lengths)]
    rows = len(lengths)
    heads, key, value = dims["nv"], dims["dk"], dims["dv"]
    channels = 2 * dims["nk"] * key + heads * value
    full = wide(dtype)
    return {
        "qkv_TC": randn(generator, dims["T"], channels, dtype=dtype),
        "a_TN": randn(generator, dims["T"], heads, dtype=dtype),
        "b_TN": randn(generator, dims["T"], heads, dtype=dtype),
        "A_log_N": randn(generator, heads, dtype=full, scale=0.5),
        "dt_bias_N": randn(generator, heads, dtype=full, scale=0.5),
        "state": randn(generator, rows + 2, heads, key, value, dtype=full, scale=0.3),
        "spans": Spans(lengths, contexts, tuple(range(rows, 0, -1)), ((1,),) * rows, torch.device("cpu")),
        "key_heads": dims["nk"],
    }


SPEC = OpSpec(
    name="gdn",
    cases=(
        {"T": 1, "nk": 1, "nv": 1, "dk": 16, "dv": 16},
        {"T": 9, "nk": 2, "nv": 6, "dk": 32, "dv": 16},
        {"T": 70, "nk": 2, "nv": 4, "dk": 64, "dv": 64},
    ),
    inputs=_inputs,
    results=lambda arguments, returned: {"o_TNV": returned, "state": arguments["state"]},
    bytes_moved=lambda d, size: (
        size * d["T"] * (2 * d["nk"] * d["dk"] + 2 * d["nv"] * d["dv"] + 2 * d["nv"])
        + 8 * d.get("R", 1) * d["nv"] * d["dk"] * d["dv"]
    ),
    flops=lambda d: 7 * d["T"] * d["nv"] * d["dk"] * d["dv"],
    tuning_key=("nv", "dk", "dv"),
)


def reference(
    *,
    qkv_TC: torch.Tensor,
    a_TN: torch.Tensor,
    b_TN: torch.Tensor,
    A_log_N: torch.Tensor,
    dt_bias_N: torch.Tensor,
    state: torch.Tensor,
    spans: Spans,
    key_heads: int,
) -> torch.Tensor:
    """o_TNV in float32; updates `state` in place. A row with context 0 starts from zero."""
    heads, key, value = state.shape[1:]
    compute = wide(qkv_TC.dtype)
    order_T, rows_R, active = spans.time_major
    tokens = len(order_T)
    single = spans.num_rows == 1
    q, k, v = qkv_TC.split([key_heads * key, key_heads * key, heads * value], dim=-1)

    def time_major(x: torch.Tensor) -> torch.Tensor:
        return (x if single else x[order_T]).to(compute)

    q_TNK1 = (_l2_normalised(time_major(q).view(tokens, key_heads, key)) * key**-0.5).unsqueeze(-1)
    k_TNK1 = _l2_normalised(time_major(k).view(tokens, key_heads, key)).unsqueeze(-1)
    if heads != key_heads:
        q_TNK1 = q_TNK1.repeat_interleave(heads // key_heads, dim=1)
        k_TNK1 = k_TNK1.repeat_interleave(heads // key_heads, dim=1)
    v_TNV = time_major(v).reshape(tokens, heads, value)
    decay_TN11 = torch.exp(-torch.exp(A_log_N) * softplus(time_major(a_TN) + dt_bias_N))[:, :, None, None]
    beta_TN1 = sigmoid(time_major(b_TN)).unsqueeze(-1)

    slots_R = spans.slots_R[rows_R]
    state_RNKV = state.index_select(0, slots_R).to(compute)
    if spans.any_fresh:
        state_RNKV[spans.fresh_R[rows_R]] = 0
    o_TNV = torch.empty(tokens, heads, value, dtype=compute, device=qkv_TC.device)
    begin = 0
    for rows in active:
        now = slice(begin, begin + rows)
        s, k_now = state_RNKV[:rows], k_TNK1[now]
        s.mul_(decay_TN11[now])
        u = (v_TNV[now] - (s * k_now).sum(-2)).mul_(beta_TN1[now])
        s.addcmul_(k_now, u.unsqueeze(-2))
        torch.sum(s * q_TNK1[now], dim=-2, out=o_TNV[now])
        begin += rows
    state.index_copy_(0, slots_R, state_RNKV.to(state.dtype))
    if single:
        return o_TNV
    out_TNV = torch.empty_like(o_TNV)
    out_TNV[order_T] = o_TNV
    return out_TNV


def _l2_normalised(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


gdn = Op(SPEC, reference)
