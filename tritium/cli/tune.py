"""`tritium tune`: launch parameters for the GPU of this machine."""

from __future__ import annotations

import json
from typing import Any

import click

from tritium.cli import options


@click.command("tune")
@click.option("--rows", "decode_rows", type=click.IntRange(1, 64), multiple=True, default=(1, 8), show_default=True,
              help="Decode rows to tune for; may be repeated.")  # fmt: skip
@click.option("--prompt", "prompts", type=click.IntRange(256, 65536), multiple=True,
              help="Tokens of a prompt to tune for; may be repeated.")  # fmt: skip
@click.option("--context", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens behind each row.")
@click.option("--seconds", type=click.FloatRange(min=1), default=120.0, show_default=True,
              help="For each number of rows and each prompt.")  # fmt: skip
@click.option("--op", "only", multiple=True, help="Only parameters whose name begins so; may be repeated.")
@click.option("--write/--no-write", default=True, show_default=True, help="Put what is found into the chip's file.")
@options.engine_flags
def tune(decode_rows: tuple[int, ...], prompts: tuple[int, ...], context: int, seconds: float, only: tuple[str, ...],
         write: bool, **flags: Any) -> None:  # fmt: skip
    """Find launch parameters for this GPU, by timing whole decode steps.

    Takes a model (--load-format dummy will do) and keeps, kernel by kernel, what makes its decode step shorter. What
    is tried is told on stderr; what was found is one line of JSON on stdout.
    """
    config = options.engine_config(flags)

    from tritium.bench import tune as tuning
    from tritium.hw import probe

    arch = probe(config.device).arch
    for found in tuning.tune(
        config, rows=decode_rows, prompts=prompts, context=context, seconds=seconds, only=only,
        tell=lambda text: click.echo(text, err=True),
    ):  # fmt: skip
        click.echo(json.dumps({"arch": arch, "found": found}))
        if write and found:
            click.echo(f"written to {tuning.write(arch, found)}", err=True)
