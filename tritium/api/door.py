"""The door: every prompt and parameter is checked here, so that nothing bad reaches the engine."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritium.api.answer import Answer
from tritium.api.drive import EngineFacts
from tritium.chat import (
    AnswerFormat,
    ChatFormat,
    Grammars,
    ToolRules,
    Written,
    answer_grammar,
    check_tools,
    ends_in_think,
    images_in,
    load_chat,
)
from tritium.config import EngineConfig
from tritium.core import AnswerRules, Request, RequestError, SamplingParams

if TYPE_CHECKING:
    from tritium.engine import Engine

Prompt = str | Sequence[int]
Prompts = Prompt | Sequence[str] | Sequence[Sequence[int]]
Message = Mapping[str, Any]

MAX_CHOICES = 2048
"""Answers of one request: prompts times n."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MOVED_BYTES = (*range(0x21), *range(0x7F, 0xA1), 0xAD)
"""Byte-level vocabularies write byte `_MOVED_BYTES[i]` as U+0100 + i and every other byte as its own code point."""


class ContextLengthError(RequestError):
    """Prompt, or prompt plus max_tokens, is longer than the context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """How tokens become text. `chat` splits reasoning and tool calls out of it."""

    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    chat: bool = False
    tools: object = None
    tool_rules: ToolRules = dataclasses.field(default_factory=ToolRules)
    form: AnswerFormat | None = None
    """What the answer must be; beside tools, unless it is a call."""
    thinking_budget: int | None = None
    """Tokens of thought after which it is closed."""


class Door:
    """What the api knows about an engine without calling it: its limits, its text format, its defaults."""

    def __init__(self, engine: Engine | EngineFacts, chat: ChatFormat, *, seed: int | None = None) -> None:
        """`seed`: where requests without a seed get theirs from; None: the operating system."""
        self.chat = chat
        self.max_model_len = engine.max_model_len
        self.vocab_size = engine.model_config.vocab_size
        self.generation_defaults = dict(engine.generation_defaults)
        self.eos_ids = frozenset(engine.model_config.eos_ids) | _ids(self.generation_defaults.get("eos_token_id"))
        self._seeds = random.SystemRandom() if seed is None else random.Random(seed)
        self._served = itertools.count()
        self.grammars = Grammars(chat.tokenizer, self.vocab_size, engine.model_config.eos_ids)
        self.written = Written()
        self._turn_start = chat.tokenizer.token_id("<|im_start|>")

    def default_sampling(self, **overrides: Any) -> SamplingParams:
        """The checkpoint's generation_config.json as sampling parameters, under the overrides that are not None.

        `do_sample: false` there means temperature 0; what it does not mention is as in `SamplingParams`.
        """
        known = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
        fields = {name: value for name, value in self.generation_defaults.items() if name in known}
        if self.generation_defaults.get("do_sample") is False:
            fields = {"temperature": 0.0}
        fields |= {name: value for name, value in overrides.items() if value is not None}
        return SamplingParams(**{name: value for name, value in fields.items() if value is not None})

    def encode(self, prompts: Prompts, *, add_special: bool = True) -> list[list[int]]:
        """One prompt or several, as text or ids, as lists of checked ids. `add_special` adds to a text what the
        tokenizer itself puts around one."""
        if isinstance(prompts, str):
            return [self._encode_text(prompts, "prompt", add_special)]
        if isinstance(prompts, (list, tuple)):
            if all(type(item) is int for item in prompts):
                return [self._check_ids(prompts)]
            if all(isinstance(item, str) for item in prompts):
                return [self._encode_text(str(text), "prompt", add_special) for text in prompts]
            if all(isinstance(item, (list, tuple)) for item in prompts):
                return [self._check_ids(item) for item in prompts]
        raise RequestError("prompt must be a string, strings, token ids, or lists of token ids", param="prompt")

    def encode_chat(self, messages: Sequence[Message], tools: object = None, *, add_generation_prompt: bool = True,
                    template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
        """The conversation through the checkpoint's chat template, as ids; answers that come back unchanged, as the ids
        that they were."""
        if images_in(messages):
            raise RequestError("messages must be text only: images and videos are not supported", param="messages")

        def render(told: Sequence[Any]) -> str:
            return self.chat.render(told, tools=tools, add_generation_prompt=add_generation_prompt,
                                    template_kwargs=template_kwargs)

        if not isinstance(messages, (list, tuple)):
            return self._encode_text(render(messages), "messages", False)
        return self.written.encode(messages, render, lambda text: self._encode_text(text, "messages", False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self.chat.decode(self._check_ids(ids, "tokens"), skip_special=False)

    def token_bytes(self, token: int) -> bytes:
        """What one token contributes to a text, which may be a part of a character."""
        text = self.chat.decode([token], skip_special=False)
        if "\ufffd" not in text:
            return text.encode()
        entry = self.chat.tokenizer.token(token) or ""
        if byte := _BYTE_TOKEN.fullmatch(entry):
            return bytes([int(byte[1], 16)])
        codes = [code if (code := ord(symbol)) < 256 else _MOVED_BYTES[code - 256] for symbol in entry]
        return bytes(codes)

    def token_text(self, token: int) -> str:
        """`token_bytes` as text; U+FFFD for a part of a character."""
        return self.token_bytes(token).decode(errors="replace")

    def prompted(self, prompts: Prompts, sampling: SamplingParams | None = None, *,
                 options: TextOptions | None = None, priority: int = 0) -> list[Answer]:
        """An answer to be for each choice of each prompt: choice j of prompt i has index i n + j and seed + j."""
        sampling = sampling or self.default_sampling()
        return self._answers(self.encode(prompts), sampling, options or TextOptions(), priority, "prompt")

    def chatted(self, messages: Sequence[Message], sampling: SamplingParams | None = None, *,
                tools: object = None, add_generation_prompt: bool = True,
                template_kwargs: Mapping[str, Any] | None = None, options: TextOptions | None = None,
                priority: int = 0) -> list[Answer]:
        """The same for a conversation."""
        options = dataclasses.replace(options or TextOptions(), chat=True, tools=tools)
        ids = self.encode_chat(messages, tools, add_generation_prompt=add_generation_prompt,
                               template_kwargs=template_kwargs)
        return self._answers([ids], sampling or self.default_sampling(), options, priority, "messages")

    def _answers(self, prompts: list[list[int]], sampling: SamplingParams, options: TextOptions, priority: int,
                 param: str) -> list[Answer]:
        self._check_vocabulary(sampling.logit_bias, "logit_bias")
        self._check_vocabulary(sampling.stop_token_ids, "stop_token_ids")
        if len(prompts) * sampling.n > MAX_CHOICES:
            raise RequestError(f"{len(prompts)} prompts with n = {sampling.n} are {len(prompts) * sampling.n} answers, "
                               f"and one request may ask for {MAX_CHOICES}", param=param)
        for ids in prompts:
            self._check_length(len(ids), sampling, param)
        grammar = self._grammar(sampling, options)
        return [
            self._answer(ids, i * sampling.n + j, _wrap(seed + j), sampling, options, priority, rules)
            for i, ids in enumerate(prompts)
            for rules in [self._rules(ids, grammar, options)]
            for seed in [self._seeds.getrandbits(63) if sampling.seed is None else sampling.seed]
            for j in range(sampling.n)
        ]

    def _answer(self, ids: list[int], index: int, seed: int, sampling: SamplingParams, options: TextOptions,
                priority: int, rules: AnswerRules | None) -> Answer:
        request = Request(id=f"r{next(self._served)}", prompt_ids=list(ids), sampling=sampling, seed=seed,
                          eos_ids=self.eos_ids, priority=priority, rules=rules,
                          turn_starts=tuple(i for i, token in enumerate(ids) if token == self._turn_start))
        text = self.chat.stream(
            prompt=ids if options.chat else (),
            stop=sampling.stop,
            tools=options.tools,
            parse_reasoning=options.chat,
            skip_special_tokens=options.skip_special_tokens,
            include_stop=options.include_stop_str_in_output,
            min_tokens=sampling.min_tokens,
        )
        return Answer(request, index, text, keep_stop=options.include_stop_str_in_output,
                      written=self.written if options.chat else None)

    def _grammar(self, sampling: SamplingParams, options: TextOptions) -> str | None:
        """What is to be enforced on the answer after its thought."""
        tools = check_tools(options.tools) if options.chat else []
        grammar = answer_grammar(self.grammars, options.form, tools, options.tool_rules)
        for name in ("min_tokens", "ignore_eos"):
            if grammar is not None and getattr(sampling, name):
                raise RequestError(f"{name} does not go with an answer whose form is enforced", param=name)
        return grammar

    def _rules(self, ids: Sequence[int], grammar: str | None, options: TextOptions) -> AnswerRules | None:
        thinks = options.chat and ends_in_think(self.chat.decode(ids[-8:], skip_special=False))
        budget = options.thinking_budget if thinks else None
        if thinks and (grammar or budget is not None) and self.grammars.end_think is None:
            raise RequestError("this model's tokenizer has no token for </think>", param="response_format",
                               hint="turn thinking off")
        return None if grammar is None and budget is None else AnswerRules(grammar, thinks, budget)

    def _encode_text(self, text: str, param: str, add_special: bool) -> list[int]:
        ids = self.chat.encode(text, add_special=add_special)
        if not ids:
            raise RequestError("the prompt is empty", param=param)
        return ids

    def _check_ids(self, ids: Sequence[Any], param: str = "prompt") -> list[int]:
        if not ids:
            raise RequestError("the prompt is empty", param=param)
        self._check_vocabulary(ids, param)
        return list(ids)

    def _check_vocabulary(self, ids: Iterable[Any], param: str) -> None:
        for token in ids:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise RequestError(f"{param} has a token id {token!r} outside the vocabulary "
                                   f"(0 to {self.vocab_size - 1})", param=param)

    def _check_length(self, length: int, sampling: SamplingParams, param: str) -> None:
        limit, budget = self.max_model_len, sampling.max_tokens
        if length >= limit:
            raise ContextLengthError(f"this model's context is {limit} tokens and the prompt has {length}, which "
                                     "leaves no room for an answer", param=param, hint="shorten the prompt")
        if budget is not None and length + budget > limit:
            raise ContextLengthError(
                f"this model's context is {limit} tokens, but the prompt has {length} and max_tokens asks for "
                f"{budget} more", param="max_tokens", hint=f"max_tokens of at most {limit - length}")


def load(config: EngineConfig) -> tuple[Engine, Door]:
    """Load the engine (heavy: reads the weights) and the text format beside it."""
    from tritium.engine import Engine

    engine = Engine.load(config)
    chat = load_format(config, engine.directory)
    engine.show_tokens_as(lambda ids: chat.decode(ids, skip_special=False))
    door = Door(engine, chat, seed=config.seed)
    engine.hold_answers_with(door.grammars.constraint)
    return engine, door


def load_engine(config: EngineConfig) -> Engine:
    """The engine alone, as a process of its own has it."""
    return load(config)[0]


def load_format(config: EngineConfig, directory: Path) -> ChatFormat:
    """The text format of the checkpoint in `directory`."""
    return load_chat(directory if config.tokenizer is None else Path(config.tokenizer), config.tool_call_parser)


def _ids(value: object) -> frozenset[int]:
    """generation_config.json's eos_token_id: absent, one id, or a list of them."""
    return frozenset() if value is None else frozenset([value] if isinstance(value, int) else value)  # type: ignore


def _wrap(seed: int) -> int:
    """Into the signed 64 bits that a seed has."""
    return (seed + 2**63) % 2**64 - 2**63
