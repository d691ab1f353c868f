"""Answers held to a grammar: llguidance says which tokens may come next, and this follows it token by token."""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tritium.chat.tags import END_THINK, TAGS
from tritium.chat.tokenizer import Tokenizer
from tritium.core.constraint import AnswerRules
from tritium.core.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT = 64
"""Compiled grammars that are kept."""
_CLOSE = f"\n{END_THINK}\n\n"
"""How the family's template closes a thought."""


class Grammars:
    """Compiles grammars for one tokenizer, and makes the constraints of requests. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        """`vocab_size`: ids of the model, of which the tokenizer may have fewer. Costs nothing until the first use."""
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_ids = tuple(sorted(eos_ids))
        self.end_think = tokenizer.token_id(END_THINK)
        self._compiled = functools.lru_cache(_KEPT)(self._compile)
        self._size = 4 * -(-vocab_size // 32)
        self._without: dict[bytes, bytes] = {}
        self._lock = threading.Lock()

    def constraint(self, rules: AnswerRules) -> AnswerConstraint:
        """A fresh constraint. Raises `RequestError` for a grammar that does not compile."""
        return AnswerConstraint(self, rules, None if rules.grammar is None else self.compile(rules.grammar).deep_copy())

    def compile(self, grammar: str) -> LLMatcher:
        """The grammar, ready to be copied. Raises `RequestError` with llguidance's words for one that it cannot hold,
        or not within its limits of size and work."""
        with self._lock:
            return self._compiled(grammar)

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        error = LLMatcher.validate_grammar(grammar, self.inner, limits=limits)
        matcher = LLMatcher(self.inner, grammar, log_level=0, limits=limits)
        if error or matcher.is_error():
            raise RequestError(_first_line(error or matcher.get_error()))
        return matcher

    @functools.cached_property
    def inner(self) -> LLTokenizer:
        """llguidance's view of the tokenizer: the tags of thoughts and calls are special there, so that no rule for
        text lets them through."""
        from llguidance import LLTokenizer

        form = json.loads(self.tokenizer.serialized())
        for token in form["added_tokens"]:
            token["special"] |= token["content"] in TAGS
        return LLTokenizer(json.dumps(form), n_vocab=self.vocab_size, eos_token=list(self.eos_ids))

    def only(self, *tokens: int) -> bytes:
        return sum(1 << token for token in tokens).to_bytes(self._size, "little")

    def thought(self, tail: bytes) -> bytes:
        """All tokens but those that end the answer, and those that would spell the closing tag after `tail`: only the
        tag's own token closes a thought that a grammar follows."""
        tag = END_THINK.encode()
        rest = next((tag[n:] for n in range(len(tag) - 1, 0, -1) if tail.endswith(tag[:n])), b"")
        if rest not in self._without:
            banned = set(self.eos_ids)
            if rest:
                banned |= {t for t in range(self.tokenizer.vocab_size) if self.bytes_of(t).startswith(rest)}
            self._without[rest] = self._all_but(banned)
        return self._without[rest]

    @functools.cached_property
    def cut(self) -> bytes:
        """All tokens but the tag that closes a thought, for an answer whose thought was closed for it."""
        return self._all_but({self.end_think} if self.end_think else ())

    def bytes_of(self, token: int) -> bytes:
        return b"" if self.inner.is_special_token(token) else self.inner.decode_bytes([token])

    def _all_but(self, tokens: Collection[int]) -> bytes:
        mask = (1 << self.vocab_size) - 1
        for token in tokens:
            mask &= ~(1 << token)
        return mask.to_bytes(self._size, "little")


@dataclass(frozen=True, slots=True)
class _State:
    """Where an answer stands after some token."""

    thinking: bool
    thought: int = 0
    """Tokens of the thought."""
    tail: bytes = b""
    """The end of the thought's text."""
    forced: tuple[int, ...] = ()
    """What must come next."""
    cut: bool = False
    """Whether the budget closed the thought."""
    matched: bool = False
    """Whether the matcher took this token."""
    ended: bool = False
    """Nothing but the end may follow any more."""
    astray: bool = False
    """A guess that is not allowed came before."""


class AnswerConstraint:
    """The rules of one answer at work (`core.Constraint`).

    In the thought everything is allowed until its budget is spent, except, where a grammar follows, to end the answer.
    The way along guesses is kept, so that each token is matched once, whether it is guessed first or accepted at once.
    """

    def __init__(self, grammars: Grammars, rules: AnswerRules, matcher: LLMatcher | None) -> None:
        self._grammars = grammars
        self._rules = rules
        self._matcher = matcher
        self._path: list[int] = []
        """Guesses that were followed."""
        self._states = [self._spent(_State(rules.thinking))]
        """After what was accepted, and after each of the path."""
        self._masks: list[bytes | bool | None] = [False]
        """Beside the states; False: not worked out."""

    @property
    def error(self) -> str | None:
        if self._states[0].astray:
            return "the answer left its grammar"
        if self._matcher is not None and self._matcher.is_error():
            return f"the grammar cannot be followed any further: {_first_line(self._matcher.get_error())}"
        return None

    def mask(self, guesses: Sequence[int]) -> bytes | None:
        self._follow(guesses)
        mask = self._masks[-1]
        if isinstance(mask, bool):
            mask = self._masks[-1] = self._mask(self._states[-1])
        return mask

    def advance(self, tokens: Sequence[int]) -> None:
        n = len(tokens)
        if list(tokens) != self._path[:n]:
            self._follow(tokens)
        del self._path[:n], self._states[:n], self._masks[:n]

    def _follow(self, guesses: Sequence[int]) -> None:
        same = 0
        while same < min(len(guesses), len(self._path)) and guesses[same] == self._path[same]:
            same += 1
        back = sum(state.matched for state in self._states[same + 1 :])
        if back and self._matcher is not None:
            self._matcher.rollback(back)
        del self._path[same:], self._states[same + 1 :], self._masks[same + 1 :]
        for token in guesses[same:]:
            self._states.append(self._after(self._states[-1], token))
            self._path.append(token)
            self._masks.append(False)

    def _after(self, state: _State, token: int) -> _State:
        if state.astray:
            return state
        if state.forced:
            return dataclasses.replace(state, forced=state.forced[1:], astray=token != state.forced[0])
        if state.thinking:
            if token == self._grammars.end_think:  # what stands between a thought and an answer under a grammar
                return _State(False, forced=tuple(self._grammars.tokenizer.encode("\n\n")) if self._matcher else ())
            if self._matcher is None:
                return self._spent(_State(True, state.thought + 1))
            tail = (state.tail + self._grammars.bytes_of(token))[-len(END_THINK) :]
            astray = not self._grammars.thought(state.tail)[token // 8] >> token % 8 & 1
            return self._spent(_State(True, state.thought + 1, tail, astray=astray))
        if self._matcher is None:
            return state
        if token in self._grammars.eos_ids:  # kept from the matcher, whose way back from the end is one token too long
            return _State(False, ended=True, astray=not (state.ended or self._matcher.is_accepting()))
        taken = not state.ended and self._matcher.try_consume_tokens([token]) == 1
        return _State(False, matched=taken, astray=not taken)

    def _spent(self, state: _State) -> _State:
        """The state, closing the thought where its budget is spent."""
        budget = self._rules.thinking_budget
        if not state.thinking or state.astray or budget is None or state.thought < budget:
            return state
        return _State(False, forced=tuple(self._grammars.tokenizer.encode(_CLOSE)), cut=True)

    def _mask(self, state: _State) -> bytes | None:
        if state.astray:
            return self._grammars.only() if len(self._states) == 1 else None
        if state.forced:
            return self._grammars.only(state.forced[0])
        if state.ended:
            return self._grammars.only(*self._grammars.eos_ids)
        if self._matcher is None:
            return self._grammars.cut if state.cut else None
        return self._grammars.thought(state.tail) if state.thinking else self._matcher.compute_bitmask()


def _first_line(text: str) -> str:
    """What llguidance says, in one line: the first, and below it the one that names the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines[1:] if line.startswith("error:")]
    return " ".join(lines[:1] + errors[:1]) or "it cannot be compiled"
