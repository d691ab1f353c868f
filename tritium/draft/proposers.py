"""Who guesses the tokens to come: the MTP head, the text itself, or both.

Whatever a proposer says changes no token: the next step draws at every guessed position with the request's own seed,
and a guess counts only when it is the very token that was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tritium.core import Request


class Proposer(Protocol):
    """Guesses from what is certain, on the host, while a step is planned."""

    def propose(self, request: Request, most: int) -> Sequence[int]:
        """At most `most` guesses of what follows the request's tokens."""
        ...

    def forget(self, request_id: str) -> None:
        """The request ended."""


class HeadProposer:
    """What the checkpoint's MTP head guessed on the device at the end of the step before (`draft.mtp`)."""

    def propose(self, request: Request, most: int) -> Sequence[int]:
        return request.drafts[:most]

    def forget(self, request_id: str) -> None:
        pass


class NgramProposer:
    """What followed the last time that the text ended like now (prompt lookup). Costs no forward pass."""

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self.sizes = range(longest, shortest - 1, -1)
        self._texts: dict[str, tuple[list[int], dict[tuple[int, ...], int]]] = {}

    def propose(self, request: Request, most: int) -> Sequence[int]:
        ids, after = self._texts.setdefault(request.id, ([], {}))
        new = request.ids(len(ids), request.num_tokens)
        if len(ids) + len(new) != request.num_tokens or most <= 0:
            return ()
        for token in new:
            # Where an n-gram's continuation begins; noted when that is there, so that the end never finds itself.
            for size in self.sizes:
                if len(ids) >= size:
                    after[tuple(ids[-size:])] = len(ids)
            ids.append(token)
        for size in self.sizes:
            found = after.get(tuple(ids[-size:])) if len(ids) >= size else None
            if found is not None:
                return tuple(ids[found : found + most])
        return ()

    def forget(self, request_id: str) -> None:
        self._texts.pop(request_id, None)


class ChainedProposer:
    """The longer guess of two where they begin alike, else the first one's."""

    def __init__(self, first: Proposer, second: Proposer) -> None:
        self.first, self.second = first, second

    def propose(self, request: Request, most: int) -> Sequence[int]:
        first, second = self.first.propose(request, most), self.second.propose(request, most)
        if not first or (len(second) > len(first) and tuple(second[: len(first)]) == tuple(first)):
            return second
        return first

    def forget(self, request_id: str) -> None:
        self.first.forget(request_id)
        self.second.forget(request_id)
