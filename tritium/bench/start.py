"""How long a server takes to its first token: fresh processes, by phase, with and without a warm kernel cache.

`python -m tritium.bench.start` is such a process: an `EngineConfig` as JSON on stdin, a line of JSON on stdout.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pkgutil import resolve_name
from typing import Any

from tritium.config import EngineConfig
from tritium.core import TritiumError

_PHASES = {
    "plan": ("tritium.engine.engine", "plan_memory"),
    "weights": ("tritium.models.checkpoint", "load_parameters"),
    "pools": ("tritium.models.decoder", "allocate_caches"),
    "kernels": ("tritium.runner.runner:Runner", "compile"),
    "self_test": ("tritium.engine.selftest", "attest"),
    "graphs": ("tritium.runner.runner:Runner", "capture"),
}
"""What `Engine.load` calls, by the name of the phase."""
_BEGAN = "TRITIUM_BENCH_BEGAN"


def run(config: EngineConfig, *, starts: int = 2, requests: int = 10, prompt: int = 64,
        limit: float = 600.0) -> Iterator[dict[str, Any]]:
    """A start at a time: the first with an empty cache of compiled kernels, the others with what it left."""
    with tempfile.TemporaryDirectory(prefix="tritium-start-") as kernels:
        for i in range(starts):
            environment = os.environ | {"TRITON_CACHE_DIR": kernels, _BEGAN: repr(time.time())}
            asked = {"config": dataclasses.asdict(config), "requests": requests, "prompt": prompt}
            done = subprocess.run([sys.executable, "-m", "tritium.bench.start"], input=json.dumps(asked), text=True,
                                  stdout=subprocess.PIPE, env=environment, timeout=limit)
            if done.returncode:
                raise TritiumError(f"the engine did not start (exit code {done.returncode})",
                                   hint="its words are above")
            yield {"start": i + 1} | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Phases in seconds: imports, load and its parts, the first token since the process was asked for, and each
    request's time to its first token, one request at a time."""
    began = float(os.environ[_BEGAN])
    asked = json.loads(sys.stdin.read())

    import torch

    def settle() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    settle()
    from tritium.bench.decode import first_token
    from tritium.engine import Engine

    phases = {name: _watched(*place, settle) for name, place in _PHASES.items()}
    imported = time.time()
    engine = Engine.load(EngineConfig(**asked["config"]))
    loaded = time.time()
    ttft = [first_token(engine, asked["prompt"], seed=i) for i in range(asked["requests"])]
    print(json.dumps({
        "imports": imported - began,
        "load": loaded - imported,
        **{name: sum(seconds) for name, seconds in phases.items()},
        "to_first_token": loaded - began + ttft[0],
        "ttft_first": ttft[0],
        "ttft_last": ttft[-1],
        "ttft": ttft,
    }))  # fmt: skip


def _watched(place: str, name: str, settle: Callable[[], None]) -> list[float]:
    """Seconds of each call of a function that is looked up by `name` when it is called."""
    owner = resolve_name(place)
    called, seconds = getattr(owner, name), list[float]()

    def timed(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        result = called(*arguments, **options)
        settle()
        seconds.append(time.perf_counter() - begin)
        return result

    setattr(owner, name, timed)
    return seconds


if __name__ == "__main__":
    try:
        main()
    except TritiumError as error:
        raise SystemExit(f"error: {error}") from None
