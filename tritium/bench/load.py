"""Load a server over HTTP and say what its clients saw: `python -m tritium.bench.load http://127.0.0.1:8000`.

Talks on stderr; ends in one JSON line on stdout.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import random
import selectors
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import click
import h11
import httpx
import numpy as np

from tritium.config import is_loopback
from tritium.core import PAGE_TOKENS, ConfigError, TritiumError

MAX_CLIENTS, MAX_REQUESTS = 1024, 100_000
_QUANTILES = (0.5, 0.9, 0.99)
_POLL_SECONDS = 0.02
_GIVE_UP_SECONDS = 10.0
_PATIENCE = 0.001
"""Seconds; by so much are all times of a client late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send. Request i asks for prompt i (in turn) with seed `seed` + i."""

    prompts: Sequence[str | Sequence[int]] = ("Tell me a long story.",)
    """Texts, or token ids (not for `chat`)."""
    chat: bool = False
    """Send prompts as a user's message instead of text to complete."""
    clients: int = 64
    requests: int = 64
    max_tokens: int = 128
    ignore_eos: bool = True
    """Every answer has max_tokens tokens, so that runs compare."""
    kill_fraction: float = 0.0
    """Share of the requests whose client disconnects midway."""
    verify: int = 0
    """How many finished streams are asked again, alone and not streamed, and compared."""
    seed: int = 0
    model: str | None = None
    api_key: str | None = None
    seconds: float = 300.0
    """The run is given up after this long; what is not done by then is an error."""
    allow_remote: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.clients <= MAX_CLIENTS or not 1 <= self.requests <= MAX_REQUESTS:
            raise ConfigError(f"clients must be within [1, {MAX_CLIENTS}] and requests within [1, {MAX_REQUESTS}]")
        if not 0 <= self.kill_fraction <= 1 or self.max_tokens < 1 or self.seconds <= 0 or not self.prompts:
            raise ConfigError("a load needs kill_fraction within [0, 1], prompts, and max_tokens and seconds above 0")

    def body(self, i: int) -> dict[str, Any]:
        prompt = self.prompts[i % len(self.prompts)]
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        asked |= {"max_tokens": self.max_tokens, "seed": self.seed + i, "ignore_eos": self.ignore_eos}
        return asked if self.model is None else asked | {"model": self.model}

    def kills(self, i: int) -> bool:
        """Spread evenly: of the first k requests, floor(k kill_fraction) are killed."""
        return math.floor((i + 1) * self.kill_fraction) > math.floor(i * self.kill_fraction)


@dataclass(slots=True)
class Stream:
    """What one client saw of one answer; times in seconds of the monotonic clock."""

    started: float = 0.0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    """Bytes as they came, and when."""
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0
    killed: bool = False
    finished: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Latencies in seconds, as {p50, p90, p99, max}; empty where nothing was measured."""

    clients: int
    requests: int
    completed: int
    killed: int
    errors: int
    verified: int
    corrupted: int
    seconds: float
    output_tokens: int
    """Of the completed answers."""
    tokens_per_second: float
    ttft: dict[str, float]
    """Request sent to first text."""
    tpot: dict[str, float]
    """Time per token after the first, one value an answer."""
    itl: dict[str, float]
    """Time between two pieces of an answer."""
    overhead: dict[str, float]
    """Server's own time a token: from the end of the engine's step to the bytes handed to the socket, as the server
    measures it; quantiles within the buckets of its histogram."""
    freed_seconds: float | None
    """From the last kill until the server held nothing for the killed (None: nothing was killed, or never)."""
    idle_seconds: float | None
    """From the end of the last answer until pages and slots used were what they had been before (None: never)."""
    first_error: str | None = None

    def table(self) -> str:
        rows = [("", *self.ttft)] + [
            (name, *(f"{1000 * value:.1f} ms" for value in values.values()))
            for name, values in (("time to first token", self.ttft), ("time per output token", self.tpot),
                                 ("between pieces", self.itl), ("server's own, a token", self.overhead))
        ]
        lines = ["".join(f"{cell:>24}" if i == 0 else f"{cell:>13}" for i, cell in enumerate(row)) for row in rows]
        lines += [
            f"{self.completed} of {self.requests} answers completed by {self.clients} clients in {self.seconds:.2f} s: "
            f"{self.output_tokens} tokens, {self.tokens_per_second:.1f} tokens/s",
            f"errors {self.errors}, killed {self.killed}, corrupted {self.corrupted} of {self.verified} verified",
            f"freed after the kills in {_seconds(self.freed_seconds)}, idle in {_seconds(self.idle_seconds)}",
        ]
        return "\n".join(lines + ([f"first error: {self.first_error}"] if self.first_error else []))


def run_load(url: str, load: Load) -> LoadReport:
    """Send the load to the server at `url` and wait for its end. Raises `ConfigError` for a server that is not on
    this machine (unless allowed) or is not there."""
    if not load.allow_remote and not is_loopback(urlsplit(url).hostname or ""):
        raise ConfigError(f"{url} is not on this machine", hint="use 127.0.0.1, or --allow-remote if it is yours")
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(_Patient())) as runner:
        return runner.run(_Run(url, load).report())


class _Patient(selectors.DefaultSelector):
    """Reads a moment after it was woken, when the server has written what it had and the core that they may share is
    free: the kernel gives a reader that is ready, however nice, a slice of it in the middle of the server's work."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if not super().select(timeout):
            return []
        time.sleep(_PATIENCE)
        return super().select(0)


class _Run:
    def __init__(self, url: str, load: Load) -> None:
        self._load = load
        self._url = url.rstrip("/")
        self._at = urlsplit(self._url)
        self._path = "/v1/chat/completions" if load.chat else "/v1/completions"
        self._streams = [Stream() for _ in range(load.requests)]
        self._random = random.Random(load.seed)
        self._open = 0
        self._kills_left = sum(load.kills(i) for i in range(load.requests))
        self._last_kill: asyncio.Future[float]

    async def report(self) -> LoadReport:
        headers = {"Authorization": f"Bearer {self._load.api_key}"} if self._load.api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self._load.clients)
        async with httpx.AsyncClient(base_url=self._url, timeout=self._load.seconds, limits=limits,
                                     headers=headers) as http:
            self._last_kill = asyncio.get_running_loop().create_future()
            before = await self._held(http)
            prompt_pages = await self._pages_of_an_answer(http)
            overhead = await self._overhead(http)
            watch = asyncio.ensure_future(self._watch_kills(http, before, prompt_pages))
            begin = time.monotonic()
            queue = iter(range(self._load.requests))
            workers = [self._client(queue) for _ in range(self._load.clients)]
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.gather(*workers, return_exceptions=True), self._load.seconds)
            end = time.monotonic()
            idle = await self._wait_held(http, end, before)
            if not self._last_kill.done():
                watch.cancel()
            freed = (await asyncio.gather(watch, return_exceptions=True))[0]
            overhead = {bound: count - overhead.get(bound, 0.0) for bound, count in
                        (await self._overhead(http)).items()}
            for stream in self._streams:
                if stream.pieces and not stream.killed:
                    try:
                        _read(stream, chat=self._load.chat)
                    except (h11.RemoteProtocolError, ValueError, KeyError) as error:
                        stream.error = f"{type(error).__name__}: {error}"
            verified = await self._verify(http)
        return self._summary(end - begin, freed if isinstance(freed, float) else None, idle, verified, overhead)

    async def _client(self, queue: Iterator[int]) -> None:
        for i in queue:
            stream, kill = self._streams[i], self._load.kills(i)
            self._open += 1
            try:
                await self._ask(i, stream, kill)
            except OSError as error:
                stream.error = f"{type(error).__name__}: {error}"
            finally:
                self._open -= 1
                self._kills_left -= kill
                if kill and not self._kills_left and not self._last_kill.done():
                    self._last_kill.set_result(time.monotonic())

    async def _ask(self, i: int, stream: Stream, kill: bool) -> None:
        """Send a request and keep what comes as it is: a client that read it on arrival would take the server's time,
        on a machine that they share."""
        body = json.dumps(self._load.body(i) | {"stream": True, "stream_options": {"include_usage": True}}).encode()
        key = f"authorization: Bearer {self._load.api_key}\r\n" if self._load.api_key else ""
        head = (f"POST {self._at.path}{self._path} HTTP/1.1\r\nhost: {self._at.netloc}\r\n{key}connection: close\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n")
        leave_at = self._random.randint(1, max(1, self._load.max_tokens // 2)) if kill else math.inf
        stream.started = time.monotonic()
        secure = self._at.scheme == "https"
        transport, wire = await asyncio.get_running_loop().create_connection(
            lambda: _Wire(stream, leave_at), self._at.hostname or "", self._at.port or (443 if secure else 80),
            ssl=secure or None)
        try:
            transport.write(head.encode() + body)
            await wire.closed.wait()
        finally:
            transport.abort()

    async def _watch_kills(self, http: httpx.AsyncClient, before: tuple[float, float], pages_each: int) -> float | None:
        """Seconds from the last kill until the server holds no more than the clients that stayed can need."""
        return await self._wait_held(http, await self._last_kill, before, pages_each)

    async def _wait_held(self, http: httpx.AsyncClient, since: float, before: tuple[float, float],
                         pages_each: int = 0) -> float | None:
        while time.monotonic() - since < _GIVE_UP_SECONDS:
            pages, slots = await self._held(http)
            if slots <= before[1] + self._open and pages <= before[0] + self._open * pages_each:
                return time.monotonic() - since
            await asyncio.sleep(_POLL_SECONDS)
        return None

    async def _held(self, http: httpx.AsyncClient) -> tuple[float, float]:
        """Pages and slots in use; 0 of a server that does not tell."""
        values = await self._metrics(http)
        return values.get("tritium_kv_pages_used", 0.0), values.get("tritium_state_slots_used", 0.0)

    async def _overhead(self, http: httpx.AsyncClient) -> dict[float, float]:
        """Upper bound in seconds -> tokens so far that took at most as long."""
        prefix, suffix = 'tritium_server_overhead_seconds_bucket{le="', '"}'
        return {float(name[len(prefix) : -len(suffix)]): count for name, count in (await self._metrics(http)).items()
                if name.startswith(prefix)}

    async def _metrics(self, http: httpx.AsyncClient) -> dict[str, float]:
        try:
            answer = await http.get("/metrics")
        except httpx.HTTPError as error:
            raise ConfigError(f"no server answers at {self._url}/metrics: {error}", hint="tritium serve") from None
        text = answer.text if answer.status_code == 200 else ""
        lines = (line.rpartition(" ") for line in text.splitlines() if line.startswith("tritium_"))
        return {name: float(value) for name, _, value in lines}

    async def _pages_of_an_answer(self, http: httpx.AsyncClient) -> int:
        """Most pages that one request of this load can hold; 0 where nobody leaves midway."""
        if not self._kills_left:
            return 0
        bodies = [self._load.body(i) for i in range(min(len(self._load.prompts), self._load.requests))]
        fields = "messages" if self._load.chat else "prompt"
        answers = [await http.post("/tokenize", json={fields: body[fields]}) for body in bodies]
        longest = max(int(answer.raise_for_status().json()["count"]) for answer in answers)
        return math.ceil((longest + self._load.max_tokens) / PAGE_TOKENS)

    async def _verify(self, http: httpx.AsyncClient) -> list[bool]:
        """For some of the finished streams: is the same request, alone and not streamed, answered with the same?"""
        same = []
        finished = [i for i, stream in enumerate(self._streams) if stream.finished and stream.error is None]
        for i in self._random.sample(finished, min(self._load.verify, len(finished))):
            choice = (await http.post(self._path, json=self._load.body(i))).raise_for_status().json()["choices"][0]
            same.append(_text(choice["message"] if self._load.chat else choice) == self._streams[i].text)
        return same

    def _summary(self, seconds: float, freed: float | None, idle: float | None, verified: list[bool],
                 overhead: dict[float, float]) -> LoadReport:
        done = [stream for stream in self._streams if stream.finished and stream.error is None]
        errors = [stream for stream in self._streams if not stream.finished and not stream.killed]
        tokens = sum(stream.tokens for stream in done)
        spoken = [stream for stream in done if stream.arrivals]
        return LoadReport(
            clients=self._load.clients, requests=self._load.requests, completed=len(done), errors=len(errors),
            killed=sum(stream.killed for stream in self._streams), verified=len(verified),
            corrupted=verified.count(False), seconds=seconds, output_tokens=tokens, tokens_per_second=tokens / seconds,
            ttft=_quantiles([stream.arrivals[0] - stream.started for stream in spoken]),
            tpot=_quantiles([(s.arrivals[-1] - s.arrivals[0]) / (s.tokens - 1) for s in spoken if s.tokens > 1]),
            itl=_quantiles([b - a for s in spoken for a, b in zip(s.arrivals, s.arrivals[1:])]),
            overhead=_bucket_quantiles(overhead), freed_seconds=freed, idle_seconds=idle,
            first_error=next((stream.error or "not finished in time" for stream in errors), None),
        )


class _Wire(asyncio.Protocol):
    """The client's end of one stream; it leaves after so many events."""

    def __init__(self, stream: Stream, leave_at: float) -> None:
        self.closed = asyncio.Event()
        self._stream, self._leave_at = stream, leave_at
        self._transport: asyncio.WriteTransport | None = None
        self._events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._stream.pieces.append((time.monotonic(), data))
        self._events += data.count(b"\n\n")
        if self._events >= self._leave_at and self._transport is not None:
            self._stream.killed = True
            self._transport.abort()

    def connection_lost(self, _: Exception | None) -> None:
        self.closed.set()


def _read(stream: Stream, *, chat: bool) -> None:
    """What the pieces of a stream say."""
    http = h11.Connection(h11.CLIENT)
    http.send(h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")]))
    http.send(h11.EndOfMessage())
    status, buffer = 0, b""
    for at, piece in [*stream.pieces, (0.0, b"")]:
        http.receive_data(piece)
        while not isinstance(event := http.next_event(), (type(h11.NEED_DATA), h11.EndOfMessage, h11.ConnectionClosed)):
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                *lines, buffer = (buffer + bytes(event.data)).split(b"\n\n")
                for line in lines:
                    if status == 200 and line.startswith(b"data: {"):
                        _absorb(stream, json.loads(line.removeprefix(b"data: ")), at, chat)
        if isinstance(event, h11.EndOfMessage):
            break
    if status != 200:
        stream.error = f"HTTP {status}: {buffer[:200]!r}"
    elif not stream.finished and stream.error is None:
        stream.error = "the stream ended without a finish_reason"


def _absorb(stream: Stream, data: dict[str, Any], at: float, chat: bool) -> None:
    if "error" in data:
        stream.error = str(data["error"]["message"])
        return
    for choice in data["choices"]:
        if piece := _text(choice["delta"] if chat else choice):
            stream.arrivals.append(at)
            stream.text += piece
        stream.finished |= choice["finish_reason"] is not None
    if data.get("usage"):
        stream.tokens = data["usage"]["completion_tokens"]


def _text(part: dict[str, Any]) -> str:
    """Reasoning and answer of a delta or message, or the text of a completion."""
    return (part.get("reasoning_content") or "") + (part.get("content") or part.get("text") or "")


def _quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    picked = np.quantile(values, _QUANTILES, method="inverted_cdf")
    return {**{f"p{100 * q:g}": float(value) for q, value in zip(_QUANTILES, picked)}, "max": max(values)}


def _bucket_quantiles(at_most: dict[float, float]) -> dict[str, float]:
    """Of a histogram (upper bound -> how many values are at most that), each bucket taken as evenly filled."""
    bounds = sorted(at_most)
    total = at_most[bounds[-1]] if bounds else 0
    if not total:
        return {}
    found = {}
    for q in _QUANTILES:
        i = next(i for i, bound in enumerate(bounds) if at_most[bound] >= q * total)
        low, below = (bounds[i - 1], at_most[bounds[i - 1]]) if i else (0.0, 0.0)
        high = bounds[i] if math.isfinite(bounds[i]) else low
        found[f"p{100 * q:g}"] = low + (high - low) * (q * total - below) / (at_most[bounds[i]] - below)
    return found


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"


@click.command(help=__doc__)
@click.argument("url", default="http://127.0.0.1:8000")
@click.option("--clients", default=64, show_default=True, help="Streams at the same time.")
@click.option("--requests", default=None, type=int, help="Answers in all.  [default: one a client]")
@click.option("--prompt", "prompts", multiple=True, default=Load.__dataclass_fields__["prompts"].default)
@click.option("--chat/--completions", default=False, show_default=True)
@click.option("--max-tokens", default=128, show_default=True)
@click.option("--ignore-eos/--stop-at-eos", default=True, show_default=True)
@click.option("--kill-fraction", default=0.0, show_default=True, help="Share of clients that disconnect midway.")
@click.option("--verify", default=0, show_default=True, help="Finished streams to ask again, alone, and compare.")
@click.option("--seed", default=0, show_default=True)
@click.option("--model", default=None)
@click.option("--seconds", default=300.0, show_default=True, help="Time limit.")
@click.option("--allow-remote", is_flag=True, help="The server is not on this machine, and is yours to load.")
def main(url: str, requests: int | None, clients: int, **options: Any) -> None:
    os.nice(19)  # where server and clients share cores, what is measured is the server and not its readers
    try:
        report = run_load(url, Load(clients=clients, requests=requests or clients, **options))
    except TritiumError as error:
        raise SystemExit(f"error: {error}") from None
    print(report.table(), file=sys.stderr)
    print(json.dumps(dataclasses.asdict(report)))
    if report.errors or report.corrupted:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
