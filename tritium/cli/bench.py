"""`tritium bench`: how fast. A table on stderr as it is measured, ending in one line of JSON on stdout."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tritium.cli import options
from tritium.config import EngineConfig
from tritium.core import ConfigError

if TYPE_CHECKING:
    from tritium.bench.ceilings import Ceilings


@click.group("bench")
def bench() -> None:
    """Measure how fast a model is served."""


@bench.command()
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Pairs of runs in each cell.")
@options.engine_flags
def speculation(rounds: int, **flags: Any) -> None:
    """Decoding with drafts (--speculate) against decoding without, in cells of rows and context."""
    config = options.engine_config(flags)

    from tritium.bench import speculation as benchmark

    _report("speculation", config, benchmark.run(config, _turns, rounds=rounds),
            total=len(benchmark.ROWS) * len(benchmark.CONTEXTS))


def _turns(seed: int, count: int = 60) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Questions and their answers."""
    from tritium.eval import tasks

    samples = tasks.samples("word_problems", "heldout", 1000 + seed, count)
    return [(sample.task.messages[-1], {"role": "assistant", "content": sample.reply["content"]})
            for sample in samples]


@bench.command()
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Pairs of runs of the price.")
@options.engine_flags
def cache(rounds: int, **flags: Any) -> None:
    """What the prefix cache saves requests that share a beginning, and what it costs those that do not."""
    config = options.engine_config(flags)

    from tritium.bench import cache as benchmark

    _report("cache", config, benchmark.run(config, _turns(0, 31), rounds=rounds), total=6)


def _numbers(text: str) -> tuple[int, ...]:
    """Whole numbers above 0 with commas between."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise click.BadParameter(f"{text!r} is not a list of whole numbers above 0")
    return tuple(map(int, parts))


_list_option = functools.partial(click.option, type=_numbers, metavar="N,N,...", show_default=True)
_plot = click.option("--plot", type=click.Path(dir_okay=False), help="PNG to draw the result into.")
_rounds = click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True,
                       help="Measurements of each cell, of which the middle counts.")


@bench.command()
@_list_option("--rows", default="1,8", help="Tokens of a decode step.")
@_list_option("--contexts", default="512,65536", help="For attention.")
@click.option("--op", "names", multiple=True, help="Only this op; may be repeated.")
@_plot
@options.engine_flags
def ops(rows: tuple[int, ...], contexts: tuple[int, ...], names: tuple[str, ...], plot: str | None,
        **flags: Any) -> None:
    """Each op at the model's sizes against its floor."""
    config = options.engine_config(flags)

    from tritium.bench import ops as benchmark
    from tritium.bench.ceilings import measure
    from tritium.models.checkpoint import find_checkpoint
    from tritium.ops.spec import all_ops

    known = {op.spec.name: op for op in all_ops()}
    if unknown := sorted(set(names) - set(known)):
        raise click.BadParameter(f"{unknown[0]} is not one of {', '.join(known)}", param_hint="--op")
    model, ceilings = find_checkpoint(config, weights=False).config, measure(config.device)
    found = [known[name] for name in names or known]
    cells = benchmark.run(found, benchmark.sizes(model, rows, contexts), config.device, ceilings)
    _report("ops", config, cells, ceilings, plot)


@bench.command()
@_list_option("--rows", default="1,2,4,8,16,32", help="Requests at once.")
@_list_option("--contexts", default="512,8192,65536,131072,262144", help="Tokens that each has behind it.")
@click.option("--steps", type=click.IntRange(1, 10_000), default=64, show_default=True, help="Timed together.")
@click.option("--temperature", default=0.6, show_default=True, help="0 takes the most likely token.")
@_rounds
@_plot
@options.engine_flags
def decode(rows: tuple[int, ...], contexts: tuple[int, ...], steps: int, temperature: float, rounds: int,
           plot: str | None, **flags: Any) -> None:
    """Decode steps of the engine by batch and context (without drafts, unless --speculate names them)."""
    config = _without_drafts(options.engine_config(flags))

    from tritium.bench import decode as benchmark
    from tritium.bench.ceilings import measure

    ceilings = measure(config.device)
    cells = benchmark.decode(config, ceilings, rows=rows, contexts=contexts, steps=steps, rounds=rounds,
                             temperature=temperature)
    _report("decode", config, cells, ceilings, plot, len(rows) * len(contexts))


@bench.command()
@_list_option("--rows", default="1,8,32", help="Requests at once.")
@click.option("--context", type=click.IntRange(64), default=512, show_default=True, help="Tokens behind each.")
@options.engine_flags
def kernels(rows: tuple[int, ...], context: int, **flags: Any) -> None:
    """What each kernel adds to a decode step: by how much it moves the end of all before it."""
    config = _without_drafts(options.engine_config(flags))

    from tritium.bench import kernels as benchmark

    _report("kernels", config, benchmark.run(config, rows=rows, context=context))


@bench.command()
@_list_option("--tokens", default="8192,65536", help="Lengths of the prompts.")
@_rounds
@options.engine_flags
def prefill(tokens: tuple[int, ...], rounds: int, **flags: Any) -> None:
    """Prompts alone: tokens a second up to the first token of the answer."""
    config = _without_drafts(options.engine_config(flags))

    from tritium.bench import decode as benchmark
    from tritium.bench.ceilings import measure

    ceilings = measure(config.device)
    _report("prefill", config, benchmark.prefill(config, ceilings, lengths=tokens, rounds=rounds), ceilings,
            total=len(tokens))


@bench.command()
@click.option("--tokens", type=click.IntRange(1, 4096), default=64, show_default=True, help="Drawn by each request.")
@options.engine_flags
def fill(tokens: int, **flags: Any) -> int:
    """As many full contexts as the memory plan declares, to their last token. Exit code 1 if one is cut or wrong."""
    config = _without_drafts(options.engine_config(flags))

    from tritium.bench import decode as benchmark

    cell = benchmark.fill(config, tokens=tokens)
    _report("fill", config, iter([cell]))
    return int(not (cell["complete"] and cell["alike"]))


@bench.command()
@click.option("--starts", type=click.IntRange(1, 10), default=2, show_default=True,
              help="Processes; the first finds no compiled kernels.")
@click.option("--requests", type=click.IntRange(1, 1000), default=10, show_default=True, help="Of each, in turn.")
@click.option("--prompt", type=click.IntRange(1), default=64, show_default=True, help="Tokens of a prompt.")
@options.engine_flags
def start(starts: int, requests: int, prompt: int, **flags: Any) -> None:
    """Fresh processes: seconds by phase to the first token, and what the first request waits more than the last."""
    config = options.engine_config(flags)

    from tritium.bench import start as benchmark

    _report("start", config, benchmark.run(config, starts=starts, requests=requests, prompt=prompt), total=starts)


@bench.command()
@click.argument("url", default="http://127.0.0.1:8000")
@_list_option("--concurrency", default="1,2,4,8,16,32", help="Clients at once.")
@click.option("--each", type=click.IntRange(1, 1000), default=4, show_default=True, help="Requests of each client.")
@click.option("--prompt", type=click.IntRange(1), default=512, show_default=True, help="Tokens of a prompt.")
@click.option("--tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens of an answer.")
@click.option("--model", help="Name to ask for; default: the first that the server lists.")
@click.option("--api-key", help="Key to send.")
@click.option("--ignore-eos/--stop-at-eos", default=True, show_default=True, help="All answers equally long.")
@click.option("--allow-remote", is_flag=True, help="The server is not on this machine, and is yours to load.")
def serve(url: str, concurrency: tuple[int, ...], **asked: Any) -> None:
    """A server with OpenAI's completions at URL: what its clients see, by how many there are."""
    from tritium.bench import serve as benchmark

    _report("serve", None, benchmark.run(url, concurrency=concurrency, **asked), total=len(concurrency), url=url)


@bench.command()
@click.argument("file", type=click.File())
@_plot
def table(file: Any, plot: str | None) -> None:
    """The last line of FILE, which a benchmark ended in, as a Markdown table on stdout."""
    from tritium.bench import show

    try:
        result = json.loads(file.read().strip().splitlines()[-1])
        text = show.markdown(result)
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{file.name} does not end in the JSON of a benchmark", hint="tritium bench ... > FILE") \
            from error
    if plot:
        show.plot(result, Path(plot))
    click.echo(text)


def _without_drafts(config: EngineConfig) -> EngineConfig:
    return dataclasses.replace(config, speculate="none") if config.speculate == "auto" else config


def _report(kind: str, config: EngineConfig | None, cells: Iterator[dict[str, Any]], ceilings: Ceilings | None = None,
            plot: str | None = None, total: int | None = None, **more: Any) -> None:
    """Lines as they come, on stderr; then all of it as JSON, on stdout."""
    from tqdm import tqdm

    from tritium.bench import show

    if ceilings is not None:
        click.echo(ceilings.line(), err=True)
    kept, headed = [], False
    shown = config is None or config.show_progress
    for cell in tqdm(cells, total=total, desc=kind, unit="cell", file=sys.stderr, disable=not shown, leave=False):
        if not headed:
            tqdm.write(show.head(kind), file=sys.stderr)
            headed = True
        kept.append(cell)
        tqdm.write(show.line(kind, cell), file=sys.stderr)
    result = {"bench": kind, **more, "cells": kept}
    if config is not None:
        result |= {"model": config.model, "load_format": config.load_format, "speculate": config.speculate,
                   "forced_acceptance": config.benchmark_force_acceptance}
    if ceilings is not None:
        result["ceilings"] = dataclasses.asdict(ceilings)
    click.echo(json.dumps(result))
    if plot:
        show.plot(result, Path(plot))
