"""What the op that makes x leaves for the product behind it, so that this need not look at all of x before it begins.

Both are buffers that live with the network and are named to both ops; neither changes a result beyond its rounding. An
op that has no form for it leaves nothing, and the product does without.

Shapes: M tokens, K inputs of the product behind, P programs of the op before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

MOST, MOST_PARTS = 64, 256
"""The most tokens of a `Scaled`, and parts of its squares."""


class Peak(NamedTuple):
    """max |x (1 + n)| of one token, for a product that rounds x: the bits of a float32, which sort like an int32. 0:
    nobody left it, and the product's programs look for it themselves."""

    bits_1: torch.Tensor
    norm_K: torch.Tensor | None = None

    def aside(self) -> Peak:
        """For a reference, which would leave its own in the same place."""
        return self._replace(bits_1=self.bits_1.clone())

    def leave(self, y_MK: torch.Tensor) -> None:
        """What a kernel does, for one token."""
        value = y_MK if self.norm_K is None else y_MK * (1.0 + self.norm_K)
        self.bits_1.view(torch.float32).copy_(value.abs().amax())


@dataclass(eq=False)
class Scaled:
    """Of a few tokens x (1 + n), rounded, and Σ x² in `parts` parts, for a product behind a norm: its rsqrt then meets
    the result alone. parts = 0: nobody left it since a product took it."""

    x_MK: torch.Tensor
    squares_PM: torch.Tensor
    norm_K: torch.Tensor
    parts: int = 0

    def aside(self) -> Scaled:
        return replace(self, x_MK=self.x_MK.clone(), squares_PM=self.squares_PM.clone())

    def leave(self, y_MK: torch.Tensor) -> None:
        """What a kernel does, in one part."""
        self.x_MK[: len(y_MK)], self.parts = y_MK * (1.0 + self.norm_K), 1
        self.squares_PM[0, : len(y_MK)] = y_MK.square().sum(-1)


Handed = Peak | Scaled


def left(arguments: dict[str, Any], y_MN: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a call has left, if it was asked to, for a spec's results: a peak as a share of what it is, 1."""
    leave = arguments.get("leave")
    if isinstance(leave, Peak) and len(y_MN) == 1:
        found = leave.bits_1.view(torch.float32).clone()
        leave.leave(y_MN)
        return {"peak": found / leave.bits_1.view(torch.float32)}
    if isinstance(leave, Scaled) and leave.parts:
        squares_M = leave.squares_PM[: leave.parts, : len(y_MN)].sum(0)
        return {"scaled": leave.x_MK[: len(y_MN)].clone(), "squares": squares_M}
    return {}
