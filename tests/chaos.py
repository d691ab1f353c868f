"""Clients of every kind at a server whose engine is killed now and then: `python tests/chaos.py --seconds 600`.
A tenth of that time goes before, to the embedded model with `--cache-dir` on a disk that fills up under load.

Well-behaved clients count: each of their requests must end in a whole answer, or in an error that says why. The others
leave midway, never read, or send a byte now and then. At the end the server must hold what it held at the start.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import click
import httpx

HERE = Path(__file__).parent


@dataclass
class Process:
    """A server in a process of its own, and what can be seen of it from outside."""

    url: str
    process: subprocess.Popen[str]
    said: list[str]
    """Lines on stderr."""

    @property
    def engine_pid(self) -> int | None:
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split() + [
            child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
        return int(children[0]) if children else None

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def resident_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


@contextmanager
def server_process(*command: str) -> Iterator[Process]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    said: list[str] = []
    try:
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"serving on (\S+)", line):
                break
        else:
            raise AssertionError(f"the server did not start: {''.join(said)}")
        threading.Thread(target=said.extend, args=(process.stderr,), daemon=True).start()
        yield Process(found[1], process, said)
    finally:
        process.kill()
        process.wait()


@dataclass
class Disk:
    """Where an engine saves its cache: a file system of its own, or, where none may be mounted, a directory to which it
    may write nothing large while that is "full"."""

    directory: Path
    mounted: bool

    @classmethod
    @contextmanager
    def small(cls) -> Iterator[Disk]:
        with tempfile.TemporaryDirectory() as place:
            mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", place], capture_output=True)
            try:
                yield cls(Path(place), mount.returncode == 0)
            finally:
                if mount.returncode == 0:
                    subprocess.run(["umount", "-l", place], check=True)

    @property
    def complaint(self) -> str:
        return "cannot be written: " + ("No space left on device" if self.mounted else "File too large")

    def fill(self, server: Process) -> None:
        if not self.mounted:
            _limit_files(server, 4096)
            return
        with suppress(OSError), (self.directory / "ballast").open("wb", buffering=0) as ballast:
            while ballast.write(bytes(4096)):
                pass

    def make_room(self, server: Process) -> None:
        if not self.mounted:
            _limit_files(server, resource.RLIM_INFINITY)
        (self.directory / "ballast").unlink(missing_ok=True)


def _limit_files(server: Process, size: int) -> None:
    assert server.engine_pid is not None
    resource.prlimit(server.engine_pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@dataclass
class Outcome:
    """What the well-behaved clients saw."""

    asked: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    """Neither an answer nor an error in words."""
    saves: list[tuple[str, str]] = field(default_factory=list)
    """Whether the disk was full, and what came of saving the cache."""


class Chaos:
    def __init__(self, server: Process, *, seconds: float, kill_every: float = math.inf, seed: int,
                 disk: Disk | None = None) -> None:
        self._server = server
        self._disk = disk
        self._random = random.Random(seed)
        self._seconds, self._kill_every = seconds, kill_every
        self._end = 0.0
        self.outcome = Outcome()
        self.kills = 0
        host, port = server.url.removeprefix("http://").split(":")
        self._address = host, int(port)

    async def run(self) -> None:
        self._end = time.monotonic() + self._seconds
        kinds = [self._polite] * 24 + [self._leaver] * 6 + [self._deaf] * 2 + [self._dribbler] * 2 + [self._garbler]
        if self._disk is not None:  # for a model that computes
            kinds = [self._polite] * 8 + [self._leaver] * 4
        async with httpx.AsyncClient(base_url=self._server.url, timeout=60, limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=8)) as http:
            jobs = [self._repeat(kind, http, self._random.randrange(2**32)) for kind in kinds]
            await asyncio.gather(self._killer(), self._saver(http), *jobs)

    async def _repeat(self, kind, http: httpx.AsyncClient, seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < self._end:
            await kind(http, rng)

    async def _killer(self) -> None:
        while time.monotonic() + self._kill_every < self._end:
            await asyncio.sleep(self._kill_every)
            if (pid := self._server.engine_pid) is not None:
                os.kill(pid, signal.SIGKILL)
                self.kills += 1

    async def _saver(self, http: httpx.AsyncClient) -> None:
        """Saves the cache again and again to a disk with room, a full one, and one with room again."""
        if (disk := self._disk) is None:
            return
        for state in ("room", "full", "room again"):
            await asyncio.to_thread(disk.fill if state == "full" else disk.make_room, self._server)
            end = time.monotonic() + self._seconds / 3
            while time.monotonic() < end:
                answer = await http.post("/cache/save", json={})
                saved = answer.status_code == 200
                self.outcome.saves.append((state, "saved" if saved else answer.json()["error"]["message"]))
                await asyncio.sleep(0.1)

    async def _polite(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        outcome, budget = self.outcome, rng.choice((5, 30, 150))
        body = {"prompt": "x" * rng.randrange(1, 300), "max_tokens": budget, "stream": rng.random() < 0.7,
                "n": rng.choice((1, 1, 1, 3)), "ignore_eos": True}
        outcome.asked += 1
        try:
            answer = await http.post("/v1/completions", json=body)
        except httpx.HTTPError as error:
            outcome.lost.append(f"{type(error).__name__}: {error}")
            return
        if answer.status_code != 200:
            known = answer.status_code in (429, 503) and "message" in answer.json()["error"]
            outcome.ends[str(answer.status_code)] += 1
            if not known or "retry-after" not in answer.headers:
                outcome.lost.append(f"{answer.status_code}: {answer.text[:200]}")
            await asyncio.sleep(0.05)
        elif body["stream"]:
            *events, last = answer.text.removesuffix("\n\n").split("\n\n")
            data = [json.loads(event.removeprefix("data: ")) for event in events]
            failed = "error" in data[-1]
            ended = sum(choice["finish_reason"] == "length" for event in data for choice in event.get("choices", ()))
            outcome.ends["failed midway" if failed else "streamed"] += 1
            if last != "data: [DONE]" or not (failed or ended == body["n"]):
                outcome.lost.append(answer.text[-300:])
        else:
            done = answer.json()
            outcome.ends["whole"] += 1
            if done["usage"]["completion_tokens"] != budget * body["n"]:
                outcome.lost.append(answer.text[-300:])

    async def _leaver(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        body = {"prompt": "x", "max_tokens": 2000, "stream": rng.random() < 0.8}
        with suppress(httpx.HTTPError, asyncio.TimeoutError):
            async with asyncio.timeout(rng.random()), http.stream("POST", "/v1/completions", json=body) as answer:
                async for _ in answer.aiter_raw():
                    if rng.random() < 0.1:
                        return

    async def _deaf(self, _: httpx.AsyncClient, rng: random.Random) -> None:
        """Asks for much and reads nothing."""
        body = json.dumps({"prompt": "x", "max_tokens": 3000, "stream": True, "logprobs": 20}).encode()
        await self._raw(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body),
                        pause=0.0, wait=rng.random() * 5)

    async def _dribbler(self, _: httpx.AsyncClient, rng: random.Random) -> None:
        await self._raw(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{",
                        pause=0.05, wait=rng.random() * 4)

    async def _garbler(self, _: httpx.AsyncClient, rng: random.Random) -> None:
        await self._raw(rng.randbytes(rng.randrange(1, 400)), pause=0.0, wait=0.1)

    async def _raw(self, data: bytes, *, pause: float, wait: float) -> None:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection(*self._address, limit=1024)
            try:
                for piece in [bytes([byte]) for byte in data] if pause else [data]:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(pause)
                await asyncio.sleep(wait)
            finally:
                writer.transport.abort()
                del reader


def held(server: Process) -> dict[str, float]:
    """What a server holds that must come back."""
    metrics = server.metrics()
    names = ("requests_running", "requests_waiting", "kv_pages_used", "state_slots_used", "server_tasks")
    return {name: metrics[f"tritium_{name}"] for name in names} | {
        "descriptors": server.descriptors(), "threads": server.threads()}


def settle(server: Process, before: dict[str, float], seconds: float = 15.0) -> dict[str, float]:
    """What is held once it is as before, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while (now := held(server)) != before and time.monotonic() < deadline:
        time.sleep(0.2)
    return now


def warm_up(server: Process) -> dict[str, float]:
    """Some work, so that pools of threads exist; -> what is held at rest."""
    async def main() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            await asyncio.gather(*(http.post("/v1/completions", json={"prompt": "x"}) for _ in range(32)))

    for _ in range(3):
        asyncio.run(main())
    time.sleep(0.5)
    return held(server)


def fill_a_disk(seconds: float, seed: int) -> Outcome:
    """`tritium serve` with `--cache-dir` on a disk that fills up while clients come and go, has room again,
    and is full when the server ends. -> what the clients saw. Raises `AssertionError`."""
    main = "from tritium.cli.main import main; main()"
    with Disk.small() as disk, server_process(
            "-c", main, "serve", "tritium-dense", "--port=0", "--max-num-seqs=16", "--max-model-len=4096",
            "--num-checkpoints=16", "--num-gpu-blocks-override=128", "--swap-space=0",  # files of at most 26 MiB
            f"--cache-dir={disk.directory}") as server:
        before, resident = warm_up(server), server.resident_mib()
        chaos = Chaos(server, seconds=seconds, seed=seed, disk=disk)
        asyncio.run(chaos.run())
        outcome = chaos.outcome
        assert not outcome.lost, outcome.lost[:5]
        assert len({state for state, _ in outcome.saves}) == 3
        assert outcome.asked == outcome.ends["streamed"] + outcome.ends["whole"]
        for state in ("room", "full", "room again"):
            expected = disk.complaint if state == "full" else "saved"
            assert all(expected in end for when, end in outcome.saves if when == state), outcome.saves
        refused = sum(state == "full" for state, _ in outcome.saves)
        assert server.metrics()['tritium_errors_total{kind="cache_file"}'] == refused
        assert settle(server, before) == before
        assert server.resident_mib() - resident < 0.1 * resident + 4
        kept = (disk.directory / "cache.safetensors").read_bytes()
        disk.fill(server)
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(30)
        assert (disk.directory / "cache.safetensors").read_bytes() == kept
        assert sorted(path.name for path in disk.directory.iterdir()) in (
            ["ballast", "cache.safetensors"], ["cache.safetensors"])
    assert sum("/cache/save" in line and disk.complaint in line for line in server.said) == refused
    assert any("the prefix cache is not saved: " in line and disk.complaint in line for line in server.said)
    return outcome


@click.command(help=__doc__)
@click.option("--seconds", default=600.0, show_default=True)
@click.option("--kill-every", default=20.0, show_default=True, help="Seconds between kills of the engine.")
@click.option("--seed", default=0, show_default=True)
def main(seconds: float, kill_every: float, seed: int) -> None:
    full = fill_a_disk(seconds / 10, seed)
    print(json.dumps({"asked": full.asked, "ends": full.ends, "saves": Counter(state for state, _ in full.saves)}))
    with server_process(str(HERE / "scripted_server.py"), "rambler") as server:
        before = warm_up(server)
        first = Chaos(server, seconds=min(30.0, seconds), kill_every=kill_every, seed=seed + 1)
        asyncio.run(first.run())
        settle(server, before)
        resident = server.resident_mib()
        chaos = Chaos(server, seconds=seconds, kill_every=kill_every, seed=seed)
        asyncio.run(chaos.run())
        after, grown = settle(server, before), server.resident_mib() - resident
    outcome = chaos.outcome
    print(json.dumps({"asked": outcome.asked, "ends": outcome.ends, "lost": outcome.lost[:5], "kills": chaos.kills,
                      "held_before": before, "held_after": after, "resident_mib": resident, "grown_mib": grown}))
    if outcome.lost or after != before or grown > 0.1 * resident:
        raise SystemExit("error: something was lost or not given back")


if __name__ == "__main__":
    main()
