"""From the engine's token events to what a caller reads: text, reasoning, tool calls, exact usage."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tritium.chat import TextDelta, TextStream, Written
from tritium.core import Event, FinishReason, Request, Timing, TokenEvent, TokenLogprob, ToolCall, Usage


class Answer:
    """One choice while it is generated: the engine's request and the text that its tokens become."""

    def __init__(self, request: Request, index: int, text: TextStream, *, keep_stop: bool = False,
                 written: Written | None = None) -> None:
        self.request = request
        self.index = index
        self.finished = False
        self.may_stop = bool(request.sampling.stop)
        """Whether a stop string may end it before the engine does."""
        self.admitted_at = request.arrived_at
        self._text = text
        self._keep_stop = keep_stop
        self._completion_tokens = 0
        self._cached_tokens = 0
        self._accepted = self._rejected = 0
        self._called_tools = False
        self._written = written
        self._deltas: list[TextDelta] = []
        self._ids: list[int] = []
        """All that was written, where that is to be remembered."""
        self._first_token_at: float | None = None

    def take(self, event: TokenEvent, made_at: float = 0.0) -> Event:
        """The event as text; `made_at`: when the engine had made it.

        A stop string ends the answer at the very token that completed it: later tokens of the same event are neither
        shown nor counted. The token that ended the generation counts, but has no text.
        """
        if event.tokens and self._first_token_at is None:
            self._first_token_at = made_at or time.monotonic()
        silent = event.stop_token is not None and not self._keep_stop
        before = self._text.tokens_used
        delta = self._text.push(event.tokens[:-1] if silent else event.tokens, final=event.finish_reason is not None)
        used = len(event.tokens) if delta.stopped_by is None else self._text.tokens_used - before
        self._completion_tokens += used
        self._called_tools |= bool(delta.tool_calls)
        if self._written is not None and event.tokens:
            self._keep(delta, event)
        self._cached_tokens = event.cached_tokens
        if event.num_drafts:
            self._accepted += min(event.num_accepted, used)
            self._rejected += event.num_drafts - event.num_accepted
        out = Event(self.index, delta.text, delta.reasoning, delta.tool_calls, delta.tool_deltas, event.tokens[:used],
                    event.logprobs[:used], event.prompt_logprobs, error=event.error, made_at=made_at)
        reason = event.finish_reason if delta.stopped_by is None else FinishReason.STOP
        if reason is not None:
            self.finished = True
            called = reason is FinishReason.STOP and self._called_tools
            out.finish_reason = FinishReason.TOOL_CALLS if called else reason
            out.stop_reason = event.stop_token if delta.stopped_by is None else delta.stopped_by
            out.usage, out.timing = self.usage, self._timing(event)
        return out

    def _keep(self, delta: TextDelta, event: TokenEvent) -> None:
        """Remember the answer as it was written, when it ended by itself."""
        self._deltas.append(delta)
        self._ids += event.tokens
        if event.stop_token is not None and delta.stopped_by is None and self._written is not None:
            self._written.remember("".join(delta.text for delta in self._deltas),
                                   "".join(delta.reasoning for delta in self._deltas),
                                   [call for delta in self._deltas for call in delta.tool_calls], self._ids[:-1])

    @property
    def usage(self) -> Usage:
        prompt, reasoning = len(self.request.prompt_ids), self._text.reasoning_tokens
        return Usage(prompt, self._completion_tokens, reasoning, self._cached_tokens, self._accepted, self._rejected)

    def _timing(self, event: TokenEvent) -> Timing:
        """The engine's, or, where a stop string ended the answer before the engine did, the same as of now."""
        now, request = time.monotonic(), self.request
        waited = self.admitted_at - request.arrived_at
        if event.timing is not None:
            return dataclasses.replace(event.timing, waited=waited)
        first = self._first_token_at or now
        return Timing(first - request.arrived_at, now - request.arrived_at, self._completion_tokens,
                      request.num_preemptions, waited)


def merge(events: Sequence[TokenEvent]) -> TokenEvent:
    """Events of one request, oldest first, as one: what a reader that fell behind catches up with."""
    if len(events) == 1:
        return events[0]
    return dataclasses.replace(
        events[-1],
        tokens=tuple(token for event in events for token in event.tokens),
        logprobs=tuple(entry for event in events for entry in event.logprobs),
        prompt_logprobs=tuple(entry for event in events for entry in event.prompt_logprobs),
        num_drafts=sum(event.num_drafts for event in events),
        num_accepted=sum(event.num_accepted for event in events),
    )


@dataclass(slots=True)
class Completion:
    """A whole answer: the sum of its events. `text` is the answer, `reasoning` what the model thought before it."""

    index: int
    prompt_ids: list[int]
    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage = field(default_factory=lambda: Usage(0, 0))
    timing: Timing | None = None

    def absorb(self, event: Event) -> None:
        self.text += event.text
        self.reasoning += event.reasoning
        self.tool_calls += event.tool_calls
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        self.prompt_logprobs += event.prompt_logprobs
        if event.finish_reason is not None:
            self.finish_reason, self.stop_reason, self.timing = event.finish_reason, event.stop_reason, event.timing
            self.usage = event.usage or self.usage
