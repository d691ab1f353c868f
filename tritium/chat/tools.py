"""The family's XML tool calls, read from the text as it arrives and typed by the request's JSON schema."""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tritium.chat.stop import overlap
from tritium.chat.tags import END_TOOL_CALL, TOOL_CALL
from tritium.core.stages import ToolCall, ToolCallDelta

FUNCTION, _END_FUNCTION, _PARAMETER, _END_PARAMETER = "<function=", "</function>", "<parameter=", "</parameter>"

# The newlines before a call separate it from the text; the look-behind keeps the search linear in their number.
_CALL = re.compile(r"(?<!\n)\n*<tool_call>\s*<function=([^<>\n]+)>")
_PARTIAL_FUNCTION = re.compile(r"<function=[^<>\n]*")
_STRAY_END = re.compile(r"(?:\n*</tool_call>)+")
_OPEN = re.compile(r"<parameter=([^<>\n]+)>(\n?)")
_PARTIAL_OPEN = re.compile(r"<parameter=[^<>\n]*")
_LINE_END = re.compile(r"\n[ \t]*\Z")
_WHOLE = re.compile(
    r"\s*(?:<parameter=[^<>\n]+>(?:(?!</?parameter[=>])(?s:.))*</parameter>\s*)*</function>\s*</tool_call>"
)


@dataclass(frozen=True, slots=True)
class Called:
    """A call that ended, and how it was written."""

    call: ToolCall
    written: str


Piece = str | ToolCallDelta | Called


class ToolParser:
    """Text -> pieces of plain text, and calls argument by argument.

    Plain text comes out at once, except newlines and what may still open a call. A call of a known function is
    announced when its first parameter, or its end, begins; from then on it is a call whatever follows: strings come
    out as they are written, other values when they are complete. Missing or doubled closing tags are forgiven. Where
    the text ends inside a call, the call ends: a string as far as it came, any other unfinished value left out. Of a
    parameter that is given twice the first value holds. A call of an unknown function comes out when it is complete.
    What is no call after all comes out as the text it was; nothing a model writes raises.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        """`schemas`: JSON schema of the arguments of each function, by name."""
        self._schemas = schemas
        self._buffer = ""
        self._call: _Call | None = None
        self._calls = 0
        self._after_call = False

    def push(self, text: str, *, final: bool = False) -> list[Piece]:
        """-> what is now certain; `final` releases the rest."""
        self._buffer += text
        pieces: list[Piece] = []
        while True:
            if self._call is None:
                if not self._before_call(final, pieces):
                    return pieces
            else:
                fragments, used = self._call.push(self._buffer, final)
                self._buffer = self._buffer[used:]
                if fragments:
                    pieces.append(ToolCallDelta(self._call.index, arguments="".join(fragments)))
                if not self._call.ended:
                    return pieces
                pieces.append(Called(self._call.call, self._call.written))
                self._call, self._after_call = None, True

    def _before_call(self, final: bool, pieces: list[Piece]) -> bool:
        """Release text, or open a call; False when nothing more is certain."""
        if self._after_call and (stray := _STRAY_END.match(self._buffer)):
            self._buffer = self._buffer[stray.end() :]
        opened = _CALL.search(self._buffer)
        if opened is None or opened.start() > 0:
            end = opened.start() if opened else len(self._buffer) if final else self._settled()
            return self._text(end, final, pieces)
        begins = self._begins(opened, final)
        if begins is None:
            return False
        if not begins:  # give up the opening tag only: a real call may follow inside
            return self._text(self._buffer.index(TOOL_CALL) + len(TOOL_CALL), final, pieces)
        name = opened[1].strip()
        self._call = _Call(self._calls, name, self._schemas.get(name, {}), written=opened[0])
        self._calls += 1
        self._buffer = self._buffer[opened.end() :]
        pieces.append(ToolCallDelta(self._call.index, self._call.call.id, name))
        return True

    def _begins(self, opened: re.Match[str], final: bool) -> bool | None:
        """Whether a call begins that is opened so; None: not known yet."""
        rest = self._buffer[opened.end() :].lstrip()
        if not (_OPEN.match(rest) or rest.startswith((_END_FUNCTION, END_TOOL_CALL))):
            partial = _PARTIAL_OPEN.fullmatch(rest) or _begins_one_of(rest, _PARAMETER, _END_FUNCTION, END_TOOL_CALL)
            return None if partial and not final else False
        if opened[1].strip() in self._schemas:
            return True
        end = self._buffer.find(END_TOOL_CALL, opened.end())
        if end < 0:
            return False if final else None
        return _WHOLE.fullmatch(self._buffer, opened.end(), end + len(END_TOOL_CALL)) is not None

    def _text(self, end: int, final: bool, pieces: list[Piece]) -> bool:
        if end == 0:
            return False
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        if not (self._after_call and final and not text.strip("\n")):
            pieces.append(text)
            self._after_call = False
        return True

    def _settled(self) -> int:
        """Where the end of the buffer begins that may still belong to a call: newlines, then a partial opening."""
        text = self._buffer
        start = text.rfind(TOOL_CALL)
        rest = text[start + len(TOOL_CALL) :].lstrip()
        if start < 0 or not (FUNCTION.startswith(rest) or _PARTIAL_FUNCTION.fullmatch(rest)):
            tags = (TOOL_CALL, END_TOOL_CALL) if self._after_call else (TOOL_CALL,)
            start = len(text) - max(overlap(text, tag) for tag in tags)
        return len(text[:start].rstrip("\n"))


class _Call:
    """A call that has begun: reads what follows `<function=NAME>` and writes its arguments as JSON."""

    def __init__(self, index: int, name: str, schema: Mapping[str, Any], *, written: str) -> None:
        self.index = index
        self.call = ToolCall(f"call_{uuid.uuid4().hex[:24]}", name, {})
        self.ended = False
        self._schema = schema
        self._properties = as_mapping(schema.get("properties"))
        self._written = [written]
        self._parameter: str | None = None
        """Whose value is being read."""
        self._value: list[str] = []
        self._streams: bool | None = None
        """Whether the value is a string for sure, and comes out as it arrives; None: not known yet."""
        self._scanned = 0
        """Characters of the buffer that hold no end of the value."""
        self._mentioned = False
        """Whether the value has a closing tag inside."""
        self._after_function = False

    @property
    def written(self) -> str:
        return "".join(self._written)

    def push(self, text: str, final: bool) -> tuple[list[str], int]:
        """-> (fragments of JSON, characters of `text` that were used)."""
        out: list[str] = []
        used = 0
        while not self.ended:
            step = self._between if self._parameter is None else self._inside
            more = step(text[used:] if used else text, final, out)
            if more is None:
                break
            used += more
        self._written.append(text[:used])
        return out, used

    def _between(self, text: str, final: bool, out: list[str]) -> int | None:
        """Characters up to and with the next tag; None: more text is needed."""
        rest = text.lstrip()
        space = len(text) - len(rest)
        if not self._after_function and (opened := _OPEN.match(rest)):
            if opened.end() == len(rest) and not opened[2] and not final:
                return None
            self._open(opened[1].strip())
            return space + opened.end()
        for tag in (END_TOOL_CALL, _END_FUNCTION, _END_PARAMETER):
            if rest.startswith(tag):
                self._after_function |= tag == _END_FUNCTION
                return space + len(tag) + (self._end(out) if tag == END_TOOL_CALL else 0)
        partial = _begins_one_of(rest, END_TOOL_CALL, _END_FUNCTION, _END_PARAMETER)
        if not self._after_function:
            partial = partial or _begins_one_of(rest, _PARAMETER) or _PARTIAL_OPEN.fullmatch(rest) is not None
        if partial:
            return len(text) + self._end(out) if final else None
        return self._end(out)

    def _inside(self, text: str, final: bool, out: list[str]) -> int | None:
        """Characters of the value that are certain, with its closing tag where that has come."""
        while (at := text.find("<", self._scanned)) >= 0:
            length = self._closing(text, at, final)
            if length is None:
                break
            if length >= 0:
                end = _LINE_END.search(text[:at]) if length == 0 else None
                value = text[: end.start()] if end else text[:at].removesuffix("\n")
                self._take(value, out)
                self._close(out, cut=False)
                return at + length
            self._mentioned |= text.startswith(_END_PARAMETER, at)
            self._scanned = at + 1
        if final:
            self._take(text.removesuffix("\n"), out)
            self._close(out, cut=True)
            return len(text) + self._end(out)
        sure = text if at < 0 else text[:at]
        line_end = _LINE_END.search(sure, max(0, len(sure) - 256))
        settled = line_end.start() if line_end else len(sure)
        if settled == 0:
            return None
        self._take(text[:settled], out)
        self._scanned = max(0, self._scanned - settled)
        return settled

    def _closing(self, text: str, at: int, final: bool) -> int | None:
        """Length of the tag that ends the value at `at` (0 for the next parameter); -1: it goes on; None: more text is
        needed. A value may mention tags: they end it only where the call can go on from there."""
        if text.startswith(_END_PARAMETER, at):
            rest = text[at + len(_END_PARAMETER) :].lstrip()
            while rest.startswith(_END_PARAMETER):
                rest = rest[len(_END_PARAMETER) :].lstrip()
            return _followed(rest, len(_END_PARAMETER), final, _PARAMETER, _END_FUNCTION, END_TOOL_CALL, _END_PARAMETER)
        if text.startswith(_END_FUNCTION, at):
            return _followed(text[at + len(_END_FUNCTION) :].lstrip(), 0, final, END_TOOL_CALL, _END_FUNCTION)
        if text.startswith(END_TOOL_CALL, at):
            return _followed(text[at + len(END_TOOL_CALL) :].lstrip(), 0, final, TOOL_CALL)
        rest = text[at : at + 512]
        if opened := _OPEN.match(rest):
            starts_line = _LINE_END.search(text[max(0, at - 256) : at])
            return 0 if opened[1].strip() in self._properties and starts_line and not self._mentioned else -1
        tags = (_PARAMETER, _END_PARAMETER, _END_FUNCTION, END_TOOL_CALL)
        if not (_begins_one_of(rest, *tags) or _PARTIAL_OPEN.fullmatch(rest)):
            return -1
        if final:  # cut off in its closing tag
            return len(rest) if _END_PARAMETER.startswith(rest) and len(rest) > 1 else -1
        return None

    def _open(self, name: str) -> None:
        self._parameter, self._value, self._scanned, self._mentioned = name, [], 0, False
        choices = alternatives(self._declared, self._schema)
        kinds = {kind for choice in choices for kind in types_of(choice)}
        # Of what has no type only objects and arrays are parsed.
        self._streams = kinds == {"string"} if kinds or any(map(literals_of, choices)) else None

    @property
    def _declared(self) -> Mapping[str, Any]:
        assert self._parameter is not None
        return as_mapping(self._properties.get(self._parameter, self._schema.get("additionalProperties")))

    def _take(self, text: str, out: list[str]) -> None:
        if not text:
            return
        self._value.append(text)
        if self._streams is None and (head := text.lstrip()):
            self._streams = head[0] not in "{["
            text = "".join(self._value) if self._streams else text
        elif self._streams and len(self._value) > 1 and not self._repeated:
            out.append(_inner(text))
            return
        if self._streams and not self._repeated:
            out.append(f'{self._key()}"{_inner(text)}')

    def _close(self, out: list[str], *, cut: bool) -> None:
        assert self._parameter is not None
        value = "".join(self._value)
        if not self._repeated:
            if self._streams:
                out.append('"' if value else f'{self._key()}""')
                self.call.arguments[self._parameter] = value
            elif not cut:
                typed = coerce(value, self._declared, self._schema)
                out.append(self._key() + json.dumps(typed, ensure_ascii=False))
                self.call.arguments[self._parameter] = typed
        self._parameter = None

    def _key(self) -> str:
        return f"{', ' if self.call.arguments else '{'}{json.dumps(self._parameter, ensure_ascii=False)}: "

    @property
    def _repeated(self) -> bool:
        return self._parameter in self.call.arguments

    def _end(self, out: list[str]) -> int:
        out.append("}" if self.call.arguments else "{}")
        self.ended = True
        return 0


def _followed(rest: str, length: int, final: bool, *tags: str) -> int | None:
    """`length` where `rest` begins with one of the tags; -1 where it does not; None where that is not known yet."""
    if rest.startswith(tags):
        return length
    if _begins_one_of(rest, *tags):
        return length if final else None
    return -1


def _inner(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _begins_one_of(text: str, *tags: str) -> bool:
    """Whether a text is the beginning of a tag, short of all of it."""
    return any(tag.startswith(text) and len(text) < len(tag) for tag in tags)


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
                target = as_mapping(target).get(key.replace("~1", "/").replace("~0", "~"))
            waiting.append(as_mapping(target))
        for key in ("anyOf", "oneOf", "allOf"):
            members = schema.get(key)
            waiting.extend(map(as_mapping, members if isinstance(members, Sequence) else ()))
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


def as_mapping(value: Any) -> Mapping[str, Any]:
    """`value`, or nothing where it is no mapping: schemas may hold anything."""
    return value if isinstance(value, Mapping) else {}
