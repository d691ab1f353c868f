"""How the T tokens of a step divide into R rows: the integers that every sequence op shares.

Shapes: T tokens, R rows, P pages of a block table, W convolution width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Spans:
    """Row r holds tokens [starts[r], starts[r] + lengths[r]) of the step, at positions contexts[r], contexts[r] + 1, …

    Host integers, with the tensors that ops need made once a step, on `device`. `slots` names each row's recurrent
    state; `pages` its block table. A row with context 0 starts from a zero state whatever its slot holds.
    """

    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    slots: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    device: torch.device

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        out, total = [], 0
        for length in self.lengths:
            out.append(total)
            total += length
        return tuple(out)

    @cached_property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def tensor(self, values: object, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    @cached_property
    def slots_R(self) -> torch.Tensor:
        return self.tensor(self.slots)

    @cached_property
    def fresh_R(self) -> torch.Tensor:
        """True where a row starts at position 0."""
        return self.tensor([c == 0 for c in self.contexts], torch.bool)

    @cached_property
    def any_fresh(self) -> bool:
        return 0 in self.contexts

    @cached_property
    def row_of_T(self) -> torch.Tensor:
        return torch.repeat_interleave(self.tensor(range(self.num_rows)), self.tensor(self.lengths))

    @cached_property
    def offset_T(self) -> torch.Tensor:
        """Index of each token within its row's span."""
        return self.tensor(range(self.num_tokens)) - self.tensor(self.starts)[self.row_of_T]

    @cached_property
    def positions_T(self) -> torch.Tensor:
        return self.offset_T + self.tensor(self.contexts)[self.row_of_T]

    @cached_property
    def pages_RP(self) -> torch.Tensor:
        """Block tables, padded with page 0, which belongs to nobody."""
        width = max(len(row) for row in self.pages)
        return self.tensor([row + (0,) * (width - len(row)) for row in self.pages])

    @cached_property
    def write_page_T(self) -> torch.Tensor:
        """Page that each token's key and value go to; page size is fixed by the pools (64)."""
        return self.pages_RP[self.row_of_T, self.positions_T // 64]

    @cached_property
    def write_offset_T(self) -> torch.Tensor:
        return self.positions_T % 64

    @cached_property
    def last_R(self) -> torch.Tensor:
        """Index in T of each row's last token."""
        return self.tensor(self.starts) + self.tensor(self.lengths) - 1

    @cached_property
    def time_major(self) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
        """An order of the tokens for recurrences that advance all rows together.

        Returns (order_T, rows_R, active): tokens sorted by their offset within the row, rows by falling length;
        step t works on the first active[t] rows, whose tokens stand side by side.
        """
        by_length = sorted(range(self.num_rows), key=lambda r: -self.lengths[r])
        order: list[int] = []
        active: list[int] = []
        alive = self.num_rows
        for t in range(self.lengths[by_length[0]]):
            while self.lengths[by_length[alive - 1]] <= t:
                alive -= 1
            active.append(alive)
            order.extend(self.starts[r] + t for r in by_length[:alive])
        return self.tensor(order), self.tensor(by_length), tuple(active)

    def conv_taps(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a causal convolution of `width` taps reads, in the sequence [R (width-1) stored inputs; T new inputs].

        Returns (taps_TW, tail_RW1): sources of each token's taps, oldest first, and of each row's next stored inputs.
        """
        cached = self.__dict__.setdefault("_taps", {})
        if width not in cached:
            keep = width - 1
            stored = self.num_rows * keep
            back_W = self.tensor(range(width)) - keep
            offset_TW = self.offset_T[:, None] + back_W
            new_TW = stored + self.tensor(range(self.num_tokens))[:, None] + back_W
            old_TW = self.row_of_T[:, None] * keep + keep + offset_TW
            rows_R = self.tensor(range(self.num_rows))
            tail_RW = self.tensor(self.lengths)[:, None] - keep + self.tensor(range(keep))
            new_RW = stored + self.tensor(self.starts)[:, None] + tail_RW
            old_RW = rows_R[:, None] * keep + keep + tail_RW
            cached[width] = (
                torch.where(offset_TW >= 0, new_TW, old_TW),
                torch.where(tail_RW >= 0, new_RW, old_RW),
            )
        return cached[width]
