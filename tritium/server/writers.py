"""What stands between events and the bytes of an answer: one writer a request, one class a door."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tritium.api import Completion
from tritium.core import Event
from tritium.server.convert import Envelope, Shape, Tally
from tritium.server.protocol import StreamOptions


class Writer(Protocol):
    def count(self, event: Event) -> None:
        """Take note of an event of an answer that is sent whole."""
        ...

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]: ...

    def add(self, event: Event) -> str:
        """Server-sent events for an event; may be empty."""
        ...

    def end(self) -> str:
        """The last of them."""
        ...

    def notes(self) -> dict[str, Any]:
        """For the log."""
        ...


class OpenAIWriter:
    """Chat and text completions."""

    def __init__(self, shape: Shape, model: str, n: int, stream_options: StreamOptions | None) -> None:
        self._shape = shape
        self._tally = Tally(n)
        include_usage = stream_options is not None and stream_options.include_usage
        self._envelope = Envelope(shape, model, include_usage=include_usage)

    def count(self, event: Event) -> None:
        self._tally.add(event)

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        return self._envelope.whole([self._shape.choice(done) for done in completions], self._tally.body())

    def add(self, event: Event) -> str:
        self._tally.add(event)
        return self._envelope.chunks(self._shape.deltas(event))

    def end(self) -> str:
        return self._envelope.end(self._tally.body())

    def notes(self) -> dict[str, Any]:
        body = self._tally.body()
        return {name: body[name] for name in ("prompt_tokens", "completion_tokens")}
