"""Weights in fewer bits, and what their numbers mean. Everything here is the reference that kernels are held against.

A weight w[j, k] is stored as a small number q[j, k] and a scale that neighbours share:

    int8     w = q · s[j]            q in -127..127          activations int8, one scale a token
    fp8      w = q · s[j]            q in e4m3               activations e4m3, one scale a token (see below)
    fp8-block  w = q · s[j/128, k/128]  q in e4m3            as fp8; what checkpoints with `weight_scale_inv` bring
    int4     w = q · s[j, k/128]     q in -8..7              activations as they are
    mxfp4    w = q · 2^(s[j, k/32] - 127)   q in e2m1 (0, ½, 1, 1½, 2, 3, 4, 6 and their negatives)   activations as they are

Activations, where a scheme quantizes them, by token: with a[m] = max_k |x[m, k]| and M the largest number of the type
(127, 448), x is replaced by q · a/M, q = round(x · M/a) to the nearest, ties to even; a token of zeros stays zeros. That does
not depend on a common factor of x, so behind a norm the rsqrt need not be known. e4m3 activations need a dot of that
type; on a chip without one fp8 weights are multiplied by activations as they are, whatever the number of tokens.

Products of int8 are summed in int32, so they are the same to the bit in any order and for any number of tokens.

Shapes: J results, K inputs, both possibly behind a number of experts; int4 and mxfp4 hold two numbers a byte, K/2
bytes a row: the lower half is the even column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the numbers of a weight are stored."""

    name: str
    bits: int
    values: torch.dtype
    scales: torch.dtype
    group: int = 0
    """Columns that share a scale; 0: all of a row."""
    rows: int = 1
    """Rows that share a scale."""
    activations: torch.dtype | None = None
    """What a token's activations are rounded to before the product."""


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", 8, torch.int8, torch.float32, activations=torch.int8),
        Scheme("fp8", 8, torch.float8_e4m3fn, torch.float32, activations=torch.float8_e4m3fn),
        Scheme("fp8-block", 8, torch.float8_e4m3fn, torch.float32, 128, 128, activations=torch.float8_e4m3fn),
        Scheme("int4", 4, torch.uint8, torch.bfloat16, 128),
        Scheme("mxfp4", 4, torch.uint8, torch.uint8, 32),
    )
}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest number that activations of a type are scaled to."""


class Quantized(NamedTuple):
    """A weight of a scheme, [..., J, K]: values [..., J, K] (two a byte: [..., J, K/2]), and scales, [..., J/rows, K/group]
    rounded up. `dtype`: of results, and of activations that are not quantized."""

    values: torch.Tensor
    scales: torch.Tensor
    scheme: Scheme
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        *front, columns = self.values.shape
        return (*front, columns * (2 if self.scheme.bits == 4 else 1))

    @property
    def device(self) -> torch.device:
        return self.values.device


Weight = torch.Tensor | Quantized
