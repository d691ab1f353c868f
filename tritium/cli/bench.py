"""`tritium bench`: how fast."""

from __future__ import annotations

import json
from typing import Any

import click

from tritium.cli import options


@click.group("bench")
def bench() -> None:
    """Measure how fast a model is served."""


@bench.command()
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Pairs of runs in each cell.")
@options.engine_flags
def speculation(rounds: int, **flags: Any) -> None:
    """Decoding with drafts (--speculate) against decoding without, in cells of rows and context.

    A table on stderr, ending in one line of JSON on stdout.
    """
    config = options.engine_config(flags)

    from tritium.bench import speculation as benchmark
    from tritium.eval import tasks

    def turns(seed: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        samples = tasks.samples("word_problems", "heldout", 1000 + seed, 60)
        return [(sample.task.messages[-1], {"role": "assistant", "content": sample.reply["content"]})
                for sample in samples]

    click.echo("                       with drafts   without   ratio  tokens per forward", err=True)
    cells = []
    for cell in benchmark.run(config, turns, rounds=rounds):
        cells.append(cell)
        click.echo(benchmark.line(cell), err=True)
    click.echo(json.dumps({"model": config.model, "speculate": config.speculate, "cells": cells,
                           "forced_acceptance": config.benchmark_force_acceptance}))
