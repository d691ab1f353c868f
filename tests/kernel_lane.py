"""The lanes of a kernel: what `test_kernels.py` runs in Triton's interpreter and on a GPU."""

from __future__ import annotations

import copy
import dataclasses
import os
from dataclasses import replace
from typing import Any

import torch

from tritium.ops.quantized import Quantized
from tritium.ops.spans import Spans
from tritium.ops.spec import Op

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
"""The interpreter multiplies bfloat16 wrongly."""
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Unit roundoff: granted to a result of that dtype where the reference, which rounds less on its way, is better."""


def moved(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    """A deep copy of a call's arguments on `device`."""

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, copy=True)
        if isinstance(value, Spans):
            return replace(value, device=torch.device(device))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(move(part) for part in value))
        if isinstance(value, tuple):
            return tuple(move(part) for part in value)
        if dataclasses.is_dataclass(value):
            return replace(value, **{f.name: move(getattr(value, f.name)) for f in dataclasses.fields(value)})
        return copy.deepcopy(value)

    return {name: move(value) for name, value in arguments.items()}


def doubled(value: Any) -> Any:
    """In float64; of a quantized weight the compute dtype, since its numbers are what they are."""
    if isinstance(value, Quantized):
        return value._replace(dtype=torch.float64)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(doubled(part) for part in value)
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    x, truth = x.double().cpu(), truth.double().cpu()
    if not torch.isfinite(x).all():
        return float("inf")
    return float((x - truth).norm() / truth.norm().clamp_min(1e-30))


def ratios(op: Op, dims: dict[str, int], dtype: torch.dtype, seed: int) -> dict[str, float]:
    """Of each result: error of the kernel against float64 over the allowed one, which is `tolerance` times the larger
    of the same-dtype reference's error and the dtype's rounding. At most 1 is right.

    All three see the same numbers: the inputs as rounded to `dtype`, weights as stored.
    """
    given = op.spec.inputs(dims, dtype, torch.Generator().manual_seed(seed))
    exact = {name: doubled(value) for name, value in moved(given, "cpu").items()}
    truth = op.spec.results(exact, op.reference(**exact))
    same = moved(given, "cpu")
    expected = op.spec.results(same, op.reference(**same))
    poison()
    mine = moved(given, DEVICE)
    got = op.spec.results(mine, op.kernel(**mine))
    assert got.keys() == truth.keys()
    out = {}
    for name, value in truth.items():
        assert got[name].shape == value.shape, (name, got[name].shape, value.shape)
        if not value.is_floating_point():
            out[name] = 0.0 if torch.equal(got[name].cpu().long(), value.long()) else float("inf")
            continue
        # In float32 the reference's sums run in the order of a BLAS for CPUs, which is nobody's standard on a GPU.
        tolerance = op.spec.tolerance * (2 if dtype == torch.float32 and not INTERPRETED else 1)
        allowed = tolerance * max(relative(expected[name], value), ROUNDING[dtype], op.spec.floor(dims))
        out[name] = relative(got[name], value) / allowed
    return out


def poison() -> None:
    """NaNs in the memory that the next allocations will be made of (as far as an allocator reuses it)."""
    if DEVICE == "cuda":
        held = [torch.full((n,), float("nan"), device="cuda") for n in (2**8, 2**12, 2**16, 2**20, 2**24)]
        del held
