"""`tritium eval`: measures what a model can do."""

from __future__ import annotations

import json
from typing import Any

import click

from tritium.cli import options


@click.group("eval")
def evaluate() -> None:
    """Measure what a model can do."""


@evaluate.command()
@click.option("--count", type=click.IntRange(min=1), default=100, show_default=True, help="Problems of each kind.")
@click.option("--json", "as_json", is_flag=True, help="End with the figures as one line of JSON.")
@options.engine_flags
def tiny(count: int, as_json: bool, **flags: Any) -> None:
    """Held-out word problems, tool calls and recall, and how often the MTP head's guess was right.

    The problems are those that the embedded models were trained for, with other numbers and names.
    """
    config = options.engine_config(flags)

    from tritium.eval import tiny as evaluation

    figures = evaluation.run(config, count=count)
    click.echo(evaluation.table(figures))
    if as_json:
        click.echo(json.dumps(figures))
