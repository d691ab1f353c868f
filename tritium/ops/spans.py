"""How the T tokens of a step divide into R rows: the integers that every sequence op shares.

Shapes: T tokens, R rows, P pages of a block table, W convolution width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch

from tritium.core import SHORT_ROW

Made = TypeVar("Made")


@dataclass(frozen=True)
class Spans:
    """Row r holds tokens [starts[r], starts[r] + lengths[r]) of the step, at positions contexts[r], contexts[r] + 1, …

    Host integers, with the tensors that ops need made once a step, on `device`. `pages` is a row's block table.

    Recurrent state. A row starts from the state in slot `sources[r]`, which is that of position contexts[r] - folds[r]:
    the `folds[r]` tokens before the span were drafts that are accepted by now, and what they would have done to the
    state is kept beside it. The last `drafts[r]` tokens of the span may yet be rejected, so slot `slots[r]` gets the
    state before them, and their inputs are kept beside it. `snapshots[r]` asks for copies: (position, slot) puts the
    state after `position` > contexts[r] tokens there. A row whose state begins at position 0 starts from zero
    whatever a slot holds.
    """

    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    slots: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    device: torch.device
    sources: tuple[int, ...] = ()
    """Empty: the rows' own slots."""
    folds: tuple[int, ...] = ()
    """Empty: none, as for drafts and snapshots."""
    drafts: tuple[int, ...] = ()
    snapshots: tuple[tuple[tuple[int, int], ...], ...] = ()
    since: tuple[int, ...] = ()
    """First position that a row attends to. Empty: all from 0."""

    def __post_init__(self) -> None:
        none, rows = (0,) * len(self.lengths), ((),) * len(self.lengths)
        for name, default in (("folds", none), ("drafts", none), ("sources", self.slots), ("snapshots", rows)):
            object.__setattr__(self, name, getattr(self, name) or default)

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        return tuple(accumulate(self.lengths, initial=0))[:-1]

    @cached_property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def tensor(self, values: object, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    @cached_property
    def num_short(self) -> int:
        """Rows of at most SHORT_ROW tokens, which kernels want first."""
        count = sum(length <= SHORT_ROW for length in self.lengths)
        if any(length > SHORT_ROW for length in self.lengths[:count]):
            raise ValueError(f"rows of at most {SHORT_ROW} tokens must come first: {self.lengths}")
        return count

    @cached_property
    def table(self) -> Table:
        """One copy to the device. Short rows may ask for one snapshot each.

        Kernels are compiled anew where a pointer or stride is a multiple of 16 (bytes, elements) or not: here all are.
        """
        rows, tokens, width = self.num_rows, self.num_tokens, _up(max(len(row) for row in self.pages), 16)
        stride, room = _up(rows, 4), _up(tokens, 4)
        asked = [taken if n <= SHORT_ROW else () for taken, n in zip(self.snapshots, self.lengths)]
        snaps = [taken[0] if taken else (0, -1) for taken in asked]
        if any(len(taken) > 1 for taken in asked):
            raise ValueError(f"a row of at most {SHORT_ROW} tokens can leave one snapshot")
        columns = (self.starts, self.lengths, self.contexts, self.sources, self.slots, self.folds, self.drafts,
                   self.since or (0,) * rows, [at for at, _ in snaps], [slot for _, slot in snaps])  # fmt: skip
        sizes = (len(columns) * stride, rows * width, 2 * room)
        host = torch.zeros(sum(sizes), dtype=torch.int32)

        def parts(flat: torch.Tensor) -> Iterator[torch.Tensor]:
            return (part.view(-1, n) for part, n in zip(flat.split(sizes), (stride, width, room), strict=True))

        columns_NR, pages_RP, of_tokens_2T = parts(host)
        columns_NR[:, :rows] = torch.tensor(columns, dtype=torch.int32)
        for r, pages in enumerate(self.pages):
            pages_RP[r, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        row_T = torch.repeat_interleave(torch.arange(rows), torch.tensor(self.lengths))
        offset_T = torch.arange(tokens) - torch.tensor(self.starts)[row_T]
        of_tokens_2T[0, :tokens] = row_T
        of_tokens_2T[1, :tokens] = offset_T + torch.tensor(self.contexts)[row_T]
        columns_NR, pages_RP, of_tokens_2T = parts(host.to(self.device))
        return Table._make((*columns_NR[:, :rows].unbind(), pages_RP, *of_tokens_2T[:, :tokens].unbind()))

    def cached(self, name: str, make: Callable[[Spans], Made]) -> Made:
        """What an op derives from the spans, made once a step for all layers."""
        kept: dict[str, Made] = self.__dict__.setdefault("_cached", {})
        if name not in kept:
            kept[name] = make(self)
        return kept[name]

    @cached_property
    def sources_R(self) -> torch.Tensor:
        return self.tensor(self.sources)

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """Position of each row's stored state."""
        return tuple(context - fold for context, fold in zip(self.contexts, self.folds))

    @cached_property
    def saves(self) -> tuple[tuple[int, int, int], ...]:
        """(row, tokens after `begins`, slot): every state to store, each row's own and its snapshots."""
        out = []
        for r, begin in enumerate(self.begins):
            out.append((r, self.folds[r] + self.lengths[r] - self.drafts[r], self.slots[r]))
            out += [(r, position - begin, slot) for position, slot in self.snapshots[r]]
        return tuple(out)

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
    def folded(self) -> tuple[tuple[int, int], ...]:
        """(row, index among the inputs kept beside its state) of every token to fold, row by row."""
        return tuple((r, i) for r, fold in enumerate(self.folds) for i in range(fold))

    @cached_property
    def folded_from(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(slot, index among the inputs kept there) of `folded`."""
        rows, places = zip(*self.folded, strict=True)
        return self.sources_R[self.tensor(rows)], self.tensor(places)

    @cached_property
    def drafted(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(token, slot, place there) of every draft, whose inputs are to be kept."""
        found = [
            (self.starts[r] + self.lengths[r] - count + i, self.slots[r], i)
            for r, count in enumerate(self.drafts)
            for i in range(count)
        ]
        tokens, slots, places = zip(*found, strict=True)
        return self.tensor(tokens), self.tensor(slots), self.tensor(places)

    @cached_property
    def time_major(self) -> TimeMajor:
        """An order of the tokens, folded ones included, for recurrences that advance all rows together."""
        lengths = [fold + length for fold, length in zip(self.folds, self.lengths)]
        first_fold = [sum(self.folds[:r]) for r in range(self.num_rows)]
        by_length = sorted(range(self.num_rows), key=lambda r: -lengths[r])
        order: list[int] = []
        active: list[int] = []
        alive = self.num_rows
        for t in range(lengths[by_length[0]]):
            while lengths[by_length[alive - 1]] <= t:
                alive -= 1
            active.append(alive)
            for r in by_length[:alive]:
                of_span = len(self.folded) + self.starts[r] + t - self.folds[r]
                order.append(first_fold[r] + t if t < self.folds[r] else of_span)
        rank = {r: i for i, r in enumerate(by_length)}
        saves: dict[int, list[tuple[int, int]]] = {}
        for r, after, slot in self.saves:
            saves.setdefault(after, []).append((rank[r], slot))
        return TimeMajor(
            order=self.tensor(order),
            as_is=order == list(range(len(order))),
            folds=min(self.folds),
            rows=self.tensor(by_length),
            active=tuple(active),
            saves={after: self._ranks_and_slots(sorted(pairs)) for after, pairs in saves.items()},
        )

    def _ranks_and_slots(self, pairs: list[tuple[int, int]]) -> tuple[torch.Tensor | None, torch.Tensor]:
        ranks, slots = zip(*pairs, strict=True)
        return None if ranks == tuple(range(self.num_rows)) else self.tensor(ranks), self.tensor(slots)

    def conv_windows(self, ring: int, width: int) -> ConvWindows:
        """Indices for a causal convolution of `width` taps; a slot keeps the input of position p at p % ring."""
        return self.cached(f"conv_windows_{ring}_{width}", lambda spans: spans._conv_windows(ring, width))

    def _conv_windows(self, ring: int, width: int) -> ConvWindows:
        past = width - 1
        history = [
            source * ring + (context + i) % ring
            for source, context in zip(self.sources, self.contexts)
            for i in range(-past, 0)
        ]
        offset_TW = self.offset_T[:, None] + self.tensor(range(-past, 1))
        from_history_TW = (self.row_of_T * past + past)[:, None] + offset_TW
        from_span_TW = self.num_rows * past + self.tensor(self.starts)[self.row_of_T][:, None] + offset_TW
        kept: list[tuple[int, int]] = []
        for r, context in enumerate(self.contexts):
            end = context + self.lengths[r]
            ends = [(max(context - past, end - ring), end, self.slots[r])]
            ends += [(position - past, position, slot) for position, slot in self.snapshots[r]]
            for first, stop, slot in ends:
                for position in range(max(first, 0), stop):
                    of_span = self.num_rows * past + self.starts[r] + position - context
                    of_history = r * past + past + position - context
                    kept.append((of_span if position >= context else of_history, slot * ring + position % ring))
        sources, targets = zip(*kept, strict=True)
        return ConvWindows(
            history_N=self.tensor(history),
            taps_WT=torch.where(offset_TW >= 0, from_span_TW, from_history_TW).t().contiguous(),
            kept_from_N=self.tensor(sources),
            kept_to_N=self.tensor(targets),
        )


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class TimeMajor:
    """Step t works on the first active[t] of `rows`, whose tokens stand side by side in `order`.

    `order` indexes [folded tokens; T tokens], `as_is` where it changes nothing; the first `folds` steps only fold;
    `saves` maps a number of steps done to (ranks among rows, None for all in order; slots).
    """

    order: torch.Tensor
    as_is: bool
    folds: int
    rows: torch.Tensor
    active: tuple[int, ...]
    saves: dict[int, tuple[torch.Tensor | None, torch.Tensor]]


@dataclass(frozen=True)
class ConvWindows:
    """Where a convolution reads and what it keeps, as indices of flat tensors.

    `history_N` (R rows x W - 1, oldest first) and `kept_to_N` index [slots x ring]; `taps_WT`, oldest first, and
    `kept_from_N` index [history; T new inputs].
    """

    history_N: torch.Tensor
    taps_WT: torch.Tensor
    kept_from_N: torch.Tensor
    kept_to_N: torch.Tensor


class Table(NamedTuple):
    """The spans as kernels read them, on the device, all int32. Graphs keep one and refill it.

    A row that is not there has length 0. `snap_at_R`, `snap_slot_R`: a short row's snapshot (position, slot), slot -1
    for none. A token of no row has position -1.
    """

    starts_R: torch.Tensor
    lengths_R: torch.Tensor
    contexts_R: torch.Tensor
    sources_R: torch.Tensor
    slots_R: torch.Tensor
    folds_R: torch.Tensor
    drafts_R: torch.Tensor
    since_R: torch.Tensor
    snap_at_R: torch.Tensor
    snap_slot_R: torch.Tensor
    pages_RP: torch.Tensor
    row_T: torch.Tensor
    position_T: torch.Tensor
