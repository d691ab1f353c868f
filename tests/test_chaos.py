"""Short storms (the long ones are `make soak`), and signals under load."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import httpx
import pytest
from chaos import HERE, Chaos, fill_a_disk, server_process, settle, warm_up

SERVER = str(HERE / "scripted_server.py")


def test_nothing_is_lost_and_nothing_leaks(seed):
    with server_process(SERVER, "rambler") as server:
        before = warm_up(server)
        chaos = Chaos(server, seconds=8.0, kill_every=3.0, seed=seed)
        asyncio.run(chaos.run())
        outcome = chaos.outcome
        assert not outcome.lost
        assert sum(outcome.ends.values()) == outcome.asked
        assert chaos.kills == 2
        assert min(outcome.ends["streamed"], outcome.ends["whole"], outcome.ends["503"]) > 0
        assert settle(server, before) == before


def test_a_disk_that_fills_up_under_load_costs_no_request_and_no_old_file(seed):
    if not (HERE.parent / "tritium" / "embedded" / "dense" / "model.safetensors").is_file():
        pytest.skip("the embedded model is not in this checkout")
    fill_a_disk(1.5, seed)


def test_sigterm_finishes_what_runs_refuses_what_is_new_and_leaves():
    async def main(server) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
            running = [asyncio.ensure_future(http.post("/v1/completions", json={"prompt": "x", "max_tokens": 200}))
                       for _ in range(8)]
            while (await http.get("/metrics")).text.find("tritium_requests_running 8.0") < 0:
                await asyncio.sleep(0.02)
            server.process.send_signal(signal.SIGTERM)
            while (await http.get("/health")).status_code == 200:
                await asyncio.sleep(0.02)
            assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 503
            for answer in await asyncio.gather(*running):
                assert answer.json()["usage"]["completion_tokens"] == 200

    with server_process(SERVER, "rambler") as server:
        engine = server.engine_pid
        asyncio.run(main(server))
        assert server.process.wait(5) in (0, -signal.SIGTERM)
        assert not Path(f"/proc/{engine}").exists()


def test_a_second_signal_leaves_at_once():
    with server_process(SERVER, "rambler") as server:
        engine = server.engine_pid
        with httpx.stream("POST", f"{server.url}/v1/completions", timeout=10,
                          json={"prompt": "x", "max_tokens": 4000, "stream": True}) as answer:
            pieces = answer.iter_raw()  # kept: the client hangs up with it
            next(pieces)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert server.process.poll() is None
            begin = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(5) == 128 + signal.SIGTERM
            assert time.monotonic() - begin < 1
        deadline = time.monotonic() + 3
        while Path(f"/proc/{engine}").exists() and "Z" not in Path(f"/proc/{engine}/stat").read_text().split()[2]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
