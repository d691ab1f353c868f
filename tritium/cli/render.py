"""An answer on the terminal as it comes: thinking on stderr (dimmed on a terminal), the answer on stdout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import click

from tritium.core import Event, Timing, Usage


@dataclass
class Printer:
    """Prints events and keeps what they add up to."""

    headings: bool = False
    """Name the parts, for answers whose thinking cannot be told by its colour."""
    text: str = ""
    reasoning: str = ""
    _part: str = ""

    def show(self, event: Event) -> None:
        if event.reasoning:
            self._enter("thinking")
            click.secho(event.reasoning, err=True, dim=True, nl=False)
            self.reasoning += event.reasoning
        if event.text:
            # The blank lines that models write between thinking and answer are layout, not answer.
            shown = event.text if self.text else event.text.lstrip("\n")
            self.text += shown
            if shown:
                self._enter("answer")
                click.echo(shown, nl=False)
        for call in event.tool_calls:
            self._enter("tool call")
            click.echo(f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})", nl=False)

    def end(self) -> None:
        if self._part:
            click.echo(err=self._part == "thinking")

    def _enter(self, part: str) -> None:
        if part == self._part and part != "tool call":
            return
        self.end()
        if self.headings:
            click.secho(f"--- {part}", err=True, dim=True)
        self._part = part


def time_table(loading: float, usage: Usage, timing: Timing, phases: Mapping[str, float]) -> str:
    """Where the time went, as aligned lines. Seconds; speeds in tokens per second.

    `phases`: the engine's own account of its steps, in seconds.
    """
    decode, later = timing.total - timing.queued, timing.output_tokens - 1
    first = f"{usage.prompt_tokens} prompt tokens to the first of the answer"
    rows = [("load", loading, "start of the command to the first request"), ("prefill", timing.queued, first)]
    if later > 0 and decode > 0:
        speed = f"{later / decode:.1f} tokens per second, {1000 * decode / later:.2f} ms each"
        rows.append(("decode", decode, f"{later} more tokens: {speed}"))
    tokens = f"{usage.completion_tokens} tokens, {usage.reasoning_tokens} of them thinking"
    rows.append(("total", loading + timing.total, tokens))
    lines = [f"  {name:<9}{seconds:>8.2f} s  {what}" for name, seconds, what in rows]
    spent = sum(phases.values())
    if spent > 0:
        lines.append("  steps    " + ", ".join(f"{name} {100 * s / spent:.0f} %" for name, s in phases.items()))
    return "\n".join([*lines, f"  drafts   {drafts(usage)}"])


def drafts(usage: Usage) -> str:
    """What became of the tokens that were guessed."""
    guessed = usage.accepted_drafts + usage.rejected_drafts
    if not guessed:
        return "none"
    share = 100 * usage.accepted_drafts / guessed
    return (f"{usage.accepted_drafts} of {guessed} right ({share:.0f} %), "
            f"{usage.completion_tokens} tokens in {usage.completion_tokens - usage.accepted_drafts} steps")
