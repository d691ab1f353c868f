"""Stop strings, matched on text."""

from __future__ import annotations

from collections.abc import Sequence


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that `tag` begins with, short of the whole tag."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


class StopMatcher:
    """Finds the stop string that is complete first, wherever the text was cut into pieces.

    Of several that end at the same character the longest wins. Only text that could still become a match is held
    back.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include` leaves the matched string in the text."""
        self.stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, text: str, *, armed: bool = True) -> tuple[str, str | None]:
        """-> (text that is safe to show, the stop string found or None). Matches that end in text pushed while not
        `armed` do not count."""
        if not self.stops:
            return text, None
        known, text = len(self._held), self._held + text
        # The first of each that ends after what was known.
        found = [(at + len(stop), at, stop) for stop in self.stops
                 if (at := text.find(stop, max(0, known - len(stop) + 1))) >= 0]
        if armed and found:
            end, start, stop = min(found)
            return text[: end if self._include else start], stop
        settled = len(text) - max(overlap(text, stop) for stop in self.stops)
        self._held = text[settled:]
        return text[:settled], None

    def flush(self) -> str:
        """What is held back, which no match can need any more."""
        held, self._held = self._held, ""
        return held
