"""Weights in fewer bits, and what their numbers mean. Everything here is the reference that kernels are held against.

A weight w[j, k] is stored as a small number q[j, k] and a scale that neighbours share:

    int8     w = q · s[j]            q in -127..127          activations int8, one scale a token
    fp8      w = q · s[j]            q in e4m3               activations e4m3, one scale a token (see below)
    fp8-block  w = q · s[j/128, k/128]  q in e4m3            as fp8; what checkpoints with `weight_scale_inv` bring
    int4     w = q · s[j, k/128]     q in -8..7, stored as q + 8; s may be negative   activations as they are
    mxfp4    w = q · 2^(s[j, k/32] - 127)   q in e2m1 (0, ½, 1, 1½, 2, 3, 4, 6 as 0..7; negative: + 8)   as they are

Activations, where a scheme quantizes them, by token: with a[m] = max_k |x[m, k]| and M the largest number of the type
(127, 448), x is replaced by q · a/M, q = round(x · M/a) to the nearest, ties to even; a token of zeros stays zeros.
That does not depend on a common factor of x, so behind a norm the rsqrt need not be known. x is the norm's result
before any rounding to a weight's dtype. e4m3 activations need a dot of that type; on a chip without one a weight's
scheme says `activations=None` (`WEIGHT_ONLY`), and activations are multiplied as they are, whatever their number.

Products of int8 are summed in int32, so they are the same to the bit in any order and for any number of tokens.

A parameter whose rows are stored in more than one way is a tuple of weights, one below the other (`row_blocks`).

Shapes: J results, K inputs, both possibly behind a number of experts; int4 and mxfp4 hold two numbers a byte, K/2
bytes a row: the lower half is the even column. Where K is no multiple of the group the last group is shorter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
WEIGHT_ONLY = {name: replace(SCHEMES[name], activations=None) for name in ("fp8", "fp8-block")}
"""Schemes as they are on a chip without a dot of e4m3."""
FORMS = (*SCHEMES.values(), *WEIGHT_ONLY.values())
"""All that a weight can be. Dims of a spec name one by its number here, from 1: int8 1, fp8 2, fp8-block 3, int4 4,
mxfp4 5, fp8 with activations as they are 6, fp8-block so 7; 0 is none."""
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest number that activations of a type are scaled to."""
_LEAST = 1e-30
"""Stands in for the largest magnitude of numbers that are all zero, or nearly."""
_CHUNK = 1 << 24
"""Numbers that are quantized at once: what it takes in memory is some times four bytes of this."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_CLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Shares of the largest magnitude of a group of int4 that are tried as its range."""


class Quantized(NamedTuple):
    """A weight of a scheme, [..., J, K]: values [..., J, K] (two a byte: [..., J, K/2]), and scales,
    [..., J/rows, K/group] rounded up ([..., J, 1] where a row shares one). Both contiguous. `dtype`: of results, and of
    activations that are not quantized."""

    values: torch.Tensor
    scales: torch.Tensor
    scheme: Scheme
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        *front, columns = self.values.shape
        return (*front, columns * 8 // self.scheme.bits)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def rows(self, start: int, stop: int) -> Quantized:
        """A view of rows [start, stop): whole blocks of rows that share scales, or up to the weight's last row."""
        each = self.scheme.rows
        scales = self.scales[..., start // each : -(-stop // each), :]
        return self._replace(values=self.values[..., start:stop, :], scales=scales)

    def expert(self, index: int) -> Quantized:
        return self._replace(values=self.values[index], scales=self.scales[index])


Weight = torch.Tensor | Quantized
Weights = Weight | tuple[Weight, ...]
"""What an op takes as a matrix: one weight, or row blocks."""


def row_blocks(w: Weights) -> tuple[Weight, ...]:
    """The blocks of a weight, from its first row to its last."""
    return w if isinstance(w, tuple) and not isinstance(w, Quantized) else (w,)


def rounds(w: Weights) -> bool:
    """Whether products with it round activations."""
    return any(isinstance(block, Quantized) and block.scheme.activations is not None for block in row_blocks(w))


def dtype_of(w: Weights) -> torch.dtype:
    """The compute dtype of a weight: of its results, and of the activations it is multiplied by."""
    return row_blocks(w)[0].dtype


def expert_of(w: Weights, index: int) -> Weights:
    """The weight of one expert, out of [E, J, K]."""
    found = tuple(b.expert(index) if isinstance(b, Quantized) else b[index] for b in row_blocks(w))
    return found if len(found) > 1 else found[0]


def stored_shapes(scheme: Scheme, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of values and scales of a weight of `shape`."""
    *front, rows, columns = shape
    groups = -(-columns // (scheme.group or columns))
    return (*front, rows, columns * scheme.bits // 8), (*front, -(-rows // scheme.rows), groups)


def stored_bytes(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """Bytes of a weight of `shape`, scales included."""
    values, scales = stored_shapes(scheme, shape)
    return math.prod(values) + math.prod(scales) * scheme.scales.itemsize


def empty(scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Quantized:
    """A weight of `shape` whose memory nobody has written."""
    values, scales = stored_shapes(scheme, shape)
    return Quantized(torch.empty(values, dtype=scheme.values, device=device),
                     torch.empty(scales, dtype=scheme.scales, device=device), scheme, dtype)


def quantize(w: torch.Tensor, scheme: Scheme, dtype: torch.dtype | None = None) -> Quantized:
    """w [..., J, K] in `scheme`, with `dtype` (w's if None) as the compute dtype. What comes out depends on w's numbers
    alone. Raises `ValueError` where w is not finite, or K is odd and two share a byte."""
    out = empty(scheme, tuple(w.shape), dtype or w.dtype, w.device)
    quantize_into(out, w)
    return out


def quantize_into(out: Quantized, w: torch.Tensor) -> None:
    """As `quantize`, into memory that is there, on whatever device w is."""
    scheme, columns = out.scheme, w.shape[-1]
    if columns * scheme.bits % 8:
        raise ValueError(f"{scheme.name} keeps two numbers in a byte, and a row has {columns}")
    if w.dim() > 2 and scheme.rows > 1:
        for expert, part in enumerate(w):
            quantize_into(out.expert(expert), part)
        return
    w_JK, values, scales = (x.reshape(-1, x.shape[-1]) for x in (w, out.values, out.scales))
    rows = max(1, _CHUNK // columns // scheme.rows) * scheme.rows
    finite = torch.ones((), dtype=torch.bool, device=values.device)
    for at in range(0, len(w_JK), rows):
        blocks = _blocks(w_JK[at : at + rows].to(values.device).float(), scheme)
        finite &= blocks.isfinite().all()
        q, scale = _scaled(blocks, scheme.values) if scheme.bits == 8 else _FOUR_BITS[scheme.scales](blocks)
        q_JK = q.flatten(2).flatten(0, 1)[: len(w_JK) - at, :columns]
        values[at : at + rows] = q_JK if scheme.bits == 8 else q_JK[:, ::2] | q_JK[:, 1::2] << 4
        scales[at // scheme.rows : (at + rows - 1) // scheme.rows + 1] = scale[:, 0, :, 0]
    if not finite:
        raise ValueError("NaN or infinity among the numbers")


def dequantize(q: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """What the numbers stand for, [..., J, K]."""
    scheme = q.scheme
    values, scales = q.values, q.scales.to(dtype)
    if scheme.bits == 4:
        codes = torch.stack((values & 15, values >> 4), dim=-1).flatten(-2).int()
        if scheme.scales == torch.uint8:
            values = torch.tensor([*_E2M1, *(-x for x in _E2M1)], dtype=dtype, device=values.device)[codes]
            scales = torch.ldexp(torch.ones_like(scales), q.scales.int() - 127)
        else:
            values = codes - 8
    scales = scales.repeat_interleave(scheme.rows, -2)[..., : values.shape[-2], :]
    if scheme.group:
        scales = scales.repeat_interleave(scheme.group, -1)[..., : values.shape[-1]]
    return values.to(dtype) * scales


def quantize_activations(x: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, s): x [..., K] as q of `kind` times s [..., 1], float32 (float64 if x is)."""
    x = x if x.dtype == torch.float64 else x.float()
    largest = x.abs().amax(-1, keepdim=True).clamp_min(_LEAST)
    return _nearest(x * (LARGEST[kind] / largest), kind), largest / LARGEST[kind]


def _nearest(x: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    return (x.round() if kind == torch.int8 else x).clamp(-LARGEST[kind], LARGEST[kind]).to(kind)


def _blocks(w_JK: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """[J/rows, rows, K/group, group]: numbers that share a scale, filled up with zeros."""
    group = scheme.group or w_JK.shape[1]
    padded = torch.nn.functional.pad(w_JK, (0, -w_JK.shape[1] % group, 0, -len(w_JK) % scheme.rows))
    return padded.view(-1, scheme.rows, padded.shape[1] // group, group)


def _scaled(blocks: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    scale = blocks.abs().amax((1, 3), keepdim=True).clamp_min(_LEAST) / LARGEST[kind]
    return _nearest(blocks / scale, kind), scale


def _best(blocks: torch.Tensor, tries: Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Any:
    """Of (codes, stored scale, what they stand for) the one of least squared error, group by group; the first of
    equals."""
    codes, scale, worth = next(tries)
    least = (worth - blocks).square().sum(-1, keepdim=True)
    for other, its_scale, worth in tries:
        error = (worth - blocks).square().sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        codes, scale = torch.where(better, other, codes), torch.where(better, its_scale, scale)
    return codes, scale


def _int4(blocks: torch.Tensor) -> Any:
    """The number of largest magnitude becomes -8, by a scale of its sign; or 7."""
    at = blocks.abs().argmax(-1, keepdim=True)
    largest = blocks.gather(-1, at)
    largest = torch.where(largest.abs() < _LEAST, _LEAST, largest)

    def tries() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for end in (-8.0, 7.0):
            for share in _CLIPPED:
                scale = (largest * (share / end)).bfloat16()
                q = (blocks / scale.float()).round().clamp(-8, 7)
                yield (q + 8).to(torch.uint8), scale, q * scale.float()

    return _best(blocks, tries())


def _mxfp4(blocks: torch.Tensor) -> Any:
    """Exponents: that of the standard, which may clip, and the next."""
    largest = blocks.abs().amax(-1, keepdim=True).clamp_min(_LEAST)
    exponent = torch.frexp(largest).exponent - 3  # floor(log2) - 2
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=blocks.device)
    ties[1::2] = torch.nextafter(ties[1::2], torch.zeros_like(ties[1::2]))  # a tie goes to the even code
    numbers = torch.tensor([*_E2M1, *(-x for x in _E2M1)], device=blocks.device)

    def tries() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for e in (exponent, exponent + 1):
            codes = torch.bucketize(torch.ldexp(blocks, -e).abs(), ties, out_int32=True) + 8 * (blocks < 0)
            yield codes.to(torch.uint8), (e + 127).to(torch.uint8), torch.ldexp(numbers[codes], e)

    return _best(blocks, tries())


_FOUR_BITS = {torch.bfloat16: _int4, torch.uint8: _mxfp4}
"""By the dtype of scales."""
