"""A checkpoint's text side in one object."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tritium.chat.detokenize import Detokenizer
from tritium.chat.messages import check_messages, check_tools, check_variables, schemas
from tritium.chat.reasoning import ReasoningSplitter, ends_in_think
from tritium.chat.stop import StopMatcher
from tritium.chat.stream import TextStream
from tritium.chat.tags import END_THINK, END_TOOL_CALL, THINK, TOOL_CALL
from tritium.chat.template import ChatTemplate, load_template
from tritium.chat.tokenizer import Tokenizer
from tritium.chat.tools import FUNCTION, ToolParser
from tritium.core.errors import RequestError

log = logging.getLogger(__name__)

_PROMPT_TAIL = 32
"""Ids of a prompt's end that are decoded to see whether it ends in `<think>`."""


class ChatFormat:
    """Tokenizer and chat template of a checkpoint: messages to a prompt, ids to an answer."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> None:
        self.tokenizer = tokenizer
        self._template = template

    def template_reads(self, name: str) -> bool:
        """Whether the chat template knows a variable."""
        return self._template is not None and name in self._template.names

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """See `Tokenizer.encode`. A rendered prompt has its special tokens already."""
        return self.tokenizer.encode(text, add_special=add_special)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """See `Tokenizer.decode`."""
        return self.tokenizer.decode(ids, skip_special)

    def render(self, messages: object, *, tools: object = None, add_generation_prompt: bool = True,
               template_kwargs: Mapping[str, Any] | None = None) -> str:
        """The prompt of OpenAI-shaped messages and tools; `template_kwargs` (enable_thinking, say) go to the
        template.

        Raises `RequestError` naming the field for messages, tools or variables of a wrong shape, with the
        template's own words when it refuses them, and when there is no template.
        """
        if self._template is None:
            raise RequestError("the model has no chat template", hint="use completions, or a chat model")
        return self._template.render(
            check_messages(messages),
            tools=check_tools(tools) or None,
            add_generation_prompt=add_generation_prompt,
            variables=check_variables(template_kwargs or {}),
        )

    def stream(self, *, prompt: str | Sequence[int] = "", stop: Sequence[str] = (), tools: object = None,
               parse_reasoning: bool = True, skip_special_tokens: bool = True, include_stop: bool = False,
               min_tokens: int = 0) -> TextStream:
        """A fresh stream for one answer.

        `prompt` (text or ids) decides whether the answer begins inside the reasoning. Without `parse_reasoning`
        and `tools` all text is plain, as completions want it. Special tokens are left out of the text unless
        `skip_special_tokens` is off; tags that are parsed are seen even where the tokenizer calls them special.
        `include_stop` leaves the stop string in the text. Stop strings completed by one of the first `min_tokens`
        tokens do not count.
        """
        functions = schemas(check_tools(tools))
        tags = ((THINK, END_THINK) if parse_reasoning else ()) + ((TOOL_CALL, END_TOOL_CALL) if functions else ())
        parsed = {self.tokenizer.token_id(tag) for tag in tags}
        hidden = self.tokenizer.special_ids - parsed if skip_special_tokens else frozenset()
        if parse_reasoning and not isinstance(prompt, str):
            prompt = self.decode(prompt[-_PROMPT_TAIL:], skip_special=False)
        splitter = ReasoningSplitter(inside=ends_in_think(str(prompt))) if parse_reasoning else None
        return TextStream(
            Detokenizer(self.tokenizer, hidden=hidden),
            StopMatcher(stop, include=include_stop),
            splitter=splitter,
            answer_tools=ToolParser(functions) if functions else None,
            reasoning_tools=ToolParser(functions) if functions and splitter else None,
            min_tokens=min_tokens,
        )


def load_chat(directory: Path, tool_call_parser: str = "auto") -> ChatFormat:
    """The text side of the checkpoint in `directory`: tokenizer.json, and the chat template if there is one.

    All names of `config.TOOL_CALL_PARSERS` are one format; under auto it is said where the template writes another.

    Raises `CheckpointError` for files that are missing, damaged or do not parse.
    """
    template = load_template(directory)
    if tool_call_parser == "auto" and template and "tools" in template.names and FUNCTION not in template.source:
        log.warning("the chat template does not write tool calls as qwen3_xml, which answers are read as; "
                    "tools may fail")
    return ChatFormat(Tokenizer.load(directory), template)
