"""The HTTP server: OpenAI's API over a `Session`."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

import tritium
from tritium.api import Completion, ContextLengthError, Session
from tritium.config import EngineConfig
from tritium.core import ConfigError, EngineDeadError, Event, RequestError, TritiumError
from tritium.server import convert, protocol
from tritium.server.convert import ChatShape, CompletionShape, Envelope, Shape, Tally
from tritium.server.metrics import Metrics

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 * 2**20
_DRAINED_BYTES = 64 * 2**20


class UnknownModelError(RequestError):
    """A model name that this server does not go by."""


class BodyTooLargeError(RequestError):
    """More bytes than the server reads."""


def create_app(session: Session, served_model_names: Sequence[str], *, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The application. It starts the session with its event loop and closes it at the end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        session.start()
        yield
        await session.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    routes = Routes(session, served_model_names, max_body_bytes)
    endpoints: dict[str, Callable[..., Awaitable[Response]]] = {
        "POST /v1/chat/completions": routes.chat,
        "POST /v1/completions": routes.completions,
        "POST /tokenize": routes.tokenize,
        "POST /detokenize": routes.detokenize,
        "GET /v1/models": routes.models,
        "GET /v1/models/{name:path}": routes.model,
        "GET /health": routes.health,
        "GET /metrics": routes.metrics_page,
        "GET /version": routes.version,
    }
    for line, endpoint in endpoints.items():
        method, path = line.split()
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    for kind in (TritiumError, HTTPException, Exception):
        app.add_exception_handler(kind, routes.refuse)
    return app


class Routes:
    """What the endpoints share: the session, its names, its metrics."""

    def __init__(self, session: Session, names: Sequence[str], max_body_bytes: int) -> None:
        self._session = session
        self._names = tuple(names)
        self._max_body_bytes = max_body_bytes
        self._metrics = Metrics(session.stats)
        session.observer = self._metrics.finished

    async def chat(self, request: Request) -> Response:
        body = protocol.parse(protocol.ChatRequest, await self._fields(request))
        model = self._check_model(body.model)
        convert.check_stream_options(body)
        door = self._session.door
        sampling = convert.chat_sampling(body, door)
        events = self._session.chat(
            body.messages,
            sampling,
            tools=convert.offered_tools(body),
            add_generation_prompt=body.add_generation_prompt,
            template_kwargs=body.chat_template_kwargs,
            options=convert.text_options(body),
            priority=body.priority,
        )
        return self._answer(events, ChatShape(body, door), body, model, sampling.n)

    async def completions(self, request: Request) -> Response:
        body = protocol.parse(protocol.CompletionRequest, await self._fields(request))
        model = self._check_model(body.model)
        convert.check_stream_options(body)
        door = self._session.door
        prompts = await asyncio.to_thread(door.encode, body.prompt, add_special=body.add_special_tokens)
        sampling = convert.completion_sampling(body, door, max(map(len, prompts)))
        events = self._session.generate(
            prompts, sampling, options=convert.text_options(body), priority=body.priority)
        return self._answer(events, CompletionShape(body, prompts, sampling.n, door), body, model, sampling.n)

    async def tokenize(self, request: Request) -> Response:
        fields, door = await self._fields(request), self._session.door
        if "messages" in fields:
            chat = protocol.parse(protocol.TokenizeChat, fields)
            self._check_model(chat.model)
            ids = await asyncio.to_thread(
                door.encode_chat, chat.messages, chat.tools, add_generation_prompt=chat.add_generation_prompt,
                template_kwargs=chat.chat_template_kwargs)
            with_texts = chat.return_token_strs
        else:
            text = protocol.parse(protocol.TokenizePrompt, fields)
            self._check_model(text.model)
            [ids] = await asyncio.to_thread(door.encode, text.prompt, add_special=text.add_special_tokens)
            with_texts = text.return_token_strs
        texts = await asyncio.to_thread(lambda: [door.token_text(token) for token in ids]) if with_texts else None
        return JSONResponse(
            {"count": len(ids), "max_model_len": door.max_model_len, "tokens": ids, "token_strs": texts})

    async def detokenize(self, request: Request) -> Response:
        body = protocol.parse(protocol.DetokenizeRequest, await self._fields(request))
        self._check_model(body.model)
        return JSONResponse({"prompt": await asyncio.to_thread(self._session.door.decode, body.tokens)})

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._names]})

    async def model(self, name: str) -> Response:
        return JSONResponse(self._card(self._check_model(name)))

    async def health(self) -> Response:
        alive = self._session.alive
        return JSONResponse({"status": "ok" if alive else "dead"}, status_code=200 if alive else 503)

    async def metrics_page(self) -> Response:
        return Response(self._metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self) -> Response:
        return JSONResponse({"version": tritium.__version__})

    async def refuse(self, request: Request, error: Exception) -> Response:
        """Any failure as OpenAI's error object."""
        status, body = error_body(error)
        if status >= 500 and not isinstance(error, TritiumError):
            log.error("internal error in %s", request.url.path, exc_info=error)
        self._metrics.http_error(status)
        return JSONResponse(body, status_code=status)

    def _answer(self, events: AsyncGenerator[Event, None], shape: Shape, body: protocol.SamplingFields, model: str,
                n: int) -> Response:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        envelope, tally = Envelope(shape, model, include_usage=include_usage), Tally(n)
        if body.stream:
            return Answered(lambda send: self._stream(events, shape, envelope, tally, send))
        return Answered(lambda send: _whole(events, shape, envelope, tally, send))

    async def _stream(self, events: AsyncGenerator[Event, None], shape: Shape, envelope: Envelope, tally: Tally,
                      send: Send) -> None:
        """Server-sent events. The status waits for the first event, so that what is refused is refused with 400."""
        async with aclosing(events):
            event = await anext(events)
            await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
            try:
                while True:
                    tally.add(event)
                    if text := envelope.chunks(shape.deltas(event)):
                        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
                    event = await anext(events)
            except StopAsyncIteration:
                last = envelope.end(tally.body())
            except Exception as error:
                status, error_object = error_body(error)
                self._metrics.http_error(status)
                log.error("an answer failed midway: %s", error)
                last = f"data: {convert.dumps(error_object)}\n\ndata: [DONE]\n\n"
            await send({"type": "http.response.body", "body": last.encode(), "more_body": False})

    async def _fields(self, request: Request) -> dict[str, Any]:
        return protocol.parse_json(await self._body(request))

    async def _body(self, request: Request) -> bytes:
        """The body. One that is too large is still read (up to a point), for a client that has not finished sending
        would otherwise see a broken connection and not the answer."""
        pieces, size = [], 0
        async for piece in request.stream():
            size += len(piece)
            if size <= self._max_body_bytes:
                pieces.append(piece)
            elif size > _DRAINED_BYTES:
                break
        if size > self._max_body_bytes:
            raise BodyTooLargeError(f"the body is larger than {self._max_body_bytes} bytes", hint="send less at once")
        return b"".join(pieces)

    def _check_model(self, name: str | None) -> str:
        if name is not None and name not in self._names:
            raise UnknownModelError(f"the model {name!r} does not exist; this server has {', '.join(self._names)}",
                                    param="model")
        return self._names[0] if name is None else name

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "tritium", "root": self._names[0],
                "parent": None, "max_model_len": self._session.door.max_model_len}


async def _whole(events: AsyncGenerator[Event, None], shape: Shape, envelope: Envelope, tally: Tally,
                 send: Send) -> None:
    completions: dict[int, Completion] = {}
    async with aclosing(events):
        async for event in events:
            tally.add(event)
            completions.setdefault(event.index, Completion(event.index, [])).absorb(event)
    choices = [shape.choice(completions[index]) for index in sorted(completions)]
    body = convert.dumps(envelope.whole(choices, tally.body())).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


class Answered(Response):
    """A response that is worked out while the connection is watched: when the client leaves, the work is cancelled,
    and with it the request in the engine."""

    def __init__(self, work: Callable[[Send], Awaitable[None]]) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._work(send))
        left = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            work.cancel()  # nothing to a work that is done
            with suppress(asyncio.CancelledError):
                await work


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


_SSE_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and OpenAI's error object."""
    status, kind, code, message = 500, "server_error", None, "internal error; see the server's log"
    if isinstance(error, UnknownModelError):
        status, kind, code = 404, "invalid_request_error", "model_not_found"
    elif isinstance(error, BodyTooLargeError):
        status, kind, code = 413, "invalid_request_error", "body_too_large"
    elif isinstance(error, RequestError):
        status, kind = 400, "invalid_request_error"
        code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
    elif isinstance(error, EngineDeadError):
        status, code = 503, "unavailable"
    elif isinstance(error, HTTPException):
        status, kind, message = error.status_code, "invalid_request_error", str(error.detail)
    if isinstance(error, TritiumError):
        message = str(error)
    param = error.param if isinstance(error, RequestError) else None
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `ConfigError` when the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:  # create_server adds the address to strerror; a failed look-up has a negative errno
        reason = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else str(error.strerror)
    except OverflowError:
        reason = "a port is within 0 to 65535"
    raise ConfigError(f"cannot listen on {host}:{port}: {reason.lower()}",
                      hint="stop what is there, or choose another --port")


class Server(uvicorn.Server):
    """uvicorn that ends the answers under way by itself when it is told to stop, instead of tearing them off."""

    def __init__(self, session: Session, served_model_names: Sequence[str], *, drain_seconds: float = 5.0,
                 max_body_bytes: int = MAX_BODY_BYTES) -> None:
        """`drain_seconds`: how long running answers may go on after Ctrl-C or SIGTERM; the rest end in an error."""
        app = create_app(session, served_model_names, max_body_bytes=max_body_bytes)
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False,
                                        timeout_graceful_shutdown=int(drain_seconds) + 5))
        self._session = session
        self._drain_seconds = drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.ensure_future(self._session.close(drain_seconds=self._drain_seconds))
        await super().shutdown(sockets)
        await closing


def serve(config: EngineConfig, *, host: str = "127.0.0.1", port: int = 8000,
          served_model_names: Sequence[str] = ()) -> None:
    """Load the model and serve it until Ctrl-C or SIGTERM. The port is taken first: loading may take long."""
    with listen(host, port) as listener:
        session = Session.load(config)
        server = Server(session, served_model_names or [config.model])
        name, bound = listener.getsockname()[:2]
        print(f"serving on http://{f'[{name}]' if ':' in name else name}:{bound}", file=sys.stderr, flush=True)
        with suppress(KeyboardInterrupt):  # uvicorn raises what it was stopped by, after all is closed
            server.run(sockets=[listener])
