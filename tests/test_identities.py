"""How a request is served never changes its tokens: chunked = whole, batched = alone, preempted = never preempted.

Tokens and, where logits are compared, their very bits, on random checkpoints in float32.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from checkpoints import random_checkpoint
from serving import VOCAB, Logits, Served, again, mixed_requests, prompt, replace_tokens, request, serve

from tritium.config import EngineConfig
from tritium.core import Request
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
