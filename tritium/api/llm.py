"""The offline door: prompts in, completions out, in the caller's thread."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from difflib import get_close_matches
from typing import Any

from tqdm import tqdm

from tritium.api.answer import Answer, Completion
from tritium.api.door import Message, Prompts, TextOptions, load
from tritium.config import EngineConfig
from tritium.core import CacheCall, CacheFileError, ConfigError, EngineStats, RequestError, SamplingParams, TritiumError

log = logging.getLogger(__name__)


class LLM:
    """A model to call: `with LLM("tritium-dense") as llm: llm.generate("One and one is")[0].text`."""

    def __init__(self, model: str = "tritium-dense", **engine_config: Any) -> None:
        """Load the model. The keyword arguments are the fields of `EngineConfig`; raises `ConfigError` for others."""
        known = [field.name for field in fields(EngineConfig)]
        for name in engine_config:
            if name not in known:
                near = get_close_matches(name, known, 3)
                raise ConfigError(f"{name} is not a field of EngineConfig", hint=", ".join(near) or "see its docstring")
        self._engine, self.door = load(EngineConfig(model=model, **engine_config))

    @classmethod
    def load(cls, config: EngineConfig) -> LLM:
        """The same from a configuration."""
        return cls(**asdict(config))

    def generate(self, prompts: Prompts, sampling: SamplingParams | Sequence[SamplingParams] | None = None, *,
                 options: TextOptions | None = None, progress: bool = False) -> list[Completion]:
        """Complete one prompt or several, each text or token ids.

        `sampling`: one for all, or one for each prompt; None: `default_sampling()`. Gives the choices of the first
        prompt, then those of the second, ... . `progress` draws a bar on stderr. Raises `RequestError` before
        anything runs if any prompt or parameter is bad.
        """
        encoded = self.door.encode(prompts)
        return self.answer(
            [self.door.prompted(ids, each, options=options) for ids, each in _pairs(encoded, sampling)],
            progress=progress)

    def chat(self, messages: Sequence[Message] | Sequence[Sequence[Message]],
             sampling: SamplingParams | Sequence[SamplingParams] | None = None, *, tools: object = None,
             add_generation_prompt: bool = True, template_kwargs: Mapping[str, Any] | None = None,
             progress: bool = False) -> list[Completion]:
        """Answer one conversation or several, through the checkpoint's chat template."""
        conversations: Sequence[Any] = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        return self.answer(
            [self.door.chatted(conversation, each, tools=tools, add_generation_prompt=add_generation_prompt,
                               template_kwargs=template_kwargs)
             for conversation, each in _pairs(conversations, sampling)],
            progress=progress)

    def answer(self, groups: Sequence[Sequence[Answer]], *, progress: bool = False,
               label: str = "generating") -> list[Completion]:
        """Run what `door.prompted` and `door.chatted` have prepared, each with parameters of its own, together."""
        answers = [answer for group in groups for answer in group]
        running = {answer.request.id: (answer, Completion(answer.index, answer.request.prompt_ids))
                   for answer in answers}
        completions = [completion for _, completion in running.values()]
        bar = tqdm(total=len(answers), desc=label, file=sys.stderr, disable=not progress)
        try:
            for answer in answers:
                self._engine.add(answer.request)
            while running:
                for event in self._engine.step():
                    answer, completion = running[event.request_id]
                    completion.absorb(answer.take(event))
                    if event.error is not None:
                        raise TritiumError(event.error)
                    if answer.finished:
                        del running[event.request_id]
                        bar.update()
                        if event.finish_reason is None:
                            self._engine.abort(event.request_id)
        finally:
            bar.close()
            for request_id in running:
                self._engine.abort(request_id)
        return completions

    def default_sampling(self, **overrides: Any) -> SamplingParams:
        """What the checkpoint's generation_config.json says, under `overrides`."""
        return self.door.default_sampling(**overrides)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def close(self) -> None:
        """Stop the engine, and with a `cache_dir` save what it computed."""
        if self._engine.keeps_cache:
            try:
                self._engine.keep(CacheCall("end", "save"))
            except CacheFileError as error:
                log.warning("the prefix cache is not saved: %s", error)
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pairs(prompts: Sequence[Any], sampling: SamplingParams | Sequence[SamplingParams] | None
           ) -> list[tuple[Any, SamplingParams | None]]:
    if sampling is None or isinstance(sampling, SamplingParams):
        return [(prompt, sampling) for prompt in prompts]
    if len(sampling) != len(prompts):
        raise RequestError(f"{len(prompts)} prompts need one sampling or {len(prompts)}, got {len(sampling)}",
                           param="sampling")
    return list(zip(prompts, sampling))
