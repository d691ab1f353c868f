"""Requests through an engine of the tests' own making: its runner, other pools, limits, cache and proposer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from tritium.cache import PagePool, PrefixCache, SlotPool
from tritium.core import EngineStats, FinishReason, Request, SamplingParams, StepPlan
from tritium.draft.proposers import Proposer
from tritium.engine import Engine
from tritium.sched import Limits, Scheduler

VOCAB = 211

Served = dict[str, tuple[list[int], FinishReason]]


def assemble(
    engine: Engine,
    *,
    budget: int = 512,
    pages: int = 160,
    seqs: int = 32,
    checkpoints: int | None = None,
    host: int = 0,
    proposer: Proposer | None = None,
    depth: Callable[[Request], int] = lambda request: 0,
    ahead: bool = False,
) -> Engine:
    """An engine over the same network and memory. `checkpoints`: slots of the prefix cache; None: no prefix cache.
    `host`: places for evicted checkpoints in host memory."""
    page_pool, slots = PagePool(pages), SlotPool(seqs + (checkpoints or 0))
    cache = None if checkpoints is None else PrefixCache(page_pool, slots, host=SlotPool(host))
    limits = Limits(seqs, budget, engine.max_model_len)
    engine.runner.run_head = proposer is not None
    return Engine(
        engine.runner,
        Scheduler(limits, page_pool, slots, cache=cache, proposer=proposer, depth=depth),
        memory_plan=engine.memory_plan,
        directory=Path(),
        generation_defaults={},
        ahead=ahead,
    )


def run(
    engine: Engine,
    requests: Iterable[Request],
    *,
    arrive: Callable[[int], int] = lambda i: 0,
    leave: Callable[[int], int | None] = lambda i: None,
    observe: Callable[[StepPlan, torch.Tensor], None] | None = None,
) -> tuple[Served, EngineStats]:
    """Serves `requests`, the i-th arriving before step `arrive(i)` and aborted before step `leave(i)`: tokens and
    finish reason of each that came to its end. Nothing may be held after that but by the prefix cache."""
    engine.runner.observer = observe
    waiting = sorted(enumerate(requests), key=lambda pair: arrive(pair[0]))
    leaving = [(leave(i), request.id) for i, request in waiting]
    out: Served = {}
    tokens: dict[str, list[int]] = {}
    step = 0
    while waiting or engine.has_work:
        while waiting and arrive(waiting[0][0]) <= step:
            request = waiting.pop(0)[1]
            tokens[request.id] = []
            engine.add(request)
        for at, name in leaving:
            if at == step:
                engine.abort(name)
        for event in engine.step():
            tokens[event.request_id] += event.tokens
            if event.finish_reason:
                out[event.request_id] = tokens[event.request_id], event.finish_reason
        step += 1
        assert step < 20_000
    stats = engine.stats()
    assert stats.pages_used == stats.slots_used == stats.running == stats.waiting == 0
    engine.runner.observer = None
    return out, stats


def serve(
    engine: Engine,
    requests: Iterable[Request],
    *,
    arrive: Callable[[int], int] = lambda i: 0,
    observe: Callable[[StepPlan, torch.Tensor], None] | None = None,
    **options: object,
) -> tuple[Served, EngineStats]:
    """`run` on an engine that `assemble` makes for it."""
    return run(assemble(engine, **options), requests, arrive=arrive, observe=observe)  # type: ignore[arg-type]


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(1, VOCAB) for _ in range(length)]


def request(name: str, ids: list[int], **sampling: object) -> Request:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
    return Request(id=name, prompt_ids=list(ids), sampling=params, seed=params.seed or 0)


class Logits:
    """Logits at every position of every request, by request and position."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], torch.Tensor] = {}

    def __call__(self, plan: StepPlan, logits_TV: torch.Tensor) -> None:
        t = 0
        for row in plan.rows:
            for i in range(len(row.ids)):
                self.rows[row.request_id, row.start + i] = logits_TV[t].clone()
                t += 1


def mixed_requests(rng: random.Random, count: int, longest: int = 200) -> list[Request]:
    """Greedy and sampled, with penalties and without, long and short."""
    out = []
    for i in range(count):
        sampling: dict[str, object] = {"max_tokens": rng.randint(1, 40), "seed": rng.randrange(2**40)}
        if i % 3:
            sampling |= {"temperature": rng.choice((0.5, 1.0, 1.5)), "top_p": rng.choice((1.0, 0.9))}
            sampling |= {"top_k": rng.choice((0, 20)), "min_p": rng.choice((0.0, 0.05))}
        if i % 4 == 1:
            sampling |= {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2}
        out.append(request(f"r{i}", prompt(rng, rng.randint(1, longest)), **sampling))
    return out


def again(requests: list[Request]) -> list[Request]:
    return [Request(id=r.id, prompt_ids=list(r.prompt_ids), sampling=r.sampling, seed=r.seed) for r in requests]


def replace_tokens(r: Request, max_tokens: int) -> Request:
    return replace(r, sampling=replace(r.sampling, max_tokens=max_tokens))
