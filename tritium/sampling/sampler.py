"""From rows of a plan and their logits to tokens and log-probabilities.

Shapes: S rows that sample, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from tritium.core import Site, TokenLogprob
from tritium.ops.sampling import Edits, logprobs, sample

_REAL = ("temperature", "top_p", "min_p")


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a row drew; `token` is None where its logits were not finite (or everything was masked)."""

    token: int | None
    logprob: TokenLogprob | None = None


def draw(rows: Sequence[Site], logits_SV: torch.Tensor) -> list[Sampled]:
    """One token a row. Row i of the float logits belongs to rows[i], and its outcome depends on these two alone; the
    logits are left as they are. Waits for the device."""
    if not rows:
        return []
    vocab, device = logits_SV.shape[-1], logits_SV.device
    token_S = sample(
        logits_SV=logits_SV,
        **_columns(rows, device),
        edits=_edits(rows, vocab, device),
        allowed_SW=_allowed(rows, vocab, device),
    )
    # The one thing that is waited for.
    tokens = [token if token >= 0 else None for token in token_S.tolist()]
    told = _logprobs(rows, logits_SV, tokens)
    return [Sampled(token, told.get(i)) for i, token in enumerate(tokens)]


def _logprobs(rows: Sequence[Site], logits_SV: torch.Tensor, tokens: list[int | None]) -> dict[int, TokenLogprob]:
    """Of the raw distribution, for the rows that want them."""
    asked = {
        i: (token, row.sampling.logprobs)
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True))
        if row.sampling.logprobs is not None and token is not None
    }
    if not asked:
        return {}
    chosen, counts = zip(*asked.values(), strict=True)
    return dict(zip(asked, _token_logprobs(logits_SV[list(asked)], chosen, counts), strict=True))


def prompt_logprobs(logits_TV: torch.Tensor, next_ids: Sequence[int], k: int) -> tuple[TokenLogprob, ...]:
    """Log-probability of next_ids[t] and of the k likeliest ids under row t of the raw logits."""
    return tuple(_token_logprobs(logits_TV, next_ids, [k] * len(next_ids))) if next_ids else ()


def _token_logprobs(logits_SV: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    token_S = torch.tensor(tokens, dtype=torch.int64, device=logits_SV.device)
    columns = logprobs(logits_SV=logits_SV, token_S=token_S, k=max(counts))
    return [
        TokenLogprob(token, logprob, rank, tuple(zip(top[:k], top_logprobs[:k])))
        for token, k, logprob, rank, top, top_logprobs in zip(tokens, counts, *(c.tolist() for c in columns))
    ]


def _columns(rows: Sequence[Site], device: torch.device) -> dict[str, torch.Tensor]:
    """Sampling parameters as `sample` takes them, in one copy to the device. Each begins on a multiple of 16 bytes:
    kernels are compiled anew where one does not."""
    count = len(rows)
    rows = [*rows, *rows[: count % 2]]
    asked = [row.sampling for row in rows]
    real_3S = torch.tensor([[getattr(s, name) for s in asked] for name in _REAL], dtype=torch.float64)
    whole = [s.top_k for s in asked], [site.row.seed for site in rows], [row.position for row in rows]
    both_6S = torch.cat([real_3S.view(torch.int64), torch.tensor(whole)]).to(device, non_blocking=True)
    names = (*_REAL, "top_k", "seed", "position")
    both_6S = both_6S[:, :count]
    return {f"{name}_S": x if i >= 3 else x.view(torch.float64) for i, (name, x) in enumerate(zip(names, both_6S))}


def _allowed(rows: Sequence[Site], vocab: int, device: torch.device) -> torch.Tensor | None:
    """What the rows' constraints allow, 32 tokens a word; None where no row has any. On a GPU the host works this out
    while the forward pass runs."""
    masks = [row.allowed for row in rows]
    if not any(mask is not None for mask in masks):
        return None
    size = 4 * -(-vocab // 32)
    packed = bytearray().join(b"\xff" * size if mask is None else mask[:size] for mask in masks)
    return torch.frombuffer(packed, dtype=torch.int32).view(len(rows), -1).to(device, non_blocking=True)


def _edits(rows: Sequence[Site], vocab: int, device: torch.device) -> Edits | None:
    """logit_bias, penalties and banned ids of all rows; None where no row has any."""
    index: list[int] = []
    ids: list[int] = []
    changes: list[float] = []
    for i, row in enumerate(rows):
        # An id outside the vocabulary (a stop id of another tokenizer) has no logit to change.
        edits = {token: change for token, change in _row_edits(row).items() if 0 <= token < vocab}
        index += [i] * len(edits)
        ids += edits
        changes += chain.from_iterable(edits.values())
    if not ids:
        return None
    row_E, id_E = torch.tensor([index, ids]).to(device, non_blocking=True)
    change_E3 = torch.tensor(changes, dtype=torch.float64).view(-1, 3).to(device, non_blocking=True)
    return Edits(row_E, id_E, *change_E3.unbind(-1))


def _row_edits(site: Site) -> dict[int, tuple[float, float, float]]:
    """id -> (bias, repetition factor, what is taken away).

    Repetition counts prompt and output; presence and frequency the output alone.
    """
    asked = site.sampling
    if not (asked.logit_bias or asked.uses_penalties or site.eos_ids):
        return {}
    seen: frozenset[int] = frozenset()
    counts: Counter[int] = Counter()
    if asked.uses_penalties:
        assert site.history is not None
        counts.update(site.history[site.row.prompt_len :])
        if asked.repetition_penalty != 1:  # all that the prompt, which may be long, matters to
            seen = frozenset(site.history)
    bias, repetition = asked.logit_bias, asked.repetition_penalty
    presence, frequency = asked.presence_penalty, asked.frequency_penalty
    edits = {token: (bias.get(token, 0.0), repetition, 0.0) for token in seen}
    edits |= {token: (bias.get(token, 0.0), repetition, presence + frequency * n) for token, n in counts.items()}
    edits |= {token: (value, 1.0, 0.0) for token, value in bias.items() if token not in edits}
    return edits | dict.fromkeys(site.eos_ids, (0.0, 1.0, math.inf))
