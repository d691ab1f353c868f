"""What a request may say. A field is honoured, harmless at the value given, or refused by name; never ignored.

Accepted without effect, because they do not bear on what is generated: user, metadata, service_tier,
safety_identifier, prompt_cache_key, prompt_cache_retention, store=false.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json, to_json

from tritium.core import RequestError
from tritium.core.sampling_params import MAX_LOGPROBS


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: Literal[False] | None = None
    include_obfuscation: Literal[False] | None = None


class ModelRequest(Strict):
    model: str | None = None


class SamplingFields(ModelRequest):
    """Fields that chat and text completions share. None: not given, so the checkpoint's default holds."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Any = None
    """A string or a list of strings."""

    # Not OpenAI's; names and meanings as in vLLM.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    priority: int = 0

    user: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None


class Conversation(Strict):
    """What the chat template reads; `tritium.chat` checks messages, tools and the template's arguments."""

    messages: Any
    tools: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True


class ChatRequest(Conversation, SamplingFields):
    tool_choice: Any = None
    """auto, none, required, or {"type": "function", "function": {"name": ...}}."""
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    """For templates that read it; "none" turns thinking off in any that can."""
    thinking_token_budget: int | None = Field(default=None, ge=0)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)


class CompletionRequest(SamplingFields):
    prompt: Any
    """A string, a list of strings, token ids, or a list of lists of token ids."""
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True


class TokenizePrompt(ModelRequest):
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(Conversation, ModelRequest):
    add_special_tokens: Literal[False] = False
    return_token_strs: bool = False


class NamedCache(Strict):
    name: str = ""
    """Of the file in --cache-dir; without one, that which is read at the start."""


class SaveCache(NamedCache):
    """All of the cache, or the session that `messages` or `prompt` begin: their tokens and all that continues them."""

    messages: Any = None
    tools: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    prompt: Any = None
    """Text or token ids."""


class FlushCache(Strict):
    pass


class DetokenizeRequest(ModelRequest):
    tokens: list[int]


# Fields known to OpenAI or vLLM that we do not serve, with the values at which they ask for nothing. Null always does.
_SHARED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "store": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "spaces_between_special_tokens": (True,),
    "logits_processors": ([],),
    "bad_words": ([],),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    **dict.fromkeys(
        ("prompt_logprobs", "allowed_token_ids", "truncate_prompt_tokens", "logit_processors"), ()),
}
UNSUPPORTED: dict[type[BaseModel], dict[str, tuple[Any, ...]]] = {
    CompletionRequest: _SHARED,
    ChatRequest: {
        **_SHARED,
        "add_special_tokens": (False,),
        "modalities": (["text"],),
        "functions": ([],),
        "function_call": ("none",),
        "verbosity": ("medium",),
        "echo": (False,),
        "continue_final_message": (False,),
        "include_reasoning": (True,),
        **dict.fromkeys(("audio", "prediction", "web_search_options", "chat_template", "documents", "moderation"), ()),
    },
    TokenizeChat: {"continue_final_message": (False,)},
}

Model = TypeVar("Model", bound=BaseModel)


def parse_json(body: bytes) -> dict[str, Any]:
    """The body as a JSON object. Raises `RequestError` for anything else: invalid JSON or UTF-8, lone surrogates, NaN,
    Infinity, nesting without end."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    return value


def parse(kind: type[Model], fields: Mapping[str, Any]) -> Model:
    """Check `fields` against `kind`. Raises `RequestError` naming the first field that is wrong."""
    unsupported = UNSUPPORTED.get(kind, {})
    for name in unsupported.keys() & fields.keys():
        given, harmless = fields[name], unsupported[name]
        if given is not None and not any(type(given) is type(value) and given == value for value in harmless):
            only = f" (only {to_json(harmless[0]).decode()} is)" if harmless else ""
            raise RequestError(f"{name} is not supported{only}", param=name)
    try:
        return kind.model_validate({name: value for name, value in fields.items() if name not in unsupported})
    except ValidationError as invalid:
        error = invalid.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _readable(error["type"], _path(error["loc"]), error["msg"], kind) from None


def _readable(kind: str, path: str, message: str, model: type[BaseModel]) -> RequestError:
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(path, model.model_fields, 1)
        if path == "enable_thinking" and "chat_template_kwargs" in model.model_fields:
            near = ['"chat_template_kwargs": {"enable_thinking": ...}']
        return RequestError(f"unknown field: {path}", param=path, hint=f"{near[0]}?" if near else None)
    if kind == "missing":
        return RequestError(f"{path} is required", param=path)
    if kind == "literal_error":  # in JSON's words, not Python's
        message = message.replace("False", "false").replace("True", "true").replace("None", "null")
    return RequestError(f"{path}: {message[0].lower()}{message[1:]}", param=path)


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") -> messages[0].role"""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
