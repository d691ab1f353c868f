"""A checkpoint's config.json as a frozen dataclass; whatever is not understood is refused by name."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tritium.core.errors import ConfigError
from tritium.quant import layout_of

log = logging.getLogger(__name__)

ARCHITECTURES = (
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM",
)
DTYPES = ("float32", "bfloat16", "float16")
LINEAR, FULL = "linear_attention", "full_attention"

_SWITCHES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "output_gate_type": ("swish", "silu"),
    "attention_bias": (False,),
    "attn_output_gate": (True,),
    "norm_topk_prob": (True,),
    "decoder_sparse_step": (1,),
    "use_sliding_window": (False,),
    "mtp_use_dedicated_embeddings": (False,),
}
"""Keys that change the mathematics, with the values that are supported, the default first."""

_HARMLESS = frozenset((
    "architectures", "model_type", "transformers_version", "_name_or_path", "problem_type", "id2label", "label2id",
    "use_cache", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward",
    "initializer_range", "attention_dropout", "output_router_logits", "router_aux_loss_coef", "is_encoder_decoder",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "dtype", "torch_dtype", "tie_word_embeddings",
    "quantization_config", "compression_config", "language_model_only", "vision_config", "image_token_id",
    "video_token_id", "vision_start_token_id", "vision_end_token_id",
))  # fmt: skip
"""Keys that do not change what the text model computes at inference (vision ones belong to the unloaded tower)."""

_HARMLESS_ROPE = frozenset(("mrope_section", "mrope_interleaved", "type"))
"""mRoPE tells apart time, height and width of an image; for text the three positions are equal."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. `kind` is default or yarn; the other fields are YaRN's (arXiv:2309.00071)."""

    theta: float
    rotary_dim: int
    """Leading dims of each head that rotate (head_dim x partial_rotary_factor)."""
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class MoeConfig:
    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The text model of a Qwen3.5 / 3.6 / 3.8 checkpoint.

    H hidden, V vocabulary, C = 2 nk dk + nv dv convolution channels; see docs/architecture.md for all symbols.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    layer_types: tuple[str, ...]
    """linear_attention or full_attention, one a layer."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    gdn_key_heads: int
    gdn_value_heads: int
    gdn_key_dim: int
    gdn_value_dim: int
    conv_width: int
    rope: RopeConfig
    rms_eps: float
    max_position: int
    tied_embeddings: bool
    dtype: str
    """float32, bfloat16 or float16: how the checkpoint's weights are stored."""
    state_dtype: str = "float32"
    """dtype of the recurrent state (the checkpoint's mamba_ssm_dtype)."""
    intermediate_size: int = 0
    """Width of the dense MLP; 0 when `moe` is set."""
    moe: MoeConfig | None = None
    mtp_layers: int = 0
    eos_ids: tuple[int, ...] = ()
    schemes: tuple[tuple[str, str], ...] = ()
    """Canonical name and scheme of every checkpoint tensor that is quantized here, by the file or at load."""

    @property
    def quantization(self) -> str:
        """In words; empty where nothing is quantized."""
        counts = Counter(scheme for _, scheme in self.schemes)
        return ", ".join(f"{count:,} tensors {scheme}" for scheme, count in counts.items())

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "full_attention")

    @property
    def gdn_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "linear_attention")

    @property
    def first_of_each_kind(self) -> list[int]:
        """One layer of each kind: what tests, tuning and compiling need to see of the network."""
        return [self.layer_types.index(kind) for kind in dict.fromkeys(self.layer_types)]

    @property
    def conv_channels(self) -> int:
        """C: channels under the causal convolution, rows q, k, v."""
        return 2 * self.gdn_key_heads * self.gdn_key_dim + self.gdn_value_heads * self.gdn_value_dim


def parse_config(raw: Mapping[str, Any], *, generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """A checkpoint's config.json (and generation_config.json, for its EOS ids) as a `ModelConfig`.

    The text fields may be nested under `text_config` or flat. A missing key takes the default of the Transformers
    configuration class of the family, except the sizes that differ between any two models, which are required.
    Raises `ConfigError`, naming the key, its value and what is supported, for anything that would change the
    mathematics; keys nobody knows are listed in one warning.
    """
    architecture = _architecture(raw)
    moe = "Moe" in architecture
    nested = raw.get("text_config") is not None
    text = _Fields(raw["text_config"] if nested else raw, "text_config." if nested else "")
    _refuse_unsupported(raw, text)
    heads, kv_heads = text.size("num_attention_heads"), text.size("num_key_value_heads")
    key_heads, value_heads = text.size("linear_num_key_heads", 16), text.size("linear_num_value_heads", 32)
    _require_multiple(text, "num_attention_heads", heads, "num_key_value_heads", kv_heads)
    _require_multiple(text, "linear_num_value_heads", value_heads, "linear_num_key_heads", key_heads)
    head_dim, max_position = text.size("head_dim", 256), text.size("max_position_embeddings", 32768)
    rope = _rope(text, head_dim, max_position)
    if rope.kind == "yarn":
        max_position = max(max_position, int(rope.original_max_position * rope.factor))
    config = ModelConfig(
        architecture=architecture,
        vocab_size=text.size("vocab_size"),
        hidden_size=text.size("hidden_size"),
        layer_types=_layer_types(text),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        gdn_key_heads=key_heads,
        gdn_value_heads=value_heads,
        gdn_key_dim=text.size("linear_key_head_dim", 128),
        gdn_value_dim=text.size("linear_value_head_dim", 128),
        conv_width=text.size("linear_conv_kernel_dim", 4, least=2),
        rope=rope,
        rms_eps=text.number("rms_norm_eps", 1e-6),
        max_position=max_position,
        tied_embeddings=_tied(raw, text, nested),
        dtype=_dtype(raw, text),
        state_dtype=text.choice("mamba_ssm_dtype", "float32", ("float32",)),
        intermediate_size=0 if moe else text.size("intermediate_size"),
        moe=_moe(text) if moe else None,
        mtp_layers=text.choice("mtp_num_hidden_layers", 0, (0, 1)),
        eos_ids=_eos_ids(generation or {}, text.raw, raw),
    )
    unknown = text.unknown(_HARMLESS) + ([k for k in raw if k not in _HARMLESS | {"text_config"}] if nested else [])
    if unknown:
        log.warning("config.json: ignoring unknown keys: %s", ", ".join(unknown))
    return config


class _Fields:
    """Typed look-ups in a JSON object that remember which keys were understood."""

    def __init__(self, raw: Any, prefix: str) -> None:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"config.json: {prefix.rstrip('.')} must be an object, got {json.dumps(raw)}")
        self.raw, self.prefix, self._known = raw, prefix, set[str]()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`; null counts as missing."""
        self._known.add(key)
        value = self.raw.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.get(key, default)
        if value is None:
            raise ConfigError(f"config.json: {self.prefix}{key} is missing", hint="it is required")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(key, value, f"an integer of at least {least}")
        return value

    def number(self, key: str, default: float, *, positive: bool = True) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(key, value, "a finite number")
        if positive and value <= 0:
            raise self.error(key, value, "a number above 0")
        return float(value)

    def choice(self, key: str, default: Any, supported: tuple[Any, ...]) -> Any:
        value = self.get(key, default)
        if not any(value == s and isinstance(value, bool) == isinstance(s, bool) for s in supported):
            raise self.error(key, value, " or ".join(json.dumps(s) for s in supported))
        return value

    def error(self, key: str, value: Any, supported: str) -> ConfigError:
        return ConfigError(
            f"config.json: {self.prefix}{key} = {json.dumps(value)} is not supported",
            hint=f"supported: {supported}",
        )

    def unknown(self, harmless: frozenset[str]) -> list[str]:
        return [self.prefix + key for key in self.raw if key not in self._known and key not in harmless]


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise _Fields(raw, "").error("architectures", names, ", ".join(ARCHITECTURES))
    return str(names[0])


def _refuse_unsupported(raw: Mapping[str, Any], text: _Fields) -> None:
    """Switches of the family that change the mathematics and have one supported value."""
    layout_of(raw)
    for key, supported in _SWITCHES.items():
        text.choice(key, supported[0], supported)
    for key in ("sliding_window", "mlp_only_layers", "per_layer_config"):
        if text.get(key):
            raise text.error(key, text.get(key), "empty or null")


def _require_multiple(text: _Fields, key: str, value: int, of: str, divisor: int) -> None:
    if value % divisor:
        raise ConfigError(f"config.json: {text.prefix}{key} = {value} is not a multiple of {of} = {divisor}")


def _layer_types(text: _Fields) -> tuple[str, ...]:
    layers, interval = text.size("num_hidden_layers"), text.size("full_attention_interval", 4)
    kinds = text.get("layer_types")
    if kinds is None:
        return tuple(LINEAR if (i + 1) % interval else FULL for i in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        found = len(kinds) if isinstance(kinds, list) else kinds
        raise text.error("layer_types", found, f"one entry for each of the {layers} layers (num_hidden_layers)")
    for kind in kinds:
        if kind not in (LINEAR, FULL):
            raise text.error("layer_types", kind, f"{LINEAR} or {FULL}")
    return tuple(kinds)


def _rope(text: _Fields, head_dim: int, max_position: int) -> RopeConfig:
    """`rope_parameters`, or the older `rope_scaling` with rope_theta and partial_rotary_factor beside it."""
    current, older = text.get("rope_parameters"), text.get("rope_scaling")
    if current and older and current != older:
        raise text.error("rope_scaling", older, "absent, or equal to rope_parameters, where both are given")
    fields = _Fields(current or older or {}, text.prefix + ("rope_parameters." if current else "rope_scaling."))
    outer_theta, outer_factor = text.number("rope_theta", 10_000.0), text.number("partial_rotary_factor", 0.25)
    outer_original = text.get("original_max_position_embeddings")
    legacy_kind = fields.get("type", "default")
    kind = fields.choice("rope_type", legacy_kind, ("default", "yarn"))
    factor = fields.number("partial_rotary_factor", outer_factor)
    rotary_dim = int(head_dim * factor)
    if factor > 1 or rotary_dim < 2 or rotary_dim % 2:
        raise fields.error("partial_rotary_factor", factor, f"an even part of the {head_dim} dims of a head")
    rope = RopeConfig(theta=fields.number("rope_theta", outer_theta), rotary_dim=rotary_dim, kind=kind)
    if kind == "yarn":
        rope = _yarn(fields, rope, max_position, outer_original)
    unknown = fields.unknown(_HARMLESS_ROPE)
    if unknown:
        raise ConfigError(f"config.json: {unknown[0]} is not a parameter of rope type {kind}")
    return rope


def _yarn(fields: _Fields, rope: RopeConfig, max_position: int, outer_original: int | None) -> RopeConfig:
    original = fields.size("original_max_position_embeddings", max_position)
    original = original if outer_original is None else outer_original
    factor = fields.number("factor", max_position / original)
    if factor < 1:
        raise fields.error("factor", factor, "a number of at least 1")

    def optional(key: str) -> float | None:
        return None if fields.get(key) is None else fields.number(key, 0.0, positive=False)

    return replace(
        rope,
        factor=factor,
        original_max_position=original,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        attention_factor=optional("attention_factor"),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=fields.choice("truncate", True, (True, False)),
    )


def _moe(text: _Fields) -> MoeConfig:
    moe = MoeConfig(
        num_experts=text.size("num_experts"),
        experts_per_token=text.size("num_experts_per_tok"),
        intermediate_size=text.size("moe_intermediate_size"),
        shared_intermediate_size=text.size("shared_expert_intermediate_size"),
    )
    if moe.experts_per_token > moe.num_experts:
        raise text.error("num_experts_per_tok", moe.experts_per_token, f"at most num_experts = {moe.num_experts}")
    return moe


def _tied(raw: Mapping[str, Any], text: _Fields, nested: bool) -> bool:
    """The outer key decides, as in Transformers; the inner one is read where the outer one is absent."""
    inner = text.choice("tie_word_embeddings", False, (True, False))
    return bool(_Fields(raw, "").choice("tie_word_embeddings", inner, (True, False)) if nested else inner)


def _dtype(raw: Mapping[str, Any], text: _Fields) -> str:
    outer = raw.get("dtype") or raw.get("torch_dtype")
    key = "dtype" if text.get("dtype") else "torch_dtype"
    if outer is None:
        return str(text.choice(key, "float32", DTYPES))
    return str(_Fields({"dtype": outer}, "").choice("dtype", None, DTYPES))


def _eos_ids(*sources: Mapping[str, Any]) -> tuple[int, ...]:
    """Every id that any of the files names, in order of appearance: each of them ends a generation."""
    ids: dict[int, None] = {}
    for source in sources:
        value = source.get("eos_token_id")
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise ConfigError(f"eos_token_id = {json.dumps(value)} must be a token id or a list of token ids")
            ids[token] = None
    return tuple(ids)
