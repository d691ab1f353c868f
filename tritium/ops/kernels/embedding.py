"""Rows of the embedding, a piece of one a program. See `tritium.ops.embedding`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tritium.ops.kernels.launch import cdiv, launch, parameters, release_next, wait_for_inputs


@triton.jit
def _embed(ids, embed, x, H: tl.constexpr, BLOCK: tl.constexpr, pdl: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(pdl)
    row = tl.load(embed + tl.load(ids + token) * H + h, mask=h < H, other=0.0)
    release_next(pdl)
    tl.store(x + token * H + h, row.to(tl.float32), mask=h < H)


def embed(*, ids_T: torch.Tensor, embed_VH: torch.Tensor) -> torch.Tensor:
    tokens, hidden = len(ids_T), embed_VH.shape[1]
    x_TH = torch.empty((tokens, hidden), dtype=torch.float32, device=embed_VH.device)
    found = parameters("embed", embed_VH, H=hidden)
    launch(_embed, (tokens, cdiv(hidden, found["BLOCK"])), ids_T, embed_VH, x_TH, H=hidden, **found)
    return x_TH
