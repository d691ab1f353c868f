"""Answers held to a form: whatever the schema, with thinking and speculation on or off, alone and in a batch, what the
model writes at temperature 1 is valid. `make schemas` runs all of it; by default a sample runs."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from byte_chat import byte_chat_format

from tritium.api import LLM, Completion, TextOptions
from tritium.chat import AnswerFormat, Grammars, ToolRules
from tritium.core import AnswerRules, FinishReason, RequestError, SamplingParams

COUNT = 200
HELLO = [{"role": "user", "content": "Mia has 14 apples and buys 3. How many apples has Mia?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 9},
                "days": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 9}, {"type": "null"}]},
                "unit": {"type": "string", "enum": ["C", "F", "C or F"]},
                "when": {"type": "string", "pattern": "^(today|in [1-9] days)$"},
                "spot": {"$ref": "#/$defs/spot"},
                "what": {"type": ["string", "integer"], "maxLength": 6, "minimum": 0, "maximum": 99},
            },
            "required": ["city", "unit", "spot"],
            "additionalProperties": False,
            "$defs": {
                "spot": {
                    "type": "object",
                    "properties": {"indoors": {"type": "boolean"}, "floor": {"enum": [1, 2, None, "roof"]}},
                    "required": ["indoors"],
                    "additionalProperties": False,
                }
            },
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of the features people use, bounded so that answers are short."""

    def words() -> list[str]:
        return rng.sample(["red", "green", 'sky "blue"', "a b", "x\\y", "é", "", "null", "7"], rng.randrange(1, 4))

    leaves = [
        lambda: {"type": "string", "maxLength": rng.randrange(1, 9)},
        lambda: {"type": "string", "minLength": 2, "maxLength": 4},
        lambda: {"type": "string", "pattern": rng.choice(["^[a-z]{2,5}$", "^\\d{3}-\\d{2}$", "^(ab|cd)e?$"])},
        lambda: {"type": "string", "format": rng.choice(["date", "uuid", "ipv4", "time", "date-time"])},
        lambda: {"type": "string", "enum": words()},
        lambda: {"enum": [*words(), 1, None, True]},
        lambda: {"const": rng.choice([3, "three", None, {"a": [1]}])},
        lambda: {"type": "integer", "minimum": rng.randrange(-50, 5), "maximum": rng.randrange(5, 900)},
        lambda: {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 50, "multipleOf": 5},
        lambda: {"type": "boolean"},
        lambda: {"type": "null"},
        lambda: {"type": ["boolean", "null"]},
    ]
    if depth > 2 or (depth and rng.random() < 0.5):
        return rng.choice(leaves)()

    def array() -> dict[str, Any]:
        least, items = rng.randrange(2), schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randrange(3)}

    def pair() -> dict[str, Any]:
        return {"type": "array", "prefixItems": [schema(rng, 3), schema(rng, 3)], "items": False, "minItems": 2}

    def union() -> dict[str, Any]:
        return {"anyOf": [schema(rng, depth + 1) for _ in range(rng.randrange(2, 4))]}

    def listed() -> dict[str, Any]:
        names = rng.sample(["id", "name", "größe", "a b", 'q"', "tags", "next"], rng.randrange(1, 4))
        out = {
            "type": "object",
            "properties": {name: schema(rng, depth + 1) for name in names},
            "required": rng.sample(names, rng.randrange(len(names) + 1)),
            "additionalProperties": False,
        }
        if depth == 0 and rng.random() < 0.3:
            out["$defs"] = {"leaf": schema(rng, 3)}
            out["properties"]["ref"] = {"$ref": "#/$defs/leaf"}
        return out

    def free() -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {"a": {"type": "boolean"}},
            "patternProperties": {"^k_[a-z]{1,3}$": rng.choice(leaves)()},
            "required": ["a"],
            "additionalProperties": False,
            "maxProperties": 2,
        }

    return rng.choice([listed, listed, listed, array, pair, union, free])()


def schemas(seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [schema(rng) for _ in range(COUNT)]


@pytest.fixture(scope="module", params=["none", "mtp:2"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM("tritium-dense", speculate=request.param, show_progress=False, seed=0, max_num_seqs=16) as llm:
        yield llm


def answers(llm: LLM, given: list[dict[str, Any]], batch: int, **sampling: Any) -> list[Completion]:
    """Of `TextOptions` fields and `enable_thinking`, in batches of that size."""
    groups = []
    for i, fields in enumerate(given):
        thinking = fields.pop("enable_thinking", True)
        asked = SamplingParams(**({"temperature": 1.0, "seed": i, "max_tokens": 500} | sampling))
        options = TextOptions(thinking_budget=24, **{name: value for name, value in fields.items() if name != "tools"})
        groups.append(llm.door.chatted(HELLO, asked, tools=fields.get("tools"), options=options,
                                       template_kwargs={"enable_thinking": thinking}))  # fmt: skip
    return [done for at in range(0, len(groups), batch) for done in llm.answer(groups[at : at + batch])]


def check_schemas(llm: LLM, given: list[dict[str, Any]], batch: int, thinking: bool) -> list[list[int]]:
    asked = [{"form": AnswerFormat("json", s), "enable_thinking": thinking} for s in given]
    found = answers(llm, asked, batch)
    for s, answer in zip(given, found, strict=True):
        assert answer.finish_reason is FinishReason.STOP, (s, answer.text)
        jsonschema.validate(json.loads(answer.text), s, jsonschema.Draft202012Validator)
        assert bool(answer.reasoning) == thinking
        assert "</think>" not in answer.text
    return [answer.token_ids for answer in found]


@pytest.mark.parametrize("thinking", [False, True])
def test_answers_are_valid_json_of_their_schemas(llm: LLM, thinking: bool, seed: int) -> None:
    given = schemas(seed)
    check_schemas(llm, given[:4], 1, thinking)
    check_schemas(llm, given[4:28], 16, thinking)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # one by one, on a machine that others use too
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("batch", [1, 16])
def test_every_schema(request: pytest.FixtureRequest, llm: LLM, thinking: bool, batch: int, seed: int) -> None:
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("long: make schemas")
    check_schemas(llm, schemas(seed), batch, thinking)


def test_speculation_changes_no_token_of_a_constrained_answer(seed: int) -> None:
    given, found = schemas(seed)[:8], []
    for speculate in ("none", "mtp:3", "ngram:3"):
        with LLM("tritium-dense", speculate=speculate, show_progress=False, seed=0, max_num_seqs=8) as llm:
            found.append(check_schemas(llm, given, 8, True))
    assert found[0] == found[1] == found[2]


def test_calls_are_enforced(llm: LLM) -> None:
    def calls(**fields: Any) -> list[tuple[str, dict[str, Any]]]:
        [answer] = answers(llm, [{"tools": [WEATHER, CLOCK]} | fields], 1)
        assert answer.finish_reason is FinishReason.TOOL_CALLS, answer.text
        assert answer.text == ""
        return [(call.name, call.arguments) for call in answer.tool_calls]

    assert calls(tool_rules=ToolRules(name="clock")) == [("clock", {})]
    for thinking in (False, True):
        [(name, arguments)] = calls(tool_rules=ToolRules(name="weather"), enable_thinking=thinking)
        jsonschema.validate(arguments, WEATHER["function"]["parameters"])
        assert name == "weather"
        assert len(calls(tool_rules=ToolRules(required=True, parallel=False), enable_thinking=thinking)) == 1
    form = AnswerFormat("json", {"type": "object", "properties": {}, "additionalProperties": False})
    [either] = answers(llm, [{"tools": [WEATHER], "form": form}], 1)
    assert either.tool_calls or either.text == "{}"


def test_the_other_forms(llm: LLM) -> None:
    forms = [AnswerFormat("regex", "[a-f]{3}/(x|yz)"), AnswerFormat("choice", ["yes", 'n"o', "maybe\n"]),
             AnswerFormat("grammar", 'root ::= "a" ("b" | "c") "d"'),
             AnswerFormat("grammar", 'start: "q" /[0-9]{2}/')]  # fmt: skip
    one, two, three, four = (answer.text for answer in answers(llm, [{"form": form} for form in forms], 4))
    assert re.fullmatch("[a-f]{3}/(x|yz)", one)
    assert two in ("yes", 'n"o', "maybe\n")
    assert three in ("abd", "acd")
    assert re.fullmatch("q[0-9]{2}", four)


def test_a_thought_ends_with_its_budget(llm: LLM) -> None:
    for budget in (0, 1, 7):
        sampling = SamplingParams(temperature=1.0, seed=1, max_tokens=60)
        [answer] = llm.answer([llm.door.chatted(HELLO, sampling, options=TextOptions(thinking_budget=budget))])
        assert answer.usage.reasoning_tokens <= budget + 1  # a newline may be held to be of the thought
        assert "</think>" not in answer.text
        assert answer.text or answer.finish_reason is FinishReason.LENGTH
    [cut] = llm.answer([llm.door.chatted(HELLO, SamplingParams(max_tokens=4), options=TextOptions(
        form=AnswerFormat("json", {"type": "object"})))])  # fmt: skip
    assert cut.finish_reason is FinishReason.LENGTH
    assert not cut.text


# --- the constraint by itself, over a tokenizer of bytes


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    chat = byte_chat_format()
    return Grammars(chat.tokenizer, 300, [258])


def allowed(mask: bytes | None) -> set[int]:
    bits = int.from_bytes(mask or b"", "little")
    return {token for token in range(300) if bits >> token & 1}


def test_masks_along_guesses_are_those_of_a_fresh_constraint(grammars: Grammars, seed: int) -> None:
    rng = random.Random(seed)
    rules = AnswerRules('start: /[ab]{2,6}/ ("x" | "yz" /[0-9]+/)', True, 6)

    def fresh(tokens: list[int]) -> bytes | None:
        constraint = grammars.constraint(rules)
        for token in tokens:
            constraint.advance([token])
        return constraint.mask(())

    for _ in range(40):
        constraint, tokens = grammars.constraint(rules), []
        while 258 not in tokens and len(tokens) < 40:
            guesses: list[int] = []
            for _ in range(rng.randrange(4)):
                may = allowed(constraint.mask(guesses))
                assert constraint.mask(guesses) == fresh(tokens + guesses)
                guesses.append(rng.choice(sorted(may)) if rng.random() < 0.8 else rng.randrange(260))
                if guesses[-1] not in may:
                    assert constraint.mask(guesses) is None
                    break
            new: list[int] = []
            while not new or (len(new) <= len(guesses) and new[-1] == guesses[len(new) - 1] and new[-1] != 258):
                may = allowed(constraint.mask(new))
                guess = guesses[len(new)] if len(new) < len(guesses) else -1
                new.append(guess if guess in may and rng.random() < 0.7 else rng.choice(sorted(may)))
            constraint.advance(new)
            tokens += new
            assert constraint.error is None
        text = bytes(token for token in tokens if token < 256).decode(errors="replace")
        assert 258 not in tokens or re.search(r"\n\n[ab]{2,6}(x|yz[0-9]+)$", text), text


def test_a_thought_cannot_be_closed_by_spelling_the_tag(grammars: Grammars) -> None:
    constraint = grammars.constraint(AnswerRules('start: "a"', True))
    constraint.advance(list(b"hm </think"))
    assert ord(">") not in allowed(constraint.mask(()))
    assert 258 not in allowed(constraint.mask(()))
    constraint.advance([grammars.end_think or 0])
    assert allowed(constraint.mask(())) == {10}
    constraint.advance([10, 10])
    assert allowed(constraint.mask(())) == {ord("a")}


@pytest.mark.parametrize(("part", "where"), [
    ({"not": {}}, "f.properties.a.items: Unimplemented keys"),
    ({"type": "array", "uniqueItems": True}, "f.properties.a.items: Unimplemented keys"),
    ({"$ref": "#/$defs/none"}, "does not exist"),
    ({"type": "string", "pattern": "(?=x)"}, "f.properties.a.items: regex"),
])  # fmt: skip
def test_what_cannot_be_held_is_refused_with_its_place(grammars: Grammars, part: dict[str, Any], where: str) -> None:
    from tritium.chat import answer_grammar

    whole = {"type": "object", "properties": {"a": {"type": "array", "items": part}}}
    with pytest.raises(RequestError, match=re.escape(where)):
        answer_grammar(grammars, AnswerFormat("json", whole, "f"))


def test_size_and_depth_are_limited(grammars: Grammars) -> None:
    from tritium.chat import answer_grammar

    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"items": deep}
    with pytest.raises(RequestError, match="levels deep"):
        answer_grammar(grammars, AnswerFormat("json", deep))
    with pytest.raises(RequestError, match="larger than"):
        answer_grammar(grammars, AnswerFormat("choice", ["x" * 200_000]))
