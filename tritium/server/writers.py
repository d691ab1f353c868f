"""What stands between events and the bytes of an answer: one writer a request, one class a door."""

from __future__ import annotations

import dataclasses
import json
import operator
import time
import uuid
from collections.abc import Sequence
from typing import Any

from pydantic_core import to_json

from tritium.api import Completion
from tritium.core import Event, FinishReason, Usage
from tritium.server.convert import ChatShape, CompletionShape
from tritium.server.protocol import StreamOptions

_MARK = "\0"
_USAGE = operator.attrgetter(*(field.name for field in dataclasses.fields(Usage)))


class Tally:
    """What one HTTP answer of `n` choices a prompt comes to: its usage, and how the choice that ended last did. A
    prompt counts once, however many choices it has."""

    def __init__(self, n: int = 1) -> None:
        self._n = n
        self.usage = Usage(0, 0)
        self.reason: FinishReason | None = None
        self.stop: str | int | None = None

    def add(self, said: Event | Completion) -> None:
        """An event, or all of a choice."""
        if said.finish_reason is None or (more := said.usage) is None:
            return
        self.reason, self.stop = said.finish_reason, said.stop_reason
        if said.index % self._n:
            more = dataclasses.replace(more, prompt_tokens=0, cached_tokens=0)
        self.usage = Usage(*map(operator.add, _USAGE(self.usage), _USAGE(more)))

    def notes(self) -> dict[str, Any]:
        """For the log."""
        return {"prompt_tokens": self.usage.prompt_tokens, "completion_tokens": self.usage.completion_tokens}


class OpenAIWriter:
    """Chat and text completions: what stands around their choices."""

    def __init__(self, shape: ChatShape | CompletionShape, model: str, n: int, stream_options: StreamOptions | None
                 ) -> None:
        self.tally = Tally(n)
        self._shape = shape
        head = {"id": f"{shape.prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._head = head | {"object": shape.whole_object}
        self._include_usage = stream_options is not None and stream_options.include_usage
        # The same for every chunk, so serialized once: this runs for every token of every stream.
        self._chunk = json.dumps(head | {"object": shape.chunk_object})[:-1] + ', "choices": ['
        self._frames: dict[int, list[str]] = {}
        """What stands around a choice's text in a chunk that has nothing else."""
        self._chunk_end = '], "usage": null}' if self._include_usage else "]}"

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        for completion in completions:
            self.tally.add(completion)
        return {**self._head, "choices": [self._shape.choice(done) for done in completions], "usage": self._usage()}

    def add(self, event: Event) -> str:
        """Server-sent events for an event; may be empty."""
        index = event.index
        if (event.text and event.finish_reason is None and index in self._shape.begun
                and not (event.reasoning or event.tool_deltas or event.logprobs or event.prompt_logprobs)):
            if index not in self._frames:
                self._frames[index] = self._chunks(Event(index, _MARK)).split(to_json(_MARK).decode())
            return to_json(event.text).decode().join(self._frames[index])
        self.tally.add(event)
        return self._chunks(event)

    def _chunks(self, event: Event) -> str:
        return "".join([f"data: {self._chunk}{to_json(choice).decode()}{self._chunk_end}\n\n"
                        for choice in self._shape.deltas(event)])

    def end(self) -> str:
        """The last of them."""
        last = f'data: {self._chunk}], "usage": {json.dumps(self._usage())}}}\n\n' if self._include_usage else ""
        return last + "data: [DONE]\n\n"

    def _usage(self) -> dict[str, Any]:
        usage = self.tally.usage
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            "completion_tokens_details": {
                "reasoning_tokens": usage.reasoning_tokens,
                "accepted_prediction_tokens": usage.accepted_drafts,
                "rejected_prediction_tokens": usage.rejected_drafts,
            },
        }
