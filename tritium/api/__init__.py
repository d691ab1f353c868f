"""The one door to the engine: `LLM` (offline) and `Session` (async events, cancel)."""

from tritium.api.answer import Completion
from tritium.api.door import ContextLengthError, Door, Message, Prompts, TextOptions
from tritium.api.engine_core import EngineCore
from tritium.api.llm import LLM
from tritium.api.scripted import ScriptedEngine
from tritium.api.session import Session

__all__ = [
    "LLM",
    "Completion",
    "ContextLengthError",
    "Door",
    "EngineCore",
    "Message",
    "Prompts",
    "ScriptedEngine",
    "Session",
    "TextOptions",
]
