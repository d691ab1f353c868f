"""A step as tensors.

Shapes: T tokens, R rows, S draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tritium.core import StepPlan
from tritium.ops.spans import Spans

Parameters = Mapping[str, Any]
"""Parameters by name, as docs/architecture.md lists them: vectors and embeddings are tensors, all else `Weights`."""

Chain = list[tuple[dict[str, Any], Any, torch.Tensor | None]]
"""A layer's ops that may leave each other something (`ops/handed.py`), in their order: further arguments, the weight of
one that begins with a product, and the norm before it."""


@dataclass(frozen=True)
class ForwardBatch:
    """What one forward pass reads: `ids_T` int64 and how the tokens divide into rows, pages and slots."""

    ids_T: torch.Tensor
    spans: Spans
    draws_S: torch.Tensor
    """Tokens after which one is drawn: of a row that samples, the one before each draft, and the last."""

    @classmethod
    def from_plan(cls, plan: StepPlan, device: torch.device) -> ForwardBatch:
        rows = plan.rows
        spans = Spans(
            lengths=tuple(len(row.ids) for row in rows),
            contexts=tuple(row.start for row in rows),
            slots=tuple(row.slot for row in rows),
            pages=tuple(row.pages for row in rows),
            device=device,
            sources=tuple(row.slot if row.source is None else row.source for row in rows),
            folds=tuple(row.fold for row in rows),
            drafts=tuple(row.num_drafts for row in rows),
            snapshots=tuple(row.snapshots for row in rows),
        )
        draws = [
            start + len(row.ids) - 1 - i
            for row, start in zip(rows, spans.starts, strict=True)
            if row.samples
            for i in range(row.num_drafts, -1, -1)
        ]
        ids = [token for row in rows for token in row.ids]
        return cls(spans.tensor(ids), spans, spans.tensor(draws))


class AttentionCache(NamedTuple):
    """Views of one attention layer: keys and values [pages + 1, nkv, 64, d]."""

    k_pages: torch.Tensor
    v_pages: torch.Tensor


class GdnCache(NamedTuple):
    """Views of one GDN layer: state [slots + 1, nv, dk, dv], a ring of convolution inputs [slots + 1, cw + D, C] and
    the inputs of drafts under verification [slots + 1, D, nv (dk + dv + 2)], D the most drafts of a row."""

    state: torch.Tensor
    conv: torch.Tensor
    pending: torch.Tensor


LayerCache = AttentionCache | GdnCache
