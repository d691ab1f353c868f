"""A checkpoint's config.json as a frozen dataclass; whatever is not understood is refused by name."""

from __future__ import annotations

from dataclasses import dataclass


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

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "full_attention")

    @property
    def gdn_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "linear_attention")

    @property
    def conv_channels(self) -> int:
        """C: channels under the causal convolution, rows q, k, v."""
        return 2 * self.gdn_key_heads * self.gdn_key_dim + self.gdn_value_heads * self.gdn_value_dim
