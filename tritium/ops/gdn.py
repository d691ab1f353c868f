"""Gated DeltaNet: the recurrence over the tokens of every row (Yang et al., arXiv:2412.06464).

With q and k L2-normalised per head (eps 1e-6 inside the root), q scaled by dk^-1/2, value head h using key head
h // (nv / nk), and per token and value head, in float32:

    g = -exp(A_log) softplus(a + dt_bias)        β = sigmoid(b)
    S ← exp(g) S;   u = β (v - Sᵀ k);   S ← S + k uᵀ;   o = Sᵀ q

Drafts (see `Spans`): the state is stored as of the last token that cannot be rejected, and k, v, exp(g), β of the
drafts after it go to `pending`. The next step first does to the state what the accepted ones among them do (no output
is needed), so each state is read and written once a step whatever the number of drafts, and a rejection costs nothing.

The reference advances token by token: every token sees the same operations however its prompt was cut into chunks,
drafted or not, and whatever else shares the step, so results are equal to the bit.

Shapes: T tokens, U tokens including folded ones, R rows, D drafts; qkv_TC with C = 2 nk dk + nv dv (q, k, v, each
head-major), a_TN and b_TN with N = nv, state [slots + 1, nv, dk, dv] (v contiguous), pending [slots + 1, D, F] with
F = nv (dk + dv + 2): k, v, exp(g), β, each head-major (every value head has its own k there, so that heads run on their
own), o_TNV [T, nv, dv] in the state's dtype.
"""

from __future__ import annotations

from typing import Any

import torch

from tritium.ops.elementwise import sigmoid, softplus
from tritium.ops.spans import Spans
from tritium.ops.spec import Dims, Op, OpSpec, randn, wide

L2_EPS = 1e-6


def _inputs(dims: Dims, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    lengths = (1, 1, dims["T"] - 2) if dims["T"] > 2 else (dims["T"],)
    contexts = (7, 64, 0)[: len(lengths)]
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
        "pending": randn(generator, rows + 2, 3, heads * (key + value + 2), dtype=full),
        "spans": Spans(lengths, contexts, tuple(range(rows, 0, -1)), ((1,),) * rows, torch.get_default_device()),
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
    results=lambda arguments, returned: {"o_TNV": returned, **{n: arguments[n] for n in ("state", "pending")}},
    bytes_moved=lambda d, size: (
        size * d["T"] * (2 * d["nk"] * d["dk"] + 2 * d["nv"] * d["dv"] + 2 * d["nv"])
        + 8 * d.get("R", 1) * d["nv"] * d["dk"] * d["dv"]
    ),
    flops=lambda d: 7 * d["T"] * d["nv"] * d["dk"] * d["dv"],
    # Chunks round q, k and v after their norm once more; over a head of 16 dims that is seen (measured: 2.2).
    tolerance=3.0,
)


def reference(
    *,
    qkv_TC: torch.Tensor,
    a_TN: torch.Tensor,
    b_TN: torch.Tensor,
    A_log_N: torch.Tensor,
    dt_bias_N: torch.Tensor,
    state: torch.Tensor,
    pending: torch.Tensor,
    spans: Spans,
    key_heads: int,
) -> torch.Tensor:
    """o_TNV in float32; updates `state` and `pending` in place."""
    heads, key, value = state.shape[1:]
    compute = wide(qkv_TC.dtype)
    order, tokens, folded = spans.time_major, len(qkv_TC), len(spans.folded)
    q_TKD, k_TKD, v_TNV = (
        x.to(compute).view(tokens, -1, dim)
        for x, dim in zip(
            qkv_TC.split([key_heads * key, key_heads * key, heads * value], dim=-1), (key, key, value), strict=True
        )
    )
    decay_TN = torch.exp(-torch.exp(A_log_N) * softplus(a_TN.to(compute) + dt_bias_N))
    group = heads // key_heads
    k_TND, q_TND = _l2_normalised(k_TKD), _l2_normalised(q_TKD) * key**-0.5
    if group > 1:
        k_TND, q_TND = (x.repeat_interleave(group, dim=1) for x in (k_TND, q_TND))
    step_TF = torch.cat([k_TND.flatten(1), v_TNV.flatten(1), decay_TN, sigmoid(b_TN.to(compute))], dim=-1)
    step_UF, q_UND = step_TF, q_TND
    if folded:
        step_UF = torch.cat([pending[spans.folded_from].to(compute), step_TF])
        q_UND = torch.cat([q_TND.new_zeros(folded, heads, key), q_TND])
    if not order.as_is:
        step_UF, q_UND = step_UF.index_select(0, order.order), q_UND.index_select(0, order.order)
    k_U, v_U, decay_UN, beta_UN = step_UF.split([heads * key, heads * value, heads, heads], dim=-1)
    k_UNK1, q_UNK1 = (x.reshape(-1, heads, key, 1) for x in (k_U, q_UND))
    v_UNV = v_U.reshape(-1, heads, value)
    decay_UN11, beta_UN1 = decay_UN[:, :, None, None], beta_UN[:, :, None]

    state_RNKV = state.index_select(0, spans.sources_R[order.rows]).to(compute)
    for r, begin in enumerate(spans.begins):
        if begin == 0:  # the row starts from zero
            state_RNKV[order.rows == r] = 0
    scratch_RNKV = torch.empty_like(state_RNKV)  # new memory costs more than the arithmetic
    o_UNV = torch.empty(folded + tokens, heads, value, dtype=compute, device=qkv_TC.device)
    begin = 0
    for t, rows_now in enumerate(order.active):
        now = slice(begin, begin + rows_now)
        s, k_now, product = state_RNKV[:rows_now], k_UNK1[now], scratch_RNKV[:rows_now]
        s.mul_(decay_UN11[now])
        u = (v_UNV[now] - torch.mul(s, k_now, out=product).sum(-2)).mul_(beta_UN1[now])
        s.addcmul_(k_now, u.unsqueeze(-2))
        if t >= order.folds:  # until then, nobody reads it
            torch.sum(torch.mul(s, q_UNK1[now], out=product), dim=-2, out=o_UNV[now])
        begin += rows_now
        if t + 1 in order.saves:
            ranks, slots = order.saves[t + 1]
            done = state_RNKV if ranks is None else state_RNKV.index_select(0, ranks)
            state.index_copy_(0, slots, done.to(state.dtype))
    if any(spans.drafts):
        tokens_P, slots_P, places_P = spans.drafted
        pending[slots_P, places_P] = step_TF[tokens_P].to(pending.dtype)
    if order.as_is:
        return o_UNV[folded:]
    out_UNV = torch.empty_like(o_UNV)
    out_UNV.index_copy_(0, order.order, o_UNV)
    return out_UNV[folded:]


def _l2_normalised(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


gdn = Op(SPEC, reference, "gdn_chunk:gdn")
