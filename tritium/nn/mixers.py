"""Token mixers: full attention with an output gate, and Gated DeltaNet.

Shapes: T tokens, H hidden; for the rest see the ops.
"""

from __future__ import annotations

import torch

from tritium.nn.batch import AttentionCache, GdnCache, Parameters
from tritium.ops.attention import paged_attention
from tritium.ops.attention_inputs import attention_inputs
from tritium.ops.conv import causal_conv
from tritium.ops.gdn import gdn
from tritium.ops.linear import linear
from tritium.ops.norm import gated_rms_norm
from tritium.ops.spans import Spans


class Attention:
    """x_TH → o_TH. Parameters under `prefix`: qkv_proj, q_norm, k_norm, o_proj."""

    def __init__(self, parameters: Parameters, prefix: str, *, rope_table_LF2: torch.Tensor, eps: float) -> None:
        self.qkv_proj = parameters[f"{prefix}.qkv_proj.weight"]
        self.q_norm = parameters[f"{prefix}.q_norm.weight"]
        self.k_norm = parameters[f"{prefix}.k_norm.weight"]
        self.o_proj = parameters[f"{prefix}.o_proj.weight"]
        self.rope_table_LF2 = rope_table_LF2
        self.eps = eps

    def __call__(self, x_TH: torch.Tensor, spans: Spans, cache: AttentionCache) -> torch.Tensor:
        q_TND, gate_TND = attention_inputs(
            x_TE=linear(x_MK=x_TH, w_NK=self.qkv_proj),
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
        return linear(x_MK=o_TND.flatten(1), w_NK=self.o_proj)


class GatedDeltaNet:
    """x_TH → o_TH. Parameters under `prefix`: in_proj (rows q, k, v; z; b; a), conv, A_log, dt_bias, norm, out_proj."""

    def __init__(self, parameters: Parameters, prefix: str, *, key_heads: int, eps: float) -> None:
        self.in_proj = parameters[f"{prefix}.in_proj.weight"]
        self.conv = parameters[f"{prefix}.conv.weight"]
        self.A_log = parameters[f"{prefix}.A_log"]
        self.dt_bias = parameters[f"{prefix}.dt_bias"]
        self.norm = parameters[f"{prefix}.norm.weight"]
        self.out_proj = parameters[f"{prefix}.out_proj.weight"]
        self.channels, self.heads, self.dim = len(self.conv), len(self.A_log), len(self.norm)
        self.key_heads = key_heads
        self.eps = eps

    def __call__(self, x_TH: torch.Tensor, spans: Spans, cache: GdnCache) -> torch.Tensor:
        qkv_TC, z, b_TN, a_TN = linear(x_MK=x_TH, w_NK=self.in_proj).split(
            [self.channels, self.heads * self.dim, self.heads, self.heads], dim=-1
        )
        o_TNV = gdn(
            qkv_TC=causal_conv(x_TC=qkv_TC, w_CW=self.conv, state=cache.conv, spans=spans),
            a_TN=a_TN,
            b_TN=b_TN,
            A_log_N=self.A_log,
            dt_bias_N=self.dt_bias,
            state=cache.state,
            pending=cache.pending,
            spans=spans,
            key_heads=self.key_heads,
        )
        gated = gated_rms_norm(x_MD=o_TNV, z_MD=z.view(-1, self.heads, self.dim), w_D=self.norm, eps=self.eps)
        return linear(x_MK=gated.flatten(1), w_NK=self.out_proj)
