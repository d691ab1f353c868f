"""The scheduler's rules, each by an example; then all of them at once on random sequences, against a model that
keeps only what it was told (plans and events) and computes everything else by brute force."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field, replace
from functools import cache

import pytest

from tritium.cache import Checkpoint, PagePool, PrefixCache, SlotPool
from tritium.core import (
    FinishReason,
    Request,
    RequestError,
    RowPlan,
    RowResult,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenEvent,
    TokenLogprob,
)
from tritium.draft.proposers import HeadProposer
from tritium.sched import Limits, Scheduler

EOS = frozenset({0, 1})
VOCAB = 150


@cache
def scripted_token(seed: int, position: int, masked: frozenset[int] = frozenset()) -> int:
    """What the scripted model says at a position: nothing but (seed, position) matters."""
    token = random.Random(seed * 1_000_003 + position).randrange(VOCAB)
    while token in masked:
        token = (token + 1) % VOCAB
    return token


def execute(plan: StepPlan, silent: frozenset[str] = frozenset()) -> StepResult:
    """The scripted runner; requests in `silent` get no token, as if their logits were not finite."""
    return StepResult(tuple(execute_row(row, row.request_id in silent) for row in plan.rows))


def execute_row(row: RowPlan, silent: bool = False) -> RowResult:
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    if row.sampling.prompt_logprobs is not None:
        known = row.ids + row.next_ids
        about = range(row.start + 1, min(row.stop + 1, row.prompt_len))
        prompt_logprobs = tuple(TokenLogprob(known[p - row.start], -float(p), 1) for p in about)
    if not row.samples or silent:
        return RowResult(row.request_id, prompt_logprobs=prompt_logprobs)
    tokens = []
    for i in range(row.num_drafts + 1):
        tokens.append(scripted_token(row.seed, row.site(i).position, row.eos_ids))
        if i < row.num_drafts and row.drafts[i] != tokens[-1]:
            break
    logprobs = () if row.sampling.logprobs is None else tuple(TokenLogprob(token, -1.0, 1) for token in tokens)
    return RowResult(row.request_id, tuple(tokens), logprobs, prompt_logprobs, drafts=scripted_drafts(row, len(tokens)))


def scripted_drafts(row: RowPlan, num_tokens: int) -> tuple[int, ...]:
    """Guesses of which every third is wrong."""
    first = row.stop - row.num_drafts + num_tokens
    return tuple(
        (scripted_token(row.seed, position) + (position % 3 == 0)) % VOCAB
        for position in range(first, first + row.want_drafts)
    )


def make(
    *, budget: int = 256, seqs: int = 8, length: int = 4096, pages: int = 64, slots: int | None = None
) -> tuple[Scheduler, PagePool, SlotPool]:
    page_pool, slot_pool = PagePool(pages), SlotPool(seqs if slots is None else slots)
    return Scheduler(Limits(seqs, budget, length), page_pool, slot_pool), page_pool, slot_pool


def request(name: str, prompt: int = 10, *, priority: int = 0, seed: int = 7, **sampling: object) -> Request:
    sampling = {"max_tokens": 4, "ignore_eos": True, **sampling}
    ids = [(13 * i + len(name)) % VOCAB for i in range(prompt)]
    return Request(name, ids, SamplingParams(**sampling), seed, eos_ids=EOS, priority=priority)


def step(scheduler: Scheduler) -> tuple[StepPlan, list[TokenEvent]]:
    plan = scheduler.plan()
    assert plan is not None
    return plan, scheduler.commit(plan, execute(plan))


def shape(plan: StepPlan | None) -> list[tuple[str, int, int]]:
    assert plan is not None
    return [(row.request_id, row.start, row.stop) for row in plan.rows]


def drain(scheduler: Scheduler, most: int = 10_000) -> list[TokenEvent]:
    events = []
    while scheduler.has_work:
        events += step(scheduler)[1]
        most -= 1
        assert most, "the scheduler does not come to an end"
    return events


def outputs(events: list[TokenEvent], name: str) -> list[int]:
    return [token for event in events if event.request_id == name for token in event.tokens]


# ---- a step ------------------------------------------------------------------------------------------------


def test_nothing_to_do_is_no_plan():
    scheduler, _, _ = make()
    assert scheduler.plan() is None
    assert not scheduler.has_work


def test_a_request_from_prompt_to_end():
    scheduler, pages, slots = make()
    scheduler.add(request("a", 10, max_tokens=3, logprobs=0))
    assert (scheduler.num_waiting, scheduler.num_running) == (1, 0)
    plan, [event] = step(scheduler)
    assert shape(plan) == [("a", 0, 10)]
    assert plan.rows[0].samples
    assert (scheduler.num_waiting, scheduler.num_running) == (0, 1)
    assert event.tokens == (scripted_token(7, 10),)
    assert event.logprobs == (TokenLogprob(event.tokens[0], -1.0, 1),)
    assert event.drafts == ()
    assert event.finish_reason is event.timing is None
    plan, _ = step(scheduler)
    assert shape(plan) == [("a", 10, 11)]
    assert plan.rows[0].ids == event.tokens
    _, [last] = step(scheduler)
    assert last.finish_reason is FinishReason.LENGTH
    assert last.timing is not None
    assert last.timing.output_tokens == 3
    assert 0 <= last.timing.queued <= last.timing.total
    assert not scheduler.has_work
    assert pages.num_used == slots.num_used == 0


def test_decode_rows_come_first_then_running_prefill_then_admissions():
    scheduler, _, _ = make(budget=100)
    scheduler.add(request("decoding", 10, max_tokens=50))
    step(scheduler)
    scheduler.add(request("long", 190))
    assert shape(step(scheduler)[0]) == [("decoding", 10, 11), ("long", 0, 64)]
    scheduler.add(request("new", 300))
    assert shape(step(scheduler)[0]) == [("decoding", 11, 12), ("long", 64, 128), ("new", 0, 35)]
    assert shape(step(scheduler)[0]) == [("decoding", 12, 13), ("long", 128, 190), ("new", 35, 64)]


def test_chunks_end_on_absolute_multiples_of_64_where_the_budget_reaches_one():
    scheduler, _, _ = make(budget=200)
    scheduler.add(request("a", 500))
    assert [shape(step(scheduler)[0])[0][1:] for _ in range(3)] == [(0, 192), (192, 384), (384, 500)]
    scheduler, _, _ = make(budget=40)
    scheduler.add(request("a", 130))
    spans = [shape(step(scheduler)[0])[0][1:] for _ in range(4)]
    assert spans == [(0, 40), (40, 64), (64, 104), (104, 130)]


@pytest.mark.parametrize("budget", [1, 7, 64, 100, 1000])
def test_only_the_last_chunk_samples_and_knows_nothing_after_it(budget):
    scheduler, _, _ = make(budget=budget)
    asked = request("a", 150, max_tokens=1)
    scheduler.add(asked)
    while scheduler.has_work:
        [row] = step(scheduler)[0].rows
        assert row.samples == (row.stop == 150)
        assert row.next_ids == tuple(asked.prompt_ids[row.stop : row.stop + 1])
    assert asked.output_ids == [scripted_token(7, 150)]


@pytest.mark.parametrize("budget", [1, 2, 5, 11])
def test_decode_rows_never_outnumber_the_budget_so_each_gets_a_token_in_every_step(budget):
    scheduler, _, _ = make(budget=budget, seqs=10)
    for i in range(20):
        scheduler.add(request(f"r{i}", 1 + i % 3, max_tokens=10 + i))
    decoding: set[str] = set()
    while scheduler.has_work:
        plan, events = step(scheduler)
        assert decoding <= {row.request_id for row in plan.rows}
        decoding = {event.request_id for event in events if event.tokens and event.finish_reason is None}


def test_a_budget_of_one_still_serves_everyone():
    scheduler, _, _ = make(budget=1, seqs=3)
    asked = [request(name, 70, seed=i, max_tokens=5) for i, name in enumerate("abcde")]
    for each in asked:
        scheduler.add(each)
    drain(scheduler)
    for i, each in enumerate(asked):
        assert each.output_ids == [scripted_token(i, 70 + j) for j in range(5)]


def test_at_most_max_num_seqs_run_and_a_missing_slot_holds_back():
    scheduler, _, _ = make(seqs=2, slots=5)
    for name in "abc":
        scheduler.add(request(name))
    assert len(step(scheduler)[0].rows) == scheduler.num_running == 2
    scheduler, _, _ = make(seqs=5, slots=1)
    for name in "abc":
        scheduler.add(request(name))
    assert len(step(scheduler)[0].rows) == 1
    drain(scheduler)


def test_history_only_where_penalties_need_it():
    scheduler, _, _ = make(budget=64)
    scheduler.add(request("plain", 70))
    scheduler.add(request("penalised", 70, presence_penalty=1.0))
    rows = [row for _ in range(4) for row in step(scheduler)[0].rows]
    for row in rows:
        if row.request_id == "plain" or not row.samples:
            assert row.history is None
        else:
            assert row.history is not None
            assert len(row.history) == row.stop
            assert row.history[row.start :] == row.ids


# ---- order -------------------------------------------------------------------------------------------------


def test_first_come_first_served_within_a_priority_and_smaller_priorities_first():
    scheduler, _, _ = make(seqs=1)
    for name, priority in [("c", 1), ("a", 0), ("d", 1), ("b", 0)]:
        scheduler.add(request(name, priority=priority, max_tokens=1))
    assert [event.request_id for event in drain(scheduler)] == ["a", "b", "c", "d"]


def test_the_head_is_not_overtaken_by_one_that_would_fit():
    scheduler, _, _ = make(pages=4, budget=1000)
    scheduler.add(request("running", 128, max_tokens=60))
    step(scheduler)
    scheduler.add(request("big", 200))
    scheduler.add(request("small", 10))
    while scheduler.num_running:
        plan, _ = step(scheduler)
        assert [row.request_id for row in plan.rows] == ["running"]
        if not scheduler.num_running:
            break
    assert shape(scheduler.plan()) == [("big", 0, 200)]


# ---- preemption --------------------------------------------------------------------------------------------


def test_the_youngest_is_preempted_and_resumes_without_sampling_twice():
    scheduler, pages, slots = make(pages=3, budget=1000)
    old, young = request("old", 60, seed=1, max_tokens=100), request("young", 60, seed=2, max_tokens=30)
    scheduler.add(old)
    scheduler.add(young)
    for _ in range(5):
        step(scheduler)  # both are at 64 tokens, one page free
    assert pages.num_free == 1
    plan, _ = step(scheduler)
    assert plan.preempted == ("young",)
    assert shape(plan) == [("old", 64, 65)]
    assert (young.num_computed, young.pages, young.slot, len(young.output_ids)) == (0, [], None, 5)
    assert (scheduler.preemptions, young.num_preemptions, old.num_preemptions) == (1, 1, 0)
    assert (pages.num_used, slots.num_used, scheduler.num_waiting) == (2, 1, 1)
    resumed = next(row for _ in range(200) for row in step(scheduler)[0].rows if row.request_id == "young")
    assert resumed.ids == tuple(young.prompt_ids) + tuple(young.output_ids[:5])
    assert resumed.samples
    drain(scheduler)
    assert old.output_ids == [scripted_token(1, 60 + i) for i in range(100)]
    assert young.output_ids == [scripted_token(2, 60 + i) for i in range(30)]


def test_the_one_that_asks_may_be_the_victim_and_does_not_return_at_once():
    scheduler, _, _ = make(pages=3, budget=1000)
    scheduler.add(request("old", 70, max_tokens=100))
    scheduler.add(request("young", 60, max_tokens=100))
    for _ in range(5):
        plan, _ = step(scheduler)
    assert plan.preempted == ()
    plan, _ = step(scheduler)
    assert plan.preempted == ("young",)
    assert [row.request_id for row in plan.rows] == ["old"]
    plan, _ = step(scheduler)
    assert [row.request_id for row in plan.rows] == ["old"]
    assert scheduler.num_waiting == 1
    drain(scheduler)


def test_a_later_arrival_of_better_priority_is_kept():
    scheduler, _, _ = make(pages=3, budget=1000)
    scheduler.add(request("first", 60, priority=5, max_tokens=100))
    scheduler.add(request("urgent", 60, priority=0, max_tokens=100))
    preempted = [name for _ in range(20) for name in step(scheduler)[0].preempted]
    assert preempted == ["first"]


def test_a_preempted_request_keeps_its_place():
    scheduler, _, _ = make(pages=3, budget=1000)
    scheduler.add(request("old", 60, max_tokens=20))
    scheduler.add(request("young", 60, max_tokens=20))
    for _ in range(6):
        step(scheduler)
    scheduler.add(request("newcomer", 10, max_tokens=1))  # would fit, but young came before
    assert scheduler.num_waiting == 2
    ends = [event.request_id for event in drain(scheduler) if event.finish_reason]
    assert ends[0] == "old"


def test_prompt_logprobs_are_told_once_even_when_the_prompt_is_computed_again():
    scheduler, _, _ = make(pages=4, budget=65)
    scheduler.add(request("old", 63, max_tokens=120))
    step(scheduler)
    asked = request("young", 190, max_tokens=3, prompt_logprobs=0)
    scheduler.add(asked)
    events = drain(scheduler)
    assert asked.num_preemptions == 1
    told = [logprob.token for event in events for logprob in event.prompt_logprobs]
    assert told == asked.prompt_ids[1:]
    assert len(outputs(events, "young")) == 3


# ---- ends --------------------------------------------------------------------------------------------------


def first_position(tokens: frozenset[int], start: int, seed: int = 7) -> int:
    return next(p for p in range(start, start + 10_000) if scripted_token(seed, p) in tokens)


def test_eos_stops_and_names_the_id():
    end = first_position(EOS, 10)
    scheduler, _, _ = make()
    scheduler.add(request("a", 10, ignore_eos=False, max_tokens=None))
    last = drain(scheduler)[-1]
    assert (last.finish_reason, last.stop_token) == (FinishReason.STOP, scripted_token(7, end))
    assert last.tokens == (last.stop_token,)
    assert last.timing is not None
    assert last.timing.output_tokens == end - 10 + 1


def test_ignore_eos_runs_to_the_length():
    scheduler, _, _ = make(length=200)
    scheduler.add(request("a", 10, max_tokens=None))
    events = drain(scheduler)
    assert len(events) == 190
    assert (events[-1].finish_reason, events[-1].stop_token) == (FinishReason.LENGTH, None)


def test_stop_token_ids_stop_even_when_eos_is_ignored():
    stop = scripted_token(7, 12)
    scheduler, _, _ = make()
    scheduler.add(request("a", 10, stop_token_ids=(stop,), max_tokens=50))
    last = drain(scheduler)[-1]
    assert (last.finish_reason, last.stop_token) == (FinishReason.STOP, stop)


def test_before_min_tokens_ids_that_end_are_masked_and_would_not_end():
    stop = scripted_token(7, 12)
    asked = request("a", 10, ignore_eos=False, stop_token_ids=(stop,), min_tokens=5, max_tokens=50)
    scheduler, _, _ = make()
    scheduler.add(asked)
    for i in range(8):
        plan = scheduler.plan()
        assert plan is not None
        assert plan.rows[0].eos_ids == (EOS | {stop} if i < 5 else frozenset())
        # a runner that does not heed the mask
        result = RowResult("a", (stop if i < 5 else 2,))
        [event] = scheduler.commit(plan, StepResult((result,)))
        assert event.finish_reason is None


def test_ignored_eos_is_not_masked():
    scheduler, _, _ = make()
    scheduler.add(request("a", 10, min_tokens=2, stop_token_ids=(9,)))
    plan = scheduler.plan()
    assert plan is not None
    assert plan.rows[0].eos_ids == {9}


@pytest.mark.parametrize(("asked", "own", "expected"), [(5, 0, 5), (None, 0, 90), (5, 12, 2), (1000, 0, 90)])
def test_length_is_the_least_of_max_tokens_max_total_tokens_and_max_model_len(asked, own, expected):
    scheduler, _, _ = make(length=100)
    one = request("a", 10, max_tokens=asked)
    one.max_total_tokens = own
    scheduler.add(one)
    assert drain(scheduler)[-1].finish_reason is FinishReason.LENGTH
    assert len(one.output_ids) == expected


def test_a_row_without_finite_logits_fails_alone():
    scheduler, _, _ = make()
    scheduler.add(request("good"))
    scheduler.add(request("bad"))
    plan = scheduler.plan()
    assert plan is not None
    good, bad = scheduler.commit(plan, execute(plan, silent=frozenset({"bad"})))
    assert (good.finish_reason, len(good.tokens)) == (None, 1)
    assert (bad.finish_reason, bad.tokens) == (FinishReason.ERROR, ())
    assert bad.error is not None
    assert bad.timing is not None
    assert scheduler.num_running == 1


# ---- what is refused ---------------------------------------------------------------------------------------


def test_requests_that_cannot_be_served_are_refused_with_the_numbers():
    scheduler, _, _ = make(length=100, pages=1)
    with pytest.raises(RequestError, match="99 tokens, or raise --max-model-len") as refused:
        scheduler.add(request("long", 100))
    assert refused.value.param == "prompt"
    with pytest.raises(RequestError, match="empty"):
        scheduler.add(request("empty", 0))
    with pytest.raises(RequestError, match=r"66 tokens, but the KV pool holds 65 .*at most 5") as refused:
        scheduler.add(request("wide", 60, max_tokens=6))
    assert refused.value.param == "max_tokens"
    with pytest.raises(RequestError, match="shorten the prompt"):
        scheduler.add(request("wide", 70))
    assert not scheduler.has_work
    scheduler.add(request("fits", 60, max_tokens=5))
    with pytest.raises(RequestError, match="'fits' is in use"):
        scheduler.add(request("fits"))
    assert len(outputs(drain(scheduler), "fits")) == 5


# ---- abort -------------------------------------------------------------------------------------------------


def test_abort_gives_everything_back_wherever_the_request_is():
    scheduler, pages, slots = make(seqs=1)
    scheduler.add(request("running", 100))
    scheduler.add(request("waiting", 100))
    step(scheduler)
    assert scheduler.abort("waiting")
    assert not scheduler.abort("waiting")
    assert not scheduler.abort("unknown")
    plan = scheduler.plan()
    assert plan is not None
    assert scheduler.abort("running")
    assert pages.num_used == slots.num_used == 0
    assert not scheduler.has_work
    assert scheduler.commit(plan, execute(plan)) == []


def test_an_id_that_returns_between_plan_and_commit_is_another_request():
    scheduler, _, _ = make()
    scheduler.add(request("a"))
    plan = scheduler.plan()
    assert plan is not None
    scheduler.abort("a")
    again = request("a")
    scheduler.add(again)
    assert scheduler.commit(plan, execute(plan)) == []
    assert (again.num_computed, again.output_ids) == (0, [])
    drain(scheduler)
    assert len(again.output_ids) == 4


# ---- all rules at once -------------------------------------------------------------------------------------


class Memory:
    """What pages and slots hold, were there a device: for each token and each state the hash of all tokens up to it."""

    def __init__(self) -> None:
        self.pages: dict[int, list[int]] = {}
        self.states: dict[int, tuple[int, int]] = {}

    def execute(self, plan: StepPlan, alive: dict[str, Seen]) -> None:
        """Checks that each row reads its own history and nothing else, then does to memory what the step does."""
        for row in plan.rows:
            if row.copy_page is not None:
                self.pages[row.copy_page[1]] = list(self.page(row.copy_page[0]))
        hashes = {row.request_id: alive[row.request_id].hashes(row.ids[len(row.ids) - row.num_drafts :])
                  for row in plan.rows}  # fmt: skip
        for row in plan.rows:
            begin, slot = row.start - row.fold, row.slot if row.source is None else row.source
            assert begin == 0 or self.states[slot] == (begin, hashes[row.request_id][begin - 1]), "another's state"
        for row in plan.rows:
            for at in range(row.start, row.stop):
                self.page(row.pages[at // 64])[at % 64] = hashes[row.request_id][at]
        for row in plan.rows:  # after all writes of the step: nobody wrote into what another one reads
            for i, page in enumerate(row.pages):
                history = hashes[row.request_id][64 * i : min(64 * i + 64, row.stop)]
                assert self.page(page)[: len(history)] == history, "another's keys and values"
        for row in plan.rows:
            known = row.stop - row.num_drafts
            for position, slot in (*row.snapshots, (known, row.slot)):
                assert row.start - row.fold < position <= known
                self.states[slot] = position, hashes[row.request_id][position - 1]

    def page(self, page: int) -> list[int]:
        return self.pages.setdefault(page, [0] * 64)


@dataclass(eq=False)
class Seen:
    """A request as the model sees it from outside."""

    request: Request
    prompt: list[int]
    key: tuple[int, int]
    total: int
    running: bool = False
    out: list[int] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    computed: int = 0
    fold: int = 0
    drafts: tuple[int, ...] = ()
    table: tuple[int, ...] = ()
    slot: int = 0
    plans_unserved: int = 0
    _hashes: list[int] = field(default_factory=list)

    @property
    def known(self) -> list[int]:
        return self.prompt + self.out

    def hashes(self, more: tuple[int, ...]) -> list[int]:
        """Of the known tokens up to each, and of `more` after them."""
        for token in self.known[len(self._hashes) :]:
            self._hashes.append(hash((self._hashes[-1] if self._hashes else 0, token)))
        out = list(self._hashes)
        for token in more:
            out.append(hash((out[-1], token)))
        return out


def alone(seen: Seen) -> tuple[list[int], FinishReason]:
    """The request served alone by the scripted model, in a loop of its own."""
    sampling, out = seen.request.sampling, []
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else EOS)
    while True:
        masked = frozenset(ends) if len(out) < sampling.min_tokens else frozenset()
        out.append(scripted_token(seen.request.seed, len(seen.prompt) + len(out), masked))
        if out[-1] in ends:
            return out, FinishReason.STOP
        if len(seen.prompt) + len(out) == seen.total:
            return out, FinishReason.LENGTH


class World:
    """Drives a scheduler with random operations and checks every plan and event."""

    def __init__(self, rng: random.Random, *, cached: bool) -> None:
        self.rng = rng
        self.budget = rng.choice([1, 3, 17, 64, 100, 300, 300, 300])
        self.seqs = rng.randint(1, 8)
        self.length = rng.choice([40, 150, 200, 300])
        least = -(-self.length // 64)
        self.pages = PagePool(least + rng.choice([0, 1, 1, 2, 4]))
        self.slots = SlotPool(rng.randint(1, self.seqs) + (rng.choice([0, 1, 3, 10]) if cached else 0))
        self.cache = PrefixCache(self.pages, self.slots) if cached else None
        self.memory = Memory()
        self.texts: list[list[int]] = []
        self.scheduler = Scheduler(
            Limits(self.seqs, self.budget, self.length),
            self.pages,
            self.slots,
            cache=self.cache,
            proposer=rng.choice((None, HeadProposer())),
            depth=lambda r: r.seed % 5,
        )
        self.alive: dict[str, Seen] = {}
        self.arrivals = self.finished = self.aborted = self.preempted = self.accepted = self.reused = 0

    def arrive(self) -> None:
        rng = self.rng
        sizes = [1, rng.randint(1, 20), rng.randint(40, 63), rng.randint(40, 63), rng.randint(1, self.length - 1)]
        prompt = [rng.randrange(VOCAB) for _ in range(min(rng.choice(sizes), self.length - 1))]
        seed = rng.randrange(10**6) if rng.random() < 0.7 else 7
        if self.texts and rng.random() < 0.7:  # what others know, up to some place, and something else after it
            text = rng.choice(self.texts)
            prompt = (text[: rng.choice([len(text), rng.randint(0, len(text))])] + prompt)[: self.length - 1]
        sampling = SamplingParams(
            max_tokens=rng.choice([None, 1, rng.randint(1, 40), rng.randint(40, 200), rng.randint(40, 200)]),
            ignore_eos=rng.random() < 0.8,
            stop_token_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 0, 0, 2]))),
            prompt_logprobs=rng.choice([None, None, 0]),
            presence_penalty=rng.choice([0.0, 0.0, 1.0]),
            min_tokens=0,
        )
        if sampling.max_tokens is None or sampling.max_tokens > 8:
            sampling = replace(sampling, min_tokens=rng.choice([0, 0, 7]))
        name = f"r{self.arrivals}"
        priority = rng.choice([0, 0, 0, 1, -1])
        one = Request(name, prompt, sampling, seed, eos_ids=EOS, priority=priority)
        one.turn_starts = tuple(sorted(rng.sample(range(len(prompt)), min(len(prompt), rng.choice([0, 0, 1, 6])))))
        total = min(self.length, len(prompt) + (sampling.max_tokens or self.length))
        self.scheduler.add(one)
        self.alive[name] = Seen(one, list(prompt), (one.priority, self.arrivals), total)
        self.arrivals += 1

    def abort(self) -> None:
        if not self.alive:
            assert not self.scheduler.abort("nobody")
            return
        name = self.rng.choice(sorted(self.alive))
        gone = self.alive.pop(name)
        self.texts.append(gone.known)
        assert self.scheduler.abort(name)
        assert gone.request.finish_reason is FinishReason.ABORT
        assert alone(gone)[0][: len(gone.out)] == gone.out
        self.aborted += 1

    def step(self, *, disturb: bool = False) -> None:
        plan = self.scheduler.plan()
        assert (plan is None) == (not self.alive), "work is left, or made up"
        if plan is None:
            return
        self.check_plan(plan)
        self.check_pools(plan)
        self.check_writes(plan)
        self.memory.execute(plan, self.alive)
        result = execute(plan)
        if disturb:
            self.abort()
            self.check_pools(plan)
        expected = [row for row in plan.rows if row.request_id in self.alive]
        self.check_events(expected, self.scheduler.commit(plan, result))
        self.check_pools()

    def check_plan(self, plan: StepPlan) -> None:
        before = {name: seen for name, seen in self.alive.items() if seen.running}
        free_before = self.pages.num_total - len({page for seen in before.values() for page in seen.table})
        short = [s for s in before.values() if self.one_left(s) and 64 * len(s.table) < len(s.known)]
        if plan.preempted:
            assert len(short) > free_before, "preempted with pages to spare"
        for name in plan.preempted:
            victim = self.alive[name]
            assert victim.running
            assert victim.key == max(s.key for s in self.alive.values() if s.running), "not the youngest"
            victim.running, victim.computed, victim.table, victim.slot = False, 0, (), 0
            victim.fold, victim.drafts = 0, ()
            self.preempted += 1
        assert len({row.request_id for row in plan.rows}) == len(plan.rows)
        assert 0 < sum(len(row.ids) for row in plan.rows) <= self.budget

        running = sorted((s for s in self.alive.values() if s.running), key=lambda s: s.key)
        waiting = sorted((s for s in self.alive.values() if not s.running), key=lambda s: s.key)
        decoding = [s for s in running if self.one_left(s)]
        prefilling = [s for s in running if not self.one_left(s)]
        rows = [self.alive[row.request_id] for row in plan.rows]
        long = [len(row.ids) > 16 for row in plan.rows]
        assert long == sorted(long), "short rows come first"
        rows.sort(key=lambda s: (s not in decoding, not s.running, s.key))
        assert rows[: len(decoding)] == decoding, "every decode row is served, and first"
        rest = rows[len(decoding) :]
        chunked = [s for s in rest if s.running]
        admitted = [s for s in rest if not s.running]
        assert rest == chunked + admitted
        assert chunked == prefilling[: len(chunked)], "running prefills are served in order"
        assert admitted == [s for s in waiting if s in admitted], "not in order"
        for seen in waiting[: waiting.index(admitted[-1])] if admitted else ():
            assert seen in admitted or self.may_wait(seen, running + admitted), "overtaken"
        assert not (admitted and plan.preempted)

        left = self.budget
        planned = {row.request_id: row for row in plan.rows}
        for seen in rows:
            row = planned[seen.request.id]
            self.check_row(row, seen, left)
            left -= len(row.ids)
        if left:
            assert len(chunked) == len(prefilling)
            self.check_admissions_went_on([s for s in waiting if s not in admitted], plan)
        self.check_waiting_times(rows)

    @staticmethod
    def one_left(seen: Seen) -> bool:
        return len(seen.known) - seen.computed == 1

    def may_wait(self, seen: Seen, running: list[Seen]) -> bool:
        """Whether one under prefill comes by a place, 64 tokens or more from the start, up to which both are alike."""
        def common(other: Seen) -> int:
            pairs = enumerate(zip(seen.known, other.known))
            return next((i for i, (a, b) in pairs if a != b), min(len(seen.known), len(other.known)))

        under_prefill = (other for other in running if not self.one_left(other))
        return self.cache is not None and any(max(64, other.computed + 1) <= common(other) for other in under_prefill)

    def check_row(self, row: RowPlan, seen: Seen, left: int) -> None:
        if self.cache is not None and not seen.running:
            assert row.start < len(seen.known)
            seen.computed = row.start
            self.reused += row.start
        assert row.start == seen.computed, "a token is skipped or computed twice"
        assert row.ids
        known = row.stop - row.num_drafts
        assert list(row.ids[: known - row.start]) == seen.known[row.start : known]
        assert list(row.next_ids) == seen.known[known : known + 1]
        assert row.samples == (known == len(seen.known))
        assert row.fold == seen.fold
        if row.num_drafts:
            assert row.samples
            assert not row.eos_ids, "drafts must not be verified while some ids are masked"
            assert seen.drafts[: row.num_drafts] == row.ids[known - row.start :]
        on_boundary = row.stop % 64 == 0 or row.samples
        assert on_boundary or (len(row.ids) == left and row.start // 64 == row.stop // 64)
        assert row.prompt_len == len(seen.prompt)
        penalised = row.samples and row.sampling.presence_penalty
        assert row.history == (tuple(seen.known) if penalised else None)
        ends = set(row.sampling.stop_token_ids) | (set() if row.sampling.ignore_eos else EOS)
        assert row.eos_ids == (ends if row.samples and len(seen.out) < row.sampling.min_tokens else set())
        assert row.pages[: len(seen.table)] == seen.table, "a page was moved"
        assert 64 * len(row.pages) >= row.stop
        assert not seen.running or row.slot == seen.slot, "the state was moved"
        seen.table, seen.slot, seen.running = row.pages, row.slot, True

    def check_admissions_went_on(self, waiting: list[Seen], plan: StepPlan) -> None:
        """With budget left, whoever is next must have had a reason to wait."""
        running = [s for s in self.alive.values() if s.running]
        if waiting and not plan.preempted:
            read = {row.copy_page[0] for row in plan.rows if row.copy_page} | {p for s in running for p in s.table}
            sources = {row.source for row in plan.rows} - {None} - {s.slot for s in running}
            free = self.pages.num_total - len(read)
            room = len(running) < self.seqs and len(running) + len(sources) < self.slots.num_total
            for seen in waiting[: self.seqs] if room else ():
                fits = free >= -(-len(seen.known) // 64)
                if not fits or not self.may_wait(seen, running):
                    assert not fits, "idle in spite of work"
                    break

    def check_waiting_times(self, rows: list[Seen]) -> None:
        """Even behind running requests of worse priority, the oldest request waits for those alone."""
        oldest = min(self.alive.values(), key=lambda s: s.key)
        for seen in self.alive.values():
            seen.plans_unserved = 0 if seen in rows else seen.plans_unserved + 1
        assert oldest.plans_unserved <= self.seqs * self.length

    def check_events(self, rows: list[RowPlan], events: list[TokenEvent]) -> None:
        by_id = {event.request_id: event for event in events}
        assert len(by_id) == len(events)
        assert set(by_id) <= {row.request_id for row in rows}
        for row in rows:
            seen, event = self.alive[row.request_id], by_id.get(row.request_id, TokenEvent(row.request_id))
            assert not row.samples or 1 <= len(event.tokens) <= row.num_drafts + 1
            # Guesses behind the end of an answer were neither right nor wrong.
            assert event.num_drafts == (row.num_drafts if event.finish_reason is None else event.num_accepted)
            assert len(event.tokens) - 1 <= event.num_accepted <= len(event.tokens)
            seen.fold = max(0, len(event.tokens) - 1)
            seen.computed = row.stop - row.num_drafts + seen.fold
            seen.drafts = event.drafts
            if self.cache is not None and event.finish_reason is None:  # the cache's page may have come for its own
                assert len(seen.request.pages) == len(seen.table)
                seen.table = tuple(seen.request.pages)
            seen.told += [logprob.token for logprob in event.prompt_logprobs]
            expected = alone(seen)[0][len(seen.out) :]
            assert list(event.tokens) == (expected[: len(event.tokens)] if row.samples else [])
            self.accepted += seen.fold
            seen.out += event.tokens
            assert (event.finish_reason is None) == (event.timing is None)
            if event.finish_reason is not None:
                self.check_end(seen, event)

    def check_end(self, seen: Seen, event: TokenEvent) -> None:
        assert (seen.out, event.finish_reason) == alone(seen)
        assert event.stop_token == (seen.out[-1] if event.finish_reason is FinishReason.STOP else None)
        assert seen.told == (seen.prompt[1:] if seen.request.sampling.prompt_logprobs is not None else [])
        del self.alive[event.request_id]
        self.texts.append(seen.known)
        self.finished += 1

    def check_writes(self, plan: StepPlan) -> None:
        """Into pages of the cache only behind what they are known for, and nowhere two at once."""
        written = [(row.pages[at // 64], at % 64) for row in plan.rows for at in range(row.start, row.stop)]
        assert len(set(written)) == len(written)
        if self.cache is not None:
            shared = {node.page: len(node.key) for node in self.cache.walk()}
            assert all(offset >= shared.get(page, 0) for page, offset in written)

    def check_pools(self, plan: StepPlan | None = None) -> None:
        """Every id has exactly one owner: a request, the cache, the free list, or (`plan`) a step under way."""
        running = [s for s in self.alive.values() if s.running]
        nodes = [] if self.cache is None else list(self.cache.walk())
        shared = {node.page for node in nodes}
        own = [page for s in running for page in s.table if page not in shared]
        assert len(shared) == len(nodes)
        assert len(set(own)) == len(own) == self.pages.num_used - len(shared)
        assert all(1 <= page <= self.pages.num_total for page in (*own, *shared))
        kept = [c.slot for c in self.checkpoints() if c.slot is not None]
        under_way = [slot for row in plan.rows for _, slot in row.snapshots] if plan else []
        slots = [s.slot for s in running] + kept + under_way
        assert len(set(slots)) == len(slots) == self.slots.num_used
        assert len(running) <= self.seqs
        assert all(1 <= slot <= self.slots.num_total for slot in slots)
        assert self.scheduler.num_running == len(running)
        assert self.scheduler.num_waiting == len(self.alive) - len(running)
        if self.cache is not None:
            used = {page for s in running for page in s.table}
            assert all(node.locks for node in nodes if node.page in used), "a page in use may be evicted"
            assert self.cache.num_evictable == sum(not node.locks for node in nodes)
            assert plan or {node.page for node in nodes if node.locks} <= used, "a page stays locked"
            assert (self.cache.num_pages, self.cache.num_checkpoints) == (len(nodes), len(kept))

    def checkpoints(self) -> list[Checkpoint]:
        if self.cache is None:
            return []
        found = [c for node in (self.cache._root, *self.cache.walk()) for by_ids in node.checkpoints.values()
                 for c in by_ids.values()]  # fmt: skip
        assert all(self.memory.states[c.slot][0] == c.position for c in found if c.slot is not None)
        return found


@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("part", range(4))
def test_random_operations_against_the_brute_force_model(seed, part, cached):
    """4 x 80 pools and limits, 60 operations and a drain each: more than 10,000 operations in all."""
    rng = random.Random(f"{seed}/{part}")
    finished = aborted = preempted = accepted = reused = 0
    for _ in range(80):
        world = World(rng, cached=cached)
        for _ in range(60):
            kind = rng.choices(["arrive", "step", "abort", "abort between plan and commit"], [6, 30, 1, 1])[0]
            if kind == "arrive":
                world.arrive()
            elif kind == "abort":
                world.abort()
                world.check_pools()
            else:
                world.step(disturb=kind != "step")
        most = 4 * sum(s.total for s in world.alive.values()) * (1 + len(world.alive))
        while world.scheduler.has_work:
            world.step()
            most -= 1
            assert most > 0, "no progress"
        assert not world.alive
        if world.cache is not None:
            world.cache.flush()
        assert (world.pages.num_used, world.slots.num_used) == (0, 0)
        assert world.scheduler.plan() is None
        assert world.scheduler.preemptions == world.preempted
        finished += world.finished
        aborted += world.aborted
        preempted += world.preempted
        accepted += world.accepted
        reused += world.reused
    reached = [finished, aborted, preempted, accepted, *([reused] if cached else [])]
    assert min(reached) > 10, "the sequences do not reach what they are meant to test"


def test_planning_256_decode_rows_of_long_requests_is_cheap():
    scheduler, _, _ = make(budget=70_000, seqs=256, length=300_000, pages=40_000)
    for i in range(256):
        scheduler.add(request(f"r{i}", 8_000, max_tokens=100))
    while scheduler.num_waiting:
        step(scheduler)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        plan = scheduler.plan()
        times.append(time.perf_counter() - start)
        assert plan is not None
        assert len(plan.rows) >= 256 - 8
        scheduler.commit(plan, execute(plan))
    assert min(times) < 5e-3  # a millisecond on a quiet core
