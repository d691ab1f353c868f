"""How kernels are launched: for the device of their tensors, with the parameters found for it.

Three lanes run the same launchers: on a GPU, in Triton's interpreter (TRITON_INTERPRET=1, tensors of the CPU), and on
the meta device, where `recorded` notes what would be launched, for the compile matrix.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tritium.hw import Target, named, probe
from tritium.hw.tuned import choice, launch_parameters

EXACT = "ieee"
"""`input_precision` of tl.dot: float32 operands are multiplied as such, not rounded to TF32. Of narrower ones it says
nothing, and AMD's compiler knows no other word that serves everywhere."""
PDL_OFF = 0
"""Dependent launch (`pdl`): 0 none; 1 the next kernel may start as soon as this one's inputs are there; 2 when its loop
is done: then what the kernel before the last one wrote is visible before a wait. 3 at once, in front of a kernel that
reads nothing but weights before its wait."""


@triton.jit
def wait_for_inputs(pdl: tl.constexpr):
    """Before the first read of what the kernel before wrote, and the first write."""
    if pdl == 3:
        gdc_launch_dependents()
    if pdl > 0:
        gdc_wait()
    if pdl == 1:
        gdc_launch_dependents()


@triton.jit
def release_next(pdl: tl.constexpr):
    """After the main loop."""
    if pdl == 2:
        gdc_launch_dependents()


@triton.jit
def is_last(seen, COUNT: tl.constexpr):
    """Whether all COUNT programs that share a count have come here, which sets it back; what they stored before may
    then be read: the count is acquired, which empties the L1 cache."""
    tl.debug_barrier()  # all of a program's part is there before it counts
    last = tl.atomic_add(seen, 1, sem="acq_rel") == COUNT - 1
    if last:
        tl.store(seen, 0)
    return last


@lru_cache
def counts(device: torch.device, size: int) -> torch.Tensor:
    """Zeros, as `is_last` leaves them."""
    return torch.zeros(size, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what the compile matrix compiles."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    entries: tuple[str, ...]
    """Entries of launch parameters that were asked for since the launch before: file, op, key, and how it was found."""


@dataclass
class _Recording:
    target: Target
    launches: list[Launch] = field(default_factory=list)
    entries: list[str] = field(default_factory=list)


_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)
_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


@contextmanager
def compiled_ahead(workers: int, ignore_errors: bool = False) -> Iterator[None]:
    """Launchers called within compile their kernels, side by side, and run none; all are ready at the end.
    `ignore_errors`: but those that do not compile, which say so when they are to run."""
    with ThreadPoolExecutor(workers) as pool, triton.AsyncCompileMode(pool, ignore_errors=ignore_errors):
        token = _compiling.set(True)
        try:
            yield
        finally:
            _compiling.reset(token)


@contextmanager
def recorded(arch: str) -> Iterator[list[Launch]]:
    """Launchers called with tensors of the meta device add to the list instead, as if they ran on `arch`."""
    recording = _Recording(named(arch))
    token = _recording.set(recording)
    try:
        yield recording.launches
    finally:
        _recording.reset(token)


def target_of(x: torch.Tensor) -> Target:
    """The device that a tensor lives on."""
    recording = _recording.get()
    return recording.target if recording else _probed(str(x.device))


_probed = lru_cache(probe)


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. Triton's own is for kernels too, and slow here: every launch would wait for it some microseconds."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of 2 that is not below n > 0."""
    return 1 << (n - 1).bit_length()


def bucket(count: int) -> int:
    """The number of rows or tokens that launch parameters go by: the next power of 2, as graphs have. What divides a
    sum then does not depend on whether a step comes from a graph."""
    return power_of_2(count)


def parameters(op: str, x: torch.Tensor, **key: int) -> dict[str, Any]:
    """Launch parameters of `op` on the device of `x` for these sizes; `pdl` is 0 where the device has no dependent
    launch."""
    target, recording, sizes = target_of(x), _recording.get(), tuple(sorted(key.items()))
    if recording is not None:
        entry = choice(op, target, sizes)
        recording.entries.append(f"{entry['file']}: {op} {json.dumps(entry['key'])} {entry['how']}")
    found = launch_parameters(op, target, sizes)
    return dict(found) if "dependent_launch" in target.features else {**found, "pdl": PDL_OFF}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, pdl: int = PDL_OFF, **options: Any) -> None:
    """Runs `kernel[grid](*arguments, pdl=pdl, **options)`; `options` are its constexprs, num_warps, num_stages and
    maxnreg. The kernel has a constexpr `pdl`."""
    recording = _recording.get()
    if recording is not None:
        entries = tuple(recording.entries)
        recording.launches.append(Launch(kernel, grid, arguments, {**options, "pdl": pdl}, entries))
        recording.entries.clear()
        return
    if pdl:
        options["launch_pdl"] = True
    if _compiling.get():
        kernel.warmup(*arguments, grid=grid, pdl=pdl, **options)
        return
    kernel[grid](*arguments, pdl=pdl, **options)
