"""An engine without a model: it says what it is told to, one step at a time, and can be slow, full or fall over.

It has what the api uses of `tritium.engine.Engine`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritium.api import LLM, Limits, Session
from tritium.api.door import Door
from tritium.api.drive import EngineThread
from tritium.chat import ChatFormat
from tritium.core import (
    PAGE_TOKENS,
    CacheCall,
    EngineStats,
    FinishReason,
    Request,
    RequestError,
    Timing,
    TokenEvent,
    TokenLogprob,
)
from tritium.models.config import ModelConfig, parse_config
from tritium.models.families import family_config

if TYPE_CHECKING:
    from tritium.engine import Engine

Script = Callable[[Request], Sequence[int]]
"""The ids that a request is answered with. They end in an eos id when the "model" means to stop."""


def llm_over(engine: ScriptedEngine | Engine, chat: ChatFormat, *, seed: int | None = None) -> LLM:
    """The offline door to an engine that exists."""
    llm = LLM.__new__(LLM)
    llm._engine, llm.door = engine, Door(engine, chat, seed=seed)
    return llm


def session_over(
    engine: ScriptedEngine | Engine, chat: ChatFormat, *, seed: int | None = None, limits: Limits | None = None
) -> Session:
    """The async one."""
    return Session(EngineThread(engine), Door(engine, chat, seed=seed), limits=limits)


def echo_script(request: Request) -> Sequence[int]:
    """Repeat the prompt, then stop at the lowest eos id."""
    return [*request.prompt_ids, *sorted(request.eos_ids)[:1]]


class ScriptedEngine:
    """Serves requests as an engine does (queue, slots, pages, budgets, finish reasons, timing), from a script.

    `chunk`: tokens of a request in one step. `step_seconds`: how long a step takes. `die_after`: the step, counted
    from 1, that raises. A request holds one slot and the pages of its tokens while it runs. What a script leaves
    unsaid is eos, or token 0 under `ignore_eos`. The log-probability reported for token t at rank r is -r ln 2,
    and the runners-up are t + 1, t + 2, ... .
    """

    def __init__(
        self,
        script: Script = echo_script,
        *,
        vocab_size: int = 512,
        eos_ids: tuple[int, ...] = (256,),
        max_model_len: int = 4096,
        max_num_seqs: int = 64,
        chunk: int = 1,
        step_seconds: float = 0.0,
        die_after: int | None = None,
        generation_defaults: Mapping[str, Any] | None = None,
        directory: Path = Path(),
    ) -> None:
        self.script = script
        self.model_config = scripted_model(vocab_size, max_model_len, eos_ids)
        self.directory = directory
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.generation_defaults = dict(generation_defaults or {})
        self.chunk = chunk
        self.step_seconds = step_seconds
        self.die_after = die_after
        self.closed = False
        self.aborted: list[str] = []
        self._answers: dict[str, list[int]] = {}
        self._waiting: dict[str, Request] = {}
        self._running: dict[str, Request] = {}
        pages = max_num_seqs * math.ceil(max_model_len / PAGE_TOKENS)
        self._stats = EngineStats(pages_total=pages, slots_total=max_num_seqs)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: Request) -> None:
        if len(request.prompt_ids) >= self.max_model_len:
            raise RequestError("the prompt does not fit", param="prompt")
        budget = request.sampling.max_tokens or self.max_model_len
        request.max_total_tokens = min(self.max_model_len, len(request.prompt_ids) + budget)
        self._answers[request.id] = list(self.script(request))
        self._waiting[request.id] = request

    def abort(self, request_id: str) -> bool:
        request = self._waiting.pop(request_id, None) or self._running.pop(request_id, None)
        if request is not None:
            self.aborted.append(request_id)
        return request is not None

    def step(self) -> list[TokenEvent]:
        time.sleep(self.step_seconds)
        self.announce()
        self._count(steps=1)
        if self.die_after is not None and self._stats.steps >= self.die_after:
            raise RuntimeError("scripted death")
        for key in sorted(self._waiting, key=lambda key: self._waiting[key].priority):
            if len(self._running) < self.max_num_seqs:
                request = self._running[key] = self._waiting.pop(key)
                self._count(prompt_tokens=len(request.prompt_ids))
        return [self._advance(request) for request in list(self._running.values())]

    def stats(self) -> EngineStats:
        return dataclasses.replace(
            self._stats,
            running=len(self._running),
            waiting=len(self._waiting),
            slots_used=len(self._running),
            pages_used=sum(math.ceil(request.num_tokens / PAGE_TOKENS) for request in self._running.values()),
        )

    keeps_cache = False
    announce: Callable[[], object] = staticmethod(lambda: None)

    def keep(self, call: CacheCall) -> dict[str, Any]:
        raise RequestError("a scripted engine has no cache")

    def close(self) -> None:
        self.closed = True

    def _advance(self, request: Request) -> TokenEvent:
        first = len(request.output_ids)
        while len(request.output_ids) < first + self.chunk and request.finish_reason is None:
            self._emit(request)
        tokens = tuple(request.output_ids[first:])
        self._count(generated_tokens=len(tokens))
        now = time.monotonic()
        request.first_token_at = request.first_token_at or now
        done = request.finish_reason is not None
        if done:
            request.finished_at = now
            del self._running[request.id]
        logprobs, prompt_logprobs = request.sampling.logprobs, request.sampling.prompt_logprobs
        return TokenEvent(
            request_id=request.id,
            tokens=tokens,
            logprobs=() if logprobs is None else tuple(self._logprob(t, logprobs) for t in tokens),
            prompt_logprobs=()
            if prompt_logprobs is None or first
            else tuple(self._logprob(t, prompt_logprobs) for t in request.prompt_ids[1:]),
            finish_reason=request.finish_reason,
            stop_token=request.stop_token,
            timing=Timing(request.first_token_at - request.arrived_at, now - request.arrived_at,
                          len(request.output_ids), request.num_preemptions) if done else None,
        )

    def _emit(self, request: Request) -> None:
        """Append the next token and decide whether the generation ends with it."""
        sampling, answer, at = request.sampling, self._answers[request.id], len(request.output_ids)
        eos = min(request.eos_ids, default=0)
        token = answer[at] if at < len(answer) else 0 if sampling.ignore_eos else eos
        request.output_ids.append(token)
        ends = (token in request.eos_ids and not sampling.ignore_eos) or token in sampling.stop_token_ids
        if ends and len(request.output_ids) > sampling.min_tokens:
            request.finish_reason, request.stop_token = FinishReason.STOP, token
        elif request.num_tokens >= request.max_total_tokens:
            request.finish_reason = FinishReason.LENGTH

    def _logprob(self, token: int, count: int) -> TokenLogprob:
        ranked = tuple(((token + r) % self.model_config.vocab_size, -(r + 1) * math.log(2)) for r in range(count))
        return TokenLogprob(token, -math.log(2), 1, ranked)

    def _count(self, **more: int) -> None:
        self._stats = dataclasses.replace(
            self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()}
        )


def scripted_model(vocab_size: int, max_position: int, eos_ids: tuple[int, ...]) -> ModelConfig:
    """A shape of the family, with all that the api asks of one: vocabulary, context, eos ids."""
    shape = parse_config(family_config("qwen3.5-0.8b") or {})
    return dataclasses.replace(shape, vocab_size=vocab_size, max_position=max_position, eos_ids=eos_ids)
