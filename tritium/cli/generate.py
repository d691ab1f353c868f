"""`tritium generate`: one prompt, its answer."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from tritium.cli import options
from tritium.cli.render import Printer, time_table
from tritium.core import Event, RequestError, SamplingParams

if TYPE_CHECKING:
    from tritium.api import Completion


@click.command()
@click.argument("prompt", required=False)
@click.option("--chat/--raw", "as_chat", default=True, help="A message to answer (default), or text to continue.")
@click.option("--system", default=None, help="System message (with --chat).")
@options.thinking_flag
@click.option("-n", "--n", "n", type=int, default=1, help="Number of answers.")
@click.option("--ignore-eos", is_flag=True, help="Go on to --max-tokens.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of text.")
@click.option("--stats", is_flag=True, help="Tell on stderr where the time went.")
@options.sampling_flags
@options.engine_flags
def generate(prompt: str | None, as_chat: bool, system: str | None, n: int, ignore_eos: bool, as_json: bool,
             stats: bool, **flags: Any) -> None:
    """Answer PROMPT, or what stdin holds.

    The answer goes to stdout as it is written; thinking goes to stderr.
    """
    started = time.perf_counter()
    given = options.sampling_fields(flags) | {"n": n, "ignore_eos": ignore_eos}
    SamplingParams(**given)  # refuse bad values before the model is loaded
    template = options.template_kwargs(flags)
    config = options.engine_config(flags)
    if prompt is None or prompt == "-":
        prompt = read_stdin()
    if not prompt:
        raise RequestError("the prompt is empty", param="prompt", hint="give it as an argument or on stdin")

    from tritium.api import Completion, Session

    session = Session.load(config)
    loading = time.perf_counter() - started
    sampling = session.door.default_sampling(**given)
    if as_chat:
        system_turn = [{"role": "system", "content": system}] if system else []
        messages = [*system_turn, {"role": "user", "content": prompt}]
        events = session.chat(messages, sampling, template_kwargs=template)
    else:
        events = session.generate(prompt, sampling)
    answers = [Completion(i, []) for i in range(n)]
    printer = Printer(headings=True) if n == 1 and not as_json else None

    async def collect() -> None:
        try:
            async for event in events:
                answers[event.index].absorb(event)
                if printer:
                    printer.show(event)
        finally:
            await session.close()

    asyncio.run(collect())
    if printer:
        printer.end()
    elif as_json:
        click.echo(json.dumps({"prompt": prompt, "choices": [choice(answer) for answer in answers]}))
    else:
        for answer in answers:
            several = Printer(headings=True)
            click.secho(f"--- {answer.index + 1} of {n}", err=True, dim=True)
            several.show(Event(text=answer.text, reasoning=answer.reasoning, tool_calls=tuple(answer.tool_calls)))
            several.end()
    last = answers[-1]
    if stats and last.timing:
        click.echo(f"--- time\n{time_table(loading, last.usage, last.timing, session.stats().seconds)}", err=True)


def read_stdin() -> str:
    """What stdin holds, without the last line break. Raises `RequestError` for bytes that are not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not UTF-8: byte {error.start}", param="prompt") from None


def choice(answer: Completion) -> dict[str, Any]:
    """An answer as JSON."""
    return {
        "text": answer.text,
        "reasoning": answer.reasoning,
        "tool_calls": [{"name": call.name, "arguments": call.arguments} for call in answer.tool_calls],
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "token_ids": answer.token_ids,
        "usage": dataclasses.asdict(answer.usage),
        "timing": dataclasses.asdict(answer.timing) if answer.timing else None,
    }
