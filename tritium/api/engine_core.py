"""What the api asks of an engine. `tritium.engine.Engine` answers it, as does the scripted one of the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tritium.core import CacheCall, EngineStats, Request, TokenEvent
from tritium.models.config import ModelConfig


class EngineCore(Protocol):
    """Ids in, ids out, one step at a time. Not thread safe: after loading, all calls come from one thread."""

    announce: Callable[[], object]
    """Called in a step when its tokens are known, a moment before they are given: whoever waits may get up."""

    @property
    def model_config(self) -> ModelConfig: ...

    @property
    def directory(self) -> Path:
        """Where the checkpoint's tokenizer and template are."""
        ...

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt plus output in one request."""
        ...

    @property
    def max_num_seqs(self) -> int:
        """Requests that run at once."""
        ...

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """The checkpoint's generation_config.json; empty where it has none."""
        ...

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> None:
        """Queue a request. Raises `RequestError` for one that could never be served."""

    def abort(self, request_id: str) -> bool:
        """Give back all that the request holds, now; no event follows. False when it is not known (any more)."""
        ...

    def step(self) -> list[TokenEvent]:
        """Plan, execute, commit. An exception from here means that the engine is dead."""
        ...

    def stats(self) -> EngineStats: ...

    @property
    def keeps_cache(self) -> bool:
        """Whether the prefix cache is to be saved at the end."""
        ...

    def keep(self, call: CacheCall) -> dict[str, Any]:
        """Save, load or flush the prefix cache; what was done, in numbers. Raises `CacheFileError` or `RequestError`,
        and then nothing was."""
        ...

    def close(self) -> None: ...
