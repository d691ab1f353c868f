"""Answers as typed blocks (thought, text, call), which is how Anthropic's and OpenAI's newer doors write them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tritium.api import Completion
from tritium.chat.messages import is_list, objects
from tritium.chat.tokenizer import check_text
from tritium.core import Event, RequestError
from tritium.server.convert import dumps

Kind = Literal["thinking", "text", "call"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a block. A call's first piece has its id and name; its text is JSON."""

    kind: Kind
    text: str
    id: str = ""
    name: str = ""


def pieces(event: Event) -> Iterator[Piece]:
    """What an event adds, in the order in which a model writes it."""
    if event.reasoning:
        yield Piece("thinking", event.reasoning)
    if event.text:
        yield Piece("text", event.text)
    for delta in event.tool_deltas:
        yield Piece("call", delta.arguments, delta.id, delta.name)


def blocks(done: Completion) -> list[Piece]:
    """A whole answer."""
    calls = [Piece("call", dumps(call.arguments), call.id, call.name) for call in done.tool_calls]
    return [*pieces(Event(text=done.text, reasoning=done.reasoning)), *calls]


def sse(kind: str, body: Mapping[str, Any]) -> str:
    return f"event: {kind}\ndata: {dumps({'type': kind, **body})}\n\n"


def join_text(content: object, where: str, kinds: Sequence[str]) -> str:
    """The text of a string or of a list of text blocks; None is empty."""
    if content is None or isinstance(content, str):
        return content or ""
    if not is_list(content):
        raise RequestError(f"{where} must be a string or a list of blocks", param=where)
    texts = []
    for at, block in objects(content, where):
        if block.get("type") not in kinds:
            raise RequestError(f"{at}.type must be {' or '.join(kinds)}, got {block.get('type')!r:.50}",
                               param=f"{at}.type")
        texts.append(check_text(block.get("text"), f"{at}.text"))
    return "".join(texts)
