"""Shapes of the Qwen3.5 / 3.6 / 3.8 family by name: what a config.json would say, for plans and random weights.

From the published checkpoints' config.json (27B, 35B-A3B, 122B-A10B, 397B-A17B read; the others as reported). A real
checkpoint's own file is always what counts.
"""

from __future__ import annotations

from typing import Any

_SIZES: dict[str, tuple[int, int, int, int, int, int | tuple[int, int, int], bool]] = {
    # H, layers, nq, nkv, nv, I or (E, K, width of an expert and of the shared one), tied
    "0.8b": (1024, 24, 8, 2, 16, 3584, True),
    "2b": (2048, 24, 8, 2, 16, 6144, True),
    "4b": (2560, 32, 16, 4, 32, 9216, True),
    "9b": (4096, 32, 16, 4, 32, 12288, False),
    "27b": (5120, 64, 24, 4, 48, 17408, False),
    "35b-a3b": (2048, 40, 16, 2, 32, (256, 8, 512), False),
    "122b-a10b": (3072, 48, 32, 2, 64, (256, 8, 1024), False),
    "397b-a17b": (4096, 60, 32, 2, 64, (512, 10, 1024), False),
}
_RELEASES = {"qwen3.5": tuple(_SIZES), "qwen3.6": ("27b", "35b-a3b"), "qwen3.8": ("27b",)}

FAMILY = tuple(f"{release}-{size}" for release, sizes in _RELEASES.items() for size in sizes)
"""Names that `family_config` knows."""


def family_config(name: str) -> dict[str, Any] | None:
    """The config.json of a member of the family, with its MTP head, less what `parse_config` takes where a key is not
    there (4 layers from one of attention to the next, its heads of 256 dims, GDN's of 128, ...); None for a name that
    is not in `FAMILY`."""
    if name.lower() not in FAMILY:
        return None
    hidden, layers, heads, kv_heads, values, width, tied = _SIZES[name.lower().split("-", 1)[1]]
    raw: dict[str, Any] = {
        "architectures": ["Qwen3_5ForCausalLM" if isinstance(width, int) else "Qwen3_5MoeForCausalLM"],
        "dtype": "bfloat16",
        "eos_token_id": [248046, 248044],
        "vocab_size": 248320,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "linear_num_value_heads": values,
        "max_position_embeddings": 262144,
        "rope_parameters": {"rope_theta": 1e7},
        "tie_word_embeddings": tied,
        "mtp_num_hidden_layers": 1,
    }
    if isinstance(width, int):
        return raw | {"intermediate_size": width}
    experts, each, inner = width
    raw |= {"num_experts": experts, "num_experts_per_tok": each}
    return raw | {"moe_intermediate_size": inner, "shared_expert_intermediate_size": inner}
