"""Anthropic's messages and OpenAI's responses, asked by the official clients."""

from __future__ import annotations

import json

import anthropic
import openai
import pytest
from served import CHAT, MODEL, rambles, says, served

ASK = [{"role": "user", "content": "What time is it?"}]
SCHEMA = {"type": "object", "properties": {"zone": {"type": "string"}, "hours": {"type": "integer"}}}
TOOL = {"name": "clock", "description": "The time.", "input_schema": SCHEMA}
FUNCTION = {"type": "function", "name": "clock", "description": "The time.", "parameters": SCHEMA, "strict": False}
CALL = "<tool_call>\n<function=clock>\n<parameter=zone>\n{}\n</parameter>\n<parameter=hours>\n{}\n</parameter>\n" \
       "</function>\n</tool_call>"
THOUGHT = "Let me see…\n</think>\n\n"


@pytest.fixture(scope="module", params=[1, 7], ids=["token-by-token", "chunks"])
def caller(request):
    """Thinks, says something, calls twice."""
    answer = THOUGHT + "Looking.\n" + CALL.format("UTC", 24) + "\n" + CALL.format("Asia/Tokyo", 12)
    with served(says(answer, chunk=request.param)) as server:
        yield server


@pytest.fixture(scope="module")
def plain():
    with served(says("It is 🙂 noon.", chunk=2)) as server:
        yield server


def rendered(server, **fields) -> str:
    """The prompt that the template makes of a chat request."""
    ids = server.post("/tokenize", {"model": MODEL, **fields}).json()["tokens"]
    return server.post("/detokenize", {"tokens": ids}).json()["prompt"]


# Anthropic.


def test_a_message(plain):
    done = plain.anthropic.messages.create(model=MODEL, max_tokens=100, messages=ASK)
    assert (done.type, done.role, done.model, done.stop_reason) == ("message", "assistant", MODEL, "end_turn")
    assert [(block.type, block.text) for block in done.content] == [("text", "It is 🙂 noon.")]
    count = plain.anthropic.messages.count_tokens(model=MODEL, messages=ASK)
    assert done.usage.input_tokens == count.input_tokens
    assert done.usage.output_tokens == len("It is 🙂 noon.".encode()) + 1


def test_the_models(plain):
    page = plain.anthropic.models.list()
    assert [(model.id, model.type, model.display_name) for model in page] == [(MODEL, "model", MODEL)]
    assert (page.first_id, page.last_id, page.has_more) == (MODEL, MODEL, False)
    assert plain.anthropic.models.retrieve(MODEL).created_at.year == 1970
    with pytest.raises(anthropic.NotFoundError):
        plain.anthropic.models.retrieve("other")
    assert [model.object for model in plain.client.models.list()] == ["model"]


def test_a_message_streamed(plain):
    with plain.anthropic.messages.stream(model=MODEL, max_tokens=100, messages=ASK) as stream:
        assert "".join(stream.text_stream) == "It is 🙂 noon."
        streamed = stream.get_final_message()
    whole = plain.anthropic.messages.create(model=MODEL, max_tokens=100, messages=ASK)
    assert streamed.content[0].text == whole.content[0].text
    assert (streamed.usage.input_tokens, streamed.usage.output_tokens, streamed.stop_reason) == (
        whole.usage.input_tokens, whole.usage.output_tokens, whole.stop_reason)


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_and_tool_use_blocks(caller, stream):
    ask = {"model": MODEL, "max_tokens": 1000, "messages": ASK, "tools": [TOOL], "thinking": {"type": "adaptive"}}
    if stream:
        with caller.anthropic.messages.stream(**ask) as events:
            done = events.get_final_message()
    else:
        done = caller.anthropic.messages.create(**ask)
    thought, text, first, second = done.content
    assert (thought.type, thought.thinking.strip()) == ("thinking", "Let me see…")
    assert (text.type, text.text.strip()) == ("text", "Looking.")
    assert [(c.type, c.name, c.input) for c in (first, second)] == [
        ("tool_use", "clock", {"zone": "UTC", "hours": 24}), ("tool_use", "clock", {"zone": "Asia/Tokyo", "hours": 12})]
    assert first.id != second.id
    assert done.stop_reason == "tool_use"


def test_events_nest_as_anthropic_says(caller):
    ask = {"model": MODEL, "max_tokens": 1000, "messages": ASK, "tools": [TOOL], "thinking": {"type": "adaptive"}}
    kinds, opened = [], None
    for event in caller.anthropic.messages.create(**ask, stream=True):
        kinds.append(event.type)
        if event.type == "content_block_start":
            assert opened is None
            opened = event.index
        elif event.type == "content_block_delta":
            assert event.index == opened
        elif event.type == "content_block_stop":
            assert event.index == opened
            opened = None
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4


def test_a_conversation_with_tools_is_the_prompt_that_chat_makes(plain):
    """One code path: the same words through either door are the same prompt."""
    messages = [
        *ASK,
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "text", "text": "Looking."},
            {"type": "tool_use", "id": "t1", "name": "clock", "input": {"zone": "UTC"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "12:00"}]},
            {"type": "text", "text": "And in words?", "cache_control": {"type": "ephemeral"}}]},
    ]
    chat = [
        {"role": "system", "content": "Be brief."}, *ASK,
        {"role": "assistant", "content": "Looking.", "reasoning_content": "Hm.", "tool_calls": [
            {"id": "t1", "type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}]},
        {"role": "tool", "tool_call_id": "t1", "content": "12:00"},
        {"role": "user", "content": "And in words?"},
    ]
    tools = [{"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": SCHEMA}}]
    kwargs = {"enable_thinking": False}
    want = plain.post("/tokenize", {"messages": chat, "tools": tools, "chat_template_kwargs": kwargs}).json()["count"]
    got = plain.anthropic.messages.count_tokens(
        model=MODEL, system=[{"type": "text", "text": "Be brief."}], messages=messages, tools=[TOOL])
    assert got.input_tokens == want
    items = [
        *ASK, {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Looking."}]},
        {"type": "function_call", "call_id": "t1", "name": "clock", "arguments": '{"zone": "UTC"}'},
        {"type": "function_call_output", "call_id": "t1", "output": "12:00"},
        {"role": "user", "content": [{"type": "input_text", "text": "And in words?"}]},
    ]
    done = plain.client.responses.create(model=MODEL, instructions="Be brief.", input=items, tools=[FUNCTION])
    want = plain.post("/tokenize", {"messages": chat, "tools": [
        {"type": "function", "function": {**tools[0]["function"], "strict": False}}]}).json()["count"]
    assert done.usage.input_tokens == want


def test_stop_sequences_and_budgets(plain):
    create = plain.anthropic.messages.create
    done = create(model=MODEL, max_tokens=100, messages=ASK, stop_sequences=["noon"])
    assert (done.content[0].text, done.stop_reason, done.stop_sequence) == ("It is 🙂 ", "stop_sequence", "noon")
    done = create(model=MODEL, max_tokens=3, messages=ASK)
    assert (done.stop_reason, done.usage.output_tokens) == ("max_tokens", 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages must not be empty"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "text only"),
        ({"messages": [*ASK, {"role": "assistant", "content": "It is"}]}, "not continued"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "x", "input_schema": 3}]}, "tools[0].function.parameters"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"mcp_servers": []}, "unknown field: mcp_servers"),
    ],
)
def test_a_bad_message_gets_anthropics_400(plain, fields, message):
    body = {"model": MODEL, "max_tokens": 10, "messages": ASK} | fields
    answer = plain.post("/v1/messages", body)
    assert answer.status_code == 400
    assert (answer.json()["type"], answer.json()["error"]["type"]) == ("error", "invalid_request_error")
    assert message in answer.json()["error"]["message"]


def test_errors_by_class_of_anthropics_client(plain):
    create = plain.anthropic.messages.create
    with pytest.raises(anthropic.NotFoundError):
        create(model="other", max_tokens=3, messages=ASK)
    with pytest.raises(anthropic.BadRequestError):
        create(model=MODEL, max_tokens=10**6, messages=ASK)


def test_a_death_midway_is_told_as_anthropics_error():
    with (served(rambles(die_after=5)) as server, pytest.raises(anthropic.APIStatusError, match="died")):
        list(server.anthropic.messages.create(model=MODEL, max_tokens=100, messages=ASK, stream=True))


# Responses.


def test_a_response(plain):
    done = plain.client.responses.create(model=MODEL, input="What time is it?", store=False,
                                         reasoning={"effort": None}, max_output_tokens=100)
    assert (done.object, done.status, done.model, done.store) == ("response", "completed", MODEL, False)
    prompt = len(CHAT.encode(CHAT.render(ASK)))
    assert (done.usage.input_tokens, done.usage.total_tokens - done.usage.output_tokens) == (prompt, prompt)


def test_a_response_cut_short():
    with served(says(THOUGHT + "A long answer.")) as server:
        done = server.client.responses.create(model=MODEL, input="Hi", max_output_tokens=20)
    assert (done.status, done.incomplete_details.reason, done.usage.output_tokens) == (
        "incomplete", "max_output_tokens", 20)


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_message_and_function_calls(caller, stream):
    ask = {"model": MODEL, "input": "What time is it?", "tools": [FUNCTION], "store": False}
    if stream:
        with caller.client.responses.stream(**ask) as events:
            done = events.get_final_response()
    else:
        done = caller.client.responses.create(**ask)
    thought, message, first, second = done.output
    assert (thought.type, thought.content[0].text.strip()) == ("reasoning", "Let me see…")
    assert (message.type, done.output_text.strip()) == ("message", "Looking.")
    assert [(c.type, c.name, json.loads(c.arguments)) for c in (first, second)] == [
        ("function_call", "clock", {"zone": "UTC", "hours": 24}),
        ("function_call", "clock", {"zone": "Asia/Tokyo", "hours": 12})]
    assert first.call_id != second.call_id
    assert done.usage.output_tokens_details.reasoning_tokens > 0


def test_events_of_a_response_add_up(caller):
    events = list(caller.client.responses.create(
        model=MODEL, input="What time is it?", tools=[FUNCTION], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [events[0].type, events[1].type, events[-1].type] == [
        "response.created", "response.in_progress", "response.completed"]
    final = events[-1].response
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == final.output
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == final.output_text
    for index, item in enumerate(final.output):
        if item.type == "function_call":
            deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"
                      and event.output_index == index]
            assert "".join(deltas) == item.arguments


def test_an_agents_loop_sends_back_what_it_got(caller):
    """Every output item is valid input."""
    history = [{"role": "user", "content": "What time is it?"}]
    done = caller.client.responses.create(model=MODEL, input=history, tools=[FUNCTION])
    history += [item.model_dump() for item in done.output]
    history += [{"type": "function_call_output", "call_id": item.call_id, "output": "12:00"}
                for item in done.output if item.type == "function_call"]
    again = caller.client.responses.create(model=MODEL, input=history, tools=[FUNCTION])
    assert again.status == "completed"
    assert again.usage.input_tokens > done.usage.input_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": 3}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"background": True}, "background"),
        ({"what": 1}, "what"),
    ],
)
def test_a_bad_response_request_gets_400_naming_the_field(plain, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        plain.client.responses.create(**{"model": MODEL, "input": "Hi"} | {k: v for k, v in fields.items()
                                                                          if k != "what"},
                                      extra_body={"what": 1} if "what" in fields else None)
    assert refused.value.param == param
