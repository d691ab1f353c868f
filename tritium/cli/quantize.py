"""`tritium quantize`: a checkpoint in fewer bits, on disk."""

from __future__ import annotations

from pathlib import Path

import click

from tritium.config import SCHEMES, EngineConfig


@click.command("quantize")
@click.argument("source")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--scheme", type=click.Choice(SCHEMES), required=True, help="What the weights become.")
@click.option("--keep-bf16", multiple=True, help="Glob on tensor names that stay as they are; may be repeated.")
@click.option("--quantize-also", multiple=True, help="Glob of tensors that it would leave; may be repeated.")
@click.option("--device", default="auto", show_default=True, help="Where it is computed: auto, cpu, cuda.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar.")
def quantize(source: str, destination: Path, scheme: str, keep_bf16: tuple[str, ...], quantize_also: tuple[str, ...],
             device: str, revision: str | None, quiet: bool) -> None:
    """Write SOURCE (a directory or a hub name) to DESTINATION with its weights quantized.

    Loading that gives, to the bit, the weights that --quantize makes of SOURCE at every start.
    """
    config = EngineConfig(model=source, quantize=scheme, keep_bf16=keep_bf16, quantize_also=quantize_also,
                          revision=revision)

    from tritium.engine.memory_plan import size
    from tritium.hw import probe
    from tritium.models.checkpoint import find_checkpoint
    from tritium.models.save import save

    checkpoint = find_checkpoint(config)
    before, after = save(checkpoint, destination, device=probe(device).device, progress=not quiet)
    click.echo(f"{destination}: {checkpoint.config.quantization}, {size(after)} of {size(before)}")
