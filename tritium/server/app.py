"""The HTTP server: OpenAI's API over a `Session`."""

from __future__ import annotations

import asyncio
import difflib
import functools
import gc
import logging
import os
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import tritium
from tritium.api import Completion, Session
from tritium.config import EngineConfig
from tritium.core import ConfigError, Event, RequestError, TritiumError
from tritium.server import convert, errors, messages, openapi, protocol, responses
from tritium.server.convert import ChatShape, CompletionShape
from tritium.server.guard import Guard, PatientProtocol, caller_of, stamp
from tritium.server.metrics import Metrics
from tritium.server.settings import ServerSettings
from tritium.server.tracing import Tracer
from tritium.server.writers import OpenAIWriter

log = logging.getLogger(__name__)

_ANTHROPIC = "anthropic-version"
"""A header of Anthropic's clients."""
_DRAINED_BYTES = 64 * 2**20
Writer = OpenAIWriter | messages.MessagesWriter | responses.ResponsesWriter


def create_app(session: Session, served_model_names: Sequence[str], settings: ServerSettings | None = None,
               tracer: Tracer | None = None) -> ASGIApp:
    """The application. It starts the session with its event loop and closes it at the end."""
    settings = settings or ServerSettings()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        session.start()
        yield
        await session.close()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)

    metrics = Metrics(session)
    routes = Routes(session, served_model_names, settings, metrics)
    app = Starlette(
        routes=[Route(one.path.replace("{name}", "{name:path}"), getattr(routes, one.route), methods=[one.method])
                for one in openapi.ENDPOINTS],
        lifespan=lifespan, exception_handlers=dict.fromkeys((TritiumError, HTTPException, Exception), routes.refuse))
    if settings.allowed_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.allowed_origins, allow_methods=["GET", "POST"],
                           allow_headers=["*"], expose_headers=["x-request-id"])
    return Guard(app, keyring=settings.keyring(), metrics=metrics, log_format=settings.log_format,
                 tracer=tracer)


class Routes:
    """What the endpoints share: the session, its names, its metrics."""

    def __init__(self, session: Session, names: Sequence[str], settings: ServerSettings,
                 metrics: Metrics) -> None:
        self._session = session
        self._names = tuple(names)
        self._settings = settings
        self._metrics = metrics
        session.observer = self._metrics.finished

    async def chat(self, request: Request) -> Response:
        body = protocol.parse(protocol.ChatRequest, await self._fields(request))
        convert.check_stream_options(body)
        return self._chat(body, request, lambda model, n: OpenAIWriter(
            ChatShape(body, self._session.door), model, n, body.stream_options))

    def _chat(self, body: protocol.ChatRequest, request: Request, writer_of: Callable[[str, int], Writer]) -> Response:
        """The one way from every chat door to the session."""
        model = caller_of(request.scope).notes["model"] = self._check_model(body.model)
        sampling = convert.chat_sampling(body, self._session.door)
        pen = Pen(writer_of(model, sampling.n), request.scope, self._metrics)
        events = self._session.chat(
            body.messages, sampling, tools=convert.offered_tools(body),
            add_generation_prompt=body.add_generation_prompt, options=convert.chat_options(body),
            template_kwargs=convert.template_kwargs(body, self._session.door), priority=body.priority,
            key=caller_of(request.scope).key, sink=pen if body.stream else None)
        return self._answer(events, pen, request, stream=body.stream)

    async def responses(self, request: Request) -> Response:
        body = protocol.parse(responses.ResponsesRequest, await self._fields(request))
        return self._chat(protocol.parse(protocol.ChatRequest, responses.chat_fields(body)), request,
                          lambda model, _: responses.ResponsesWriter(body, model))

    async def messages(self, request: Request) -> Response:
        body = protocol.parse(messages.MessagesRequest, await self._fields(request))
        return self._chat(protocol.parse(protocol.ChatRequest, messages.chat_fields(body)), request,
                          lambda model, _: messages.MessagesWriter(model))

    async def count_tokens(self, request: Request) -> Response:
        body = protocol.parse(messages.CountRequest, await self._fields(request))
        chat = protocol.parse(protocol.ChatRequest, messages.chat_fields(body))
        self._check_model(chat.model)
        ids = await asyncio.to_thread(
            self._session.door.encode_chat, chat.messages, convert.offered_tools(chat),
            template_kwargs=chat.chat_template_kwargs)
        return JSONResponse({"input_tokens": len(ids)})

    async def completions(self, request: Request) -> Response:
        body = protocol.parse(protocol.CompletionRequest, await self._fields(request))
        model = caller_of(request.scope).notes["model"] = self._check_model(body.model)
        convert.check_stream_options(body)
        door = self._session.door
        prompts = await asyncio.to_thread(door.encode, body.prompt, add_special=body.add_special_tokens)
        sampling = convert.completion_sampling(body, door, max(map(len, prompts)))
        shape = CompletionShape(body, prompts, sampling.n, door)
        pen = Pen(OpenAIWriter(shape, model, sampling.n, body.stream_options), request.scope, self._metrics)
        events = self._session.generate(prompts, sampling, options=convert.text_options(body), priority=body.priority,
                                        key=caller_of(request.scope).key, sink=pen if body.stream else None)
        return self._answer(events, pen, request, stream=body.stream)

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

    async def save_cache(self, request: Request) -> Response:
        body, door = protocol.parse(protocol.SaveCache, await self._fields(request)), self._session.door
        ids = None
        if body.messages is not None and body.prompt is not None:
            raise RequestError("messages and prompt are two ways to say the same", param="prompt", hint="send one")
        if body.messages is not None:
            ids = await asyncio.to_thread(door.encode_chat, body.messages, body.tools, add_generation_prompt=False,
                                          template_kwargs=body.chat_template_kwargs)
        elif body.prompt is not None:
            [ids, *more] = await asyncio.to_thread(door.encode, body.prompt)
            if more:
                raise RequestError("one session at a time: prompt is a text or token ids", param="prompt")
        return JSONResponse(await self._session.keep("save", body.name, ids))

    async def load_cache(self, request: Request) -> Response:
        body = protocol.parse(protocol.NamedCache, await self._fields(request))
        return JSONResponse(await self._session.keep("load", body.name))

    async def flush_cache(self, request: Request) -> Response:
        protocol.parse(protocol.FlushCache, await self._fields(request))
        return JSONResponse(await self._session.keep("flush"))

    async def models(self, request: Request) -> Response:
        cards = [self._card(name, request) for name in self._names]
        ends = {"has_more": False, "first_id": self._names[0], "last_id": self._names[-1]}
        return JSONResponse({"data": cards} | (ends if _ANTHROPIC in request.headers else {"object": "list"}))

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._card(self._check_model(request.path_params["name"]), request))

    async def health(self, _: Request) -> Response:
        session = self._session
        status = "draining" if session.draining else "ok" if session.alive else "dead"
        return JSONResponse({"status": status}, status_code=200 if session.alive else 503)

    async def metrics_page(self, _: Request) -> Response:
        return Response(self._metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": tritium.__version__})

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(openapi.document())

    async def refuse(self, request: Request, error: Exception) -> Response:
        """Any failure as the error object of the door."""
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            path = request.url.path
            near = difflib.get_close_matches(path, [endpoint.path for endpoint in openapi.ENDPOINTS], 1, 0.7)
            said = f"{request.method} {path:.100} is not served here"
            if error.status_code == 405:
                said += f" (use {(error.headers or {}).get('Allow', 'another method')})"
            elif near:
                said += f" ({near[0]} is)"
            error = HTTPException(error.status_code, said, error.headers)
        self._note_error(error, request.scope)
        return errors.error_response(error, request.scope)

    def _note_error(self, error: Exception, scope: Scope) -> None:
        status, caller = errors.status_of(error), caller_of(scope)
        if status >= 500 and not isinstance(error, TritiumError):
            log.error("internal error in %s (request %s)", scope["path"], caller.request_id, exc_info=error)
        caller.notes["error"] = str(error)
        self._metrics.error(status, errors.code_of(error))

    def _answer(self, events: AsyncGenerator[Event, None], pen: Pen, request: Request, *, stream: bool | None
                ) -> Response:
        return Answered(functools.partial(self._stream if stream else _whole, events, pen, request.scope))

    async def _stream(self, events: AsyncGenerator[Event, None], pen: Pen, scope: Scope, send: Send) -> None:
        """Server-sent events. The status waits for the first event, so that what is refused is refused with 400."""
        writer = pen.writer
        async with aclosing(events):
            try:
                async for event in events:
                    await pen.begin(send)
                    if text := writer.add(event):
                        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
                    self._metrics.sent(event)
                    _note_times(event, scope)
                await pen.begin(send)
                last = writer.end()
            except Exception as error:
                if not pen.begun:
                    raise
                self._note_error(error, scope)
                log.error("an answer failed midway: %s", error)
                last = errors.error_event(error, scope["path"])
            caller_of(scope).notes |= writer.tally.notes()
            await send({"type": "http.response.body", "body": last.encode(), "more_body": False})

    async def _fields(self, request: Request) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._settings.patience):
                body = await self._body(request)
        except TimeoutError:
            raise errors.SlowBodyError(f"the body did not come within {self._settings.patience:g} s") from None
        except ClientDisconnect:
            raise RequestError("the body ended early") from None
        return protocol.parse_json(body or b"{}")

    async def _body(self, request: Request) -> bytes:
        """The body. One that is too large is still read (up to a point), for a client that has not finished sending
        would otherwise see a broken connection and not the answer."""
        pieces, size = [], 0
        async for piece in request.stream():
            size += len(piece)
            if size <= self._settings.max_body_bytes:
                pieces.append(piece)
            elif size > _DRAINED_BYTES:
                break
        if size > self._settings.max_body_bytes:
            raise errors.BodyTooLargeError(f"the body is larger than {self._settings.max_body_bytes} bytes",
                                           hint="send less at once")
        return b"".join(pieces)

    def _check_model(self, name: str | None) -> str:
        if name is not None and name not in self._names:
            known = ", ".join(self._names)
            raise errors.UnknownModelError(f"the model {name!r} does not exist; this server has {known}", param="model")
        return self._names[0] if name is None else name

    def _card(self, name: str, request: Request) -> dict[str, Any]:
        if _ANTHROPIC in request.headers:
            return {"type": "model", "id": name, "display_name": name, "created_at": "1970-01-01T00:00:00Z",
                    "max_input_tokens": self._session.door.max_model_len}
        return {"id": name, "object": "model", "created": 0, "owned_by": "tritium", "root": self._names[0],
                "parent": None, "max_model_len": self._session.door.max_model_len}


class Pen:
    """Writes the pieces of a stream to its connection at once while that takes them; a `Sink`."""

    def __init__(self, writer: Writer, scope: Scope, metrics: Metrics) -> None:
        self.writer = writer
        self.begun = False
        """Whether the head of the answer is out."""
        self._scope = scope
        self._line: Any = scope.get("tritium.line") if scope["http_version"] == "1.1" else None
        self._metrics = metrics
        self._cors = any(name == b"origin" for name, _ in scope["headers"])
        """Whether the head may need more than is written here."""

    async def begin(self, send: Send) -> None:
        if not self.begun:
            await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
            self.begun = True

    @property
    def ready(self) -> bool:
        return (self.begun or not self._cors) and self._line is not None and self._line.writable

    def take(self, event: Event) -> None:
        text = self.writer.add(event).encode()
        if not self.begun:
            self._line.begin([*_SSE_HEADERS, *stamp(caller_of(self._scope), 200, self._metrics)], text)
            self.begun = True
        elif text:
            self._line.write_chunk(text)
        self._metrics.sent(event)
        _note_times(event, self._scope)


async def _whole(events: AsyncGenerator[Event, None], pen: Pen, scope: Scope, send: Send) -> None:
    completions: dict[int, Completion] = {}
    async with aclosing(events):
        async for event in events:
            completions.setdefault(event.index, Completion(event.index, [])).absorb(event)
            _note_times(event, scope)
    body = convert.dumps(pen.writer.whole([completions[index] for index in sorted(completions)])).encode()
    caller_of(scope).notes |= pen.writer.tally.notes()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _note_times(event: Event, scope: Scope) -> None:
    if (timing := event.timing) is not None:
        caller_of(scope).notes |= {"queue": round(timing.waited, 4), "ttft": round(timing.queued, 4)}


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
    """uvicorn that, told to stop, finishes what runs, refuses what is new, and then leaves."""

    def __init__(self, session: Session, served_model_names: Sequence[str],
                 settings: ServerSettings | None = None, tracer: Tracer | None = None) -> None:
        self._settings = settings = settings or ServerSettings()
        protocol_class = type("Protocol", (PatientProtocol,), {"patience": settings.patience})
        super().__init__(uvicorn.Config(
            create_app(session, served_model_names, settings, tracer), log_level="error", access_log=False,
            http=protocol_class, loop="asyncio", ws="none", timeout_graceful_shutdown=int(settings.drain_seconds) + 5))
        self._session = session
        self._draining: asyncio.Future[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, a second one leaves at once."""
        if self._captured_signals:
            os._exit(128 + sig)  # the engine's process follows by itself
        self._captured_signals.append(sig)
        asyncio.get_running_loop().call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        log.warning("finishing what runs (at most %g s); once more to leave at once", self._settings.drain_seconds)

        async def drain() -> None:
            await self._session.drain(self._settings.drain_seconds)
            self.should_exit = True

        self._draining = asyncio.ensure_future(drain())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        seconds = 0.0 if self._draining is not None else self._settings.drain_seconds
        closing = asyncio.ensure_future(self._session.close(drain_seconds=seconds))
        await super().shutdown(sockets)
        await closing


def serve(config: EngineConfig, settings: ServerSettings) -> None:
    """Load the model and serve it until Ctrl-C or SIGTERM. The port is taken first: loading may take long."""
    settings.keyring()
    tracer = Tracer(settings.otlp_traces_endpoint) if settings.otlp_traces_endpoint else None
    with listen(settings.host, settings.port) as listener:
        session = Session.spawn(config, limits=settings.limits)
        server = Server(session, settings.served_model_names or [config.model], settings, tracer)
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection looks through it again between two tokens
        name, bound = listener.getsockname()[:2]
        print(f"serving on http://{f'[{name}]' if ':' in name else name}:{bound}", file=sys.stderr, flush=True)
        with suppress(KeyboardInterrupt):  # uvicorn raises what it was stopped by, after all is closed
            server.run(sockets=[listener])
