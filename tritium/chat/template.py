"""The checkpoint's chat template, rendered by Jinja in a sandbox."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tritium.core.errors import CheckpointError, RequestError, one_line

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTemplate:
    """A template in Hugging Face's dialect: trimmed blocks, `raise_exception`, plain `tojson`, `strftime_now`.

    The sandbox keeps templates from Python's internals, from changing their input and from ranges above 100,000.
    """

    def __init__(self, source: str, *, origin: str = "chat template", tool_source: str | None = None) -> None:
        """`tool_source`: the template to use where there are tools. Raises `CheckpointError` with the line for a
        template that does not parse."""
        self._plain = _compile(source, origin)
        self._with_tools = self._plain if tool_source is None else _compile(tool_source, origin)
        self.names = _names(source) | _names(tool_source or "")
        """Variables that it reads."""
        self.source = source + (tool_source or "")
        self.variables: Mapping[str, Any] = {}
        """Defaults that a call may override (special tokens)."""

    def render(self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None, add_generation_prompt: bool,
               variables: Mapping[str, Any]) -> str:
        """The prompt. Raises `RequestError` with the template's own words when it refuses the messages, and with
        its line when it fails on them."""
        template = self._with_tools if tools else self._plain
        given = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return template.render({**self.variables, **variables, **given, "documents": None})
        except _RefusedError as error:
            raise RequestError(one_line(error), param="messages") from None
        except Exception as error:  # a template can fail in every way that Python can
            said = f"the chat template fails on these messages{_line_of(error)}: {one_line(error)}"
            raise RequestError(said, param="messages") from error


def load_template(directory: Path) -> ChatTemplate | None:
    """From `chat_template.jinja`, else `tokenizer_config.json`; None when there is none.

    Raises `CheckpointError` for files that cannot be read and templates that do not parse.
    """
    config = _read_config(directory / "tokenizer_config.json")
    path, tool_source = directory / "chat_template.jinja", None
    source: Any
    if path.is_file():
        source = _read(path)
    else:
        path, source = directory / "tokenizer_config.json", config.get("chat_template")
        if isinstance(source, list):
            named = {entry["name"]: entry["template"] for entry in source if _is_named(entry)}
            source, tool_source = named.get("default", next(iter(named.values()), None)), named.get("tool_use")
        if source is None:
            return None
        if not isinstance(source, str):
            raise CheckpointError(f"chat_template in {path} must be a string or a list of named templates")
    template = ChatTemplate(source, origin=str(path), tool_source=tool_source)
    tokens = {name: config.get(name) for name in _SPECIAL_TOKENS}
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    template.variables = {name: value for name, value in tokens.items() if isinstance(value, str)}
    return template


class _RefusedError(Exception):
    """What `raise_exception` raises."""


def _names(source: str) -> frozenset[str]:
    return frozenset(find_undeclared_variables(_environment().parse(source)))


def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])


def _compile(source: str, origin: str) -> jinja2.Template:
    environment = _environment()
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"{origin}, line {error.lineno}: {one_line(error)}") from error
    except RecursionError as error:
        raise CheckpointError(f"{origin} is nested too deeply") from error


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """JSON as it is: Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _line_of(error: BaseException) -> str:
    """The template's line in a traceback, which Jinja rewrites to it."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    return f" (line {lines[-1]})" if lines else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}", hint="fetch the file again") from error


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {one_line(error)}", hint="fetch the file again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return config


def _is_named(entry: object) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template"))
