"""Grammars for llguidance: of a structured answer, and of the family's XML tool calls typed by their JSON schemas.

JSON is written as the family's template writes it, on one line with ", " and ": ", so that it reads the same when it
comes back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tritium.chat.constraint import Grammars
from tritium.chat.tags import END_TOOL_CALL, TOOL_CALL
from tritium.chat.tools import alternatives, as_mapping, literals_of, types_of
from tritium.core.errors import RequestError

MAX_DEPTH = 64
"""Levels of a schema."""
MAX_BYTES = 2**17
"""Of a schema, a regular expression or a grammar."""
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_LENIENT = _STYLE | {"lenient": True, "coerce_one_of": True}
_ROOT_KEYS = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_NOTES = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated", "strict"}
_FORMATS = {
    "date": "[0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
            "|02-(0[1-9]|1[0-9]|2[0-8]))",
    "time": "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])",
    "uuid": "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "email": "[a-zA-Z0-9_+-]{1,32}(\\.[a-zA-Z0-9_+-]{1,32}){0,3}@[a-zA-Z0-9]{1,32}(\\.[a-zA-Z]{2,16}){1,3}",
    "ipv4": "((25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])\\.){3}(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])",
}
_FORMATS["date-time"] = f"{_FORMATS['date']}T{_FORMATS['time']}"
_END = "\n</parameter>\n"
_TEXT = r"/(?s:.*)/ & ~/(?s:.*)(<\/parameter>|<parameter=|<\/function>)(?s:.*)/"
"""A value as the parser reads it back: without what would end it."""


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """What a whole answer must be. `param`: the field of the request that says so."""

    kind: Literal["json", "regex", "choice", "grammar"]
    value: Any
    """A JSON schema; a regular expression; strings; a grammar in Lark's or GBNF's notation."""
    param: str = "response_format"


@dataclass(frozen=True, slots=True)
class ToolRules:
    """How the tools may be called."""

    required: bool = False
    """The answer is a call and nothing else."""
    name: str | None = None
    """The only function to call."""
    parallel: bool = True
    """Whether there may be several calls."""


def answer_grammar(grammars: Grammars, form: AnswerFormat | None, tools: Sequence[Mapping[str, Any]] = (),
                   rules: ToolRules | None = None) -> str | None:
    """Of an answer of that form, of a call of checked `tools`, or of either; None where nothing is to be enforced: no
    form, no call required, several allowed, and no tool strict. Compiled already.

    Raises `RequestError` saying what cannot be held."""
    if not tools:
        return None if form is None else _format_grammar(form, grammars)
    functions, rules = [tool["function"] for tool in tools], rules or ToolRules()
    must = rules.required or rules.name is not None
    if not (form or must or not rules.parallel or any(f.get("strict") for f in functions)):
        return None
    if form is None or must:
        said = "said: SAID\nSAID: /(?s:.+)/ & ~/(?s:.*)<tool_call>(?s:.*)/"
    elif form.kind == "grammar":
        raise RequestError(f"{form.param}: a grammar does not go with tools", param=form.param)
    else:
        _format_grammar(form, grammars)
        said = f"said: {_format_rule(form)}"
    calls, lines = _call_rules(functions, rules, grammars)
    start = calls if must else f"said | {calls}" if form else f"said? ({calls})?"
    grammar = "\n".join([f"start: {start}", *([] if must else [said]), *lines])
    try:
        grammars.compile(grammar)
    except RequestError as error:
        raise RequestError(f"tools: {error.message}", param="tools") from None
    return grammar


def _call_rules(
    functions: Sequence[Mapping[str, Any]], rules: ToolRules, grammars: Grammars
) -> tuple[str, list[str]]:
    """-> (the calls of an answer, the rules that this needs)."""
    tags = [grammars.tokenizer.token_id(tag) for tag in (TOOL_CALL, END_TOOL_CALL)]
    if None in tags:
        raise RequestError("calls cannot be enforced: the tokenizer has no token for <tool_call>", param="tool_choice")
    if rules.name and rules.name not in (function["name"] for function in functions):
        raise RequestError(f"tool_choice names {rules.name!r}, which is not among the tools", param="tool_choice")
    lines, names = [], []
    for i, function in enumerate(functions):
        if rules.name in (None, function["name"]):
            lines += _Function(i, function, grammars).lines()
            names.append(f"f{i}")
    calls = 'call ("\\n" call)*' if rules.parallel and rules.name is None else "call"
    return calls, [f"call: <[{tags[0]}]> ({' | '.join(names)}) <[{tags[1]}]>", *lines]


def _format_grammar(form: AnswerFormat, grammars: Grammars) -> str:
    """The grammar of a form alone, compiled."""
    from llguidance import grammar_from

    value, param = form.value, form.param
    check_size(value, param)
    if form.kind == "json":
        return _schema_grammar(value, param, grammars)
    if form.kind == "choice" and (not isinstance(value, list) or not value):
        raise RequestError(f"{param} must be a list of strings", param=param)
    for text in value if form.kind == "choice" else [value]:
        if not isinstance(text, str):
            raise RequestError(f"{param} must be a string, got {type(text).__name__}", param=param)
    try:
        grammar = grammar_from("grammar", value) if form.kind == "grammar" else f"start: {_format_rule(form)}"
        grammars.compile(grammar)
    except (RequestError, ValueError) as error:
        raise RequestError(f"{param}: {_message(error)}", param=param) from None
    return grammar


def _format_rule(form: AnswerFormat) -> str:
    """The right side of a rule."""
    from llguidance import regex_to_lark

    if form.kind == "json":
        return f"%json {json.dumps({**_as_object(form.value), 'x-guidance': _STYLE})}"
    if form.kind == "regex":
        return f"/{regex_to_lark(form.value)}/"
    return " | ".join(_quote(text) for text in form.value)


class _Function:
    """The rules of one function's call: its parameters in the order of the schema, then the others required."""

    def __init__(self, index: int, function: Mapping[str, Any], grammars: Grammars) -> None:
        self._index = index
        self._name = function["name"]
        self._schema: Mapping[str, Any] = function.get("parameters") or {}
        self._strict = bool(function.get("strict"))
        self._where = f"tools[{index}].function.parameters"
        self._grammars = grammars
        self._lines: list[str] = []

    def lines(self) -> list[str]:
        schema = self._schema
        check_size(schema, self._where)
        known = _ROOT_KEYS | _NOTES
        if self._strict and (odd := [key for key in schema if key not in known]):
            raise RequestError(f"{self._where}.{odd[0]} is not supported in a strict tool", param=self._where)
        properties = as_mapping(schema.get("properties"))
        required = [name for name in _list(schema.get("required")) if isinstance(name, str)]
        parts = [_quote(f"\n<function={self._name}>\n")]
        for i, name in enumerate([*properties, *(name for name in required if name not in properties)]):
            if any(symbol in name for symbol in "<>\n") or name != name.strip():
                raise RequestError(f"{self._where}.properties has a name that no call can spell: {name!r}",
                                   param=self._where)
            value = self._value(i, as_mapping(properties.get(name)), f"{self._where}.properties.{name}")
            parts.append(f"({_quote(f'<parameter={name}>{chr(10)}')} {value}){'' if name in required else '?'}")
        if schema and "properties" not in schema and schema.get("additionalProperties", True) is not False:
            self._lines.append(f'{self._rule("any")}: "<parameter=" /[a-zA-Z_][a-zA-Z0-9_]*/ ">\\n" '
                               f"{self._text('ANY', ())}")
            parts.append(f"{self._rule('any')}*")
        return [f"f{self._index}: {' '.join(parts)} {_quote('</function>' + chr(10))}", *self._lines]

    def _value(self, i: int, schema: Mapping[str, Any], where: str) -> str:
        """A rule for the value and what closes it: strings as they are, everything else as JSON."""
        choices: list[str] = []
        texts, others = _split(schema, self._schema)
        kinds = {kind for other in others for kind in types_of(other)}
        apart = bool(kinds - {"null", "boolean"}) or any(map(literals_of, others))
        for k, text in enumerate(texts):
            spelled = [value for value in literals_of(text) if isinstance(value, str)]
            choices += [_quote(value + _END) for value in spelled]
            if not spelled:
                choices.append(self._text(f"T{i}_{k}", self._limits(text, where), apart=apart))
        if others:
            choices.append(self._json(i, others, where))
        self._lines.append(f"{self._rule(i)}: {' | '.join(choices)}")
        return self._rule(i)

    def _json(self, i: int, others: list[Mapping[str, Any]], where: str) -> str:
        shared = {key: self._schema[key] for key in ("$defs", "definitions") if key in self._schema}
        schema = {**shared, **(others[0] if len(others) == 1 else {"anyOf": others})}
        _schema_grammar(schema, where, self._grammars, lenient=not self._strict)
        schema["x-guidance"] = _STYLE if self._strict else _LENIENT
        self._lines.append(f"{self._rule(f'j{i}')}: %json {json.dumps(schema)}")
        return f"{self._rule(f'j{i}')} {_quote(_END)}"

    def _limits(self, schema: Mapping[str, Any], where: str) -> tuple[str, ...]:
        """Regular expressions, in Lark's spelling, that a plain string must match."""
        from llguidance import regex_to_lark

        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        found = [f"/(?s:.{{{least},{most}}})/"] if least or most != "" else []
        if isinstance(pattern := schema.get("pattern"), str):
            begins = pattern.startswith("^")
            body = f"({pattern[1:].removesuffix('$')})" if begins else f"(?s:.*)({pattern})"
            found.append(f"/{regex_to_lark(body + ('' if begins and pattern.endswith('$') else '(?s:.*)'))}/")
        form = schema.get("format")
        if form in _FORMATS:
            found.append(f"/{regex_to_lark(_FORMATS[form])}/")
        if self._strict:
            known = {"type", "enum", "const", "minLength", "maxLength", "pattern", "format"} | _NOTES
            odd = [key for key in schema if key not in known]
            if odd or form not in {None, *_FORMATS}:
                what = f"{odd[0]}" if odd else f"format {form}"
                raise RequestError(f"{where}: {what} is not supported for a string in a strict tool", param=self._where)
        return tuple(found)

    def _text(self, name: str, limits: Sequence[str], *, apart: bool = False) -> str:
        """A terminal for a plain string; `apart` from what would be read as a number, an object or an array."""
        name = f"P{self._index}_{name}"
        rules = [_TEXT, *limits, *([r"~/\s*[-0-9\[{](?s:.*)/"] if apart else [])]
        self._lines.append(f"{name}: ({' & '.join(rules)}) {_quote(_END)}")
        return name

    def _rule(self, i: int | str) -> str:
        return f"p{self._index}_{i}"


def _split(
    schema: Mapping[str, Any], root: Mapping[str, Any]
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Alternatives of a value: those that are plain strings, and the others."""
    if not schema or not (types_of(schema) or schema.keys() & {"$ref", "anyOf", "oneOf", "allOf", "enum", "const"}):
        return [schema], []
    texts: list[Mapping[str, Any]] = []
    others: list[Mapping[str, Any]] = []
    for choice in _choices(schema, root):
        types, literals = types_of(choice), literals_of(choice)
        if "string" in types or any(isinstance(value, str) for value in literals):
            words = [value for value in literals if isinstance(value, str)]
            texts.append({**choice, "type": "string", **({"enum": words} if literals else {})})
            if rest := [kind for kind in types if kind != "string"]:
                others.append({**choice, "type": rest})
            elif numbers := [value for value in literals if not isinstance(value, str)]:
                others.append({"enum": numbers})
        else:
            others.append(choice)
    return texts, others


def _choices(
    schema: Mapping[str, Any], root: Mapping[str, Any], above: tuple[int, ...] = ()
) -> Iterator[Mapping[str, Any]]:
    """The members of a union, references followed; a schema that is none is itself, as is one that holds itself."""
    if id(schema) in above:
        yield schema
        return
    above += (id(schema),)
    members = schema.get("anyOf", schema.get("oneOf"))
    if isinstance(members, list) and members and schema.keys() - _NOTES <= {"anyOf", "oneOf"}:
        for member in members:
            yield from _choices(as_mapping(member), root, above)
    elif "$ref" in schema and len(resolved := alternatives(schema, root)) > 1 and resolved[1] is not schema:
        target = resolved[1]
        if "$ref" in target:  # a chain of references: left to the library
            yield schema
        else:
            yield from _choices(target, root, above)
    else:
        yield schema


def _schema_grammar(schema: Any, param: str, grammars: Grammars, *, lenient: bool = False) -> str:
    from llguidance import LLMatcher

    if not isinstance(schema, (dict, bool)):
        raise RequestError(f"{param} must be a JSON schema, got {type(schema).__name__}", param=param)

    def compiled(part: Any) -> str:
        body = json.dumps(_as_object(part))
        grammar = LLMatcher.grammar_from_json_schema(body, overrides=_LENIENT if lenient else _STYLE)  # type: ignore
        grammars.compile(grammar)
        return grammar

    try:
        return compiled(schema)
    except (RequestError, ValueError) as error:
        path, message = _culprit(schema, schema, error, compiled)
        raise RequestError(f"{'.'.join([param, *path])}: {message}", param=param,
                           hint="leave it out, or check it in the client") from None


def _culprit(schema: Any, root: Any, error: Exception, compiled: Callable[[Any], str]) -> tuple[list[str], str]:
    """The innermost part of a schema that does not compile by itself, and why."""
    shared = {key: root[key] for key in ("$defs", "definitions") if key in as_mapping(root)}
    for path, part in _parts(schema):
        try:
            compiled({**part, **(shared if path[0] not in shared else {})})
        except (RequestError, ValueError) as inner:
            if path[0] in shared or _message(inner) == _message(error):
                below, message = _culprit(part, root, inner, compiled)
                return [*path, *below], message
    return [], _message(error)


def _message(error: Exception) -> str:
    return error.message if isinstance(error, RequestError) else str(error).splitlines()[0]


def _as_object(schema: Any) -> Any:
    """A schema with room for options: `true` and `false` as the member of a union. Times have at most six digits after
    the second: the library's own form has no end."""
    if isinstance(schema, bool):
        return {"anyOf": [schema]}
    whole = json.loads(json.dumps(schema))
    waiting = [whole]
    while waiting:
        part = waiting.pop()
        waiting += [inner for _, inner in _parts(part)]
        if part.get("format") in ("time", "date-time") and "pattern" not in part:
            part["pattern"] = f"^{_FORMATS[part.pop('format')]}$"
    return whole


def _parts(schema: Any) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
    for key in ("properties", "patternProperties", "$defs", "definitions"):
        for name, part in as_mapping(as_mapping(schema).get(key)).items():
            if isinstance(part, Mapping):
                yield [key, name], part
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        for i, part in enumerate(_list(as_mapping(schema).get(key))):
            if isinstance(part, Mapping):
                yield [f"{key}[{i}]"], part
    for key in ("items", "additionalProperties"):
        if isinstance(part := as_mapping(schema).get(key), Mapping):
            yield [key], part


def check_size(value: Any, param: str) -> None:
    """Refuses what is too large or nested too deeply to be worth compiling."""
    level, depth = [value], 0
    while level:
        depth += 1
        level = [inner for outer in level for inner in
                 (outer.values() if isinstance(outer, Mapping) else outer if isinstance(outer, list) else ())]
        if depth > MAX_DEPTH:
            raise RequestError(f"{param} is nested more than {MAX_DEPTH} levels deep", param=param)
    if len(json.dumps(value)) > MAX_BYTES:
        raise RequestError(f"{param} is larger than {MAX_BYTES} bytes", param=param)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
