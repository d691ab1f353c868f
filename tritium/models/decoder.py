"""The network: one decoder for dense and mixture-of-experts checkpoints, and the MTP head beside it.

Shapes: T tokens, S sampled tokens, H hidden, V vocabulary, L positions, F rotary frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from tritium.models.config import FULL, ModelConfig
from tritium.models.rope import inverse_frequencies
from tritium.nn.batch import AttentionCache, Chain, ForwardBatch, GdnCache, LayerCache, Parameters
from tritium.nn.mixers import Attention, GatedDeltaNet
from tritium.nn.mlps import Mlp, SparseMoe
from tritium.ops.feed import embed
from tritium.ops.handed import MOST, MOST_PARTS, Handed, Peak, Scaled
from tritium.ops.linear import linear
from tritium.ops.norm import rms_norm
from tritium.ops.quantized import rounds
from tritium.ops.spans import Spans
from tritium.ops.spec import wide


class Layer:
    """x + mixer(norm(x)), then + mlp(norm(·)). The residual stream x is in float32 (float64 in float64 networks)."""

    def __init__(
        self, parameters: Parameters, prefix: str, config: ModelConfig, kind: str, rope_table_LF2: torch.Tensor
    ) -> None:
        norm_H, eps = parameters[f"{prefix}.input_norm.weight"], config.rms_eps
        self.mixer: Attention | GatedDeltaNet
        if kind == FULL:
            self.mixer = Attention(parameters, f"{prefix}.attn", norm_H=norm_H, rope_table_LF2=rope_table_LF2, eps=eps)
        else:
            self.mixer = GatedDeltaNet(
                parameters, f"{prefix}.gdn", norm_H=norm_H, key_heads=config.gdn_key_heads, eps=eps
            )
        norm_H = parameters[f"{prefix}.post_norm.weight"]
        if config.moe is None:
            self.mlp: Mlp | SparseMoe = Mlp(parameters, f"{prefix}.mlp", norm_H=norm_H, eps=eps)
        else:
            k = config.moe.experts_per_token
            self.mlp = SparseMoe(parameters, f"{prefix}.moe", norm_H=norm_H, eps=eps, k=k)

    def __call__(self, x_TH: torch.Tensor, spans: Spans, cache: LayerCache) -> torch.Tensor:
        return self.mlp(self.mixer(x_TH, spans, cache))  # type: ignore[arg-type]


class Decoder:
    """Token ids to hidden states and logits. Sees caches only as per-layer views that the caller brings."""

    def __init__(self, parameters: Parameters, config: ModelConfig, max_positions: int) -> None:
        self.config = config
        self.embed = parameters["embed.weight"]
        self.lm_head = self.embed if config.tied_embeddings else parameters["lm_head.weight"]
        self.norm = parameters["norm.weight"]
        self.device = self.embed.device
        self.dtype = self.embed.dtype
        # The MTP head reads position p + 1 at position p.
        table_LF2 = rope_table(config, max_positions + 1, self.device)
        self.layers = [
            Layer(parameters, f"layers.{i}", config, kind, table_LF2) for i, kind in enumerate(config.layer_types)
        ]
        self.mtp = MtpHead(parameters, config, table_LF2) if config.mtp_layers else None
        self.peaks = self._handed(self.device.type != "cpu")

    def _handed(self, leave: bool) -> torch.Tensor:
        """Has ops leave for the one behind them what they can, if `leave`: references have no use for it. Gives what is
        0 as a step begins. So that kernels have one form, the first product is told of a peak that nobody leaves, and
        the last one leaves what nobody takes."""
        chain = [link for layer in self.layers for block in (layer.mixer, layer.mlp) for link in block.chain]
        links: Chain = [({}, None, None), *chain, ({}, chain[0][1], self.norm)]
        # Sixteen bytes apart: kernels are compiled for what an address is a multiple of.
        peaks = torch.zeros(4 * len(links), dtype=torch.int32, device=self.device)
        few = self.embed.new_empty(MOST, self.config.hidden_size), torch.empty(MOST_PARTS, MOST, device=self.device)
        for (before, last, _), (behind, w, norm_H), bits_4 in zip(links, links[1:], peaks.split(4)):
            hand: Handed | None = None
            plain = all(isinstance(matrix, torch.Tensor) and matrix.dim() == 2 for matrix in (last, w))
            if w is not None and rounds(w):
                hand = Peak(bits_4[:1], norm_H)
            elif plain and norm_H is not None and self.dtype != torch.float16:
                hand = Scaled(*few, norm_H)
            if hand is not None and leave:
                before["leave"] = behind["given"] = hand
        return peaks

    @torch.inference_mode()
    def forward(
        self, batch: ForwardBatch, caches: Sequence[LayerCache], layers: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Hidden states after the final norm, [T, H]. `caches` has one entry a layer; `layers`: only these."""
        x_TH = embed(ids_T=batch.ids_T, embed_VK=self.embed, clear_C=self.peaks)
        for layer, cache in zip(self.layers if layers is None else [self.layers[i] for i in layers], caches):
            x_TH = layer(x_TH, batch.spans, cache)
        return rms_norm(x_MD=x_TH, w_D=self.norm, eps=self.config.rms_eps, dtype=self.dtype)

    @torch.inference_mode()
    def logits(self, hidden_SH: torch.Tensor) -> torch.Tensor:
        """[S, V] float32."""
        return linear(x_MK=hidden_SH, w_JK=self.lm_head, dtype=torch.float32)

    @torch.inference_mode()
    def draft_hidden(
        self, hidden_TH: torch.Tensor, next_ids_T: torch.Tensor, spans: Spans, cache: LayerCache
    ) -> torch.Tensor:
        """The MTP head over the same tokens: what `logits` turns into a guess of the token after next, [T, H]."""
        assert self.mtp is not None, "this checkpoint has no MTP head"
        return self.mtp(hidden_TH, functional.embedding(next_ids_T, self.embed), spans, cache)


class MtpHead:
    """h = fc(concat[norm_e(embed(next token)), norm_h(hidden)]), one attention layer with a KV cache of its own, norm.

    `hidden` is the target's output after its final norm. Positions are the target's + 1: all keys and queries of this
    layer are turned by one position more, which leaves every attention score as it is, so the target's are used.
    """

    def __init__(self, parameters: Parameters, config: ModelConfig, rope_table_LF2: torch.Tensor) -> None:
        self.fc = parameters["mtp.fc.weight"]
        self.norm_embedding = parameters["mtp.norm_embedding.weight"]
        self.norm_hidden = parameters["mtp.norm_hidden.weight"]
        self.norm = parameters["mtp.norm.weight"]
        self.layer = Layer(parameters, "mtp.layer", config, FULL, rope_table_LF2)
        self.eps = config.rms_eps

    def __call__(self, hidden_TH: torch.Tensor, next_TH: torch.Tensor, spans: Spans, cache: LayerCache) -> torch.Tensor:
        next_TH = rms_norm(x_MD=next_TH, w_D=self.norm_embedding, eps=self.eps)
        hidden_TH = rms_norm(x_MD=hidden_TH, w_D=self.norm_hidden, eps=self.eps)
        x_TH = linear(x_MK=torch.cat([next_TH, hidden_TH], dim=-1), w_JK=self.fc).to(wide(self.fc.dtype))
        return rms_norm(x_MD=self.layer(x_TH, spans, cache), w_D=self.norm, eps=self.eps, dtype=self.fc.dtype)


def rope_table(config: ModelConfig, positions: int, device: torch.device) -> torch.Tensor:
    """cos and sin of every position, [L, F, 2] float32, scaled by YaRN's attention factor."""
    frequencies, factor = inverse_frequencies(config.rope)
    angles_LF = torch.arange(positions, dtype=torch.float32)[:, None] * torch.tensor(frequencies, dtype=torch.float32)
    return (torch.stack([angles_LF.cos(), angles_LF.sin()], dim=-1) * factor).to(device)


def allocate_caches(
    config: ModelConfig, *, pages: int, slots: int, dtype: torch.dtype, device: torch.device, drafts: int = 0
) -> list[LayerCache]:
    """The pools, one entry a layer and the MTP layer's last; page 0 and slot 0 come on top of `pages` and `slots`.
    `drafts`: the most draft tokens of a row, whose inputs a slot keeps until they are verified.

    Nothing is cleared, since nothing is read that was not written: on a CPU, memory is taken only as it fills.
    """

    def pool(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def attention() -> AttentionCache:
        shape = (pages + 1, config.num_kv_heads, 64, config.head_dim)
        return AttentionCache(pool(*shape), pool(*shape))

    def gdn() -> GdnCache:
        heads, key, value = config.gdn_value_heads, config.gdn_key_dim, config.gdn_value_dim
        return GdnCache(
            state=pool(slots + 1, heads, key, value, dtype=torch.float32),
            conv=pool(slots + 1, config.conv_width + drafts, config.conv_channels),
            pending=pool(slots + 1, drafts, heads * (key + value + 2), dtype=torch.float32),
        )

    caches: list[LayerCache] = [attention() if kind == FULL else gdn() for kind in config.layer_types]
    return caches + [attention() for _ in range(config.mtp_layers)]
