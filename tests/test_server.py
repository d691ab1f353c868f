"""The server, asked by the official OpenAI client and, where that is too well behaved, by plain HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from served import CHAT, EOS, MODEL, rambles, says, scripted, served

from tritium.core import ConfigError, Event, FinishReason
from tritium.server.app import listen
from tritium.server.convert import ChatShape, CompletionShape
from tritium.server.protocol import ChatRequest, CompletionRequest, StreamOptions
from tritium.server.writers import OpenAIWriter

HELLO = [{"role": "user", "content": "Hello"}]
CLOCK = {"type": "function", "function": {
    "name": "clock", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}}}
CALL = "<tool_call>\n<function=clock>\n<parameter=zone>\n{}\n</parameter>\n</function>\n</tool_call>"


@pytest.fixture(scope="module")
def echo():
    """Answers a prompt with the prompt."""
    with served(scripted(lambda request: [*request.prompt_ids, EOS])) as server:
        yield server


@pytest.fixture(scope="module")
def thinker():
    with served(says("Let me see…\n</think>\n\nIt is 🙂 42.", chunk=3)) as server:
        yield server


@pytest.fixture(scope="module")
def rambler():
    with served(rambles(chunk=2)) as server:
        yield server


# Chat.


def test_chat(thinker):
    done = thinker.client.chat.completions.create(model=MODEL, messages=HELLO)
    [choice] = done.choices
    assert (done.object, done.model, choice.index) == ("chat.completion", MODEL, 0)
    assert (choice.message.role, choice.message.content) == ("assistant", "It is 🙂 42.")
    assert choice.message.reasoning_content == choice.message.reasoning == "Let me see…"
    assert choice.finish_reason == "stop"
    assert done.usage.completion_tokens == len("Let me see…\n</think>\n\nIt is 🙂 42.".encode()) - len("</think>") + 2
    assert done.usage.prompt_tokens == len(CHAT.encode(CHAT.render(HELLO)))
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.usage.completion_tokens_details.reasoning_tokens == len("Let me see…\n".encode())


def test_streamed_chat_is_the_same(thinker):
    ask = {"model": MODEL, "messages": HELLO, "seed": 1}
    whole = thinker.client.chat.completions.create(**ask)
    chunks = list(thinker.client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    *body, last = chunks
    deltas = [chunk.choices[0].delta for chunk in body]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert "".join(getattr(d, "reasoning_content", "") for d in deltas) == whole.choices[0].message.reasoning_content
    assert [chunk.choices[0].finish_reason for chunk in body] == [None] * (len(body) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in body)
    assert (last.choices, last.usage) == ([], whole.usage)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1


def test_no_chunk_has_half_a_character(thinker):
    for chunk in thinker.client.chat.completions.create(model=MODEL, messages=HELLO, stream=True):
        assert "\ufffd" not in (chunk.choices[0].delta.content or "")
        assert chunk.usage is None


def test_enable_thinking_reaches_the_template():
    with served(says("plain")) as server:
        done = server.client.chat.completions.create(
            model=MODEL, messages=HELLO, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert done.choices[0].message.content == "plain"


def test_content_parts_and_roles(echo):
    messages = [{"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "One "}, {"type": "text", "text": "two"}]},
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}]},
                {"role": "tool", "tool_call_id": "c1", "content": "12:00"}]
    ids = echo.post("/tokenize", {"messages": messages}).json()["tokens"]
    text = echo.post("/detokenize", {"tokens": ids}).json()["prompt"]
    assert "system\nBe brief." in text
    assert "user\nOne two" in text
    assert "<parameter=zone>\nUTC\n" in text


@pytest.mark.parametrize("stream", [False, True])
def test_tools(stream):
    answer = "no need to think</think>\n\nLooking.\n" + CALL.format("UTC") + "\n" + CALL.format("Asia/Tokyo")
    with served(says(answer, chunk=4)) as server:
        ask = {"model": MODEL, "messages": HELLO, "tools": [CLOCK], "tool_choice": "auto"}
        if stream:
            choices = [chunk.choices[0] for chunk in server.client.chat.completions.create(**ask, stream=True)]
            pieces = [piece for choice in choices for piece in choice.delta.tool_calls or []]
            calls = [piece for piece in pieces if piece.id]
            for call in calls:
                call.function.arguments = "".join(p.function.arguments for p in pieces if p.index == call.index)
            assert len(pieces) > 3 * len(calls)  # as the model writes
            content, reason = "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason
            assert [call.index for call in calls] == [0, 1]
        else:
            choice = server.client.chat.completions.create(**ask).choices[0]
            calls, content, reason = choice.message.tool_calls, choice.message.content, choice.finish_reason
    assert content == "Looking."
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("clock", {"zone": "UTC"}), ("clock", {"zone": "Asia/Tokyo"})]
    assert {call.type for call in calls} == {"function"}
    assert len({call.id for call in calls}) == 2
    assert reason == "tool_calls"


def test_tool_choice_none_leaves_calls_in_the_text():
    with served(says("</think>" + CALL.format("UTC"))) as server:
        done = server.client.chat.completions.create(
            model=MODEL, messages=HELLO, tools=[CLOCK], tool_choice="none")
    assert done.choices[0].message.tool_calls is None
    assert "<function=clock>" in done.choices[0].message.content
    assert done.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(stream):
    with served(says("</think>é!")) as server:
        ask = {"model": MODEL, "messages": HELLO, "logprobs": True, "top_logprobs": 2}
        if stream:
            chunks = server.client.chat.completions.create(**ask, stream=True)
            content = [e for chunk in chunks if chunk.choices[0].logprobs for e in chunk.choices[0].logprobs.content]
        else:
            content = server.client.chat.completions.create(**ask).choices[0].logprobs.content
    assert [bytes(entry.bytes) for entry in content] == [b"</think>", b"\xc3", b"\xa9", b"!", b"<|im_end|>"]
    assert content[3].token == "!"
    assert content[3].logprob == pytest.approx(-0.693, abs=1e-3)
    assert [top.token for top in content[3].top_logprobs] == ["!", '"']


# Text completions.


def test_completion_of_every_kind_of_prompt(echo):
    create = echo.client.completions.create
    assert create(model=MODEL, prompt="abc").choices[0].text == "abc"
    assert create(model=MODEL, prompt=[97, 98]).choices[0].text == "ab"
    assert [c.text for c in create(model=MODEL, prompt=["abc", "de"]).choices] == ["abc", "de"]
    done = create(model=MODEL, prompt=[[97], [98, 99]])
    assert [(c.index, c.text) for c in done.choices] == [(0, "a"), (1, "bc")]
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 5)


def test_max_tokens_is_16_unless_given(echo):
    long = echo.client.completions.create(model=MODEL, prompt="x" * 40)
    assert (long.choices[0].text, long.choices[0].finish_reason) == ("x" * 16, "length")
    assert echo.client.completions.create(model=MODEL, prompt="x" * 40, max_tokens=30).usage.completion_tokens == 30
    nearly_full = echo.client.completions.create(model=MODEL, prompt="x" * 4094)
    assert nearly_full.usage.completion_tokens == 2


@pytest.mark.parametrize("prompt", ["héy", [[104, 195, 169, 121]], ["héy"]])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(echo, prompt, stream):
    ask = {"model": MODEL, "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 4}
    if stream:
        choices = [chunk.choices[0] for chunk in echo.client.completions.create(**ask, stream=True)]
    else:
        choices = echo.client.completions.create(**ask).choices
    assert "".join(choice.text for choice in choices) == "héyhéy"
    assert [t for c in choices for t in c.logprobs.tokens] == ["h", "\ufffd", "\ufffd", "y"] * 2
    assert [o for c in choices for o in c.logprobs.text_offset] == [0, 1, 2, 3, 4, 5, 6, 7]
    logprobs = [value for c in choices for value in c.logprobs.token_logprobs]
    assert logprobs[0] is None
    assert all(value < 0 for value in logprobs[1:])
    assert choices[0].logprobs.top_logprobs[0] is None
    assert choices[0].logprobs.top_logprobs[3].keys() == {"y"}


def test_n_choices_are_n_separate_seeds(rambler):
    ask = {"model": MODEL, "prompt": ["x", "y"], "max_tokens": 30}
    together = rambler.client.completions.create(**ask, n=3, seed=5)
    apart = [rambler.client.completions.create(**ask, seed=5 + i) for i in range(3)]
    assert [c.text for c in together.choices] == [apart[j].choices[i].text for i in range(2) for j in range(3)]
    assert together.usage.prompt_tokens == 2
    assert together.usage.completion_tokens == sum(done.usage.completion_tokens for done in apart)


def test_streamed_choices_add_up(rambler):
    ask = {"model": MODEL, "prompt": ["x", "y"], "max_tokens": 30, "n": 2, "seed": 1}
    whole = rambler.client.completions.create(**ask)
    texts, reasons = [""] * 4, [None] * 4
    for chunk in rambler.client.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == ["length"] * 4


@pytest.mark.parametrize("chat", [False, True])
def test_text_alone_is_written_as_all_else_is(echo, chat):
    door, usage = echo.session.door, StreamOptions(include_usage=True)
    shape = (ChatShape(ChatRequest(messages=[]), door) if chat
             else CompletionShape(CompletionRequest(prompt="x"), [[1]], 2, door))
    writer = OpenAIWriter(shape, MODEL, 2, usage)
    assert writer.add(Event(1, token_ids=(7,)))  # the choice begins
    for text in ("a", 'b"\\\n', "\0", "🙂", "null"):
        event = Event(1, text, token_ids=(7,))
        assert writer.add(event) == writer._chunks(event)
        [choice] = json.loads(writer.add(event).removeprefix("data: "))["choices"]
        assert (choice["index"], choice["delta"]["content"] if chat else choice["text"]) == (1, text)
        assert choice["finish_reason"] is None
    assert '"finish_reason":"length"' in writer.add(Event(1, "end", finish_reason=FinishReason.LENGTH))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("stop", ["END", ["zzz", "END"]])
def test_stop_strings_over_chunk_borders(chunk, stop):
    with served(says("first END second", chunk=chunk)) as server:
        ask = {"model": MODEL, "prompt": "x", "stop": stop, "max_tokens": 99}
        whole = server.client.completions.create(**ask)
        streamed = list(server.client.completions.create(**ask, stream=True))
        server.wait_idle()
    assert whole.choices[0].text == "".join(part.choices[0].text for part in streamed) == "first "
    assert whole.choices[0].finish_reason == streamed[-1].choices[0].finish_reason == "stop"
    assert whole.choices[0].stop_reason == "END"
    assert whole.usage.completion_tokens == len("first END")


def test_vllm_fields(echo):
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "stop_token_ids": [98],
             "ignore_eos": True, "skip_special_tokens": False, "include_stop_str_in_output": True, "priority": -1}
    done = echo.client.completions.create(model=MODEL, prompt="abc", max_tokens=9, extra_body=extra)
    assert (done.choices[0].text, done.choices[0].stop_reason) == ("ab", 98)


def test_harmless_values_are_accepted(echo):
    done = echo.client.chat.completions.create(
        model=MODEL, messages=HELLO, max_completion_tokens=2, store=False, user="me", metadata={"a": "b"},
        service_tier="auto", parallel_tool_calls=True, response_format={"type": "text"}, modalities=["text"],
        logit_bias={"5": 1.5}, n=1, extra_body={"best_of": 1, "suffix": None, "functions": None})
    assert done.usage.completion_tokens == 2


# The small endpoints.


def test_models(echo):
    [card] = echo.client.models.list().data
    assert (card.id, card.object, card.max_model_len) == (MODEL, "model", 4096)
    assert echo.client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        echo.client.models.retrieve("other")


def test_tokenize_and_back(echo):
    body = echo.post("/tokenize", {"prompt": "hé", "return_token_strs": True}).json()
    assert body == {"count": 3, "max_model_len": 4096, "tokens": [104, 195, 169], "token_strs": ["h", "�", "�"]}
    assert echo.post("/detokenize", {"tokens": body["tokens"]}).json() == {"prompt": "hé"}
    chat = echo.post("/tokenize", {"model": MODEL, "messages": HELLO, "add_generation_prompt": False}).json()
    assert chat["tokens"] == CHAT.encode(CHAT.render(HELLO, add_generation_prompt=False))


def test_health_and_version(echo):
    assert echo.get("/health").status_code == 200
    assert echo.get("/version").json().keys() == {"version"}


def test_metrics_count_what_happened():
    with served(says("four")) as server:
        server.client.completions.create(model=MODEL, prompt="abc")
        server.client.completions.create(model=MODEL, prompt="abc", max_tokens=2)
        server.post("/v1/completions", {"prompt": "", "model": MODEL})
        page = server.get("/metrics").text
    for line in (
        "tritium_prompt_tokens_total 6.0",
        "tritium_generated_tokens_total 7.0",
        "tritium_requests_running 0.0",
        "tritium_requests_waiting 0.0",
        "tritium_kv_pages_used 0.0",
        "tritium_kv_pages_total 4096.0",
        "tritium_state_slots_used 0.0",
        "tritium_state_slots_total 64.0",
        "tritium_preemptions_total 0.0",
        'tritium_requests_finished_total{reason="stop"} 1.0',
        'tritium_requests_finished_total{reason="length"} 1.0',
        'tritium_http_errors_total{status="400"} 1.0',
        "tritium_time_to_first_token_seconds_count 2.0",
        "tritium_time_per_output_token_seconds_count 2.0",
        "tritium_request_duration_seconds_count 2.0",
    ):
        assert line in page.splitlines(), line


# Bad input: the right status, one clear line that names the field, others unaffected.


@pytest.mark.parametrize(("fields", "param", "message"), [
    ({"temperature": -1}, "temperature", "within [0, 100]"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"temperature": True}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "within (0, 1]"),
    ({"max_tokens": -5}, "max_tokens", "within [1"),
    ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
    ({"max_tokens": 10**30}, "max_tokens", ""),
    ({"max_tokens": 5000}, "max_tokens", "4096"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "differ"),
    ({"n": 0}, "n", "within [1, 128]"),
    ({"n": 129}, "n", "within [1, 128]"),
    ({"seed": 2**70}, "seed", "64 bits"),
    ({"seed": "x"}, "seed", "integer"),
    ({"stop": 5}, "stop", "string"),
    ({"stop": ["a", 5]}, "stop", "string"),
    ({"stop": ""}, "stop", "empty"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "not a token id"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "within [-100, 100]"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "outside the vocabulary"),
    ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "equal to 20"),
    ({"max_completion_tokens": -1}, "max_completion_tokens", "equal to 1"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"include_ussage": True}}, "stream_options.include_ussage", "unknown field"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats", ""),
    ({"temprature": 1}, "temprature", "unknown field"),
    ({"tool_choice": "sometimes", "tools": [CLOCK]}, "tool_choice", "not supported"),
    ({"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [CLOCK]}, "tool_choice", "not among"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].function", "missing"),
    ({"tools": "clock"}, "tools", "list"),
    ({"response_format": {"type": "yaml"}}, "response_format", "text, json_object or json_schema"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "both"),
    ({"response_format": {"type": "json_object"}, "min_tokens": 2}, "min_tokens", "does not go with"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"properties": {"a": {"not": {}}}}}}},
     "response_format.json_schema.schema", "properties.a: Unimplemented keys: [\"not\"]"),
    ({"thinking_token_budget": -1}, "thinking_token_budget", "greater than or equal to 0"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
    ({"functions": [{"name": "f"}]}, "functions", "not supported"),
    ({"function_call": "auto"}, "function_call", 'only "none" is'),
    ({"audio": {"voice": "x"}}, "audio", "not supported"),
    ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
    ({"prediction": {}}, "prediction", "not supported"),
    ({"web_search_options": {}}, "web_search_options", "not supported"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "valid boolean"),
    ({"store": True}, "store", "only false is"),
    ({"best_of": 2}, "best_of", "not supported"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
    ({"guided_json": 5}, "guided_json", "must be a JSON schema"),
    ({"guided_regex": "(?=a)b"}, "guided_regex", "look-around"),
    ({"guided_choice": []}, "guided_choice", "list of strings"),
    ({"guided_grammar": "start: foo"}, "guided_grammar", "unknown name"),
    ({"continue_final_message": True}, "continue_final_message", "not supported"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", ""),
    ({"messages": []}, "messages", "empty"),
    ({"messages": "hi"}, "messages", "list"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "wizard"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages",
     "text only"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages", "context is 4096 tokens"),
    ({"model": 5}, "model", "valid string"),
])
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_chat_request_gets_400_naming_the_field(echo, fields, param, message, stream):
    defaults = {"model": MODEL, "messages": HELLO} | ({} if "stream_options" in fields else {"stream": stream})
    response = echo.post("/v1/chat/completions", defaults | fields)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]
    assert "\n" not in error["message"]
    over = "4096" in message
    assert error["code"] == ("context_length_exceeded" if over else None)


@pytest.mark.parametrize(("fields", "param"), [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": [1, 10**9]}, "prompt"),
    ({"prompt": [[1], "x"]}, "prompt"),
    ({"prompt": "x", "suffix": "y"}, "suffix"),
    ({"prompt": "x", "best_of": 3}, "best_of"),
    ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ({"prompt": "x", "logprobs": True}, "logprobs"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "messages": []}, "messages"),
])
def test_a_bad_completion_request_gets_400_naming_the_field(echo, fields, param):
    response = echo.post("/v1/completions", {"model": MODEL} | fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b'"x"', b"{} x", b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "\xff"}',
    b'{"prompt": "x", "temperature": Infinity}', b'{"prompt": "x", "temperature": 1e999}', b'{"prompt": "\\ud800"}',
    b'{"prompt": "\\udc00x"}', b"[" * 100_000, b'{"prompt": "x", "n": ' + b"9" * 9000 + b"}", b'{"a":' * 5000])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_a_body_that_is_no_json_gets_400(echo, body, path):
    response = echo.post(path, content=body)
    assert response.status_code == 400
    assert len(response.json()["error"]["message"].splitlines()) == 1


def test_errors_by_class_of_the_official_client(echo):
    with pytest.raises(openai.NotFoundError) as missing:
        echo.client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        echo.client.completions.create(model=MODEL, prompt="x" * 5000, stream=True)
    assert bad.value.code == "context_length_exceeded"
    assert echo.get("/nothing").json()["error"]["message"] == "GET /nothing is not served here"
    assert "(use POST)" in echo.get("/v1/completions").json()["error"]["message"]
    assert echo.post("/chat/completions", {}).json()["error"]["message"].endswith("(/v1/chat/completions is)")
    for field, meant in (("enable_thinking", "chat_template_kwargs"), ("max_token", "max_tokens")):
        said = echo.post("/v1/chat/completions", {"messages": [], field: 1}).json()["error"]["message"]
        assert f"unknown field: {field}" in said
        assert meant in said
    assert httpx.head(f"{echo.url}/health").status_code == 200
    assert echo.get("/v1/completions").status_code == 405


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_who_stops_reading_for_a_while_gets_the_same_bytes(version):
    """Pieces go past the stream's task while the connection takes them, and through it when not: never out of order."""
    body = json.dumps({"prompt": "x", "max_tokens": 1900, "seed": 3, "stream": True, "logprobs": 20}).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    with served(rambles(step_seconds=0.001)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        for listener in (sock for inner in server.server.servers for sock in inner.sockets):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(10)
            client.connect((host, int(port)))
            client.sendall(head.encode() + body)
            raw = client.recv(2000)
            for wait in (0.8, 0.4, 0.0):
                time.sleep(wait)
                for _ in range(200 if wait else 10**6):
                    if not (piece := client.recv(2000)):
                        break
                    raw += piece
        whole = server.post("/v1/completions", json.loads(body) | {"stream": False}).json()["choices"][0]["text"]
    _, _, rest = raw.partition(b"\r\n\r\n")
    if version == "1.1":
        chunks, rest = rest, b""
        while chunks and (size := int(chunks.partition(b"\r\n")[0], 16)):
            chunks = chunks.partition(b"\r\n")[2]
            rest, chunks = rest + chunks[:size], chunks[size + 2 :]
    events = rest.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    said = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-2]]
    assert "".join(choice["text"] for choice in said) == whole
    assert len({len(choice["logprobs"]["tokens"]) for choice in said}) > 1  # it did fall behind


def test_a_huge_body_gets_413_and_holds_nobody_up(rambler):
    with ThreadPoolExecutor(2) as pool:
        huge = pool.submit(rambler.post, "/v1/completions", {"model": MODEL, "prompt": "x" * 10_000_000})
        begin = time.monotonic()
        assert rambler.client.completions.create(model=MODEL, prompt="x").usage.completion_tokens == 16
        assert time.monotonic() - begin < 2
        assert huge.result().status_code == 413
        assert "larger than" in huge.result().json()["error"]["message"]


def test_a_prompt_far_too_long_is_refused_beside_others(rambler):
    with ThreadPoolExecutor(2) as pool:
        begin = time.monotonic()
        long = pool.submit(rambler.post, "/v1/completions", {"model": MODEL, "prompt": "word " * 100_000})
        rambler.client.completions.create(model=MODEL, prompt="x")
        alone = time.monotonic() - begin
        assert long.result().json()["error"]["code"] == "context_length_exceeded"
    assert alone < 2


# Clients that leave, engines that die.


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_client_that_leaves_a_stream_frees_its_request(path):
    with served(rambles(step_seconds=0.002)) as server:
        body = {"model": MODEL, "stream": True, "max_tokens": 3000, "n": 2}
        body |= {"messages": HELLO} if path.startswith("chat") else {"prompt": "x"}
        with httpx.stream("POST", f"{server.url}/v1/{path}", json=body, timeout=20) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            next(lines)
            server.wait_for(running=2)
        server.wait_idle()
        assert server.metric('requests_finished_total{reason="abort"}') == 2


def test_clients_that_leave_while_waiting_or_queued_free_their_requests():
    with served(rambles(step_seconds=0.002, max_num_seqs=1)) as server:
        for stream in (False, True):
            sockets = []
            for _ in range(4):  # one runs, three wait
                body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 3000, "stream": stream}).encode()
                sockets.append(socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))))
                head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
                sockets[-1].sendall(head + body)
            server.wait_for(running=1, waiting=3)
            for connection in sockets:
                connection.close()
            server.wait_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_dying_engine(stream):
    with served(rambles(die_after=8, step_seconds=0.01)) as server:
        assert server.get("/health").status_code == 200
        if stream:  # the answer has begun: the error comes in the stream
            with pytest.raises(openai.APIError, match=r"the engine died.*scripted death"):
                list(server.client.completions.create(model=MODEL, prompt="x", max_tokens=99, stream=True))
        else:
            with pytest.raises(openai.InternalServerError, match=r"the engine died.*scripted death"):
                server.client.completions.create(model=MODEL, prompt="x", max_tokens=99)
        assert server.get("/health").status_code == 503
        with pytest.raises(openai.InternalServerError) as refused:
            server.client.chat.completions.create(model=MODEL, messages=HELLO)
        assert (refused.value.status_code, refused.value.code) == (503, "unavailable")
        assert server.get("/metrics").status_code == 200


def test_a_stop_of_the_server_ends_answers_in_words(caplog):
    with served(rambles(step_seconds=0.01)) as server:
        stream = server.client.completions.create(model=MODEL, prompt="x", max_tokens=3000, stream=True)
        next(stream)
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    assert "Traceback" not in caplog.text


def test_64_streams_at_once_none_corrupted(seed):
    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt="x", max_tokens=60, seed=seed + i, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everybody(server) -> list[str]:
        async with server.async_client() as client:
            return await asyncio.gather(*(one(client, i) for i in range(64)))

    with served(rambles(step_seconds=0.005)) as server:
        texts = asyncio.run(everybody(server))
        for i in range(0, 64, 7):
            alone = server.client.completions.create(model=MODEL, prompt="x", max_tokens=60, seed=seed + i)
            assert texts[i] == alone.choices[0].text
        assert len(set(texts)) == 64
        server.wait_idle()


def test_a_port_in_use_is_one_clear_line():
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="cannot listen on 127") as caught:
        listen("127.0.0.1", taken.getsockname()[1])
    assert caught.value.message.endswith("address already in use")
    assert "--port" in str(caught.value)
