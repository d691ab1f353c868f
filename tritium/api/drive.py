"""Running an engine beside the event loop: commands in, reports out. In a thread here; in a process in `process`."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritium.core import CacheCall, EngineDeadError, EngineStats, Request, RequestError, TokenEvent, TritiumError
from tritium.models.config import ModelConfig

if TYPE_CHECKING:
    from tritium.engine import Engine

log = logging.getLogger(__name__)

Command = Request | str | CacheCall | None
"""A request to add, an id to abort, something to do with the cache, None to stop."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What does not change while an engine lives: all that the api must know of one that is elsewhere."""

    model_config: ModelConfig
    directory: Path
    max_model_len: int
    max_num_seqs: int
    generation_defaults: Mapping[str, Any]
    keeps_cache: bool

    @classmethod
    def of(cls, engine: Engine) -> EngineFacts:
        return cls(engine.model_config, engine.directory, engine.max_model_len, engine.max_num_seqs,
                   dict(engine.generation_defaults), engine.keeps_cache)


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a step, or of commands alone."""

    events: list[TokenEvent]
    stats: EngineStats
    made_at: float
    """End of the step, on the monotonic clock that all processes of a machine share."""
    refused: tuple[tuple[str, RequestError], ...] = ()
    kept: tuple[tuple[str, dict[str, Any] | TritiumError], ...] = ()
    """What came of each `CacheCall`, by its id."""


@dataclass(frozen=True, slots=True)
class Died:
    """The engine is gone, and all that it held."""

    error: EngineDeadError


@dataclass(frozen=True, slots=True)
class Revived:
    """A new engine took its place."""


Tell = Callable[[Report | Died | Revived], None]


def drive(engine: Engine, commands: queue.SimpleQueue[Command], tell: Callable[[Report], None]) -> None:
    """Serve an engine until None is commanded, sleeping while there is nothing to do."""
    while True:
        refused: list[tuple[str, RequestError]] = []
        kept: list[tuple[str, dict[str, Any] | TritiumError]] = []
        obeyed = False
        while not (commands.empty() and (obeyed or engine.has_work)):
            obeyed, command = True, commands.get()
            if command is None:
                return
            if isinstance(command, str):
                engine.abort(command)
            elif isinstance(command, CacheCall):
                try:
                    kept.append((command.id, engine.keep(command)))
                except TritiumError as error:
                    kept.append((command.id, error))
            else:
                try:
                    engine.add(command)
                except RequestError as error:
                    refused.append((command.id, error))
        events, made_at = engine.step() if engine.has_work else [], time.monotonic()
        tell(Report(events, engine.stats(), made_at, tuple(refused), tuple(kept)))


def died(error: BaseException) -> Died:
    return Died(EngineDeadError(f"the engine died: {type(error).__name__}: {error}",
                                hint="see the server's log"))


class EngineThread:
    """An engine in a thread of this process. It does not come back when it dies."""

    def __init__(self, engine: Engine) -> None:
        self.facts = EngineFacts.of(engine)
        self._engine = engine
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, tell: Tell) -> None:
        """`tell` is called on the event loop that this is called on, in order."""
        loop = asyncio.get_running_loop()

        def pass_on(told: Report | Died) -> None:
            try:
                loop.call_soon_threadsafe(tell, told)
            except RuntimeError:  # the loop is closed: nobody is left to tell
                log.debug("an event was lost: the event loop is closed")

        self._thread = threading.Thread(target=self._run, args=(pass_on,), name="tritium-engine", daemon=True)
        self._thread.start()

    def send(self, command: Command) -> None:
        """Never blocks. What is sent to an engine that died is lost: `Died` is told in any case."""
        self._commands.put(command)

    async def close(self) -> None:
        """Stop the engine, and wait until it is gone."""
        if self._thread is None:
            self._engine.close()
            return
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self, tell: Callable[[Report | Died], None]) -> None:
        try:
            drive(self._engine, self._commands, tell)
        except Exception as error:
            log.exception("the engine died")
            tell(died(error))
        finally:
            self._engine.close()
