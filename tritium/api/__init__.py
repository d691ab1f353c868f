"""The one door to the engine: `LLM` (offline) and `Session` (async events, cancel)."""

from tritium.api.answer import Completion
from tritium.api.door import ContextLengthError, Door, Message, Prompts, TextOptions
from tritium.api.gate import BusyError, Limits
from tritium.api.llm import LLM
from tritium.api.session import OvertimeError, Session, Sink

__all__ = [
    "LLM", "BusyError", "Completion", "ContextLengthError", "Door", "Limits", "Message", "OvertimeError", "Prompts",
    "Session", "Sink", "TextOptions",
]  # fmt: skip
