"""Requests as they come over HTTP to the api's words, and events to OpenAI's shapes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from tritium.api import Completion, Door, TextOptions
from tritium.chat import AnswerFormat, ToolRules
from tritium.core import Event, RequestError, SamplingParams, TokenLogprob, ToolCallDelta
from tritium.server.protocol import ChatRequest, CompletionRequest, SamplingFields

DEFAULT_COMPLETION_TOKENS = 16
"""max_tokens of /v1/completions when it is not given, as OpenAI defines it."""
_COPIED = ("n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "top_k", "min_p",
           "repetition_penalty", "min_tokens", "ignore_eos")
_LOWEST_LOGPROB = -9999.0
"""JSON has no -inf."""


def chat_sampling(request: ChatRequest, door: Door) -> SamplingParams:
    budgets = {budget for budget in (request.max_tokens, request.max_completion_tokens) if budget is not None}
    if len(budgets) > 1:
        raise RequestError("max_tokens and max_completion_tokens differ", param="max_completion_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    return _sampling(request, door, max_tokens=next(iter(budgets), None),
                     logprobs=(request.top_logprobs or 0) if request.logprobs else None)


def completion_sampling(request: CompletionRequest, door: Door, longest_prompt: int) -> SamplingParams:
    budget = request.max_tokens
    if budget is None:
        budget = max(1, min(DEFAULT_COMPLETION_TOKENS, door.max_model_len - longest_prompt))
    return _sampling(request, door, max_tokens=budget, logprobs=request.logprobs,
                     prompt_logprobs=request.logprobs if request.echo else None)


def text_options(request: SamplingFields) -> TextOptions:
    return TextOptions(skip_special_tokens=request.skip_special_tokens,
                       include_stop_str_in_output=request.include_stop_str_in_output, form=answer_form(request))


def check_stream_options(request: SamplingFields) -> None:
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")


def _sampling(request: SamplingFields, door: Door, **fields: Any) -> SamplingParams:
    return door.default_sampling(
        **{name: getattr(request, name) for name in _COPIED}, **fields, stop=_stop(request.stop),
        stop_token_ids=None if request.stop_token_ids is None else tuple(request.stop_token_ids),
        logit_bias=None if request.logit_bias is None else {_token(k): v for k, v in request.logit_bias.items()})


def _stop(value: Any) -> tuple[str, ...] | None:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return None
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise RequestError("stop must be a string or a list of strings", param="stop")
    return tuple(stops)


def _token(key: str) -> int:
    try:
        return int(key)
    except ValueError:
        raise RequestError(f"logit_bias has the key {key!r}, which is not a token id", param="logit_bias") from None


def chat_options(request: ChatRequest) -> TextOptions:
    return dataclasses.replace(text_options(request), tool_rules=_tool_rules(request),
                               thinking_budget=request.thinking_token_budget)


def offered_tools(request: ChatRequest) -> Any:
    """The tools to offer, as they came; none under tool_choice none."""
    if request.tool_choice not in (None, "none") and not request.tools:
        raise RequestError("tool_choice needs tools", param="tool_choice")
    return None if request.tool_choice == "none" else request.tools


def _tool_rules(request: ChatRequest) -> ToolRules:
    choice, parallel = request.tool_choice, request.parallel_tool_calls is not False
    if choice in (None, "none", "auto", "required"):
        return ToolRules(required=choice == "required", parallel=parallel)
    try:
        name = choice["function"]["name"] if choice["type"] == "function" else None
    except (TypeError, KeyError):
        name = None
    if not isinstance(name, str):
        raise RequestError(f"tool_choice {json.dumps(choice)} is not supported",
                           param="tool_choice", hint="auto, none, required, or one function by its name")
    return ToolRules(name=name)


def template_kwargs(request: ChatRequest, door: Door) -> dict[str, Any] | None:
    """chat_template_kwargs, and the effort of reasoning for a template that reads it."""
    effort, given = request.reasoning_effort, request.chat_template_kwargs
    if effort is None:
        return given
    if door.chat.template_reads("reasoning_effort"):
        return {"reasoning_effort": effort} | (given or {})
    if effort == "none" and door.chat.template_reads("enable_thinking"):
        return {"enable_thinking": False} | (given or {})
    raise RequestError(f"reasoning_effort {effort!r} is not supported: this model's template knows no effort",
                       param="reasoning_effort", hint="thinking_token_budget limits the thought, none turns it off")


def answer_form(request: SamplingFields) -> AnswerFormat | None:
    """What the answer must be, whichever field says so."""
    found = list(_forms(request))
    if len(found) > 1:
        raise RequestError(f"{found[0].param} and {found[1].param} both say what the answer must be",
                           param=found[1].param, hint="send one of them")
    return found[0] if found else None


def _forms(request: SamplingFields) -> Iterator[AnswerFormat]:
    if request.response_format is not None:
        yield from _response_format(request.response_format)
    for kind in _KINDS:
        if (value := getattr(request, f"guided_{kind}")) is not None:
            yield _form(kind, value, f"guided_{kind}")
    given = {} if request.structured_outputs is None else request.structured_outputs
    if not isinstance(given, dict):
        raise RequestError("structured_outputs must be an object", param="structured_outputs")
    for name, value in given.items():
        where = f"structured_outputs.{name}"
        if name in _KINDS and value is not None:
            yield _form(name, value, where)
        elif name == "json_object" and value is True:
            yield AnswerFormat("json", {"type": "object"}, where)
        elif value not in (None, False):
            raise RequestError(f"{where} is not supported", param=where)


_KINDS: tuple[Literal["json", "regex", "choice", "grammar"], ...] = ("json", "regex", "choice", "grammar")


def _form(kind: Any, value: Any, param: str) -> AnswerFormat:
    if kind == "json" and isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RequestError(f"{param} is not valid JSON", param=param) from None
    return AnswerFormat(kind, value, param)


def _response_format(value: Any) -> Iterator[AnswerFormat]:
    param, kind = "response_format", value.get("type") if isinstance(value, dict) else None
    if kind == "json_object":
        yield AnswerFormat("json", {"type": "object"}, param)
    elif kind == "json_schema":
        schema = value.get("json_schema")
        schema = schema.get("schema") if isinstance(schema, dict) else None
        if not isinstance(schema, dict):
            raise RequestError("response_format.json_schema.schema must be a JSON schema", param=param)
        yield AnswerFormat("json", schema, f"{param}.json_schema.schema")
    elif kind != "text":
        raise RequestError("response_format.type must be text, json_object or json_schema", param=param)


class ChatShape:
    """How chat completions are written."""

    prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, request: ChatRequest, door: Door) -> None:
        self._logprobs = bool(request.logprobs)
        self._door = door
        self.begun: set[int] = set()
        """Choices of which something was streamed."""

    def choice(self, completion: Completion) -> dict[str, Any]:
        """The whole answer of one choice."""
        message: dict[str, Any] = {"role": "assistant", "content": completion.text}
        if completion.reasoning:
            message |= {"reasoning_content": completion.reasoning, "reasoning": completion.reasoning}
        if completion.tool_calls:
            calls = [function_call(call.id, call.name, json.dumps(call.arguments, ensure_ascii=False))
                     for call in completion.tool_calls]
            message |= {"content": completion.text or None, "tool_calls": calls}
        return {"index": completion.index, "message": message, "logprobs": self._logprob_body(completion.logprobs),
                "finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}

    def deltas(self, event: Event) -> list[dict[str, Any]]:
        """The entries of `choices` to stream for an event; may be none."""
        out = []
        if event.index not in self.begun:
            self.begun.add(event.index)
            out.append(self._delta(event.index, {"role": "assistant", "content": ""}))
        delta: dict[str, Any] = {}
        if event.reasoning:
            delta |= {"reasoning_content": event.reasoning, "reasoning": event.reasoning}
        if event.text:
            delta["content"] = event.text
        if event.tool_deltas:
            delta["tool_calls"] = [_call_delta(piece) for piece in event.tool_deltas]
        if delta or event.finish_reason is not None or (self._logprobs and event.logprobs):
            out.append(self._delta(event.index, delta, event))
        return out

    def _delta(self, index: int, delta: dict[str, Any], event: Event | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta,
                  "logprobs": self._logprob_body(event.logprobs) if event and event.logprobs else None,
                  "finish_reason": event.finish_reason if event else None}
        return choice | {"stop_reason": event.stop_reason} if event and event.finish_reason else choice

    def _logprob_body(self, entries: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {"content": [
            self._entry(e.token, e.logprob) | {"top_logprobs": [self._entry(*top) for top in e.top]} for e in entries]}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._door.token_bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": max(logprob, _LOWEST_LOGPROB), "bytes": list(data)}


class CompletionShape:
    """How text completions are written; the same methods as `ChatShape`'s."""

    prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, request: CompletionRequest, prompts: Sequence[list[int]], n: int, door: Door) -> None:
        self._logprobs = request.logprobs is not None
        self._prompts = prompts
        self._n = n
        self._door = door
        self._echoes = self._echo_texts(request.prompt) if request.echo else None
        self.begun: set[int] = set()
        self._offsets: dict[int, int] = {}
        self._prompt_logprobs: dict[int, tuple[TokenLogprob, ...]] = {}

    def choice(self, completion: Completion) -> dict[str, Any]:
        return self._choice(completion, completion.prompt_logprobs)

    def deltas(self, event: Event) -> list[dict[str, Any]]:
        index = event.index
        if event.prompt_logprobs:  # they come with the chunks of the prompt; shown with the first token
            self._prompt_logprobs[index] = self._prompt_logprobs.get(index, ()) + event.prompt_logprobs
        first = index not in self.begun and (event.token_ids or event.finish_reason is not None)
        if not (first or event.text or event.finish_reason is not None or (self._logprobs and event.logprobs)):
            return []
        return [self._choice(event, self._prompt_logprobs.pop(index, ()))]

    def _choice(self, said: Event | Completion, prompt_logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        index, text = said.index, said.text
        entries: list[tuple[int, TokenLogprob | None]] = [(entry.token, entry) for entry in said.logprobs]
        if index not in self.begun and self._echoes is not None:
            prompt = self._prompts[index // self._n]
            text = self._echoes[index // self._n] + text
            entries = [(prompt[0], None), *((entry.token, entry) for entry in prompt_logprobs), *entries]
        self.begun.add(index)
        return {"index": index, "text": text,
                "logprobs": self._logprob_body(index, entries) if self._logprobs else None,
                "finish_reason": said.finish_reason, "stop_reason": said.stop_reason}

    def _logprob_body(self, index: int, entries: Iterable[tuple[int, TokenLogprob | None]]) -> dict[str, Any]:
        body: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, entry in entries:
            text = self._door.token_text(token)
            offset = self._offsets.get(index, 0)
            self._offsets[index] = offset + len(text)
            body["tokens"].append(text)
            body["text_offset"].append(offset)
            body["token_logprobs"].append(None if entry is None else max(entry.logprob, _LOWEST_LOGPROB))
            body["top_logprobs"].append(None if entry is None else {
                self._door.token_text(other): max(logprob, _LOWEST_LOGPROB)
                for other, logprob in ((token, entry.logprob), *entry.top)})
        return body

    def _echo_texts(self, prompt: Any) -> list[str]:
        texts = [prompt] if isinstance(prompt, str) else prompt
        if all(isinstance(text, str) for text in texts):
            return list(texts)
        return [self._door.decode(ids) for ids in self._prompts]


def function_call(call_id: str, name: str, arguments: object) -> dict[str, Any]:
    """A call in an assistant's message, as chat completions have it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _call_delta(piece: ToolCallDelta) -> dict[str, Any]:
    if not piece.id:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    return {"index": piece.index} | function_call(piece.id, piece.name, piece.arguments)


dumps = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), check_circular=False).encode
