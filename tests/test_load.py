"""The load script against a scripted server: what it counts is what happened."""

from __future__ import annotations

import asyncio
import json
import re
import time

import pytest
from click.testing import CliRunner
from scripted import session_over
from served import CHAT, rambles, says, scripted, served

from tritium.bench.load import Load, _bucket_quantiles, main, run_load
from tritium.core import ConfigError, Event, RequestError
from tritium.server.metrics import Metrics


def test_a_clean_run_is_reported_exactly():
    with served(rambles(step_seconds=0.002)) as server:
        report = run_load(server.url, Load(clients=8, requests=20, max_tokens=30, verify=5))
    assert (report.completed, report.errors, report.killed) == (20, 0, 0)
    assert (report.verified, report.corrupted) == (5, 0)
    assert report.output_tokens == 20 * 30
    assert report.tokens_per_second == pytest.approx(600 / report.seconds)
    assert 0.002 <= report.ttft["p50"] <= report.ttft["p99"] <= report.ttft["max"]
    assert 0 < report.tpot["p50"] <= report.seconds / 29
    assert report.idle_seconds is not None
    assert report.freed_seconds is None


@pytest.mark.parametrize("chat", [False, True])
def test_killed_clients_are_counted_and_what_they_held_comes_back(chat):
    with served(rambles(step_seconds=0.01)) as server:
        load = Load(clients=24, requests=24, max_tokens=150, kill_fraction=1 / 3, chat=chat, verify=2)
        report = run_load(server.url, load)
        server.wait_idle()
        aborted = server.metric('requests_finished_total{reason="abort"}')
    assert (report.completed, report.killed, report.errors, report.corrupted) == (16, 8, 0, 0)
    assert 0 < aborted <= 8  # the server may have been done with what a slow client had not read yet
    assert report.freed_seconds is not None
    assert report.freed_seconds < 1
    assert report.idle_seconds is not None
    assert report.idle_seconds < 1


def test_an_answer_that_differs_when_asked_again_is_corrupted():
    served_so_far: list[str] = []

    def fickle(request):
        served_so_far.append(request.id)
        return [97 + len(served_so_far) % 26] * 50

    with served(scripted(fickle)) as server:
        report = run_load(server.url, Load(clients=2, requests=4, max_tokens=10, verify=4))
    assert (report.completed, report.corrupted) == (4, 4)


def test_refusals_and_deaths_are_errors():
    engine = says("x")
    engine.add = lambda request: (_ for _ in ()).throw(RequestError("no room"))
    with served(engine) as server:
        report = run_load(server.url, Load(clients=2, requests=3))
    assert (report.completed, report.errors) == (0, 3)
    assert "no room" in (report.first_error or "")
    with served(rambles(die_after=10)) as server:
        report = run_load(server.url, Load(clients=2, requests=3))
    assert report.errors == 3
    assert "the engine died" in (report.first_error or "")


def test_what_is_not_done_in_time_is_an_error():
    with served(rambles(step_seconds=0.05)) as server:
        report = run_load(server.url, Load(clients=2, requests=2, seconds=0.5))
    assert (report.completed, report.errors) == (0, 2)


def test_only_this_machine_and_only_so_much():
    with pytest.raises(ConfigError, match="not on this machine"):
        run_load("http://192.0.2.1:8000", Load())
    with pytest.raises(ConfigError, match="no server answers"):
        run_load("http://127.0.0.1:9", Load())
    with pytest.raises(ConfigError, match="clients must be"):
        Load(clients=10**6)


def test_the_command_ends_in_one_json_line():
    with served(rambles()) as server:
        result = CliRunner().invoke(main, [server.url, "--clients", "2", "--max-tokens", "5"])
    assert result.exit_code == 0
    assert json.loads(result.stdout.splitlines()[-1])["completed"] == 2
    assert len(result.stdout.splitlines()) == 1
    assert "tokens/s" in result.stderr


def test_quantiles_of_a_histogram():
    """Ten values up to 1, eighty more up to 2, ten above: the median is where half of all lie below."""
    found = _bucket_quantiles({1.0: 10, 2.0: 90, 4.0: 100, float("inf"): 100})
    assert found == {"p50": 1.5, "p90": 2.0, "p99": 3.8}
    assert _bucket_quantiles({1.0: 0, float("inf"): 0}) == {}


def test_the_servers_own_time_is_told():
    with served(rambles(step_seconds=0.01)) as server:
        report = run_load(server.url, Load(clients=4, requests=4, max_tokens=20))
    assert 0 < report.overhead["p50"] <= report.overhead["p99"] < 1


def test_overhead_is_counted_by_token_within_its_bucket():
    metrics = Metrics(session_over(says("x"), CHAT))

    async def render():
        for made_ago, tokens in ((0.0003, 2), (0.02, 1), (0.02, 0), (5.0, 1)):
            metrics.sent(Event(token_ids=(7,) * tokens, made_at=time.monotonic() - made_ago))
        await asyncio.sleep(0)
        return metrics.render().decode()

    page = asyncio.run(render())
    found = {bound: float(count) for bound, count in re.findall(r'overhead_seconds_bucket{le="(.*?)"} (.*)', page)}
    assert (found["0.0003"], found["0.01"], found["0.03"], found["1.0"], found["+Inf"]) == (0, 2, 3, 3, 4)
    assert "tritium_server_overhead_seconds_count 4.0\n" in page
    assert 5.0 < float(re.search("overhead_seconds_sum (.*)", page)[1]) < 5.2
