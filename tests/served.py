"""A real HTTP server in a thread, over a scripted engine: what the server's tests share."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anthropic
import httpx
import openai
from byte_chat import byte_chat_format
from scripted import ScriptedEngine, session_over
from starlette.routing import Route

from tritium.api import Limits, Session
from tritium.chat import ChatFormat
from tritium.core import Request
from tritium.server.app import Server, listen
from tritium.server.settings import ServerSettings

if TYPE_CHECKING:
    from tritium.engine import Engine

CHAT = byte_chat_format()
EOS = CHAT.tokenizer.token_id("<|im_end|>") or 0
MODEL = "scripted"


def says(text: str, **options) -> ScriptedEngine:
    """An engine that answers everything with `text`, then eos."""
    return scripted(lambda request: [*CHAT.encode(text), EOS], **options)


def rambles(**options) -> ScriptedEngine:
    """Words that depend on the seed alone, without end; letters of one to four bytes."""
    def words(request: Request) -> list[int]:
        rng = random.Random(request.seed)
        return CHAT.encode("".join(rng.choices("abcdefgh éß€漢🙂", k=2000)))

    return scripted(words, **options)


def scripted(script: Callable[[Request], list[int]], **options) -> ScriptedEngine:
    return ScriptedEngine(script, **{"eos_ids": (EOS,), "vocab_size": CHAT.tokenizer.vocab_size} | options)


@dataclass(frozen=True)
class Served:
    url: str
    session: Session
    engine: Engine | ScriptedEngine
    model: str
    server: Server

    def app_routes(self) -> list[Route]:
        return self.server.config.app._app.routes

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    @property
    def anthropic(self) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.url, api_key="none", max_retries=0, timeout=20)

    def post(self, path: str, body: object = None, **options) -> httpx.Response:
        return httpx.post(self.url + path, timeout=20, **({"json": body} if body is not None else options))

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=20)

    def metric(self, name: str) -> float:
        """The value of one line of /metrics."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"tritium_{name} "))

    def wait_for(self, seconds: float = 2.0, **numbers: int) -> None:
        """Until the engine's stats have these numbers, at most `seconds`."""
        deadline = time.monotonic() + seconds
        while any(getattr(self.session.stats(), name) != number for name, number in numbers.items()):
            assert time.monotonic() < deadline, self.session.stats()
            time.sleep(0.005)

    def wait_idle(self) -> None:
        """Until the engine holds nothing; a second is all it may take."""
        self.wait_for(1.0, running=0, waiting=0, pages_used=0, slots_used=0)


def server_settings(**options) -> ServerSettings:
    limits = {field.name: options.pop(field.name) for field in dataclasses.fields(Limits) if field.name in options}
    return ServerSettings(**{"drain_seconds": 0.0, "log_format": "none", "limits": Limits(**limits)} | options)


@contextmanager
def served(engine: Engine | ScriptedEngine, chat: ChatFormat = CHAT, model: str = MODEL, **options) -> Iterator[Served]:
    """Serve on a free port of 127.0.0.1 until the end of the block. `options`: of the server's settings and limits."""
    tracer = options.pop("tracer", None)
    settings = server_settings(**options)
    listener = listen("127.0.0.1", 0)
    session = session_over(engine, chat, seed=0, limits=settings.limits)
    server = Server(session, [model], settings, tracer)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.005)
    try:
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", session, engine, model, server)
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
