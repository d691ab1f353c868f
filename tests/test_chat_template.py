"""Chat templates: the family's, rendered as Transformers renders it; checked messages; broken and hostile ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from byte_chat import byte_chat_format

import tritium
from tritium.chat import ChatFormat, images_in, load_chat
from tritium.chat.template import ChatTemplate
from tritium.config import TOOL_CALL_PARSERS, EngineConfig
from tritium.core import CheckpointError, ConfigError, RequestError

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather <now> & here, in °C",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
USER: dict[str, Any] = {"role": "user", "content": "What's the weather in Zürich?  "}
SYSTEM: dict[str, Any] = {"role": "system", "content": " Be brief. "}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


CALLING: dict[str, Any] = {
    "role": "assistant",
    "content": "Let me look.",
    "reasoning_content": "I need the tool.\nReally.",
    "tool_calls": [
        call("get_weather", city="Zürich", days=3),
        call("get_weather", city="a\nb", flag=True, none=None, x=1.5, deep={"a": [1, "é<"]}, l=[1]),
    ],
}
RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "call_1", "content": '{"t": 21}'}
IMAGE: dict[str, Any] = {
    "role": "user",
    "content": [
        {"type": "text", "text": "What is this? "},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        {"type": "video", "video": "clip.mp4"},
        {"type": "text", "text": "And this?"},
        {"type": "image", "image": "b.png"},
    ],
}

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]]] = {
    "user": ([USER], None, {}),
    "system": ([SYSTEM, USER], None, {}),
    "thinking off": ([SYSTEM, USER], None, {"enable_thinking": False}),
    "thinking on": ([USER], None, {"enable_thinking": True}),
    "tools": ([SYSTEM, USER], [WEATHER, WEATHER], {}),
    "tools without system": ([USER], [WEATHER], {}),
    "calls and results": ([USER, CALLING, RESULT, RESULT], [WEATHER], {}),
    "call without text": ([USER, {**CALLING, "content": ""}, RESULT], [WEATHER], {}),
    "call without arguments": ([USER, {**CALLING, "tool_calls": [call("f")]}, RESULT], None, {}),
    "old reasoning dropped": ([USER, CALLING, RESULT, {"role": "assistant", "content": "21"}, USER], [WEATHER], {}),
    "reasoning in content": ([USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}], None, {}),
    "reasoning kept": ([USER, {"role": "assistant", "content": "yes", "reasoning_content": "hm"}], None, {}),
    "placeholders": ([IMAGE], None, {}),
    "numbered placeholders": ([IMAGE, {"role": "assistant", "content": "Yes."}, IMAGE], None, {"add_vision_id": True}),
    "text parts": ([{"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b ")]}], None, {}),
    "markup in content": ([{"role": "user", "content": "{{ 7 * 7 }} {% if %} <b>&amp;</b>"}], None, {}),
}


@pytest.fixture(scope="module")
def source(shared_data: Path) -> str:
    path = shared_data / "qwen3.5-chat-template.jinja"
    if not path.is_file():
        pytest.skip("no qwen3.5-chat-template.jinja in ../shared/data")
    return path.read_text()


@pytest.fixture(scope="module")
def family(source: str) -> ChatFormat:
    return byte_chat_format(source)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_family_template_renders_as_transformers_renders_it(
    family: ChatFormat, source: str, name: str, add_generation_prompt: bool
) -> None:
    assert_renders_as_transformers(family, source, name, add_generation_prompt)


@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if "placeholders" not in name])
def test_the_embedded_template_renders_as_transformers_renders_it(name: str) -> None:
    directory = Path(tritium.__file__).parent / "embedded" / "dense"
    if not directory.is_dir():
        pytest.skip("no embedded model")
    source = (directory / "chat_template.jinja").read_text()
    assert_renders_as_transformers(load_chat(directory), source, name, add_generation_prompt=True)


def assert_renders_as_transformers(chat: ChatFormat, source: str, name: str, add_generation_prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages, tools, variables = CONVERSATIONS[name]
    theirs = json.loads(json.dumps(messages))
    for tool_call in [c for message in theirs for c in message.get("tool_calls", [])]:
        tool_call["function"]["arguments"] = json.loads(tool_call["function"]["arguments"])
    expected, _ = render_jinja_template(
        [theirs], tools=tools, chat_template=source, add_generation_prompt=add_generation_prompt, **variables
    )
    rendered = chat.render(
        messages, tools=tools, add_generation_prompt=add_generation_prompt, template_kwargs=variables
    )
    assert rendered == expected[0]


def test_the_generation_prompt_opens_or_closes_the_reasoning(family: ChatFormat) -> None:
    assert family.render([USER]).endswith("<|im_start|>assistant\n<think>\n")
    off = family.render([USER], template_kwargs={"enable_thinking": False})
    assert off.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_the_fake_honours_enable_thinking_too() -> None:
    fake = byte_chat_format()
    assert fake.render([USER]).endswith("<think>\n")
    assert fake.render([USER], template_kwargs={"enable_thinking": False}).endswith("<think>\n\n</think>\n\n")
    assert "get_weather" in fake.render([USER, CALLING, RESULT, IMAGE], tools=[WEATHER])


def test_developer_is_system_and_reasoning_is_reasoning_content(family: ChatFormat) -> None:
    assert family.render([{**SYSTEM, "role": "developer"}, USER]) == family.render([SYSTEM, USER])
    answer = {"role": "assistant", "content": "yes"}
    assert family.render([USER, {**answer, "reasoning": "hm"}]) == family.render(
        [USER, {**answer, "reasoning_content": "hm"}]
    )


def test_a_message_as_the_openai_client_dumps_it_is_accepted(family: ChatFormat) -> None:
    dumped = {**CALLING, "refusal": None, "annotations": [], "audio": None, "function_call": None, "content": None}
    assert family.render([USER, dumped, RESULT]) == family.render([USER, {**CALLING, "content": ""}, RESULT])


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        (None, "messages", "list"),
        ("hello", "messages", "list"),
        ([], "messages", "empty"),
        (["hi"], "messages[0]", "object"),
        ([USER, {"content": "x"}], "messages[1].role", "missing"),
        ([USER, {"role": "robot", "content": "x"}], "messages[1].role", "robot"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role", "must be one of"),
        ([{"role": "user"}], "messages[0].content", "missing"),
        ([{"role": "user", "content": None}], "messages[0].content", "missing"),
        ([{"role": "assistant", "content": None}, USER], "messages[0].content", "missing"),
        ([{"role": "user", "content": 3}], "messages[0].content", "int"),
        ([{"role": "user", "content": "a\ud800b"}], "messages[0].content", "U+D800"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]", "object"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "string"),
        ([{"role": "user", "content": [{"type": "smell"}]}], "messages[0].content[0].type", "smell"),
        ([{"role": "user", "content": [{"type": "image", "image": "\udc00"}]}], "messages[0].content[0]", "surrogate"),
        ([{**USER, "cache": "yes"}], "messages[0].cache", "not supported"),
        ([{**USER, "name": 3}], "messages[0].name", "string"),
        ([{**USER, "tool_calls": [call("f")]}], "messages[0].tool_calls", "assistant"),
        ([USER, {"role": "assistant", "tool_calls": "f"}], "messages[1].tool_calls", "list"),
        ([USER, {"role": "assistant", "tool_calls": [{}]}], "messages[1].tool_calls[0].function", "missing"),
        *[
            (
                [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}],
                "messages[1].tool_calls[0].function.arguments",
                words,
            )
            for arguments, words in [
                ("{", "not valid JSON"),
                ('{"x": NaN}', "not valid JSON"),
                ('{"x": "\\ud800"}', "not valid JSON"),
                ("[" * 100_000, "not valid JSON"),
                ("[1]", "object"),
                (3, "object"),
            ]
        ],
        ([SYSTEM], "messages", "No user query"),
        ([USER, SYSTEM], "messages", "must be at the beginning"),
        ([{**SYSTEM, "content": IMAGE["content"]}, USER], "messages", "cannot contain images"),
    ],
)
def test_bad_messages_are_refused_by_name(family: ChatFormat, messages: Any, param: str, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        family.render(messages)
    assert refused.value.param == param
    assert words in refused.value.message
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ("x", "tools"),
        ([3], "tools[0]"),
        ([{"type": "function"}], "tools[0].function"),
        ([WEATHER, {"type": "search", "function": {"name": "x"}}], "tools[1].type"),
        ([{"type": "function", "function": {"name": ""}}], "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "f", "parameters": []}}], "tools[0].function.parameters"),
        ([{"type": "function", "function": {"name": "f", "description": "\ud800"}}], "tools[0]"),
    ],
)
def test_bad_tools_are_refused_by_name(tools: Any, param: str) -> None:
    fake = byte_chat_format()
    for ask in (lambda: fake.render([USER], tools=tools), lambda: fake.stream(tools=tools)):
        with pytest.raises(RequestError) as refused:
            ask()
        assert refused.value.param == param


@pytest.mark.parametrize("variables", [{"messages": []}, {"add_generation_prompt": False}, {"x": object()}, [1]])
def test_bad_template_variables_are_refused(variables: Any) -> None:
    with pytest.raises(RequestError, match="chat_template_kwargs"):
        byte_chat_format().render([USER], template_kwargs=variables)


def test_images_are_noticed() -> None:
    assert images_in([USER, IMAGE])
    assert images_in([{"role": "user", "content": [{"image": "x"}]}])
    assert not images_in([SYSTEM, USER, {"role": "user", "content": [{"type": "text", "text": "image_url"}]}])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('not\ntoday') }}", "not today"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "too big"),
        ("\n\n{{ messages[0].nothing.at_all }}", "line 3"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "division"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_template_that_fails_on_messages_is_one_clear_line(template: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as refused:
        byte_chat_format(template).render([USER])
    assert refused.value.param == "messages"
    assert "\n" not in str(refused.value)


def test_the_dialect_of_hugging_face() -> None:
    def render(template: str) -> str:
        return byte_chat_format(template).render([{"role": "user", "content": "<é'>"}])

    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "<é\'>"}]'
    assert render("  {% if true %}\na\n  {% endif %}\nb") == "a\nb"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{{ tools is none }} {{ documents is none }}") == "True True"


def write(directory: Path, **files: str | dict[str, Any]) -> Path:
    byte_chat_format().tokenizer._inner.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def test_where_a_template_is_found(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        load_chat(write(tmp_path)).render([USER])
    write(tmp_path, tokenizer_config__json={"chat_template": "one {{ bos_token }}", "bos_token": {"content": "<s>"}})
    assert load_chat(tmp_path).render([USER]) == "one <s>"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write(tmp_path, tokenizer_config__json={"chat_template": named})
    assert load_chat(tmp_path).render([USER]) == "plain"
    assert load_chat(tmp_path).render([USER], tools=[WEATHER]) == "tools"
    write(tmp_path, chat_template__jinja="file")
    assert load_chat(tmp_path).render([USER]) == "file"


def test_the_parser_of_tool_calls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By name, or by the template: one that writes calls in a form that is not known gets a warning."""
    assert TOOL_CALL_PARSERS == ("auto", "qwen3_xml", "qwen3_coder")
    call = "{% for tool in tools %}{{ '<tool_call>' ~ OPEN }}{% endfor %}"
    write(tmp_path, chat_template__jinja=call.replace("OPEN", "'<function='"))
    load_chat(tmp_path)
    assert not caplog.text
    write(tmp_path, chat_template__jinja=call.replace("OPEN", "'{}'"))
    load_chat(tmp_path, "qwen3_coder")
    assert not caplog.text
    load_chat(tmp_path)
    assert "does not write tool calls as qwen3_xml" in caplog.text
    with pytest.raises(ConfigError, match="--tool-call-parser hermes") as refused:
        EngineConfig(tool_call_parser="hermes")
    assert refused.value.hint == "one of auto, qwen3_xml, qwen3_coder"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"chat_template__jinja": "\n\n{% if %}"}, "chat_template.jinja, line 3"),
        ({"chat_template__jinja": "{{ x | nonsense }}"}, "nonsense"),
        ({"tokenizer_config__json": "{"}, "tokenizer_config.json is not JSON"),
        ({"tokenizer_config__json": "[]"}, "must hold a JSON object"),
        ({"tokenizer_config__json": {"chat_template": 3}}, "must be a string"),
        ({"tokenizer__json": "{"}, "tokenizer.json cannot be read"),
        ({"tokenizer__json": "{}"}, "tokenizer.json cannot be read"),
    ],
)
def test_broken_files_are_named_at_load(tmp_path: Path, files: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as refused:
        load_chat(write(tmp_path, **files))
    assert "\n" not in str(refused.value)


def test_missing_and_undecodable_files_are_named_at_load(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_chat(tmp_path)
    (write(tmp_path) / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        load_chat(tmp_path)


def test_a_template_nested_too_deeply_is_refused_at_load() -> None:
    with pytest.raises(CheckpointError, match="nested"):
        ChatTemplate("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}")
