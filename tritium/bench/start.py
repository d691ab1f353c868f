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
from collections.abc import Iterator
from typing import Any

from tritium.config import EngineConfig
from tritium.core import TritiumError

_BEGAN = "TRITIUM_BENCH_BEGAN"


def run(config: EngineConfig, *, starts: int = 2, requests: int = 10, prompt: int = 64,
        limit: float = 600.0) -> Iterator[dict[str, Any]]:
    """A start at a time: the first with an empty cache of compiled kernels, the others with what it left."""
    with tempfile.TemporaryDirectory(prefix="tritium-start-") as kernels:
        for _ in range(starts):
            environment = os.environ | {"TRITON_CACHE_DIR": kernels, _BEGAN: repr(time.time())}
            asked = {"config": dataclasses.asdict(config), "requests": requests, "prompt": prompt}
            done = subprocess.run([sys.executable, "-m", "tritium.bench.start"], input=json.dumps(asked), text=True,
                                  stdout=subprocess.PIPE, env=environment, timeout=limit)
            if done.returncode:
                raise TritiumError(f"the engine did not start (exit code {done.returncode})",
                                   hint="its words are above")
            yield json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Phases in seconds: imports and load (with its parts where the engine tells them), the first token since the
    process was asked for, and each request's time to its first token, one request at a time."""
    began = float(os.environ[_BEGAN])
    asked = json.loads(sys.stdin.read())

    import torch

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    from tritium.bench.decode import first_token
    from tritium.engine import Engine

    imported = time.time()
    engine = Engine.load(EngineConfig(**asked["config"]))
    loaded = time.time()
    ttft = [first_token(engine, asked["prompt"], seed=i) for i in range(asked["requests"])]
    graphs = getattr(engine.runner, "graphs", None)
    print(json.dumps({
        "imports": imported - began,
        "load": loaded - imported,
        **{f"load_{phase}": seconds for phase, seconds in getattr(engine, "load_seconds", {}).items()},
        **({"capture": graphs.capture_seconds} if graphs is not None else {}),
        "to_first_token": loaded - began + ttft[0],
        "ttft_first": ttft[0],
        "ttft_last": ttft[-1],
        "ttft": ttft,
    }))  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except TritiumError as error:
        raise SystemExit(f"error: {error}") from None
