"""What a chip can do, measured, and what a model cannot avoid: the roofline that benchmarks are held against."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tritium.hw import Target, probe
from tritium.models.config import ModelConfig
from tritium.models.parameters import parameter_shapes, stored_sizes

_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Speeds that plain torch reaches here: bytes and operations a second."""

    device: str
    """Name of the chip."""
    read: float
    """Bytes of a large buffer that a reduction reads."""
    copy: float
    """Bytes read plus bytes written by a copy."""
    dot: float
    """Operations of a large matrix product: bfloat16 on a GPU, float32 on a CPU."""

    def line(self) -> str:
        return (f"{self.device}: reads {self.read / 1e9:,.0f} GB/s, copies {self.copy / 1e9:,.0f} GB/s, "
                f"multiplies {self.dot / 1e12:,.2f} TFLOP/s")


def measure(device: str = "auto", *, small: bool = False) -> Ceilings:
    """A few seconds on a CPU, less on a GPU; `small` for tests. The best of a few ways and rounds. Leaves no memory
    taken, since the engine's plan counts what is free."""
    target = probe(device)
    found = _measured(target, small)
    if target.is_gpu:
        torch.cuda.empty_cache()
    return found


def _measured(target: Target, small: bool) -> Ceilings:
    where, gpu = torch.device(target.device), target.is_gpu
    kind = torch.bfloat16 if gpu else torch.float32
    x, y = (torch.empty(1 << 20 if small else 1 << 30 if gpu else 1 << 26, dtype=kind, device=where).normal_()
            for _ in range(2))
    size = x.nbytes
    matrix, vector = x.view(-1, 1024), y[:1024]
    wide, side = x.view(torch.float32), 256 if small else 8192 if gpu else 1024
    a, b = x[: min(side * side, x.numel())].view(-1, side), y[: side * side].view(side, side)
    read = min(seconds_of(way, where) for way in (lambda: wide.sum(), lambda: wide.amax(), lambda: matrix @ vector))
    return Ceilings(
        target.name,
        read=size / read,
        copy=2 * size / seconds_of(lambda: y.copy_(x), where),
        dot=2 * a.shape[0] * side * side / seconds_of(lambda: a @ b, where),
    )


def seconds_of(call: Callable[[], object], device: torch.device, *, budget: float = 0.1, rounds: int = 3) -> float:
    """Seconds of one call, back to back: the best of `rounds`, each of about `budget` seconds."""
    call()
    times = max(1, min(1000, int(budget / max(spent(call, device, 1), 1e-9))))
    return min(spent(call, device, times) for _ in range(rounds)) / times


def spent(call: Callable[[], object], device: torch.device, times: int) -> float:
    """Seconds of `times` calls, back to back; on a GPU by its own clock."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(times):
            call()
        return time.perf_counter() - begin
    events: Any = torch.cuda.Event
    first, last = (events(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(times):
        call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def step_bytes(config: ModelConfig, rows: int, context: int, width: int = 2) -> int:
    """Bytes that a decode step of `rows` tokens at `context` must move, `width` a KV element or one of a matrix that is
    not quantized:

    weights, each once (of the experts of a layer those E (1 - (1 - K/E)^rows) that rows which choose alone are expected
    to need; of the embeddings the rows' own, or all where they are the head too; of the MTP head none), and for each
    row the recurrent state read and written, the convolution's inputs, and the keys and values of its context.
    """
    chosen = 1.0
    if moe := config.moe:
        chosen = 1 - (1 - moe.experts_per_token / moe.num_experts) ** rows
    weights = _weights(config, chosen, stored_sizes(config, width))
    recurrent = 2 * _FLOAT32 * config.gdn_value_heads * config.gdn_key_dim * config.gdn_value_dim
    convolution = width * config.conv_width * config.conv_channels
    kv = 2 * width * config.num_kv_heads * config.head_dim * (context + 1)
    each = len(config.gdn_layers) * (recurrent + convolution) + len(config.attention_layers) * kv
    return round(weights + rows * (each + width * config.hidden_size))


def flops(config: ModelConfig, tokens: int, attended: float, draws: int) -> int:
    """Operations of `tokens` tokens that attend to `attended` each: products, attention, the recurrence, and `draws`
    rows of logits."""
    moe, head = config.moe, config.vocab_size * config.hidden_size
    numbers = {name: math.prod(s.shape) for name, s in parameter_shapes(config).items() if s.role == "matrix"}
    active = _weights(config, moe.experts_per_token / moe.num_experts if moe else 1.0, numbers) - head
    attention = 4 * config.num_heads * config.head_dim * attended * len(config.attention_layers)
    recurrence = 7 * config.gdn_value_heads * config.gdn_key_dim * config.gdn_value_dim * len(config.gdn_layers)
    return round(tokens * (2 * active + attention + recurrence) + 2 * draws * head)


def _weights(config: ModelConfig, chosen: float, sizes: Mapping[str, int]) -> float:
    total = 0.0
    for name, size in sizes.items():
        if name.startswith("mtp.") or (name == "embed.weight" and not config.tied_embeddings):
            continue
        total += size * (chosen if ".experts_" in name else 1.0)
    return total


def middle(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.median(found) if found else math.nan
