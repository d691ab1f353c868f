"""What an op states about itself, so that tests, benchmarks, rooflines and `doctor` are loops over specs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch

Dims = Mapping[str, int]


@dataclass(frozen=True)
class OpSpec:
    """The contract of one op.

    `inputs(dims, dtype, generator)` draws keyword arguments for a call, on torch's default device; tensors that the op
    updates in place are among them. `results(arguments, returned)` names every tensor a call must have produced,
    in-place ones included. `bytes_moved(dims, itemsize)` and `flops(dims)` count what a call cannot avoid. `tolerance`
    is the allowed ratio of a form's error against float64 to the error of the reference in the same dtype.
    """

    name: str
    cases: tuple[Dims, ...]
    """Sizes to test; odd ones included on purpose."""
    inputs: Callable[[Dims, torch.dtype, torch.Generator], dict[str, Any]]
    results: Callable[[dict[str, Any], Any], dict[str, torch.Tensor]]
    bytes_moved: Callable[[Dims, int], int]
    flops: Callable[[Dims], int]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    tolerance: float = 2.0
    attest: float = 0.03
    """Relative difference from the reference, in bfloat16, above which the self-test at the start fails."""
    floor: Callable[[Dims], float] = lambda dims: 0.0
    """Relative error that is granted in any dtype: where a result hangs on a rounding to fewer bits on the way."""


@dataclass(frozen=True)
class Op:
    """A callable op: its spec, its reference in plain PyTorch, and its Triton form. The device of the tensors chooses:
    the reference on a CPU, the kernel elsewhere; both may be called by name."""

    spec: OpSpec
    reference: Callable[..., Any]
    launcher: str = ""
    """module:function in `tritium.ops.kernels`, imported when it is first used: a CPU needs no Triton."""

    def __call__(self, **arguments: Any) -> Any:
        if not (self.launcher and _on_device(arguments)):
            return self.reference(**arguments)
        witness = _witness.get()
        return witness(self, arguments) if witness else self.kernel(**arguments)

    @cached_property
    def kernel(self) -> Callable[..., Any]:
        """The launcher of the Triton form. Raises ImportError where there is no Triton."""
        module, _, function = self.launcher.partition(":")
        found: Callable[..., Any] = getattr(import_module(f"tritium.ops.kernels.{module}"), function)
        return found

    def form(self, kind: str) -> str:
        """Which form serves a call on a device of this kind (cpu, cuda, hip)."""
        return "kernel (Triton)" if self.launcher and kind != "cpu" else "reference (PyTorch)"


def all_ops() -> list[Op]:
    """Every op of the package, by name."""
    package = import_module("tritium.ops")
    modules = [import_module(f"tritium.ops.{module.name}") for module in iter_modules(package.__path__)]
    found = {value.spec.name: value for module in modules for value in vars(module).values() if isinstance(value, Op)}
    return [found[name] for name in sorted(found)]


_witness: ContextVar[Callable[[Op, dict[str, Any]], Any] | None] = ContextVar("witness", default=None)


@contextmanager
def witnessed(witness: Callable[[Op, dict[str, Any]], Any]) -> Iterator[None]:
    """Calls of ops that a kernel serves go through `witness`, which gives their result."""
    token = _witness.set(witness)
    try:
        yield
    finally:
        _witness.reset(token)


def _on_device(arguments: Mapping[str, Any]) -> bool:
    return next(x for x in arguments.values() if isinstance(x, torch.Tensor)).device.type != "cpu"


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Normal values, drawn in float32 so that every dtype of a case sees the same numbers, then rounded."""
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a reference computes in: float32, or float64 when it is asked for the truth."""
    return torch.float64 if dtype == torch.float64 else torch.float32
