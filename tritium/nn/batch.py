"""A step as tensors.

Shapes: T tokens, R rows, S rows that sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tritium.core import StepPlan
from tritium.ops.spans import Spans

Parameters = Mapping[str, torch.Tensor]
"""Parameters by name, as docs/architecture.md lists them."""


@dataclass(frozen=True)
class ForwardBatch:
    """What one forward pass reads: `ids_T` int64 and how the tokens divide into rows, pages and slots."""

    ids_T: torch.Tensor
    spans: Spans
    samples: tuple[int, ...]
    """Rows whose last token is sampled."""

    @classmethod
    def from_plan(cls, plan: StepPlan, device: torch.device) -> ForwardBatch:
        spans = Spans(
            lengths=tuple(len(row.ids) for row in plan.rows),
            contexts=tuple(row.start for row in plan.rows),
            slots=tuple(row.slot for row in plan.rows),
            pages=tuple(row.pages for row in plan.rows),
            device=device,
        )
        ids = [token for row in plan.rows for token in row.ids]
        samples = tuple(i for i, row in enumerate(plan.rows) if row.samples)
        return cls(torch.tensor(ids, dtype=torch.int64, device=device), spans, samples)


class AttentionCache(NamedTuple):
    """Views of one attention layer: keys and values [pages + 1, nkv, 64, d]."""

    k_pages: torch.Tensor
    v_pages: torch.Tensor


class GdnCache(NamedTuple):
    """Views of one GDN layer: state [slots + 1, nv, dk, dv], convolution inputs [slots + 1, cw - 1 + D, C] and the
    inputs of drafts under verification [slots + 1, D, nk dk + nv dv + 2 nv], D the most drafts of a row."""

    state: torch.Tensor
    conv: torch.Tensor
    pending: torch.Tensor


LayerCache = AttentionCache | GdnCache
