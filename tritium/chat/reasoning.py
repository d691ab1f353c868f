"""Reasoning split from the answer while the text arrives."""

from __future__ import annotations

import enum

from tritium.chat.stop import overlap
from tritium.chat.tags import END_THINK, THINK


class _State(enum.Enum):
    START = enum.auto()
    REASONING = enum.auto()
    ANSWER = enum.auto()


def ends_in_think(prompt: str) -> bool:
    """Whether the text that follows a prompt begins inside the reasoning."""
    return prompt.rstrip().endswith(THINK)


class ReasoningSplitter:
    """`<think>\\nreasoning\\n</think>\\n\\nanswer` -> reasoning, answer.

    The reasoning begins in the prompt (`inside`) or with a `<think>` that opens the text; a later one is part of
    the answer. The newlines inside the tags and after `</think>` belong to the format, which the family's template
    writes again, and are left out. Reasoning that is never closed is all that there is: no answer.
    """

    def __init__(self, *, inside: bool) -> None:
        self._state = _State.REASONING if inside else _State.START
        self._skip_newlines = inside
        self._buffer = ""
        self.undecided = False
        """Whether the text so far ends in what may become a tag."""

    @property
    def inside(self) -> bool:
        return self._state is _State.REASONING

    def push(self, text: str, *, final: bool = False) -> tuple[str, str]:
        """-> (reasoning, answer) that is now certain; `final` releases what is held back."""
        buffer, self._buffer, self.undecided = self._buffer + text, "", False
        if self._state is _State.START:
            head = buffer.lstrip()
            if head.startswith(THINK):
                self._state, self._skip_newlines, buffer = _State.REASONING, True, head.removeprefix(THINK)
            elif THINK.startswith(head) and not final:
                self._buffer, self.undecided = buffer, True
                return "", ""
            else:
                self._state = _State.ANSWER
        reasoning = ""
        if self._state is _State.REASONING:
            buffer = self._without_leading_newlines(buffer)
            reasoning, end, buffer = buffer.partition(END_THINK)
            if not end:
                held = 0 if final else self._held(reasoning)
                self._buffer = reasoning[len(reasoning) - held :]
                return reasoning[: len(reasoning) - held], ""
            reasoning = reasoning.rstrip("\n")
            self._state, self._skip_newlines = _State.ANSWER, True
        return reasoning, self._without_leading_newlines(buffer)

    def _without_leading_newlines(self, text: str) -> str:
        if self._skip_newlines:
            text = text.lstrip("\n")
            self._skip_newlines = not text
        return text

    def _held(self, text: str) -> int:
        """Characters at the end that may belong to the closing tag: newlines and a beginning of it."""
        tag = overlap(text, END_THINK)
        self.undecided = tag > 0
        return len(text) - len(text[: len(text) - tag].rstrip("\n"))
