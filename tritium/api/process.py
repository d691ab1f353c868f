"""An engine in a process of its own, watched: when it dies, its requests end in words and another takes its place.

Parent and child speak pickles over a pair of sockets: commands one way, one message a step the other, which the parent
reads on its event loop. The child takes the end of its socket for the end of its parent, however that came, and leaves
at once; signals of the terminal are the parent's business.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import operator
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from tritium.api.drive import Command, Died, EngineFacts, Report, Revived, Tell, died, drive
from tritium.core import EngineDeadError, EngineStats, TokenEvent, TritiumError

if TYPE_CHECKING:
    from tritium.engine import Engine

log = logging.getLogger(__name__)

_BACK_OFF = (0.1, 30.0)
"""Seconds before the first restart, and the most; doubled each time, until an engine has lived that long."""
_PATIENCE = 5.0
_MAIN = f"import sys; from {__name__} import main; main(int(sys.argv[1]))"
_AWAKE_SECONDS = 0.002
_EVENT = operator.attrgetter(*(field.name for field in fields(TokenEvent)))
_PLAIN = _EVENT(TokenEvent(""))[3:]
"""Of an event that tells of tokens and nothing else, what follows them."""
_STATS = operator.attrgetter(*(field.name for field in fields(EngineStats)))


class EngineProcess:
    """An engine that `load` makes in a child, driven as by `EngineThread`. `load` must be picklable; it runs again on a
    restart."""

    def __init__(self, load: Callable[[], Engine]) -> None:
        """Blocks until the engine is loaded. Raises what `load` raises, if it is a `TritiumError`."""
        self._load = load
        self._closing = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._child = _Child(load)
        try:
            self.facts = self._child.wait_ready()
        except BaseException:
            self._child.end()
            raise

    def start(self, tell: Tell) -> None:
        self._watcher = asyncio.ensure_future(self._watch(tell))

    def send(self, command: Command) -> None:
        self._child.send(command)

    async def close(self) -> None:
        self._closing.set()
        self._child.send(None)
        if self._watcher is not None:
            await asyncio.wait({self._watcher}, timeout=_PATIENCE)
            self._watcher.cancel()
        await asyncio.to_thread(self._child.end)

    async def _watch(self, tell: Tell) -> None:
        """Pass on what the child tells, and replace it when it dies."""
        pause = _BACK_OFF[0]
        while True:
            born = time.monotonic()
            error = await self._child.listen(tell)
            await asyncio.to_thread(self._child.end)
            if self._closing.is_set():
                return
            tell(Died(error))
            log.error("%s; it is started again", error.message)
            if time.monotonic() - born > _BACK_OFF[1]:
                pause = _BACK_OFF[0]
            while not await self._revive(pause):
                if self._closing.is_set():
                    return
                pause = min(2 * pause, _BACK_OFF[1])
            pause = min(2 * pause, _BACK_OFF[1])
            tell(Revived())

    async def _revive(self, pause: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), pause)
            return False
        self._child = child = _Child(self._load)
        try:
            await asyncio.to_thread(child.wait_ready)
        except TritiumError as error:
            log.error("the engine did not start: %s", error)
            await asyncio.to_thread(child.end)
            return False
        log.warning("the engine is back")
        return True


class _Child:
    """One process and the line to it."""

    def __init__(self, load: Callable[[], Engine]) -> None:
        self._socket, theirs = socket.socketpair()
        # The child finds the same modules, and none of what else the parent has open.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with theirs:
            self.process = subprocess.Popen([sys.executable, "-c", _MAIN, str(theirs.fileno())],
                                            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
        self._writer: asyncio.Transport | None = None
        self._unsent: list[bytes] = []
        with suppress(OSError):  # it died at once, as `wait_ready` finds out
            self._socket.sendall(_framed((logging.getLogger("tritium").getEffectiveLevel(), load)))

    def wait_ready(self) -> EngineFacts:
        try:
            with self._socket.makefile("rb") as line:
                facts = pickle.loads(line.read(int.from_bytes(line.read(4), "big")))
        except (EOFError, OSError, pickle.UnpicklingError):
            raise EngineDeadError(f"the engine died while it was loading ({self._how()})",
                                  hint="see the server's log") from None
        if isinstance(facts, Died):
            raise facts.error
        if isinstance(facts, TritiumError):
            raise facts
        assert isinstance(facts, EngineFacts)
        return facts

    async def listen(self, tell: Tell) -> EngineDeadError:
        """Until the child is gone; -> why."""
        self._writer, line = await asyncio.get_running_loop().create_connection(
            lambda: _Line(tell), sock=self._socket)
        self._writer.write(b"".join(self._unsent))
        try:
            await line.closed.wait()
            return line.death or EngineDeadError(f"the engine died ({await asyncio.to_thread(self._how)})",
                                                 hint="see the server's log")
        finally:
            self._writer.abort()

    def send(self, command: Command) -> None:
        """What is sent to a child that died is lost."""
        if self._writer is None:
            self._unsent.append(_framed(command))
        elif not self._writer.is_closing():
            self._writer.write(_framed(command))

    def end(self) -> None:
        """See the process off, whatever its state; blocks."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self._writer is None:
            self._socket.close()

    def _how(self) -> str:
        try:
            code = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "it closed its line"
        return f"signal {-code}" if code < 0 else f"exit code {code}"


class _Line(asyncio.Protocol):
    """The parent's end of the line: reports, as they come."""

    def __init__(self, tell: Tell) -> None:
        self.closed = asyncio.Event()
        self.death: EngineDeadError | None = None
        self._tell = tell
        self._buffer = b""
        self._awake_until = 0.0
        self._last = pickle.dumps(((), (), 0.0))
        """The last report."""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= 4 and len(self._buffer) >= (end := 4 + int.from_bytes(self._buffer[:4], "big")):
            message, self._buffer = self._buffer[4:end], self._buffer[end:]
            if not message:
                self._awake_until = time.monotonic() + _AWAKE_SECONDS
                self._rehearse(_report(pickle.loads(self._last)))
                continue
            self._awake_until, told = 0.0, pickle.loads(message)
            if isinstance(told, Died):
                self.death = told.error
            else:
                self._last = message
                self._tell(_report(told))

    def _rehearse(self, last: Report) -> None:
        """A core that slept takes longer to get up than to write a step's tokens, and to write the first of them,
        everything out of its caches, longer than five others. So the engine says when it is about to report, and until
        it has, the streams of the report before are told of nothing, one each time that the loop goes round."""
        if time.monotonic() < self._awake_until:
            if last.events and (event := last.events.pop(0)).finish_reason is None:
                self._tell(Report([TokenEvent(event.request_id)], last.stats, 0.0))
            asyncio.get_running_loop().call_soon(self._rehearse, last)

    def connection_lost(self, _: Exception | None) -> None:
        self._awake_until = 0.0
        self.closed.set()


def _report(told: Any) -> Report:
    events, stats, *rest = told
    return Report([TokenEvent(*event) for event in events], EngineStats(*stats), *rest)


def _framed(message: object) -> bytes:
    """As `multiprocessing.connection.Connection` has it on the other side."""
    body = pickle.dumps(message)
    return len(body).to_bytes(4, "big") + body


def main(descriptor: int) -> None:
    """The child."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group by terminals and service managers
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(descriptor)
    os.set_inheritable(descriptor, False)
    level, load = connection.recv()
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("tritium").setLevel(level)
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    threading.Thread(target=_hear, args=(connection, commands), daemon=True).start()

    announcing = 0.0

    def announce() -> None:
        nonlocal announcing
        begin = time.monotonic()
        connection.send_bytes(b"")
        announcing = time.monotonic() - begin

    def tell(report: Report) -> None:
        made_at = report.made_at - announcing  # which was not the engine's work
        # Tuples: a pickled dataclass with slots takes 2.5 microseconds, and as much to read.
        events = [event[:3] if event[3:] == _PLAIN else event for event in map(_EVENT, report.events)]
        connection.send_bytes(pickle.dumps((events, _STATS(report.stats), made_at, report.refused, report.kept)))

    engine = None
    try:
        engine = load()
        connection.send(EngineFacts.of(engine))
        engine.announce = announce
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection looks through it again in the middle of a step
        drive(engine, commands, tell)
        engine.close()
    except Exception as error:
        if engine is None and isinstance(error, TritiumError):
            connection.send(error)
            return
        log.exception("the engine died")
        connection.send(died(error))
        sys.exit(1)


def _hear(connection: Connection, commands: queue.SimpleQueue[Command]) -> None:
    try:
        # Not in `recv` alone: what waits there is woken by each report that the parent reads, too, and on its core.
        while connection.poll(None):
            commands.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)  # nobody is left to serve; the engine may be in the middle of a long step
