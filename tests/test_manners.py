"""Who is served, when, and how much: keys, the queue, fair shares, time limits, the log, clients without manners."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import anthropic
import httpx
import openai
import pytest
from served import MODEL, rambles, says, served

from tritium.api import BusyError, Limits
from tritium.api.gate import Gate
from tritium.core import ConfigError
from tritium.server import ServerSettings

HELLO = [{"role": "user", "content": "Hello"}]
BODY = {"model": MODEL, "messages": HELLO, "max_tokens": 8}


def hold(server, count, **fields):
    """Open so many streams and leave them open."""
    client = server.client
    streams = [client.completions.create(model=MODEL, prompt="x", max_tokens=3000, stream=True, **fields)
               for _ in range(count)]
    for stream in streams:
        next(iter(stream))
    return streams


# The gate.


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_keys_share_the_engine_whoever_came_first():
    """Of two keys that both always want more, each gets half of the places; a third gets its third."""
    gate, inside = Gate(8), []
    capacity = 9

    def ask(key: str) -> None:
        ticket = gate.enter(key)
        ticket.ready(1, 1, lambda: inside.append((key, ticket)))

    for key in ("a",) * 100 + ("b",) * 100:
        ask(key)
    assert [key for key, _ in inside] == ["a"] * capacity  # nobody else was there
    rng = random.Random(0)
    for turn in range(80):
        if turn == 40:
            for _ in range(100):
                ask("c")
        _, ticket = inside.pop(rng.randrange(len(inside)))
        ticket.choices_ended()
        ticket.leave()
        assert gate.running == capacity
        if turn in (39, 79):
            keys = sorted(key for key, _ in inside)
            shares = [keys.count(key) for key in ("a", "b", "c")]
            assert max(shares) - min(shares[: 2 if turn == 39 else 3]) <= 1


def test_small_priorities_go_first_then_the_first_to_come():
    gate, order = Gate(1), []
    blockers = [gate.enter() for _ in range(2)]
    for blocker in blockers:
        blocker.ready(1, 1, lambda: None)
    tickets = {}
    for name, priority in (("late", 1), ("first", 0), ("second", 0), ("urgent", -1)):
        tickets[name] = gate.enter(priority=priority)
        tickets[name].ready(1, 1, lambda name=name: order.append(name))
    for ticket in blockers:
        ticket.leave()
    for name in ("urgent", "first", "second"):
        tickets[name].leave()
    assert order == ["urgent", "first", "second", "late"]


def test_random_tickets_leave_nothing_behind(seed):
    """Entering, waiting, ending and leaving in any order: places in use are never more than there are, no place is
    idle while somebody waits, and at the end all is given back."""
    rng = random.Random(seed)
    gate, open_tickets, admitted = Gate(6, Limits(max_queued_requests=10)), [], set()
    capacity = 7
    for _ in range(5000):
        if rng.random() < 0.5 or not open_tickets:
            try:
                ticket = gate.enter(rng.choice("abc"), rng.randrange(3))
            except BusyError:
                assert gate.running >= capacity or len(open_tickets) - len(admitted) >= 10
                continue
            if rng.random() < 0.9:
                ticket.ready(rng.choice((1, 1, 4)), 5, lambda ticket=ticket: admitted.add(ticket))
            open_tickets.append(ticket)
        else:
            ticket = rng.choice(open_tickets)
            if ticket in admitted and ticket.choices and rng.random() < 0.7:
                ticket.choices_ended()
            else:
                ticket.leave()
                ticket.leave()
                open_tickets.remove(ticket)
                admitted.discard(ticket)
        assert gate.running == sum(ticket.choices for ticket in admitted)
        if any(ticket.go is not None and ticket not in admitted for ticket in open_tickets):
            assert gate.running >= capacity
    for ticket in open_tickets:
        ticket.leave()
    assert (gate.running, gate.waiting) == (0, 0)
    assert all(account.requests == account.running == 0 for account in gate._accounts.values())


def test_a_keys_tokens_come_back_with_time():
    clock = Clock()
    gate = Gate(8, Limits(tokens_per_minute_per_key=600), clock=clock)
    first = gate.enter("a")
    first.ready(1, 100, lambda: None)
    first.charge(510)
    with pytest.raises(BusyError) as busy:
        gate.enter("a")
    assert busy.value.retry_after == pytest.approx(1.1)
    gate.enter("b")
    clock.now += 1.2
    gate.enter("a")


# Limits, over HTTP.


def test_a_full_queue_is_429_with_retry_after():
    with served(rambles(max_num_seqs=1, step_seconds=0.002), max_queued_requests=0) as server:
        streams = hold(server, 1)
        server.session.gate.enter()  # the place for one more, which the engine would take next
        refused = server.post("/v1/chat/completions", BODY)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        with pytest.raises(openai.RateLimitError, match="queue is full"):
            server.client.chat.completions.create(**BODY)
        with pytest.raises(anthropic.RateLimitError):
            server.anthropic.messages.create(**BODY)
        streams[0].close()
        server.wait_for(running=0)


def test_clients_retry_after_429_and_are_served():
    """The official clients wait as told and ask again; nobody's request is lost."""
    with served(says("ok", max_num_seqs=1, step_seconds=0.02), max_queued_requests=1) as server:
        client = server.client.with_options(max_retries=10)
        with ThreadPoolExecutor(6) as pool:
            done = list(pool.map(lambda _: client.completions.create(model=MODEL, prompt="x", max_tokens=4), range(6)))
        assert [answer.choices[0].text for answer in done] == ["ok"] * 6
        assert server.session.gate.waiting == server.session.gate.running == 0


def test_requests_of_one_key_are_limited_and_others_go_on():
    keys = ("alice sk-a", "bob sk-b")
    with served(rambles(step_seconds=0.002), api_keys=keys, max_requests_per_key=2) as server:
        alice, bob = (server.client.with_options(api_key=key, max_retries=0) for key in ("sk-a", "sk-b"))
        streams = [alice.completions.create(model=MODEL, prompt="x", max_tokens=3000, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="this key has 2 requests"):
            alice.completions.create(model=MODEL, prompt="x")
        assert bob.completions.create(model=MODEL, prompt="x").choices
        for stream in streams:
            stream.close()
        server.wait_idle()
        assert alice.completions.create(model=MODEL, prompt="x").choices


def test_a_request_may_take_so_long():
    with served(rambles(step_seconds=0.01), request_timeout=0.2) as server:
        begin = time.monotonic()
        late = server.post("/v1/completions", {"prompt": "x", "max_tokens": 3000})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        assert time.monotonic() - begin < 2
        with pytest.raises(openai.APIError, match=r"0\.2 s"):
            list(server.client.completions.create(model=MODEL, prompt="x", max_tokens=3000, stream=True))
        server.wait_idle()


# Keys.


def test_keys_as_the_clients_send_them():
    with served(says("ok"), api_keys=("secret",)) as server:
        assert server.client.with_options(api_key="secret").models.list().data
        sent = server.anthropic.with_options(api_key="secret").messages.create(**BODY)
        assert sent.content
        for wrong in ("secre", "secrets", "Secret", "\u00e9"):
            answer = httpx.get(f"{server.url}/v1/models", headers={b"authorization": f"Bearer {wrong}".encode()})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert server.get("/v1/models").status_code == 401
        with pytest.raises(openai.AuthenticationError):
            server.client.models.list()
        with pytest.raises(anthropic.AuthenticationError):
            server.anthropic.messages.create(**BODY)
        assert server.get("/metrics").status_code == 401
        assert server.get("/health").status_code == 200
        assert server.post("/v1/messages", BODY).json()["error"]["type"] == "authentication_error"


def test_a_file_of_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\nalice sk-1\n\nsk-2\n")
    ring = ServerSettings(api_key_file=str(path), api_keys=("sk-0",)).keyring()
    assert [ring.name_of(key) for key in (b"sk-0", b"sk-1", b"sk-2", b"alice", b"")] == [
        "key-1", "alice", "key-3", None, None]
    for text in ("", "# nothing\n", "one two three\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="key"):
            ServerSettings(api_key_file=str(path)).keyring()
    with pytest.raises(ConfigError, match="cannot be read"):
        ServerSettings(api_key_file=str(tmp_path / "none")).keyring()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com"])
def test_other_machines_need_a_key(host):
    with pytest.raises(ConfigError, match="no API key"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, api_keys=("k",)).host == host
    assert ServerSettings(host=host, allow_unauthenticated=True).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_none(host):
    assert ServerSettings(host=host).host == host


@pytest.mark.parametrize(("fields", "flag"), [
    ({"allowed_origins": ("example.com",)}, "--allowed-origins"),
    ({"max_body_bytes": 0}, "--max-body-bytes"),
    ({"log_format": "xml"}, "--log-format"),
])
def test_settings_that_cannot_work_name_the_flag(fields, flag):
    with pytest.raises(ConfigError, match=flag):
        ServerSettings(**fields)


# CORS, ids, logs.


def test_web_pages_are_kept_out_unless_told():
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with served(says("ok")) as server:
        answer = httpx.options(f"{server.url}/v1/chat/completions", headers=headers)
        assert "access-control-allow-origin" not in answer.headers
    with served(says("ok"), allowed_origins=("https://a.example",), api_keys=("k",)) as server:
        answer = httpx.options(f"{server.url}/v1/chat/completions", headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        other = httpx.options(f"{server.url}/v1/chat/completions", headers=headers | {"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
        stream = httpx.post(f"{server.url}/v1/chat/completions", json=BODY | {"stream": True},
                            headers={"origin": "https://a.example", "authorization": "Bearer k"})
        assert stream.headers["access-control-allow-origin"] == "https://a.example"


@pytest.mark.parametrize("more", [{}, {"Connection": "close"}, {"Connection": "TE, Close"}])
def test_a_stream_begins_as_h11_would_have_it_and_its_connection_lives_on(more):
    """The head of a stream is not h11's, except for a web page's."""
    def ask(connection: http.client.HTTPConnection, **headers: str) -> tuple[dict[str, str], str]:
        body = json.dumps({"prompt": "x", "max_tokens": 5, "seed": 1, "stream": True})
        connection.request("POST", "/v1/completions", body, {"x-request-id": "mine", **more, **headers})
        answer = connection.getresponse()
        assert (answer.status, answer.version) == (200, 11)
        *events, last = answer.read().decode().removesuffix("\n\n").split("\n\n")
        assert last == "data: [DONE]"
        text = "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events)
        return {name.lower(): value for name, value in answer.getheaders() if name != "date"}, text

    with served(rambles(step_seconds=0.005)) as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
        own, page, again = ask(connection), ask(connection, origin="http://page"), ask(connection)
    assert own == page == again
    assert own[0]["x-request-id"] == "mine"


def test_request_ids_and_a_line_of_json_for_each_request(caplog):
    caplog.set_level(logging.INFO, logger="tritium.access")
    with served(says("ok"), log_format="json", api_keys=("alice sk-1",)) as server:
        headers = {"authorization": "Bearer sk-1", "x-request-id": "trace-7"}
        given = httpx.post(f"{server.url}/v1/chat/completions", json=BODY, headers=headers)
        assert given.headers["x-request-id"] == "trace-7"
        made = httpx.post(f"{server.url}/v1/chat/completions", json=BODY | {"n": 0},
                          headers=headers | {"x-request-id": "bad id"})
        assert made.headers["x-request-id"].startswith("req_")
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "tritium.access"]
    first, second = (line for line in lines if line["path"] == "/v1/chat/completions")
    assert first.items() >= {"request_id": "trace-7", "key": "alice", "status": 200, "method": "POST",
                             "prompt_tokens": given.json()["usage"]["prompt_tokens"]}.items()
    assert second.items() >= {"request_id": made.headers["x-request-id"], "status": 400}.items()
    assert "n must be" in second["error"]


# Clients without manners.


def connect(server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


@pytest.mark.parametrize("sent", [
    b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
], ids=["nothing", "half a head", "half a body"])
def test_a_client_that_does_not_finish_its_request_is_let_go(sent):
    with served(says("ok"), patience=0.4) as server, connect(server) as slow:
        slow.sendall(sent)
        begin = time.monotonic()
        assert server.get("/health").status_code == 200
        try:
            answer = slow.recv(4096)
        except ConnectionResetError:
            answer = b""
        assert answer == b"" or b" 408 " in answer.split(b"\r\n")[0]
        assert time.monotonic() - begin < 3


def test_a_client_that_sends_a_byte_at_a_time_is_let_go():
    with served(says("ok"), patience=0.5) as server, connect(server) as slow:
        begin = time.monotonic()
        sent = 0
        with suppress(ConnectionResetError, BrokenPipeError):
            for byte in b"POST /v1/completions HTTP/1.1\r\nHost: " + b"x" * 1000:
                sent += slow.send(bytes([byte]))
                time.sleep(0.01)
        assert sent < 1000
        assert time.monotonic() - begin < 5


def test_a_client_that_never_reads_is_let_go_and_holds_nobody_up():
    with served(rambles(chunk=50), patience=0.5) as server, connect(server) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"prompt": "x", "max_tokens": 4000, "stream": True, "logprobs": 5, "n": 16}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        deaf.sendall(head + body)
        server.wait_for(running=16)
        assert server.client.completions.create(model=MODEL, prompt="x", max_tokens=5).choices
        server.wait_for(10.0, running=0, pages_used=0)
        deadline = time.monotonic() + 10
        while server.session._inboxes:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert server.session.gate.running == 0


# Draining.


def test_a_drain_finishes_what_runs_and_refuses_what_is_new():
    with served(rambles(step_seconds=0.01), drain_seconds=20.0) as server:
        stream = server.client.completions.create(model=MODEL, prompt="x", max_tokens=60, stream=True)
        events = iter(stream)
        next(events)
        draining = asyncio.run_coroutine_threadsafe(server.session.drain(20.0), server.session._loop)
        deadline = time.monotonic() + 5
        while (refused := server.post("/v1/completions", {"prompt": "x"})).status_code == 200:
            assert time.monotonic() < deadline
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        health = server.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "draining"})
        assert [chunk.choices[0].finish_reason for chunk in events][-1] == "length"
        draining.result(5)


def test_a_burst_of_threads_enters_the_gate_whole():
    """More at once than run at once: all are served, in the end nothing is held."""
    with served(rambles(max_num_seqs=4)) as server:
        barrier = threading.Barrier(24)

        def one(i: int) -> int:
            barrier.wait(10)
            return server.client.completions.create(model=MODEL, prompt="x", max_tokens=10).usage.completion_tokens

        with ThreadPoolExecutor(24) as pool:
            assert list(pool.map(one, range(24))) == [10] * 24
        server.wait_idle()
