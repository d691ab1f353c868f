"""Token mixers with their norm and the residual: full attention with an output gate, and Gated DeltaNet.

Shapes: T tokens, H hidden; for the rest see the ops.
"""

from __future__ import annotations

from typing import Any

import torch

from tritium.nn.batch import AttentionCache, Chain, GdnCache, Parameters
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
        self.o_proj = parameters[f"{prefix}.o_proj.weight"]
        self.first: dict[str, Any] = {"norm_K": norm_H, "eps": eps}
        self.attend: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.chain: Chain = [
            (self.first, self.qkv_proj, norm_H), (self.attend, None, None), (self.last, self.o_proj, None)
        ]  # fmt: skip
        self.inputs = {
            "q_norm_D": parameters[f"{prefix}.q_norm.weight"],
            "k_norm_D": parameters[f"{prefix}.k_norm.weight"],
            "eps": eps,
            "table_LF2": rope_table_LF2,
        }

    def __call__(self, x_TH: torch.Tensor, spans: Spans, cache: AttentionCache) -> torch.Tensor:
        x_TE, read = linear(x_MK=x_TH, w_JK=self.qkv_proj, **self.first), {**cache._asdict(), "spans": spans}
        q_TND, gate_TND = attention_inputs(x_TE=x_TE, **self.inputs, **read)
        o_TND = paged_attention(q_TND=q_TND, gate_TND=gate_TND, **read, **self.attend)
        return linear(x_MK=o_TND.flatten(1), w_JK=self.o_proj, residual_MN=x_TH, **self.last)


class GatedDeltaNet:
    """x_TH → x + delta_net(norm(x)). Parameters under `prefix`: in_proj (rows q, k, v; z; b; a), conv, A_log, dt_bias,
    norm, out_proj."""

    def __init__(
        self, parameters: Parameters, prefix: str, *, norm_H: torch.Tensor, key_heads: int, eps: float
    ) -> None:
        self.in_proj = parameters[f"{prefix}.in_proj.weight"]
        self.out_proj = parameters[f"{prefix}.out_proj.weight"]
        self.first: dict[str, Any] = {"norm_K": norm_H, "eps": eps}
        self.last: dict[str, Any] = {}
        self.between: dict[str, Any] = {
            "conv_CW": parameters[f"{prefix}.conv.weight"],
            "A_log_N": parameters[f"{prefix}.A_log"],
            "dt_bias_N": parameters[f"{prefix}.dt_bias"],
            "norm_V": parameters[f"{prefix}.norm.weight"],
            "eps": eps,
            "key_heads": key_heads,
        }
        self.chain: Chain = [
            (self.first, self.in_proj, norm_H), (self.between, None, None), (self.last, self.out_proj, None)
        ]  # fmt: skip

    def __call__(self, x_TH: torch.Tensor, spans: Spans, cache: GdnCache) -> torch.Tensor:
        x_TE = linear(x_MK=x_TH, w_JK=self.in_proj, **self.first)
        y_TM = delta_net(x_TE=x_TE, spans=spans, **self.between, **cache._asdict())
        return linear(x_MK=y_TM, w_JK=self.out_proj, residual_MN=x_TH, **self.last)
