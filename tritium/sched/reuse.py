"""What requests take over from those before them and leave to those after: the prefix cache, seen from the scheduler.

Where checkpoints are kept (positions in tokens, n the prompt's length):

    n - 1                    the same prompt again; a regenerated answer
    turn starts              the last few: an edited last message, a template that rewrites the last answer
    where a match parted     KV went further than the nearest checkpoint: the next one to part there resumes there
    multiples of 64          a ladder for prompts that part where nobody expected it: each back to n - 1024, from there
                             on no further apart than an eighth of the way to n; first to be evicted, and all rungs
                             but eight take only a slot that is free
    the end                  the slot of a request that ends or is preempted, as it is: the next turn of a chat

Requests that arrive together. One that shares at least 64 tokens more with a request under prefill than it could reuse
now waits for it to pass the place where they part, asks it for a checkpoint there, and is overtaken meanwhile. It waits
only for requests that run and prefill, hence that make progress, and only while these have not passed that place.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tritium.cache import Lease, Match, PagePool, PrefixCache, SlotPool, common_prefix, pages_for
from tritium.core import PAGE_TOKENS, SHORT_ROW, Request, RowPlan

log = logging.getLogger("tritium.cache")

WORTH_WAITING = 64
"""Tokens that waiting for another request must save."""
WORTH_KEEPING = 16
"""Tokens that a checkpoint where a match parted must save."""
TURNS = 4
LADDER = 8192
"""Tokens from the end of a prompt to its last rung."""


HOT, COLD, SPARE = range(3)
"""A checkpoint; one that is evicted before others; and one that evicts none."""


@dataclass(slots=True, eq=False)
class _Share:
    """A running request's part in the cache."""

    lease: Lease
    source: int | None
    """Slot to start from and page to copy, until the first step is committed."""
    copy_page: tuple[int, int] | None
    wanted: dict[int, int] = field(default_factory=dict)
    """Positions still to be kept, most wanted first: HOT, COLD or SPARE."""
    cold: set[int] = field(default_factory=set)
    """Slots of snapshots under way that are cold."""


class Reuse:
    """Gives requests their pages and slots, and takes them back. Without a `cache` nothing outlives its request."""

    def __init__(self, pages: PagePool, slots: SlotPool, cache: PrefixCache | None) -> None:
        self.enabled = cache is not None
        self.cache = cache or PrefixCache(pages, slots)
        self.text_of: Callable[[Sequence[int]], str] = str
        """How the debug log shows tokens."""
        self.hit_tokens = 0
        self.missed_tokens: Counter[str] = Counter()
        self.pages, self.slots = pages, slots
        self._shares: dict[Request, _Share] = {}
        self._matches: dict[Request, tuple[int, Match]] = {}
        self._leaders: dict[Request, tuple[Request, int]] = {}
        self._common: dict[Request, dict[Request, int]] = {}

    # ---- before a request runs --------------------------------------------------------------------------------

    def waits(self, request: Request, running: Sequence[Request]) -> bool:
        """Whether `request` should wait for one of `running` to compute what both begin with."""
        if not self.enabled or not (limit := _limit(request)):
            return False
        if request in self._leaders:
            leader, shared = self._leaders[request]
            if leader in self._shares and _prefills(leader) and leader.num_computed < shared:
                return True
            del self._leaders[request]
        for leader in running:
            if not _prefills(leader):
                continue
            shared = min(self._in_common(request, leader), limit)
            if leader.num_computed < shared and shared - self._match(request).position >= WORTH_WAITING:
                self._shares[leader].wanted.setdefault(shared, HOT)
                self._leaders[request] = leader, shared
                return True
        return False

    def admit(self, request: Request) -> bool:
        """Pages for all its known tokens and a slot, as much of it from the cache as can be; False, and nothing
        taken, when there is no room."""
        match = self._match(request)
        if not self._admit(request, match):
            if match.partial is None:
                return False
            # Not even a page for the copy of a partial one: start on a page boundary, which needs none.
            match = self.cache.match(request.ids, _limit(request), align=PAGE_TOKENS)
            if not self._admit(request, match):
                return False
        request.num_computed = match.position
        self.forget(request)
        if self.enabled:
            self._plan_checkpoints(request, match)
            if request.num_cached is None:
                self._tell(request, match)
        return True

    def forget(self, request: Request) -> None:
        """It does not wait any more."""
        for table in (self._matches, self._leaders, self._common):
            table.pop(request, None)

    # ---- while it runs ----------------------------------------------------------------------------------------

    def start_of(self, request: Request) -> tuple[int | None, tuple[int, int] | None]:
        """(slot to start from, page to copy) for its next step."""
        share = self._shares[request]
        return share.source, share.copy_page

    def snapshots(self, request: Request, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        """(position, slot) of the checkpoints that a step over [start, stop) is to leave, as far as slots can be had
        that no request uses. A short row leaves one, the most wanted: its kernel stores one state on its way."""
        share, taken = self._shares[request], list[tuple[int, int]]()
        if not share.wanted:
            return ()
        for position in [p for p in share.wanted if p <= stop]:
            kind = share.wanted.pop(position)
            full = (taken and stop - start <= SHORT_ROW) or (kind == SPARE and not self.slots.num_free)
            if position > start and not full and (slot := self.cache.take_slot()) is not None:
                taken.append((position, slot))
                if kind:
                    share.cold.add(slot)
        return tuple(sorted(taken))

    def committed(self, request: Request, row: RowPlan) -> bool:
        """Takes in a step of `request`, whose num_computed is up to date; whether its block table changed."""
        share, changed = self._shares[request], False
        if share.lease.checkpoint or share.lease.partial or share.source:
            self.cache.settle(share.lease)
            share.source = share.copy_page = None
        if self.enabled and (len(row.ids) - row.num_drafts > 1 or row.snapshots):
            changed = self.cache.publish(
                share.lease, request.ids, request.pages, request.num_computed, tail=bool(row.snapshots)
            )
        for position, slot in row.snapshots:
            self.cache.attach(share.lease, request.ids, position, slot, cold=slot in share.cold)
        share.cold.clear()
        return changed

    def abandon(self, row: RowPlan) -> None:
        """A step was computed for a request that is gone."""
        for _, slot in row.snapshots:
            self.slots.release(slot)

    def release(self, request: Request, *, keep: bool, settled: bool) -> None:
        """Takes a request off the device. With `keep` all it computed stays for others, and, when it is `settled` (no
        step of it is under way), its slot becomes the checkpoint at its end."""
        share = self._shares.pop(request)
        computed, state_at = request.num_computed, request.num_computed - request.fold
        keep = keep and self.enabled and state_at > 0
        assert request.slot is not None
        if keep:
            self.cache.publish(share.lease, request.ids, request.pages, computed, tail=True)
        if keep and settled:
            self.cache.attach(share.lease, request.ids, state_at, request.slot)
        else:
            self.slots.release(request.slot)
        self.cache.release(share.lease, request.pages)
        request.pages, request.slot = [], None

    # ---- inside -----------------------------------------------------------------------------------------------

    def _match(self, request: Request) -> Match:
        version, match = self._matches.get(request, (-1, None))
        if match is None or version != self.cache.version:
            match = self.cache.match(request.ids, _limit(request) if self.enabled else 0)
            self._matches[request] = self.cache.version, match
        return match

    def _admit(self, request: Request, match: Match) -> bool:
        lease = self.cache.acquire(match)
        own = pages_for(request.num_tokens) - match.node.end // PAGE_TOKENS
        if not self.cache.can_have(own):
            self.cache.release(lease, ())
            return False
        slot = self.cache.take_slot()
        source = self.cache.bring_back(lease, slot) if slot is not None else self.cache.take_over(lease)
        if slot is None and (slot := source) is None:
            self.cache.release(lease, ())
            return False
        self.cache.make_room(own)
        fresh = self.pages.allocate(own)
        request.pages, request.slot = self.cache.path_pages(match.node) + fresh, slot
        copy = None if match.partial is None else (match.partial.page, fresh[0])
        self._shares[request] = _Share(lease, source, copy)
        return True

    def _plan_checkpoints(self, request: Request, match: Match) -> None:
        end = len(request.prompt_ids)
        hot = [end - 1, *reversed([p for p in request.turn_starts if p < end][-TURNS:])]
        if match.kv_length - match.position >= WORTH_KEEPING:
            hot.insert(0, match.kv_length)
        wanted = self._shares[request].wanted
        for position in hot:
            wanted.setdefault(position, HOT)
        for i, rung in enumerate(_ladder(end), 1):
            wanted.setdefault(rung, COLD if i % 8 == 0 or i & (i - 1) == 0 else SPARE)
        for position in [p for p in wanted if p <= match.position]:
            del wanted[position]

    def _in_common(self, request: Request, leader: Request) -> int:
        known = self._common.setdefault(request, {})
        if leader not in known:
            if len(known) > 64:
                known.clear()
            known[leader] = common_prefix(request.ids(0, request.num_tokens), leader.ids(0, leader.num_tokens))
        return known[leader]

    def _tell(self, request: Request, match: Match) -> None:
        """Counts hit and missed tokens of a request, the first time that it runs."""
        length = len(request.prompt_ids)
        request.num_cached = min(match.position, length)
        self.hit_tokens += request.num_cached
        self.missed_tokens.update(self.cache.explain(match, request.ids, length))
        if match.parted and match.kv_length >= WORTH_KEEPING and log.isEnabledFor(logging.DEBUG):
            at = match.kv_length
            log.debug(
                "%s: %d of %d tokens reused; token %d is the first that differs from the nearest prompt: "
                "after %r comes %r, there it was %r",
                request.id, match.position, length, at, self.text_of(request.ids(max(0, at - 16), at)),
                self.text_of(request.ids(at, at + 8)), self.text_of(match.parted[:8]),
            )  # fmt: skip


def _ladder(end: int) -> Iterator[int]:
    """Rungs back from `end`: on the same multiples for all prompts, where chunks end anyway."""
    rung, step = end, PAGE_TOKENS
    while (rung := (rung - 1) // step * step) > 0 and end - rung <= LADDER:
        yield rung
        if end - rung >= 16 * step:
            step *= 2


def _prefills(request: Request) -> bool:
    return request.num_tokens - request.num_computed > 1


def _limit(request: Request) -> int:
    """Most tokens that a request may take over: all but one, and of a prompt whose log-probabilities are asked for
    only what they were told of (every token's logits are needed)."""
    told, prompt = request.num_prompt_logprobs, len(request.prompt_ids)
    if request.sampling.prompt_logprobs is not None and told < prompt - 1:
        return told
    return request.num_tokens - 1
