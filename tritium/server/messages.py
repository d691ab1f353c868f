"""Anthropic's door: /v1/messages to a chat call, and its events to Anthropic's blocks."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from tritium.api import Completion
from tritium.chat.messages import as_object, is_list, objects
from tritium.chat.tokenizer import check_text
from tritium.core import Event, FinishReason, RequestError
from tritium.server.blocks import Piece, blocks, join_text, pieces, sse
from tritium.server.convert import function_call
from tritium.server.protocol import ModelRequest, Strict
from tritium.server.writers import Tally

_SIGNATURE = "unsigned"
"""Thoughts are not signed here; clients expect something."""
_STOP_REASONS = {FinishReason.STOP: "end_turn", FinishReason.LENGTH: "max_tokens", FinishReason.TOOL_CALLS: "tool_use"}


class Thinking(Strict):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1)
    display: Literal["summarized"] | None = None
    """Thoughts are given whole."""


class OutputConfig(Strict):
    effort: str | None = None
    format: dict[str, Any] | None = None
    """{"type": "json_schema", "schema": ...}: what the answer must be."""


class CountRequest(ModelRequest):
    """What /v1/messages/count_tokens reads."""

    messages: list[Any]
    system: Any = None
    """A string or a list of text blocks."""
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = None
    """Accepted, here and in blocks: the prefix cache needs no marks."""


class MessagesRequest(CountRequest):
    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = None
    top_k: int | None = None
    metadata: Any = None
    service_tier: Any = None


def chat_fields(request: CountRequest) -> dict[str, Any]:
    """The request as fields of a `ChatRequest`: conversation, tools, thinking; sampling where it has any."""
    thinking = request.thinking is not None and request.thinking.type != "disabled"
    fields: dict[str, Any] = {
        "model": request.model,
        "messages": _messages(request),
        "tools": None if request.tools is None else [_tool(tool, at) for at, tool in objects(request.tools, "tools")],
        "chat_template_kwargs": {"enable_thinking": thinking},
    }
    fields |= _choice(request.tool_choice)
    if thinking and request.thinking is not None and request.thinking.budget_tokens is not None:
        fields["thinking_token_budget"] = request.thinking.budget_tokens
    if (output := request.output_config) is not None:
        fields["reasoning_effort"] = output.effort
        if output.format is not None:
            kind, schema = output.format.get("type"), output.format.get("schema")
            if kind != "json_schema":
                raise RequestError("output_config.format.type must be json_schema", param="output_config.format.type")
            fields["response_format"] = {"type": kind, kind: {"name": "answer", "schema": schema}}
    if isinstance(request, MessagesRequest):
        fields |= {name: getattr(request, name) for name in ("max_tokens", "stream", "temperature", "top_p", "top_k")}
        fields["stop"] = request.stop_sequences
    return {name: value for name, value in fields.items() if value is not None}


def _messages(request: CountRequest) -> list[dict[str, Any]]:
    system = join_text(request.system, "system", ("text",))
    out: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for at, message in objects(request.messages, "messages"):
        role, content = message.get("role"), message.get("content")
        if unknown := message.keys() - {"role", "content"}:
            raise RequestError(f"unknown field: {at}.{min(unknown)}", param=f"{at}.{min(unknown)}")
        if role not in ("user", "assistant", "system"):
            raise RequestError(f"{at}.role must be user or assistant, got {role!r:.50}", param=f"{at}.role")
        listed = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not is_list(listed):
            raise RequestError(f"{at}.content must be a string or a list of blocks", param=f"{at}.content")
        if role == "assistant":
            out.append(_assistant(listed, f"{at}.content"))
        else:
            out += _user(role, listed, f"{at}.content")
    if out and out[-1]["role"] == "assistant":
        raise RequestError("messages: the last one is the assistant's, and answers are not continued here",
                           param="messages", hint="end with a user's message")
    return out


def _user(role: str, content: Sequence[Any], where: str) -> list[dict[str, Any]]:
    results, parts = [], []
    for at, block in objects(content, where):
        kind = block.get("type")
        if kind == "tool_result":
            text = join_text(block.get("content"), f"{at}.content", ("text",))
            results.append({"role": "tool", "content": text,
                            "tool_call_id": check_text(block.get("tool_use_id"), f"{at}.tool_use_id")})
        elif kind == "text":
            parts.append({"type": "text", "text": check_text(block.get("text"), f"{at}.text")})
        elif kind in ("image", "document"):
            raise RequestError(f"{at}: messages must be text only", param=at)
        else:
            raise RequestError(f"{at}.type must be text or tool_result, got {kind!r:.50}", param=f"{at}.type")
    texts: Any = parts[0]["text"] if len(parts) == 1 else parts
    return results + ([{"role": role, "content": texts}] if parts or not results else [])


def _assistant(content: Sequence[Any], where: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for at, block in objects(content, where):
        kind = block.get("type")
        if kind == "text":
            message["content"] += check_text(block.get("text"), f"{at}.text")
        elif kind == "thinking":
            message["reasoning_content"] = message.get("reasoning_content", "") + check_text(
                block.get("thinking"), f"{at}.thinking")
        elif kind == "tool_use":
            message.setdefault("tool_calls", []).append(function_call(
                check_text(block.get("id"), f"{at}.id"), check_text(block.get("name"), f"{at}.name"),
                as_object(block.get("input"), f"{at}.input")))
        elif kind != "redacted_thinking":
            raise RequestError(f"{at}.type must be text, thinking or tool_use, got {kind!r:.50}", param=f"{at}.type")
    return message


def _tool(given: Mapping[str, Any], at: str) -> dict[str, Any]:
    if given.get("type") not in (None, "custom"):
        raise RequestError(f"{at}.type {given['type']!r:.50} is not supported (only 'custom' is)", param=f"{at}.type")
    function = {"name": given.get("name"), "description": given.get("description"),
                "parameters": given.get("input_schema"), "strict": given.get("strict")}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _choice(choice: Mapping[str, Any] | None) -> dict[str, Any]:
    if choice is None:
        return {}
    kind = choice.get("type")
    named = {"type": "function", "function": {"name": choice.get("name")}}
    known = {"auto": "auto", "none": "none", "any": "required", "tool": named}
    if not isinstance(kind, str) or kind not in known:
        raise RequestError("tool_choice.type must be auto, any, tool or none", param="tool_choice.type")
    return {"tool_choice": known[kind]} | (
        {"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else {})


class MessagesWriter:
    """One answer, whole or as Anthropic's events."""

    def __init__(self, model: str) -> None:
        self._model = model
        self.tally = Tally()
        self._index = -1
        self._open: str | None = None

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        self.tally.add(completions[0])
        content = [self._block(piece, whole=True) for piece in blocks(completions[0])]
        return self._message(content) | self._end()

    def add(self, event: Event) -> str:
        self.tally.add(event)
        out = ""
        if self._index < 0:
            self._index = 0
            out += sse("message_start", {"message": self._message([])})
        for piece in pieces(event):
            if piece.id or self._open != piece.kind:
                out += self._close() + sse("content_block_start", {
                    "index": self._index, "content_block": self._block(piece, whole=False)})
                self._open = piece.kind
            if piece.text:
                out += self._delta(*_DELTAS[piece.kind], piece.text)
        return out

    def end(self) -> str:
        ended = self._end()
        usage = ended.pop("usage")
        return self._close() + sse("message_delta", {"delta": ended, "usage": usage}) + sse("message_stop", {})

    def _close(self) -> str:
        if self._open is None:
            return ""
        signed = self._delta("signature_delta", "signature", _SIGNATURE) if self._open == "thinking" else ""
        out = signed + sse("content_block_stop", {"index": self._index})
        self._index += 1
        self._open = None
        return out

    def _delta(self, kind: str, name: str, text: str) -> str:
        return sse("content_block_delta", {"index": self._index, "delta": {"type": kind, name: text}})

    def _block(self, piece: Piece, *, whole: bool) -> dict[str, Any]:
        text = piece.text if whole else ""
        if piece.kind == "thinking":
            return {"type": "thinking", "thinking": text, "signature": _SIGNATURE if whole else ""}
        if piece.kind == "text":
            return {"type": "text", "text": text, "citations": None}
        return {"type": "tool_use", "id": piece.id, "name": piece.name, "input": json.loads(text) if whole else {}}

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": self._model,
                "content": content, "stop_reason": None, "stop_sequence": None, "usage": self._usage()}

    def _end(self) -> dict[str, Any]:
        tally = self.tally
        stopped = tally.reason is FinishReason.STOP and isinstance(tally.stop, str)
        reason = "stop_sequence" if stopped else _STOP_REASONS.get(tally.reason or FinishReason.STOP, "end_turn")
        return {"stop_reason": reason, "stop_sequence": tally.stop if stopped else None, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        usage = self.tally.usage
        return {"input_tokens": usage.prompt_tokens - usage.cached_tokens, "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": usage.cached_tokens, "output_tokens": usage.completion_tokens}


_DELTAS = {"thinking": ("thinking_delta", "thinking"), "text": ("text_delta", "text"),
           "call": ("input_json_delta", "partial_json")}
