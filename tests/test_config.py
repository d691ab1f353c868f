"""config.json: what is understood equals what Transformers understands, and the rest is refused by name."""

from __future__ import annotations

import json
import logging
import random
from typing import Any

import checkpoints
import pytest
import torch
import transformers as tf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tritium.core import ConfigError
from tritium.models.config import ModelConfig, RopeConfig, parse_config
from tritium.models.parameters import parameter_shapes, stored_sizes
from tritium.models.rope import inverse_frequencies

FLAT: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "dtype": "bfloat16",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MOE: dict[str, Any] = FLAT | {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
}


def nested(**text: Any) -> dict[str, Any]:
    return {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": FLAT | text}


def assert_equal_to_hf(config: ModelConfig, hf: Any, tied: bool) -> None:
    """Field by field against a Transformers text configuration object."""
    assert config.vocab_size == hf.vocab_size
    assert config.hidden_size == hf.hidden_size
    assert config.layer_types == tuple(hf.layer_types)
    assert (config.num_heads, config.num_kv_heads) == (hf.num_attention_heads, hf.num_key_value_heads)
    assert config.head_dim == hf.head_dim
    assert (config.gdn_key_heads, config.gdn_value_heads) == (hf.linear_num_key_heads, hf.linear_num_value_heads)
    assert (config.gdn_key_dim, config.gdn_value_dim) == (hf.linear_key_head_dim, hf.linear_value_head_dim)
    assert config.conv_width == hf.linear_conv_kernel_dim
    assert config.rms_eps == hf.rms_norm_eps
    assert config.tied_embeddings == tied
    assert config.rope.theta == hf.rope_parameters["rope_theta"]
    assert config.rope.kind == hf.rope_parameters["rope_type"]
    assert config.rope.rotary_dim == int(hf.head_dim * hf.rope_parameters["partial_rotary_factor"])
    if config.rope.kind == "default":
        assert config.max_position == hf.max_position_embeddings
    if config.moe:
        assert config.moe.num_experts == hf.num_experts
        assert config.moe.experts_per_token == hf.num_experts_per_tok
        assert config.moe.intermediate_size == hf.moe_intermediate_size
        assert config.moe.shared_intermediate_size == hf.shared_expert_intermediate_size
    else:
        assert config.intermediate_size == hf.intermediate_size


def test_configs_written_by_transformers_read_the_same(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        spec = checkpoints.random_spec(rng)
        hf = checkpoints.hf_config(spec)
        name = f"Qwen3_5{'Moe' if spec.moe else ''}For{'ConditionalGeneration' if spec.nested else 'CausalLM'}"
        hf.architectures, hf.dtype = [name], spec.dtype
        config = parse_config(json.loads(hf.to_json_string()))
        assert_equal_to_hf(config, hf.get_text_config(), spec.tied)
        assert config.dtype == spec.dtype
        assert config.mtp_layers == int(spec.mtp)


@pytest.mark.parametrize("raw", [FLAT, MOE], ids=["dense", "moe"])
def test_missing_keys_take_the_defaults_of_transformers(raw: dict[str, Any]) -> None:
    hf = (tf.Qwen3_5MoeTextConfig if raw is MOE else tf.Qwen3_5TextConfig)(**raw)
    assert_equal_to_hf(parse_config(raw), hf, tied=False)
    older = raw | {"rope_theta": 5e5, "partial_rotary_factor": 0.5, "full_attention_interval": 3}
    hf = (tf.Qwen3_5MoeTextConfig if raw is MOE else tf.Qwen3_5TextConfig)(**older)
    assert_equal_to_hf(parse_config(older), hf, tied=False)


@pytest.mark.parametrize("key", sorted(set(MOE) - {"architectures", "dtype", "intermediate_size"}))
def test_a_missing_size_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        parse_config({k: v for k, v in MOE.items() if k != key})


def test_the_released_shape_is_read() -> None:
    text = FLAT | {
        "attn_output_gate": True,
        "output_gate_type": "swish",
        "mlp_only_layers": [],
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "max_position_embeddings": 262144,
        "eos_token_id": 248044,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
        },
    }
    raw = {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    config = parse_config(raw, generation={"eos_token_id": [248046, 248044]})
    assert config.rope == RopeConfig(theta=1e7, rotary_dim=64)
    assert config.eos_ids == (248046, 248044)
    assert config.mtp_layers == 1
    assert config.attention_layers == (3, 7)


@pytest.mark.parametrize(
    ("outer", "inner", "tied"), [(True, False, True), (False, True, False), (None, True, True), (None, None, False)]
)
def test_the_outer_tie_word_embeddings_decides(outer: bool | None, inner: bool | None, tied: bool) -> None:
    assert parse_config(nested(tie_word_embeddings=inner) | {"tie_word_embeddings": outer}).tied_embeddings is tied


@pytest.mark.parametrize("eos", [7, [7], [7, 7]])
def test_eos_ids_are_united(eos: Any) -> None:
    assert parse_config(FLAT | {"eos_token_id": eos}, generation={"eos_token_id": [9, 7]}).eos_ids == (9, 7)
    assert parse_config(FLAT | {"eos_token_id": eos}).eos_ids == (7,)


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_dtype_is_read_in_both_spellings_at_both_levels(spelling: str) -> None:
    flat = {k: v for k, v in FLAT.items() if k != "dtype"}
    assert parse_config(flat | {spelling: "float16"}).dtype == "float16"
    outer = nested() | {"text_config": flat, spelling: "float16"}
    assert parse_config(outer).dtype == "float16"
    assert parse_config(nested() | {"text_config": flat | {spelling: "float16"}}).dtype == "float16"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures.*LlamaForCausalLM.*Qwen3_5MoeForCausalLM"),
        ({"architectures": None}, "architectures = null"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu".*silu'),
        ({"output_gate_type": "sigmoid"}, "output_gate_type.*sigmoid.*swish"),
        ({"attention_bias": True}, "attention_bias = true.*false"),
        ({"attn_output_gate": False}, "attn_output_gate = false.*true"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config"),
        ({"norm_topk_prob": False}, "norm_topk_prob = false.*true"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ({"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype.*bfloat16.*float32"),
        ({"mtp_num_hidden_layers": 2}, "mtp_num_hidden_layers = 2.*0 or 1"),
        ({"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings = true"),
        ({"linear_num_key_heads": 3}, "linear_num_value_heads = 32 is not a multiple of linear_num_key_heads = 3"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.*fp8"),
        ({"layer_types": ["linear_attention"] * 7}, "layer_types.*8 layers"),
        ({"layer_types": ["mamba"] * 8}, "layer_types.*mamba.*full_attention"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type.*llama3.*yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type.*linear.*yarn"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 0.5}}, r"rope_parameters\.factor = 0\.5"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4, "surprise": 1}}, r"rope_parameters\.surprise"),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_theta": 1e7}}, "rope_scaling"),
        ({"partial_rotary_factor": 0.13}, r"partial_rotary_factor = 0\.13.*even"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor"),
        ({"dtype": "float8_e4m3fn"}, "dtype.*float8_e4m3fn.*bfloat16"),
        ({"hidden_size": "256"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers = true"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok = 17.*num_experts = 16"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config(MOE | changes)
    if "architectures" not in changes:
        outer = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "text_config": MOE | changes}
        with pytest.raises(ConfigError, match=named):
            parse_config(outer)


def test_unknown_keys_get_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse_config(nested(surprise=1, another=2) | {"outer_surprise": 3})
    assert [r.getMessage() for r in caplog.records] == [
        "config.json: ignoring unknown keys: text_config.surprise, text_config.another, outer_surprise"
    ]


YARN = {"rope_type": "yarn", "rope_theta": 1e7, "factor": 4.0, "original_max_position_embeddings": 262144}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        YARN,
        YARN | {"partial_rotary_factor": 1.0, "beta_fast": 16.0, "beta_slow": 2.0},
        YARN | {"truncate": False},
        YARN | {"attention_factor": 0.9},
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
        YARN | {"mscale": 0.7, "mscale_all_dim": 0.0},
        YARN | {"factor": 1.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0},
    ],
    ids=str,
)
def test_rotary_frequencies_are_those_of_transformers(rope: dict[str, Any]) -> None:
    raw = FLAT | {"rope_parameters": dict(rope), "max_position_embeddings": 262144}
    hf = tf.Qwen3_5TextConfig(**(FLAT | {"rope_parameters": dict(rope), "max_position_embeddings": 262144}))
    config = parse_config(raw)
    if rope["rope_type"] == "default":
        rotary = tf.models.qwen3_5.modeling_qwen3_5.Qwen3_5TextRotaryEmbedding
        expected, factor = rotary.compute_default_rope_parameters(hf)
    else:
        expected, factor = ROPE_INIT_FUNCTIONS["yarn"](hf)
    frequencies, scale = inverse_frequencies(config.rope)
    assert scale == pytest.approx(factor, rel=1e-12)
    # One unit in the last place, for powers that the two libraries round differently.
    torch.testing.assert_close(torch.tensor(frequencies), expected.float(), rtol=1.3e-7, atol=0)


def test_older_spelling_of_yarn() -> None:
    older = {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 1024}}
    config = parse_config(FLAT | older | {"rope_theta": 1e6, "max_position_embeddings": 1024})
    assert (config.rope.kind, config.rope.theta, config.rope.factor) == ("yarn", 1e6, 4.0)
    assert config.max_position == 4096  # YaRN extends the context that the checkpoint was trained for


def test_stored_sizes_count_matrices_in_the_compute_dtype_and_vectors_in_float32() -> None:
    config = parse_config(MOE)
    specs = parameter_shapes(config).values()
    matrix, vector = (sum(torch.Size(s.shape).numel() for s in specs if s.role == r) for r in ("matrix", "vector"))
    assert sum(stored_sizes(config, 2).values()) == 2 * matrix + 4 * vector
    assert sum(stored_sizes(config, 4).values()) == 4 * (matrix + vector)
