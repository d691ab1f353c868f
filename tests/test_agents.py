"""An agent's loop against `tritium serve` with the embedded model: ask, call, result, answer.

Nothing but the official clients stands between: what a turn gave goes back as it came. The model chooses whether to
call; what it calls is held to the schema (strict tools). Every turn must be well-formed and compute no more than its
new tokens and a page.
"""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import jsonschema
import openai
import pytest
from chaos import Process, server_process

import tritium
from tritium.core import PAGE_TOKENS
from tritium.eval import tasks

EMBEDDED = Path(tritium.__file__).parent / "embedded" / "dense"
MODEL = "tritium-dense"
TURNS = 4
"""Most of a loop: a model may call again before it answers."""
TAGS = ("<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "<think>", "</think>", "<|im_")


@pytest.fixture(scope="module")
def process():
    if not (EMBEDDED / "model.safetensors").is_file():
        pytest.skip("the embedded model is not in this checkout")
    command = ("-c", "from tritium.cli.main import main; main()", "serve", "--port", "0", "--max-num-seqs", "16",
               "--max-model-len", "2048", "--num-threads", "1", "-q", "--seed", "0", "--speculate", "mtp:2")
    with server_process(*command) as server:
        yield server


def agent_tasks(count: int, seed: int) -> list[tasks.Task]:
    """Held-out tasks that come with what the tool says: a question, the call of the reference, the result."""
    drawn = tasks.tasks("tool_calls", "heldout", 31_000 + seed, 6 * count)
    found = (task for task in drawn if task.kind == "tool_answer")
    return [task for task, _ in zip(found, range(count))]


class Loop:
    """One task through one door; `faults`: what was wrong with it."""

    def __init__(self, url: str, task: tasks.Task) -> None:
        self.url, self.task = url, task
        *self.history, _, self.result = [dict(message) for message in task.messages]
        self.tools = [{**tool["function"], "strict": True} for tool in task.tools]
        self.offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in task.tools}
        self.past = self.called = self.turns = self.drafts = self.new = self.computed = 0
        self.faults: list[str] = []

    def run(self) -> Loop:
        for self.turns in range(1, TURNS + 1):
            if not self.turn():
                self.expect(self.called > 0 or self.turns == 1, "an answer without a call")
                return self
        self.faults.append(f"no answer in {TURNS} turns")
        return self

    def turn(self) -> bool:
        raise NotImplementedError

    def check(self, calls: list[tuple[str, Any]], text: str, ended: str, bill: tuple[int, int, int]) -> bool:
        """`bill`: tokens of the prompt, of them cached, and of the answer."""
        prompt, cached, completion = bill
        new = prompt - self.past
        self.expect(prompt - cached <= new + PAGE_TOKENS, f"turn {self.turns}: {prompt - cached} computed, {new} new")
        if self.past:
            self.new, self.computed = self.new + new, self.computed + prompt - cached
        self.past = prompt + completion
        self.expect(ended == ("calls" if calls else "answer"), f"{len(calls)} calls, and it ended by {ended}")
        self.expect(bool(calls or text.strip()), "neither a call nor text")
        self.expect(not any(tag in text for tag in TAGS), f"tags in the text: {text!r}")
        for name, arguments in calls:
            self.called += 1
            wrong = jsonschema.Draft202012Validator(self.offered.get(name, False)).iter_errors(arguments)
            self.faults += [f"{name}({arguments}): {error.message}" for error in wrong]
        return bool(calls)

    def expect(self, good: bool, fault: str) -> None:
        if not good:
            self.faults.append(f"{fault} ({type(self).__name__}: {self.history})")


class Chat(Loop):
    def turn(self) -> bool:
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)
        with client.chat.completions.stream(
            model=MODEL, messages=self.history, temperature=0, max_tokens=400,
            tools=[{"type": "function", "function": tool} for tool in self.tools],
            stream_options={"include_usage": True},
            extra_body={"chat_template_kwargs": {"enable_thinking": self.task.enable_thinking}},
        ) as stream:
            done = stream.get_final_completion()
        message, usage = done.choices[0].message, done.usage
        self.drafts += usage.completion_tokens_details.accepted_prediction_tokens
        calls = [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls or ()]
        sent = message.model_dump(exclude_none=True, include={"role", "content", "tool_calls", "reasoning_content"})
        self.history.append(sent | {"reasoning_content": getattr(message, "reasoning_content", None)})
        self.history += [{"role": "tool", "tool_call_id": c.id, "content": self.result["content"]}
                         for c in message.tool_calls or ()]
        ended = {"tool_calls": "calls", "stop": "answer"}.get(done.choices[0].finish_reason, "length")
        return self.check(calls, message.content or "", ended,
                          (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, usage.completion_tokens))


class Messages(Loop):
    def turn(self) -> bool:
        client = anthropic.Anthropic(base_url=self.url, api_key="none", max_retries=0, timeout=120)
        system = [m["content"] for m in self.history if m["role"] == "system"]
        done = client.messages.create(
            model=MODEL, max_tokens=400, messages=[m for m in self.history if m["role"] != "system"],
            system=system[0] if system else anthropic.NOT_GIVEN,
            tools=[{"input_schema" if name == "parameters" else name: value for name, value in tool.items()}
                   for tool in self.tools],
            thinking={"type": "adaptive" if self.task.enable_thinking else "disabled"}, extra_body={"temperature": 0})
        used = [block for block in done.content if block.type == "tool_use"]
        self.history.append({"role": "assistant", "content": [block.model_dump() for block in done.content]})
        if used:
            self.history.append({"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": c.id, "content": self.result["content"]} for c in used]})
        text = "".join(block.text for block in done.content if block.type == "text")
        ended = {"tool_use": "calls", "end_turn": "answer"}.get(done.stop_reason, "length")
        cached = done.usage.cache_read_input_tokens
        return self.check([(c.name, c.input) for c in used], text, ended,
                          (done.usage.input_tokens + cached, cached, done.usage.output_tokens))


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_every_loop_is_well_formed_and_computes_only_what_is_new(
    process: Process, seed: int, count: int, request: pytest.FixtureRequest
) -> None:
    if count == 200 and "slow" not in request.config.getoption("markexpr"):
        pytest.skip("make agents")
    loops = [(Chat, Messages)[i % 2](process.url, task) for i, task in enumerate(agent_tasks(count, seed))]
    assert len(loops) == count
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(Loop.run, loops))
    well = [loop for loop in done if not loop.faults]
    turns, called = Counter(loop.turns for loop in done), sum(loop.called > 0 for loop in done)
    print(f"\n{len(well)} of {count} loops well-formed, {called} with a call; turns {dict(sorted(turns.items()))}; "
          f"turns after the first: {sum(loop.computed for loop in done)} tokens computed, "
          f"{sum(loop.new for loop in done)} new; drafts accepted {sum(loop.drafts for loop in done)}")
    assert not [fault for loop in done for fault in loop.faults]
    assert called >= 0.9 * count
    assert sum(loop.drafts for loop in done) > 0
