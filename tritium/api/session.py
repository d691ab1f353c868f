"""The async door: requests in, events out, cancellation at any point; the engine runs beside the event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Protocol

from tritium.api.answer import Answer, merge
from tritium.api.door import Door, Message, Prompts, TextOptions, load, load_engine, load_format
from tritium.api.drive import Died, EngineThread, Report, Revived
from tritium.api.gate import Gate, Limits, Ticket
from tritium.api.process import EngineProcess
from tritium.config import EngineConfig
from tritium.core import (
    CacheCall,
    EngineDeadError,
    EngineStats,
    Event,
    FinishReason,
    SamplingParams,
    TokenEvent,
    TritiumError,
)

log = logging.getLogger(__name__)

Driver = EngineThread | EngineProcess
Observer = Callable[[FinishReason, Event | None], None]
"""Told of the end of every choice: why, and its last event (None when it was aborted or the engine died)."""


class Sink(Protocol):
    """Takes events at once, where the way through the generator and its task would cost more than all else."""

    @property
    def ready(self) -> bool:
        """Whether it takes one now."""
        ...

    def take(self, event: Event) -> None: ...


class Session:
    """Serves many callers of one event loop from one engine, which runs elsewhere: in a thread or in a process.

    The `Gate` lets requests in. What a step produced crosses to the loop in one call; text is made on the loop's
    side, so a slow reader never holds up the engine, and one that falls behind gets several tokens in one event.
    A `sink` is given the events that come while the generator waits and the sink is ready; the generator gives the
    others.
    """

    def __init__(self, driver: Driver, door: Door, *, limits: Limits | None = None) -> None:
        self.door = door
        self.observer: Observer | None = None
        self.restarts = 0
        self.gate = Gate(driver.facts.max_num_seqs, limits)
        self._driver = driver
        self._inboxes: dict[str, _Inbox] = {}
        self._stats = EngineStats()
        self._error: EngineDeadError | None = None
        self._closing = self._dead = False
        self._saving: asyncio.Task[None] | None = None
        self._calls: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._num_calls = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def load(cls, config: EngineConfig, *, limits: Limits | None = None) -> Session:
        """Load the model; blocks. Raises `TritiumError` for what cannot be loaded."""
        engine, door = load(config)
        return cls(EngineThread(engine), door, limits=limits)

    @classmethod
    def spawn(cls, config: EngineConfig, *, limits: Limits | None = None) -> Session:
        """The same with the engine in a process of its own, which is started again when it dies."""
        driver = EngineProcess(functools.partial(load_engine, config))
        return cls(driver, Door(driver.facts, load_format(config, driver.facts.directory), seed=config.seed),
                   limits=limits)

    def start(self) -> None:
        """Start the engine, bound to the running event loop. `generate` does so when it must."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._driver.start(self._take)

    @property
    def alive(self) -> bool:
        return self._error is None

    @property
    def draining(self) -> bool:
        return self._closing

    def stats(self) -> EngineStats:
        """The engine's numbers as of its last step or command, and what waits outside it."""
        waiting = self.gate.waiting
        return dataclasses.replace(self._stats, waiting=self._stats.waiting + waiting) if waiting else self._stats

    def generate(self, prompts: Prompts, sampling: SamplingParams | None = None, *, options: TextOptions | None = None,
                 priority: int = 0, key: str = "", sink: Sink | None = None) -> AsyncGenerator[Event, None]:
        """Events of every choice of every prompt, as they come; choice j of prompt i has index i n + j.

        The last event of a choice has `finish_reason`, `usage` and `timing`. Leaving early (closing the generator,
        cancelling the task) aborts what still runs. Raises `RequestError` for a bad prompt or parameter before the
        first event, `BusyError` when more is asked than is served at once (by all, or by the holder of `key`),
        `EngineDeadError` when the engine dies, `OvertimeError`.
        """
        return self._events(lambda: self.door.prompted(prompts, sampling, options=options, priority=priority),
                            key, priority, sink)

    def chat(self, messages: Sequence[Message], sampling: SamplingParams | None = None, *, tools: object = None,
             add_generation_prompt: bool = True, template_kwargs: Mapping[str, Any] | None = None,
             options: TextOptions | None = None, priority: int = 0, key: str = "", sink: Sink | None = None
             ) -> AsyncGenerator[Event, None]:
        """`generate` for a conversation: the template is applied, reasoning and tool calls are split out."""
        return self._events(lambda: self.door.chatted(
            messages, sampling, tools=tools, add_generation_prompt=add_generation_prompt,
            template_kwargs=template_kwargs, options=options, priority=priority), key, priority, sink)

    async def keep(self, action: str, name: str = "", ids: Sequence[int] | None = None) -> dict[str, Any]:
        """Save, load or flush the prefix cache (see `CacheCall`), between two steps; what was done, in numbers.

        Raises `CacheFileError` for a file that cannot be written or must not be loaded, `RequestError`,
        `EngineDeadError`.
        """
        if self._error is not None:
            raise self._error
        return await self._keep(action, name, ids)

    async def _keep(self, action: str, name: str = "", ids: Sequence[int] | None = None) -> dict[str, Any]:
        self.start()
        call = CacheCall(f"c{next(self._num_calls)}", action, name, None if ids is None else tuple(ids))
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._calls[call.id] = answer
        self._driver.send(call)
        try:
            return await answer
        finally:
            del self._calls[call.id]

    async def _save(self) -> None:
        try:
            done = await self._keep("save")
            log.warning("%(tokens)d cached tokens saved in %(seconds)g s", done)
        except TritiumError as error:
            log.warning("the prefix cache is not saved: %s", error)

    async def drain(self, seconds: float) -> None:
        """Refuse new requests from now on, and wait at most so long for those that are here."""
        self._closing, self._error = True, EngineDeadError("the server is shutting down")
        deadline = asyncio.get_running_loop().time() + seconds
        while (self._inboxes or self.gate.waiting) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)

    async def close(self, *, drain_seconds: float = 0.0) -> None:
        """Drain, abort the rest, stop the engine."""
        await self.drain(drain_seconds)
        self._fail(self._error or EngineDeadError("the server is shutting down"))
        if self._driver.facts.keeps_cache and self._loop is not None and not self._dead:
            self._saving = self._saving or asyncio.ensure_future(self._save())
            await self._saving
        await self._driver.close()

    async def __aenter__(self) -> Session:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _events(self, prepare: Callable[[], Sequence[Answer]], key: str, priority: int, sink: Sink | None
                      ) -> AsyncGenerator[Event, None]:
        if self._error is not None:
            raise self._error
        self.start()
        ticket = self.gate.enter(key, priority)
        inbox = _Inbox(ticket, sink)
        overtime: asyncio.TimerHandle | None = None
        open_answers: dict[str, Answer] = {}
        reason = FinishReason.ABORT
        try:
            answers = await asyncio.to_thread(prepare)  # tokenizing a long prompt takes time that others need
            if self._error is not None:
                raise self._error
            open_answers = inbox.answers = {answer.request.id: answer for answer in answers}
            self._inboxes |= dict.fromkeys(open_answers, inbox)
            overtime = self._end_in_time(inbox, list(open_answers))
            ticket.ready(len(answers), sum(len(answer.request.prompt_ids) for answer in answers),
                         lambda: self._admit(answers))
            while open_answers:
                for token_event, made_at in await inbox.take():
                    answer = open_answers.get(token_event.request_id)
                    if answer is None:  # came after the stop string that ended it
                        continue
                    said = inbox.said.pop(token_event.request_id, None)
                    event = said or answer.take(token_event, made_at)
                    if event.error is not None:
                        raise TritiumError(event.error)
                    if answer.finished:
                        del open_answers[answer.request.id]
                        self._release(answer, event, abort=token_event.finish_reason is None)
                    if said is None:
                        yield event
        except TritiumError:
            reason = FinishReason.ERROR
            raise
        finally:
            if overtime is not None:
                overtime.cancel()
            for left in open_answers.values():
                self._release(left, None, abort=ticket.inside, reason=reason)
            ticket.leave()

    def _admit(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            answer.admitted_at = time.monotonic()
            self._driver.send(answer.request)

    def _end_in_time(self, inbox: _Inbox, ids: Sequence[str]) -> asyncio.TimerHandle | None:
        seconds = self.gate.limits.request_timeout
        if seconds is None:
            return None

        def end() -> None:
            inbox.fail(OvertimeError(f"not finished within the {seconds:g} s that a request may take, waiting included",
                                     hint="ask for fewer tokens, send fewer at once, or raise --request-timeout"))
            for request_id in ids:  # now, though the reader may be stuck
                self._driver.send(request_id)

        assert self._loop is not None
        return self._loop.call_later(seconds, end)

    def _release(self, answer: Answer, event: Event | None, *, abort: bool,
                 reason: FinishReason = FinishReason.STOP) -> None:
        """Forget a choice that ended; the engine is told where it does not know."""
        inbox = self._inboxes.pop(answer.request.id, None)
        if abort:
            self._driver.send(answer.request.id)
            if inbox is not None:
                inbox.ended(answer.request.id)
        if self.observer is not None:
            self.observer(reason if event is None or event.finish_reason is None else event.finish_reason, event)

    def _take(self, told: Report | Died | Revived) -> None:
        if isinstance(told, Report):
            self._stats = told.stats
            for request_id, error in told.refused:
                if (inbox := self._inboxes.get(request_id)) is not None:
                    inbox.fail(error)
            for call_id, done in told.kept:
                answer = self._calls.get(call_id)
                if answer is None or answer.done():
                    continue
                if isinstance(done, TritiumError):
                    answer.set_exception(done)
                else:
                    answer.set_result(done)
            for event in told.events:
                if (inbox := self._inboxes.get(event.request_id)) is not None:
                    inbox.put(event, told.made_at)
        elif isinstance(told, Died):
            self._stats = dataclasses.replace(self._stats, running=0, waiting=0, pages_used=0, slots_used=0)
            self._dead = True
            self._fail(told.error)
            for answer in self._calls.values():
                if not answer.done():
                    answer.set_exception(told.error)
        elif not self._closing:
            self._error, self._stats, self._dead = None, EngineStats(), False
            self.restarts += 1

    def _fail(self, error: EngineDeadError) -> None:
        if not self._closing:
            self._error = error
        for inbox in self._inboxes.values():
            inbox.fail(error)


class OvertimeError(TritiumError):
    """A request that took longer than a request may."""


class _Inbox:
    """Events on their way to one caller. Used on the loop only."""

    def __init__(self, ticket: Ticket, sink: Sink | None) -> None:
        self.answers: dict[str, Answer] = {}
        self.said: dict[str, Event] = {}
        """The last event of a choice, where the sink has it already."""
        self._ticket = ticket
        self._sink = sink
        self._events: dict[str, deque[TokenEvent]] = {}
        self._made_at = 0.0
        self._ended: set[str] = set()
        self._error: Exception | None = None
        self._wake = asyncio.Event()
        self._waiting = False
        """Whether all that came before is on its way."""

    def put(self, event: TokenEvent, made_at: float) -> None:
        self._ticket.charge(len(event.tokens))
        sink = self._sink
        if (sink is not None and self._waiting and not self._wake.is_set() and event.error is None and sink.ready
                and not (answer := self.answers[event.request_id]).may_stop):
            try:
                said = answer.take(event, made_at)
                sink.take(said)
            except Exception as error:  # this answer's alone
                self.fail(error)
                return
            if event.finish_reason is None:
                return
            self.said[event.request_id] = said
        elif not event.tokens and event.finish_reason is None and not event.prompt_logprobs:
            return
        if not self._events:
            self._made_at = made_at
        self._events.setdefault(event.request_id, deque()).append(event)
        if event.finish_reason is not None:  # here, for the reader may be slow
            self.ended(event.request_id)
        self._wake.set()

    def ended(self, request_id: str) -> None:
        """The engine is done with a choice: another may take its place."""
        if request_id not in self._ended:
            self._ended.add(request_id)
            self._ticket.choices_ended()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._wake.set()

    async def take(self) -> list[tuple[TokenEvent, float]]:
        """Wait, then give what has come, each request's events merged into one, and when the oldest was made.
        Raises the error that ended it, after what came before it."""
        self._waiting = True
        try:
            await self._wake.wait()
        finally:
            self._waiting = False
        if self._events:
            taken, self._events = self._events, {}
            if self._error is None:
                self._wake.clear()
            return [(merge(events), self._made_at) for events in taken.values()]
        assert self._error is not None
        raise self._error
