"""`tritium eval`: measures what a model can do."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import click

from tritium.cli import options
from tritium.core import ConfigError

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group("eval")
def evaluate() -> None:
    """Measure what a model can do."""


@evaluate.command()
@click.option("--count", type=click.IntRange(min=1), default=100, show_default=True, help="Problems of each kind.")
@click.option("--json", "as_json", is_flag=True, help="End with the figures as one line of JSON.")
@click.option("--schemes", default=None, help="Compare schemes of weights, as none,int8,fp8,int4,mxfp4; behind one "
              "+GLOB for tensors that it takes too, -GLOB for those that it leaves.")
@options.engine_flags
def tiny(count: int, as_json: bool, schemes: str | None, **flags: Any) -> None:
    """Held-out word problems, tool calls and recall, and how often the MTP head's guess was right.

    The problems are those that the embedded models were trained for, with other numbers and names.
    """
    config = options.engine_config(flags)

    from tritium.eval import tiny as evaluation

    if schemes:
        from tritium.bench.ceilings import step_bytes
        from tritium.models.checkpoint import find_checkpoint

        if config.quantize:
            raise ConfigError("--schemes and --quantize both say what weights become", hint="--schemes alone")
        stored = {one: find_checkpoint(evaluation.variant(config, one)).config for one in schemes.split(",")}
        click.echo(f"{config.model}: {count} held-out problems of each kind, greedy\n{evaluation.scheme_head()}")
        rows = []
        for figures in evaluation.run_schemes(config, list(stored), count=count):
            rows.append(figures | {"bytes_per_token": step_bytes(stored[figures["scheme"]], 1, 512)})
            click.echo(evaluation.scheme_row(rows[-1]))
        if as_json:
            click.echo(json.dumps({"model": config.model, "count": count, "schemes": rows}))
        return
    figures = evaluation.run(config, count=count)
    click.echo(evaluation.table(figures))
    if as_json:
        click.echo(json.dumps(figures))


@evaluate.command()
@click.option("--data", type=_FILE, required=True, help="Problems, a line of JSON each (question, answer).")
@click.option("--fewshot", type=_FILE, default=None, help="Where the examples come from: its first ones.")
@click.option("--shots", type=click.IntRange(min=0), default=5, show_default=True, help="Examples before a question.")
@click.option("--limit", type=click.IntRange(min=1), default=None, help="Only the first problems.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("gsm8k-answers.jsonl"),
              show_default=True, help="Answers are kept here as they come; a run that was cut goes on with them.")
@click.option("--url", default=None, help="Ask the server there (OpenAI's API) instead of an engine in this process.")
@click.option("--api-key", envvar="OPENAI_API_KEY", default=None, help="The server's key, or OPENAI_API_KEY.")
@click.option("--concurrency", type=click.IntRange(min=1), default=16, show_default=True, help="Questions at a time.")
@click.option("--chat", is_flag=True, help="Examples and question as a conversation, not as text to complete.")
@options.thinking_flag
@click.option("--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Longest answer.")
@options.engine_flags
def gsm8k(data: Path, fewshot: Path | None, shots: int, limit: int | None, out: Path, url: str | None,
          api_key: str | None, concurrency: int, chat: bool, max_tokens: int, **flags: Any) -> None:
    """GSM8K, few-shot, with lm-eval's strict and flexible extraction.

    Works in this process, or with --url against a server; --model then names one of its models. The table goes to
    stderr, the figures to stdout as one line of JSON.
    """
    thinking = options.template_kwargs(flags).get("enable_thinking")
    named = flags["model_flag"]
    config = options.engine_config(flags)
    if shots and fewshot is None:
        raise ConfigError("examples need a file to come from", hint="--fewshot FILE, or --shots 0")
    if thinking is not None and not chat:
        raise ConfigError("--thinking and --no-thinking are for conversations", hint="--chat")
    if url is not None and named is None:
        raise ConfigError("--url needs the name of the server's model", hint="--model NAME")
    if url is not None and not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url} is not an address", hint=f"http://{url}")

    from tritium.eval import gsm8k as evaluation

    if url is not None and (deciding := evaluation.engine_of(config)):
        raise ConfigError(f"--url asks a server, which does not take {deciding}", hint="say it to tritium serve")
    problems, examples = evaluation.read(data)[:limit], evaluation.read(fewshot)[:shots] if fewshot and shots else []
    if len(examples) < shots or not problems:
        raise ConfigError(f"too few problems: {len(problems)} to solve, {len(examples)} of {shots} as examples")
    settings = evaluation.Settings(
        model=config.model, engine="server" if url else evaluation.engine_of(config), data=evaluation.digest(data),
        fewshot=evaluation.digest(fewshot) if fewshot and shots else "", shots=shots, chat=chat, thinking=thinking,
        max_tokens=max_tokens,
    )  # fmt: skip
    figures = asyncio.run(evaluation.run(
        settings, problems, examples, out, concurrency=concurrency, config=config, url=url, api_key=api_key,
        progress=config.show_progress,
    ))  # fmt: skip
    click.echo(evaluation.table(figures), err=True)
    click.echo(json.dumps(figures))


@evaluate.command("kl")
@click.option("--text", "path", type=_FILE, required=True, help="File to read, UTF-8.")
@click.option("--window", type=click.IntRange(min=2), default=2048, show_default=True,
              help="Tokens that are read together, from a beginning of their own.")
@click.option("--limit", type=click.IntRange(min=1), default=None, help="Windows, at most.")
@options.engine_flags
def kl_command(path: Path, window: int, limit: int | None, **flags: Any) -> None:
    """How far --quantize takes a model from itself: KL divergence by token, on your text.

    Both models are loaded side by side. The table goes to stderr, the figures to stdout as one line of JSON.
    """
    config = options.engine_config(flags)
    if config.quantize is None:
        raise ConfigError("nothing to compare without --quantize", hint="--quantize int8, fp8, int4 or mxfp4")

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from None

    from tritium.eval import kl

    figures = kl.run(config, text, window=window, limit=limit)
    click.echo(kl.table(figures), err=True)
    click.echo(json.dumps(figures))
