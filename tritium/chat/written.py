"""What the model wrote, kept so that it goes back into the next prompt token by token.

A template writes an answer anew from its message, and where the model wrote otherwise (3.0 for an integer, another
space, other tokens for the same text) the prompt parts there from what is computed already. So answers are remembered
by their message, and where one comes back unchanged its own tokens take the place of what the template writes.
"""

from __future__ import annotations

import json
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tritium.chat.tags import END_THINK
from tritium.core.stages import ToolCall

_MOST_IDS = 2**20
Key = tuple[str, str, str]


class Written:
    """Answers by their messages, the latest 2^20 tokens of them."""

    def __init__(self) -> None:
        self._answers: OrderedDict[Key, tuple[int, ...]] = OrderedDict()
        self._held = 0

    def remember(self, text: str, reasoning: str, calls: Sequence[ToolCall], ids: Sequence[int]) -> None:
        """`ids`: all that the model wrote, without the token that ended it."""
        key = (text, reasoning, json.dumps([(call.id, call.name, call.arguments) for call in calls]))
        self._held += len(ids) - len(self._answers.pop(key, ()))
        self._answers[key] = tuple(ids)
        while self._held > _MOST_IDS:
            self._held -= len(self._answers.popitem(last=False)[1])

    def encode(self, messages: Sequence[Any], render: Callable[[Sequence[Any]], str],
               encode: Callable[[str], list[int]]) -> list[int]:
        """The prompt of `messages`; marks stand for remembered answers while the template writes. An answer that the
        template does not write whole (it leaves out old thoughts) is left to it."""
        found = {i: ids for i, message in enumerate(messages) if (ids := self._answers.get(_key(message)))}
        if not found:
            return encode(render(messages))
        run = secrets.token_hex(8)
        marked, marks = list(messages), {}
        for i in found:
            mark, thought = f"answer-{run}-{i}.", f"thought-{run}-{i}."
            reasoned = bool(_key(messages[i])[1])
            marked[i] = {"role": "assistant", "content": mark, **({"reasoning_content": thought} if reasoned else {})}
            marks[i] = f"{thought}\n{END_THINK}\n\n{mark}" if reasoned else mark
        text = render(marked)
        if missing := [i for i, mark in marks.items() if text.count(mark) != 1]:
            for i in missing:
                marked[i] = messages[i]
            text = render(marked)
        out: list[int] = []
        for i in (i for i in found if i not in missing):
            before, _, text = text.partition(marks[i])
            out += [*(encode(before) if before else ()), *found[i]]
        return out + (encode(text) if text else [])


def _key(message: Any) -> Key:
    """Of a message as a client sends it; one that no answer has for anything odd."""
    if not isinstance(message, Mapping) or message.get("role") != "assistant":
        return ("", "", "no answer")
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    calls = []
    try:
        for call in message.get("tool_calls") or ():
            function = call["function"]
            arguments = function["arguments"]
            calls.append((call["id"], function["name"],
                          json.loads(arguments) if isinstance(arguments, str) else arguments))
        key = (message.get("content") or "", reasoning, json.dumps(calls))
        hash(key)
    except (KeyError, TypeError, ValueError, RecursionError):
        return ("", "", "no answer")
    return key
