"""The feed of a graph's decode step, one row a program; rows of the embedding, a piece of one a program.
See `tritium.ops.feed`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tritium.core import MOST_ENDS
from tritium.ops.feed import HEADER
from tritium.ops.kernels.launch import cdiv, launch, parameters, release_next, wait_for_inputs
from tritium.ops.spans import Table


@triton.jit
def _feed(
    host, drawn, lengths, contexts, sources, slots, folds, drafts, snap_at, snap_slot, pages, position, ids,
    next_position, page_stride, R, Q: tl.constexpr, HEADER: tl.constexpr, ENDS: tl.constexpr, pdl: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0)
    e = tl.arange(0, ENDS)
    wait_for_inputs(pdl)
    ends = tl.load(host + (HEADER + Q + e) * R + r)
    length = tl.load(host + r)
    context = tl.load(host + R + r)
    for i in tl.static_range(Q):
        given = tl.load(host + (HEADER + i) * R + r)
        token = tl.load(drawn + tl.maximum(-1 - given, 0), mask=given < 0, other=0)
        token = tl.where(given < 0, tl.maximum(token, 0), given.to(tl.int64))
        over = (given < 0) & (tl.sum((ends == token).to(tl.int32)) > 0)
        length = tl.where(over, 0, length)
        tl.store(ids + r * Q + i, token)
        tl.store(next_position + r * Q + i, (context + i + 1).to(tl.int64))
    for i in tl.static_range(Q):
        tl.store(position + r * Q + i, tl.where(i < length, context + i, -1))
    tl.store(lengths + r, length)
    columns = (contexts, sources, slots, folds, drafts, snap_at, snap_slot)
    for i in tl.static_range(7):
        tl.store(columns[i] + r, tl.load(host + (i + 1) * R + r))
    page_at = tl.load(host + 8 * R + r)
    page = tl.load(host + 9 * R + r)
    release_next(pdl)
    tl.store(pages + r.to(tl.int64) * page_stride + page_at, page, mask=page_at >= 0)


def feed(
    *, host_HR: torch.Tensor, drawn_D: torch.Tensor, table: Table, ids_T: torch.Tensor, next_S: torch.Tensor
) -> None:
    rows = host_HR.shape[1]
    launch(
        _feed, (rows,), host_HR, drawn_D, *table[1:7], *table[8:11], table.position_T, ids_T, next_S,
        table.pages_RP.stride(0), rows, Q=len(ids_T) // rows, HEADER=HEADER, ENDS=MOST_ENDS,
        **parameters("feed", host_HR),
    )  # fmt: skip


@triton.jit
def _embed(ids, embed, x, clear, K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, pdl: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(pdl)
    row = tl.load(embed + tl.load(ids + token) * K + k, mask=k < K, other=0.0)
    release_next(pdl)
    tl.store(x + token * K + k, row.to(tl.float32), mask=k < K)
    if token == 0:
        tl.store(clear + k, 0, mask=k < C)


def embed(*, ids_T: torch.Tensor, embed_VK: torch.Tensor, clear_C: torch.Tensor) -> torch.Tensor:
    tokens, hidden = len(ids_T), embed_VK.shape[1]
    x_TK = torch.empty((tokens, hidden), dtype=torch.float32, device=embed_VK.device)
    found = parameters("embed", embed_VK, K=hidden)
    blocks = cdiv(max(hidden, len(clear_C)), found["BLOCK"])
    launch(_embed, (tokens, blocks), ids_T, embed_VK, x_TK, clear_C, K=hidden, C=len(clear_C), **found)
    return x_TK
