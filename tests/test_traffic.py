"""Random traffic in every way to serve it, against the plainest: every token, log-probability and bit of the logits.

Requests share prefixes at random, also with what others answered. Each combination of cache, proposer, batching and
loop serves some of them twice over; the plainest way is one request at a time, no cache, no drafts, no step ahead. A
slice runs by default; `make identities` runs all combinations on random checkpoints and on the embedded models, in
parts that may run side by side, and traffic that Hypothesis makes (and cuts down to the least that fails) on the
smallest pools. PYTEST_ARGS="--seed N" is other traffic on other checkpoints.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from checkpoints import random_checkpoint, random_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from serving import again, assemble, request

from tritium.cache import pages_for
from tritium.chat import load_chat
from tritium.config import EngineConfig
from tritium.core import PAGE_TOKENS, CacheCall, FinishReason, Request, StepPlan
from tritium.draft.depth import DepthPolicy
from tritium.draft.proposers import ChainedProposer, HeadProposer, NgramProposer
from tritium.engine import Engine
from tritium.eval import tasks
from tritium.sched.scheduler import Scheduler

CACHES = ("off", "on", "restored", "evicted", "hosted")
"""evicted: too few pages for what runs; hosted: too few slots for the checkpoints, which come back from host memory."""
PROPOSERS = ("none", "mtp:1", "mtp:2", "mtp:3", "mtp:4", "ngram", "chained", "auto", "right", "wrong")
BATCHING = ("alone", "together", "staggered", "chunks")
WAYS = list(itertools.product(CACHES, PROPOSERS, BATCHING, (False, True)))
POOL, FIRST, THEN = 40, 2, 6
"""Requests of a checkpoint, and how many of them each combination serves at first and then."""
SEQS, PAGES, CHECKPOINTS = 8, 64, 24
TINY = {"pages": 4, "seqs": 4, "checkpoints": 2}
"""Room for the longest request and no more."""
PARTS = 8


@dataclass
class Answer:
    """What the engine told of a request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[object] = field(default_factory=list)
    prompt_logprobs: list[object] = field(default_factory=list)
    reason: FinishReason | None = None


def drive(engine: Engine, requests: list[Request], arrive: list[int], leave: dict[int, int]) -> list[Answer]:
    """Serves requests, the i-th from step `arrive[i]`, aborted before step `leave[i]`; nothing is held after that."""
    answers = {each.id: Answer() for each in requests}
    for step in range(20_000):
        for i, each in enumerate(requests):
            if arrive[i] == step:
                engine.add(each)
            if leave.get(i) == step:
                engine.abort(each.id)
        if step >= max(arrive) and not engine.has_work:
            break
        for event in engine.step():
            answer = answers[event.request_id]
            answer.tokens += event.tokens
            answer.logprobs += event.logprobs
            answer.prompt_logprobs += event.prompt_logprobs
            answer.reason = event.finish_reason
        each_has_one_holder(engine.scheduler)
    stats = engine.stats()
    assert stats.pages_used == stats.slots_used == stats.running == stats.waiting == 0
    return list(answers.values())


def each_has_one_holder(scheduler: Scheduler) -> None:
    """Every page is free, or in one node of the tree, or one request's own."""
    reuse, held = scheduler.reuse, list(scheduler._pages._free)
    held += [node.page for node in reuse.cache.walk()]
    for each, share in reuse._shares.items():
        own = share.lease.node.end // PAGE_TOKENS + (share.lease.tail is not None)
        held += each.pages[own:]
    assert sorted(held) == list(range(1, len(held) + 1)), "a page has two holders, or none"


class Oracle:
    """Guesses the plain answer, or anything but that."""

    def __init__(self, world: World, *, right: bool) -> None:
        self.world, self.off = world, 0 if right else 1

    def propose(self, request: Request, most: int) -> list[int]:
        truth, _ = self.world.pool[int(request.id.split("/")[1])]
        known = [*truth.prompt_ids, *self.world.answers[truth.id].tokens, *[0] * most]
        return [(token + self.off) % self.world.vocab for token in known[request.num_tokens :][:most]]

    def forget(self, request_id: str) -> None:
        pass


class World:
    """A checkpoint, requests to it, and what each is told in the plainest way."""

    def __init__(self, model: str, kept: Path, rng: random.Random, pool: int = POOL) -> None:
        self.rng, self.counts = rng, Counter[str]()
        self.engine = Engine.load(EngineConfig(
            model=model, dtype="float32", speculate="mtp:4", max_num_seqs=SEQS, num_gpu_blocks_override=PAGES,
            num_checkpoints=CHECKPOINTS, swap_space=0.02, max_model_len=512, cache_dir=str(kept), num_threads=1,
            show_progress=False))  # fmt: skip
        self.vocab = self.engine.model_config.vocab_size
        self.texts: list[list[int]] = []
        if model.startswith("tritium-"):
            chat = load_chat(self.engine.directory)
            problems = tasks.tasks("word_problems", "heldout", rng.randrange(2**31), 24)
            self.texts = [chat.encode(chat.render(each.messages))[-150:] for each in problems]
        self.answers: dict[str, Answer] = {}
        self.pool: list[tuple[Request, Answer]] = []
        self.logits: dict[int, torch.Tensor] = {}
        """[positions, V] of each request."""
        while len(self.pool) < pool:
            ids = self.prompt()
            each = request(f"plain/{len(self.pool)}", ids, **self.sampling(len(ids)))
            plain = assemble(self.engine, budget=512, seqs=1, pages=PAGES)
            parts: list[torch.Tensor] = []
            self.engine.runner.observer = lambda plan, logits_TV, parts=parts: parts.append(logits_TV)
            [answer] = drive(plain, again([each]), [0], {})
            self.logits[len(self.pool)] = torch.cat(parts)
            self.answers[each.id] = answer
            self.pool.append((each, answer))

    def compare(self, plan: StepPlan, logits_TV: torch.Tensor) -> None:
        """Tokens alone would forgive a state that is a little wrong, or all wrong on a network that hardly minds."""
        at = 0
        for row in plan.rows:
            want = self.logits[int(row.request_id.split("/")[1])][row.start : row.stop - row.num_drafts]
            assert torch.equal(logits_TV[at : at + len(want)], want), f"{row.request_id} from {row.start}"
            at += len(row.ids)

    def prompt(self) -> list[int]:
        """Most begin like one before, some with its answer: the next turn of a chat."""
        rng = self.rng
        own = rng.choice(self.texts) if self.texts else [rng.randrange(1, self.vocab) for _ in range(150)]
        if not self.texts and rng.random() < 0.3:
            own = own[:7] * 20  # something for n-grams
        own = own[-rng.randint(1, 120) :]
        if not self.pool or rng.random() < 0.25:
            return own
        before, answer = rng.choice(self.pool)
        ids = [*before.prompt_ids, *answer.tokens]
        places = (len(ids), len(before.prompt_ids), rng.randint(1, len(ids)), rng.randint(1, len(ids)) // 64 * 64)
        return [*ids[: rng.choice(places)], *own[: rng.randint(1, 40)]][:208]

    def sampling(self, length: int) -> dict[str, object]:
        """Every other answer goes on to another page, which somebody else may have to give up."""
        rng = self.rng
        most = rng.choice((rng.randint(1, 48), min(48, 66 - length % 64)))
        asked: dict[str, object] = {"max_tokens": most, "seed": rng.randrange(2**40)}
        if rng.random() < 0.6:
            asked |= {"temperature": rng.choice((0.3, 0.7, 1.3)), "top_p": rng.choice((1.0, 0.9))}
            asked |= {"top_k": rng.choice((0, 20))}
        if rng.random() < 0.2:
            asked |= {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2}
        if rng.random() < 0.3:
            asked |= {"logprobs": rng.randint(0, 3)}
        if rng.random() < 0.1:
            asked |= {"prompt_logprobs": rng.randint(0, 2)}
        if rng.random() < 0.3:
            stops = tuple(rng.sample(range(self.vocab), self.vocab // 20))
            asked |= {"stop_token_ids": stops[: rng.choice((8, None))], "min_tokens": rng.randint(0, 5)}
            asked["max_tokens"] = 48
        return asked

    def serve(self, way: tuple[str, str, str, bool], rng: random.Random) -> None:
        """Two waves of requests in this way, each compared with the plainest."""
        cache, _, batching, _ = way
        start = rng.randrange(len(self.pool))
        near = [(start + i) % len(self.pool) for i in range(16)]
        if cache == "evicted":  # all ask for pages while they run
            near = [i for i in near if self.grows(i)] or near
        chosen = rng.choices(near, k=THEN)
        loop = self.loop(way, rng)
        self.engine.runner.observer = self.compare
        for wave, picks in enumerate((chosen[:FIRST], chosen)):
            if wave and cache == "restored":
                loop.keep(CacheCall("", "save"))
                self.count(loop, way)
                loop = self.loop(way, rng)
                loop.keep(CacheCall("", "load"))
            requests = [replace(each, id=f"{wave}.{n}/{i}")
                        for n, (i, each) in enumerate(zip(picks, again([self.pool[i][0] for i in picks])))]  # fmt: skip
            staggered = batching in ("staggered", "chunks")
            arrive = [rng.randrange(30) if staggered else 0 for _ in picks]
            leave = {i: at + rng.randrange(1, 40) for i, at in enumerate(arrive) if staggered and rng.random() < 0.2}
            for i, got in zip(picks, drive(loop, requests, arrive, leave), strict=True):
                want = self.pool[i][1]
                if got.reason is None:  # aborted: as far as it came
                    want = Answer(want.tokens[: len(got.tokens)], want.logprobs[: len(got.logprobs)],
                                  want.prompt_logprobs[: len(got.prompt_logprobs)])  # fmt: skip
                    self.counts["aborted"] += 1
                assert got == want, f"request {i} of wave {wave}"
                self.counts["compared"] += 1
        self.count(loop, way)

    def grows(self, i: int) -> bool:
        asked, answer = self.pool[i]
        return pages_for(len(asked.prompt_ids) + len(answer.tokens) - 1) > pages_for(len(asked.prompt_ids))

    def loop(self, way: tuple[str, str, str, bool], rng: random.Random) -> Engine:
        (cache, proposer, batching, ahead), host = way, min(24, self.engine.memory_plan.num_host_checkpoints)
        options: dict[str, object] = {"seqs": SEQS, "pages": PAGES}
        options["checkpoints"] = None if cache == "off" else CHECKPOINTS
        if cache == "evicted":
            options |= {**TINY, "host": rng.choice((0, host))}
        if cache == "hosted":
            options |= {"seqs": 2, "checkpoints": 1, "host": host}
        if batching == "alone":
            options["seqs"] = 1
        depth = proposer.rpartition(":")[2]
        most = int(depth) if depth.isdecimal() else 0
        head, ngram, policy = HeadProposer(), NgramProposer(), DepthPolicy(4)
        guesses = {
            "none": None, "ngram": ngram, "chained": ChainedProposer(head, ngram), "auto": policy,
            "right": Oracle(self, right=True), "wrong": Oracle(self, right=False),
        }.get(proposer, head)  # fmt: skip
        of = policy.depth if proposer == "auto" else lambda request: most or (rng.randrange(5) if guesses else 0)
        budget = {"staggered": rng.choice((64, 100, 200)), "chunks": rng.randint(5, 64)}.get(batching, 512)
        loop = assemble(self.engine, budget=budget, proposer=guesses, depth=of, ahead=ahead, **options)  # type: ignore[arg-type]
        loop.files = self.engine.files
        loop.policy = policy if proposer == "auto" else None
        planned = loop.scheduler.plan_next

        def counted(plan):
            following = planned(plan)
            self.counts["steps ahead"] += following is not None
            return following

        loop.scheduler.plan_next = counted  # type: ignore[method-assign]
        return loop

    def count(self, loop: Engine, way: tuple[str, str, str, bool]) -> None:
        cache, proposer, _, _ = way
        stats = loop.stats()
        accepted, proposed = sum(stats.draft_accepted), sum(stats.draft_proposed)
        assert proposed == 0 or proposer != "none"
        assert accepted == 0 or proposer != "wrong"
        assert accepted == proposed or proposer != "right"
        self.counts[f"hit, {cache}"] += stats.prefix_hit_tokens
        self.counts[f"drafts right, {proposer}"] += accepted
        self.counts["drafts wrong"] += proposed - accepted
        self.counts["preempted"] += stats.preemptions
        self.counts["checkpoints from host"] += stats.checkpoints_moved["restored"]


def world_of(kind: str, tmp: Path, n: int, rng: random.Random, pool: int = POOL) -> World:
    """The n-th checkpoint of its kind: a random one, or one of the embedded models."""
    if kind == "embedded":
        if not (Path(tasks.__file__).parents[1] / "embedded/dense/model.safetensors").is_file():
            pytest.skip("the embedded model is not in this checkout")
        return World(("tritium-dense", "tritium-moe")[n % 2], tmp / "kept", rng, pool)
    layers = ("lf", "llf", "lfl", "fll")[n // 2 % 4]
    spec = replace(random_spec(rng), mtp=True, moe=n % 2 == 1, dtype="float32", head_dim=64, layer_types=layers)
    return World(str(random_checkpoint(tmp / "model", spec)), tmp / "kept", rng, pool)


def traffic(
    kind: str, tmp: Path, seed: int, *, part: int, ways: int, pool: int = POOL, preempted: int = 0
) -> Counter[str]:
    """Serves the `part`-th `ways` of all combinations, then where pages are fewest until `preempted` were; a failure
    says which one it was, and the seed."""
    rng, begin = random.Random(f"{kind} {seed} {part}"), time.monotonic()
    world = world_of(kind, tmp, part, rng, pool)
    chosen = random.Random(seed).sample(WAYS, len(WAYS))[part * ways :][:ways]
    tight = [way for way in WAYS if way[0] == "evicted" and way[2] == "together"]
    for n, way in enumerate(chosen + tight):
        if n >= ways and world.counts["preempted"] >= preempted:
            break
        try:
            world.serve(way, rng)
        except Exception as error:
            error.add_note(f"--seed {seed}, part {part}: {way}, after {dict(world.counts)}")
            raise
    print(f"\n{kind}, seed {seed}, part {part}: {ways} of {len(WAYS)} combinations, {time.monotonic() - begin:.0f} s: "
          f"{dict(sorted(world.counts.items()))}")  # fmt: skip
    return world.counts


@pytest.mark.parametrize("kind", ["random", "embedded"])
def test_a_slice_of_all_ways(kind: str, tmp_path: Path, seed: int) -> None:
    ways = 5 if kind == "random" else 3
    assert traffic(kind, tmp_path, seed, part=0, ways=ways, pool=8)["compared"] == (FIRST + THEN) * ways


@pytest.fixture
def asked_for(request: pytest.FixtureRequest) -> None:
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("make identities")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("asked_for")
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", ["random", "embedded"])
def test_all_ways(kind: str, part: int, tmp_path: Path, seed: int) -> None:
    """All parts of a kind: each combination, and 3,200 requests."""
    ways = len(WAYS) // PARTS
    counts = traffic(kind, tmp_path, seed, part=part, ways=ways, preempted=10)
    assert counts["compared"] >= (FIRST + THEN) * ways
    for cache in CACHES:
        assert (counts[f"hit, {cache}"] > 100) is (cache != "off"), cache
    for what in ("aborted", "preempted", "checkpoints from host", "drafts wrong", "drafts right, right", "steps ahead"):
        assert counts[what] >= 10, what


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("asked_for")
@pytest.mark.parametrize("part", range(2))
def test_any_traffic_where_everything_is_evicted_all_the_time(part: int, tmp_path: Path, seed: int) -> None:
    """1,000 requests a part, dense and MoE: who comes when, who leaves, in which way, on which of the small pools."""
    world = world_of("random", tmp_path, part, random.Random(f"hypothesis {seed} {part}"))
    small = [way for way in WAYS if way[0] in ("evicted", "hosted") and way[2] != "alone"]
    ahead = [way for way in small if way[1] == "none" and way[3]]
    ways = st.sampled_from(small + 4 * ahead)

    @seeded(seed)
    @settings(max_examples=130, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(ways, st.randoms(use_true_random=False))
    def served(way: tuple[str, str, str, bool], rng: random.Random) -> None:
        world.serve(way, rng)

    served()
    print(f"\nseed {seed}, part {part}: {dict(sorted(world.counts.items()))}")
    assert world.counts["compared"] >= 1000
    assert world.counts["preempted"] >= 50
    assert world.counts["checkpoints from host"] >= 50
    assert world.counts["steps ahead"] >= 50
