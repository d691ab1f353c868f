"""From the fused projection to attention's inputs: q / k norm, partial rotary embedding, page write.

    q = rope(rms_norm(q, 1 + w_q)),  k = rope(rms_norm(k, 1 + w_k)),  pages[page, :, offset] = k, v

The rotary embedding turns the first 2 F dims of a head, half-split: with x = [x1, x2, rest], (x1 cos - x2 sin,
x2 cos + x1 sin, rest). For text the three position axes of mRoPE are equal, so its sections make no difference.

Shapes: T tokens, N = nq query heads, G = nkv key / value heads, D head dim, F rotary frequencies;
x_TE with E = 2 N D + 2 G D (per query head D query rows then D gate rows; then keys; then values);
table_LF2 [positions, F, 2] (cos, sin) float32; k_pages and v_pages [pages + 1, G, 64, D].
"""

from __future__ import annotations

from typing import Any

import torch

from tritium.ops.norm import reference as rms_norm
from tritium.ops.spans import Spans
from tritium.ops.spec import Dims, Op, OpSpec, randn, wide


def _inputs(dims: Dims, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    t, n, g, d, f = (dims[name] for name in ("T", "N", "G", "D", "F"))
    full = wide(dtype)
    angles_LF = torch.arange(200, dtype=full)[:, None] * torch.logspace(0, -3, f, dtype=full)
    lengths = (1, t - 1) if t > 1 else (1,)
    contexts = (130, 0)[: len(lengths)] if t > 1 else (63,)
    return {
        "x_TE": randn(generator, t, 2 * n * d + 2 * g * d, dtype=dtype),
        "q_norm_D": randn(generator, d, dtype=full, scale=0.3),
        "k_norm_D": randn(generator, d, dtype=full, scale=0.3),
        "eps": 1e-6,
        "table_LF2": torch.stack([angles_LF.cos(), angles_LF.sin()], dim=-1),
        "k_pages": torch.zeros(8, g, 64, d, dtype=dtype),
        "v_pages": torch.zeros(8, g, 64, d, dtype=dtype),
        "spans": Spans(
            lengths, contexts, (1, 2)[: len(lengths)], ((3, 1, 2), (5, 6, 4))[: len(lengths)],
            torch.get_default_device(),
        ),
    }  # fmt: skip


SPEC = OpSpec(
    name="attention_inputs",
    cases=({"T": 1, "N": 2, "G": 1, "D": 64, "F": 16}, {"T": 9, "N": 6, "G": 2, "D": 40, "F": 5}),
    inputs=_inputs,
    results=lambda arguments, returned: {
        "q_TND": returned[0],
        "gate_TND": returned[1],
        "k_pages": arguments["k_pages"],
        "v_pages": arguments["v_pages"],
    },
    bytes_moved=lambda d, size: size * d["T"] * 2 * (2 * d["N"] * d["D"] + 2 * d["G"] * d["D"]),
    flops=lambda d: 10 * d["T"] * (d["N"] + d["G"]) * d["D"],
)


def reference(
    *,
    x_TE: torch.Tensor,
    q_norm_D: torch.Tensor,
    k_norm_D: torch.Tensor,
    eps: float,
    table_LF2: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    spans: Spans,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q_TND, gate_TND) in x's dtype; writes this step's keys and values into the pages."""
    tokens, (groups, dim) = x_TE.shape[0], (k_pages.shape[1], k_pages.shape[3])
    heads = (x_TE.shape[1] // dim - 2 * groups) // 2
    qg, k, v = x_TE.split([2 * heads * dim, groups * dim, groups * dim], dim=-1)
    q_TND, gate_TND = qg.view(tokens, heads, 2 * dim).split(dim, dim=-1)
    turns_TF2 = table_LF2[spans.positions_T]
    q_TND = _normed_and_turned(q_TND, q_norm_D, eps, turns_TF2)
    k_TGD = _normed_and_turned(k.view(tokens, groups, dim), k_norm_D, eps, turns_TF2)
    k_pages[spans.write_page_T, :, spans.write_offset_T] = k_TGD.to(k_pages.dtype)
    v_pages[spans.write_page_T, :, spans.write_offset_T] = v.view(tokens, groups, dim).to(v_pages.dtype)
    return q_TND, gate_TND


def _normed_and_turned(x_TND: torch.Tensor, w_D: torch.Tensor, eps: float, turns_TF2: torch.Tensor) -> torch.Tensor:
    x = rms_norm(x_MD=x_TND, w_D=w_D, eps=eps, dtype=wide(x_TND.dtype))
    half = turns_TF2.shape[1]
    cos, sin = turns_TF2[:, None, :, 0], turns_TF2[:, None, :, 1]
    x1, x2, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1).to(x_TND.dtype)


attention_inputs = Op(SPEC, reference, "attention_inputs:attention_inputs")
