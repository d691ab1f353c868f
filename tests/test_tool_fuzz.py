# ruff: noqa: E501
"""Transcripts of tool calls, well and badly written: cut anywhere, they say the same, and the deltas add up to it."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
from byte_chat import byte_chat_format
from hypothesis import given, settings

from tritium.chat.detokenize import Detokenizer
from tritium.chat.reasoning import ReasoningSplitter
from tritium.chat.stop import StopMatcher
from tritium.chat.stream import TextDelta, TextStream
from tritium.chat.tools import ToolParser

FAKE = byte_chat_format()
SCHEMAS: dict[str, dict[str, Any]] = {
    "write": {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "text": {"type": "string"},
            "mode": {"enum": ["a", "w", None]},
            "size": {"type": ["integer", "null"]},
            "ratio": {"anyOf": [{"type": "number"}, {"type": "string"}]},
            "opts": {"$ref": "#/$defs/Opts"},
            "lines": {"type": "array", "items": {"type": "integer"}},
            "any": {},
        },
        "$defs": {"Opts": {"type": "object", "properties": {"deep": {"$ref": "#/$defs/Opts"}}}},
    },
    "clock": {},
    "é.ü": {"type": "object", "properties": {"größe": {"type": "boolean"}}},
}
VALUES = [
    "", "x", "a\nb\n", "\n", "  two  ", "Zürich 東京 😀", "1", "3.0", "-2.5e3", "007", "True", "null", "None", "[1, 2",
    '{"deep": {"deep": {}}}', "[1, 2.0, 3]", '{"a": "</parameter>"}', '"quoted" \\ back', "1 < 2 > 0", "<", "</", "</p",
    "\t\x00\x1f\u2028", "a </parameter> b", "a <parameter=text> b", "see </function> there", "</tool_call> here", "<think>",
    "def f():\n    return '<tool_call>'\n", "\n\n<parameter=path>\nq", "x" * 300, "�",
]  # fmt: skip
PROSE = [
    "", "Let me look.\n\n", "Use <tool_call> to call.\n", "`<function=write>` and `<parameter=x>`", "a < b && c > d", "<tool_",
    "<tool_call>\n<function=write> is how", "<tool_call>\n<function=nobody>\n<parameter=x>\n", "\n\n\n", "</tool_call>",
    "<tool_call><tool_call>", "über 東京 😀", "<tool_call>\n{\"name\": \"write\"}\n</tool_call>", "</think>", "<think>", "</function>",
]  # fmt: skip
SPOILS = [
    ("</parameter>", ""), ("</parameter>", "</parameter>\n</parameter>"), ("</function>", ""), ("</tool_call>", ""),
    ("</function>", "</function></function>"), ("</tool_call>", "</tool_call>\n</tool_call>"), ("\n", ""), ("\n", "\n \n"),
    ("<function=", "<function= "), ("<parameter=", "<parameter"), ("<tool_call>", ""), (">", ""), ("=", ""), ("</", "<"),
]  # fmt: skip
NASTY = [
    "<tool_call>\n<function=write>\n<parameter=path>\na</parameter>\n<parameter=>\nb\n</parameter>\n</function>\n</tool_call>",
    "<tool_call>\n<function=write>\n<parameter=size>\n3.0\n</parameter>\n</function>\n</tool_call>" * 3,
    "<tool_call>\n<function=write>\n" + "<parameter=any>\n[1]\n</parameter>\n" * 5 + "</function>\n</tool_call>",
    "<tool_call>\n<function=write>\n<parameter=text>\n" + "</parameter" * 40 + ">\n</parameter>\n</function>\n</tool_call>",
    "<tool_call>\n<function=write>\n<parameter=opts>\n" + '{"deep": ' * 200 + "{}" + "}" * 200 + "\n</parameter>",
    "<tool_call>\n<function=clock>\n</function>\n\n\nand then text",
    "<tool_call>\n<function=clock>\n</tool_call>\n<tool_call>\n<function=clock>\n</function>",
    "<tool_call>\n<function=nobody>\n<parameter=a>\n{\"x\": 1}\n</parameter>\n</function>\n</tool_call>",
    "<tool_call>\n<function=nobody>\n</function>\nno end",
    "thought\n<tool_call>\n<function=clock>\n</function>\n</tool_call>",
    "thought\n<tool_call>\n<function=clock>\n</function>\n</tool_call>\n</think>\n\nanswer",
    "<tool_call>\n<function=write>\n<parameter=text>\n" + "line < of </code>\n" * 400 + "\n</parameter>\n</function>\n</tool_call>",
]  # fmt: skip


def call(rng: random.Random) -> str:
    name = rng.choice([*SCHEMAS, "write", "write", "write", "nobody"])
    known = list(SCHEMAS.get(name, {}).get("properties", {"x": {}}))
    names = rng.sample(known, rng.randrange(len(known) + 1)) + rng.choices(known, k=rng.random() < 0.1)
    values = "".join(f"<parameter={key}>\n{rng.choice(VALUES)}\n</parameter>\n" for key in names)
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def transcript(rng: random.Random) -> str:
    parts = [rng.choice(PROSE)]
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        parts += [call(rng), rng.choice(["", "\n", "\n", "\n\n", rng.choice(PROSE)])]
    text = "".join(parts)
    for _ in range(rng.choice([0, 0, 1, 1, 3])):
        spoil = rng.choice(SPOILS)
        places = [at for at in range(len(text)) if text.startswith(spoil[0], at)]
        if places:
            at = rng.choice(places)
            text = text[:at] + spoil[1] + text[at + len(spoil[0]) :]
    return text[: rng.randrange(len(text) + 1)] if rng.random() < 0.2 else text


def message(deltas: Sequence[TextDelta]) -> tuple[str, str, list[tuple[str, str]]]:
    """Text, reasoning and calls, whose deltas must add up to them."""
    calls = [call for delta in deltas for call in delta.tool_calls]
    pieces = [piece for delta in deltas for piece in delta.tool_deltas]
    assert [piece.index for piece in pieces] == sorted(piece.index for piece in pieces)
    for i, done in enumerate(calls):
        own = [piece for piece in pieces if piece.index == i]
        assert [(piece.id, piece.name) for piece in own if piece.id] == [(done.id, done.name)]
        assert own[0].id
        assert "".join(piece.arguments for piece in own) == json.dumps(done.arguments, ensure_ascii=False)
    assert len({piece.index for piece in pieces}) == len(calls)
    whole = [(done.name, json.dumps(done.arguments)) for done in calls]
    return "".join(delta.text for delta in deltas), "".join(delta.reasoning for delta in deltas), whole


def stream(thinking: bool) -> TextStream:
    """The parsing half of a stream, which is fed with text."""
    return TextStream(
        Detokenizer(FAKE.tokenizer), StopMatcher(()), splitter=ReasoningSplitter(inside=thinking),
        answer_tools=ToolParser(SCHEMAS), reasoning_tools=ToolParser(SCHEMAS))  # fmt: skip


def push_text(parser: TextStream, text: str) -> TextDelta:
    """More of the answer as text: no token is what the parser sees, but pieces of any length."""
    out = TextDelta()
    parser._take(text, out)
    return out


def read(pieces: Sequence[str], thinking: bool) -> tuple[str, str, list[tuple[str, str]]]:
    parser = stream(thinking)
    return message([push_text(parser, piece) for piece in pieces] + [parser.push([], final=True)])


def cut(text: str, places: Sequence[int]) -> list[str]:
    borders = [0, *sorted(places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(borders)]


def agree(text: str, rng: random.Random) -> None:
    """In two at every position, letter by letter, and in several pieces."""
    thinking = rng.random() < 0.3
    whole = read([text], thinking)
    for at in range(1, len(text)):
        assert read([text[:at], text[at:]], thinking) == whole, (text, at)
    assert read(list(text), thinking) == whole, text
    for _ in range(3):
        assert read(cut(text, rng.sample(range(len(text) + 1), min(len(text), rng.randrange(12)))), thinking) == whole


@pytest.mark.parametrize("part", range(10))
def test_a_transcript_reads_the_same_wherever_it_is_cut(part: int, seed: int) -> None:
    rng = random.Random(f"{seed} {part}")
    for text in [*NASTY[part::10], *(transcript(rng) for _ in range(60))]:
        agree(text, rng)


def test_random_tokens_read_the_same(seed: int) -> None:
    """Bytes as tokens: a border may be inside a character."""
    rng = random.Random(seed)
    tools = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in SCHEMAS.items()]
    for text in [*NASTY, *(transcript(rng) for _ in range(500))]:
        ids = FAKE.encode(text)
        results = []
        for borders in ([], rng.sample(range(len(ids) + 1), len(ids) // 3), range(len(ids))):
            parser = FAKE.stream(tools=tools)
            places = [0, *sorted(borders), len(ids)]
            deltas = [parser.push(ids[a:b]) for a, b in itertools.pairwise(places)]
            results.append(message([*deltas, parser.push([], final=True)]))
        assert results[0] == results[1] == results[2]


PARTS = st.sampled_from([*PROSE, *VALUES, *(part for pair in SPOILS for part in pair), "<parameter=path>", "<function=write>",
                         "<parameter=size>\n", "<function=clock>\n", "\n</parameter>\n", "<tool_call>\n"]) | st.text(max_size=5)


@settings(max_examples=150)
@given(st.lists(PARTS, max_size=14), st.randoms(use_true_random=False))
def test_any_soup_of_tags_reads_the_same(parts: list[str], rng: random.Random) -> None:
    agree("".join(parts), rng)


def test_strings_stream_and_other_values_come_whole() -> None:
    text = ("<tool_call>\n<function=write>\n<parameter=path>\n/tmp/a\n</parameter>\n<parameter=size>\n12\n</parameter>\n"
            "</function>\n</tool_call>")
    parser = stream(False)
    shown = [piece.arguments for letter in text for piece in push_text(parser, letter).tool_deltas]
    assert shown == ["", '{"path": "/', "t", "m", "p", "/", "a", '"', ', "size": 12', "}"]


def test_every_shape_of_call_is_met(seed: int) -> None:
    rng = random.Random(seed)
    found = [read([transcript(rng)], False) for _ in range(600)]
    assert sum(bool(calls) for _, _, calls in found) > 250
    assert sum(len(calls) > 1 for _, _, calls in found) > 40
    assert sum("<tool_call>" in text for text, _, _ in found) > 40
