"""The MTP head stated in plain torch from the published description, independent of the engine.

    h_t      = fc([norm_e(embed(token_{t+1})), norm_h(hidden_t)])      hidden: the target's output after its final norm
    h        = h + attention(norm(h));  h = h + mlp(norm(h))           one full-attention layer, positions t + 1
    logits_t = lm_head(mtp.norm(h_t))                                  a guess of token t + 2

Norms multiply by (1 + w). Reads tensors by checkpoint names, naive causal attention over the whole sequence, one head
and one expert at a time, in the dtype of `hidden` (use float64).

Shapes: T tokens, H hidden, V vocabulary, N heads, D head dim, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


def mtp_logits(
    tensors: Mapping[str, Tensor], text_config: Mapping[str, Any], hidden_TH: Tensor, next_ids_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits [T, V] of the token after next at every position, and the head's normed output [T, H].

    `tensors`: a checkpoint by name; `text_config`: the text part of its config.json; `hidden_TH`: final-normed
    hidden states of the target at positions 0 .. T-1; `next_ids_T`: the token that follows each of them.
    """
    by_suffix = {name.removeprefix("model.").removeprefix("language_model."): t for name, t in tensors.items()}

    def weight(name: str) -> Tensor:
        return by_suffix[name].to(hidden_TH.dtype)

    eps = text_config.get("rms_norm_eps", 1e-6)
    embed_VH = weight("embed_tokens.weight")
    joined = torch.cat(
        (
            _norm(embed_VH[next_ids_T], weight("mtp.pre_fc_norm_embedding.weight"), eps),
            _norm(hidden_TH, weight("mtp.pre_fc_norm_hidden.weight"), eps),
        ),
        dim=1,
    )
    x_TH = joined @ weight("mtp.fc.weight").T

    def layer(name: str) -> Tensor:
        return weight(f"mtp.layers.0.{name}")

    x_TH = x_TH + _attention(layer, text_config, _norm(x_TH, layer("input_layernorm.weight"), eps), eps)
    normed_TH = _norm(x_TH, layer("post_attention_layernorm.weight"), eps)
    x_TH = x_TH + (_moe if "num_experts" in text_config else _mlp)(layer, text_config, normed_TH)
    out_TH = _norm(x_TH, weight("mtp.norm.weight"), eps)
    head_VH = weight("lm_head.weight") if "lm_head.weight" in by_suffix else embed_VH
    return out_TH @ head_VH.T, out_TH


def _norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * (1 + w)


def _attention(layer: Any, config: Mapping[str, Any], x_TH: Tensor, eps: float) -> Tensor:
    heads, kv_heads, D = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    T = len(x_TH)
    query_and_gate = (x_TH @ layer("self_attn.q_proj.weight").T).reshape(T, heads, 2, D)
    k_TND = (x_TH @ layer("self_attn.k_proj.weight").T).reshape(T, kv_heads, D)
    v_TND = (x_TH @ layer("self_attn.v_proj.weight").T).reshape(T, kv_heads, D)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    outputs = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        q_TD = _rotate(_norm(query_and_gate[:, head, 0], layer("self_attn.q_norm.weight"), eps), config)
        k_TD = _rotate(_norm(k_TND[:, shared], layer("self_attn.k_norm.weight"), eps), config)
        scores = (q_TD @ k_TD.T / D**0.5).masked_fill(future, float("-inf"))
        outputs.append(scores.softmax(dim=-1) @ v_TND[:, shared] * query_and_gate[:, head, 1].sigmoid())
    return torch.cat(outputs, dim=1) @ layer("self_attn.o_proj.weight").T


def _rotate(x_TD: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Default RoPE, half-split, on the leading dims; the token at row t stands at position t + 1."""
    rope = config["rope_parameters"]
    assert rope["rope_type"] == "default", "the statement covers default RoPE"
    half = int(x_TD.shape[1] * rope["partial_rotary_factor"]) // 2
    frequencies = rope["rope_theta"] ** (-torch.arange(half, dtype=x_TD.dtype) / half)
    angles = torch.arange(1, len(x_TD) + 1, dtype=x_TD.dtype)[:, None] * frequencies
    a, b, rest = x_TD[:, :half], x_TD[:, half : 2 * half], x_TD[:, 2 * half :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=1)


def _mlp(layer: Any, config: Mapping[str, Any], x_TH: Tensor, name: str = "mlp") -> Tensor:
    gate, up = x_TH @ layer(f"{name}.gate_proj.weight").T, x_TH @ layer(f"{name}.up_proj.weight").T
    return (silu(gate) * up) @ layer(f"{name}.down_proj.weight").T


def _moe(layer: Any, config: Mapping[str, Any], x_TH: Tensor) -> Tensor:
    probabilities_TE = (x_TH @ layer("mlp.gate.weight").T).softmax(dim=-1)
    out = (x_TH @ layer("mlp.shared_expert_gate.weight").T).sigmoid() * _mlp(layer, config, x_TH, "mlp.shared_expert")
    for t in range(len(x_TH)):
        chosen = probabilities_TE[t].topk(config["num_experts_per_tok"])
        for p, e in zip(chosen.values / chosen.values.sum(), chosen.indices.tolist()):
            out[t] = out[t] + p * _expert(layer, x_TH[t], e)
    return out


def _expert(layer: Any, x_H: Tensor, e: int) -> Tensor:
    try:
        gate, up = (layer("mlp.experts.gate_up_proj")[e] @ x_H).chunk(2)
        down = layer("mlp.experts.down_proj")[e]
    except KeyError:
        gate, up = (layer(f"mlp.experts.{e}.{n}_proj.weight") @ x_H for n in ("gate", "up"))
        down = layer(f"mlp.experts.{e}.down_proj.weight")
    return down @ (silu(gate) * up)
