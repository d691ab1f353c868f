"""The pools of KV pages and of GDN slots: which ids are free.

Ids run from 1 to num_total. Id 0 is never handed out: padded rows of a batch write there. A pool knows free from
used and nothing more; who holds an id is told by its holder (a request now, a node of a prefix tree beside it
later), and exactly one holder gives it back.
"""

from __future__ import annotations

from collections.abc import Iterable

from tritium.core import PAGE_TOKENS, CapacityError


def pages_for(num_tokens: int) -> int:
    """Pages that hold `num_tokens` tokens of one sequence."""
    return -(-num_tokens // PAGE_TOKENS)


class _IdPool:
    """Ids 1 .. num_total; each is free or in use. All operations are O(ids touched)."""

    _noun = "id"

    def __init__(self, num_total: int) -> None:
        if num_total < 0:
            raise ValueError(f"a pool of {num_total} {self._noun}s")
        self.num_total = num_total
        # A stack: the id released last is handed out first, low ids before high ones in a fresh pool.
        self._free = list(range(num_total, 0, -1))
        self._used = bytearray(num_total + 1)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_total - len(self._free)

    def _take(self, count: int) -> list[int]:
        if count < 0:
            raise ValueError(f"cannot allocate {count} {self._noun}s")
        if count > len(self._free):
            raise CapacityError(f"{count} {self._noun}s asked, {len(self._free)} of {self.num_total} free")
        ids = [self._free.pop() for _ in range(count)]
        for i in ids:
            self._used[i] = 1
        return ids

    def _give_back(self, ids: Iterable[int]) -> None:
        """Refuses, by ValueError and before the first change, ids that this pool did not hand out or has back."""
        returned = list(ids)
        if len(set(returned)) != len(returned):
            raise ValueError(f"a {self._noun} is released twice in {returned}")
        for i in returned:
            if not (0 < i <= self.num_total and self._used[i]):
                raise ValueError(f"{self._noun} {i} is not in use")
        for i in returned:
            self._used[i] = 0
        self._free.extend(reversed(returned))


class PagePool(_IdPool):
    """KV pages of PAGE_TOKENS tokens each, shared by all attention layers (one id is a page in every layer)."""

    _noun = "page"

    def allocate(self, count: int) -> list[int]:
        """`count` pages, all or none: raises CapacityError, and takes nothing, when fewer are free."""
        return self._take(count)

    def release(self, pages: Iterable[int]) -> None:
        """Gives pages back, all or none: raises ValueError on a page that is not in use or comes twice."""
        self._give_back(pages)


class SlotPool(_IdPool):
    """GDN slots: recurrent and convolution state of one request, in every GDN layer."""

    _noun = "slot"

    def allocate(self) -> int:
        """A slot; raises CapacityError when none is free."""
        return self._take(1)[0]

    def release(self, slot: int) -> None:
        """Gives a slot back; raises ValueError when it is not in use."""
        self._give_back((slot,))
