"""Streams of an answer: reasoning, tool calls and stop strings come out the same however the text is cut."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from byte_chat import byte_chat_format

from tritium.chat import ChatFormat, TextStream
from tritium.chat.stop import StopMatcher
from tritium.chat.tools import coerce

FAKE = byte_chat_format()
SPECIAL_TAGS = byte_chat_format(special_tags=True)
THINKING = "<|im_start|>assistant\n<think>\n"
DIRECT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"

PARAMETERS = {
    "type": "object",
    "$defs": {"Unit": {"enum": ["C", "F"]}, "Tree": {"anyOf": [{"$ref": "#/$defs/Tree"}, {"type": "integer"}]}},
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"$ref": "#/$defs/Unit"},
        "opts": {"type": "object"},
    },
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "clock"}},
]
WEATHER = "<tool_call>\n<function=weather>\n<parameter=city>\nZürich\n</parameter>\n</function>\n</tool_call>"
CLOCK = "<tool_call>\n<function=clock>\n</function>\n</tool_call>"
ZURICH = ("weather", {"city": "Zürich"})

Outcome = tuple[str, str, list[tuple[str, dict[str, Any]]], str | None]


def collect(stream: TextStream, pushes: Sequence[Sequence[int]]) -> Outcome:
    deltas = [stream.push(ids) for ids in pushes] + [stream.push([], final=True)]
    stops = [delta.stopped_by for delta in deltas if delta.stopped_by]
    assert len(stops) <= 1
    assert (stream.stopped_by is not None) == bool(stops)
    return (
        "".join(delta.text for delta in deltas),
        "".join(delta.reasoning for delta in deltas),
        [(call.name, call.arguments) for delta in deltas for call in delta.tool_calls],
        stops[0] if stops else None,
    )


def read(text: str, *, prompt: str = DIRECT, tools: Any = TOOLS, fmt: ChatFormat = FAKE, **options: Any) -> Outcome:
    return collect(fmt.stream(prompt=prompt, tools=tools, **options), [fmt.encode(text)])


def text_of(text: str, **options: Any) -> str:
    """The answer, where that is all there is."""
    answer, reasoning, calls, stop = read(text, **options)
    assert (reasoning, calls, stop) == ("", [], None)
    return answer


# --- reasoning


def test_reasoning_begun_by_the_prompt() -> None:
    assert read("I think.\nYes.\n</think>\n\nHi.\n", prompt=THINKING) == ("Hi.\n", "I think.\nYes.", [], None)


def test_reasoning_begun_by_the_model() -> None:
    assert read("<think>\nhm\n</think>\n\nHi", prompt=DIRECT) == ("Hi", "hm", [], None)
    assert read("\n <think>hm</think>Hi", prompt="") == ("Hi", "hm", [], None)


def test_reasoning_is_empty_or_never_closed() -> None:
    assert read("\n</think>\n\nHi", prompt=THINKING) == ("Hi", "", [], None)
    assert read("on and on </thin\n", prompt=THINKING) == ("", "on and on </thin\n", [], None)


def test_a_tag_inside_the_answer_is_text() -> None:
    assert text_of("Use <think> and </think>.\n") == "Use <think> and </think>.\n"
    assert text_of("  <thin") == "  <thin"


def test_without_parsing_all_text_is_plain() -> None:
    text = f"a</think>\n\n{WEATHER}\n"
    assert text_of(text, prompt=THINKING, tools=None, parse_reasoning=False) == text


def test_the_prompt_may_be_ids() -> None:
    for prompt in (THINKING, "x" * 500 + THINKING):
        stream = FAKE.stream(prompt=FAKE.encode(prompt))
        assert collect(stream, [FAKE.encode("a</think>b")]) == ("b", "a", [], None)


@pytest.mark.parametrize("fmt", [FAKE, SPECIAL_TAGS])
@pytest.mark.parametrize("spell", [True, False])
def test_reasoning_tokens_are_counted_without_the_tags(fmt: ChatFormat, spell: bool) -> None:
    def ids(text: str) -> list[int]:
        return list(text.encode()) if spell else fmt.encode(text)

    for prompt, text, count in [
        (THINKING, "abc\n</think>\n\nHello", 3 if spell else 4),
        (THINKING, "a < b </ c", 10),
        (DIRECT, "<think>abc</think>Hello", 3),
        (DIRECT, "Hello", 0),
    ]:
        stream = fmt.stream(prompt=prompt)
        stream.push(ids(text), final=True)
        # A newline that is spelled before a spelled tag is held back with it; either count is the format's, not text.
        assert abs(stream.reasoning_tokens - count) <= (spell and "\n</think>" in text)
        assert stream.tokens_used == len(ids(text))


# --- tool calls


def test_a_call_after_text() -> None:
    assert read(f"Let me look.\n\n{WEATHER}") == ("Let me look.", "", [ZURICH], None)


def test_several_calls_and_text_around_them() -> None:
    assert read(f"{WEATHER}\n{CLOCK}\n\nDone.\n") == ("\n\nDone.\n", "", [ZURICH, ("clock", {})], None)
    assert read(f"{WEATHER}\n{CLOCK}\n") == ("", "", [ZURICH, ("clock", {})], None)


def test_ids_of_calls_are_unique() -> None:
    calls = FAKE.stream(tools=TOOLS).push(FAKE.encode(WEATHER + WEATHER), final=True).tool_calls
    assert len({call.id for call in calls}) == 2
    assert all(call.id.startswith("call_") and len(call.id) == 29 and int(call.id[5:], 16) for call in calls)


def test_text_comes_out_at_once_and_a_call_when_it_is_complete() -> None:
    stream = FAKE.stream(prompt=DIRECT, tools=TOOLS)
    assert stream.push(FAKE.encode("Look: 1 < 2")).text == "Look: 1 < 2"
    assert stream.push(FAKE.encode(" <tool_")).text == " "
    assert stream.push(FAKE.encode("box>")).text == "<tool_box>"
    assert stream.push(FAKE.encode(WEATHER)[:-1]).text == ""
    assert [call.name for call in stream.push(FAKE.encode("</tool_call>")).tool_calls] == ["weather"]


@pytest.mark.parametrize(
    "text",
    [
        "Write <tool_call> first.\n",
        "`<tool_call>\n<function=` opens a call.",
        "<tool_call>\n<function=weather>\nbut no parameter\n</function>\n</tool_call>",
        "<tool_call>\n<function=weather>\n<param",  # cut off by max_tokens
        "<tool_call>\n<function=>\n</function>\n</tool_call>",
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>',
        "<tool_call>",
        "\n\n<tool_call>\n\n<func",
        "</tool_call>\n",
    ],
)
def test_what_is_no_call_comes_out_as_it_was_written(text: str) -> None:
    assert text_of(text) == text


def test_a_real_call_after_a_mention_is_found() -> None:
    mention = "Say <tool_call>\n<function=weather> like so: "
    assert read(f"{mention}\n{WEATHER}") == (mention, "", [ZURICH], None)


@pytest.mark.parametrize(
    "call",
    [
        WEATHER.replace("\n</parameter>", ""),
        WEATHER.replace("\n</function>", ""),
        WEATHER.replace("\n</tool_call>", ""),
        WEATHER.replace("</function>", "</function>\n</function>"),
        WEATHER + "\n</tool_call>",
        WEATHER.replace("\n", ""),
        WEATHER.replace("</parameter>", "</parameter>\n<parameter=city>\nParis\n</parameter>"),
        WEATHER.replace("</parameter>", "</parameter>\n</parameter>"),
    ],
    ids=["parameter", "function", "call", "function twice", "call twice", "no newlines", "name twice", "closed twice"],
)
def test_missing_and_doubled_closing_tags_are_forgiven(call: str) -> None:
    assert read(call) == ("", "", [ZURICH], None)


def test_a_call_that_is_cut_off_ends_with_the_text() -> None:
    head = "<tool_call>\n<function=weather>\n<parameter=city>\n"
    assert read(head + "Zür") == ("", "", [("weather", {"city": "Zür"})], None)
    assert read(head + "Zürich\n</para") == ("", "", [ZURICH], None)
    unfinished = head + "Zürich\n</parameter>\n<parameter=days>\n1"  # maybe of 12
    assert read(unfinished) == ("", "", [ZURICH], None)


def test_a_missing_closing_tag_between_parameters() -> None:
    parameters = "<parameter=days>\n3\n<parameter=city>\nBern\n</parameter>"
    call = f"<tool_call><function=weather>{parameters}</function></tool_call>"
    assert read(call) == ("", "", [("weather", {"days": 3, "city": "Bern"})], None)


@pytest.mark.parametrize(
    "value", ["", "\n", "two\nlines\n", "</parameter> and </tool_call>", "a <parameter=x> b", "<think>"]
)
def test_a_string_stays_as_it_is(value: str) -> None:
    assert read(WEATHER.replace("Zürich", value)) == ("", "", [("weather", {"city": value})], None)


def test_an_unknown_function_is_the_callers_to_refuse() -> None:
    parameters = '<parameter=x>{"a": 1}</parameter><parameter=y>1</parameter>'
    calls = read(f"<tool_call><function=nope>{parameters}</function></tool_call>")[2]
    assert calls == [("nope", {"x": {"a": 1}, "y": "1"})]


def test_without_tools_a_call_is_text() -> None:
    assert text_of(WEATHER, tools=None) == WEATHER


def test_a_call_inside_reasoning_acts_only_where_nothing_follows() -> None:
    assert read(f"So:\n{WEATHER}\n{CLOCK}\n", prompt=THINKING) == ("", "So:", [ZURICH, ("clock", {})], None)
    assert read(f"Not {WEATHER}, no.\n</think>\n\nHi", prompt=THINKING) == ("Hi", f"Not {WEATHER}, no.", [], None)
    assert read(f"Not\n{WEATHER}\n</think>\n\nHi", prompt=THINKING) == ("Hi", f"Not\n{WEATHER}", [], None)


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "3", "3"),
        ({"type": "string"}, '{"a": 1}', '{"a": 1}'),
        ({"type": "integer"}, "3", 3),
        ({"type": "integer"}, " 3.0 ", 3),
        ({"type": "integer"}, "3.5", "3.5"),
        ({"type": "integer"}, "three", "three"),
        ({"type": "integer"}, "true", "true"),
        ({"type": "integer"}, "9" * 5000, "9" * 5000),
        ({"type": "number"}, "3", 3),
        ({"type": "number"}, "-2.5e3", -2500.0),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "boolean"}, "1", "1"),
        ({"type": "null"}, "null", None),
        ({"type": "object"}, '{"a": [1, null]}', {"a": [1, None]}),
        ({"type": "object"}, "[1]", "[1]"),
        ({"type": "object"}, "{'a': 1}", "{'a': 1}"),
        ({"type": "object"}, '{"a": "\\ud800"}', '{"a": "\\ud800"}'),
        ({"type": "array"}, "[" * 100_000, "[" * 100_000),
        ({"type": "array"}, "[1, 2]", [1, 2]),
        ({"items": {}}, "[1]", [1]),
        ({"type": ["string", "null"]}, "None", None),
        ({"type": ["string", "integer"]}, "007", "007"),
        ({"type": ["string", "integer"]}, "7", 7),
        ({"anyOf": [{"type": "number"}, {"type": "integer"}]}, "3.0", 3),
        ({"anyOf": [{"type": "boolean"}, {"oneOf": [{"type": "array"}, {"type": "string"}]}]}, "[true]", [True]),
        ({"anyOf": [{"type": "object"}, {"type": "null"}]}, "none", "none"),
        ({"$ref": "#/$defs/Unit"}, "C", "C"),
        ({"$ref": "#/$defs/Tree"}, "4", 4),
        ({"$ref": "#/$defs/Missing"}, "4", "4"),
        ({"enum": [1, 2, "three"]}, "2", 2),
        ({"enum": ["2", 2]}, "2", "2"),
        ({"const": 5}, "5", 5),
        ({}, "3", "3"),
        ({}, "[3]", [3]),
        ({"type": 3, "anyOf": "x", "enum": 1, "$ref": 2}, "x", "x"),
    ],
)
def test_arguments_are_typed_by_the_schema(schema: dict[str, Any], text: str, value: Any) -> None:
    typed = coerce(text, schema, PARAMETERS)
    assert typed == value
    assert type(typed) is type(value)


# --- stop strings


def test_a_stop_string_is_left_out_unless_asked_for() -> None:
    assert read("one two three", stop=["two"]) == ("one ", "", [], "two")
    assert read("one two three", stop=["two"], include_stop=True) == ("one two", "", [], "two")


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assert read("xabcd", stop=["abcd", "bc"]) == ("xa", "", [], "bc")
    assert read("xabc", stop=["bc", "abc"]) == ("x", "", [], "abc")


def test_stop_strings_match_the_text_as_it_was_generated() -> None:
    assert read("a STOP b</think>c", prompt=THINKING, stop=["STOP"]) == ("", "a ", [], "STOP")
    assert read("a\n</think>\n\nb", prompt=THINKING, stop=["</think>"])[3] == "</think>"
    assert read(f"see {WEATHER}", stop=["</function>"])[:3] == ("see ", "", [ZURICH])


def test_tokens_used_ends_with_the_token_that_completes_the_stop() -> None:
    stream = FAKE.stream(stop=["é!"])
    stream.push(FAKE.encode("abé!cd"), final=True)
    assert (stream.stopped_by, stream.tokens_used) == ("é!", 5)
    assert stream.push(FAKE.encode("more"), final=True).text == ""
    assert stream.tokens_used == 5


def test_only_what_may_become_a_match_is_held_back() -> None:
    stops = StopMatcher(["abcd", "cx"])
    pushed, shown = ("za", "b", "c", "e", "ab", "a", "q"), ["z", "", "", "abce", "", "ab", "aq"]
    assert [stops.push(text)[0] for text in pushed] == shown
    assert stops.flush() == ""


def test_stop_strings_before_min_tokens_do_not_count() -> None:
    assert read("ab.cd.ef", stop=["."], min_tokens=3) == ("ab.cd", "", [], ".")
    assert read("ab.cd.ef", stop=["."], min_tokens=2) == ("ab", "", [], ".")
    assert read("abXY", stop=["bXY"], min_tokens=3) == ("a", "", [], "bXY")
    assert read("aab", stop=["aa"], min_tokens=2) == ("aab", "", [], None)


def test_stop_matching_equals_a_search_of_every_prefix(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(2000):
        text = "".join(rng.choices("ab", k=rng.randrange(12)))
        stops = ["".join(rng.choices("abc", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
        expected: tuple[str, str | None] = (text, None)
        if ends:
            stop = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
            expected = (text[: ends[0] - len(stop)], stop)
        matcher, shown, found, at = StopMatcher(stops), "", None, 0
        while at < len(text) and found is None:
            step = rng.randrange(1, 4)
            piece, found = matcher.push(text[at : at + step])
            shown, at = shown + piece, at + step
        assert (shown + ("" if found else matcher.flush()), found) == expected


# --- special tokens


def test_special_tokens_are_hidden_on_demand_and_tags_seen_either_way() -> None:
    text = f"hm\n</think>\n\nHi<|im_end|>{WEATHER}<|endoftext|>"
    for fmt in (FAKE, SPECIAL_TAGS):
        assert read(text, prompt=THINKING, fmt=fmt) == ("Hi", "hm", [ZURICH], None)
        shown = read(text, prompt=THINKING, fmt=fmt, skip_special_tokens=False)
        assert shown == ("Hi<|im_end|><|endoftext|>", "hm", [ZURICH], None)
    assert text_of("a<think>b", fmt=SPECIAL_TAGS, parse_reasoning=False) == "ab"


# --- any split

TURNS = [
    f"Let me think.\n\nOk < 3\n</think>\n\nLook:\n\n{WEATHER}\n{CLOCK}",
    f"a\n\n</thin </think>\n\n\n1 <tool_call> 2 <tool_call>\n<function=x\n\n{CLOCK}\n</tool_call>\n\nend\n",
    f"mm 日本 {WEATHER}\n{CLOCK}\n",
    f"mm {CLOCK} but\n</think>\n\n{WEATHER.replace('</parameter>', '')}STOP it",
    "<think>a</think>\n\n<tool_call>\n<function=weather>\n<parameter=city>\n</tool_call>\n👩‍👩‍👧 STO\n\n",
    f"\n\n</think>\n\n{WEATHER.replace('</tool_call>', '')}",
]


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("prompt", [THINKING, DIRECT])
def test_any_split_gives_the_same_totals(seed: int, turn: str, prompt: str) -> None:
    rng = random.Random(seed)

    def outcome(fmt: ChatFormat, ids: list[int], cuts: list[int]) -> Outcome:
        stream = fmt.stream(prompt=prompt, tools=TOOLS, stop=["STOP", "\n\n\n\n"])
        edges = [0, *sorted(cuts), len(ids)]
        return collect(stream, [ids[a:b] for a, b in itertools.pairwise(edges)])

    whole = read(turn, prompt=prompt, stop=["STOP", "\n\n\n\n"])
    for fmt, ids in [(FAKE, FAKE.encode(turn)), (FAKE, list(turn.encode())), (SPECIAL_TAGS, FAKE.encode(turn))]:
        splits = [[cut] for cut in range(len(ids))] + [list(range(len(ids)))]
        splits += [[rng.randrange(len(ids)) for _ in range(rng.randrange(9))] for _ in range(20)]
        for cuts in splits:
            assert outcome(fmt, ids, cuts) == whole


def test_nothing_a_model_writes_is_lost_or_raises(seed: int) -> None:
    """Random text of the format's own pieces: every split agrees, and plain words survive in their order."""
    rng = random.Random(seed)
    pieces = [
        *("<tool_call>", "</tool_call>", "<function=weather>", "<function=", "</function>", "<parameter=city>"),
        *("<parameter=", "</parameter>", "<think>", "</think>", "\n", "\n\n", " ", "word", ">", "<", WEATHER, CLOCK),
    ]
    for _ in range(400):
        turn = "".join(rng.choices(pieces, k=rng.randrange(1, 15)))
        prompt = rng.choice((THINKING, DIRECT))
        whole = read(turn, prompt=prompt)
        ids = list(turn.encode())
        assert collect(FAKE.stream(prompt=prompt, tools=TOOLS), [[id] for id in ids]) == whole
        text, reasoning, calls, _ = whole
        written = reasoning + text + "".join(json.dumps(call) for call in calls)
        assert written.count("word") == turn.count("word")


# --- round trip through the family's template


def test_a_turn_comes_back_from_the_template_as_the_model_wrote_it(shared_data: Path) -> None:
    family = byte_chat_format((shared_data / "qwen3.5-chat-template.jinja").read_text())
    question = [{"role": "user", "content": "Well?"}]
    prompt = family.render(question, tools=TOOLS)
    more = '<parameter=opts>\n{"deep": [1, {"é": null}]}\n</parameter>\n<parameter=days>\n3\n</parameter>\n'
    several = WEATHER.replace("</function>", more + "</function>")
    for written in [
        "I think.\n\n  So.\n</think>\n\nYes, 4 < 5.",
        f"Look it up.\n</think>\n\nOne moment.\n\n{WEATHER}\n{CLOCK}",
        f"Look it up.\n</think>\n\n{several}\n{WEATHER.replace('Zürich', ' two' + chr(10) + 'lines ')}",
    ]:
        delta = family.stream(prompt=prompt, tools=TOOLS).push(family.encode(written), final=True)
        functions = [{"name": call.name, "arguments": json.dumps(call.arguments)} for call in delta.tool_calls]
        answer = {
            "role": "assistant",
            "content": delta.text,
            "reasoning_content": delta.reasoning,
            "tool_calls": [{"id": "call_0", "type": "function", "function": function} for function in functions],
        }
        again = family.render([*question, answer], tools=TOOLS, add_generation_prompt=False)
        assert again == prompt + written + "<|im_end|>\n"
