"""`tritium eval kl`: how far a quantized model is from the one as published, token by token, on any text.

For each position, D = sum_v p(v) (log p(v) - log q(v)) over the whole vocabulary, p of the reference and q of the
other, in float64 from the engine's own float32 logits (paged cache, chunks, as it serves). Both models are loaded side
by side, with pools for one window, and go through it chunk by chunk, so that never more than a chunk's logits exist.

Shapes: T tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from tritium.api.door import load_format
from tritium.chat import ChatFormat
from tritium.config import EngineConfig
from tritium.core import PAGE_TOKENS, ConfigError, Request, RequestError, SamplingParams, StepPlan
from tritium.engine import Engine
from tritium.models.checkpoint import find_checkpoint, resolve

CHUNK = 512
"""Tokens of which the logits of both models exist at a time."""
_SLICE = 64
"""Positions compared at a time, in float64."""
_ONCE = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)


class Divergence:
    """Sums up positions: `add` them, then `figures`."""

    def __init__(self) -> None:
        self.kl: list[float] = []
        """Of each position, in nats."""
        self.agreed = 0
        self.loss = [0.0, 0.0]
        """Of the reference and of the other: minus the log-probabilities of the tokens that followed."""

    def add(self, p_TV: torch.Tensor, q_TV: torch.Tensor, following: Sequence[int]) -> None:
        """Logits of both at positions and the tokens that follow these. More positions than tokens are left out."""
        for begin in range(0, len(following), _SLICE):
            end = min(begin + _SLICE, len(following))
            log_p_TV, log_q_TV = (x_TV[begin:end].double().log_softmax(-1) for x_TV in (p_TV, q_TV))
            # A token of probability 0 adds nothing.
            parts_TV = torch.where(log_p_TV.isneginf(), 0.0, log_p_TV.exp() * (log_p_TV - log_q_TV))
            self.kl += parts_TV.sum(-1).tolist()
            self.agreed += int((log_p_TV.argmax(-1) == log_q_TV.argmax(-1)).sum())
            next_T1 = torch.tensor(following[begin:end], device=p_TV.device)[:, None]
            for i, log_TV in enumerate((log_p_TV, log_q_TV)):
                self.loss[i] -= float(log_TV.gather(1, next_T1).sum())

    def figures(self) -> dict[str, Any]:
        """Raises `RequestError` where there was no position."""
        if not self.kl:
            raise RequestError("the text is too short to compare anything: two tokens at least")
        ranked, n = sorted(self.kl), len(self.kl)
        return {
            "positions": n,
            "kl_mean": statistics.fmean(ranked),
            "kl_median": statistics.median(ranked),
            "kl_p99": ranked[math.ceil(0.99 * n) - 1],
            "kl_max": ranked[-1],
            "top1_agreement": self.agreed / n,
            "perplexity": math.exp(self.loss[0] / n),
            "perplexity_quantized": math.exp(self.loss[1] / n),
        }


class _Reader:
    """An engine that is fed one window at a time, and the logits of its last step."""

    def __init__(self, config: EngineConfig, window: int) -> None:
        pages = -(-(window + 1) // PAGE_TOKENS) + 1
        self.engine = Engine.load(
            dataclasses.replace(
                config, max_model_len=window + 1, max_num_seqs=1, max_num_batched_tokens=min(window, CHUNK),
                num_gpu_blocks_override=pages, speculate="none", enable_prefix_caching=False, cache_dir=None,
                enforce_eager=True,
            )
        )  # fmt: skip
        self.engine.runner.observer = self._observe
        self.start = 0
        self.logits_TV = torch.empty(0)

    def _observe(self, plan: StepPlan, logits_TV: torch.Tensor) -> None:
        self.start, self.logits_TV = plan.rows[0].start, logits_TV


def compare(reference: EngineConfig, other: EngineConfig, windows: Iterable[Sequence[int]], *, longest: int,
            label: str = "comparing") -> dict[str, Any]:
    """Figures over the windows of ids, none longer than `longest`: positions, mean, median, 99th percentile and largest
    KL in nats, share of positions at which both think the same token the most likely, perplexity of both."""
    found, readers = Divergence(), [_Reader(config, longest) for config in (reference, other)]
    for ids in tqdm(list(windows), desc=label, file=sys.stderr, disable=not other.show_progress):
        for reader in readers:
            reader.engine.add(Request(id="window", prompt_ids=list(ids), sampling=_ONCE, seed=0))
        while readers[0].engine.has_work:
            for reader in readers:
                reader.engine.step()
            p, q = readers
            assert (p.start, p.logits_TV.shape) == (q.start, q.logits_TV.shape)
            found.add(p.logits_TV, q.logits_TV, ids[p.start + 1 : p.start + 1 + len(p.logits_TV)])
    return found.figures()


def text_format(config: EngineConfig) -> ChatFormat:
    """Tokenizer and template of the model, without its weights."""
    return load_format(config, resolve(config.model, config.revision, config.download_dir, weights=False))


def run(config: EngineConfig, text: str, *, window: int = 2048, limit: int | None = None) -> dict[str, Any]:
    """Compares the model of `config` with the same one not quantized, on `text` in windows of `window` tokens (at most
    `limit` of them), each read from its own beginning. Raises `ConfigError` where it is quantized as published."""
    ids = text_format(config).encode(text)
    windows = [ids[i : i + window] for i in range(0, len(ids), window)][:limit]
    windows = [ids for ids in windows if len(ids) > 1]
    plain = dataclasses.replace(config, quantize=None, keep_bf16=(), quantize_also=())
    if find_checkpoint(plain).config.schemes:
        raise ConfigError(f"{config.model} is quantized already: it would be compared with itself",
                          hint="name what it was made from: --quantize gives the same bits")
    figures = compare(plain, config, windows, longest=max(map(len, windows), default=2))
    told = {"model": config.model, "quantize": config.quantize, "keep_bf16": config.keep_bf16,
            "quantize_also": config.quantize_also, "windows": len(windows), "window": window}  # fmt: skip
    return told | figures


def table(figures: dict[str, Any]) -> str:
    """For a terminal."""
    lines = [
        f"{figures['model']}, {figures['quantize']} against as published: {figures['positions']:,} tokens",
        "  KL a token, nats     mean {kl_mean:.5f}   median {kl_median:.5f}   99 % {kl_p99:.5f}   most {kl_max:.5f}",
        "  same likeliest token {top1_agreement:.2%}",
        "  perplexity           {perplexity:.4f} as published, {perplexity_quantized:.4f} quantized",
    ]
    return "\n".join(line.format(**figures) for line in lines)
