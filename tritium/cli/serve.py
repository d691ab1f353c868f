"""`tritium serve`: the HTTP server."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from tritium.cli import options
from tritium.core import ConfigError


@click.command()
@click.argument("model", required=False)
@click.option("--host", default="127.0.0.1", show_default=True,
              help="Address to listen on; 0.0.0.0 for all, which needs a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 picks a free one.")
@click.option("--served-model-name", "served_model_names", multiple=True,
              help="Name in the API instead of the model's; may be repeated.")
@click.option("--api-key", "api_keys", multiple=True,
              help="Key that clients must send, KEY or 'NAME KEY'; may be repeated. Others on this machine can see it.")
@click.option("--api-key-file", help="File with keys, KEY or NAME KEY on a line.")
@click.option("--allow-unauthenticated", is_flag=True, help="Serve other machines without a key.")
@click.option("--allowed-origins", multiple=True, help="Origin whose web pages may call (CORS); may be repeated.")
@click.option("--max-queued-requests", default=1024, show_default=True,
              help="Requests that wait; one more is answered with 429.")
@click.option("--max-requests-per-key", type=int, help="Requests of one key that wait or run; more get 429.")
@click.option("--tokens-per-minute-per-key", type=int, help="Prompt and output tokens of one key; more get 429.")
@click.option("--request-timeout", type=float, help="Seconds that a request may take, queueing included.")
@click.option("--max-body-bytes", default=8 * 2**20, show_default=True, help="Size of a request's body.")
@click.option("--patience", default=60.0, show_default=True,
              help="Seconds for a client to send its request, or to read a piece of an answer.")
@click.option("--drain-seconds", default=30.0, show_default=True,
              help="How long answers may go on after SIGTERM or Ctrl-C; a second one ends all at once.")
@click.option("--log-format", type=click.Choice(("text", "json", "none")), default="text", show_default=True,
              help="A line for every request.")
@click.option("--otlp-traces-endpoint", metavar="URL",
              help="OpenTelemetry collector that gets a span of every request, like http://127.0.0.1:4318/v1/traces.")
@click.option("--yes-outputs-are-wrong", is_flag=True, help="Serve with --benchmark-force-acceptance all the same.")
@options.engine_flags
def serve(model: str | None, yes_outputs_are_wrong: bool, **flags: Any) -> None:
    """Serve MODEL over HTTP with OpenAI's and Anthropic's APIs."""
    config = options.engine_config(flags, model)
    if config.benchmark_force_acceptance is not None and not yes_outputs_are_wrong:
        raise ConfigError("--benchmark-force-acceptance makes every answer wrong",
                          hint="leave it out, or add --yes-outputs-are-wrong to measure a server")

    from tritium.api import Limits
    from tritium.server import ServerSettings
    from tritium.server import serve as serve_http

    limits = Limits(**{field.name: flags.pop(field.name) for field in dataclasses.fields(Limits)})
    serve_http(config, ServerSettings(limits=limits, **flags))
