"""From sampled ids to what the caller sees: text, reasoning, tool calls and the end of the text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tritium.chat.detokenize import Detokenizer
from tritium.chat.reasoning import ReasoningSplitter
from tritium.chat.stop import StopMatcher
from tritium.chat.tools import Called, ToolParser
from tritium.core.stages import ToolCall, ToolCallDelta


@dataclass(slots=True)  # one is made for every token, and filled while that is read
class TextDelta:
    """What became certain with a push. Fields that it does not carry are empty."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_deltas: tuple[ToolCallDelta, ...] = ()
    stopped_by: str | None = None
    """The stop string, in the push that completed it."""


class TextStream:
    """ids -> text -> stop strings -> reasoning | answer -> text and tool calls.

    Any split of the ids into pushes gives the same totals. Stop strings match the generated text as it is,
    reasoning, tags and calls included (special tokens that are not shown are no part of it); what follows
    one is ignored.

    Reasoning that ends in complete calls and is never closed was meant to act: the calls are given out. Followed
    by anything, they are a part of the reasoning.
    """

    def __init__(self, detokenizer: Detokenizer, stops: StopMatcher, *, splitter: ReasoningSplitter | None = None,
                 answer_tools: ToolParser | None = None, reasoning_tools: ToolParser | None = None,
                 min_tokens: int = 0) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._splitter = splitter
        self._answer_tools = answer_tools
        self._reasoning_tools = reasoning_tools
        self._min_tokens = min_tokens
        self._plain = splitter is None and answer_tools is None and not stops.stops
        """Whether text is the answer and nothing else."""
        self._unclosed: list[Called] = []
        self._undecided_tokens = 0
        self._finished = False
        self.stopped_by: str | None = None
        self.tokens_used = 0
        """Tokens pushed, up to and including the one that completed a stop string."""
        self.reasoning_tokens = 0
        """Tokens whose text is inside the reasoning, without its tags."""

    def push(self, ids: Sequence[int], *, final: bool = False) -> TextDelta:
        """The next tokens; `final` releases all that is held back. After the end everything is ignored."""
        out = TextDelta()
        if self._finished:
            return out
        if self._plain and not final:
            self.tokens_used += len(ids)
            out.text = "".join(map(self._detokenizer.push, ids))
            return out
        for id in ids:
            self.tokens_used += 1
            self._token(id, out)
            if out.stopped_by is not None:
                return out
        if final:
            self._take(self._detokenizer.flush(), out)
            if self.stopped_by is None:
                self._finish(self._stops.flush(), out)
        return out

    def _token(self, id: int, out: TextDelta) -> None:
        splitter = self._splitter
        if splitter is None:
            self._take(self._detokenizer.push(id), out)
            return
        self._undecided_tokens += splitter.inside
        self._take(self._detokenizer.push(id), out)
        if not splitter.inside:
            self._undecided_tokens = 0
        elif not splitter.undecided:
            self._count_reasoning()

    def _count_reasoning(self) -> None:
        self.reasoning_tokens += self._undecided_tokens
        self._undecided_tokens = 0

    def _take(self, text: str, out: TextDelta) -> None:
        if not text:
            return
        text, stop = self._stops.push(text, armed=self.tokens_used > self._min_tokens)
        if stop is not None:
            self.stopped_by = out.stopped_by = stop
            self._finish(text, out)
        else:
            self._split(text, out)

    def _finish(self, text: str, out: TextDelta) -> None:
        self._finished = True
        self._split(text, out, final=True)
        if self._splitter is not None and self._splitter.inside:
            self._count_reasoning()

    def _split(self, text: str, out: TextDelta, *, final: bool = False) -> None:
        reasoning, answer = "", text
        if self._splitter is not None:
            reasoning, answer = self._splitter.push(text, final=final)
            self._add_reasoning(reasoning, out, closed=not self._splitter.inside, final=final)
        if self._answer_tools is None:
            out.text += answer
            return
        for piece in self._answer_tools.push(answer, final=final):
            if isinstance(piece, str):
                out.text += piece
            elif isinstance(piece, Called):
                out.tool_calls += (piece.call,)
            else:
                out.tool_deltas += (piece,)

    def _add_reasoning(self, text: str, out: TextDelta, *, closed: bool, final: bool) -> None:
        if self._reasoning_tools is None:
            out.reasoning += text
            return
        for piece in self._reasoning_tools.push(text, final=closed or final):
            if isinstance(piece, Called):
                self._unclosed.append(piece)
            elif isinstance(piece, str):
                self._release_unclosed(out)
                out.reasoning += piece
        if closed:
            self._release_unclosed(out)
        elif final:
            for i, called in enumerate(self._unclosed):
                call = called.call
                arguments = json.dumps(call.arguments, ensure_ascii=False)
                out.tool_deltas += (ToolCallDelta(i, call.id, call.name, arguments),)
                out.tool_calls += (call,)

    def _release_unclosed(self, out: TextDelta) -> None:
        out.reasoning += "".join(called.written for called in self._unclosed)
        self._unclosed.clear()
