"""`tritium eval gsm8k`: school problems with a number as their answer, few-shot, scored by lm-eval's two extractions.

    strict    the first number behind "#### ", which is how the examples end
    flexible  the last number anywhere: a run of two or more digits, dollar signs, dots and commas, or a single digit

Both are compared with the reference as text, after commas, dollar signs and one dot at the end are taken away; an
answer without such a number is wrong. The standard error is that of a mean of zeros and ones, with n - 1.

Answers go to a JSONL file as they come. Its first line says what they are answers to; a run that finds its own line
there goes on behind what was answered, and one that finds another's refuses.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import math
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from tritium.api import Completion, Session
from tritium.config import EngineConfig
from tritium.core import ConfigError, TritiumError

STOPS = ("Question:", "</s>", "<|im_end|>")
TRIES = 6
"""Of a request that a server turns away (429, 5xx) or does not answer; the pauses between them double from 1 s."""
_STRICT = re.compile(r"#### (-?[\d.,]+)")
_FLEXIBLE = re.compile(r"-?[$\d.,]{2,}|-?\d+")

Ask = Callable[[list[dict[str, str]]], Awaitable[str]]
"""From turns that end with the user's to the model's text."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What decides the answers. The files are known by their content."""

    model: str
    engine: str
    """What `engine_of` says; of a server, that it is one."""
    data: str
    fewshot: str
    shots: int
    chat: bool
    thinking: bool | None
    max_tokens: int


def engine_of(config: EngineConfig) -> str:
    """The fields that decide answers, as far as they are not their defaults."""
    names = ("revision", "tokenizer", "dtype", "load_format", "quantize", "keep_bf16", "quantize_also", "max_model_len",
             "benchmark_force_acceptance")  # fmt: skip
    plain = EngineConfig()
    given = {name: getattr(config, name) for name in names}
    return " ".join(f"{name}={value}" for name, value in given.items() if value != getattr(plain, name))


def strict(text: str) -> str | None:
    found = _STRICT.search(text)
    return found and _plain(found[1])


def flexible(text: str) -> str | None:
    found = _FLEXIBLE.findall(text)
    return _plain(found[-1]) if found else None


def _plain(number: str) -> str:
    return re.sub(r"[,$]", "", number).removesuffix(".")


def read(path: Path) -> list[dict[str, str]]:
    """Problems with `question` and `answer`, a line each. Raises `ConfigError` for anything else."""
    problems: list[dict[str, str]] = []
    for n, line in enumerate(path.read_bytes().splitlines(), 1):  # as text, separators inside a string would end lines
        if not line.strip():
            continue
        try:
            problem = json.loads(line)
            if not problem["question"] or strict(problem["answer"]) is None:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path}, line {n}: not a problem of GSM8K",
                              hint='{"question": "...", "answer": "... #### 18"}') from None
        problems.append(problem)
    return problems


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def turns(examples: Sequence[dict[str, str]], question: str) -> list[dict[str, str]]:
    """The examples and the question as a conversation."""
    told = []
    for example in examples:
        told += [{"role": "user", "content": f"Question: {example['question']}\nAnswer:"},
                 {"role": "assistant", "content": example["answer"]}]
    return [*told, {"role": "user", "content": f"Question: {question}\nAnswer:"}]


def as_text(told: Sequence[dict[str, str]]) -> str:
    """The same as one text to continue."""
    pieces = [turn["content"] + ("\n\n" if turn["role"] == "assistant" else " ") for turn in told]
    return "".join(pieces).removesuffix(" ")


class Answers:
    """The file of answers: text by number of the problem."""

    def __init__(self, path: Path, settings: Settings) -> None:
        """Goes on with the file if it is of these settings. Raises `ConfigError` if it is not."""
        self.texts: dict[int, str] = {}
        head = json.dumps(dataclasses.asdict(settings))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._file.seek(0)
        stored = self._file.read()
        # The last line may have been cut when a run was killed, were it the first.
        whole = stored[: stored.rfind(b"\n") + 1]
        first, *lines = stored.decode(errors="replace").split("\n")
        if first != head and (whole or not head.startswith(first)):
            self._file.close()
            raise ConfigError(f"{path} has answers to something else: {_difference(first, settings)}",
                              hint="name another file with --out, or remove it")
        self.texts = {entry["i"]: entry["text"] for entry in map(json.loads, lines[:-1])}
        self._file.truncate(len(whole))
        if not whole:
            self._file.write(f"{head}\n".encode())

    def add(self, i: int, text: str) -> None:
        self.texts[i] = text
        self._file.write(f"{json.dumps({'i': i, 'text': text})}\n".encode())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _difference(line: str, settings: Settings) -> str:
    try:
        other = json.loads(line)
        return ", ".join(f"{name} {other[name]!r}, not {value!r}"
                         for name, value in dataclasses.asdict(settings).items() if other[name] != value)
    except (ValueError, KeyError, TypeError):
        return "its first line is not of such a file"


async def answer_all(ask: Ask, told: Sequence[list[dict[str, str]]], answers: Answers, *, concurrency: int,
                     progress: bool) -> None:
    """Asks what is not answered yet, `concurrency` at a time. The first failure ends it; what came before is kept."""
    todo = iter([i for i in range(len(told)) if i not in answers.texts])
    done = sum(i in answers.texts for i in range(len(told)))
    with tqdm(total=len(told), initial=done, desc="gsm8k", file=sys.stderr, disable=not progress) as bar:

        async def work() -> None:
            for i in todo:
                answers.add(i, await ask(told[i]))
                bar.update()

        workers = [asyncio.ensure_future(work()) for _ in range(concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


def over_http(client: httpx.AsyncClient, settings: Settings) -> Ask:
    """Asks a server that speaks OpenAI's API; `client` has its address. Raises `TritiumError` when it cannot."""
    body: dict[str, Any] = {"model": settings.model, "temperature": 0, "max_tokens": settings.max_tokens}
    if settings.thinking is not None:
        body["chat_template_kwargs"] = {"enable_thinking": settings.thinking}

    async def ask(told: list[dict[str, str]]) -> str:
        if settings.chat:
            choice = await post(client, "chat/completions", body | {"messages": told})
            return choice["message"]["content"] or ""
        choice = await post(client, "completions", body | {"prompt": as_text(told), "stop": STOPS})
        return str(choice["text"])

    return ask


async def post(client: httpx.AsyncClient, path: str, body: dict[str, Any], pause: float = 1.0) -> dict[str, Any]:
    """The first choice of the answer. A server that is busy is asked again, after as long as it asks for."""
    for left in reversed(range(TRIES)):
        said, wait = "", pause
        try:
            response = await client.post(path, json=body)
            if response.is_success:
                return dict(response.json()["choices"][0])
            said = f"{response.status_code} {response.text[:300]}"
            if response.status_code != 429 and response.status_code < 500:
                break
            asked = response.headers.get("retry-after", "")
            wait = max(pause, float(asked)) if asked.isdecimal() else pause
        except httpx.TransportError as error:
            said = f"{type(error).__name__} {error}"
        except (ValueError, LookupError, TypeError):
            said = "not an answer of this API"
            break
        if left:
            await asyncio.sleep(wait)
            pause *= 2
    raise TritiumError(f"{client.base_url}{path}: {said}", hint="what was answered is kept: the same command goes on")


def in_process(session: Session, settings: Settings) -> Ask:
    """Asks the engine of this process."""
    template = None if settings.thinking is None else {"enable_thinking": settings.thinking}
    sampling = session.door.default_sampling(temperature=0.0, max_tokens=settings.max_tokens)

    async def ask(told: list[dict[str, str]]) -> str:
        if settings.chat:
            events = session.chat(told, sampling, template_kwargs=template)
        else:
            events = session.generate(as_text(told), dataclasses.replace(sampling, stop=STOPS))
        completion = Completion(0, [])
        async for event in events:
            completion.absorb(event)
        return completion.text

    return ask


def score(problems: Sequence[dict[str, str]], texts: Sequence[str]) -> dict[str, Any]:
    """Accuracy by both extractions, with standard errors (None for a single problem)."""
    wanted = [strict(problem["answer"]) for problem in problems]
    figures: dict[str, Any] = {"count": len(problems)}
    for name, extract in (("strict", strict), ("flexible", flexible)):
        n, right = len(wanted), sum(extract(text) == want for text, want in zip(texts, wanted))
        share = right / n
        figures[name] = share
        figures[f"{name}_stderr"] = math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None
    return figures


async def run(settings: Settings, problems: Sequence[dict[str, str]], examples: Sequence[dict[str, str]], out: Path, *,
              concurrency: int, config: EngineConfig | None = None, url: str | None = None, api_key: str | None = None,
              progress: bool = True) -> dict[str, Any]:
    """Answers what `out` does not have yet, by the server at `url` or an engine of `config`, and scores all."""
    told = [turns(examples, problem["question"]) for problem in problems]
    answers = Answers(out, settings)
    async with AsyncExitStack() as stack:
        stack.callback(answers.close)
        if any(i not in answers.texts for i in range(len(told))):
            if url is not None:
                ask = over_http(await stack.enter_async_context(client(url, api_key)), settings)
            else:
                session = Session.load(config or EngineConfig())
                stack.push_async_callback(session.close)
                ask = in_process(session, settings)
            await answer_all(ask, told, answers, concurrency=concurrency, progress=progress)
    return dataclasses.asdict(settings) | score(problems, [answers.texts[i] for i in range(len(problems))])


def client(url: str, api_key: str | None) -> httpx.AsyncClient:
    """For a server's address, with /v1 or without."""
    base = url.rstrip("/").removesuffix("/v1") + "/v1/"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.AsyncClient(base_url=base, headers=headers, timeout=httpx.Timeout(600, connect=10))


def table(figures: dict[str, Any]) -> str:
    """For a terminal."""
    lines = [f"{figures['model']}: {figures['count']:,} problems, {figures['shots']} examples before each"]
    for name in ("strict", "flexible"):
        error = figures[f"{name}_stderr"]
        lines.append(f"  {name:<10}{figures[name]:8.2%}" + ("" if error is None else f"  ± {error:.2%}"))
    return "\n".join(lines)
