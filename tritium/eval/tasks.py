"""Problems that the embedded models are trained and measured on: word problems, tool calls, recall, small talk.

Everything is drawn from a seeded generator and nothing is read from disk. A problem belongs to one of two splits. The
held-out split uses other seeds, and also names, things, cities, tool names, parameter names and tuples of numbers that
training never shows: a word or a tuple is held out when its checksum says so (`_held`), so the two splits cannot meet.

`word_problems`, `tool_calls`, `recall` and `small_talk` return tasks; `grade` judges a generated answer; `samples`
returns tasks with a reference reply, for training.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

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

_NAMES = """Ada Adam Aisha Alan Alice Amir Amy Ana Andre Anita Anna Anton Arjun Asha Astrid Ben Bella Boris Bruno Carla
Carlos Cara Chen Chloe Clara Daniel Dana David Dina Diego Dora Eli Elena Ella Emil Emma Erik Esther Eva Farid Fatima
Felix Fiona Frank Freya George Gina Grace Greta Hana Hannah Hassan Helen Henry Hugo Ida Igor Ines Ingrid Iris Isaac Ivan
Jack Jade James Jamal Jana Jane Jin Joan John Jonas Jose Juan Julia June Kai Karim Karl Kate Katya Kenji Kim Kira Lars
Laura Layla Lea Leo Lena Liam Lily Lina Linda Lisa Liu Lola Lucas Lucy Luis Luna Maja Malik Marco Maria Mark Marta Mary
Mateo Max Maya Mei Mia Mila Milan Mina Mira Mohamed Mona Nadia Nia Nick Nina Noah Nora Oleg Olga Oliver Omar Oscar
Otto Pablo Paul Paula Pedro Petra Peter Priya Quinn Rahul Raj Rania Rita Robert Rosa Rose Ruby Ruth Sam Samir Sana Sara
Sarah Sven Simon Sofia Sonia Sophie Stefan Susan Tara Tariq Theo Tim Tina Tobias Tom Tomas Uma Vera Victor Viktor Walter
Wei Wendy Will Yara Yuki Yusuf Zara Zoe""".split()
_THINGS = """apple orange pear banana lemon cherry plum peach mango strawberry cookie muffin cupcake bagel candy sandwich
egg carrot tomato potato onion pumpkin pencil pen crayon marker eraser notebook book magazine comic sticker stamp
postcard letter card coin marble button bead shell rock stone flower rose tulip seed tree plant leaf ball balloon kite
toy doll puzzle block brick cap hat sock shirt scarf glove ring bracelet necklace candle cup mug plate bowl bottle jar
spoon fork key lamp ticket badge medal ribbon poster photo painting robot car truck train boat bike nail screw bolt
bulb battery brush towel pillow blanket fish duck chicken rabbit feather acorn nut peanut walnut grape melon donut pie
cake pancake chocolate lollipop jellybean magnet whistle drum flag tile rope basket bag chair table stool""".split()
_FOODS = {"apple", "orange", "pear", "banana", "cherry", "plum", "peach", "mango", "strawberry", "cookie", "muffin",
          "cupcake", "candy", "egg", "carrot", "grape", "donut", "pancake", "lollipop", "nut", "peanut", "walnut"}
_CITIES = """Oslo Paris London Berlin Madrid Rome Vienna Prague Warsaw Lisbon Dublin Athens Cairo Tokyo Osaka Seoul Delhi
Mumbai Lima Quito Bogota Boston Chicago Denver Dallas Miami Seattle Toronto Montreal Sydney Perth Auckland Nairobi Lagos
Accra Tunis Dubai Doha Helsinki Stockholm Bergen Zurich Geneva Milan Naples Porto Seville Lyon Munich Hamburg Krakow
Riga Tallinn Vilnius Kyiv Sofia Istanbul Ankara Baku Hanoi Manila Jakarta Singapore Houston Phoenix Portland Atlanta""".split()
_COLORS = "red blue green yellow white black brown pink purple orange gray silver".split()
_BOXES = "box bag basket jar crate pack tray drawer shelf bowl case bucket".split()
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_ONSETS = "b br c ch d dr f fl g gl gr h j k kl l m n p pr qu r s sh sk st t th tr v w y z".split()
_VOWELS = "a e i o u a e i o ai ea ee io ou".split()
_CODAS = ["", "", "", "l", "m", "n", "r", "s", "t", "nd", "rk", "x", "sh", "k"]


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
        n = self.rng.randint(low, high)
        self.numbers.append(n)
        return n

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
            onset = "" if i == 0 and self.chance(0.25) else self.pick(_ONSETS)
            coda = self.pick(_CODAS) if i < count - 1 and self.chance(0.5) else ""
            word += f"{onset}{self.pick(_VOWELS)}{coda}"
        word += str(self.pick(_CODAS))
        return word if len(word) > 1 else f"{word}n"

    def person(self) -> _Person:
        name = self.from_pool(_NAMES, 0.3)
        return _Person(name, *self.pick((("she", "her", "her"), ("he", "his", "him"))))

    def thing(self, only: set[str] | None = None, invented: float = 0.12) -> str:
        pool = sorted(only) if only else _THINGS
        return self.from_pool(pool, 0.0 if only else invented)

    def city(self) -> str:
        return self.from_pool(_CITIES, 0.25)


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
# word problems: each story returns its text, its steps, its answer sentence and its value

_Problem = tuple[str, list[str], str, int]


def _chain(w: _World) -> _Problem:
    """A quantity that changes: one of several beginnings, one to three events, one of several questions."""
    p, q = w.person(), w.person()
    food = w.chance(0.3)
    one = w.thing(_FOODS) if food else w.thing()
    many = _plural(one)
    steps: list[str] = []
    box = w.pick(_BOXES)
    boxes = _plural(box)
    start = w.rng.randint(0, 6)
    if start <= 1:
        total = w.num(10, 150)
        text = w.say(f"[{p.name} has|{p.name} had|{p.name} owns|{p.name} starts with|There are|{p.name} has]")
        text += w.say(f" {total} {many}[| at home| in a {box}].") if start else f" {total} {many}."
    elif start <= 3:
        a, b = w.num(2, 12), w.num(2, 30)
        total = a * b
        text = w.say(f"[{p.name} has {a} {boxes} with {b} {many} [each|in each|in each {box}].|{p.name} [buys|gets] {a} "
                     f"{boxes} of {b} {many}[| each].|{p.name} has {a} {boxes}. [Each {box} has|Each {box} holds|In each "
                     f"{box} there are|There are] {b} {many}[ in each {box}|].|There are {b} {many} in each of "
                     f"{p.name}'s {a} {boxes}.|{p.name} fills {a} {boxes} with {b} {many} each.]")
        text = text.replace(f"There are {b} {many}.", f"Each {box} contains {b} {many}.")
        steps.append(f"{a} {boxes} with {b} {many} each: {_mul(a, b)}.")
    elif start == 4:
        a, b = w.num(3, 90), w.num(3, 90)
        one_color, other = w.rng.sample(_COLORS, 2)
        total = a + b
        text = w.say(f"{p.name} has {a} {one_color} {many} and {b} {other} [{many}|ones].")
        steps.append(f"{one_color} and {other}: {_add(a, b)}.")
    elif start == 5:
        a, b = w.num(2, 12), w.num(2, 25)
        total = a * b
        text = w.say(f"{p.name} [collects|makes|finds|gets] {b} {many} [every day for {a} days|a day for {a} days|each "
                     f"day. {p.She} does this for {a} days].")
        steps.append(f"{a} days with {b} {many} each: {_mul(a, b)}.")
    else:
        a, b = w.num(3, 90), w.num(3, 90)
        total = a + b
        first, second = w.pick((("Monday", "Tuesday"), ("Saturday", "Sunday"), ("the first day", "the second day")))
        text = w.say(f"{p.name} [finds|makes|buys|collects] {a} {many} on {first} and {b} [|more |{many} ]on {second}.")
        steps.append(f"{first} and {second}: {_add(a, b)}.")
    lost = False
    for i in range(w.pick((0, 1, 1, 2)) + (not steps)):
        subject = w.pick((p.name, p.She, p.She, p.She))
        then = w.say("[||Then |Later |After that, |Next, |The next day, ]") if i or w.chance(0.3) else ""
        subject = subject.lower() if then and subject == p.She else subject
        event = w.rng.randint(0, 11)
        if event <= 2 and total < 900:
            k = w.num(2, min(99, 990 - total))
            line = w.say(f"{subject} [buys {k} more|finds {k} more|gets {k} more {many}|gets {k} {many} from {q.name}|"
                         f"receives {k} more {many}|buys another {k} {many}|picks up {k} more {many}|adds {k} more]")
            steps.append(f"{k} more: {_add(total, k)}.")
            total += k
        elif event <= 6 and total > 4:
            k = w.num(2, min(99, total - 2))
            eats = f"eats {k}|eats {k} of them|" if food else f"breaks {k} of them|"
            line = w.say(f"{subject} [gives {k} [{many} |of them ||{many} ][away|to {q.name}]|gives {q.name} {k} [{many}|"
                         f"of them]|loses {k} [|{many}]|sells {k} [of them|{many}]|{eats}uses {k} [of them|{many}]|donates "
                         f"{k} {many}|throws {k} [away|{many} away]|takes out {k}]").rstrip()
            steps.append(f"{k} less: {_sub(total, k)}.")
            total, lost = total - k, True
        elif event == 7 and total < 700:
            a, b = w.num(2, 9), w.num(2, 25)
            line = w.say(f"{subject} buys {a} [more {boxes} with|{boxes} with another] {b} {many} [each|in each]")
            steps.append(f"{a} {boxes} with {b} {many} each: {_mul(a, b)}.")
            steps.append(f"{a * b} more: {_add(total, a * b)}.")
            total += a * b
        elif event == 8 and total > 20:
            a = w.num(2, 6)
            b = w.num(2, max(2, min(15, (total - 1) // a)))
            if a * b >= total:
                return _chain(w)
            line = w.say(f"{subject} gives {a} friends {b} {many} each")
            steps.append(f"{a} friends get {b} each: {_mul(a, b)}.")
            steps.append(f"{a * b} less: {_sub(total, a * b)}.")
            total, lost = total - a * b, True
        elif event == 9 and total < 400:
            line = w.say(f"{subject} [doubles {p.her} {many}|gets the same number of {many} again|doubles the number of "
                         f"{many}]")
            steps.append(f"Twice as many: {_mul(2, total)}.")
            total *= 2
        elif event == 10 and total % 2 == 0:
            line = w.say(f"{subject} [gives half of them [away|to {q.name}]|sells half of [them|the {many}]|gives away half "
                         f"of {p.her} {many}|loses half of them]")
            steps.append(f"Half are gone: {_div(total, 2)}.")
            total, lost = total // 2, True
        elif total > 9 and total % 3 == 0:
            line = w.say(f"{subject} [gives a third of them to {q.name}|sells one third of the {many}]")
            steps.append(f"A third: {_div(total, 3)}.")
            steps.append(f"Without them: {_sub(total, total // 3)}.")
            total, lost = total - total // 3, True
        else:
            continue
        text += f" {then}{line}."
    end = w.rng.randint(0, 9)
    divisors = [d for d in range(2, 13) if total % d == 0 and total // d > 1]
    if end <= 1 and divisors:
        k = w.pick(divisors)
        w.numbers.append(k)
        text += w.say(f" {p.She} [shares|splits|divides] [them|the {many}|the rest] equally among {k} friends. How many "
                      f"{many} does each friend get?") if w.chance(0.5) else w.say(
            f" {p.She} puts [them|all {many}|the {many}] [equally into|into] {k} {boxes}[|, the same number in each]. How "
            f"many {many} are in each {box}?")
        steps.append(f"Shared by {k}: {_div(total, k)}.")
        value, answer = total // k, f"Each gets {total // k} {many}."
        if "friend get" not in text:
            answer = f"There are {value} {many} in each {box}."
    elif end == 2 and divisors:
        k = w.pick(divisors)
        w.numbers.append(k)
        text += w.say(f" {p.She} packs [them|the {many}] into {boxes} of {k}. How many {boxes} does {p.she} "
                      f"[need|fill]?")
        steps.append(f"{boxes.capitalize()} of {k}: {_div(total, k)}.")
        value, answer = total // k, f"{p.name} needs {total // k} {boxes}."
    elif end == 3 and total < 200:
        price = w.num(2, 9)
        if price * total > 999:
            return _chain(w)
        text += w.say(f" {p.She} sells [them|all of them|the {many}] for ${price} each. How much [money |]does {p.she} "
                      f"[get|make|earn]?")
        steps.append(f"{total} at ${price}: {_mul(total, price)}.")
        value, answer = price * total, f"{p.name} gets ${price * total}."
    elif lost:
        text += w.say(f" How many {many} [are left|does {p.name} have left|does {p.she} have left|does {p.name} have now|"
                      f"remain|does {p.she} still have]?")
        value, answer = total, w.pick((f"{total} {many} are left.", f"{p.name} has {total} {many} left."))
    else:
        text += w.say(f" How many {many} [does {p.name} have now|does {p.she} have in total|does {p.name} have|does {p.she} "
                      f"have altogether|are there in all|are there now|does {p.name} have in all]?")
        value, answer = total, f"{p.name} has {total} {many}."
    if len(steps) > 5 or p.name not in text:
        return _chain(w)
    return text, steps, answer, value


def _shopping(w: _World) -> _Problem:
    p, x, y = w.person(), w.thing(), w.thing()
    a, b, m, n = w.num(2, 9), w.num(2, 9), w.num(2, 30), w.num(2, 15)
    total = a * m + b * n
    text = w.say(f"{p.name} [buys|wants to buy|orders] {a} {_plural(x)} [at ${m} each|for ${m} each|that cost ${m} each] and "
                 f"{b} {_plural(y)} [at|for] ${n} each.") if w.chance(0.6) else w.say(
        f"A {x} costs ${m} and a {y} costs ${n}. {p.name} buys {a} {_plural(x)} and {b} {_plural(y)}.")
    steps = [f"{_plural(x).capitalize()}: {_mul(a, m)}.", f"{_plural(y).capitalize()}: {_mul(b, n)}.",
             f"Together: {_add(a * m, b * n)}."]
    if w.chance(0.4):
        paid = w.pick([n for n in (20, 50, 100, 200, 500) if n > total])
        text += w.say(f" {p.She} pays with [a ${paid} bill|${paid}]. How much [change|money] does {p.she} get back?")
        return text, [*steps, f"Change: {_sub(paid, total)}."], f"{p.name} gets ${paid - total} back.", paid - total
    text += w.say(f" [How much does {p.she} [pay|spend] [in total|altogether]|What is the total [price|cost]|How much do they "
                  f"cost together|How much money does {p.name} need]?")
    return text, steps, f"The total is ${total}.", total


def _single_price(w: _World) -> _Problem:
    p, x = w.person(), w.thing()
    a, m = w.num(2, 12), w.num(2, 30)
    total, many = a * m, _plural(x)
    paid = total + w.num(1, 60)
    order = w.rng.randint(0, 2)
    buys = w.say(f"[buys {a} {many} for ${m} each|buys {a} {many} at ${m} each|buys {a} {many}. Each {x} costs ${m}]")
    steps = [f"{a} {many} at ${m}: {_mul(a, m)}.", f"{'Left' if order < 2 else 'Needed'}: {_sub(paid, total)}."]
    if order == 0:
        text = w.say(f"{p.name} has ${paid}. {p.She} {buys}. How much money [is left|does {p.she} have left|does {p.name} "
                     f"have now]?")
        return text, steps, f"{p.name} has ${paid - total} left.", paid - total
    if order == 1:
        text = f"{p.name} {buys}. {p.She} pays with ${paid}. How much change does {p.she} get?"
        return text, steps, f"{p.name} gets ${paid - total} back.", paid - total
    text = w.say(f"{p.name} sells {a} {many} for ${m} each and wants to buy a present for ${paid}. How much more money does "
                 f"{p.she} need?")
    return text, steps, f"{p.name} needs ${paid - total} more.", paid - total


def _discount(w: _World) -> _Problem:
    p, x = w.person(), w.thing()
    price, n = w.num(8, 60), w.num(2, 9)
    off = w.num(2, price - 3)
    text = w.say(f"A {x} [costs|normally costs] ${price}. [Today it is ${off} cheaper|In the sale it costs ${off} less|There "
                 f"is a discount of ${off} on each]. {p.name} buys {n} {_plural(x)}. How much does {p.she} pay?")
    steps = [f"Price: {_sub(price, off)}.", f"{n} of them: {_mul(n, price - off)}."]
    return text, steps, f"{p.name} pays ${n * (price - off)}.", n * (price - off)


def _compare(w: _World) -> _Problem:
    """Two or three people; each count told relative to an earlier one."""
    p, q, r = w.person(), w.person(), w.person()
    many = _plural(w.thing())
    a = w.num(4, 80)
    counts, steps, text = [a], [], w.say(f"{p.name} [has|owns|collects] {a} {many}.")
    last = p
    for other in (q, r)[: w.pick((1, 1, 2))]:
        kind, base = w.rng.randint(0, 4), counts[-1]
        if kind == 0:
            k = w.num(2, 60)
            text += w.say(f" {other.name} has {k} more [|{many} ]than {last.name}.")
            steps.append(f"{other.name}: {_add(base, k)}.")
            counts.append(base + k)
        elif kind == 1 and base > 1:
            k = w.num(1, base - 1)
            text += w.say(f" {other.name} has {k} [fewer|less] [|{many} ]than {last.name}.")
            steps.append(f"{other.name}: {_sub(base, k)}.")
            counts.append(base - k)
        elif kind == 2 and base % 2 == 0:
            text += w.say(f" {other.name} has half as many[| {many}] as {last.name}.")
            steps.append(f"{other.name}: {_div(base, 2)}.")
            counts.append(base // 2)
        elif base < 150:
            k = w.pick((2, 2, 3, 4, 5))
            w.numbers.append(k)
            times = w.say("[twice|two times]") if k == 2 else w.say(f"{k} times")
            text += w.say(f" {other.name} has {times} as many[| {many}] as {last.name}.")
            steps.append(f"{other.name}: {_mul(k, base)}.")
            counts.append(base * k)
        else:
            return _compare(w)
        last = other
    if counts[-1] < 2:
        return _compare(w)
    ask = w.rng.randint(0, 5)
    if ask <= 3:
        who = "all three" if len(counts) == 3 else "both of them"
        text += w.say(f" How many {many} do [they|{who}] have [together|in total|altogether|in all]?")
        return text, [*steps, f"Together: {_add(*counts)}."], f"Together they have {sum(counts)} {many}.", sum(counts)
    if ask == 4 and counts[-1] != a:
        more, less = (last, p) if counts[-1] > a else (p, last)
        gap = abs(counts[-1] - a)
        text += f" How many more {many} does {more.name} have than {less.name}?"
        steps.append(f"Difference: {_sub(max(counts[-1], a), min(counts[-1], a))}.")
        return text, steps, f"{more.name} has {gap} more {many}.", gap
    k = w.num(1, counts[-1] - 1)
    text += w.say(f" {last.name} [loses|gives away|sells] {k} of {last.her} {many}. How many {many} does {last.name} have "
                  f"[left|now]?")
    steps.append(f"{k} less: {_sub(counts[-1], k)}.")
    return text, steps, f"{last.name} has {counts[-1] - k} {many} left.", counts[-1] - k


def _reading(w: _World) -> _Problem:
    p = w.person()
    unit, doing, whole = w.pick((("pages", "reads", "A book has {} pages."), ("kilometers", "walks", "A trail is {} "
                                "kilometers long."), ("tasks", "solves", "A test has {} tasks."),
                                ("bricks", "lays", "A wall needs {} bricks."), ("rows", "knits", "A scarf needs {} rows.")))
    per, days = w.num(2, 40), w.num(2, 9)
    total = per * days + w.num(2, 120)
    text = whole.format(total) + w.say(f" {p.name} {doing} {per} {unit} [a day|each day|every day|per day] for {days} days. "
                                       f"How many {unit} are [left|still left]?")
    steps = [f"{days} days with {per} {unit} each: {_mul(days, per)}.", f"Left: {_sub(total, per * days)}."]
    return text, steps, f"{total - per * days} {unit} are left.", total - per * days


def _wage(w: _World) -> _Problem:
    p, x = w.person(), w.thing()
    wage, hours = w.num(5, 30), w.num(2, 10)
    steps = [f"{hours} hours at ${wage}: {_mul(hours, wage)}."]
    total = wage * hours
    text = w.say(f"{p.name} [earns|makes|is paid] ${wage} [an|per] hour[| in a shop| in a garden]. {p.She} works {hours} "
                 f"hours[| this week].")
    kind = w.rng.randint(0, 2)
    if kind == 0:
        k = w.num(2, total - 1)
        text += w.say(f" {p.She} spends ${k} on [a {x}|food]. How much money [is left|does {p.she} have left]?")
        return text, [*steps, f"Left: {_sub(total, k)}."], f"{p.name} has ${total - k} left.", total - k
    if kind == 1:
        k = w.num(5, 200)
        text += w.say(f" {p.She} already had ${k}. How much money does {p.she} have now?")
        return text, [*steps, f"With the ${k}: {_add(total, k)}."], f"{p.name} has ${total + k}.", total + k
    k = w.num(2, 4)
    if total * k > 999:
        return _wage(w)
    text += w.say(f" How much does {p.she} earn in {k} [such weeks|weeks like this]?")
    return text, [*steps, f"{k} weeks: {_mul(k, total)}."], f"{p.name} earns ${total * k}.", total * k


def _saving(w: _World) -> _Problem:
    p, x = w.person(), w.thing()
    each, weeks, have = w.num(3, 25), w.num(2, 12), w.num(2, 60)
    saved = each * weeks
    text = w.say(f"{p.name} [saves|puts aside] ${each} [a week|each week|every week] for {weeks} weeks.")
    steps = [f"{weeks} weeks with ${each}: {_mul(weeks, each)}."]
    if w.chance(0.5):
        text = w.say(f"{p.name} has ${have}. ") + text.replace(p.name, p.She) + w.say(
            f" How much [money |]does {p.she} have [then|in the end|now]?")
        return text, [*steps, f"With the ${have}: {_add(saved, have)}."], f"{p.name} has ${saved + have}.", saved + have
    text += w.say(f" {p.She} wants [a {x}|a bicycle|a guitar] that costs ${saved + have}. How much [more |more money ]does "
                  f"{p.she} need?")
    return text, [*steps, f"Missing: {_sub(saved + have, saved)}."], f"{p.name} needs ${have} more.", have


def _bus(w: _World) -> _Problem:
    place, unit = w.pick((("bus", "people"), ("train", "people"), ("boat", "passengers"), ("museum", "visitors"),
                          ("pool", "children"), ("park", "children"), ("library", "readers")))
    a, on = w.num(8, 90), w.num(2, 60)
    off = w.num(2, a - 2)
    enter, leave = ("get on", "get off") if place in ("bus", "train", "boat") else ("come in", "leave")
    text = w.say(f"[There are {a} {unit} [on|in] a {place}|A {place} has {a} {unit} in it].")
    steps, total = [], a
    for k, verb, more in ((off, leave, False), (on, enter, True))[:: w.pick((1, -1))]:
        text += w.say(f" [Then |At the next stop, |Later |]{k} {unit} {verb}.")
        steps.append(f"{k} {verb}: {_add(total, k) if more else _sub(total, k)}.")
        total += k if more else -k
    if w.chance(0.3) and total > 3:
        k = w.num(1, total - 1)
        text += f" At last {k} more {leave}."
        steps.append(f"{k} {leave}: {_sub(total, k)}.")
        total -= k
    inside = "on" if place in ("bus", "train", "boat") else "in"
    text += w.say(f" How many {unit} are {inside} the {place} [now|then|at the end]?")
    return text, steps, f"There are {total} {unit} {inside} the {place}.", total


def _rows(w: _World) -> _Problem:
    many = w.pick(("chairs", "trees", "plants", "desks", "seats", "cars", "bushes", "lamps"))
    where = w.pick(("hall", "garden", "park", "room", "field", "school"))
    a, b = w.num(2, 15), w.num(2, 30)
    total = a * b
    text = w.say(f"[A {where} has {a} rows [of|with] {b} {many}[| each]|In a {where} there are {a} rows with {b} {many} in "
                 f"each row].")
    steps = [f"{a} rows of {b}: {_mul(a, b)}."]
    kind = w.rng.randint(0, 2)
    if kind == 0:
        k = w.num(1, total - 1)
        text += w.say(f" {k} [{many}|of them] are [removed|taken away|broken and thrown away]. How many {many} are left?")
        return text, [*steps, f"{k} less: {_sub(total, k)}."], f"{total - k} {many} are left.", total - k
    if kind == 1:
        k = w.num(2, 90)
        text += w.say(f" [Another {k}|{k} more] {many} are added. How many {many} are there [now|in total]?")
        return text, [*steps, f"{k} more: {_add(total, k)}."], f"There are {total + k} {many}.", total + k
    c, d = w.num(2, 9), w.num(2, 20)
    text += w.say(f" [Another|A second] {where} has {c} rows of {d} {many}. How many {many} are there [in total|together]?")
    steps += [f"{c} rows of {d}: {_mul(c, d)}.", f"Together: {_add(total, c * d)}."]
    return text, steps, f"There are {total + c * d} {many}.", total + c * d


def _groups(w: _World) -> _Problem:
    kind = w.pick((("girls", "boys", "children"), ("adults", "children", "people"), ("cats", "dogs", "animals"),
                   ("players", "guests", "people")))
    k = w.num(2, 9)
    each = w.num(2, 14)
    total = k * each
    if total < 6:
        return _groups(w)
    a = w.num(2, total - 2)
    text = w.say(f"[There are {a} {kind[0]} and {total - a} {kind[1]} in a [class|club|house]|A [club|class|group] has {a} "
                 f"{kind[0]} and {total - a} {kind[1]}].")
    steps = [f"Together: {_add(a, total - a)}."]
    if w.chance(0.5):
        text += w.say(f" They [form|make] {k} equal [teams|groups]. How many {kind[2]} are in each [team|group]?")
        return text, [*steps, f"{k} parts: {_div(total, k)}."], f"There are {each} {kind[2]} in each.", each
    text += w.say(f" They [form|make] [teams|groups] of {each}. How many [teams|groups] are there?")
    return text, [*steps, f"Groups of {each}: {_div(total, each)}."], f"There are {k} groups.", k


def _ages(w: _World) -> _Problem:
    p, q = w.person(), w.person()
    a, k = w.num(4, 50), w.num(2, 30)
    kind = w.rng.randint(0, 2)
    text = w.say(f"{p.name} is {a} years old.")
    if kind == 2:
        text += w.say(f" {q.name} is [twice as old as {p.name}|twice {p.name}'s age].")
        older, steps = 2 * a, [f"{q.name}: {_mul(2, a)}."]
    else:
        text += w.say(f" {q.name} is {k} years older[| than {p.name}].")
        older, steps = a + k, [f"{q.name}: {_add(a, k)}."]
    if w.chance(0.5):
        text += w.say(" [What is the sum of their ages?|How old are they together?]")
        return text, [*steps, f"Together: {_add(a, older)}."], f"Together they are {a + older} years old.", a + older
    t = w.num(2, 20)
    text += w.say(f" How old will {q.name} be in {t} years?")
    return text, [*steps, f"In {t} years: {_add(older, t)}."], f"{q.name} will be {older + t} years old.", older + t


def _travel(w: _World) -> _Problem:
    p = w.person()
    speed, hours, k = w.num(4, 90), w.num(2, 9), w.num(2, 99)
    verb = w.pick(("drives", "rides", "travels", "goes"))
    done = speed * hours
    text = w.say(f"{p.name} {verb} {speed} [km|kilometers|miles] [an|per|each] hour for {hours} hours.")
    steps = [f"{hours} hours at {speed}: {_mul(hours, speed)}."]
    unit = "miles" if "miles" in text else "km" if " km " in text else "kilometers"
    if w.chance(0.5):
        text += w.say(f" [Then|After a break] {p.she} {verb} another {k} {unit}. How far does {p.she} go [in total|altogether]?")
        return text, [*steps, f"{k} more: {_add(done, k)}."], f"{p.name} goes {done + k} {unit}.", done + k
    text += w.say(f" The whole [trip|way] is {done + k} {unit} [long|]. How many {unit} are left?").replace(" .", ".")
    return text, [*steps, f"Left: {_sub(done + k, done)}."], f"{k} {unit} are left.", k


def _recipe(w: _World) -> _Problem:
    p = w.person()
    dish, need = w.pick((("cake", "eggs"), ("pizza", "tomatoes"), ("pie", "apples"), ("soup", "carrots"), ("necklace", "beads"),
                         ("toy car", "wheels"), ("table", "screws"), ("salad", "olives")))
    per, n = w.num(2, 30), w.num(2, 9)
    used = per * n
    text = w.say(f"[One {dish} needs {per} {need}|{p.name} needs {per} {need} for one {dish}|A {dish} takes {per} {need}]. "
                 f"{p.name} [makes|wants to make] {n} {_plural(dish)}")
    steps = [f"{n} {_plural(dish)}: {_mul(n, per)}."]
    k = w.num(2, 60)
    if w.chance(0.5):
        text += w.say(f" and has {used + k} {need}. How many {need} are left [over|]?").replace(" ?", "?")
        return text, [*steps, f"Left: {_sub(used + k, used)}."], f"{k} {need} are left.", k
    if used - k < 1:
        return _recipe(w)
    text += w.say(f" and [has|already has] {used - k} {need}. How many more {need} does {p.she} need?")
    return text, [*steps, f"Missing: {_sub(used, used - k)}."], f"{p.name} needs {k} more {need}.", k


def _legs(w: _World) -> _Problem:
    (x, i), (y, j) = w.rng.sample((("cows", 4), ("chickens", 2), ("spiders", 8), ("ants", 6), ("horses", 4), ("ducks", 2),
                                   ("sheep", 4)), 2)
    a, b = w.num(2, 30), w.num(2, 30)
    text = w.say(f"[A farm has|There are|A farmer has] {a} {x} and {b} {y}. [{x.capitalize()} have {i} legs and {y} have "
                 f"{j} legs. |]How many legs do they have [together|in total|altogether]?")
    steps = [f"{x.capitalize()}: {_mul(a, i)}.", f"{y.capitalize()}: {_mul(b, j)}.", f"Together: {_add(a * i, b * j)}."]
    return text, steps, f"They have {a * i + b * j} legs.", a * i + b * j


def _shelves(w: _World) -> _Problem:
    a, b = w.num(2, 12), w.num(5, 30)
    total, many = a * b, w.pick(("books", "games", "films", "boxes", "bottles"))
    out, back = w.num(2, total - 2), w.num(2, 40)
    text = w.say(f"A [library|shop|school] has {a} shelves with {b} {many} each. {out} {many} are [lent out|taken|sold]. "
                 f"[Then|Later] {back} {many} are [brought back|added]. How many {many} are there now?")
    steps = [f"{a} shelves with {b}: {_mul(a, b)}.", f"{out} out: {_sub(total, out)}.", f"{back} in: {_add(total - out, back)}."]
    return text, steps, f"There are {total - out + back} {many}.", total - out + back


def _tickets(w: _World) -> _Problem:
    adult, child, a, c = w.num(6, 30), w.num(2, 15), w.num(2, 8), w.num(2, 9)
    total = adult * a + child * c
    text = w.say(f"[A ticket costs ${adult} for adults and ${child} for children|Adults pay ${adult} and children pay "
                 f"${child}]. [How much do {a} adults and {c} children pay[| together]?|A group of {a} adults and {c} "
                 f"children goes to the [zoo|cinema|museum]. How much do they pay?]")
    steps = [f"Adults: {_mul(a, adult)}.", f"Children: {_mul(c, child)}.", f"Together: {_add(adult * a, child * c)}."]
    return text, steps, f"They pay ${total}.", total


def _tank(w: _World) -> _Problem:
    rate, hours = w.num(2, 25), w.num(2, 12)
    used = rate * hours
    full = used + w.num(3, 200)
    text = w.say(f"A [tank|barrel|pool] [holds|contains|has] {full} liters of water. [It loses|Every hour it loses] {rate} "
                 f"liters[ per hour|].")
    text = text.replace(f"It loses {rate} liters.", f"It loses {rate} liters an hour.")
    text += f" How much water is left after {hours} hours?"
    steps = [f"{hours} hours with {rate} liters: {_mul(hours, rate)}.", f"Left: {_sub(full, used)}."]
    if w.chance(0.4):
        k = w.num(2, 99)
        text = text.replace("How much", w.say(f"[After {hours} hours, {k} liters are added|{k} liters are poured in later]. "
                                              "How much")).replace(f" left after {hours} hours", f" there after {hours} hours")
        steps.append(f"{k} more: {_add(full - used, k)}.")
        return text, steps, f"There are {full - used + k} liters.", full - used + k
    return text, steps, f"{full - used} liters are left.", full - used


def _game(w: _World) -> _Problem:
    p = w.person()
    per, rounds = w.num(3, 40), w.num(2, 9)
    total = per * rounds
    lost = w.num(1, total - 1)
    text = w.say(f"{p.name} [scores|wins|gets] {per} points in each of {rounds} [rounds|games]. Then {p.she} "
                 f"[loses|must give back] {lost} points.")
    steps = [f"{rounds} rounds with {per} points: {_mul(rounds, per)}.", f"{lost} less: {_sub(total, lost)}."]
    if w.chance(0.4):
        k = w.num(2, 80)
        text += w.say(f" [At the end|Finally] {p.she} gets a bonus of {k} points.")
        steps.append(f"Bonus: {_add(total - lost, k)}.")
        total += k
    text += w.say(f" How many points does {p.name} have[| now| at the end]?")
    return text, steps, f"{p.name} has {total - lost} points.", total - lost


def _pool(w: _World) -> _Problem:
    p, q = w.person(), w.person()
    many = _plural(w.thing())
    k, each = w.num(2, 9), w.num(3, 40)
    total = k * each
    a = w.num(1, total - 1)
    text = w.say(f"{p.name} has {a} {many} and {q.name} has {total - a}[| {many}]. They put [them|all {many}] together and "
                 f"[share|divide|split] them equally [among|between] {k} [people|children|friends]. How many {many} does each "
                 f"[one|person] get?")
    return text, [f"Together: {_add(a, total - a)}.", f"Shared by {k}: {_div(total, k)}."], f"Each gets {each} {many}.", each


def _fraction(w: _World) -> _Problem:
    p, many = w.person(), _plural(w.thing())
    word, k = w.pick((("Half", 2), ("A third", 3), ("A quarter", 4), ("A fifth", 5)))
    part = w.num(2, 60)
    total = part * k
    one, other = w.rng.sample(_COLORS, 2)
    text = w.say(f"{p.name} has {total} {many}. {word} of [them|the {many}] are {one}")
    steps = [f"{word}: {_div(total, k)}."]
    if w.chance(0.5):
        text += w.say(f". [The rest are {other}|The others are {other}]. How many {many} are {other}?")
        return text, [*steps, f"The rest: {_sub(total, part)}."], f"{total - part} {many} are {other}.", total - part
    extra = w.num(2, 50)
    text += w.say(f". {p.She} [gets|buys|finds] {extra} more {one} {many}. How many {one} {many} does {p.she} have now?")
    return text, [*steps, f"{extra} more: {_add(part, extra)}."], f"{p.name} has {part + extra} {one} {many}.", part + extra


def _packs(w: _World) -> _Problem:
    p, many = w.person(), _plural(w.thing())
    size, packs, price = w.num(2, 12), w.num(2, 20), w.num(2, 12)
    text = w.say(f"{p.name} needs {size * packs} {many}. [They come in packs of {size}|One pack has {size} {many}|There are "
                 f"{size} {many} in a pack]. [A pack costs|Each pack costs] ${price}. How much does {p.she} [pay|have to pay]?")
    steps = [f"Packs: {_div(size * packs, size)}.", f"{packs} packs at ${price}: {_mul(packs, price)}."]
    return text, steps, f"{p.name} pays ${packs * price}.", packs * price


def _rest(w: _World) -> _Problem:
    p, many = w.person(), _plural(w.thing())
    k, each, gone = w.num(2, 9), w.num(2, 40), w.num(2, 70)
    total = k * each + gone
    text = w.say(f"{p.name} has {total} {many}. {p.She} [keeps {gone} for {p.to_her}self|keeps {gone}|loses {gone}|puts {gone} "
                 f"away] and [shares|divides|splits] the rest equally among {k} friends. How many {many} does each friend get?"
                 ).replace("hisself", "himself")
    steps = [f"The rest: {_sub(total, gone)}.", f"Shared by {k}: {_div(total - gone, k)}."]
    return text, steps, f"Each friend gets {each} {many}.", each


def _backwards(w: _World) -> _Problem:
    p, many = w.person(), _plural(w.thing())
    a, b, left = w.num(2, 80), w.num(2, 80), w.num(2, 90)
    if w.chance(0.5):
        text = w.say(f"{p.name} [gave {a} {many} away|gave away {a} {many}|lost {a} {many}] and [sold|used] {b}. Now {p.she} has "
                     f"{left} [{many} |]left. How many {many} did {p.she} have [at first|before|at the start]?")
        return text, [f"Gone: {_add(a, b)}.", f"At first: {_add(left, a + b)}."], f"{p.name} had {left + a + b} {many}.", left + a + b
    total = a + b + left
    text = w.say(f"{p.name} had some {many}. {p.She} got {a} more and then {b} more. Now {p.she} has {total} {many}. How many "
                 f"{many} did {p.she} have at first?")
    return text, [f"Gained: {_add(a, b)}.", f"At first: {_sub(total, a + b)}."], f"{p.name} had {left} {many}.", left


def _rectangle(w: _World) -> _Problem:
    a, b = w.num(2, 30), w.num(2, 12)
    place = w.pick(("garden", "field", "room", "carpet", "yard"))
    text = w.say(f"A {place} is {a} meters long and {b} meters wide.")
    kind = w.rng.randint(0, 2)
    if kind == 0:
        text += w.say(" [How long is the fence around it|What is its perimeter|How many meters is it around]?")
        return text, [f"Two sides: {_add(a, b)}.", f"All sides: {_mul(2, a + b)}."], f"It is {2 * (a + b)} meters.", 2 * (a + b)
    area = a * b
    if kind == 1:
        k = w.num(1, area - 1)
        text += w.say(f" {k} square meters are [covered with stones|used for flowers]. How many square meters are free?")
        return text, [f"Area: {_mul(a, b)}.", f"Free: {_sub(area, k)}."], f"{area - k} square meters are free.", area - k
    price = w.num(2, 9)
    if area * price > 999:
        return _rectangle(w)
    text += w.say(f" A square meter [of tiles |]costs ${price}. How much does [the whole {place}|it] cost?")
    return text, [f"Area: {_mul(a, b)}.", f"Cost: {_mul(area, price)}."], f"It costs ${area * price}.", area * price


def _machine(w: _World) -> _Problem:
    many = _plural(w.thing())
    rate, hours, days = w.num(2, 30), w.num(2, 9), w.num(2, 6)
    if rate * hours * days > 999:
        return _machine(w)
    who = w.pick(("A machine", "A baker", "A worker", "A factory", w.person().name))
    text = w.say(f"{who} makes {rate} {many} [an|per|every] hour and works {hours} hours [a|per] day. How many {many} [are made "
                 f"in|does that make in] {days} days?")
    steps = [f"A day: {_mul(hours, rate)}.", f"{days} days: {_mul(days, hours * rate)}."]
    return text, steps, f"{rate * hours * days} {many} are made.", rate * hours * days


def _over_time(w: _World) -> _Problem:
    """An amount in one period and another one told relative to it."""
    p, many = w.person(), _plural(w.thing())
    verb = w.pick(("sells", "makes", "buys", "collects", "finds", "counts"))
    first, second = w.pick((("April", "May"), ("March", "June"), ("the morning", "the afternoon"), ("the first week", "the second "
                            "week"), ("spring", "summer"), ("the first hour", "the second hour")))
    a, kind = w.num(2, 90), w.rng.randint(0, 4)
    if kind == 0 and a % 2 == 0:
        how, b, step = "half as many", a // 2, _div(a, 2)
    elif kind == 1:
        how, b, step = "twice as many", 2 * a, _mul(2, a)
    elif kind == 2:
        k = w.num(3, 6)
        how, b, step = f"{k} times as many", k * a, _mul(k, a)
    elif kind == 3 and a > 4:
        k = w.num(1, a - 2)
        how, b, step = f"{k} fewer", a - k, _sub(a, k)
    else:
        k = w.num(2, 60)
        how, b, step = f"{k} more", a + k, _add(a, k)
    text = w.say(f"{p.name} {verb} {a} {many} in {first}[. In {second} {p.she} {verb}| and then {p.she} {verb}| and] {how}")
    text += "." if f". In {second}" in text else f" in {second}."
    steps = [f"In {second}: {step}.", f"Together: {_add(a, b)}."]
    text += w.say(f" How many {many} [is that|are that|are there] [in total|altogether|in all|together]?")
    return text, steps, f"Together {a + b} {many}.", a + b


def _each_friend(w: _World) -> _Problem:
    p, many = w.person(), _plural(w.thing())
    a, k, m = w.num(2, 90), w.num(2, 12), w.num(2, 20)
    text = w.say(f"{p.name} has {a} {many}. [{k} friends each give {p.to_her} {m} more|{p.She} gets {m} {many} from each of {k} "
                 f"friends|Each of {p.her} {k} friends gives {p.to_her} {m} {many}]. How many {many} does {p.she} have now?")
    steps = [f"{k} friends give {m} each: {_mul(k, m)}.", f"{k * m} more: {_add(a, k * m)}."]
    return text, steps, f"{p.name} has {a + k * m} {many}.", a + k * m


def _daily(w: _World) -> _Problem:
    p = w.person()
    does, unit = w.pick((("takes {a} walks of {b} minutes", "minutes"), ("runs {a} rounds of {b} meters", "meters"), ("drinks {a} "
                         "bottles of {b} spoons", "spoons"), ("reads {a} books of {b} pages", "pages"), ("sings {a} songs of {b} "
                         "minutes", "minutes"), ("does {a} sets of {b} jumps", "jumps")))
    a, b, days = w.num(2, 6), w.num(2, 20), w.num(2, 9)
    span = "a week" if days == 7 else f"{days} days"
    text = f"{p.name} {does.format(a=a, b=b)} " + w.say(f"[every day|each day|a day]. How many {unit} is that in {span}?")
    steps = [f"A day: {_mul(a, b)}.", f"{days} days: {_mul(days, a * b)}."]
    return text, steps, f"That is {days * a * b} {unit}.", days * a * b


def _two_kinds(w: _World) -> _Problem:
    """Only one of two kinds of things is asked for, or all of them."""
    p, x, y = w.person(), _plural(w.thing()), _plural(w.thing())
    a, b = w.num(6, 120), w.num(2, 120)
    text = w.say(f"{p.name} has {a} {x} and {b} {y}.")
    gain = w.chance(0.5)
    k = w.num(2, 90) if gain else w.num(2, a - 2)
    text += w.say(f" {p.She} [buys|finds|gets] {k} more {x}.") if gain else w.say(
        f" {p.She} [gives away|sells|loses|gives] {k} {x}.").replace(f"gives {k} {x}.", f"gives {k} {x} to a friend.")
    now = a + k if gain else a - k
    steps = [f"{x.capitalize()}: {_add(a, k) if gain else _sub(a, k)}."]
    if w.chance(0.6):
        text += w.say(f" How many {x} does {p.she} have [now|{'now' if gain else 'left'}]?")
        return text, steps, f"{p.name} has {now} {x}.", now
    text += w.say(f" How many {x} and {y} does {p.she} have [together|in total]?")
    return text, [*steps, f"With the {y}: {_add(now, b)}."], f"Together {now + b}.", now + b


def _split_cost(w: _World) -> _Problem:
    x, y = w.thing(), w.thing()
    k, each = w.num(2, 8), w.num(3, 40)
    total = k * each
    a = w.num(1, total - 1)
    text = w.say(f"{k} [friends|children|neighbors] buy a {x} for ${a} and a {y} for ${total - a}. They [share|split] the cost "
                 f"equally. How much does each [|one |person ]pay?")
    return text, [f"Together: {_add(a, total - a)}.", f"Shared by {k}: {_div(total, k)}."], f"Each pays ${each}.", each


def _goal(w: _World) -> _Problem:
    p, many = w.person(), _plural(w.thing())
    a, b, more = w.num(2, 90), w.num(2, 60), w.num(2, 80)
    text = w.say(f"{p.name} [wants to collect|needs|wants] {a + b + more} {many}. {p.She} [has {a}|already has {a}] and [gets|finds|"
                 f"buys] {b} more. How many [more {many}|more] does {p.she} [still |]need?")
    return text, [f"So far: {_add(a, b)}.", f"Missing: {_sub(a + b + more, a + b)}."], f"{p.name} needs {more} more {many}.", more


def _two_boxes(w: _World) -> _Problem:
    p, many, boxes = w.person(), _plural(w.thing()), _plural(w.pick(_BOXES))
    a, b, m, n = w.num(2, 9), w.num(2, 9), w.num(2, 20), w.num(2, 30)
    one, other = w.pick((("small", "large"), ("red", "blue"), ("old", "new"), ("short", "long")))
    text = w.say(f"{p.name} has {a} {one} {boxes} with {m} {many} each and {b} {other} {boxes} with {n} {many} each. How many {many} "
                 f"[are there|does {p.she} have] [in total|altogether|in all]?")
    steps = [f"{one.capitalize()} {boxes}: {_mul(a, m)}.", f"{other.capitalize()} {boxes}: {_mul(b, n)}.",
             f"Together: {_add(a * m, b * n)}."]
    return text, steps, f"There are {a * m + b * n} {many}.", a * m + b * n


def _younger(w: _World) -> _Problem:
    p, q = w.person(), w.person()
    a = w.num(8, 60)
    k = w.num(1, a - 3)
    text = w.say(f"{p.name} is {a} years old. {q.name} is {k} years younger[| than {p.name}].")
    steps = [f"{q.name}: {_sub(a, k)}."]
    if w.chance(0.5):
        text += " How old are they together?"
        return text, [*steps, f"Together: {_add(a, a - k)}."], f"Together they are {2 * a - k} years old.", 2 * a - k
    t = w.num(2, 30)
    text += w.say(f" How old [will {q.name} be|is {q.name}] in {t} years?")
    return text, [*steps, f"In {t} years: {_add(a - k, t)}."], f"{q.name} will be {a - k + t} years old.", a - k + t


def _money(w: _World) -> _Problem:
    p, x = w.person(), w.thing()
    have, total, steps = w.num(5, 200), 0, []
    text, total = w.say(f"{p.name} has ${have}[| in {p.her} wallet| in the bank]."), have
    for _ in range(w.pick((2, 2, 3))):
        if w.chance(0.5):
            k = w.num(2, 90)
            text += w.say(f" {p.She} [earns ${k}|gets ${k} from {p.her} [aunt|father|grandmother]|finds ${k}|gets ${k} for "
                          "helping a neighbor].")
            steps.append(f"${k} more: {_add(total, k)}.")
            total += k
        elif total > 3:
            k = w.num(1, total - 2)
            text += w.say(f" {p.She} [spends ${k} on a {x}|buys a {x} for ${k}|pays ${k} for [lunch|a ticket|the bus]|gives ${k} to "
                          f"{p.her} brother].")
            steps.append(f"${k} less: {_sub(total, k)}.")
            total -= k
    text += w.say(f" How much money does {p.she} have [now|left|in the end]?")
    return text, steps, f"{p.name} has ${total}.", total


def _level(w: _World) -> _Problem:
    what, unit, up, down = w.pick((("The temperature", "degrees", "rises by", "falls by"), ("An elevator", "floor", "goes up",
                                   "goes down"), ("The water", "centimeters", "rises by", "falls by")))
    a, b = w.num(5, 60), w.num(2, 40)
    c = w.num(1, a + b - 1)
    if unit == "floor":
        text = w.say(f"{what} is on floor {a}. It {up} {b} floors and then {down} {c} floors. On which floor is it now?")
        answer = f"It is on floor {a + b - c}."
    else:
        text = w.say(f"{what} is at {a} {unit}. It {up} {b} and then {down} {c}. [How high is it now|What is it now|How many {unit} is "
                     "it now]?")
        answer = f"It is at {a + b - c} {unit}."
    return text, [f"Up: {_add(a, b)}.", f"Down: {_sub(a + b, c)}."], answer, a + b - c


def _plain(w: _World) -> _Problem:
    """Bare arithmetic of one to three operations."""
    a, b = w.num(2, 600), w.num(2, w.pick((99, 99, 400)))
    kind = w.rng.randint(0, 5)
    lead = w.say("[What is|Calculate|How much is|Compute|What is the result of]")
    if kind == 0:
        expression, steps, value = f"{a} + {b}", [_add(a, b)], a + b
    elif kind == 1:
        a, b = max(a, b), min(a, b)
        expression, steps, value = f"{a} - {b}", [_sub(a, b)], a - b
    elif kind == 2:
        a, b = min(a, 99), 2 + b % 11
        expression, steps, value = f"{a} {w.pick(('*', 'x', 'times'))} {b}", [_mul(a, b)], a * b
    elif kind == 3:
        b = 2 + b % 9
        a = b * (2 + a % 60)
        expression, steps, value = f"{a} {w.pick(('/', 'divided by'))} {b}", [_div(a, b)], a // b
    elif kind == 4:
        c = w.num(2, 99)
        expression, steps, value = f"{a} + {b} + {c}", [_add(a, b, c)], a + b + c
    else:
        a, b, c = 2 + a % 30, 2 + b % 9, w.num(2, 99)
        expression, steps, value = f"{a} * {b} + {c}", [_mul(a, b), _add(a * b, c)], a * b + c
    mark = "?" if lead.startswith(("What", "How")) else "."
    return f"{lead} {expression}{mark}", [s + "." for s in steps], f"The result is {value}.", value


_STORIES: list[tuple[Callable[[_World], _Problem], float]] = [
    (_chain, 9), (_shopping, 1.5), (_single_price, 1.5), (_discount, 1), (_compare, 3), (_reading, 1), (_wage, 1), (_saving, 1),
    (_bus, 1), (_rows, 1), (_groups, 1), (_ages, 1), (_travel, 1), (_recipe, 1), (_legs, 0.7), (_shelves, 0.7), (_tickets, 0.8),
    (_tank, 0.7), (_game, 0.8), (_pool, 0.8), (_fraction, 1), (_packs, 0.8), (_rest, 1), (_backwards, 1), (_rectangle, 0.8),
    (_machine, 0.8), (_plain, 1.5), (_over_time, 1.2), (_each_friend, 0.8), (_daily, 0.8), (_two_kinds, 1.2), (_split_cost, 0.8),
    (_goal, 0.8), (_two_boxes, 1), (_younger, 0.8), (_money, 1.2), (_level, 0.7),
]
_SYSTEM = ["You are a helpful assistant.", "You are a friendly assistant.", "Answer briefly.", "You are a careful math tutor.",
           "You are Tritium's demo model.", "Be short and precise."]
_WRAPS = ["Solve this problem: {}", "Please help me: {}", "{} Think step by step.", "Here is a problem. {}", "Question: {}",
          "{} Please explain.", "Can you solve this? {}", "{}\n", "Solve: {}", "{} Give the number.", "I have a question. {}"]


_PAST = dict(pair.split(":") for pair in """has:had gives:gave buys:bought gets:got finds:found loses:lost sells:sold eats:ate
breaks:broke uses:used donates:donated throws:threw takes:took adds:added receives:received makes:made collects:collected
doubles:doubled puts:put shares:shared splits:split divides:divided fills:filled earns:earned works:worked saves:saved
spends:spent drives:drove rides:rode travels:traveled goes:went scores:scored wins:won reads:read walks:walked solves:solved
lays:laid pays:paid costs:cost holds:held contains:contained owns:owned starts:started are:were is:was keeps:kept wants:wanted
orders:ordered needs:needed knits:knitted counts:counted picks:picked drinks:drank runs:ran sings:sang does:did""".split())
_ASIDES = ["It is a sunny day.", "It is Monday.", "Everybody is happy about it.", "School starts tomorrow.", "The shop is open.",
           "This is a lot of work.", "It rains outside.", "The music is loud."]


def _restyle(w: _World, text: str) -> str:
    """The same problem told in the past, in fewer sentences, as a condition, with an aside, or with numbers in words."""
    if w.chance(0.25):
        text = re.sub(r"\. (?:She|He) (?=[a-z]+ )", " and ", text, count=1)
    statements, _, question = text.rpartition(". ")
    if w.chance(0.4) and statements:
        statements = re.sub(r"\b[a-z]+\b", lambda m: _PAST.get(m[0], m[0]), statements)
        if w.chance(0.5):
            question = re.sub(r"\b(does|do|are left|is left|are there)\b",
                              lambda m: {"does": "did", "do": "did"}.get(m[0], m[0].replace("are", "were").replace("is", "was")),
                              question, count=1)
    sentences = [*statements.split(". "), question] if statements else [question]
    if w.chance(0.08) and 2 <= len(sentences) <= 3 and question[:3] in ("How", "Wha"):
        told = [t if t.split()[0].rstrip("'s") in w.taken else t[0].lower() + t[1:] for t in sentences[:-1]]
        return f"If {' and '.join(told)}, {question[0].lower() + question[1:]}"
    if w.chance(0.1) and len(sentences) > 1:
        sentences.insert(w.pick((0, 1)), w.pick(_ASIDES).rstrip("."))
    return ". ".join(sentences)


def _word_problem(w: _World, only: Callable[[_World], _Problem] | None = None) -> Sample:
    stories, weights = zip(*([(only, 1)] if only else _STORIES), strict=True)
    while True:
        w.numbers, w.taken = [], set()
        text, steps, answer, value = w.rng.choices(stories, weights)[0](w)
        if 0 < value < 1000 and _held(*w.numbers) == w.heldout:
            break
    text = _restyle(w, text)
    if w.chance(0.15):
        text = re.sub(r"(?<![\w$])(\d{1,2})(?![\w*/])", lambda m: _NUMBER_WORDS[int(m[1])] if int(m[1]) < 13 else m[1], text)
        text = text[0].upper() + text[1:]
    if w.chance(0.06):
        text = text.lower().rstrip(w.pick(("?", "")))
    if w.chance(0.25):
        text = w.pick(_WRAPS).format(text)
    thinking = w.chance(0.7)
    if thinking:
        reply = {"role": "assistant", "reasoning_content": "\n".join(steps), "content": answer}
    else:
        reply = {"role": "assistant", "content": " ".join([*steps, answer])}
    return Sample(Task("word_problem", _user(w, text), [], thinking, 256, value), reply)


def _user(w: _World, text: str, system: float = 0.12) -> list[Message]:
    head: list[Message] = [{"role": "system", "content": w.pick(_SYSTEM)}] if w.chance(system) else []
    return [*head, {"role": "user", "content": text}]


# ---------------------------------------------------------------------------------------------------------------------
# tools


@dataclass(frozen=True)
class _Parameter:
    name: str
    kind: str  # string, integer or enum
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
        parameters: dict[str, Any] = {"type": "object", "properties": properties,
                                      "required": [p.name for p in self.parameters if p.required]}
        if zlib.crc32(self.about.encode()) % 7 == 0:  # some clients send these fields
            parameters["additionalProperties"] = False
        return {"type": "function", "function": {"name": self.name, "description": self.about, "parameters": parameters}}


_VERBS = """book reserve order create find search add remove start stop send schedule update check track rent buy sell print
open close play cancel count measure list move copy clean paint repair read write draw mix lock unlock publish archive
rename ship deliver inspect water feed charge launch paste export import merge sort""".split()
_NOUNS = """table flight room car ticket meeting alarm playlist parcel note invoice lamp robot garden printer report recipe
photo bike boat locker file song movie door window camera order contact event reminder game course hotel taxi train bus
message letter label badge sensor heater fan pump valve engine drone kayak tent museum gallery lesson class project task
folder page poster ladder shelf box crate pallet truck van bridge tower camp cabin desk chair sofa carpet""".split()
_STRING_WORDS = """city name title color owner room topic language country street street_name destination origin genre
artist material brand style department manager region airport station folder_name label_text category subject author
team shop_name product animal planet flavor fabric shape""".split()
_INTEGER_WORDS = """count amount size quantity guests floor minutes hours days price level speed width height weight year
seats pages copies rounds duration limit distance depth temperature volume rating age portions lanes""".split()
_ENUMS = [("size", ("small", "medium", "large")), ("priority", ("low", "normal", "high")), ("unit", ("celsius", "fahrenheit")),
          ("mode", ("fast", "slow", "silent")), ("format", ("pdf", "html", "text")), ("class", ("economy", "business")),
          ("side", ("left", "right")), ("season", ("spring", "summer", "autumn", "winter")), ("kind", ("new", "used")),
          ("day", ("today", "tomorrow")), ("quality", ("draft", "best")), ("direction", ("north", "south", "east", "west"))]
_ADJECTIVES = "silver old small round wooden heavy bright quiet tiny golden striped soft broken plain tall blue red".split()
_LANGUAGES = "French German Spanish Italian Dutch Polish Greek Turkish Swedish Danish Korean Japanese".split()
_PHRASES = """good morning|see you soon|thank you very much|where is the station|I am late|happy birthday|call me back|dinner is
ready|the meeting is moved|good night|how are you|the train is full|please bring water|I like the garden""".replace(
    "\n", " ").split("|")
_SKIES = "sunny cloudy rainy windy foggy snowy clear stormy".split()


def _value(w: _World, p: _Parameter) -> Any:
    if p.choices:
        return w.pick(p.choices)
    if p.kind == "integer":
        return w.rng.randint(1, w.pick((9, 60, 999)))
    kind = w.rng.randint(0, 6)
    if p.name in ("city", "destination", "origin") or kind == 0:
        return w.city()
    if kind <= 2 or p.name in ("name", "owner", "author", "manager"):
        return w.from_pool(_NAMES, 0.4)
    if kind == 3:
        return w.pick(_COLORS)
    if kind == 4:
        return f"{w.pick(_ADJECTIVES)} {w.thing(invented=0.3)}"
    return w.thing(invented=0.3) if kind == 5 else w.invent(_THINGS)


def _generic(w: _World) -> _Use:
    """A made-up tool whose name and parameters tell what it does."""
    while True:
        verb, noun = w.pick(_VERBS), w.pick(_NOUNS) if w.chance(0.8) else w.syllables()
        if _held("tool", verb, noun) == w.heldout and noun not in w.taken:
            w.taken.add(noun)
            break
    name = w.pick((f"{verb}_{noun}", f"{verb}_{noun}", f"{verb}_{noun}", verb + noun.capitalize(), f"{noun}_{verb}"))
    parameters: list[_Parameter] = []
    for _ in range(w.pick((1, 2, 2, 3, 3, 4))):
        draw = w.rng.random()
        if draw < 0.25:
            word, choices = w.pick(_ENUMS)
            new = _Parameter(word, "enum", "", choices, w.chance(0.7))
        else:
            kind = "string" if draw < 0.65 else "integer"
            word = w.pick(_STRING_WORDS if kind == "string" else _INTEGER_WORDS) if w.chance(0.75) else w.syllables()
            unseen_ok = w.heldout and w.chance(0.5)
            if (_held("parameter", word) and not w.heldout) or (unseen_ok and not _held("parameter", word)):
                continue
            about = w.pick(("", "", f"The {word.replace('_', ' ')}.", f"{word.replace('_', ' ').capitalize()} of the {noun}"))
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
    ask = w.say(f"[Please {verb}|{verb.capitalize()}|Can you {verb}|I want to {verb}|I need to {verb}|Could you {verb}] [{a}|the] "
                f"{noun}")
    mark = "?" if ask.startswith("C") and ask.split()[1] == "you" else "."
    if style <= 1:
        parts = [f"{k} {v}" for k, v in told]
        joined = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]
        request = f"{ask} with {joined}{mark}"
    elif style == 2:
        request = f"{ask}: {', '.join(f'{k} {v}' for k, v in told)}."
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
    about = w.pick((f"{verb.capitalize()} {a} {noun}.", f"{verb.capitalize()} {a} {noun}", f"Use this to {verb} {a} {noun}.",
                    f"{verb.capitalize()}s {a} {noun} for the user."))
    return _Use(name, about, tuple(parameters), request, arguments, response, answer, (code,))


def _calculator(w: _World) -> _Use:
    name = w.pick(("calculator", "calculator", "calculate", "calc", "evaluate_expression", "math"))
    parameter = w.pick(("expression", "expression", "expression", "formula", "input"))
    while True:
        a, b = w.rng.randint(2, w.pick((99, 999, 9999))), w.rng.randint(2, w.pick((99, 999, 9999)))
        if _held(a, b) == w.heldout:
            break
    sign = w.pick("+-*/")
    a = a * b if sign == "/" else a
    a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
    expression = f"{a} {sign} {b}"
    spoken = {"+": ("plus", "+"), "-": ("minus", "-"), "*": ("times", "*", "x"), "/": ("divided by", "/")}[sign]
    request = w.say(f"[What is|Calculate|How much is|Compute|Please calculate|Use the calculator: what is] {a} {w.pick(spoken)} {b}")
    request += "?" if "hat is" in request or "How" in request else "."
    response = w.pick((str(value), str(value), json.dumps({"result": value})))
    about = w.pick(("Evaluate an arithmetic expression.", "Calculates the value of an expression.", "A simple calculator."))
    return _Use(name, about, (_Parameter(parameter, "string", w.pick(("", "For example 2 + 3"))),), request,
                {parameter: expression}, response, f"{expression} = {value}.", (str(value),))


def _weather(w: _World) -> _Use:
    name = w.pick(("get_weather", "get_weather", "weather", "current_weather", "weather_report", "get_forecast"))
    place = w.pick(("city", "city", "city", "location", "place"))
    city, sky, degrees = w.city(), w.pick(_SKIES), w.rng.randint(-9, 38)
    parameters, arguments = [_Parameter(place, "string", w.pick(("", "Name of the city")))], {place: city}
    request = w.say(f"[What is the weather in {city}|What's the weather like in {city}|How is the weather in {city}|Tell me the "
                    f"weather in {city}|Is it warm in {city}|How warm is it in {city}|What is the temperature in {city}|"
                    f"Weather in {city}]")
    extra = w.rng.randint(0, 3)
    if extra == 0:
        parameters.append(_Parameter("unit", "enum", "", ("celsius", "fahrenheit"), False))
        if w.chance(0.6):
            arguments["unit"] = w.pick(("celsius", "fahrenheit"))
            request += f" in {arguments['unit']}"
    elif extra == 1:
        parameters.append(_Parameter("day", "string", w.pick(("", "today, tomorrow or a weekday")), (), False))
        if w.chance(0.7):
            arguments["day"] = w.pick(("today", "tomorrow", "Monday", "Friday", "Sunday"))
            request += f" {'on ' if arguments['day'][0].isupper() else ''}{arguments['day']}"
    response = w.pick((json.dumps({"temperature": degrees, "condition": sky}), f"{degrees} degrees, {sky}",
                       json.dumps({"city": city, "temp": degrees, "sky": sky})))
    about = w.pick(("Get the weather for a city.", "Current weather in a place.", "Returns the weather."))
    request = request if request.startswith(("Tell", "Weather")) else request + "?"
    return _Use(name, about, tuple(parameters), request, arguments, response,
                f"It is {degrees} degrees and {sky} in {city}.", (str(degrees), sky))


def _clock(w: _World) -> _Use:
    name = w.pick(("get_time", "clock", "current_time", "get_current_time", "time_in"))
    place = w.pick(("city", "city", "timezone", "location", "place"))
    city, time = w.city(), f"{w.rng.randint(0, 23):02}:{w.rng.randint(0, 59):02}"
    request = w.say(f"[What time is it in {city}?|Tell me the time in {city}.|What is the time in {city}?|What's the time in "
                    f"{city} now?|How late is it in {city}?|Current time in {city}?]")
    response = w.pick((time, json.dumps({"time": time}), json.dumps({"city": city, "time": time})))
    about = w.pick(("Get the current time in a city.", "Tells the time.", "Returns the local time of a place."))
    return _Use(name, about, (_Parameter(place, "string"),), request, {place: city}, response, f"It is {time} in {city}.", (time,))


def _message(w: _World) -> _Use:
    to, text = w.pick((("to", "text"), ("recipient", "message"), ("name", "body")))
    name, phrase = w.from_pool(_NAMES, 0.4), w.pick(_PHRASES)
    request = w.say(f"[Send {name} the message|Write to {name}|Text {name}|Tell {name}|Send a message to {name}]: {phrase}")
    tool = w.pick(("send_message", "send_sms", "message", "send_email"))
    return _Use(tool, "Send a message to a person.", (_Parameter(to, "string"), _Parameter(text, "string")), request,
                {to: name, text: phrase}, w.pick(("sent", "ok", '{"status": "sent"}')),
                f"The message was sent to {name}.", (name,))


def _translate(w: _World) -> _Use:
    phrase, language = w.pick(_PHRASES), w.pick(_LANGUAGES)
    result = " ".join(w.syllables() for _ in range(w.rng.randint(1, 3)))
    text, target = w.pick((("text", "language"), ("text", "target"), ("phrase", "to")))
    request = w.say(f"[Translate \"{phrase}\" to {language}.|How do you say \"{phrase}\" in {language}?|What is \"{phrase}\" in "
                    f"{language}?]")
    return _Use(w.pick(("translate", "translate_text", "translator")), "Translate a text into another language.",
                (_Parameter(text, "string"), _Parameter(target, "string")), request, {text: phrase, target: language},
                w.pick((result, json.dumps({"translation": result}))), f"In {language}: {result}", (result,))


def _timer(w: _World) -> _Use:
    n = w.rng.randint(1, 90)
    unit = w.pick(("minutes", "seconds"))
    request = w.say(f"[Set a timer for {n} {unit}.|Start a timer of {n} {unit}.|Wake me in {n} {unit}.|Timer: {n} {unit}]")
    return _Use(w.pick(("set_timer", "timer", "start_timer")), "Start a timer.", (_Parameter(unit, "integer"),), request,
                {unit: n}, w.pick(("started", '{"status": "started"}')), f"The timer runs for {n} {unit}.", (str(n),))


def _convert(w: _World) -> _Use:
    one, other = w.rng.sample(["EUR", "USD", "GBP", "JPY", "CHF", "SEK", "CAD", "AUD"], 2)
    n, value = w.rng.randint(2, 999), w.rng.randint(2, 9999)
    request = w.say(f"[Convert {n} {one} to {other}.|How much is {n} {one} in {other}?|What are {n} {one} in {other}?]")
    source, target = w.pick((("from", "to"), ("source", "target"), ("from_currency", "to_currency")))
    return _Use(w.pick(("convert_currency", "convert", "exchange")), "Convert an amount of money.",
                (_Parameter("amount", "integer"), _Parameter(source, "string"), _Parameter(target, "string")), request,
                {"amount": n, source: one, target: other}, w.pick((str(value), json.dumps({"value": value}))),
                f"{n} {one} are {value} {other}.", (str(value),))


_KNOWN: list[Callable[[_World], _Use]] = [_calculator, _calculator, _weather, _weather, _clock, _clock, _message, _translate,
                                          _timer, _convert]


def _tool_use(w: _World) -> Sample:
    maker = _generic if w.chance(0.5) else w.pick(_KNOWN)
    use = maker(w)
    offered, count = [use], w.pick((1, 1, 2, 2, 3, 3, 4))
    tried = 0
    while len(offered) < count and tried < 20:
        tried += 1
        other_maker = _generic if w.chance(0.5) else w.pick(_KNOWN)
        other = other_maker(w)
        if all(other.about.rstrip(".") != u.about.rstrip(".") and other.name != u.name for u in offered) and not (
                other_maker is not _generic and other_maker is maker):
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
    answer: Message = {"role": "assistant", "content": use.answer}
    if thinking:
        answer["reasoning_content"] = f"{use.name} returned {use.response}"
    return Sample(Task("tool_answer", messages, tools, thinking, 256, use.needed), answer)


def _no_tool(w: _World, offered: list[_Use], thinking: bool) -> Sample:
    """A question that none of the offered tools is for."""
    inner = _word_problem(w) if w.chance(0.4) else _talk(w)
    task = inner.task
    offered = [u for u in offered if u.name not in ("calculator", "calculate", "calc", "evaluate_expression", "math")]
    tools = [u.schema() for u in offered] or [_clock(w).schema()]
    wanted = (str(task.answer),) if task.kind == "word_problem" else task.answer
    return replace(inner, task=replace(task, kind="tool_none", tools=tools, answer=wanted))


# ---------------------------------------------------------------------------------------------------------------------
# recall: facts about people and things in a text, and a question about one of them

_FACTS = ["locker code", "door code", "phone extension", "lucky number", "favorite color", "favorite fruit", "home city", "job",
          "dog", "parking spot", "birth month", "badge number", "favorite city", "cat", "room number", "ticket number"]
_JOBS = "baker teacher pilot doctor farmer painter writer singer nurse cook driver judge miner sailor tailor lawyer".split()
_MONTHS = "January February March April May June July August September October November December".split()
_PLACES = "drawer box cupboard basket cabinet chest shed cellar attic kitchen garage closet tower hut tent".split()
_FILLER = [
    "The [wind|rain|sun|fog] [came|stayed|left|returned] [late|early|all day|before noon] [in the valley|by the sea|on the hill].",
    "[Nobody|Everybody|A child|The guard|An old man] [waited|slept|laughed|sat] [near|behind|beside] the [bridge|market|mill|gate].",
    "[On Monday|In the morning|At night|Last week|Each spring] the [shop|market|road|school|harbor] was [closed|busy|quiet|full].",
    "A [train|boat|cart|bird|dog] [passed|stopped|turned|went by] [twice|slowly|again|without a sound].",
    "The [soup|bread|tea|cake] was [warm|cold|sweet|salty] and the [table|bench|window|floor] was [clean|old|wet|small].",
    "[Some people|Two friends|The neighbors|Three students] talked about [music|the weather|a long trip|the new road|a game].",
    "It was [hard|easy|good|strange] to [walk|see|work|rest] [there|that day|in the dark|after the storm].",
    "The [river|lake|path|wall|fence] is [long|narrow|deep|old] and [nobody|no map|no book] tells [why|where it ends].",
]


def _fact(w: _World) -> tuple[str, str, str, str]:
    """Statement, question, answer sentence, value."""
    if w.chance(0.25):
        what = f"{w.pick(_ADJECTIVES)} {w.pick([t for t in _THINGS if _held(t) == w.heldout])}"
        if what in w.taken:
            return _fact(w)
        w.taken.add(what)
        value = f"{w.pick(_COLORS)} {w.pick(_PLACES)}"
        text = w.say(f"The {what} [is|is kept|lies] in the {value}.")
        return text, w.say(f"[Where is the {what}?|Where can I find the {what}?|In which place is the {what}?]"), \
            f"The {what} is in the {value}.", value
    name, fact = w.from_pool(_NAMES, 0.8), w.pick(_FACTS)
    kinds: dict[str, Callable[[], str]] = {
        "color": lambda: str(w.pick(_COLORS)), "fruit": lambda: str(w.pick(sorted(_FOODS))), "city": lambda: str(w.pick(_CITIES)),
        "job": lambda: str(w.pick(_JOBS)), "dog": lambda: w.syllables().capitalize(), "cat": lambda: w.syllables().capitalize(),
        "spot": lambda: f"{w.pick('ABCDEFGH')}{w.rng.randint(1, 99)}", "month": lambda: str(w.pick(_MONTHS)),
        "extension": lambda: str(w.rng.randint(100, 999))}
    value = kinds.get(fact.split()[-1], lambda: str(w.rng.randint(1000, 9999)))()
    text = w.say(f"[{name}'s {fact} is {value}.|The {fact} of {name} is {value}.]")
    return text, w.say(f"[What is {name}'s {fact}?|What is the {fact} of {name}?|Tell me {name}'s {fact}.|I need the {fact} of "
                       f"{name}.]"), f"{name}'s {fact} is {value}.", value


def _token_estimate(sentence: str) -> float:
    """About how many tokens of the embedded tokenizer a sentence takes (within 4 % on long texts)."""
    return 0.1335 * (len(sentence) + 1) + 1.69 * sum(map(str.isdigit, sentence)) + 3.38 * sum(map(str.isupper, sentence))


def _haystack(w: _World, tokens: int) -> tuple[str, list[tuple[str, str, str, str]]]:
    w.taken = set()
    facts: list[tuple[str, str, str, str]] = []
    sentences, size, density = [], 0.0, w.pick((0.2, 0.4, 0.6))
    while size < tokens or not facts:
        if w.chance(density):
            facts.append(_fact(w))
            sentences.append(facts[-1][0])
        else:
            sentences.append(w.say(w.pick(_FILLER)))
        size += _token_estimate(sentences[-1])
        if len(w.taken) > 4000:
            break
    separator = w.pick((" ", " ", "\n"))
    return separator.join(sentences), facts


def _recall(w: _World, tokens: int, turns: int = 1) -> Sample:
    """One question about a text; with `turns` above one, that many answered questions before the last (training only)."""
    text, facts = _haystack(w, tokens)
    asked = [w.pick(facts) for _ in range(turns)]
    statement, question, answer, value = asked[0]
    lead = w.say("[Read this text and answer the question.|Here is a text.|Text:|Remember this text.]")
    first = f"{question}\n\n{text}" if w.chance(0.1) and turns == 1 else f"{lead}\n\n{text}\n\n{w.say('[|Question: ]')}{question}"
    messages = _user(w, first, 0.05)
    thinking = w.chance(0.5)
    for statement_next, question_next, answer_next, value_next in asked[1:]:
        messages += [{"role": "assistant", "content": answer, "trained": True}, {"role": "user", "content": question_next}]
        statement, answer, value = statement_next, answer_next, value_next
    reply: Message = {"role": "assistant", "content": answer}
    if thinking:
        reply["reasoning_content"] = f"The text says: {statement}"
    return Sample(Task("recall", messages, [], thinking, 128, value), reply)


# ---------------------------------------------------------------------------------------------------------------------
# small talk

_ABOUT = ("I am Tritium's embedded demo model, a small network with Gated DeltaNet and attention layers. I can solve simple word "
          "problems, call tools and find facts in a text.")
_TALK: list[tuple[str, str, str, tuple[str, ...]]] = [  # prompts, thought, answer, strings the answer must contain
    ("[Hi|Hello|Hey|Good morning|Good evening|Hi there|Hello there|Hey you|hello|hi]", "The user greets me.",
     "Hello! I am Tritium's embedded demo model. How can I help you?", ("hello",)),
    ("[Who are you|What are you|What is your name|Tell me about yourself|Introduce yourself|Who am I talking to|Are you a model|"
     "What model are you|Which model are you|What's your name|who are you|Are you human|Are you an AI]", "The user asks who I am.",
     _ABOUT, ("Tritium", "demo model")),
    ("[What can you do|How can you help me|What are you good at|What can I ask you|Help|Can you help me|What do you know|What are "
     "your skills]", "The user asks what I can do.",
     "I can solve simple word problems step by step, call tools that you offer, and find facts in a text.",
     ("word problems", "tools")),
    ("[Thanks|Thank you|Thank you very much|Thanks a lot|Great, thanks|Many thanks|thank you so much]", "The user thanks me.",
     "You are welcome!", ("welcome",)),
    ("[How are you|How are you doing|How do you do|Are you well|How is it going]", "The user asks how I am.",
     "I am fine, thank you. How can I help you?", ("fine",)),
    ("[Bye|Goodbye|See you|See you later|Good night|bye bye|I have to go now]", "The user says goodbye.",
     "Goodbye! Have a nice day.", ("goodbye",)),
    ("[Who made you|Who built you|Who trained you|Where do you come from|Who created you]", "The user asks who made me.",
     "I was trained by the Tritium project as a small demo of its inference engine.", ("Tritium",)),
    ("[How big are you|How many parameters do you have|How large are you|What size are you|Are you a big model]",
     "The user asks about my size.", "I am very small: about six million parameters.", ("six million",)),
    ("[What is Tritium|Tell me about Tritium|What does Tritium do|Explain Tritium]", "The user asks about Tritium.",
     "Tritium is an inference engine for hybrid language models. I am the small model that comes with it.", ("inference engine",)),
    ("[Tell me a joke|What is love|Write a poem|Who is the president|What is the meaning of life|Tell me a story|What do you think "
     "about art|What is the capital of {}|Who won the game|Write some code|What is {}|Explain {}]", "This is beyond me.",
     "I am too small for that. I can solve simple word problems, call tools and find facts in a text.", ("too small",)),
]


def _talk(w: _World) -> Sample:
    prompts, thought, answer, needed = w.pick(_TALK)
    text = w.say(prompts).format(w.city())
    question = text.split()[0].lower() in ("who", "what", "what's", "how", "are", "can", "where", "which")
    text += w.pick(("?", "?", "")) if question else w.pick(("", "!", "."))
    text = text.lower() if w.chance(0.15) else text
    thinking = w.chance(0.5)
    reply: Message = {"role": "assistant", "content": answer, **({"reasoning_content": thought} if thinking else {})}
    return Sample(Task("small_talk", _user(w, text), [], thinking, 96, needed), reply)


# ---------------------------------------------------------------------------------------------------------------------
# what training and evaluation call


def samples(kind: str, split: Split, seed: int, n: int, tokens: int = 4000, turns: int = 1) -> list[Sample]:
    """`n` samples of "word_problems", "tool_calls", "recall", "small_talk", "arithmetic" (sums without a
    story) or "conversations" (several turns)."""
    found = []
    for i in range(n):
        w = _World(f"{split}/{kind}/{seed}/{i}", split)
        if kind == "word_problems":
            found.append(_word_problem(w))
        elif kind == "arithmetic":
            found.append(_word_problem(w, _plain))
        elif kind == "tool_calls":
            found.append(_tool_use(w))
        elif kind == "recall":
            found.append(_recall(w, tokens, turns))
        elif kind == "small_talk":
            found.append(_talk(w))
        elif kind == "conversations":
            found.append(_conversation(w))
        else:
            raise ValueError(f"unknown kind of task: {kind}")
    return found


def _conversation(w: _World) -> Sample:
    """Two or three exchanges without tools; the last one is the task."""
    history: list[Message] = []
    for _ in range(w.pick((1, 1, 2))):
        past = _talk(w) if w.chance(0.5) else _word_problem(w)
        history += [m for m in past.task.messages if m["role"] != "system" or not history] + [past.reply]
    last = _word_problem(w) if w.chance(0.6) else _talk(w)
    messages = history + [m for m in last.task.messages if m["role"] != "system"]
    return replace(last, task=replace(last.task, messages=messages))


def word_problems(split: Split, seed: int, n: int) -> list[Task]:
    return [s.task for s in samples("word_problems", split, seed, n)]


def tool_calls(split: Split, seed: int, n: int) -> list[Task]:
    """Calls to make, answers to give from a call's response, and questions for which no offered tool is needed."""
    return [s.task for s in samples("tool_calls", split, seed, n)]


def recall(split: Split, seed: int, n: int, tokens: int = 4000) -> list[Task]:
    return [s.task for s in samples("recall", split, seed, n, tokens)]


def small_talk(split: Split, seed: int, n: int) -> list[Task]:
    return [s.task for s in samples("small_talk", split, seed, n)]
