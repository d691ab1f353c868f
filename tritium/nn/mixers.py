"""Token mixers with their norm and the residual: full attention with an output gate, and Gated DeltaNet.

Shapes: T tokens, H hidden; for the rest see the ops.
"""

from __future__ import annotations

import torch

from tritium.nn.batch import AttentionCache, GdnCache, Parameters
from tritium.ops.attention import paged_attention
from tritium.ops.attention_inputs import attention_inputs
from tritium.ops.delta_net import delta_net
from tritium.ops.linear import linear
from tritium.ops.spans import Spans


class Attention:
    """x_TH → x + attention(norm(x)). Parameters under `prefix`: qkv_proj, q_norm, k_norm, o_proj."""

    def __init__(
        self, parameters: Parameters, prefix: str, *, norm_H: torch.Tensor, rope_table_LF2: torch.Tensor, eps: float
    ) -> None:
        self.qkv_proj = parameters[f"{prefix}.qkv_proj.weight"]
        self.q_norm = parameters[f"{prefix}.q_norm.weight"]
        self.k_norm = parameters[f"{prefix}.k_norm.weight"]
        self.o_proj = parameters[f"{prefix}.o_proj.weight"]
        self.rope_table_LF2 = rope_table_LF2
        self.norm_H, self.eps = norm_H, eps

    def __call__(self, x_TH: torch.Tensor, spans: Spans, cache: AttentionCache) -> torch.Tensor:
        q_TND, gate_TND = attention_inputs(
            x_TE=linear(x_MK=x_TH, w_JK=self.qkv_proj, norm_K=self.norm_H, eps=self.eps),
            q_norm_D=self.q_norm,
            k_norm_D=self.k_norm,
            eps=self.eps,
            table_LF2=self.rope_table_LF2,
            k_pages=cache.k_pages,
            v_pages=cache.v_pages,
            spans=spans,
        )
        o_TND = paged_attention(
            q_TND=q_TND, gate_TND=gate_TND, k_pages=cache.k_pages, v_pages=cache.v_pages, spans=spans
        )
        return linear(x_MK=o_TND.flatten(1), w_JK=self.o_proj, residual_MN=x_TH)


class GatedDeltaNet:
    """x_TH → x + delta_net(norm(x)). Parameters under `prefix`: in_proj (rows q, k, v; z; b; a), conv, A_log, dt_bias,
    norm, out_proj."""

    def __init__(
        self, parameters: Parameters, prefix: str, *, norm_H: torch.Tensor, key_heads: int, eps: float
    ) -> None:
        self.in_proj = parameters[f"{prefix}.in_proj.weight"]
        self.conv = parameters[f"{prefix}.conv.weight"]
        self.A_log = parameters[f"{prefix}.A_log"]
        self.dt_bias = parameters[f"{prefix}.dt_bias"]
        self.norm = parameters[f"{prefix}.norm.weight"]
        self.out_proj = parameters[f"{prefix}.out_proj.weight"]
        self.key_heads = key_heads
        self.norm_H, self.eps = norm_H, eps

    def __call__(self, x_TH: torch.Tensor, spans: Spans, cache: GdnCache) -> torch.Tensor:
        y_TM = delta_net(
            x_TE=linear(x_MK=x_TH, w_JK=self.in_proj, norm_K=self.norm_H, eps=self.eps),
            conv_CW=self.conv,
            A_log_N=self.A_log,
            dt_bias_N=self.dt_bias,
            norm_V=self.norm,
            eps=self.eps,
            state=cache.state,
            conv=cache.conv,
            pending=cache.pending,
            spans=spans,
            key_heads=self.key_heads,
        )
        return linear(x_MK=y_TM, w_JK=self.out_proj, residual_MN=x_TH)
