"""The async door: the engine in its own thread, requests in, events out, cancellation at any point."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from tritium.api.answer import Answer, merge
from tritium.api.door import Door, Message, Prompts, TextOptions, load
from tritium.api.engine_core import EngineCore
from tritium.chat import ChatFormat
from tritium.config import EngineConfig
from tritium.core import (
    EngineDeadError,
    EngineStats,
    Event,
    FinishReason,
    Request,
    RequestError,
    SamplingParams,
    TokenEvent,
    TritiumError,
)

log = logging.getLogger(__name__)

Observer = Callable[[FinishReason, Event | None], None]
"""Told of the end of every choice: why, and its last event (None when it was aborted or the engine died)."""


class Session:
    """Serves many callers of one event loop from one engine.

    The engine lives in a thread of its own, which takes commands (a request to add, an id to abort, None to stop)
    between steps. What a step produced crosses to the loop in one call; text is made on the loop's side, so a slow
    reader never holds up the engine, and one that falls behind gets several tokens in one event.
    """

    def __init__(self, engine: EngineCore, door: Door, *, observer: Observer | None = None) -> None:
        self.door = door
        self.observer = observer
        self._engine = engine
        self._commands: queue.SimpleQueue[Request | str | None] = queue.SimpleQueue()
        self._inboxes: dict[str, _Inbox] = {}
        self._stats = engine.stats()
        self._error: EngineDeadError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._serve, name="tritium-engine", daemon=True)

    @classmethod
    def load(cls, config: EngineConfig) -> Session:
        """Load the model; blocks. Raises `TritiumError` for what cannot be loaded."""
        return cls(*load(config))

    @classmethod
    def over(cls, engine: EngineCore, chat: ChatFormat, *, seed: int | None = None) -> Session:
        """A session over an engine that exists, such as a `ScriptedEngine`."""
        return cls(engine, Door(engine, chat, seed=seed))

    def start(self) -> None:
        """Start the engine's thread, bound to the running event loop. `generate` does so when it must."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._thread.start()

    @property
    def alive(self) -> bool:
        return self._error is None

    def stats(self) -> EngineStats:
        """The engine's numbers as of its last step or command."""
        return self._stats

    def generate(
        self,
        prompts: Prompts,
        sampling: SamplingParams | None = None,
        *,
        options: TextOptions | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[Event, None]:
        """Events of every choice of every prompt, as they come; choice j of prompt i has index i n + j.

        The last event of a choice has `finish_reason`, `usage` and `timing`. Leaving early (closing the generator,
        cancelling the task) aborts what still runs. Raises `RequestError` for a bad prompt or parameter before the
        first event, `EngineDeadError` when the engine dies.
        """
        return self._events(lambda: self.door.prompted(prompts, sampling, options=options, priority=priority))

    def chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        tools: object = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
        options: TextOptions | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[Event, None]:
        """`generate` for a conversation: the template is applied, reasoning and tool calls are split out."""
        return self._events(lambda: self.door.chatted(
            messages, sampling, tools=tools, add_generation_prompt=add_generation_prompt,
            template_kwargs=template_kwargs, options=options, priority=priority))

    async def close(self, *, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, wait at most `drain_seconds` for the running ones, abort the rest, stop the engine."""
        self._error = self._error or EngineDeadError("the server is shutting down")
        deadline = asyncio.get_running_loop().time() + drain_seconds
        while self._inboxes and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        self._fail(self._error)
        if self._loop is None:
            self._engine.close()
            return
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> Session:
        self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        await self.close()

    # The loop's side.

    async def _events(self, prepare: Callable[[], Sequence[Answer]]) -> AsyncGenerator[Event, None]:
        answers = await asyncio.to_thread(prepare)  # tokenizing a long prompt takes time that others need
        if self._error is not None:
            raise self._error
        self.start()
        inbox = _Inbox()
        open_answers = {answer.request.id: answer for answer in answers}
        self._inboxes |= dict.fromkeys(open_answers, inbox)
        for queued in answers:
            self._commands.put(queued.request)
        reason = FinishReason.ABORT
        try:
            while open_answers:
                for token_event in await inbox.take():
                    answer = open_answers.get(token_event.request_id)
                    if answer is None:  # came after the stop string that ended it
                        continue
                    event = answer.take(token_event)
                    if event.error is not None:
                        raise TritiumError(event.error)
                    if answer.finished:
                        del open_answers[answer.request.id]
                        self._release(answer, event, abort=token_event.finish_reason is None)
                    yield event
        except TritiumError:
            reason = FinishReason.ERROR
            raise
        finally:
            for left in open_answers.values():
                self._release(left, None, abort=True, reason=reason)

    def _release(self, answer: Answer, event: Event | None, *, abort: bool,
                 reason: FinishReason = FinishReason.STOP) -> None:
        """Forget a choice that ended; the engine is told where it does not know."""
        self._inboxes.pop(answer.request.id, None)
        if abort:
            self._commands.put(answer.request.id)
        if self.observer is not None:
            self.observer(reason if event is None or event.finish_reason is None else event.finish_reason, event)

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            inbox = self._inboxes.get(event.request_id)
            if inbox is not None:
                inbox.put(event)

    def _refuse(self, request_id: str, error: RequestError) -> None:
        inbox = self._inboxes.get(request_id)
        if inbox is not None:
            inbox.fail(error)

    def _fail(self, error: EngineDeadError) -> None:
        self._error = error
        for inbox in self._inboxes.values():
            inbox.fail(error)

    # The engine's thread.

    def _serve(self) -> None:
        try:
            while self._obey():
                if self._engine.has_work:
                    events = self._engine.step()
                    self._stats = self._engine.stats()
                    if events:
                        self._post(self._deliver, events)
        except Exception as error:
            log.exception("the engine died")
            self._stats = dataclasses.replace(self._stats, running=0, waiting=0, pages_used=0, slots_used=0)
            self._post(self._fail, EngineDeadError(f"the engine died: {type(error).__name__}: {error}",
                                                   hint="see the server's log, then restart it"))
        finally:
            self._engine.close()

    def _obey(self) -> bool:
        """Carry out what was commanded, sleeping until there is something to do. False: stop."""
        while True:
            try:
                command = self._commands.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            if isinstance(command, str):
                self._engine.abort(command)
            else:
                try:
                    self._engine.add(command)
                except RequestError as error:
                    self._post(self._refuse, command.id, error)
            self._stats = self._engine.stats()

    def _post(self, call: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            log.debug("an event was lost: the event loop is closed")


class _Inbox:
    """Events on their way to one caller. Used on the loop only."""

    def __init__(self) -> None:
        self._events: dict[str, deque[TokenEvent]] = {}
        self._error: TritiumError | None = None
        self._wake = asyncio.Event()

    def put(self, event: TokenEvent) -> None:
        self._events.setdefault(event.request_id, deque()).append(event)
        self._wake.set()

    def fail(self, error: TritiumError) -> None:
        self._error = error
        self._wake.set()

    async def take(self) -> list[TokenEvent]:
        """Wait, then give what has come, each request's events merged into one. Raises the error that ended it,
        after what came before it."""
        await self._wake.wait()
        if self._events:
            taken, self._events = self._events, {}
            if self._error is None:
                self._wake.clear()
            return [merge(events) for events in taken.values()]
        assert self._error is not None
        raise self._error
