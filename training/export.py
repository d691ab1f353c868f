"""Writes a trained network as a checkpoint directory of the family: config, weights, tokenizer, template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from training.model import SHAPES, Shape, TinyModel
from training.text import ASSETS, tokenizer_config

LIMIT_BYTES = 12_000_000


def config_of(shape: Shape, tokenizer: Tokenizer) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["Qwen3_5MoeForCausalLM" if shape.experts else "Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_moe_text" if shape.experts else "qwen3_5_text",
        "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "dtype": "bfloat16",
        "bos_token_id": None, "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "full_attention_interval": 4, "layer_types": list(shape.layer_types),
        "num_hidden_layers": len(shape.layer_types),
        "hidden_act": "silu", "hidden_size": shape.hidden, "vocab_size": shape.vocab, "initializer_range": 0.02,
        "rms_norm_eps": shape.eps, "max_position_embeddings": 8192, "tie_word_embeddings": True, "use_cache": True,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "linear_num_key_heads": shape.key_heads, "linear_num_value_heads": shape.value_heads,
        "linear_key_head_dim": shape.linear_dim, "linear_value_head_dim": shape.linear_dim,
        "linear_conv_kernel_dim": shape.conv, "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False,
        "partial_rotary_factor": shape.rotary / shape.head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.theta, "mrope_interleaved": True,
                            "mrope_section": [3, 3, 2], "partial_rotary_factor": shape.rotary / shape.head_dim},
    }
    if shape.experts:
        config |= {"num_experts": shape.experts, "num_experts_per_tok": shape.top_k,
                   "moe_intermediate_size": shape.expert_width, "shared_expert_intermediate_size": shape.shared_width,
                   "router_aux_loss_coef": 0.001, "output_router_logits": False}
    else:
        config |= {"intermediate_size": shape.intermediate}
    config["eos_token_id"] = [tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")]
    return config


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def export(model: TinyModel, folder: Path, tokenizer: Tokenizer) -> int:
    """Writes the directory and returns the size of model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = config_of(model.shape, tokenizer)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {
        "do_sample": True, "eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"],
        "temperature": 0.6, "top_k": 20, "top_p": 0.95})
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config())
    shutil.copyfile(ASSETS / "chat_template.jinja", folder / "chat_template.jinja")
    size = (folder / "model.safetensors").stat().st_size
    if size >= LIMIT_BYTES:
        raise RuntimeError(f"model.safetensors has {size} bytes, the limit is {LIMIT_BYTES}")
    return size


def load(kind: str, path: Path, device: str = "cpu") -> TinyModel:
    """A model with the (bf16-rounded) weights of a checkpoint, in float32."""
    model = TinyModel(SHAPES[kind])
    model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return model.to(device)
