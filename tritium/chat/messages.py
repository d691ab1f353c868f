"""OpenAI-shaped messages and tools, checked before the template sees them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from tritium.chat.tokenizer import check_text
from tritium.chat.tools import UNFIT, parse_json
from tritium.core.errors import RequestError, one_line

ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning"})
_ASSISTANT_FIELDS = ("tool_calls", "reasoning_content", "reasoning")
_MEDIA_PARTS = ("image", "image_url", "video", "video_url")


def check_messages(messages: object) -> list[dict[str, Any]]:
    """Messages as a template wants them: developer as system, reasoning as `reasoning_content`, arguments of tool
    calls as mappings.

    Raises `RequestError`, its `param` like `messages[2].content`, for an unknown role or field, a wrong type,
    missing content, arguments that are no JSON object, a lone surrogate.
    """
    if not is_list(messages):
        raise RequestError("messages must be a list of messages", param="messages")
    if not messages:
        raise RequestError("messages must not be empty", param="messages", hint="send at least one user message")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def check_tools(tools: object) -> list[dict[str, Any]]:
    """Tools in OpenAI's form, `{"type": "function", "function": {"name": ..., "parameters": {...}}}`, unchanged.

    Raises `RequestError`, its `param` like `tools[0].function.name`.
    """
    if tools is None:
        return []
    if not is_list(tools):
        raise RequestError("tools must be a list", param="tools")
    for where, tool in objects(tools, "tools"):
        function = as_object(tool.get("function"), f"{where}.function")
        if tool.get("type", "function") != "function":
            raise RequestError(f"{where}.type must be function, got {tool['type']!r}", param=f"{where}.type")
        if not check_text(function.get("name"), f"{where}.function.name"):
            raise RequestError(f"{where}.function.name must not be empty", param=f"{where}.function.name")
        if function.get("parameters") is not None:
            as_object(function["parameters"], f"{where}.function.parameters")
        _check_json(tool, where)
    return [dict(tool) for tool in tools]


def schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Name -> JSON schema of the arguments, of checked tools."""
    return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}


def images_in(messages: object) -> bool:
    """Whether any part of the messages is an image or a video."""
    contents = [m.get("content") for m in messages if isinstance(m, Mapping)] if is_list(messages) else []
    parts = [part for content in contents if is_list(content) for part in content if isinstance(part, Mapping)]
    return any(part.get("type") in _MEDIA_PARTS or any(kind in part for kind in _MEDIA_PARTS) for part in parts)


def check_variables(variables: object) -> dict[str, Any]:
    """Extra variables of the template. Raises `RequestError` for no JSON object, or one with a reserved name."""
    given = dict(as_object(variables, "chat_template_kwargs"))
    for name in ("messages", "tools", "documents", "add_generation_prompt"):
        if name in given:
            raise RequestError(f"chat_template_kwargs must not set {name}", param=f"chat_template_kwargs.{name}")
    _check_json(given, "chat_template_kwargs")
    return given


def _message(message: object, where: str) -> dict[str, Any]:
    given = {key: value for key, value in as_object(message, where).items() if value is not None}
    role = given.get("role")
    if role not in ROLES:
        known = f"must be one of {', '.join(ROLES)}"
        what = f"is missing, {known}" if role is None else f"{known}, got {role!r:.50}"
        raise RequestError(f"{where}.role {what}", param=f"{where}.role")
    for key, value in given.items():
        if key not in _FIELDS and value not in ("", [], {}):  # clients send back what they got, empty fields too
            raise RequestError(f"{where}.{key} is not supported", param=f"{where}.{key}")
        if key in _ASSISTANT_FIELDS and value and role != "assistant":
            raise RequestError(f"{where}.{key} belongs to assistant messages only", param=f"{where}.{key}")
    result: dict[str, Any] = {"role": "system" if role == "developer" else role}
    for key in ("name", "tool_call_id"):
        if key in given:
            result[key] = check_text(given[key], f"{where}.{key}")
    key = "reasoning_content" if "reasoning_content" in given else "reasoning"
    if key in given:
        result["reasoning_content"] = check_text(given[key], f"{where}.{key}")
    if given.get("tool_calls"):
        result["tool_calls"] = _tool_calls(given["tool_calls"], f"{where}.tool_calls")
    if "content" not in given and not result.get("tool_calls") and "reasoning_content" not in result:
        raise RequestError(f"{where}.content is missing", param=f"{where}.content")
    result["content"] = _content(given.get("content", ""), f"{where}.content")
    return result


def _content(content: object, where: str) -> str | list[dict[str, Any]]:
    if not is_list(content):
        if not isinstance(content, str):
            got = type(content).__name__
            raise RequestError(f"{where} must be a string or a list of parts, got {got}", param=where)
        return check_text(content, where)
    parts = []
    for at, part in objects(content, where):
        kind = part.get("type")
        if kind == "text":
            check_text(part.get("text"), f"{at}.text")
        elif kind not in _MEDIA_PARTS:
            known = f"must be one of text, {', '.join(_MEDIA_PARTS)}"
            raise RequestError(f"{at}.type {known}, got {kind!r:.50}", param=f"{at}.type")
        _check_json(part, at)
        parts.append(dict(part))
    return parts


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    if not is_list(calls):
        raise RequestError(f"{where} must be a list", param=where)
    result = []
    for at, call in objects(calls, where):
        function = as_object(call.get("function"), f"{at}.function")
        check_text(function.get("name"), f"{at}.function.name")
        arguments = _call_arguments(function.get("arguments"), f"{at}.function.arguments")
        result.append({**call, "function": {**function, "arguments": arguments}})
        _check_json(result[-1], at)
    return result


def _call_arguments(arguments: object, where: str) -> Mapping[str, Any]:
    if arguments is None or arguments == "":  # what some clients send for a call without arguments
        return {}
    value = parse_json(check_text(arguments, where)) if isinstance(arguments, str) else arguments
    if value is UNFIT:
        raise RequestError(f"{where} is not valid JSON", param=where, hint="send a JSON object as a string")
    return as_object(value, where)


def as_object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        what = "is missing" if value is None else f"must be an object, got {type(value).__name__}"
        raise RequestError(f"{where} {what}", param=where)
    return value


def objects(values: Sequence[Any], where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each object of a list, and where it stands."""
    for i, value in enumerate(values):
        yield f"{where}[{i}]", as_object(value, f"{where}[{i}]")


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _check_json(value: object, where: str) -> None:
    """Refuses what JSON or UTF-8 cannot carry, wherever it is nested."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError(f"{where} has a lone surrogate", param=where, hint="send valid Unicode") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {one_line(error)}", param=where) from error
