"""What the server understands, as an OpenAPI document (of which tests/serving_tables.py makes docs/serving.md's)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

import tritium
from tritium.server import messages, protocol, responses

_STRING, _INTEGER = {"type": "string"}, {"type": "integer"}
_TEXT = {"anyOf": [_STRING, {"type": "null"}]}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(item: Any) -> dict[str, Any]:
    return {"type": "array", "items": item}


def _const(value: str) -> dict[str, Any]:
    return {"type": "string", "const": value}


_ENDS = {"enum": ["stop", "length", "tool_calls"]}
_USAGE = _object(prompt_tokens=_INTEGER, completion_tokens=_INTEGER, total_tokens=_INTEGER)
_ERROR = _object(error=_object(message=_STRING, type=_STRING, param=_TEXT, code=_TEXT))
_ANTHROPIC_ERROR = _object(type=_const("error"), error=_object(type=_STRING, message=_STRING))
_CARD = _object(id=_STRING, object=_const("model"), created=_INTEGER, owned_by=_STRING, max_model_len=_INTEGER)
_CHAT = _object(
    id=_STRING, object=_const("chat.completion"), created=_INTEGER, model=_STRING, usage=_USAGE,
    choices=_list(_object(index=_INTEGER, finish_reason=_ENDS,
                          message=_object(role=_const("assistant"), content=_TEXT))))
_COMPLETION = _object(
    id=_STRING, object=_const("text_completion"), created=_INTEGER, model=_STRING, usage=_USAGE,
    choices=_list(_object(index=_INTEGER, finish_reason=_ENDS, text=_STRING)))
_RESPONSE = _object(
    id=_STRING, object=_const("response"), created_at=_INTEGER, model=_STRING, store={"const": False},
    status={"enum": ["completed", "incomplete"]}, output=_list(_object(id=_STRING, type={
        "enum": ["reasoning", "message", "function_call"]})),
    usage=_object(input_tokens=_INTEGER, output_tokens=_INTEGER, total_tokens=_INTEGER))
_MESSAGE = _object(
    id=_STRING, type=_const("message"), role=_const("assistant"), model=_STRING,
    stop_reason={"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]}, stop_sequence=_TEXT,
    content=_list(_object(type={"enum": ["thinking", "text", "tool_use"]})),
    usage=_object(input_tokens=_INTEGER, output_tokens=_INTEGER, cache_read_input_tokens=_INTEGER))
_KEPT = _object(name=_STRING, tokens=_INTEGER, pages=_INTEGER, checkpoints=_INTEGER, bytes=_INTEGER)
_TOKENS = _object(count=_INTEGER, max_model_len=_INTEGER, tokens=_list(_INTEGER))


@dataclass(frozen=True, slots=True)
class Endpoint:
    method: str
    path: str
    route: str
    """The method of `app.Routes` that answers."""
    about: str
    answer: Mapping[str, Any] | None
    """JSON schema of the body of 200; None: plain text."""
    request: tuple[type[BaseModel], ...] = ()
    """One of these."""
    streams: bool = False


ENDPOINTS = (
    Endpoint("POST", "/v1/chat/completions", "chat", "OpenAI's chat completions.",
             _CHAT, (protocol.ChatRequest,), streams=True),
    Endpoint("POST", "/v1/completions", "completions", "OpenAI's text completions.",
             _COMPLETION, (protocol.CompletionRequest,), streams=True),
    Endpoint("POST", "/v1/responses", "responses", "OpenAI's responses; nothing is stored.",
             _RESPONSE, (responses.ResponsesRequest,), streams=True),
    Endpoint("POST", "/v1/messages", "messages", "Anthropic's messages.",
             _MESSAGE, (messages.MessagesRequest,), streams=True),
    Endpoint("POST", "/v1/messages/count_tokens", "count_tokens", "Tokens of a conversation, Anthropic's way.",
             _object(input_tokens=_INTEGER), (messages.CountRequest,)),
    Endpoint("POST", "/tokenize", "tokenize", "Text or a conversation to token ids.",
             _TOKENS, (protocol.TokenizePrompt, protocol.TokenizeChat)),
    Endpoint("POST", "/cache/save", "save_cache", "The prefix cache, or one session of it, into a file.",
             _KEPT, (protocol.SaveCache,)),
    Endpoint("POST", "/cache/load", "load_cache", "A saved cache or session, beside what is in memory.",
             _KEPT, (protocol.NamedCache,)),
    Endpoint("POST", "/cache/flush", "flush_cache", "Forgets all that no request uses; files stay.",
             _object(pages=_INTEGER, checkpoints=_INTEGER), (protocol.FlushCache,)),
    Endpoint("POST", "/detokenize", "detokenize", "Token ids to text.",
             _object(prompt=_STRING), (protocol.DetokenizeRequest,)),
    Endpoint("GET", "/v1/models", "models", "The names of the model; for Anthropic's clients in their form.",
             _object(object=_const("list"), data=_list(_CARD))),
    Endpoint("GET", "/v1/models/{name}", "model", "One of them.", _CARD),
    Endpoint("GET", "/health", "health", "200 when requests are served, 503 when not. Needs no key.",
             _object(status={"enum": ["ok", "draining", "dead"]})),
    Endpoint("GET", "/metrics", "metrics_page", "Numbers in Prometheus' text format.", None),
    Endpoint("GET", "/version", "version", "The version of Tritium.", _object(version=_STRING)),
    Endpoint("GET", "/openapi.json", "openapi", "This list as an OpenAPI document.", {"type": "object"}),
)

_PART = _object(type=_const("text"), text=_STRING)
_CONTENT = {"anyOf": [_STRING, _list(_PART)]}
_SAYS = {"type": "array", "minItems": 1, "items": {
    **_object(role={"enum": ["system", "user", "assistant"]}, content=_CONTENT), "additionalProperties": False}}
_SAYS_ANTHROPIC = {"type": "array", "minItems": 1, "items": {
    **_object(role={"enum": ["user", "assistant"]}, content=_CONTENT), "additionalProperties": False}}
_SCHEMAS: dict[str, Any] = {
    "ChatRequest.messages": _SAYS,
    "TokenizeChat.messages": _SAYS,
    "CountRequest.messages": _SAYS_ANTHROPIC,
    "MessagesRequest.messages": _SAYS_ANTHROPIC,
    "ResponsesRequest.input": {"anyOf": [_STRING, _SAYS]},
    "CompletionRequest.prompt": {"anyOf": [_STRING, _list(_STRING), _list(_INTEGER), _list(_list(_INTEGER))]},
    "*.tools": {"anyOf": [_list({"type": "object"}), {"type": "null"}]},
    "*.stop": {"anyOf": [_STRING, _list(_STRING), {"type": "null"}]},
    "*.system": {"anyOf": [_CONTENT, {"type": "null"}]},
}
"""Of fields that are checked by hand, as far as a schema says it: `*` stands for any model."""


def document() -> dict[str, Any]:
    """The OpenAPI document."""
    schemas: dict[str, Any] = {"Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR}
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, schemas)
    keys = {"bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tritium", "version": tritium.__version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": keys},
        "security": [{}, {"bearer": []}, {"x-api-key": []}],
    }


def _operation(endpoint: Endpoint, schemas: dict[str, Any]) -> dict[str, Any]:
    json_body = {"text/plain": {}} if endpoint.answer is None else {"application/json": {"schema": endpoint.answer}}
    streamed = {"text/event-stream": {"schema": {"type": "object", "required": ["data"]}}} if endpoint.streams else {}
    error = "AnthropicError" if endpoint.path.startswith("/v1/messages") else "Error"
    refusal = {"application/json": {"schema": {"$ref": f"#/components/schemas/{error}"}}}
    health = endpoint.path == "/health"
    operation: dict[str, Any] = {
        "operationId": f"{endpoint.method} {endpoint.path}",
        "summary": endpoint.about,
        "responses": {
            "200": {"description": "The answer.", "content": json_body | streamed},
            **({"503": {"description": "Not serving.", "content": json_body}} if health else {
                "4XX": {"description": "Refused.", "content": refusal},
                "5XX": {"description": "Failed: the engine died, or time ran out.", "content": refusal}}),
        },
    }
    if "{name}" in endpoint.path:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": _STRING}]
    if endpoint.request:
        refs = [{"$ref": f"#/components/schemas/{_register(model, schemas)}"} for model in endpoint.request]
        schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _register(model: type[BaseModel], schemas: dict[str, Any]) -> str:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    for name in schema["properties"]:
        known = _SCHEMAS.get(f"{model.__name__}.{name}", _SCHEMAS.get(f"*.{name}"))
        if known is not None:
            schema["properties"][name] = {**known, **{key: value for key, value in schema["properties"][name].items()
                                                      if key in ("description", "default")}}
    schemas[model.__name__] = schema
    return model.__name__
