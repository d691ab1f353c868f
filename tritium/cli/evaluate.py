"""`tritium eval`: measures what a model can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tritium.cli import options
from tritium.core import ConfigError


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

        click.echo(f"{config.model}: {count} held-out problems of each kind, greedy\n{evaluation.scheme_head()}")
        rows = []
        for figures in evaluation.run_schemes(config, schemes.split(","), count=count):
            stored = find_checkpoint(evaluation.variant(config, figures["scheme"])).config
            rows.append(figures | {"bytes_per_token": step_bytes(stored, 1, 512)})
            click.echo(evaluation.scheme_row(rows[-1]))
        if as_json:
            click.echo(json.dumps({"model": config.model, "count": count, "schemes": rows}))
        return
    figures = evaluation.run(config, count=count)
    click.echo(evaluation.table(figures))
    if as_json:
        click.echo(json.dumps(figures))


@evaluate.command("kl")
@click.option("--text", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True,
              help="File to read, UTF-8.")
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

    from tritium.eval import kl

    figures = kl.run(config, path.read_text(encoding="utf-8"), window=window, limit=limit)
    click.echo(kl.table(figures), err=True)
    click.echo(json.dumps(figures))
