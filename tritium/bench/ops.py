"""Every op at the sizes of a model against its floor: the bytes and the operations that it cannot avoid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tritium.bench.ceilings import Ceilings, seconds_of
from tritium.hw import probe
from tritium.models.config import ModelConfig
from tritium.models.parameters import blocks
from tritium.ops.quantized import FORMS
from tritium.ops.spec import Dims, Op

_COLD_BYTES, _MOST_BYTES, _MOST_COPIES = 512 << 20, 24 << 30, 64
"""What the inputs of one round move at least, so that no cache holds them; what they may take; how many there are."""


def sizes(config: ModelConfig, rows: Sequence[int], contexts: Sequence[int]) -> dict[str, list[Dims]]:
    """Op: the sizes at which decode steps of so many tokens of this model call it, each once."""
    found: dict[str, list[Dims]] = {}
    for count in rows:
        for name, listed in _sizes(config, count, contexts).items():
            kept = found.setdefault(name, [])
            kept += [dims for dims in listed if dims not in kept]
    return found


def _sizes(config: ModelConfig, rows: int, contexts: Sequence[int]) -> dict[str, list[Dims]]:
    H, V, d, G, N = (config.hidden_size, config.vocab_size, config.head_dim, config.num_kv_heads, config.num_heads)
    nk, nv, dk, dv = config.gdn_key_heads, config.gdn_value_heads, config.gdn_key_dim, config.gdn_value_dim
    values = nv * dv
    stored = blocks(config)

    def form(parameter: str) -> Dims:
        """How the first layer that has this parameter stores it."""
        of_it = next((found for name, found in stored.items() if name.endswith(f"{parameter}.weight")), ())
        if not of_it or (scheme := of_it[0].scheme) is None:
            return {}
        plain = sum(block.stop - block.start for block in of_it if block.scheme is None)
        return {"scheme": FORMS.index(scheme) + 1} | ({"plain": plain} if plain else {})

    products: list[Dims] = [
        {"M": rows, "N": config.conv_channels + values + 2 * nv, "K": H, "norm": 1, **form("in_proj")},
        {"M": rows, "N": H, "K": values, "residual": 1, **form("out_proj")},
        {"M": rows, "N": 2 * (N + G) * d, "K": H, "norm": 1, **form("qkv_proj")},
        {"M": rows, "N": H, "K": N * d, "residual": 1, **form("o_proj")},
        {"M": rows, "N": V, "K": H, **form("lm_head")},
    ]
    if inner := config.intermediate_size:
        products += [{"M": rows, "N": inner, "K": H, "norm": 1, "gated": 1, **form("mlp.gate_up")},
                     {"M": rows, "N": H, "K": inner, "residual": 1, **form("mlp.down")}]
    found: dict[str, list[Dims]] = {
        "linear": products,
        "rms_norm": [{"M": rows, "D": H}],
        "delta_net": [{"nk": nk, "nv": nv, "dk": dk, "dv": dv}],
        "gdn": [{"T": context, "nk": nk, "nv": nv, "dk": dk, "dv": dv} for context in contexts],
        "attention_inputs": [{"T": rows, "N": N, "G": G, "D": d, "F": config.rope.rotary_dim // 2}],
        "paged_attention": [{"T": 1, "N": N, "G": G, "D": d, "L": context} for context in contexts],
        "sample": [{"S": rows, "V": V}],
        "logprobs": [{"S": rows, "V": V, "K": 5}],
        "feed": [{"R": rows, "Q": 1}],
        "embed": [{"T": rows, "V": V, "K": H}],
    }
    if moe := config.moe:
        experts = {"E": moe.num_experts, "K": moe.experts_per_token, "H": H, "I": moe.intermediate_size}
        found["moe"] = [{"T": rows, **experts, "S": moe.shared_intermediate_size, **form("experts_down")}]
    return found


def run(ops: Sequence[Op], family: dict[str, list[Dims]], device_name: str, ceilings: Ceilings, *,
        budget: float = 0.1) -> Iterator[dict[str, Any]]:
    """A line for each op and size; those that the model does not call, at the largest size they are tested at."""
    device = torch.device(probe(device_name).device)
    gpu = device.type == "cuda"
    for op in ops:
        spec = op.spec
        wanted = torch.bfloat16 if gpu else torch.float32
        dtype = wanted if wanted in spec.dtypes else spec.dtypes[0]
        for dims in family.get(spec.name, [spec.cases[-1]]):
            moved, work = spec.bytes_moved(dims, dtype.itemsize), spec.flops(dims)
            calls = _inputs(op, dims, dtype, device, moved if gpu else _COLD_BYTES)
            seconds = seconds_of(_round(op, calls, gpu), device, budget=budget) / len(calls)
            floor = max(moved / ceilings.read, work / ceilings.dot)
            yield {
                "op": spec.name, "sizes": " ".join(f"{name}{value}" for name, value in dims.items()),
                "form": op.form(device.type), "us": 1e6 * seconds, "floor_us": 1e6 * floor, "share": floor / seconds,
                "bytes": moved, "flops": work, "called": spec.name in family,
            }  # fmt: skip


def _inputs(op: Op, dims: Dims, dtype: torch.dtype, device: torch.device, moved: int) -> list[dict[str, Any]]:
    """Arguments for as many calls as keep all of them out of the caches, in memory of their own."""
    calls: list[dict[str, Any]] = []
    copies = 1
    while len(calls) < copies:
        generator = torch.Generator(device).manual_seed(len(calls))
        with device:  # drawn where it is used: a CPU takes seconds for a head
            calls.append(op.spec.inputs(dims, dtype, generator))
        if len(calls) == 1:
            held = sum(value.nbytes for value in calls[0].values() if hasattr(value, "nbytes"))
            copies = min(_MOST_COPIES, math.ceil(_COLD_BYTES / max(moved, 1)), max(1, _MOST_BYTES // max(held, 1)))
    return calls


def _round(op: Op, calls: Sequence[dict[str, Any]], gpu: bool) -> Any:
    """One pass over all inputs; on a GPU a captured graph, where the op is a kernel (a reference may synchronise)."""

    @torch.inference_mode()
    def once() -> None:
        for arguments in calls:
            op(**arguments)

    if not gpu or not op.launcher:
        return once
    once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    return graph.replay
