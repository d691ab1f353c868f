"""What the tokens of an answer must obey: plain words on the request, a living object beside it in the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class AnswerRules:
    """A grammar for the answer and a limit for the thought before it. Plain words, so that a request can travel."""

    grammar: str | None = None
    """Of the answer, as `tritium.chat.constraint` compiles it; it begins after the thought. None: any text."""
    thinking: bool = False
    """Whether the answer begins inside the thought."""
    thinking_budget: int | None = None
    """Tokens of thought after which it is closed; None: no limit."""


class Constraint(Protocol):
    """Which tokens may come next in one answer, as far as it has come."""

    @property
    def error(self) -> str | None:
        """Why no token can be allowed any more, in a line; None while all is well."""
        ...

    def mask(self, guesses: Sequence[int]) -> bytes | None:
        """Allowed tokens after what was accepted and then `guesses`; None: all, and after guesses that are not
        allowed themselves. Bit t % 8 of byte t / 8 is token t; at least as many bits as the vocabulary has ids."""
        ...

    def advance(self, tokens: Sequence[int]) -> None:
        """Accept the tokens that the answer gained."""
        ...


Constrain = Callable[[AnswerRules], Constraint]
