"""An engine in a process of its own, watched: when it dies, its requests end in words and another takes its place.

Parent and child speak pickles over a pair of sockets. The child takes the end of its socket for the end of its parent,
however that came, and leaves at once; signals of the terminal are the parent's business.
"""

from __future__ import annotations

import contextlib
import logging
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
from multiprocessing.connection import Connection

from tritium.api.drive import Command, Died, EngineFacts, Revived, Tell, died, drive
from tritium.api.engine_core import EngineCore
from tritium.core import CacheCall, EngineDeadError, Request, TritiumError

log = logging.getLogger(__name__)

_BACK_OFF = (0.1, 30.0)
"""Seconds before the first restart, and the most; doubled each time, until an engine has lived that long."""
_PATIENCE = 5.0
_MAIN = f"import sys; from {__name__} import main; main(int(sys.argv[1]))"


class EngineProcess:
    """The driver of an engine that `load` makes in a child. `load` must be picklable; it runs again on a restart."""

    def __init__(self, load: Callable[[], EngineCore]) -> None:
        """Blocks until the engine is loaded. Raises what `load` raises, if it is a `TritiumError`."""
        self._load = load
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        self._child = _Child(load)
        try:
            self.facts = self._child.wait_ready()
        except BaseException:
            self._child.end()
            raise

    @property
    def pid(self) -> int:
        """Of the child that serves now."""
        return self._child.process.pid

    def start(self, tell: Tell) -> None:
        self._watcher = threading.Thread(target=self._watch, args=(tell,), name="tritium-engine", daemon=True)
        self._watcher.start()

    def send(self, command: Request | str | CacheCall) -> None:
        self._child.outbox.put(command)

    def close(self) -> None:
        self._closing.set()
        self._child.outbox.put(None)
        if self._watcher is not None:
            self._watcher.join(_PATIENCE)
        self._child.end()

    def _watch(self, tell: Tell) -> None:
        """Pass on what the child tells, and replace it when it dies."""
        pause = _BACK_OFF[0]
        while True:
            born = time.monotonic()
            error = self._child.listen(tell)
            self._child.end()
            if self._closing.is_set():
                return
            tell(Died(error))
            log.error("%s; it is started again", error.message)
            if time.monotonic() - born > _BACK_OFF[1]:
                pause = _BACK_OFF[0]
            while not self._revive(pause):
                if self._closing.is_set():
                    return
                pause = min(2 * pause, _BACK_OFF[1])
            pause = min(2 * pause, _BACK_OFF[1])
            tell(Revived())

    def _revive(self, pause: float) -> bool:
        if self._closing.wait(pause):
            return False
        self._child = child = _Child(self._load)
        try:
            child.wait_ready()
        except TritiumError as error:
            log.error("the engine did not start: %s", error)
            child.end()
            return False
        log.warning("the engine is back")
        return True


class _Child:
    """One process and the lines to it."""

    def __init__(self, load: Callable[[], EngineCore]) -> None:
        ours, theirs = socket.socketpair()
        # The child finds the same modules, and none of what else the parent has open.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with theirs:
            self.process = subprocess.Popen([sys.executable, "-c", _MAIN, str(theirs.fileno())],
                                            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
        self._connection = Connection(ours.detach())
        self.outbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="tritium-commands", daemon=True)
        with contextlib.suppress(OSError):  # it died at once, as `wait_ready` finds out
            self._connection.send((logging.getLogger("tritium").getEffectiveLevel(), load))

    def wait_ready(self) -> EngineFacts:
        try:
            facts = self._connection.recv()
        except (EOFError, OSError):
            raise EngineDeadError(f"the engine died while it was loading ({self._how()})",
                                  hint="see the server's log") from None
        if isinstance(facts, Died):
            raise facts.error
        if isinstance(facts, TritiumError):
            raise facts
        assert isinstance(facts, EngineFacts)
        self._sender.start()
        return facts

    def listen(self, tell: Tell) -> EngineDeadError:
        """Until the child is gone; -> why."""
        try:
            while True:
                report = self._connection.recv()
                if isinstance(report, Died):
                    return report.error
                tell(report)
        except (EOFError, OSError, pickle.UnpicklingError):
            return EngineDeadError(f"the engine died ({self._how()})", hint="see the server's log")

    def end(self) -> None:
        """See the process off, whatever its state."""
        self.outbox.put(None)
        if self._sender.ident is not None:
            self._sender.join(_PATIENCE)
        self._connection.close()
        try:
            self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # the child is gone, which its other end tells better
            while True:
                command = self.outbox.get()
                self._connection.send(command)
                if command is None:
                    return

    def _how(self) -> str:
        try:
            code = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "it closed its line"
        return f"signal {-code}" if code < 0 else f"exit code {code}"


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
    try:
        engine = load()
        connection.send(EngineFacts.of(engine))
        drive(engine, commands, connection.send)
        engine.close()
    except TritiumError as error:
        connection.send(error)
    except Exception as error:
        log.exception("the engine died")
        connection.send(died(error))
        sys.exit(1)


def _hear(connection: Connection, commands: queue.SimpleQueue[Command]) -> None:
    try:
        while True:
            commands.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)  # nobody is left to serve; the engine may be in the middle of a long step
