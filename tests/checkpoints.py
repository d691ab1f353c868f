"""Random checkpoints of the family, written by Transformers: small, seeded, every path of the network live."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a random checkpoint looks like. `str(spec)` is a test id."""

    moe: bool = False
    nested: bool = False
    """...ForConditionalGeneration (with a tiny vision tower) instead of ...ForCausalLM."""
    tied: bool = False
    mtp: bool = True
    layer_types: str = "llfl"
    """One letter a layer: l linear_attention, f full_attention."""
    hidden: int = 64
    vocab: int = 211
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    nk: int = 1
    nv: int = 2
    gdn_key_dim: int = 16
    gdn_value_dim: int = 32
    rotary: float = 0.25
    rope: tuple[tuple[str, Any], ...] = ()
    """More rope_parameters, e.g. YaRN's."""
    experts: int = 8
    experts_per_token: int = 2
    per_expert: bool = False
    """Experts as one tensor for each expert and projection instead of fused."""
    shards: int = 1
    dtype: str = "float32"
    seed: int = 0

    def __str__(self) -> str:
        words = [
            "moe" if self.moe else "dense",
            "nested" if self.nested else "flat",
            "tied" if self.tied else "untied",
            f"{self.layer_types}-h{self.hidden}-v{self.vocab}-d{self.head_dim}-q{self.heads}kv{self.kv_heads}",
            f"nk{self.nk}nv{self.nv}-dk{self.gdn_key_dim}dv{self.gdn_value_dim}",
            f"{self.dtype}-x{self.shards}" + ("-per_expert" if self.moe and self.per_expert else ""),
            *([] if self.mtp else ["no_mtp"]),
            *(["yarn"] if self.rope else []),
        ]
        return "-".join(words)


def random_spec(rng: random.Random) -> Spec:
    """One of the many shapes that a checkpoint of the family can have."""
    layers = [rng.choice("lf") for _ in range(rng.randint(3, 5))]
    layers[rng.randrange(len(layers))] = "l"
    head_dim, kv_heads, nk = rng.choice((64, 128, 256)), rng.choice((1, 2)), rng.choice((1, 2, 3))
    experts = rng.choice((4, 8, 12))
    yarn = (("rope_type", "yarn"), ("factor", 4.0), ("original_max_position_embeddings", 256))
    return Spec(
        moe=rng.random() < 0.5,
        nested=rng.random() < 0.5,
        tied=rng.random() < 0.5,
        mtp=rng.random() < 0.8,
        layer_types="".join(layers),
        hidden=rng.choice((64, 96, 128)),
        vocab=rng.choice((97, 150, 211, 320, 513)),
        heads=kv_heads * rng.choice((1, 2, 3)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        nk=nk,
        nv=nk * rng.choice((1, 2, 3, 4)),
        gdn_key_dim=rng.choice((16, 32, 64)),
        gdn_value_dim=rng.choice((16, 32, 64)),
        rotary=rng.choice((0.25, 0.5, 1.0)),
        rope=yarn if rng.random() < 0.2 else (),
        experts=experts,
        experts_per_token=rng.randint(1, 4),
        per_expert=rng.random() < 0.5,
        shards=rng.randint(1, 3),
        dtype=rng.choice(("float32", "float32", "bfloat16", "float16")),
        seed=rng.randrange(2**31),
    )


def hf_config(spec: Spec) -> Any:
    """The configuration object of Transformers for `spec`."""
    import transformers as tf

    kinds = {"l": "linear_attention", "f": "full_attention"}
    rope = {"rope_theta": 10_000.0, "rope_type": "default", "partial_rotary_factor": spec.rotary} | dict(spec.rope)
    text: dict[str, Any] = {
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "num_hidden_layers": len(spec.layer_types),
        "layer_types": [kinds[letter] for letter in spec.layer_types],
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "linear_num_key_heads": spec.nk,
        "linear_num_value_heads": spec.nv,
        "linear_key_head_dim": spec.gdn_key_dim,
        "linear_value_head_dim": spec.gdn_value_dim,
        "rope_parameters": rope,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": spec.tied,
        "mtp_num_hidden_layers": int(spec.mtp),
        "eos_token_id": 0,
    }
    if spec.moe:
        text |= {"num_experts": spec.experts, "num_experts_per_tok": spec.experts_per_token}
        text |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
    else:
        text |= {"intermediate_size": 2 * spec.hidden}
    if not spec.nested:
        return (tf.Qwen3_5MoeTextConfig if spec.moe else tf.Qwen3_5TextConfig)(**text)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2}
    vision |= {"num_position_embeddings": 16, "out_hidden_size": spec.hidden}
    outer = tf.Qwen3_5MoeConfig if spec.moe else tf.Qwen3_5Config
    return outer(text_config=text, vision_config=vision, tie_word_embeddings=spec.tied)


def hf_model(spec: Spec) -> Any:
    """A Transformers model in float32 with random weights at which every term of the network matters."""
    import transformers as tf

    name = f"Qwen3_5{'Moe' if spec.moe else ''}For{'ConditionalGeneration' if spec.nested else 'CausalLM'}"
    model = getattr(tf, name)(hf_config(spec)).eval()
    generator = torch.Generator().manual_seed(spec.seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(random_weight(parameter_name, parameter.shape, generator))
    return model


def random_weight(name: str, shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Well-scaled noise for the tensor `name`: matrices keep the variance of their input."""
    noise = torch.randn(tuple(shape), generator=generator)
    if name.endswith("linear_attn.norm.weight"):
        return 1 + 0.3 * noise
    if name.endswith("A_log"):
        return 0.7 * noise - 1
    if "conv1d" in name:
        return 0.5 * noise
    if len(shape) == 1:
        return 0.3 * noise
    if "embed_tokens" in name:
        return noise
    if name.endswith("mlp.gate.weight"):
        return 2 * noise / shape[-1] ** 0.5
    return noise / shape[-1] ** 0.5


def mtp_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """The mtp.* tensors of a checkpoint: Transformers does not write them for this family."""
    H, q, kv = spec.hidden, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (H,),
        "post_attention_layernorm.weight": (H,),
        "self_attn.q_proj.weight": (2 * q, H),
        "self_attn.k_proj.weight": (kv, H),
        "self_attn.v_proj.weight": (kv, H),
        "self_attn.o_proj.weight": (H, q),
        "self_attn.q_norm.weight": (spec.head_dim,),
        "self_attn.k_norm.weight": (spec.head_dim,),
    }
    if spec.moe:
        layer |= {"mlp.gate.weight": (spec.experts, H), "mlp.shared_expert_gate.weight": (1, H)}
        layer |= {f"mlp.shared_expert.{n}_proj.weight": (48, H) for n in ("gate", "up")}
        layer |= {"mlp.shared_expert.down_proj.weight": (H, 48)}
        layer |= {"mlp.experts.gate_up_proj": (spec.experts, 64, H)}
        layer |= {"mlp.experts.down_proj": (spec.experts, H, 32)}
    else:
        layer |= {f"mlp.{n}_proj.weight": (2 * H, H) for n in ("gate", "up")}
        layer |= {"mlp.down_proj.weight": (H, 2 * H)}
    head: dict[str, tuple[int, ...]] = {"mtp.fc.weight": (H, 2 * H), "mtp.norm.weight": (H,)}
    head |= {"mtp.pre_fc_norm_embedding.weight": (H,), "mtp.pre_fc_norm_hidden.weight": (H,)}
    return head | {f"mtp.layers.0.{name}": shape for name, shape in layer.items()}


def random_checkpoint(directory: Path, spec: Spec | None = None, **changes: Any) -> Path:
    """Write the checkpoint of `spec` (with `changes`): Transformers saves it, then mtp.* and shards are added."""
    spec = replace(spec or Spec(), **changes)
    hf_model(spec).to(getattr(torch, spec.dtype)).save_pretrained(directory)
    tensors = read_tensors(directory)
    if spec.mtp:
        generator = torch.Generator().manual_seed(spec.seed + 1)
        for name, shape in mtp_shapes(spec).items():
            tensors[name] = random_weight(name, shape, generator).to(getattr(torch, spec.dtype))
    write_tensors(directory, _spell_experts(tensors, per_expert=spec.per_expert), shards=spec.shards)
    return directory


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its name."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def write_tensors(directory: Path, tensors: dict[str, torch.Tensor], *, shards: int = 1) -> None:
    """Replace a checkpoint's weights, in `shards` files (with an index when more than one)."""
    for old in [*directory.glob("*.safetensors"), *directory.glob(INDEX)]:
        old.unlink()
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    files = {n: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, n in enumerate(sorted(tensors))}
    for file in sorted(set(files.values())):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def edit_config(directory: Path, **changes: Any) -> None:
    """Set top-level keys of config.json; `...` deletes one."""
    path = directory / "config.json"
    raw = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not ...}
    path.write_text(json.dumps(raw))


def _spell_experts(tensors: dict[str, torch.Tensor], *, per_expert: bool) -> dict[str, torch.Tensor]:
    """All experts fused, or all apart, however they were saved."""
    fused = _fuse_experts(tensors)
    if not per_expert:
        return fused
    apart: dict[str, torch.Tensor] = {}
    for name, tensor in fused.items():
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(t.chunk(2) for t in tensor):
                apart[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate.contiguous()
                apart[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up.contiguous()
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(tensor):
                apart[name.replace("down_proj", f"{e}.down_proj.weight")] = down.contiguous()
        else:
            apart[name] = tensor
    return apart


def _fuse_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    fused = {name: t for name, t in tensors.items() if ".experts." not in name or name.endswith("_proj")}
    for first in [name for name in tensors if name.endswith("experts.0.gate_proj.weight")]:
        stem = first.removesuffix("0.gate_proj.weight")
        count = sum(name.startswith(stem) and name.endswith("gate_proj.weight") for name in tensors)

        def stack(projection: str, stem: str = stem, count: int = count) -> torch.Tensor:
            return torch.stack([tensors[f"{stem}{e}.{projection}_proj.weight"] for e in range(count)])

        fused[f"{stem}gate_up_proj"] = torch.cat((stack("gate"), stack("up")), dim=1)
        fused[f"{stem}down_proj"] = stack("down")
    return fused
