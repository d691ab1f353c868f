"""How a request is served never changes its tokens: chunked = whole, batched = alone, preempted = never preempted.

Tokens and, where logits are compared, their very bits, on random checkpoints in float32.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import random_checkpoint

from tritium.cache import PagePool, SlotPool
from tritium.config import EngineConfig
from tritium.core import FinishReason, Request, SamplingParams, StepPlan
from tritium.engine import Engine
from tritium.sched import Limits, Scheduler

VOCAB = 211


@pytest.fixture(scope="module", params=["dense", "moe"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, seed: int) -> Engine:
    directory = tmp_path_factory.mktemp(request.param)
    random_checkpoint(
        directory, moe=request.param == "moe", layer_types="llfl", nk=1, nv=2, heads=4, kv_heads=2, seed=seed
    )
    return Engine.load(
        EngineConfig(
            model=str(directory),
            max_num_seqs=32,
            num_gpu_blocks_override=160,
            max_model_len=1024,
            probe_drafts=True,
            show_progress=False,
        )
    )


def serve(
    engine: Engine,
    requests: Iterable[Request],
    *,
    budget: int = 512,
    pages: int = 160,
    arrive: Callable[[int], int] = lambda i: 0,
    observe: Callable[[StepPlan, torch.Tensor], None] | None = None,
) -> dict[str, tuple[list[int], list[int | None], FinishReason]]:
    """Serves `requests`, the i-th arriving before step `arrive(i)`: (tokens, drafts, finish reason) of each."""
    scheduler = Scheduler(Limits(32, budget, 1024), PagePool(pages), SlotPool(32))
    run = Engine(
        engine.runner,
        scheduler,
        plan=engine.memory_plan,
        pages=scheduler._pages,
        slots=scheduler._slots,
        directory=Path(),
        generation_defaults={},
    )
    engine.runner.observer = observe
    waiting = sorted(enumerate(requests), key=lambda pair: arrive(pair[0]))
    out: dict[str, tuple[list[int], list[int | None], FinishReason]] = {}
    tokens: dict[str, list[int]] = {}
    drafts: dict[str, list[int | None]] = {}
    step = 0
    while waiting or run.has_work:
        while waiting and arrive(waiting[0][0]) <= step:
            request = waiting.pop(0)[1]
            tokens[request.id], drafts[request.id] = [], []
            run.add(request)
        for event in run.step():
            tokens[event.request_id] += event.tokens
            drafts[event.request_id] += event.drafts
            if event.finish_reason:
                out[event.request_id] = tokens[event.request_id], drafts[event.request_id], event.finish_reason
        step += 1
        assert step < 20_000
    stats = run.stats()
    assert stats.pages_used == stats.slots_used == stats.running == stats.waiting == 0
    serve.preemptions = stats.preemptions  # type: ignore[attr-defined]
    engine.runner.observer = None
    return out


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


def test_chunked_prefill_is_whole_prefill_for_every_chunk_size(engine: Engine, seed: int) -> None:
    ids = prompt(random.Random(seed), 75)
    whole = Logits()
    want = serve(engine, [request("r", ids)], observe=whole)
    for budget in range(1, len(ids)):
        chunked = Logits()
        assert serve(engine, [request("r", ids)], budget=budget, observe=chunked) == want, budget
        for position, logits in whole.rows.items():
            assert torch.equal(chunked.rows[position], logits), (budget, position)


def test_chunks_of_a_long_prompt(engine: Engine, seed: int) -> None:
    ids = prompt(random.Random(seed + 1), 700)
    want = serve(engine, [request("r", ids)], budget=1024)
    for budget in (64, 100, 128, 333, 512, 699):
        assert serve(engine, [request("r", ids)], budget=budget) == want, budget


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


def test_thirty_two_staggered_requests_are_each_alone(engine: Engine, seed: int) -> None:
    rng = random.Random(seed)
    requests = mixed_requests(rng, 32)
    arrivals = [rng.randrange(60) for _ in requests]
    together, alone = Logits(), Logits()
    got = serve(engine, again(requests), budget=96, arrive=lambda i: arrivals[i], observe=together)
    want: dict[str, object] = {}
    for r in again(requests):
        want |= serve(engine, [r], observe=alone)
    assert got == want
    assert together.rows.keys() == alone.rows.keys()
    for position, logits in alone.rows.items():
        assert torch.equal(together.rows[position], logits), position


def test_preempted_and_resumed_is_never_preempted(engine: Engine, seed: int) -> None:
    rng = random.Random(seed + 2)
    requests = [replace_tokens(r, 90) for r in mixed_requests(rng, 12, longest=120)]
    want = serve(engine, again(requests))
    assert serve.preemptions == 0  # type: ignore[attr-defined]
    arrivals = [rng.randrange(20) for _ in requests]
    assert serve(engine, again(requests), budget=70, pages=11, arrive=lambda i: arrivals[i]) == want
    assert serve.preemptions >= 5  # type: ignore[attr-defined]


def replace_tokens(r: Request, max_tokens: int) -> Request:
    return replace(r, sampling=r.sampling.replace(max_tokens=max_tokens))


def test_dirty_pools_change_nothing(engine: Engine, seed: int) -> None:
    """What earlier requests left in pages and slots reaches nobody."""
    requests = mixed_requests(random.Random(seed + 3), 6)
    want = serve(engine, again(requests))
    for cache in engine.runner.caches:
        for tensor in cache:
            tensor.fill_(float("nan"))
    assert serve(engine, again(requests)) == want
    for cache in engine.runner.caches:
        for tensor in cache:
            tensor.zero_()


def test_probing_drafts_changes_no_token(engine: Engine, seed: int) -> None:
    requests = mixed_requests(random.Random(seed + 4), 4)
    with_drafts = serve(engine, again(requests))
    engine.runner.probe_drafts = False
    without = serve(engine, again(requests))
    engine.runner.probe_drafts = True
    assert {k: (v[0], v[2]) for k, v in with_drafts.items()} == {k: (v[0], v[2]) for k, v in without.items()}
    assert all(draft is not None for _, drafts, _ in with_drafts.values() for draft in drafts)
