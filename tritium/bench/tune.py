"""`tritium tune`: launch parameters found on the device, each tried inside the whole decode step.

A kernel alone tells little: what it leaves in the caches and how its programs overlap with the next one's count as
much. So a step's graph is captured anew for every candidate (a neighbour of the parameters in use: a size doubled or
halved, more or fewer warps and stages, another point to let the next kernel start), and one stays when the step is
shorter and its result the same up to rounding. Key by key, until no neighbour helps or the time is up.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from tritium.bench.ceilings import spent
from tritium.bench.decode import clear, place, request
from tritium.config import EngineConfig
from tritium.core import ConfigError, SamplingParams
from tritium.engine import Engine
from tritium.hw import available_cores, probe
from tritium.hw.tuned import DIRECTORY, Key, launch_parameters, observed, table, trial
from tritium.nn.batch import ForwardBatch
from tritium.ops.spans import Spans

GAIN = 0.0015
"""Share of the step that a candidate must save."""
_AGREES = 0.1
_PAIRS = (("rows", "columns"), ("rows", "depth"), ("depth", "num_stages"))


def neighbours(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Parameters to try next to these, none twice."""
    for name, value in parameters.items():
        for other in _values(name, value) if isinstance(value, int) else ():
            yield {**parameters, name: other}
    for first, second in _PAIRS:
        if first in parameters and second in parameters:
            up, down = parameters[first] * 2, parameters[second] // 2
            if down:
                yield {**parameters, first: up, second: down}
            if parameters[first] > 1:
                yield {**parameters, first: parameters[first] // 2, second: parameters[second] * 2}


def _values(name: str, value: int) -> list[int]:
    if name == "pdl":
        return [v for v in (0, 1, 2) if v != value]
    if name == "num_stages":
        return [v for v in (value - 1, value + 1, value + 2) if 1 <= v <= 8]
    if name == "maxnreg":
        return [v for v in (96, 128, 168, 255) if v != value]
    if value <= 1:
        return [v for v in (0, 1, 2) if v != value and (v or name not in ("num_warps", "PIECES"))]
    return [value * 2, value // 2]


def tune(config: EngineConfig, *, rows: Sequence[int], prompts: Sequence[int], context: int, seconds: float,
         only: Sequence[str] = (), tell: Callable[[str], None] = print) -> Iterator[dict[str, Any]]:
    """For each number of decode rows, then each length of a prompt: {op: [entry, ...]} of what got better. `seconds`
    are for each of them; `tell` hears what is found."""
    tokens = max([8192, *prompts])
    engine = Engine.load(replace(config, max_num_seqs=max([1, *rows]), max_num_batched_tokens=tokens,
                                 enable_prefix_caching=False))
    for count in rows:
        yield _tuned(DecodeStep(engine, count, context), seconds, only, tell)
    for length in prompts:
        yield _tuned(_Prompt(engine, length), seconds, only, tell)


def _tuned(step: _Step, seconds: float, only: Sequence[str], tell: Callable[[str], None]) -> dict[str, Any]:
    with observed() as seen:
        first = best = step.measure({})
    keys = [key for key in seen if not only or any(key[0].startswith(name) for name in only)]
    chosen: dict[Key, dict[str, Any]] = {key: launch_parameters(key[0], step.target, key[1]) for key in keys}
    tell(f"{step}: {best * 1e3:.3f} ms, {len(keys)} keys")
    end, better, tried = time.monotonic() + seconds, dict[Key, dict[str, Any]](), set[tuple[Key, str]]()
    for point in (0, 1, 2):  # where all release the next kernel: one at a time may not find it
        together = {key: {**chosen[key], "pdl": point} for key in keys if "pdl" in chosen[key]}
        if (took := step.measure(together)) < best * (1 - GAIN):
            best, better = took, together
            tell(f"  {best * 1e3:8.3f} ms  pdl {point} everywhere")
    chosen |= better
    improved = True
    while improved and time.monotonic() < end:
        improved = False
        candidates = [(key, new) for key in keys for new in neighbours(chosen[key])
                      if (key, json.dumps(new, sort_keys=True)) not in tried]
        step.compile([{**better, key: new} for key, new in candidates])
        for key, new in candidates:
            if time.monotonic() > end:
                break
            tried.add((key, json.dumps(new, sort_keys=True)))
            took = step.measure({**better, key: new})
            if took < best * (1 - GAIN) and (again := step.measure({**better, key: new})) < best * (1 - GAIN):
                best, improved = max(took, again), True
                chosen[key] = better[key] = new
                tell(f"  {best * 1e3:8.3f} ms  {key[0]} {dict(key[1])}: {new}")
    tell(f"  {first * 1e3:.3f} ms before, {best * 1e3:.3f} ms after, {len(tried)} candidates")
    found: dict[str, Any] = {}
    for (op, sizes), parameters in better.items():
        found.setdefault(op, []).append({"key": dict(sizes), "parameters": parameters})
    return found


def merged(arch: str, found: dict[str, Any]) -> str:
    """The text of `tuned/<arch>.json` with `found` in place of entries with the same key."""
    entries = {op: list(rows) for op, rows in table(arch).items()}
    for op, new in found.items():
        kept = [entry for entry in entries.get(op, []) if entry["key"] not in [other["key"] for other in new]]
        entries[op] = kept + new
    lines = (f'  "{op}": [\n' + ",\n".join(f"    {json.dumps(row)}" for row in rows) + "\n  ]"
             for op, rows in entries.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write(arch: str, found: dict[str, Any]) -> str:
    """Puts `found` into the chip's file; gives its path."""
    path = DIRECTORY / f"{arch}.json"
    path.write_text(merged(arch, found))
    return str(path)


class _Step:
    """Something to be made shorter: checked against its first result, and timed."""

    def __init__(self, engine: Engine) -> None:
        self.runner = engine.runner
        self.target = probe(str(engine.runner.model.device))
        self._want: torch.Tensor | None = None

    lengths: tuple[int, ...]

    def run(self) -> torch.Tensor:
        """Prepares a step with the parameters of now, and runs it once: its hidden states, [T, H]."""
        raise NotImplementedError

    def again(self) -> None:
        """Enqueues the step once more."""
        raise NotImplementedError

    def compile(self, trials: Sequence[dict[Key, dict[str, Any]]]) -> None:
        """All kernels of the trials, side by side; those that cannot be compiled are found out when measured."""
        with contextlib.suppress(Exception):
            self.runner.compile_for(self.lengths, trials, available_cores())

    @torch.inference_mode()
    def measure(self, parameters: dict[Key, dict[str, Any]]) -> float:
        """Seconds of a step, the middle of three; infinite where it cannot run or its result is another."""
        with trial(parameters):
            try:
                hidden_TH = self.run().double()
            except Exception:
                torch.cuda.synchronize()
                return float("inf")
            if self._want is None:
                self._want = hidden_TH.clone()
            if not float((hidden_TH - self._want).norm() / self._want.norm()) < _AGREES:
                return float("inf")
            return statistics.median(spent(self.again, self.runner.model.device, 6) / 6 for _ in range(3))


class DecodeStep(_Step):
    """A decode step as its graph, captured anew for every trial."""

    def __init__(self, engine: Engine, rows: int, context: int) -> None:
        super().__init__(engine)
        asked = SamplingParams(temperature=0.6, top_p=0.95, top_k=20, max_tokens=8, ignore_eos=True)
        requests = [request(engine, str(i), context, asked, seed=i) for i in range(rows)]
        place(engine, requests)
        plan, graphs = engine.scheduler.plan(), engine.runner.graphs
        assert plan is not None
        if graphs is None:
            raise ConfigError("there are no graphs of decode steps here", hint="a GPU, without --enforce-eager")
        self.plan, self.graphs, self.lengths = plan, graphs, (1,) * rows
        self._states = {row.slot: engine.runner.states.read(row.slot) for row in plan.rows}
        clear(engine, requests)

    def __str__(self) -> str:
        return f"{len(self.lengths)} decode rows"

    def run(self) -> torch.Tensor:
        self.graphs.capture_again(len(self.lengths), 1)
        for slot, state in self._states.items():
            self.runner.states.write(slot, state)
        replay = self.graphs.launch(self.plan)
        replay.wait()
        self._graph = replay.step.graph
        return replay.step.hidden_TH

    def again(self) -> None:
        self._graph.replay()


class _Prompt(_Step):
    """A prompt's chunk through one layer of each kind."""

    def __init__(self, engine: Engine, tokens: int) -> None:
        super().__init__(engine)
        model = engine.runner.model
        self._caches, self._layers = engine.runner.caches, model.config.first_of_each_kind
        pages = tuple(range(1, tokens // 64 + 2))
        spans = Spans((tokens,), (0,), (1,), (pages,), model.device)
        ids_T = torch.arange(tokens, device=model.device) % 997
        self._batch, self.lengths = ForwardBatch(ids_T, spans, ids_T), (tokens,)

    def __str__(self) -> str:
        return f"a prompt of {self.lengths[0]} tokens, one layer of each kind"

    def run(self) -> torch.Tensor:
        return self.runner.model.forward(self._batch, [self._caches[i] for i in self._layers], self._layers)

    def again(self) -> None:
        self.run()
