"""Launch parameters from *.json: found on the device by `tritium tune`, never at run time.

A file is for one chip ("sm_90") or for all (default.json):

    {"linear.gemv": [{"key": {"N": 16480, "K": 5120}, "parameters": {"rows": 16, "num_warps": 4}}, ...], ...}

The entry of a request is the one with exactly its key, else the nearest (sum over the key's numbers of |log2((asked +
1) / (entry + 1))|, an entry without one of them matching any; of equals the one that names most), of the chip's file,
else of the default file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any

from tritium.hw.target import Target

DIRECTORY = Path(__file__).parent


@lru_cache
def table(name: str) -> dict[str, list[dict[str, Any]]]:
    """The entries of one file, by op; none where there is no such file."""
    path = DIRECTORY / f"{name}.json"
    found: dict[str, list[dict[str, Any]]] = json.loads(path.read_text()) if path.exists() else {}
    return found


Sizes = tuple[tuple[str, int], ...]
Key = tuple[str, Sizes]
"""An op's name and the sizes asked for."""

_trial: ContextVar[Mapping[Key, dict[str, Any]] | None] = ContextVar("trial", default=None)
_observed: ContextVar[dict[Key, None] | None] = ContextVar("observed", default=None)


@contextmanager
def trial(parameters: Mapping[Key, dict[str, Any]]) -> Iterator[None]:
    """For tuning: these parameters instead of those of the files."""
    token = _trial.set(parameters)
    try:
        yield
    finally:
        _trial.reset(token)


@contextmanager
def observed() -> Iterator[dict[Key, None]]:
    """For tuning: collects what is asked for, in order."""
    seen: dict[Key, None] = {}
    token = _observed.set(seen)
    try:
        yield seen
    finally:
        _observed.reset(token)


def launch_parameters(op: str, target: Target, key: Sizes) -> dict[str, Any]:
    """Parameters of `op` for the sizes in `key`. Raises KeyError for an op that no file knows."""
    if (seen := _observed.get()) is not None:
        seen[op, key] = None
    if (tried := _trial.get()) and (op, key) in tried:
        return tried[op, key]
    parameters: dict[str, Any] = choice(op, target, key)["parameters"]
    return parameters


@lru_cache(maxsize=4096)
def choice(op: str, target: Target, key: Sizes) -> dict[str, Any]:
    """The entry that serves, with `file`, and `how`: exact, nearest or default."""
    asked = dict(key)
    for name in (target.arch, "default"):
        entries = table(name).get(op, [])
        if entries:
            best = min(entries, key=lambda entry: (_distance(entry["key"], asked), -len(entry["key"])))
            how = "default" if name == "default" else "exact" if best["key"] == asked else "nearest"
            return {**best, "file": f"{name}.json", "how": how}
    raise KeyError(f"no launch parameters for {op} in {DIRECTORY}")


def _distance(entry: dict[str, int], asked: dict[str, int]) -> float:
    return sum(abs(math.log2((asked[name] + 1) / (value + 1))) for name, value in entry.items() if name in asked)
