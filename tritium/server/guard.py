"""Around every request: who asks, an id, a line in the log, numbers; and clients that would hold a connection."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tritium.server.errors import AuthenticationError, error_response
from tritium.server.metrics import Metrics
from tritium.server.settings import Keyring
from tritium.server.tracing import Tracer

access_log = logging.getLogger("tritium.access")

OPEN_PATHS = ("/health",)
"""Asked without a key, by whoever watches the server."""
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(slots=True)
class Caller:
    """Who asked, and what came of it."""

    request_id: str
    key: str = ""
    status: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    """For the log: tokens, why it ended."""


def caller_of(scope: Scope) -> Caller:
    caller = scope["tritium.caller"]
    assert isinstance(caller, Caller)
    return caller


def stamp(caller: Caller, status: int, metrics: Metrics) -> list[tuple[bytes, bytes]]:
    """Takes note that an answer begins; -> what every head has."""
    caller.status = status
    return [(b"x-request-id", caller.request_id.encode()), *metrics.warning_headers()]


class Guard:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, *, keyring: Keyring, metrics: Metrics, log_format: str,
                 tracer: Tracer | None = None) -> None:
        self._app = app
        self._keyring = keyring
        self._metrics = metrics
        self._log_format = log_format
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        caller = scope["tritium.caller"] = Caller(_request_id(headers.get(b"x-request-id")))
        begin = time.monotonic()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *stamp(caller, message["status"], self._metrics)]
            await send(message)

        try:
            self._identify(scope, headers, caller)
        except AuthenticationError as error:
            await error_response(error, scope)(scope, receive, sending)
        else:
            await self._app(scope, receive, sending)
        finally:
            self._done(scope, caller, time.monotonic() - begin)

    def _identify(self, scope: Scope, headers: dict[bytes, bytes], caller: Caller) -> None:
        if not self._keyring or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        key = token.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        if not key:
            raise AuthenticationError("no API key was given", hint="send it as Authorization: Bearer KEY or x-api-key")
        name = self._keyring.name_of(key)
        if name is None:
            raise AuthenticationError("the API key is wrong")
        caller.key = name

    def _done(self, scope: Scope, caller: Caller, seconds: float) -> None:
        route = scope.get("route")
        path = getattr(route, "path", "other")
        self._metrics.http_done(path, caller.status, seconds)
        if self._log_format == "none" and self._tracer is None:
            return
        line: dict[str, Any] = {"request_id": caller.request_id, "method": scope["method"], "path": scope["path"],
                                "status": caller.status, "seconds": round(seconds, 4)}
        line |= ({"key": caller.key} if caller.key else {}) | caller.notes
        if self._tracer is not None and caller.notes:
            self._tracer.span(dict(scope["headers"]), f"{scope['method']} {path}", line)
        if self._log_format == "json":
            access_log.info("%s", json.dumps({"time": round(time.time(), 3), **line}))
        elif self._log_format == "text" and path not in ("/health", "/metrics", "other"):
            access_log.info("%s", " ".join(f"{name}={value}" for name, value in line.items()))


def _request_id(given: bytes | None) -> str:
    """The client's id if it is fit for a header and a log, else a new one."""
    text = "" if given is None else given.decode("latin-1")
    return text if _REQUEST_ID.fullmatch(text) else f"req_{uuid.uuid4().hex}"


class PatientProtocol(H11Protocol):
    """HTTP that hangs up on a client that does not send the head of a request, or does not read, for so long. Requests
    find it in their scope as "tritium.line", to write the pieces of an answer past all layers between."""

    patience = 60.0
    writable = True
    """Whether `begin` or `write_chunk` may be called: the client is there and reads."""
    _timer: asyncio.TimerHandle | None = None
    _untold: Sequence[tuple[bytes, bytes]] = ()
    """The head of an answer that began here and that h11 has not heard of."""

    def begin(self, headers: Sequence[tuple[bytes, bytes]], data: bytes) -> None:
        """The head of an answer (200) and its first piece, if not empty, in one write. h11 takes longer for a head
        than all else takes for a token, and the first tokens of many answers come in one step: it is told later."""
        cycle = self.cycle
        cycle.response_started, cycle.waiting_for_100_continue = True, False
        closes = any(name == b"connection" and b"close" in value.lower() for name, value in cycle.scope["headers"])
        self._untold = [*cycle.default_headers, *headers, *([(b"connection", b"close")] if closes else [])]
        lines = b"".join(b"%b: %b\r\n" % pair for pair in [*self._untold, (b"transfer-encoding", b"chunked")])
        first = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
        self.transport.write(b"HTTP/1.1 200 OK\r\n%b\r\n%b" % (lines, first))

    def write_chunk(self, data: bytes) -> None:
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        app = self.app

        async def app_with_line(scope: Scope, receive: Receive, send: Send) -> None:
            async def sending(message: Message) -> None:
                if self._untold and not self.cycle.disconnected:
                    self.conn.send(h11.Response(status_code=200, headers=[*self._untold]))
                    self._untold = ()
                await send(message)

            scope["tritium.line"] = self
            await app(scope, receive, sending)

        self.app = app_with_line
        self._wait(lambda: self.cycle is None)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.writable = False
        self._wait(lambda: True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.writable = True
        self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self.writable = False
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():  # closing would wait for a reader
            self.transport.abort()

    def _wait(self, hopeless: Callable[[], bool]) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(self.patience, lambda: self.transport.abort() if hopeless() else None)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
