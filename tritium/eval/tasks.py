"""Problems that the embedded models are trained and measured on: word problems, tool calls, recall, small talk.

Everything is drawn from a seeded generator. The words are in words.toml, the sentences of stories and of tools in
templates of Jinja beside it; both are read when the first problem is drawn. A problem belongs to one of two splits. The
held-out split uses other seeds, and also names, things, cities, tool names, parameter names and tuples of numbers that
training never shows: a word or a tuple is held out when its checksum says so (`_held`), so the two splits cannot meet.

`tasks` returns those of a kind; `grade` judges a generated answer; `samples` returns tasks with a reference reply, for
training.
"""

from __future__ import annotations

import json
import random
import re
import tomllib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jinja2

Split = Literal["train", "heldout"]
Message = dict[str, Any]
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One generation to be graded. `answer` depends on the kind: an integer (word_problem), a string that the content
    must contain (recall), strings that it must all contain (tool_answer, small_talk, tool_none), or the pair of name
    and arguments (tool_call)."""

    kind: str
    messages: list[Message]
    tools: list[dict[str, Any]]
    enable_thinking: bool
    max_tokens: int
    answer: Any


@dataclass(frozen=True)
class Sample:
    """A task and the assistant message that solves it (`reasoning_content`, `content`, `tool_calls`)."""

    task: Task
    reply: Message


# ---------------------------------------------------------------------------------------------------------------------
# grading


def grade(task: Task, content: str, reasoning: str, tool_calls: Sequence[tuple[str, Arguments]]) -> bool:
    """True when the generation solves the task. Reasoning is never looked at."""
    if task.kind == "tool_call":
        name, arguments = task.answer
        return len(tool_calls) == 1 and tool_calls[0][0] == name and _same(tool_calls[0][1], arguments)
    if tool_calls:
        return False
    if task.kind == "word_problem":
        found = re.findall(r"-?\d+", content.replace(",", ""))
        return bool(found) and int(found[-1]) == task.answer
    wanted = [task.answer] if isinstance(task.answer, str) else list(task.answer)
    return all(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", content, re.IGNORECASE) for word in wanted)


def _same(left: Arguments, right: Arguments) -> bool:
    return {k: str(v) for k, v in left.items()} == {k: str(v) for k, v in right.items()}


# ---------------------------------------------------------------------------------------------------------------------
# words

@cache
def _words() -> SimpleNamespace:
    """Of words.toml: a string is a list of words."""
    read = tomllib.loads((Path(__file__).parent / "words.toml").read_text(encoding="utf-8"))
    return SimpleNamespace(**{name: v.split() if isinstance(v, str) else v for name, v in read.items()})


def _held(*key: object) -> bool:
    """Whether a word or a tuple of numbers belongs to the held-out split (about one in eight)."""
    return zlib.crc32(repr(key).encode()) % 8 == 3


def _plural(word: str) -> str:
    if word in ("leaf", "shelf"):
        return word[:-1] + "ves"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh", "tomato", "potato", "mango")) else "s")


@dataclass(frozen=True)
class _Person:
    name: str
    she: str
    her: str  # possessive
    to_her: str

    @property
    def She(self) -> str:
        return self.she.capitalize()


class _World:
    """One seeded source of words and numbers that belong to a split."""

    def __init__(self, seed: str, split: Split) -> None:
        self.rng = random.Random(seed)
        self.heldout = split == "heldout"
        self.numbers: list[int] = []
        self.taken: set[str] = set()

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.random() * len(options))]

    def say(self, text: str) -> str:
        """Choose among [one|two] alternatives, innermost first."""
        while "[" in text:
            text = re.sub(r"\[([^\[\]]*)\]", lambda m: str(self.pick(m[1].split("|"))), text)
        return text

    def num(self, low: int, high: int) -> int:
        return self.note(self.rng.randint(low, high))

    def note(self, n: int) -> int:
        self.numbers.append(n)
        return n

    def pair(self) -> tuple[int, int]:
        """Two numbers of this split, of up to four digits."""
        while True:
            a, b = (self.rng.randint(2, self.pick((99, 999, 9999))) for _ in range(2))
            if _held(a, b) == self.heldout:
                return a, b

    def from_pool(self, pool: Sequence[str], invented: float) -> str:
        """A word of this split not used before in this problem; `invented` is the share of made-up words."""
        for _ in range(1000):
            word = self.invent(pool) if self.chance(invented) else str(self.pick(pool))
            if word[0].islower() and pool[0][0].isupper():
                word = word.capitalize()
            if _held(word) == self.heldout and word not in self.taken:
                self.taken.add(word)
                return word
        raise RuntimeError("the pool of words is exhausted")

    def invent(self, pool: Sequence[str]) -> str:
        """A made-up word: syllables, or the head of one training word with the tail of another."""
        if self.chance(0.5):
            return self.syllables()
        a, b = (str(next(t for t in iter(lambda: str(self.pick(pool)), "") if not _held(t))) for _ in range(2))
        return a[: self.rng.randint(1, len(a) - 1)] + b[self.rng.randint(1, len(b) - 1) :]

    def syllables(self) -> str:
        count = self.pick((1, 2, 2, 2, 3))
        word: str = ""
        for i in range(count):
            onset = "" if i == 0 and self.chance(0.25) else self.pick(_words().onsets)
            coda = self.pick(_words().codas) if i < count - 1 and self.chance(0.5) else ""
            word += f"{onset}{self.pick(_words().vowels)}{coda}"
        word += str(self.pick(_words().codas))
        return word if len(word) > 1 else f"{word}n"

    def person(self) -> _Person:
        name = self.from_pool(_words().names, 0.3)
        return _Person(name, *self.pick((("she", "her", "her"), ("he", "his", "him"))))

    def some_words(self, count: int) -> str:
        return " ".join(self.syllables() for _ in range(count))

    def thing(self, only: Sequence[str] | None = None, invented: float = 0.12) -> str:
        return self.from_pool(only or _words().things, 0.0 if only else invented)

    def city(self) -> str:
        return self.from_pool(_words().cities, 0.25)


# ---------------------------------------------------------------------------------------------------------------------
# arithmetic as the reasoning writes it: products and quotients of large numbers in parts


def _add(*terms: int) -> str:
    text, total = " + ".join(map(str, terms)), terms[0]
    for i, term in enumerate(terms[1:], 1):
        total += term
        text += f" = {' + '.join(map(str, (total, *terms[i + 1:])))}"
    return text


def _sub(a: int, b: int) -> str:
    return f"{a} - {b} = {a - b}"


def _places(n: int) -> list[int]:
    digits = str(n)
    return [int(d) * 10 ** (len(digits) - 1 - i) for i, d in enumerate(digits) if d != "0"]


def _mul(a: int, b: int) -> str:
    small, large = min(a, b), max(a, b)
    if large <= 12 or (len(_places(large)) == 1 and small <= 12):
        return f"{a} * {b} = {a * b}"
    if small < 10:
        return f"{a} * {b} = {_add(*(small * part for part in _places(large)))}"
    parts = [part * large for part in _places(small)]
    if len(parts) == 1:
        return f"{a} * {b} = {a * b}"
    if small % 10 == 1:
        return f"{a} * {b} = {_add(*parts)}"
    return f"{a} * {b} = {parts[0]} + {_mul(small % 10, large)}, {_add(*parts)}"


def _div(a: int, b: int) -> str:
    quotient = a // b
    if quotient <= 12 or len(_places(quotient)) == 1:
        return f"{a} / {b} = {quotient}"
    return f"{a} / {b} = {_add(*_places(quotient))}"


# ---------------------------------------------------------------------------------------------------------------------
# templates


class _AgainError(Exception):
    """The draws do not make a story: it is told again, with the next ones."""


def _again() -> None:
    raise _AgainError


@cache
def _templates(file: str) -> dict[str, tuple[float, jinja2.Template]]:
    """Weight and template of each section; every line of it that has alternatives is drawn when it is reached."""
    environment = jinja2.Environment(
        variable_start_string="{", variable_end_string="}", line_statement_prefix="%", undefined=jinja2.StrictUndefined
    )
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    text = re.sub(r"(?m)^(?!%)(.*\[.*\|.*)$", r"{% set line %}\1{% endset %}{say(line)}", text[text.index("#}") + 2:])
    found = {}
    for section in re.split(r"(?m)^## ", text)[1:]:
        title, body = section.split("\n", 1)
        name, weight = title.split()
        found[name] = float(weight), environment.from_string(body)
    return found


def _render(w: _World, template: jinja2.Template, **more: Any) -> list[str]:
    """Lines that the template makes with the draws of `w`."""
    draws = (w.num, w.note, w.pair, w.person, w.thing, w.city, w.from_pool, w.some_words, w.pick, w.chance, w.say,
             w.rng.randint, w.rng.sample)  # fmt: skip
    return template.render(
        {f.__name__: f for f in (*draws, min, max)}, add=_add, sub=_sub, mul=_mul, div=_div, plural=_plural,
        again=_again, words=_words(), dumps=json.dumps, **more,
        divisors=lambda n: [d for d in range(2, 13) if n % d == 0 and n // d > 1],
    ).splitlines()  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# word problems


def _story(w: _World, template: jinja2.Template) -> tuple[str, list[str], str]:
    """The text, the steps of the reasoning and the answer. The kinds of lines are told in stories.jinja."""
    while True:
        text, steps, answer, said = "", [], "", ""
        try:
            lines = _render(w, template)
        except _AgainError:
            continue
        for line in filter(None, map(str.strip, lines)):
            match line.split(" ", 1):
                case ["-", step]:
                    steps.append(step)
                case ["=", answer]:
                    pass
                case ["?", said]:
                    pass
                case ["/", change]:
                    old, new = change.split(" / ")
                    text = text.replace(old, new)
                case _:
                    text = re.sub(r" +([.?])", r"\1", f"{text} {line}".strip())
        if said in text and len(steps) <= 5:
            return text, steps, answer


def _restyle(w: _World, text: str) -> str:
    """The same problem told in the past, in fewer sentences, as a condition, or with an aside."""
    if w.chance(0.25):
        text = re.sub(r"\. (?:She|He) (?=[a-z]+ )", " and ", text, count=1)
    statements, _, question = text.rpartition(". ")
    if w.chance(0.4) and statements:
        past = dict(pair.split(":") for pair in _words().past)
        statements = re.sub(r"\b[a-z]+\b", lambda m: past.get(m[0], m[0]), statements)
        if w.chance(0.5):
            then = {"does": "did", "do": "did", "are left": "were left", "is left": "was left",
                    "are there": "were there"}
            question = re.sub(rf"\b({'|'.join(then)})\b", lambda m: then[m[0]], question, count=1)
    sentences = [*statements.split(". "), question] if statements else [question]
    if w.chance(0.08) and 2 <= len(sentences) <= 3 and question[:3] in ("How", "Wha"):
        told = [t if t.split()[0].rstrip("'s") in w.taken else t[0].lower() + t[1:] for t in sentences[:-1]]
        return f"If {' and '.join(told)}, {question[0].lower() + question[1:]}"
    if w.chance(0.1) and len(sentences) > 1:
        sentences.insert(w.pick((0, 1)), w.pick(_words().asides).rstrip("."))
    return ". ".join(sentences)


def _word_problem(w: _World, only: str | None = None) -> Sample:
    stories = _templates("stories.jinja")
    weights, templates = zip(*([stories[only]] if only else stories.values()))
    while True:
        w.numbers, w.taken = [], set()
        text, steps, answer = _story(w, w.rng.choices(templates, weights)[0])
        value = int(re.findall(r"\d+", answer)[-1])
        if 0 < value < 1000 and _held(*w.numbers) == w.heldout:
            break
    text = _restyle(w, text)
    if w.chance(0.15):
        numbers = {str(i): word for i, word in enumerate(_words().numbers)}
        text = re.sub(r"(?<![\w$])(\d{1,2})(?![\w*/])", lambda m: str(numbers.get(m[1], m[1])), text)
        text = text[0].upper() + text[1:]
    if w.chance(0.06):
        text = text.lower().rstrip(w.pick(("?", "")))
    if w.chance(0.25):
        text = w.pick(_words().wraps).format(text)
    thinking = w.chance(0.7)
    thought = {"reasoning_content": "\n".join(steps)} if thinking else {}
    reply = {"role": "assistant", **thought, "content": answer if thinking else " ".join([*steps, answer])}
    return Sample(Task("word_problem", _user(w, text), [], thinking, 256, value), reply)


def _user(w: _World, text: str, system: float = 0.12) -> list[Message]:
    head: list[Message] = [{"role": "system", "content": w.pick(_words().system)}] if w.chance(system) else []
    return [*head, {"role": "user", "content": text}]


def _reply(content: str, thinking: bool, thought: str) -> Message:
    return {"role": "assistant", "content": content} | ({"reasoning_content": thought} if thinking else {})


# ---------------------------------------------------------------------------------------------------------------------
# tools


@dataclass(frozen=True)
class _Parameter:
    name: str
    kind: str = "string"  # or integer, enum
    about: str = ""
    choices: tuple[str, ...] = ()
    required: bool = True

    def schema(self) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "integer" if self.kind == "integer" else "string"}
        if self.about:
            schema["description"] = self.about
        if self.choices:
            schema["enum"] = list(self.choices)
        return schema


@dataclass(frozen=True)
class _Use:
    """A tool, a request for it, the arguments the request gives, and what comes of it: the tool's response, the answer
    that uses it, and the strings the answer must contain."""

    name: str
    about: str
    parameters: tuple[_Parameter, ...]
    request: str
    arguments: dict[str, Any]
    response: str
    answer: str
    needed: tuple[str, ...]

    def schema(self) -> dict[str, Any]:
        properties = {p.name: p.schema() for p in self.parameters}
        inputs: dict[str, Any] = {"type": "object", "properties": properties,
                                  "required": [p.name for p in self.parameters if p.required]}
        if zlib.crc32(self.about.encode()) % 7 == 0:  # some clients send these fields
            inputs["additionalProperties"] = False
        return {"type": "function", "function": {"name": self.name, "description": self.about, "parameters": inputs}}


def _value(w: _World, p: _Parameter) -> Any:
    if p.choices:
        return w.pick(p.choices)
    if p.kind == "integer":
        return w.rng.randint(1, w.pick((9, 60, 999)))
    kind = w.rng.randint(0, 6)
    if p.name in ("city", "destination", "origin") or kind == 0:
        return w.city()
    if kind <= 2 or p.name in ("name", "owner", "author", "manager"):
        return w.from_pool(_words().names, 0.4)
    if kind == 3:
        return w.pick(_words().colors)
    if kind == 4:
        return f"{w.pick(_words().adjectives)} {w.thing(invented=0.3)}"
    return w.thing(invented=0.3) if kind == 5 else w.invent(_words().things)


def _generic(w: _World) -> _Use:
    """A made-up tool whose name and parameters tell what it does."""
    while True:
        verb, noun = w.pick(_words().verbs), w.pick(_words().nouns) if w.chance(0.8) else w.syllables()
        if _held("tool", verb, noun) == w.heldout and noun not in w.taken:
            w.taken.add(noun)
            break
    name = w.pick((f"{verb}_{noun}", f"{verb}_{noun}", f"{verb}_{noun}", verb + noun.capitalize(), f"{noun}_{verb}"))
    parameters: list[_Parameter] = []
    for _ in range(w.pick((1, 2, 2, 3, 3, 4))):
        draw = w.rng.random()
        if draw < 0.25:
            word, choices = w.pick(_words().enums)
            new = _Parameter(word, "enum", "", tuple(choices), w.chance(0.7))
        else:
            kind = "string" if draw < 0.65 else "integer"
            known = _words().string_words if kind == "string" else _words().integer_words
            word = w.pick(known) if w.chance(0.75) else w.syllables()
            unseen_ok = w.heldout and w.chance(0.5)
            if (_held("parameter", word) and not w.heldout) or (unseen_ok and not _held("parameter", word)):
                continue
            spoken = word.replace("_", " ")
            about = w.pick(("", "", f"The {spoken}.", f"{spoken.capitalize()} of the {noun}"))
            new = _Parameter(word, kind, about, (), w.chance(0.8))
        if all(new.name != p.name for p in parameters) and new.name != noun:
            parameters.append(new)
    if not parameters:
        return _generic(w)
    given = [p for p in parameters if p.required or w.chance(0.5)] or parameters[:1]
    arguments = {p.name: _value(w, p) for p in given}
    told = [(p.name.replace("_", " "), arguments[p.name]) for p in given]
    if w.chance(0.3):
        w.rng.shuffle(told)
    style = w.rng.randint(0, 5)
    a = "an" if noun[0] in "aeiou" else "a"
    ask = w.say(f"[Please {verb}|{verb.capitalize()}|Can you {verb}|I want to {verb}|"
                f"I need to {verb}|Could you {verb}] [{a}|the] {noun}")
    mark = "?" if ask.startswith("C") and ask.split()[1] == "you" else "."
    parts = [f"{k} {v}" for k, v in told]
    if style <= 1:
        joined = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]
        request = f"{ask} with {joined}{mark}"
    elif style == 2:
        request = f"{ask}: {', '.join(parts)}."
    elif style == 3:
        request = f"{ask}{mark} " + " ".join(f"The {k} is {v}." for k, v in told)
    elif style == 4:
        request = f"{ask}{mark} " + ", ".join(f"{k}: {v}" for k, v in told)
    else:
        request = f"{ask} ({', '.join(f'{k} = {v}' for k, v in told)}){mark}"
    code = f"{w.pick('ABCDEFGHKLMNPRSTUVWXYZ')}{w.rng.randint(100, 9999)}"
    response, answer = w.pick((
        (json.dumps({"status": "ok", "id": code}), f"Done. The id is {code}."),
        (json.dumps({"ok": True, "reference": code}), f"Done. The reference is {code}."),
        (f"Done. Reference {code}.", f"Done. The reference is {code}."),
        (json.dumps({"result": code}), f"The result is {code}."),
        (code, f"The result is {code}.")))
    about = w.pick((f"{verb.capitalize()} {a} {noun}.", f"{verb.capitalize()} {a} {noun}",
                    f"Use this to {verb} {a} {noun}.", f"{verb.capitalize()}s {a} {noun} for the user."))
    return _Use(name, about, tuple(parameters), request, arguments, response, answer, (code,))


def _known(w: _World, template: jinja2.Template) -> _Use:
    found: list[_Use] = []
    _render(w, template, parameter=_Parameter, use=lambda *parts: found.append(_Use(*parts)))
    return found[0]


def _tool_use(w: _World) -> Sample:
    known = [template for often, template in _templates("tools.jinja").values() for _ in range(int(often))]

    def draw() -> tuple[jinja2.Template | None, _Use]:
        template = None if w.chance(0.5) else w.pick(known)
        return template, _known(w, template) if template else _generic(w)

    maker, use = draw()
    offered, count = [use], w.pick((1, 1, 2, 2, 3, 3, 4))
    tried = 0
    while len(offered) < count and tried < 20:
        tried += 1
        other_maker, other = draw()
        if all(other.about.rstrip(".") != u.about.rstrip(".") and other.name != u.name for u in offered) and not (
                other_maker is not None and other_maker is maker):
            offered.append(other)
    w.rng.shuffle(offered)
    thinking = w.chance(0.6)
    stage = w.rng.random()
    if stage < 0.15:
        return _no_tool(w, offered, thinking)
    tools = [u.schema() for u in offered]
    messages = _user(w, use.request)
    listed = ", ".join(f"{k} {v}" for k, v in use.arguments.items())
    reasoning = {"reasoning_content": f"I call {use.name} with {listed}."} if thinking else {}
    call: Message = {"role": "assistant", "content": "", **reasoning,
                     "tool_calls": [{"type": "function", "function": {"name": use.name, "arguments": use.arguments}}]}
    if stage < 0.65:
        return Sample(Task("tool_call", messages, tools, thinking, 256, (use.name, use.arguments)), call)
    if thinking and w.chance(0.5):  # most clients do not send the reasoning back
        call = {k: v for k, v in call.items() if k != "reasoning_content"}
    messages = [*messages, call, {"role": "tool", "content": use.response}]
    answer = _reply(use.answer, thinking, f"{use.name} returned {use.response}")
    return Sample(Task("tool_answer", messages, tools, thinking, 256, use.needed), answer)


def _no_tool(w: _World, offered: list[_Use], thinking: bool) -> Sample:
    """A question that none of the offered tools is for."""
    inner = _word_problem(w) if w.chance(0.4) else _talk(w)
    task = inner.task
    offered = [u for u in offered if u.name not in ("calculator", "calculate", "calc", "evaluate_expression", "math")]
    tools = [u.schema() for u in offered] or [_known(w, _templates("tools.jinja")["clock"][1]).schema()]
    wanted = (str(task.answer),) if task.kind == "word_problem" else task.answer
    return replace(inner, task=replace(task, kind="tool_none", tools=tools, answer=wanted))


# ---------------------------------------------------------------------------------------------------------------------
# recall: facts about people and things in a text, and a question about one of them

def _fact(w: _World) -> tuple[str, str, str, str]:
    """Statement, question, answer sentence, value."""
    if w.chance(0.25):
        what = f"{w.pick(_words().adjectives)} {w.pick([t for t in _words().things if _held(t) == w.heldout])}"
        if what in w.taken:
            return _fact(w)
        w.taken.add(what)
        value = f"{w.pick(_words().colors)} {w.pick(_words().places)}"
        text = w.say(f"The {what} [is|is kept|lies] in the {value}.")
        return text, w.say(f"[Where is the {what}?|Where can I find the {what}?|In which place is the {what}?]"), \
            f"The {what} is in the {value}.", value
    name, fact = w.from_pool(_words().names, 0.8), w.pick(_words().facts)
    words, kind = _words(), fact.split()[-1]
    pools = {"color": words.colors, "fruit": words.foods, "city": words.cities, "job": words.jobs,
             "month": words.months}
    if kind in pools:
        value = str(w.pick(pools[kind]))
    elif kind in ("dog", "cat"):
        value = w.syllables().capitalize()
    elif kind == "spot":
        value = f"{w.pick('ABCDEFGH')}{w.rng.randint(1, 99)}"
    else:
        value = str(w.rng.randint(*((100, 999) if kind == "extension" else (1000, 9999))))
    text = w.say(f"[{name}'s {fact} is {value}.|The {fact} of {name} is {value}.]")
    return text, w.say(f"[What is {name}'s {fact}?|What is the {fact} of {name}?|Tell me {name}'s {fact}.|"
                       f"I need the {fact} of {name}.]"), f"{name}'s {fact} is {value}.", value


def _token_estimate(sentence: str) -> float:
    """About how many tokens of the embedded tokenizer a sentence takes (within 4 % on long texts)."""
    digits, capitals = sum(map(str.isdigit, sentence)), sum(map(str.isupper, sentence))
    return 0.1335 * (len(sentence) + 1) + 1.69 * digits + 3.38 * capitals


def _haystack(w: _World, tokens: int) -> tuple[str, list[tuple[str, str, str, str]]]:
    w.taken = set()
    facts: list[tuple[str, str, str, str]] = []
    sentences, size, density = [], 0.0, w.pick((0.2, 0.4, 0.6))
    while size < tokens or not facts:
        if w.chance(density):
            facts.append(_fact(w))
            sentences.append(facts[-1][0])
        else:
            sentences.append(w.say(w.pick(_words().filler)))
        size += _token_estimate(sentences[-1])
        if len(w.taken) > 4000:
            break
    separator = w.pick((" ", " ", "\n"))
    return separator.join(sentences), facts


def _recall(w: _World, tokens: int, turns: int = 1) -> Sample:
    """One question about a text; with `turns` above one, the last of so many (training only)."""
    text, facts = _haystack(w, tokens)
    asked = [w.pick(facts) for _ in range(turns)]
    statement, question, answer, value = asked[0]
    lead = w.say("[Read this text and answer the question.|Here is a text.|Text:|Remember this text.]")
    if w.chance(0.1) and turns == 1:
        first = f"{question}\n\n{text}"
    else:
        first = f"{lead}\n\n{text}\n\n{w.say('[|Question: ]')}{question}"
    messages = _user(w, first, 0.05)
    thinking = w.chance(0.5)
    for statement_next, question_next, answer_next, value_next in asked[1:]:
        messages += [{"role": "assistant", "content": answer, "trained": True},
                     {"role": "user", "content": question_next}]
        statement, answer, value = statement_next, answer_next, value_next
    reply = _reply(answer, thinking, f"The text says: {statement}")
    return Sample(Task("recall", messages, [], thinking, 128, value), reply)


# ---------------------------------------------------------------------------------------------------------------------
# small talk

def _talk(w: _World) -> Sample:
    talk = w.pick(_words().talk)
    text = w.say(talk["say"]).format(w.city())
    question = text.split()[0].lower() in ("who", "what", "what's", "how", "are", "can", "where", "which")
    text += w.pick(("?", "?", "")) if question else w.pick(("", "!", "."))
    text = text.lower() if w.chance(0.15) else text
    thinking = w.chance(0.5)
    reply = _reply(talk["answer"], thinking, talk["thought"])
    return Sample(Task("small_talk", _user(w, text), [], thinking, 96, tuple(talk["needed"])), reply)


# ---------------------------------------------------------------------------------------------------------------------
# what training and evaluation call


def samples(kind: str, split: Split, seed: int, n: int, tokens: int = 4000, turns: int = 1) -> list[Sample]:
    """`n` samples of "word_problems", "tool_calls", "recall", "small_talk", "arithmetic" (sums without a
    story) or "conversations" (several turns)."""
    draw: Callable[[_World], Sample] = {
        "word_problems": _word_problem,
        "arithmetic": lambda w: _word_problem(w, "plain"),
        "tool_calls": _tool_use,
        "recall": lambda w: _recall(w, tokens, turns),
        "small_talk": _talk,
        "conversations": _conversation,
    }[kind]
    return [draw(_World(f"{split}/{kind}/{seed}/{i}", split)) for i in range(n)]


def _conversation(w: _World) -> Sample:
    """Two or three exchanges without tools; the last one is the task."""
    history: list[Message] = []
    for _ in range(w.pick((1, 1, 2))):
        past = _talk(w) if w.chance(0.5) else _word_problem(w)
        history += [m for m in past.task.messages if m["role"] != "system" or not history] + [past.reply]
    last = _word_problem(w) if w.chance(0.6) else _talk(w)
    messages = history + [m for m in last.task.messages if m["role"] != "system"]
    return replace(last, task=replace(last.task, messages=messages))


def tasks(kind: str, split: Split, seed: int, n: int) -> list[Task]:
    """The tasks of `samples` alone."""
    return [sample.task for sample in samples(kind, split, seed, n)]
