"""The MTP head as a proposer on the device: it runs after every step, over the tokens that stay.

A guess is drawn like the target's own token there, from the head's logits with the same uniform: where the two
distributions agree, the draws mostly do, at any temperature.

Shapes: T tokens, R rows that go on guessing, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tritium.config import HEAD_TOKENS
from tritium.core import PAGE_TOKENS, Site, StepPlan
from tritium.models.decoder import Decoder
from tritium.nn.batch import ForwardBatch, LayerCache
from tritium.ops.spans import Spans

Draw = Callable[[Sequence[Site], torch.Tensor], Sequence[int | None]]
"""A token for each row from its logits, with the row's own parameters and seed."""


def propose(model: Decoder, cache: LayerCache, draw: Draw, plan: StepPlan, batch: ForwardBatch, hidden_TH: torch.Tensor,
            tokens: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """At most `want_drafts` guesses of what follows each row of a step.

    `hidden_TH`: the target's final-normed hidden states; `tokens[i]`: what row i gained, empty where it did not sample.
    The head's own KV layer is written for every token that stays of the rows that want drafts, one position a token, in
    the target's pages. It looks back on at most `HEAD_TOKENS` (in whole pages), and on none that it did not follow.
    """
    out: list[tuple[int, ...]] = [()] * len(plan.rows)
    followed = [i for i, row in enumerate(plan.rows) if row.want_drafts]
    if not followed:
        return out
    spans, rows = batch.spans, plan.rows
    places: list[int] = []
    following: list[int] = []
    stay: dict[int, int] = {}
    for i in followed:
        row, new = rows[i], tokens[i]
        stay[i] = len(row.ids) - row.num_drafts + max(0, len(new) - 1)
        places += range(spans.starts[i], spans.starts[i] + stay[i])
        # After a row that failed nothing follows: any id keeps the shapes together, and nobody reads it.
        following += row.ids[1 : stay[i]] + (row.next_ids or new[-1:] or row.ids[-1:])

    def part(which: Sequence[int], lengths: Sequence[int], contexts: Sequence[int]) -> Spans:
        back = [max(0, at // PAGE_TOKENS * PAGE_TOKENS - HEAD_TOKENS) for at in contexts]
        slots, pages = zip(*((spans.slots[i], spans.pages[i]) for i in which))
        return Spans(tuple(lengths), tuple(contexts), slots, pages, spans.device,
                     since=tuple(max(rows[i].head_since, first) for i, first in zip(which, back, strict=True)))

    head = part(followed, list(stay.values()), [spans.contexts[i] for i in followed])
    hidden_TH = hidden_TH[spans.tensor(places)] if len(places) < len(hidden_TH) else hidden_TH
    hidden_TH = model.draft_hidden(hidden_TH, spans.tensor(following), head, cache)

    going = [i for i in followed if tokens[i]]
    hidden_RH = hidden_TH[head.last_R[[followed.index(i) for i in going]]] if going else hidden_TH[:0]
    while going:
        sites = [Site(rows[i], tokens[i] + out[i], may_end=True) for i in going]
        for i, token in zip(going, draw(sites, model.logits(hidden_RH)), strict=True):
            out[i] += (0 if token is None else token,)
        # The next guess needs a place for the key and value of this one; where a row's pages end, guessing ends.
        at = {i: spans.contexts[i] + stay[i] + len(out[i]) - 1 for i in going}
        on = [k for k, i in enumerate(going)
              if len(out[i]) < rows[i].want_drafts and at[i] < PAGE_TOKENS * len(rows[i].pages)]
        if not on:
            break
        hidden_RH, going = hidden_RH[on], [going[k] for k in on]
        step = part(going, [1] * len(going), [at[i] for i in going])
        hidden_RH = model.draft_hidden(hidden_RH, spans.tensor([out[i][-1] for i in going]), step, cache)
    return out
