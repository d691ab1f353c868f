"""OpenAI's newer door: /v1/responses to a chat call, and its events to output items. Nothing is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from tritium.api import Completion
from tritium.chat.messages import as_object, objects
from tritium.chat.tokenizer import check_text
from tritium.core import Event, FinishReason, RequestError
from tritium.server.blocks import Piece, blocks, join_text, pieces, sse
from tritium.server.convert import function_call
from tritium.server.protocol import ModelRequest, StreamOptions, Strict
from tritium.server.writers import Tally

_TEXTS = ("input_text", "output_text", "text")


class Reasoning(Strict):
    effort: str | None = None
    summary: Any = None
    """Accepted; thoughts are given whole, not summed up."""


class TextConfig(Strict):
    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(ModelRequest):
    input: Any
    """A string or a list of items."""
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None

    store: Literal[False] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    max_tool_calls: None = None
    top_logprobs: Literal[0] | None = None
    truncation: Literal["disabled"] | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    metadata: Any = None
    user: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None


def chat_fields(request: ResponsesRequest) -> dict[str, Any]:
    """The request as fields of a `ChatRequest`."""
    fields: dict[str, Any] = {name: getattr(request, name) for name in (
        "model", "temperature", "top_p", "stream", "parallel_tool_calls")}
    fields |= {"messages": _messages(request), "max_tokens": request.max_output_tokens}
    if request.tools is not None:
        fields["tools"] = [_tool(tool, at) for at, tool in objects(request.tools, "tools")] or None
    choice = request.tool_choice
    fields["tool_choice"] = choice
    if isinstance(choice, dict) and choice.get("type") == "function":
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    if choice == "auto" and not request.tools:
        fields["tool_choice"] = None
    if request.reasoning is not None:
        fields["reasoning_effort"] = request.reasoning.effort
    if request.text is not None and request.text.format is not None:
        form = dict(request.text.format)
        kind = form.pop("type", None)
        fields["response_format"] = {"type": kind} | ({kind: form} if kind == "json_schema" else form)
    return {name: value for name, value in fields.items() if value is not None}


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    if request.instructions:
        out.append({"role": "system", "content": request.instructions})
    items = [{"role": "user", "content": request.input}] if isinstance(request.input, str) else request.input
    if not isinstance(items, list):
        raise RequestError("input must be a string or a list of items", param="input")
    for at, item in objects(items, "input"):
        _take(out, item, at)
    return out


def _take(out: list[dict[str, Any]], item: Mapping[str, Any], at: str) -> None:
    """Add an item to the messages. What the assistant thought, said and called in one turn is one message."""
    kind, role = item.get("type", "message"), item.get("role")
    if kind == "function_call_output":
        text = join_text(item.get("output"), f"{at}.output", _TEXTS)
        out.append({"role": "tool", "tool_call_id": check_text(item.get("call_id"), f"{at}.call_id"), "content": text})
    elif kind == "reasoning":
        thought = item.get("content") or [
            {**as_object(part, f"{at}.summary"), "type": "reasoning_text"} for part in item.get("summary") or []]
        text = join_text(thought, f"{at}.content", ("reasoning_text",))
        turn = _turn(out)
        turn["reasoning_content"] = turn.get("reasoning_content", "") + text
    elif kind == "function_call":
        told = [check_text(item.get(name), f"{at}.{name}") for name in ("call_id", "name", "arguments")]
        _turn(out).setdefault("tool_calls", []).append(function_call(*told))
    elif kind == "message" and role == "assistant":
        _turn(out)["content"] += join_text(item.get("content"), f"{at}.content", _TEXTS)
    elif kind == "message" and role in ("user", "system", "developer"):
        out.append({"role": role, "content": join_text(item.get("content"), f"{at}.content", _TEXTS)})
    elif kind == "message":
        raise RequestError(f"{at}.role must be user, assistant, system or developer, got {role!r:.50}",
                           param=f"{at}.role")
    else:
        raise RequestError(f"{at}.type {kind!r:.50} is not supported", param=f"{at}.type")


def _turn(out: list[dict[str, Any]]) -> dict[str, Any]:
    if not out or out[-1]["role"] != "assistant":
        out.append({"role": "assistant", "content": ""})
    return out[-1]


def _tool(given: Mapping[str, Any], at: str) -> dict[str, Any]:
    if given.get("type") != "function":
        raise RequestError(f"{at}.type {given.get('type')!r:.50} is not supported (only 'function' is)",
                           param=f"{at}.type")
    function = {name: given[name] for name in ("name", "description", "parameters", "strict")
                if given.get(name) is not None}
    return {"type": "function", "function": function}


class ResponsesWriter:
    """One answer, whole or as events. Items: the thought, the message, each call."""

    def __init__(self, request: ResponsesRequest, model: str) -> None:
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()), "model": model,
            "error": None, "instructions": request.instructions, "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {}, "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None, "store": False, "temperature": request.temperature, "top_p": request.top_p,
            "tool_choice": request.tool_choice or "auto", "tools": request.tools or [], "truncation": "disabled",
            "text": {"format": (request.text and request.text.format) or {"type": "text"}},
            "reasoning": {"effort": request.reasoning and request.reasoning.effort, "summary": None},
            "background": False, "user": request.user,
        }
        self.tally = Tally()
        self._items: list[dict[str, Any]] = []
        self._open: Piece | None = None
        self._sequence = 0

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        self.tally.add(completions[0])
        return self._response([_item(piece, piece.text, "completed") for piece in blocks(completions[0])])

    def add(self, event: Event) -> str:
        self.tally.add(event)
        out = []
        if not self._sequence:
            head = {**self._head, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
            out += [self._say("response.created", response=head), self._say("response.in_progress", response=head)]
        for piece in pieces(event):
            if piece.id or self._open is None or self._open.kind != piece.kind:
                out += [*self._close(), *self._begin(piece)]
            if piece.text:
                self._text += piece.text
                out.append(self._say(f"response.{_NAMES[piece.kind]}.delta", **self._at(), delta=piece.text))
        return "".join(out)

    def end(self) -> str:
        closing = "".join(self._close("incomplete" if self.tally.reason is FinishReason.LENGTH else "completed"))
        response = self._response(self._items)
        return closing + self._say(f"response.{response['status']}", response=response)

    def _begin(self, piece: Piece) -> Iterator[str]:
        self._open, self._text = piece, ""
        self._item = _item(piece, "", "in_progress")
        yield self._say("response.output_item.added", output_index=len(self._items), item=self._item)
        if piece.kind != "call":
            yield self._say("response.content_part.added", **self._at(), part=_part(piece.kind, ""))

    def _close(self, status: str = "completed") -> Iterator[str]:
        piece = self._open
        if piece is None:
            return
        done = {"arguments" if piece.kind == "call" else "text": self._text}
        if piece.kind == "call":
            done["name"] = piece.name
        yield self._say(f"response.{_NAMES[piece.kind]}.done", **self._at(), **done)
        if piece.kind != "call":
            yield self._say("response.content_part.done", **self._at(), part=_part(piece.kind, self._text))
        item = _item(piece, self._text, status) | {"id": self._item["id"]}
        yield self._say("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)
        self._open = None

    def _at(self) -> dict[str, Any]:
        """Where a delta belongs."""
        assert self._open is not None
        where = {"item_id": self._item["id"], "output_index": len(self._items)}
        if self._open.kind == "call":
            return where
        return where | {"content_index": 0} | ({"logprobs": []} if self._open.kind == "text" else {})

    def _say(self, kind: str, **body: Any) -> str:
        self._sequence += 1
        if kind.startswith("response.content_part"):
            body.pop("logprobs", None)
        return sse(kind, {"sequence_number": self._sequence - 1, **body})

    def _response(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        usage, cut = self.tally.usage, self.tally.reason is FinishReason.LENGTH
        return {
            **self._head,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": items,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }


_NAMES = {"thinking": "reasoning_text", "text": "output_text", "call": "function_call_arguments"}


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "thinking":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item(piece: Piece, text: str, status: str) -> dict[str, Any]:
    unique, parts = uuid.uuid4().hex, [_part(piece.kind, text)] if text else []
    if piece.kind == "thinking":
        return {"type": "reasoning", "id": f"rs_{unique}", "summary": [], "content": parts, "encrypted_content": None,
                "status": status}
    if piece.kind == "text":
        return {"type": "message", "id": f"msg_{unique}", "role": "assistant", "status": status, "content": parts}
    return {"type": "function_call", "id": f"fc_{unique}", "call_id": piece.id, "name": piece.name, "arguments": text,
            "status": status}
