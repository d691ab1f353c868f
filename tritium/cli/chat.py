"""`tritium chat`: a conversation in the terminal."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from tritium.cli import options
from tritium.cli.render import Printer, drafts
from tritium.core import SamplingParams, TritiumError

if TYPE_CHECKING:
    from tritium.api import Session

HELP = "/reset starts over, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer"


@click.command()
@click.argument("model", required=False)
@click.option("--system", default=None, help="System message.")
@click.option("--stats", is_flag=True, help="Tell after every answer how long it took and what became of its drafts.")
@options.thinking_flag
@options.sampling_flags
@options.engine_flags
def chat(model: str | None, system: str | None, stats: bool, **flags: Any) -> None:
    """Talk with MODEL. Lines on stdin are the user's turns, also when stdin is not a terminal.

    /reset starts over, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer.
    """
    given = options.sampling_fields(flags)
    SamplingParams(**given)  # refuse bad values before the model is loaded
    template = options.template_kwargs(flags)
    config = options.engine_config(flags, model)

    from tritium.api import Session

    session = Session.load(config)
    talk = Conversation(session, session.door.default_sampling(**given), template, system, stats=stats)
    with asyncio.Runner() as runner:
        try:
            if sys.stdin.isatty():
                click.secho(f"{config.model}: {HELP}", err=True, dim=True)
            for line in turns():
                if line == "/reset":
                    talk.reset()
                elif line.startswith("/") and sys.stdin.isatty():
                    click.echo(f"unknown command {line.split()[0]}; {HELP}", err=True)
                else:
                    talk.turn(runner, line)
        finally:
            runner.run(session.close())


class Conversation:
    """The turns so far. A turn that failed or was stopped before any text leaves no trace in them."""

    def __init__(self, session: Session, sampling: SamplingParams, template: dict[str, Any],
                 system: str | None, *, stats: bool = False) -> None:
        self.stats = stats
        self.session = session
        self.sampling = sampling
        self.template = template
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.opening)

    def reset(self) -> None:
        self.messages = list(self.opening)

    def turn(self, runner: asyncio.Runner, line: str) -> None:
        """Answer one user turn. Ctrl-C stops the answer; what was said until then stays."""
        printer = Printer(headings=not sys.stderr.isatty())
        question = {"role": "user", "content": line}

        closing: list[str] = []

        async def answer() -> None:
            turns = [*self.messages, question]
            async for event in self.session.chat(turns, self.sampling, template_kwargs=self.template):
                printer.show(event)
                if self.stats and event.usage and event.timing:
                    speed = event.usage.completion_tokens / max(event.timing.total, 1e-9)
                    told = f"{event.timing.total:.2f} s, {speed:.0f} tokens a second; drafts: {drafts(event.usage)}"
                    closing.append(f"({told})")

        try:
            runner.run(answer())
            printer.end()
            for line in closing:
                click.secho(line, err=True, dim=True)
        except KeyboardInterrupt:
            printer.end()
            click.secho("(stopped)", err=True, dim=True)
        except TritiumError as error:
            printer.end()
            if not self.session.alive:
                raise
            click.echo(f"error: {error.message}\nhint: {error.hint or '/reset starts over'}", err=True)
        if printer.text:
            reply = {"role": "assistant", "content": printer.text}
            if printer.reasoning:
                reply["reasoning_content"] = printer.reasoning
            self.messages += [question, reply]


def turns() -> Iterator[str]:
    """The user's lines until /quit or the end of input. Ctrl-C at the prompt only drops the line."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                click.echo(err=True)
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            click.secho(f"\n({HELP})", err=True, dim=True)
            continue
        if line == "/quit":
            return
        if line:
            yield line
