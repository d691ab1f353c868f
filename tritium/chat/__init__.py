"""Text only: tokenizer, chat template, reasoning, tool calls, stop strings. Never imports torch."""

from tritium.chat.fake import byte_chat_format
from tritium.chat.format import ChatFormat, load_chat
from tritium.chat.messages import images_in
from tritium.chat.stream import TextDelta, TextStream
from tritium.chat.tokenizer import Tokenizer

__all__ = ["ChatFormat", "TextDelta", "TextStream", "Tokenizer", "byte_chat_format", "images_in", "load_chat"]
