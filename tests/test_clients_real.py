"""The official clients at `tritium serve` with the embedded model, the engine in its own process."""

from __future__ import annotations

import json
import os
import signal
import time
from enum import Enum
from pathlib import Path

import anthropic
import httpx
import openai
import pytest
from chaos import server_process
from pydantic import BaseModel, Field

import tritium

EMBEDDED = Path(tritium.__file__).parent / "embedded" / "dense"
MODEL = "tritium-dense"
ASK = [{"role": "user", "content": "Tom has 3 apples and buys 4 more. How many apples does he have?"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
ADD = {"name": "add", "description": "Adds two integers.", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": ADD}]


@pytest.fixture(scope="module")
def process():
    if not (EMBEDDED / "model.safetensors").is_file():
        pytest.skip("the embedded model is not in this checkout")
    command = ("-c", "from tritium.cli.main import main; main()", "serve", "--port", "0", "--max-num-seqs", "8",
               "--max-model-len", "1024", "--num-threads", "1", "-q", "--seed", "0")
    with server_process(*command) as server:
        yield server


@pytest.fixture
def gpt(process):
    return openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def claude(process):
    return anthropic.Anthropic(base_url=process.url, api_key="none", max_retries=0, timeout=60)


def test_the_same_answer_through_every_door_whole_and_streamed(gpt, claude):
    """One prompt, greedily: chat, responses and messages say the same."""
    chat = gpt.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=60,
                                       extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    greedy = {"extra_body": {"temperature": 0}}  # the newer clients leave it out
    message = claude.messages.create(model=MODEL, messages=ASK, max_tokens=60, **greedy)
    assert message.content[0].text == chat.choices[0].message.content
    assert message.usage.output_tokens == chat.usage.completion_tokens
    with claude.messages.stream(model=MODEL, messages=ASK, max_tokens=60, **greedy) as stream:
        assert "".join(stream.text_stream) == message.content[0].text
    thinking = gpt.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=60)
    response = gpt.responses.create(model=MODEL, input=ASK, temperature=0, max_output_tokens=60)
    said = {item.type: item.content[0].text for item in response.output}
    assert said.get("reasoning") == thinking.choices[0].message.reasoning_content
    with gpt.responses.stream(model=MODEL, input=ASK, temperature=0, max_output_tokens=60) as events:
        streamed = events.get_final_response()
    assert [item.content[0].text for item in streamed.output] == [item.content[0].text for item in response.output]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_forced_call_has_arguments_of_the_schema(gpt, choice):
    done = gpt.chat.completions.create(model=MODEL, messages=ASK, tools=TOOLS, tool_choice=choice, seed=1,
                                       max_tokens=300, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    call = done.choices[0].message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "add"
    assert {name: type(value) for name, value in arguments.items()} == {"a": int, "b": int}


def test_a_forced_call_through_the_newer_doors(gpt, claude):
    tool = {"name": "add", "input_schema": SCHEMA}
    done = claude.messages.create(model=MODEL, messages=ASK, tools=[tool], tool_choice={"type": "any"}, max_tokens=300)
    assert (done.stop_reason, done.content[-1].type, done.content[-1].name) == ("tool_use", "tool_use", "add")
    assert set(done.content[-1].input) == {"a", "b"}
    back = [*ASK, {"role": "assistant", "content": [block.model_dump() for block in done.content]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": done.content[-1].id, "content": "7"}]}]
    again = claude.messages.create(model=MODEL, messages=back, tools=[tool], tool_choice={"type": "none"},
                                   max_tokens=40)
    assert [block.type for block in again.content] == ["text"]


def test_no_call_where_none_is_wanted(gpt):
    done = gpt.chat.completions.create(model=MODEL, messages=ASK, tools=TOOLS, tool_choice="none", max_tokens=40)
    assert done.choices[0].message.tool_calls is None


class Unit(Enum):
    APPLES = "apples"
    PEARS = "pears"


class Count(BaseModel, extra="forbid"):
    number: int = Field(ge=0, le=99)
    unit: Unit


def test_parse_gives_the_class_that_was_asked_for(gpt):
    done = gpt.chat.completions.parse(model=MODEL, messages=ASK, response_format=Count, max_tokens=200,
                                      extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert isinstance(done.choices[0].message.parsed, Count)


def test_a_schema_holds_through_the_newer_doors(gpt, claude):
    schema = Count.model_json_schema()
    done = claude.messages.create(model=MODEL, messages=ASK, max_tokens=200,
                                  output_config={"format": {"type": "json_schema", "schema": schema}})
    assert Count.model_validate_json(done.content[-1].text)
    parsed = gpt.responses.parse(model=MODEL, input=ASK, text_format=Count, max_output_tokens=400)
    assert parsed.status == "incomplete" or isinstance(parsed.output_parsed, Count)


def test_a_cancelled_stream_frees_its_request(process, gpt):
    stream = gpt.chat.completions.create(model=MODEL, messages=ASK, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 5
    while process.metrics()["tritium_requests_running"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_errors_are_the_clients_own(gpt, claude):
    with pytest.raises(openai.NotFoundError):
        gpt.chat.completions.create(model="other", messages=ASK)
    with pytest.raises(openai.BadRequestError, match="context"):
        gpt.completions.create(model=MODEL, prompt="x", max_tokens=5000)
    with pytest.raises(anthropic.BadRequestError, match="messages"):
        claude.messages.create(model=MODEL, messages=[], max_tokens=5)


def test_a_killed_engine_is_an_error_within_a_second_and_comes_back(process, gpt):
    stream = gpt.chat.completions.create(model=MODEL, messages=ASK, stream=True, extra_body={"ignore_eos": True})
    events = iter(stream)
    next(events)
    os.kill(process.engine_pid, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(openai.APIError, match="the engine died"):
        list(events)
    assert time.monotonic() - begin < 1
    assert httpx.get(f"{process.url}/health", timeout=10).status_code == 503
    patient = gpt.with_options(max_retries=20)
    assert patient.chat.completions.create(model=MODEL, messages=ASK, max_tokens=5).choices
