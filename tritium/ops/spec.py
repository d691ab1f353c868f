"""What an op states about itself, so that tests, benchmarks, rooflines and `doctor` are loops over specs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Dims = Mapping[str, int]


@dataclass(frozen=True)
class OpSpec:
    """The contract of one op.

    `inputs(dims, dtype, generator)` draws keyword arguments for a call; tensors that the op updates in place are
    among them. `results(arguments, returned)` names every tensor a call must have produced, in-place ones included.
    `bytes_moved(dims, itemsize)` and `flops(dims)` count what a call cannot avoid. `tolerance` is the allowed ratio
    of a form's error against float64 to the error of the reference in the same dtype.
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
    features: frozenset[str] = frozenset()
    """Target features that the fastest form needs."""
    tuning_key: tuple[str, ...] = ()
    """Dims that select launch parameters."""


@dataclass(frozen=True)
class Op:
    """A callable op: its spec and its forms. Every op has a reference in plain PyTorch; faster forms join it."""

    spec: OpSpec
    reference: Callable[..., Any]

    def __call__(self, **arguments: Any) -> Any:
        return self.reference(**arguments)

    @property
    def form(self) -> str:
        """Which form serves a call on this machine."""
        return "reference (PyTorch)"


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Normal values, drawn in float32 so that every dtype of a case sees the same numbers, then rounded."""
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a reference computes in: float32, or float64 when it is asked for the truth."""
    return torch.float64 if dtype == torch.float64 else torch.float32
