"""Rotary frequencies as plain numbers: default and YaRN (arXiv:2309.00071)."""

from __future__ import annotations

import math

import numpy as np

from tritium.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> tuple[list[float], float]:
    """Radians per position of each of the rotary_dim / 2 pairs, and the factor that cos and sin are scaled by.

    The numbers are rounded to float32 where a float32 computation rounds them: a position of 100,000 makes one
    unit in the last place visible, and models are trained with frequencies computed in float32.
    """
    pairs = np.arange(rope.rotary_dim // 2)
    exponents = (2 * pairs / rope.rotary_dim).astype(np.float32)
    wavelengths = np.array([rope.theta**e for e in exponents.tolist()], np.float32)
    plain = 1 / wavelengths
    if rope.kind == "default":
        return plain.tolist(), 1.0
    low, high = _ramp_bounds(rope)
    keep = 1 - np.clip((pairs - low).astype(np.float32) / np.float32(high - low), 0, 1)
    interpolated = 1 / (rope.factor * wavelengths.astype(float)).astype(np.float32)
    return (interpolated * (1 - keep) + plain * keep).tolist(), _attention_factor(rope)


def _ramp_bounds(rope: RopeConfig) -> tuple[float, float]:
    """Pairs between which YaRN passes from extrapolation (fast pairs) to interpolation (slow pairs)."""

    def pair_that_turns(rotations: float) -> float:
        turns = math.log(rope.original_max_position / (rotations * 2 * math.pi))
        return rope.rotary_dim * turns / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    return low, high + 0.001 if low == high else high


def _attention_factor(rope: RopeConfig) -> float:
    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
