"""How a request is served never changes its tokens: chunked = whole, batched = alone, preempted = never preempted.

Tokens and, where logits are compared, their very bits, on random checkpoints in float32.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from checkpoints import random_checkpoint
from serving import (
    VOCAB,
    Logits,
    Served,
    again,
    assemble,
    mixed_requests,
    prompt,
    replace_tokens,
    request,
    run,
    serve,
)

from tritium.config import EngineConfig
from tritium.core import EngineStats, FinishReason, Request, StepPlan
from tritium.draft.proposers import ChainedProposer, HeadProposer, NgramProposer, Proposer
from tritium.engine import Engine


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
            speculate="mtp:4",
            show_progress=False,
        )
    )


def test_chunked_prefill_is_whole_prefill_for_every_chunk_size(engine: Engine, seed: int) -> None:
    ids = prompt(random.Random(seed), 75)
    whole = Logits()
    want, _ = serve(engine, [request("r", ids)], observe=whole)
    for budget in range(1, len(ids)):
        chunked = Logits()
        assert serve(engine, [request("r", ids)], budget=budget, observe=chunked)[0] == want, budget
        for position, logits in whole.rows.items():
            assert torch.equal(chunked.rows[position], logits), (budget, position)


def test_chunks_of_a_long_prompt(engine: Engine, seed: int) -> None:
    ids = prompt(random.Random(seed + 1), 700)
    want, _ = serve(engine, [request("r", ids)], budget=1024)
    for budget in (64, 100, 128, 333, 512, 699):
        assert serve(engine, [request("r", ids)], budget=budget)[0] == want, budget


def test_thirty_two_staggered_requests_are_each_alone(engine: Engine, seed: int) -> None:
    rng = random.Random(seed)
    requests = mixed_requests(rng, 32)
    arrivals = [rng.randrange(60) for _ in requests]
    together, alone = Logits(), Logits()
    got, _ = serve(engine, again(requests), budget=96, arrive=lambda i: arrivals[i], observe=together)
    want: Served = {}
    for r in again(requests):
        want |= serve(engine, [r], observe=alone)[0]
    assert got == want
    assert together.rows.keys() == alone.rows.keys()
    for position, logits in alone.rows.items():
        assert torch.equal(together.rows[position], logits), position


def test_preempted_and_resumed_is_never_preempted(engine: Engine, seed: int) -> None:
    rng = random.Random(seed + 2)
    requests = [replace_tokens(r, 90) for r in mixed_requests(rng, 12, longest=120)]
    want, never = serve(engine, again(requests))
    assert never.preemptions == 0
    arrivals = [rng.randrange(20) for _ in requests]
    got, often = serve(engine, again(requests), budget=70, pages=11, arrive=lambda i: arrivals[i])
    assert got == want
    assert often.preemptions >= 5


def test_dirty_pools_change_nothing(engine: Engine, seed: int) -> None:
    """What earlier requests left in pages and slots reaches nobody."""
    requests = mixed_requests(random.Random(seed + 3), 6)
    want, _ = serve(engine, again(requests))
    for cache in engine.runner.caches:
        for tensor in cache:
            tensor.fill_(float("nan"))
    assert serve(engine, again(requests))[0] == want
    for cache in engine.runner.caches:
        for tensor in cache:
            tensor.zero_()


# --- speculation --------------------------------------------------------------------------------------------------


class Scripted:
    """Guesses what `guess(request, position)` says."""

    def __init__(self, guess: Callable[[Request, int], int]) -> None:
        self.guess = guess

    def propose(self, request: Request, most: int) -> list[int]:
        return [self.guess(request, request.num_tokens + i) for i in range(most)]

    def forget(self, request_id: str) -> None:
        pass


def test_drafts_change_no_token_whoever_guesses_and_however_many(engine: Engine, seed: int) -> None:
    """Batched with random arrivals, with preemption; greedy, sampled and penalised; right and wrong drafts."""
    rng = random.Random(seed + 4)
    requests = [replace_tokens(r, 30) for r in mixed_requests(rng, 10, longest=90)]
    want, _ = serve(engine, again(requests))
    truth = {r.id: r.prompt_ids + want[r.id][0] + [0] * 8 for r in requests}

    def right(request: Request, position: int) -> int:
        return truth[request.id][position]

    def wrong(request: Request, position: int) -> int:
        return (right(request, position) + 1) % VOCAB

    def mixed(request: Request, position: int) -> int:
        return right(request, position) if position % 3 else wrong(request, position)

    proposers: dict[str, Proposer] = {
        "head": HeadProposer(),
        "ngram": NgramProposer(),
        "both": ChainedProposer(HeadProposer(), NgramProposer()),
        "right": Scripted(right),
        "wrong": Scripted(wrong),
        "mixed": Scripted(mixed),
    }
    arrivals = [rng.randrange(20) for _ in requests]
    for name, proposer in proposers.items():
        for depth in (1, 2, 4):
            got, stats = serve(
                engine,
                again(requests),
                budget=70,
                pages=11 if depth == 2 else 160,
                arrive=lambda i: arrivals[i],
                proposer=proposer,
                depth=lambda request, depth=depth: depth,
            )
            assert got == want, (name, depth)
            if name == "right":
                assert stats.draft_accepted == stats.draft_proposed
                assert stats.draft_proposed[depth - 1] > 0
            if name == "wrong":
                assert sum(stats.draft_proposed) > 0 == sum(stats.draft_accepted)


def test_depth_may_change_at_every_step(engine: Engine, seed: int) -> None:
    rng = random.Random(seed + 5)
    requests = mixed_requests(rng, 6, longest=90)
    want, _ = serve(engine, again(requests))
    got, _ = serve(engine, again(requests), proposer=HeadProposer(), depth=lambda request: rng.randrange(5))
    assert got == want


def test_one_step_ahead_is_the_plain_loop(engine: Engine, seed: int) -> None:
    """Ends by length, by tokens that nobody foresaw, by aborts; few pages, so that requests are preempted; what ended
    is taken up again by the next turn, so that the state at its end must be right."""
    rng = random.Random(seed + 5)
    stops = tuple(rng.sample(range(1, VOCAB), 8))
    first = [
        replace(r, sampling=replace(r.sampling, max_tokens=90, stop_token_ids=stops[: rng.choice((0, 1, 8))]))
        for r in mixed_requests(rng, 24, longest=100)
    ]
    arrivals = [i // 8 * 60 + rng.randrange(10) for i in range(len(first))]
    leaving = {i: arrivals[i] + rng.randrange(30) for i in rng.sample(range(24), 4)}

    steps_ahead = 0

    def served(ahead: bool, pages: int) -> tuple[Served, Served, EngineStats]:
        loop = assemble(engine, budget=128, pages=pages, checkpoints=60, ahead=ahead)
        foreseen = loop.scheduler.plan_next

        def counted(plan: StepPlan) -> StepPlan | None:
            nonlocal steps_ahead
            following = foreseen(plan)
            steps_ahead += following is not None
            return following

        loop.scheduler.plan_next = counted  # type: ignore[method-assign]
        once, _ = run(loop, again(first), arrive=lambda i: arrivals[i])
        turns = [request(f"{r.id}-2", [*r.prompt_ids, *once[r.id][0], 7, 8, 9]) for r in first]
        twice, stats = run(loop, turns, arrive=lambda i: 2 * i, leave=leaving.get)
        return once, twice, stats

    for pages in (10, 150):
        plain, ahead = served(False, pages), served(True, pages)
        assert ahead[0] == plain[0]
        assert all(ahead[1][name] == plain[1][name] for name in ahead[1].keys() & plain[1].keys())
        assert any(reason is FinishReason.STOP for _, reason in plain[0].values())
        if pages == 10:
            assert ahead[2].preemptions > 0
        else:
            hits = ahead[2].prefix_hit_tokens, plain[2].prefix_hit_tokens
            assert hits[0] == hits[1] > 0, "the state at the end of an answer serves its next turn"
    assert steps_ahead > 20
