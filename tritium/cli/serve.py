"""`tritium serve`: the OpenAI-compatible server."""

from __future__ import annotations

from typing import Any

import click

from tritium.cli import options


@click.command()
@click.argument("model", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 picks a free one.")
@click.option("--served-model-name", multiple=True, help="Name in the API instead of the model's; may be repeated.")
@options.engine_flags
def serve(model: str | None, host: str, port: int, served_model_name: tuple[str, ...], **flags: Any) -> None:
    """Serve MODEL over HTTP with OpenAI's API."""
    config = options.engine_config(flags, model)

    from tritium.server import serve as serve_http

    serve_http(config, host=host, port=port, served_model_names=served_model_name)
