"""The engine in its own process: the same answers, a death in words, a successor, no orphans."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from engines import broken, mortal, rambler, slow_rambler, surprised
from scripted import session_over
from served import CHAT, rambles

from tritium.api import Session
from tritium.api.door import Door
from tritium.api.drive import Report
from tritium.api.process import _AWAKE_SECONDS, _EVENT, _STATS, EngineProcess, _framed, _Line
from tritium.core import (
    CheckpointError,
    EngineDeadError,
    EngineStats,
    Event,
    FinishReason,
    SamplingParams,
    TokenEvent,
)

HERE = Path(__file__).parent


def over(driver: EngineProcess) -> Session:
    return Session(driver, Door(driver.facts, CHAT, seed=0))


async def ask(session: Session, seed: int = 0, max_tokens: int = 50) -> list[int]:
    events = session.generate("Hi", SamplingParams(seed=seed, max_tokens=max_tokens))
    return [token async for event in events for token in event.token_ids]


def gone(pid: int, seconds: float = 2.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # dead, and its new parent has not looked yet
            return True
        time.sleep(0.01)
    return False


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_another_process_gives_the_same_tokens():
    async def answers(session: Session) -> list[list[int]]:
        async with session:
            return await asyncio.gather(*(ask(session, seed) for seed in range(8)))

    driver = EngineProcess(rambler)
    assert driver._child.process.pid != os.getpid()
    there = asyncio.run(answers(over(driver)))
    assert there == asyncio.run(answers(session_over(rambles(), CHAT, seed=0)))
    assert gone(driver._child.process.pid)


@pytest.mark.parametrize("direct", [True, False])
def test_an_announcement_tells_the_streams_of_nothing(direct):
    """What goes the way of a token beforehand leaves no trace; where no report follows, the reader goes to rest."""
    class Sink:
        ready = True

        def take(self, event: Event) -> None:
            events.append(event)

    events: list[Event] = []

    async def main() -> None:
        async with over(EngineProcess(partial(slow_rambler, 0.003))) as session:
            sink = Sink() if direct else None
            async for event in session.generate("Hi", SamplingParams(seed=3, max_tokens=50), sink=sink):
                assert event.token_ids
                events.append(event)

    asyncio.run(main())
    assert sum(not event.token_ids for event in events) > 10 or not direct
    whole = asyncio.run(ask(session_over(rambles(), CHAT, seed=0), 3))
    assert [token for event in events for token in event.token_ids] == whole


def test_where_no_report_follows_an_announcement_the_reader_rests():
    told: list[Report] = []

    async def main() -> int:
        line = _Line(told.append)
        events = [("a", (1,), 0), ("b", (2,), 0), _EVENT(TokenEvent("c", (3,), finish_reason=FinishReason.STOP))]
        line.data_received(_framed((events, _STATS(EngineStats()), 1.0, (), ())))
        line.data_received(b"\0\0\0\0")
        await asyncio.sleep(5 * _AWAKE_SECONDS)
        line._rehearse(told[0])
        return len(told)

    assert asyncio.run(main()) == 3
    assert [(event.request_id, event.tokens) for report in told for event in report.events] == [
        ("a", (1,)), ("b", (2,)), ("c", (3,)), ("a", ()), ("b", ())]


def test_what_stops_the_loading_reaches_the_caller():
    with pytest.raises(CheckpointError) as torn:
        EngineProcess(broken)
    assert (torn.value.message, torn.value.hint) == ("the file is torn", "fetch it again")
    with pytest.raises(EngineDeadError, match="ValueError: what is this"):
        EngineProcess(surprised)


@pytest.mark.parametrize("how", ["killed", "raises"])
def test_a_death_is_told_within_a_second_and_another_engine_takes_over(how):
    async def main() -> None:
        driver = EngineProcess(rambler if how == "killed" else mortal)
        async with over(driver) as session:
            asked = [asyncio.ensure_future(ask(session, seed, 4000)) for seed in range(4)]
            if how == "killed":
                while session.stats().running < 4:
                    await asyncio.sleep(0.01)
                os.kill(driver._child.process.pid, signal.SIGKILL)
            killed = time.monotonic()
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
            assert how == "raises" or time.monotonic() - killed < 1.0
            reason = "signal 9" if how == "killed" else "RuntimeError: scripted death"
            assert all(isinstance(error, EngineDeadError) and reason in str(error) for error in outcomes), outcomes
            assert not session.alive
            with pytest.raises(EngineDeadError):
                await ask(session)
            while not session.alive:
                assert time.monotonic() - killed < 60  # mostly imports of the tests
                await asyncio.sleep(0.01)
            assert len(await ask(session, max_tokens=15)) == 15
            assert session.restarts == 1

    asyncio.run(main())


def test_deaths_leak_nothing():
    async def main() -> None:
        async with over(EngineProcess(rambler)) as session:
            for _ in range(3):
                await ask(session, max_tokens=3)
                held = descriptors()
                os.kill(session._driver._child.process.pid, signal.SIGKILL)
                while session.alive:
                    await asyncio.sleep(0.01)
                while not session.alive:
                    await asyncio.sleep(0.01)
                assert descriptors() == held

    before = descriptors()
    asyncio.run(main())
    assert descriptors() == before


@pytest.mark.parametrize("engine", ["rambler", "never_ready"])
def test_the_child_does_not_outlive_its_parent(engine):
    """Though the parent is killed with no chance to say so, while the engine runs or while it loads."""
    code = f"""if True:
        import subprocess, sys
        real = subprocess.Popen
        class Popen(real):
            def __init__(self, *args, **more):
                super().__init__(*args, **more)
                print(self.pid, flush=True)
        subprocess.Popen = Popen
        from engines import {engine}
        from tritium.api.process import EngineProcess
        driver = EngineProcess({engine})
        print("ready", flush=True)
        sys.stdin.read()
    """
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True, env=os.environ | {"PYTHONPATH": str(HERE)})
    with parent:
        child = int(parent.stdout.readline())
        if engine == "rambler":
            assert parent.stdout.readline() == "ready\n"
        else:
            time.sleep(1.0)
        assert Path(f"/proc/{child}").exists()
        parent.kill()
    # A child that is still importing what to load hears of it after that.
    assert gone(child, 2.0 if engine == "rambler" else 20.0)


def test_signals_of_the_terminal_are_the_parents_business():
    async def main() -> None:
        driver = EngineProcess(partial(slow_rambler, 0.01))
        async with over(driver) as session:
            answer = asyncio.ensure_future(ask(session, max_tokens=30))
            while not session.stats().running:
                await asyncio.sleep(0.01)
            os.kill(driver._child.process.pid, signal.SIGINT)
            os.kill(driver._child.process.pid, signal.SIGTERM)
            assert len(await answer) == 30

    asyncio.run(main())


