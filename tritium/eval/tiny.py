"""`tritium eval tiny`: what an embedded model can do, on problems that its training never showed.

Greedy decoding through the whole engine (template, scheduler, paged cache, text stream). Every figure is a share.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tritium.api import LLM, Completion
from tritium.config import SCHEMES, EngineConfig
from tritium.core import ConfigError
from tritium.eval import kl, tasks

SEED = 20_000
"""Of the held-out problems; training draws from another split and other seeds."""

KINDS = ("word_problems", "tool_calls", "recall", "small_talk")
TARGETS = {"word_problems": 0.90, "tool_calls": 0.95, "recall": 0.95, "mtp_acceptance": 0.70}
"""What the embedded models must reach."""


def run(config: EngineConfig, *, count: int = 100, seed: int = SEED) -> dict[str, Any]:
    """Shares of right answers per kind, MTP acceptance, and what it took.

    `count` problems of each kind. `mtp_acceptance` is the share of the MTP head's first drafts, over all kinds, that
    were the very token the model went on with (None where nothing was drafted).
    """
    kinds = {kind: tasks.tasks(kind, "heldout", seed, count) for kind in KINDS}
    figures: dict[str, Any] = {"model": config.model, "count": count, "seed": seed}
    with LLM.load(config) as llm:
        begin = time.perf_counter()
        for kind, problems in kinds.items():
            answers = answer(llm, problems, label=f"{kind:<14}", progress=config.show_progress)
            figures[kind] = sum(map(_right, problems, answers)) / len(problems)
        stats = llm.stats()
        by_position = [a / p for a, p in zip(stats.draft_accepted, stats.draft_proposed) if p]
        figures["mtp_acceptance"] = by_position[0] if by_position else None
        figures["acceptance_by_position"] = by_position
        figures["tokens_per_forward"] = stats.generated_tokens / max(1, stats.decode_rows)
        if stats.forced_acceptance is not None:
            figures["forced_acceptance"] = stats.forced_acceptance
        figures |= {"generated_tokens": stats.generated_tokens, "prompt_tokens": stats.prompt_tokens,
                    "seconds": round(time.perf_counter() - begin, 1)}
    return figures


def variant(config: EngineConfig, spelled: str) -> EngineConfig:
    """`config` with the weights of a scheme: none, int8, ...; behind it +GLOB for tensors that are quantized too and
    -GLOB for those that are kept, as in int8+*in_proj_qkv*-*out_proj*. Raises `ConfigError`."""
    read = re.fullmatch(r"(\w+)((?:[+-][^+-]+)*)", spelled)
    if not read or read[1] not in ("none", *SCHEMES):
        raise ConfigError(f"--schemes {spelled} is not understood", hint=f"one of none, {', '.join(SCHEMES)}")
    globs = {sign: tuple(re.findall(rf"\{sign}([^+-]+)", read[2])) for sign in "+-"}
    scheme = None if read[1] == "none" else read[1]
    return dataclasses.replace(config, quantize=scheme, quantize_also=globs["+"], keep_bf16=globs["-"])


def run_schemes(config: EngineConfig, schemes: list[str], *, count: int = 100) -> Iterator[dict[str, Any]]:
    """For each scheme what `run` gives, its name, and what `kl.compare` says of other held-out problems of all kinds
    with their answers, against the model without `quantize`."""
    configs = [(spelled, variant(config, spelled)) for spelled in schemes]
    chat = kl.text_format(config)
    texts = [
        chat.encode(chat.render([*s.task.messages, s.reply], tools=s.task.tools or None, add_generation_prompt=False))
        for kind in KINDS
        for s in tasks.samples(kind, "heldout", SEED + 1, count, tokens=1000)
    ]
    plain = variant(config, "none")
    for spelled, one in configs:
        figures = run(one, count=count) | {"scheme": spelled}
        if one.quantize:
            figures |= kl.compare(plain, one, texts, longest=max(map(len, texts)), label=f"{spelled} KL")
        yield figures


def answer(
    llm: LLM, problems: list[tasks.Task], *, label: str = "generating", progress: bool = False
) -> list[Completion]:
    """Greedy answers to the problems, in their order."""
    requests = [
        llm.door.chatted(
            task.messages,
            llm.default_sampling(temperature=0.0, max_tokens=task.max_tokens),
            tools=task.tools or None,
            template_kwargs={"enable_thinking": task.enable_thinking},
        )
        for task in problems
    ]
    return llm.answer(requests, progress=progress, label=label)


def _right(task: tasks.Task, answer: Completion) -> bool:
    calls = [(call.name, call.arguments) for call in answer.tool_calls]
    return tasks.grade(task, answer.text, answer.reasoning, calls)


def table(figures: Mapping[str, Any]) -> str:
    """The figures beside their targets, for a terminal."""
    lines = [f"{figures['model']}: {figures['count']} held-out problems of each kind, greedy"]
    for kind in (*KINDS, "mtp_acceptance"):
        value, target = figures[kind], TARGETS.get(kind)
        shown = "no head" if value is None else f"{value:8.1%}"
        lines.append(f"  {kind:<16}{shown:>8}" + (f"   (target {target:.0%})" if target else ""))
    if figures["acceptance_by_position"]:
        shares = ", ".join(f"{share:.0%}" for share in figures["acceptance_by_position"])
        lines.append(f"  drafts accepted by position: {shares}; {figures['tokens_per_forward']:.2f} tokens per forward")
    if "forced_acceptance" in figures:
        lines.append("  BENCHMARK ONLY: acceptance was forced, the answers are wrong")
    rate = figures["generated_tokens"] / figures["seconds"]
    lines.append(
        f"  {figures['generated_tokens']:,} tokens generated after {figures['prompt_tokens']:,} of prompt "
        f"in {figures['seconds']:.0f} s ({rate:.0f} generated a second)"
    )
    return "\n".join(lines)


_COLUMNS = (
    ("scheme", "scheme", "", 32), ("word_problems", "words", ".1%", 7), ("tool_calls", "tools", ".1%", 7),
    ("recall", "recall", ".1%", 7), ("mtp_acceptance", "drafts", ".1%", 7), ("kl_mean", "KL mean", ".5f", 9),
    ("kl_p99", "KL 99 %", ".4f", 8), ("top1_agreement", "same top", ".2%", 8),
    ("bytes_per_token", "bytes a token", ",", 13),
)  # fmt: skip


def scheme_head() -> str:
    return "  ".join(f"{name:>{width}}" for _, name, _, width in _COLUMNS)


def scheme_row(figures: Mapping[str, Any]) -> str:
    """One scheme's figures under `scheme_head`."""
    values = [(figures.get(key), form, width) for key, _, form, width in _COLUMNS]
    return "  ".join(f"{'' if value is None else format(value, form):>{width}}" for value, form, width in values)
