"""Text only: tokenizer, chat template, reasoning, tool calls, stop strings. Never imports torch."""

from tritium.chat.constraint import Grammars
from tritium.chat.format import ChatFormat, load_chat
from tritium.chat.grammar import AnswerFormat, ToolRules, answer_grammar
from tritium.chat.messages import check_tools, images_in
from tritium.chat.reasoning import ends_in_think
from tritium.chat.stream import TextDelta, TextStream
from tritium.chat.written import Written

__all__ = [
    "AnswerFormat", "ChatFormat", "Grammars", "TextDelta", "TextStream", "ToolRules", "Written", "answer_grammar",
    "check_tools", "ends_in_think", "images_in", "load_chat",
]  # fmt: skip
