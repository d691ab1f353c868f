"""Speculation: how deep it goes, that it draws from the target's distribution, and what it brings on a trained model.

That drafts change no token is in test_identities.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from tritium.cache import PagePool, SlotPool
from tritium.cli.main import cli
from tritium.config import EngineConfig
from tritium.core import ConfigError, Request, RowPlan, RowResult, SamplingParams, StepPlan, StepResult
from tritium.draft.depth import DepthPolicy
from tritium.draft.proposers import HeadProposer, Proposer
from tritium.nn.batch import AttentionCache
from tritium.runner import Runner
from tritium.sched import Limits, Scheduler

# --- depth against simulated machines ------------------------------------------------------------------------------

Rate = Callable[[int, int], float]
"""Chance that the i-th draft of a step is right, from (step, i)."""


def simulate(
    policy: DepthPolicy,
    rows: int,
    accept: Rate,
    *,
    token: float,
    draft: float,
    guess: float,
    steps: int = 2000,
    seed: int = 0,
    name: str = "r",
) -> tuple[float, list[float]]:
    """(speed as a multiple of that without drafts, mean depth of every step).

    A step takes 10 + `token` a row + `draft` a verified draft, with noise and now and then a stall, and `guess` for
    every draft guessed.
    """
    rng = random.Random(seed)
    requests = [Request(f"{name}{i}", [1], SamplingParams(), seed=0) for i in range(rows)]
    guessed = [0] * rows
    made, seconds, plain, depths = 0, 0.0, 0.0, []
    for step in range(steps):
        wanted = [policy.depth(request) for request in requests]
        for request, count in zip(requests, guessed):
            request.drafts = (1,) * count
        verified = [len(policy.propose(request, most)) for request, most in zip(requests, wanted)]
        plan, results = [], []
        for request, now, then in zip(requests, verified, wanted):
            plan.append(
                RowPlan(
                    request.id, (1,) * (1 + now), 100, (1, 2), 1, True, request.sampling, 0,
                    num_drafts=now, want_drafts=then,
                )
            )  # fmt: skip
            right = next((i for i in range(now) if rng.random() >= accept(step, i)), now)
            results.append(RowResult(request.id, tokens=(1,) * (right + 1)))
            made += right + 1
        noise = rng.uniform(0.95, 1.05) * (4.0 if rng.random() < 0.003 else 1.0)
        head = guess * sum(wanted)
        forward = (10 + token * rows + draft * sum(verified)) * noise
        policy.observe(StepPlan(tuple(plan)), StepResult(tuple(results)), forward + head, head)
        seconds += forward + head
        plain += (10 + token * rows) * noise
        guessed = wanted
        depths.append(sum(wanted) / rows)
    return (made / seconds) / (rows * steps / plain), depths


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize(
    ("rates", "draft", "guess"),
    [((0.95, 0.7, 0.5), 0.1, 0.3), ((0.9, 0.8, 0.8), 1.0, 0.3), ((0.5, 0.3, 0.1), 0.5, 0.5), ((0.02,) * 3, 0.1, 0.1)],
)
def test_auto_is_never_slower_and_takes_what_pays(
    rows: int, rates: tuple[float, ...], draft: float, guess: float, seed: int
) -> None:
    speed, depths = simulate(
        DepthPolicy(3), rows, lambda step, i: rates[i], token=0.5, draft=draft, guess=guess, seed=seed
    )
    best = max((_speed_of(k, rows, rates, draft, guess), k) for k in range(4))
    assert speed >= max(0.97, 0.9 * best[0])
    if best[1] == 0:
        assert sum(depths[-500:]) / 500 < 0.1


def _speed_of(k: int, rows: int, rates: tuple[float, ...], draft: float, guess: float) -> float:
    tokens = 1 + sum(math.prod(rates[: i + 1]) for i in range(k))
    return tokens * (10 + 0.5 * rows) / (10 + rows * (0.5 + k * (draft + guess)))


def test_it_goes_to_nothing_and_comes_back(seed: int) -> None:
    """Text that cannot be guessed, then text that can."""
    policy = DepthPolicy(3)
    speed, depths = simulate(policy, 4, lambda step, i: 0.0, token=0.5, draft=0.3, guess=0.3, seed=seed)
    assert speed >= 0.97
    assert sum(depths[500:]) / len(depths[500:]) < 0.03
    speed, depths = simulate(
        policy, 4, lambda step, i: 0.95, token=0.5, draft=0.3, guess=0.3, seed=seed, name="s", steps=4000
    )
    assert speed > 1.3
    assert sum(depths[-200:]) / 200 > 2.9


def test_requests_differ_in_depth(seed: int) -> None:
    """Rows that are guessed well and rows that are not share a batch."""
    policy = DepthPolicy(3)
    good = {f"r{i}" for i in range(0, 8, 2)}
    requests = [Request(f"r{i}", [1], SamplingParams(), seed=0) for i in range(8)]
    rng = random.Random(seed)
    for _ in range(300):
        rows, results, drafts = [], [], 0
        for request in requests:
            depth = policy.depth(request)
            drafts += depth
            rows.append(
                RowPlan(
                    request.id, (1,) * (1 + depth), 9, (1,), 1, True, request.sampling, 0,
                    num_drafts=depth, want_drafts=depth,
                )
            )  # fmt: skip
            right = depth if request.id in good or rng.random() < 0.05 else 0
            results.append(RowResult(request.id, tokens=(1,) * (right + 1)))
        policy.observe(StepPlan(tuple(rows)), StepResult(tuple(results)), 10 + 0.8 * drafts, 0.2 * drafts)
    assert all(policy.depth(request) == 3 for request in requests if request.id in good)
    assert all(policy.depth(request) == 0 for request in requests if request.id not in good)


def test_seconds_saved_are_those_of_a_run_without(seed: int) -> None:
    policy = DepthPolicy(2)
    simulate(policy, 2, lambda step, i: 1.0, token=1.0, draft=0.0, guess=0.0, steps=1000, seed=seed)
    # Three tokens a step for the price of one: of 3,000 steps' worth of tokens, 2,000 steps were saved.
    assert policy.seconds_saved == pytest.approx(2000 * 12, rel=0.05)


# --- the distribution ----------------------------------------------------------------------------------------------

VOCAB = 12
NO_CACHE = [AttentionCache(torch.empty(0), torch.empty(0))]


class Chain:
    """In the place of a network: the next token's logits depend on the last token alone, by a table. Its head has a
    table of its own, nearly the same."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = 2 * torch.randn(VOCAB, VOCAB, generator=generator)
        self.guesses = self.table + 0.7 * torch.randn(VOCAB, VOCAB, generator=generator)
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(conv_width=4)
        self.mtp = object()

    def forward(self, batch: SimpleNamespace, caches: object) -> torch.Tensor:
        return self.table[batch.ids_T]

    def draft_hidden(self, hidden_TH: torch.Tensor, next_ids_T: torch.Tensor, *rest: object) -> torch.Tensor:
        return self.guesses[next_ids_T]

    def logits(self, hidden_SH: torch.Tensor) -> torch.Tensor:
        return hidden_SH


class Adversary:
    """Always the likeliest token, or always the least likely one."""

    def __init__(self, chain: Chain, *, likely: bool) -> None:
        self.next = (chain.table.argmax(-1) if likely else chain.table.argmin(-1)).tolist()

    def propose(self, request: Request, most: int) -> list[int]:
        out = [(request.output_ids or request.prompt_ids)[-1]]
        for _ in range(most):
            out.append(self.next[out[-1]])
        return out[1:]

    def forget(self, request_id: str) -> None:
        pass


def generate(chain: Chain, sampling: SamplingParams, proposer: Proposer | None, requests: int) -> list[list[int]]:
    """Outputs of many requests through scheduler, runner and sampler."""
    runner = Runner(chain, NO_CACHE, run_head=isinstance(proposer, HeadProposer))  # type: ignore[arg-type]
    scheduler = Scheduler(
        Limits(512, 4096, 1024), PagePool(4096), SlotPool(512), proposer=proposer, depth=lambda request: 2
    )
    everyone = [Request(str(i), [i % VOCAB], sampling, seed=i) for i in range(requests)]
    for request in everyone:
        scheduler.add(request)
    while (plan := scheduler.plan()) is not None:
        scheduler.commit(plan, runner.launch(plan).result())
    return [request.output_ids for request in everyone]


def probabilities(logits: list[float], temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """The distribution that the parameters ask for, stated plainly."""
    weights = {i: math.exp((x - max(logits)) / temperature) for i, x in enumerate(logits)}
    kept = dict(sorted(weights.items(), key=lambda item: -item[1])[:top_k])
    total, mass, out = sum(kept.values()), 0.0, {}
    for token, weight in kept.items():
        if mass < top_p * total:
            out[token] = weight
        mass += weight
    return {token: weight / sum(out.values()) for token, weight in out.items()}


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("guesses", ["head", "likely", "unlikely"])
def test_drafts_leave_the_distribution_as_it_is(temperature: float, guesses: str) -> None:
    """Chi-square over 100,000 draws against the exact distribution; and the very tokens of a run without drafts."""
    chain = Chain(seed=3)
    sampling = SamplingParams(temperature=temperature, top_k=8, top_p=0.9, max_tokens=200, ignore_eos=True)
    proposer = HeadProposer() if guesses == "head" else Adversary(chain, likely=guesses == "likely")
    outputs = generate(chain, sampling, proposer, 512)
    assert outputs[:64] == generate(chain, sampling, None, 64)
    seen: dict[int, Counter[int]] = {token: Counter() for token in range(VOCAB)}
    for i, output in enumerate(outputs):
        for before, after in zip([i % VOCAB, *output], output):
            seen[before][after] += 1
    assert sum(counts.total() for counts in seen.values()) >= 100_000
    statistic, freedom = 0.0, 0
    for before, counts in seen.items():
        expected = probabilities(chain.table[before].tolist(), temperature, 8, 0.9)
        assert counts.keys() <= expected.keys()
        if counts:
            n = counts.total()
            statistic += sum((counts[t] - n * p) ** 2 / (n * p) for t, p in expected.items())
            freedom += len(expected) - 1
    p_value = float(torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(statistic / 2)))
    assert p_value > 0.01


# --- benchmarks only -------------------------------------------------------------------------------------------------


def test_forced_acceptance_is_of_the_rate_asked_for_and_serve_refuses_it() -> None:
    chain = Chain(seed=3)
    runner = Runner(chain, NO_CACHE, force_acceptance=0.6)  # type: ignore[arg-type]
    wrong = Adversary(chain, likely=False)
    scheduler = Scheduler(Limits(64, 512, 1024), PagePool(512), SlotPool(64), proposer=wrong, depth=lambda request: 1)
    for i in range(64):
        scheduler.add(Request(str(i), [1], SamplingParams(max_tokens=100, ignore_eos=True), seed=i))
    accepted = proposed = 0
    while (plan := scheduler.plan()) is not None:
        for event in scheduler.commit(plan, runner.launch(plan).result()):
            accepted += event.num_accepted
            proposed += event.num_drafts
    assert accepted / proposed == pytest.approx(0.6, abs=0.03)

    refused = CliRunner().invoke(cli, ["serve", "--benchmark-force-acceptance", "0.5"])
    assert isinstance(refused.exception, ConfigError)
    assert "--yes-outputs-are-wrong" in (refused.exception.hint or "")
    with pytest.raises(ConfigError, match="within"):
        EngineConfig(benchmark_force_acceptance=1.5)


# --- on the embedded model ------------------------------------------------------------------------------------------


def test_the_embedded_models_guess_well_and_answer_the_same() -> None:
    from tritium.api import LLM
    from tritium.eval import tasks, tiny
    from tritium.models.checkpoint import resolve

    if not Path(resolve("tritium-dense", None, None), "model.safetensors").exists():
        pytest.skip("the embedded model is not in this checkout")
    problems = tasks.tasks("word_problems", "heldout", 7, 8) + tasks.tasks("tool_calls", "heldout", 7, 4)
    texts = {}
    for speculate in ("none", "auto", "mtp:3"):
        config = EngineConfig(max_num_seqs=4, speculate=speculate, show_progress=False, num_threads=1)
        with LLM.load(config) as llm:
            answers = tiny.answer(llm, problems)
            texts[speculate] = [answer.token_ids for answer in answers]
            stats = llm.stats()
        if speculate != "none":
            assert texts[speculate] == texts["none"]
            assert stats.draft_accepted[0] / stats.draft_proposed[0] >= 0.70
    assert stats.generated_tokens / stats.decode_rows >= 1.8
    # What the callers are told adds up to what the engine counted.
    assert sum(answer.usage.accepted_drafts for answer in answers) == sum(stats.draft_accepted)
    guessed = sum(answer.usage.accepted_drafts + answer.usage.rejected_drafts for answer in answers)
    assert guessed == sum(stats.draft_proposed)
