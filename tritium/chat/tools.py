"""The family's XML tool calls, read from the text as it arrives and typed by the request's JSON schema."""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tritium.chat.stop import overlap
from tritium.chat.tags import END_TOOL_CALL, TOOL_CALL
from tritium.core.stages import ToolCall

_FUNCTION, _END_FUNCTION, _END_PARAMETER = "<function=", "</function>", "</parameter>"

# The newlines before a call separate it from the text; the look-behind keeps the search linear in their number.
_CALL = re.compile(r"(?<!\n)\n*<tool_call>\s*<function=([^<>\n]+)>")
_PARTIAL_FUNCTION = re.compile(r"<function=[^<>\n]*")
_STRAY_END = re.compile(r"\s*</tool_call>")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>\n?")
# A value may mention the closing tag: it is the end only where the call can go on from there.
_VALUE_END = re.compile(r"\n?</parameter>(?=\s*(?:<parameter=|\Z))")


class ToolParser:
    """Text -> pieces of plain text and calls.

    Plain text comes out at once, except newlines and what may still open a call; a call comes out when it is
    complete. Missing or doubled closing tags of an otherwise clear call are forgiven. What is no call after all
    comes out as the text it was; nothing a model writes raises.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        """`schemas`: JSON schema of the arguments of each function, by name."""
        self._schemas = schemas
        self._buffer = ""
        self._scanned = 0
        """Characters of the buffer known not to end the call that it begins with."""
        self._after_call = False

    def push(self, text: str, *, final: bool = False) -> list[tuple[str, ToolCall | None]]:
        """-> what is now certain: (the text as written, the call it is or None); `final` releases the rest."""
        self._buffer += text
        pieces = []
        while (piece := self._next(final)) is not None:
            pieces.append(piece)
        return pieces

    def _next(self, final: bool) -> tuple[str, ToolCall | None] | None:
        if self._after_call and (stray := _STRAY_END.match(self._buffer)):
            self._buffer = self._buffer[stray.end() :]
        opened = _CALL.search(self._buffer)
        if opened is None or opened.start() > 0:
            return self._text(opened.start() if opened else len(self._buffer) if final else self._settled(), final)
        end = self._call_end(opened.end(), final)
        if end is None and not final:
            return None
        arguments = None
        if end is not None:
            arguments = _arguments(self._buffer[opened.end() : end], self._schemas.get(opened[1].strip(), {}))
        if end is None or arguments is None:  # give up the opening tag only: a real call may follow inside
            return self._text(self._buffer.index(TOOL_CALL) + len(TOOL_CALL), final)
        self._after_call = True
        return self._take(end), ToolCall(f"call_{uuid.uuid4().hex[:24]}", opened[1].strip(), arguments)

    def _text(self, end: int, final: bool) -> tuple[str, None] | None:
        if end == 0:
            return None
        text = self._take(end)
        if self._after_call and final and not text.strip("\n"):
            return "", None
        self._after_call = False
        return text, None

    def _take(self, end: int) -> str:
        taken, self._buffer, self._scanned = self._buffer[:end], self._buffer[end:], 0
        return taken

    def _settled(self) -> int:
        """Where the end of the buffer begins that may still belong to a call: newlines, then a partial opening."""
        text = self._buffer
        start = text.rfind(TOOL_CALL)
        rest = text[start + len(TOOL_CALL) :].lstrip()
        if start < 0 or not (_FUNCTION.startswith(rest) or _PARTIAL_FUNCTION.fullmatch(rest)):
            tags = (TOOL_CALL, END_TOOL_CALL) if self._after_call else (TOOL_CALL,)
            start = len(text) - max(overlap(text, tag) for tag in tags)
        return len(text[:start].rstrip("\n"))

    def _call_end(self, start: int, final: bool) -> int | None:
        """Where the call ends whose body begins at `start`: a closing tag right after the function, a parameter or
        nothing (elsewhere it is part of a value). At the very end the tag may be missing."""
        text, at = self._buffer, max(start, self._scanned)
        while (at := text.find(END_TOOL_CALL, at)) >= 0:
            body = text[start:at].rstrip()
            if not body or body.endswith((_END_FUNCTION, _END_PARAMETER)):
                return at + len(END_TOOL_CALL)
            at += len(END_TOOL_CALL)
        self._scanned = max(start, len(text) - len(END_TOOL_CALL) + 1)
        return len(text) if final and text.rstrip().endswith(_END_FUNCTION) else None


def _arguments(body: str, schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments in what follows `<function=NAME>`; None when it is malformed beyond repair."""
    body = body.removesuffix(END_TOOL_CALL).rstrip()
    while body.endswith(_END_FUNCTION):
        body = body.removesuffix(_END_FUNCTION).rstrip()
    properties = _mapping(schema.get("properties"))
    arguments, at = {}, 0
    while body[at:].strip():
        opened = _PARAMETER.match(body, at)
        if opened is None:
            return None
        end, at = _value_span(body, opened.end(), properties)
        name = opened[1].strip()
        declared = properties.get(name, schema.get("additionalProperties"))
        arguments[name] = coerce(body[opened.end() : end], _mapping(declared), schema)
    return arguments


def _value_span(body: str, start: int, properties: Mapping[str, Any]) -> tuple[int, int]:
    """-> (end of the value that begins at `start`, where the next parameter may begin). Without a closing tag a
    value ends where another declared parameter begins a line, or with the call."""
    closed = _VALUE_END.search(body, start)
    limit = closed.start() if closed else len(body)
    names = "|".join(map(re.escape, properties))
    unclosed = names and re.compile(rf"\n\s*<parameter=(?:{names})>").search(body, start, limit)
    if unclosed and _END_PARAMETER not in body[start : unclosed.start()]:
        return unclosed.start(), unclosed.start()
    return (closed.start(), closed.end()) if closed else (limit, limit)


UNFIT = object()
"""What a reader returns for text that is not of its type."""


def coerce(text: str, schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """The value that `text` stands for under a JSON schema; `root` resolves its `$ref`s.

    A plain string stays as it is. Otherwise the allowed types are tried from the narrowest (null, boolean,
    integer, number, object, array) and text that fits none stays a string. Without a declared type only objects
    and arrays are parsed. The template writes True, False and None, so these are read too.
    """
    choices = alternatives(schema, root)
    types = {kind for choice in choices for kind in types_of(choice)}
    literals = [value for choice in choices for value in literals_of(choice)]
    if text in literals:
        return text
    for kind, read in _READERS.items():
        if kind in types and (value := read(text)) is not UNFIT:
            return value
    if types:
        return text
    parsed = parse_json(text)
    if any(type(parsed) is type(value) and parsed == value for value in literals):
        return parsed
    return parsed if isinstance(parsed, (dict, list)) else text


def parse_json(text: str) -> Any:
    """Strict JSON (finite numbers, text that UTF-8 can carry), or `UNFIT` where it is not."""
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return UNFIT
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def _finite(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _refuse(text)


def _read_integer(text: str) -> Any:
    value = _read_number(text)
    return int(value) if value is not UNFIT and value == int(value) else UNFIT


def _read_number(text: str) -> Any:
    value = parse_json(text)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else UNFIT


def _read(kind: type) -> Callable[[str], Any]:
    return lambda text: value if isinstance(value := parse_json(text), kind) else UNFIT


_READERS: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None if text.strip() in ("null", "None") else UNFIT,
    "boolean": lambda text: {"true": True, "false": False}.get(text.strip().lower(), UNFIT),
    "integer": _read_integer,
    "number": _read_number,
    "object": _read(dict),
    "array": _read(list),
}


def alternatives(schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The schema and all that it refers to or combines, each once (a schema may refer to itself)."""
    found, waiting = {}, [schema]
    while waiting:
        schema = waiting.pop()
        if id(schema) in found:
            continue
        found[id(schema)] = schema
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith("#/"):
            target: Any = root
            for key in reference[2:].split("/"):
                target = _mapping(target).get(key.replace("~1", "/").replace("~0", "~"))
            waiting.append(_mapping(target))
        for key in ("anyOf", "oneOf", "allOf"):
            members = schema.get(key)
            waiting.extend(map(_mapping, members if isinstance(members, Sequence) else ()))
    return list(found.values())


def types_of(schema: Mapping[str, Any]) -> list[str]:
    kind = schema.get("type")
    if isinstance(kind, str):
        return [kind]
    if isinstance(kind, Sequence):
        return [k for k in kind if isinstance(k, str)]
    return ["object"] if "properties" in schema else ["array"] if "items" in schema else []


def literals_of(schema: Mapping[str, Any]) -> list[Any]:
    enum = schema.get("enum")
    return (list(enum) if isinstance(enum, Sequence) else []) + ([schema["const"]] if "const" in schema else [])


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
