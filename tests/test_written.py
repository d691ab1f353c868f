"""What the model wrote comes back in the next prompt token by token, however the template would spell it."""

from __future__ import annotations

import json
from typing import Any

from byte_chat import byte_chat_format
from scripted import ScriptedEngine, llm_over

CHAT = byte_chat_format()
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"n": {"type": "integer"}}}}}]
HELLO = {"role": "user", "content": "hi"}
WROTE = "<tool_call>\n<function=f>\n<parameter=n> 3.0\n</parameter>\n\n</function>\n</tool_call>\n"


def turn(**changes: Any) -> tuple[list[int], list[int], list[int]]:
    """-> (prompt, what was written after it, the prompt that the echoed answer makes)."""
    engine = ScriptedEngine(lambda request: [*CHAT.encode(WROTE), 258], eos_ids=(258,))
    with llm_over(engine, CHAT) as llm:
        off = {"enable_thinking": False}
        [done] = llm.chat([HELLO], tools=TOOLS, template_kwargs=off)
        [call] = done.tool_calls
        assert call.arguments == {"n": 3}
        function = {"name": call.name, "arguments": json.dumps(call.arguments, indent=1)}
        echo = {"role": "assistant", "content": None, "tool_calls": [{"id": call.id, "function": function}]} | changes
        after = llm.door.encode_chat([HELLO, echo, {"role": "tool", "content": "ok"}], TOOLS, template_kwargs=off)
        return done.prompt_ids, done.token_ids[:-1], after


def test_an_answer_that_comes_back_unchanged_is_the_tokens_that_it_was() -> None:
    _, wrote, after = turn()
    text = CHAT.decode(after, skip_special=False)
    assert f"<|im_start|>assistant\n{WROTE}<|im_end|>" in text
    at = text.encode().find(WROTE.encode())
    assert at > 0
    assert CHAT.encode(text) == after
    assert wrote == CHAT.encode(WROTE)


def test_an_answer_that_was_edited_is_the_templates_to_write() -> None:
    for changes in ({"content": "I will."}, {"reasoning_content": "hm"}):
        text = CHAT.decode(turn(**changes)[2], skip_special=False)
        assert "<parameter=n>\n3\n</parameter>\n</function>" in text
        assert WROTE not in text
