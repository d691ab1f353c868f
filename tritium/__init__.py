"""Tritium: an inference engine for hybrid language models (Gated DeltaNet + attention + MTP)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tritium.api import LLM, Completion, Session
    from tritium.config import EngineConfig
    from tritium.core import Event, SamplingParams, TritiumError

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("LLM", "Completion", "Session"), "tritium.api"),
    "EngineConfig": "tritium.config",
    **dict.fromkeys(("Event", "SamplingParams", "TritiumError"), "tritium.core"),
}
"""Public names, imported when first asked for, so that `import tritium` is quick."""

__all__ = ["LLM", "Completion", "EngineConfig", "Event", "SamplingParams", "Session", "TritiumError"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tritium' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
