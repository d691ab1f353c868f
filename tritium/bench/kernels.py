"""What each kernel adds to a decode step.

With dependent launch a kernel starts while the one before it still runs, and waits. How long it lasts then says little;
what counts is its own time: by how much it moves the end of everything so far.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from tritium.bench.tune import DecodeStep
from tritium.config import EngineConfig
from tritium.engine import Engine

_STEPS = 10


class Event(NamedTuple):
    """A kernel as the profiler saw it, in microseconds."""

    name: str
    grid: tuple[int, ...]
    begin: float
    lasts: float


def run(config: EngineConfig, *, rows: Sequence[int], context: int) -> Iterator[dict[str, Any]]:
    """A kernel with a grid at a time, for each number of decode rows; the one that adds most first. Raises
    `ConfigError` where steps are not graphs."""
    engine = Engine.load(replace(config, max_num_seqs=max(rows), enable_prefix_caching=False))
    for count in rows:
        step = DecodeStep(engine, count, context)
        step.measure({})
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(_STEPS):
                step.again()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "trace.json"
            profiler.export_chrome_trace(str(path))
            trace = json.loads(path.read_text())["traceEvents"]
        events = [Event(e["name"], tuple(e["args"].get("grid", ())), e["ts"], e["dur"]) for e in trace
                  if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        yield from ({"rows": count, "context": context, **share} for share in shares(events, _STEPS))


def shares(events: Iterable[Event], steps: int) -> list[dict[str, Any]]:
    """By kernel and grid, in microseconds: `own_us` a step, of which nothing ran for `idle_us`; of a launch, `each_us`
    is its own and `lasts_us` from its begin to its end."""
    found: dict[tuple[str, tuple[int, ...]], list[tuple[float, float, float]]] = defaultdict(list)
    end = 0.0
    for event in sorted(events, key=lambda event: event.begin):
        last = event.begin + event.lasts
        idle = max(0.0, event.begin - end) if found else 0.0
        own = max(0.0, last - max(end, event.begin)) + idle
        found[event.name, event.grid].append((own, idle, event.lasts))
        end = max(end, last)
    cells = []
    for (name, grid), times in found.items():
        own, idle, lasts = map(sum, zip(*times))
        cells.append({"kernel": name[:40], "grid": " x ".join(map(str, grid)), "launches": len(times) / steps,
                      "own_us": own / steps, "each_us": own / len(times), "idle_us": idle / steps,
                      "lasts_us": lasts / len(times)})
    return sorted(cells, key=lambda cell: -cell["own_us"])
