"""Continuous batching with chunked prefill, under a token budget and two pools.

Order. Requests are served by (priority, arrival), smaller first; "older" below means earlier in that order.
Arrival is kept over preemption.

A step. First one token of each running request that has one token left to compute (decode rows), then prefill
chunks of running requests, then chunks of newly admitted ones, oldest first each, until `max_num_batched_tokens`
are planned. Every decode row was a row of the step before, so there are never more of them than budget: each
gets its token in every step. Chunks end on absolute multiples of 64 wherever the budget reaches one, so that a
prefill is cut the same way wherever it resumes.

Admission. The oldest waiting request enters when it finds a slot, a place among max_num_seqs, and pages for all tokens
that it knows (prompt, and outputs if it was preempted); it takes them at once, those that the prefix cache has among
them, and computes only what it did not find there. Nobody overtakes it, unless it waits for another request to
compute what both begin with (`reuse`). Hence only decode rows ever ask for pages: one each 64 tokens.

Room. Pages and slots are free, held by requests, or left in the cache, from where they are taken when none is free.

Preemption. A decode row that finds no page takes from the youngest running request (which may be itself): what it
computed goes to the cache, as at its end, the outputs stay, and it waits at its old place in the
order. No request enters in a step that preempted one. The oldest running request is therefore never preempted
(alone, it fits: `add` checked), so it ends, and so does every other in turn: preemption cannot go round in
circles. A request that preempted itself needs more pages than it gave back, so it does not return before another
one gives some up.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from tritium.cache import PagePool, PrefixCache, SlotPool, pages_for
from tritium.config import HEAD_TOKENS
from tritium.core import (
    AHEAD,
    MOST_ENDS,
    PAGE_TOKENS,
    SHORT_ROW,
    Constrain,
    FinishReason,
    Request,
    RequestError,
    RowPlan,
    RowResult,
    StepPlan,
    StepResult,
    Timing,
    TokenEvent,
)
from tritium.draft.proposers import Proposer
from tritium.sched.reuse import Reuse

CHUNK_TOKENS = 64
"""Prefill chunks are cut on absolute multiples of this."""


@dataclass(frozen=True, slots=True)
class Limits:
    max_num_seqs: int
    """Requests that run at once."""
    max_num_batched_tokens: int
    """Tokens in a step."""
    max_model_len: int
    """Prompt plus output tokens of a request."""


class Scheduler:
    """Owns the requests from `add` to their end, and gives what they hold back to the pools.

    `plan` and `commit` alternate, but that `plan_next` may follow a plan before it is committed; `add` and `abort` may
    come at any time between two calls.
    """

    def __init__(self, limits: Limits, pages: PagePool, slots: SlotPool, *, cache: PrefixCache | None = None,
                 proposer: Proposer | None = None, depth: Callable[[Request], int] = lambda request: 0) -> None:
        """`cache` keeps what requests leave. `proposer` guesses the tokens that a decode row verifies beside its own,
        at most `depth` of them."""
        self.limits = limits
        self._proposer = proposer
        self._depth = depth
        self.constrain: Constrain | None = None
        """Makes what holds an answer to its rules; without it requests with rules are refused."""
        self.preemptions = 0
        """Preemptions since the start, of all requests."""
        self.reuse = Reuse(pages, slots, cache)
        self._pages = pages
        self._requests: dict[str, Request] = {}
        self._waiting: list[Request] = []  # sorted by _order, as is _running
        self._running: list[Request] = []
        self._arrivals = 0
        self._tables: dict[str, tuple[int, ...]] = {}  # Request.pages as tuples, made once a page
        self._under_way: Counter[Request] = Counter()  # plans not yet committed that a request is in

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Queues a request. Raises RequestError, and keeps nothing of it, when it could never be served."""
        if request.id in self._requests:
            raise RequestError(f"request id {request.id!r} is in use", param="request_id", hint="choose another")
        request.max_total_tokens = self._total_tokens(request)
        if request.rules is not None:
            if self.constrain is None:
                raise RequestError("this engine cannot hold an answer to a grammar", param="response_format")
            request.constraint = self.constrain(request.rules)
        request.arrival = self._arrivals
        self._arrivals += 1
        self._requests[request.id] = request
        insort(self._waiting, request, key=_order)

    def abort(self, request_id: str) -> bool:
        """Ends a request at once, wherever it is; False when it is not here (any more)."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._finish(request, FinishReason.ABORT)
        return True

    def plan(self) -> StepPlan | None:
        """The next step, or None when there is nothing to do. Rows know all that the runner needs."""
        preempted: list[str] = []
        budget = self.limits.max_num_batched_tokens
        stops: dict[Request, int] = {}  # how far this step computes each of its requests
        for request in tuple(self._running):  # the victim of a page is always younger than who asks: not yet seen
            if _decodes(request) and request.slot is not None and self._grow(request, preempted):
                stops[request] = request.num_tokens
        budget -= len(stops)
        for request in stops if self._proposer else ():
            request.drafts = self._verifiable(request, budget)
            budget -= len(request.drafts)
        for request in self._running:
            if budget and request not in stops:
                stops[request] = _chunk_stop(request, budget)
                budget -= stops[request] - request.num_computed
        while budget and not preempted and (admitted := self._admit()):
            stops[admitted] = _chunk_stop(admitted, budget)
            budget -= stops[admitted] - admitted.num_computed
        if not stops:
            return None
        self._under_way.update(stops)
        # Kernels want short rows first; the order is otherwise that of planning.
        ordered = sorted(stops.items(), key=lambda pair: pair[1] - pair[0].num_computed > SHORT_ROW)
        rows = tuple(self._row(request, stop) for request, stop in ordered)
        return StepPlan(rows, tuple(preempted), self.reuse.cache.take_moves())

    def plan_next(self, plan: StepPlan) -> StepPlan | None:
        """The step after `plan`, which is under way, where it can be known: every request goes on by the token that
        `plan` draws, none can join them, and nothing else about the step depends on that token. None otherwise.

        Requests that end by length are left out. One that ends by a token is not known to: its row then comes to
        nothing (`RowPlan.ends`).
        """
        if len(plan.rows) != len(self._running) or (self._waiting and len(self._running) < self.limits.max_num_seqs):
            return None
        rows = []
        for row in plan.rows:
            request = self._requests.get(row.request_id)
            if request is None or request not in self._under_way or not _foreseeable(request, row):
                return None
            if request.num_tokens + 1 < request.max_total_tokens:
                rows.append((request, row))
        if not rows or not self._grow_next([request for request, _ in rows]):
            return None
        self._under_way.update(request for request, _ in rows)
        following = tuple(
            replace(
                row, ids=(AHEAD,), start=row.stop, pages=self._table(request), source=None, fold=0, snapshots=(),
                copy_page=None, ends=_ends(request),
            )
            for request, row in rows
        )  # fmt: skip
        return StepPlan(following, moves=self.reuse.cache.take_moves())

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        """Takes in what a step computed. Rows of requests that left since `plan` are passed over.

        An event for each request that has a token, prompt log-probabilities or an end to tell.
        """
        found = {row.request_id: row for row in result.rows}
        events = []
        for row in plan.rows:
            request = self._requests.get(row.request_id)
            if request is None or request not in self._under_way:  # gone; maybe its id came again
                self.reuse.abandon(row)
                continue
            self._under_way[request] -= 1
            if not self._under_way[request]:
                del self._under_way[request]
            event = self._commit_row(request, row, found[row.request_id])
            if event is not None:
                events.append(event)
        return events

    # ---- a request's life -------------------------------------------------------------------------------------

    def _total_tokens(self, request: Request) -> int:
        """Prompt plus output tokens at which the request ends; RequestError when they cannot be had."""
        prompt, longest = len(request.prompt_ids), self.limits.max_model_len
        if not prompt:
            raise RequestError("the prompt is empty", param="prompt", hint="send at least one token")
        if prompt + 1 > longest:
            raise RequestError(
                f"the prompt has {prompt} tokens, and with one to generate only {longest} fit",
                param="prompt",
                hint=f"send at most {longest - 1} tokens, or raise --max-model-len",
            )
        total = min(longest, request.max_total_tokens or longest)
        if request.sampling.max_tokens is not None:
            total = min(total, prompt + request.sampling.max_tokens)
        # The last token is sampled but never computed, so it needs no place.
        if pages_for(total - 1) > self._pages.num_total:
            most = self._pages.num_total * PAGE_TOKENS + 1
            param, change = "prompt", "shorten the prompt"
            if prompt < most:
                param, change = "max_tokens", f"ask for max_tokens of at most {most - prompt}"
            raise RequestError(
                f"prompt ({prompt}) plus output come to {total} tokens, but the KV pool holds {most} of a request",
                param=param, hint=f"{change}, or raise --num-gpu-blocks-override",
            )  # fmt: skip
        return total

    def _admit(self) -> Request | None:
        """Moves the oldest waiting request that does not wait for another to the running ones, if it fits."""
        if len(self._running) >= self.limits.max_num_seqs:
            return None
        for request in self._waiting[: self.limits.max_num_seqs]:
            if self.reuse.waits(request, self._running):
                continue
            if not self.reuse.admit(request):
                return None
            _remove(self._waiting, request)
            insort(self._running, request, key=_order)
            return request
        return None

    def _preempt(self, request: Request) -> None:
        self._release(request)
        request.num_computed = request.fold = 0
        request.drafts = ()
        request.num_preemptions += 1
        self.preemptions += 1
        insort(self._waiting, request, key=_order)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        ended_itself = reason in (FinishReason.STOP, FinishReason.LENGTH)
        if request.slot is not None:
            # A row that is planned ahead of an end leaves the state as it is.
            settled = ended_itself or request not in self._under_way
            self._release(request, keep=reason is not FinishReason.ERROR, settled=settled)
        else:
            _remove(self._waiting, request)
            self.reuse.forget(request)
        del self._requests[request.id]
        if self._proposer:
            self._proposer.forget(request.id)
        request.finish_reason = reason
        request.finished_at = time.monotonic()

    def _release(self, request: Request, *, keep: bool = True, settled: bool = True) -> None:
        """Takes a running request off the device. `settled`: its state is that of its last computed token."""
        _remove(self._running, request)
        self._under_way.pop(request, None)
        self.reuse.release(request, keep=keep, settled=settled)
        self._tables.pop(request.id, None)

    # ---- planning ---------------------------------------------------------------------------------------------

    def _grow(self, request: Request, preempted: list[str]) -> bool:
        """A page for the request's last token, at the cost of the youngest; False when that is itself."""
        if len(request.pages) >= pages_for(request.num_tokens):
            return True
        while not self.reuse.cache.make_room(1):
            victim = self._running[-1]
            self._preempt(victim)
            preempted.append(victim.id)
            if victim is request:
                return False
        request.pages += self._pages.allocate(1)
        return True

    def _verifiable(self, request: Request, budget: int) -> tuple[int, ...]:
        """The drafts that the next step verifies: no more than can be accepted, nor than free pages hold."""
        assert self._proposer is not None
        if len(request.output_ids) < request.sampling.min_tokens:
            return ()  # what the sampler must not pick would differ from draft to draft
        useful = request.max_total_tokens - request.num_tokens - 1
        most = min(self._depth(request), budget, useful)
        drafts = tuple(self._proposer.propose(request, most)) if most > 0 else ()
        room = len(request.pages) * PAGE_TOKENS - request.num_tokens
        if room < len(drafts) and self.reuse.cache.make_room(1):
            request.pages += self._pages.allocate(1)
            room += PAGE_TOKENS
        return drafts[: max(0, room)]

    def _row(self, request: Request, stop: int) -> RowPlan:
        sampling, prompt = request.sampling, len(request.prompt_ids)
        samples = stop == request.num_tokens
        drafts = request.drafts if samples else ()
        masked = samples and len(request.output_ids) < sampling.min_tokens
        assert request.slot is not None
        source, copy_page = self.reuse.start_of(request)
        return RowPlan(
            request_id=request.id,
            ids=request.ids(request.num_computed, stop) + drafts,
            start=request.num_computed,
            pages=self._table(request),
            slot=request.slot,
            samples=samples,
            sampling=sampling,
            seed=request.seed,
            eos_ids=_ends(request) if masked else frozenset(),
            prompt_len=prompt,
            history=request.ids(0, request.num_tokens) if samples and sampling.uses_penalties else None,
            next_ids=() if samples else request.ids(stop, stop + 1),
            num_drafts=len(drafts),
            # Of a prompt, the head follows what it will look back on.
            want_drafts=self._depth(request) if self._proposer and stop > request.num_tokens - HEAD_TOKENS else 0,
            head_since=request.head_since,
            constraint=request.constraint if samples else None,
            source=source,
            fold=request.fold,
            snapshots=self.reuse.snapshots(request, request.num_computed, stop),
            copy_page=copy_page,
        )

    def _table(self, request: Request) -> tuple[int, ...]:
        table = self._tables.get(request.id)
        if table is None or len(table) != len(request.pages):
            table = self._tables[request.id] = tuple(request.pages)
        return table

    def _grow_next(self, requests: list[Request]) -> bool:
        """A page for each request that needs one for the token after the one under way, without preemption."""
        short = [request for request in requests if len(request.pages) < pages_for(request.num_tokens + 1)]
        if not self.reuse.cache.make_room(len(short)):
            return False
        for request in short:
            request.pages += self._pages.allocate(1)
        return True

    # ---- committing -------------------------------------------------------------------------------------------

    def _commit_row(self, request: Request, row: RowPlan, out: RowResult) -> TokenEvent | None:
        accepted = max(0, len(out.tokens) - 1)
        request.num_computed = row.stop - row.num_drafts + accepted
        request.fold = accepted
        request.drafts = out.drafts
        if not row.want_drafts:
            request.head_since = request.num_computed
        # The row's i-th is the prompt's (start + i)-th; those before num_prompt_logprobs were told before.
        prompt_logprobs = out.prompt_logprobs[max(0, request.num_prompt_logprobs - row.start) :]
        request.num_prompt_logprobs += len(prompt_logprobs)
        if row.samples and not out.tokens:
            self.reuse.abandon(row)
            self._finish(request, FinishReason.ERROR)
            return TokenEvent(
                request.id,
                prompt_logprobs=prompt_logprobs,
                finish_reason=FinishReason.ERROR,
                error=(request.constraint and request.constraint.error) or "the model's logits are not finite",
                timing=_timing(request),
                cached_tokens=request.num_cached or 0,
            )
        if self.reuse.committed(request, row):
            del self._tables[request.id]
        if not row.samples:
            return TokenEvent(request.id, prompt_logprobs=prompt_logprobs) if prompt_logprobs else None
        if request.first_token_at is None:
            request.first_token_at = time.monotonic()
        reason, count = None, 0
        while reason is None and count < len(out.tokens):
            request.output_ids.append(out.tokens[count])
            reason = _ending(request, out.tokens[count])
            count += 1
        if request.constraint is not None:
            request.constraint.advance(out.tokens[:count])
        if reason is FinishReason.STOP:
            request.stop_token = out.tokens[count - 1]
        if reason is not None:
            # Of what was computed, the tokens that the answer has; the last one is never computed.
            request.num_computed = min(request.num_computed, request.num_tokens - 1)
            request.fold = max(0, count - 1)
            self._finish(request, reason)
        right = min(accepted, count)
        return TokenEvent(
            request.id,
            tokens=out.tokens[:count],
            logprobs=out.logprobs[:count],
            prompt_logprobs=prompt_logprobs,
            drafts=() if reason else out.drafts,
            num_drafts=right if reason else row.num_drafts,
            num_accepted=right,
            finish_reason=reason,
            stop_token=request.stop_token,
            timing=None if reason is None else _timing(request),
            cached_tokens=request.num_cached or 0,
        )


def _order(request: Request) -> tuple[int, int]:
    return request.priority, request.arrival


def _remove(queue: list[Request], request: Request) -> None:
    del queue[bisect_left(queue, _order(request), key=_order)]


def _decodes(request: Request) -> bool:
    return request.num_tokens - request.num_computed == 1


def _foreseeable(request: Request, row: RowPlan) -> bool:
    """Whether the row after `row` depends on its token by nothing but its id."""
    asked = row.sampling
    return (
        row.samples
        and len(row.ids) == 1
        and not (row.want_drafts or row.eos_ids or row.snapshots)
        and asked.logprobs is None
        and asked.prompt_logprobs is None
        and not (asked.uses_penalties or asked.logit_bias)
        and row.constraint is None
        and len(request.output_ids) + 1 >= asked.min_tokens
        and len(_ends(request)) <= MOST_ENDS
    )


def _ends(request: Request) -> frozenset[int]:
    """Ids that end a request that has its min_tokens."""
    stops = frozenset(request.sampling.stop_token_ids)
    return stops if request.sampling.ignore_eos else stops | request.eos_ids


def _chunk_stop(request: Request, budget: int) -> int:
    """Where a chunk of at most `budget` tokens ends: at the end of what is known, else on the last boundary in
    reach, else where the budget ends."""
    stop = request.num_computed + budget
    if stop >= request.num_tokens:
        return request.num_tokens
    boundary = stop - stop % CHUNK_TOKENS
    return boundary if boundary > request.num_computed else stop


def _ending(request: Request, token: int) -> FinishReason | None:
    if token in _ends(request) and len(request.output_ids) > request.sampling.min_tokens:
        return FinishReason.STOP
    return FinishReason.LENGTH if request.num_tokens >= request.max_total_tokens else None


def _timing(request: Request) -> Timing:
    assert request.finished_at is not None
    first = request.finished_at if request.first_token_at is None else request.first_token_at
    return Timing(
        queued=first - request.arrived_at,
        total=request.finished_at - request.arrived_at,
        output_tokens=len(request.output_ids),
        preemptions=request.num_preemptions,
    )
