"""What a grammar adds to a decode step of the embedded model, pair by pair: `python tests/mask_cost.py`.

Each pair runs the same prompts with a JSON schema and without anything, one after the other, the order alternating.
Whole decode steps are timed: the matcher's way along the tokens, the mask, its way to the sampler, and its use there.
Without drafts, of which JSON would get more right than prose does.
"""

from __future__ import annotations

import statistics
import time

import click

from tritium.api import TextOptions
from tritium.api.door import Door, load
from tritium.chat import AnswerFormat
from tritium.config import EngineConfig
from tritium.core import SamplingParams
from tritium.engine import Engine

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
        "address": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[0-9]+ [A-Z][a-z]+ Street$"}]},
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 30, "maxItems": 40}


def seconds(engine: Engine, door: Door, batch: int, tokens: int, form: AnswerFormat | None) -> float:
    """Of a decode step of `batch` rows, the mean of all steps."""
    for i in range(batch):
        asked = SamplingParams(temperature=1.0, max_tokens=tokens, seed=i, ignore_eos=form is None)
        [answer] = door.prompted(f"Person {i} and all the others are", asked, options=TextOptions(form=form))
        engine.add(answer.request)
    steps = []
    while engine.has_work:
        begin = time.perf_counter()
        events = engine.step()
        spent = time.perf_counter() - begin
        if len(events) == batch and all(event.tokens and event.finish_reason is None for event in events):
            steps.append(spent)
    return statistics.mean(steps)


@click.command(help=__doc__)
@click.option("--model", default="tritium-dense", show_default=True)
@click.option("--batch", "batches", multiple=True, default=(1, 16), show_default=True)
@click.option("--tokens", default=96, show_default=True, help="Of an answer.")
@click.option("--pairs", default=10, show_default=True)
def main(model: str, batches: tuple[int, ...], tokens: int, pairs: int) -> None:
    engine, door = load(EngineConfig(model=model, speculate="none", seed=0, show_progress=False))
    held = AnswerFormat("json", PEOPLE)
    for batch in batches:
        ratios, times = [], []
        for pair in range(-1, pairs):  # the first warms up
            order = (True, False) if pair % 2 else (False, True)
            spent = {with_masks: seconds(engine, door, batch, tokens, held if with_masks else None)
                     for with_masks in order}
            if pair >= 0:
                ratios.append(spent[True] / spent[False])
                times.append(spent[False])
        low, *_, high = ratios = sorted(ratios)
        print(f"{batch} rows: a step takes {1000 * statistics.median(times):.2f} ms, with masks "
              f"{100 * (statistics.median(ratios) - 1):+.1f} % (middle of {pairs} pairs, {100 * (low - 1):+.1f} to "
              f"{100 * (high - 1):+.1f} %)", flush=True)


if __name__ == "__main__":
    main()
