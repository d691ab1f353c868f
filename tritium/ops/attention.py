"""Paged causal attention over the mixed rows of a step, with the output gate.

    o[t] = Σ_s softmax_s(q[t]·k[s] D^-1/2, s ≤ position of t) v[s] · sigmoid(gate[t])

Query head n reads key / value head n // (N / G). The reference sums page by page in the order of positions, in tiles
whose shapes do not depend on the step: a token's result is the same to the bit alone or batched, whole or in chunks,
and pages beyond its position add exact zeros.

Shapes: T tokens, R rows, B rows of a tile, M query rows of a tile (tokens x heads of a group, padded to 8), N = nq,
G = nkv, D head dim, P pages; q_TND, gate_TND, k_pages and v_pages [pages + 1, G, 64, D], o_TND.
"""

from __future__ import annotations

from typing import Any

import torch

from tritium.core import SHORT_ROW
from tritium.ops.elementwise import sigmoid
from tritium.ops.handed import Handed, Peak, left
from tritium.ops.linear import ROWS
from tritium.ops.spans import Spans
from tritium.ops.spec import Dims, Op, OpSpec, randn, wide

PAGE = 64
QUERY_TILE = 256
"""Tokens of one row that are attended together."""
PAGE_BLOCK = 32
"""Pages whose scores are held at once; blocks start at multiples of this, whatever the row."""
ROW_TILE = 16
"""Decode rows that are attended together, so that gathered keys stay small."""


def _inputs(dims: Dims, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """L: context of the last row. Optional: Q, tokens of each of T / Q rows with contexts that differ; S, the first
    position that counts; B = 1, NaNs in the places of no token."""
    t, n, g, d = (dims[name] for name in ("T", "N", "G", "D"))
    context = dims["L"]
    lengths: tuple[int, ...] = (1, 1, t - 2) if t > 2 else (t,)
    contexts: tuple[int, ...] = (3, 0, context) if t > 2 else (context,)
    if each := dims.get("Q"):
        lengths, contexts = (each,) * (t // each), tuple(context // 3**r for r in reversed(range(t // each)))
    rows = len(lengths)
    pages, tables = 1, []
    for length, start in zip(lengths, contexts):
        need = -(-(start + length) // PAGE)
        tables.append(tuple(range(pages, pages + need)))
        pages += need
    shape = (pages, g, PAGE, d)
    arguments: dict[str, Any] = {
        "q_TND": randn(generator, t, n, d, dtype=dtype),
        "gate_TND": randn(generator, t, n, d, dtype=dtype),
        "k_pages": randn(generator, *shape, dtype=dtype),
        "v_pages": randn(generator, *shape, dtype=dtype),
        "spans": Spans(
            lengths, contexts, tuple(range(1, rows + 1)), tuple(tables), torch.get_default_device(),
            drafts=tuple(max(length - 1, 0) if each else 0 for length in lengths),
            since=tuple(min(dims["S"], start) for start in contexts) if "S" in dims else (),
        ),
    }  # fmt: skip
    if dims.get("handed"):
        arguments["leave"] = Peak(torch.zeros(1, dtype=torch.int32))
    if dims.get("B"):
        for name in ("k_pages", "v_pages"):
            arguments[name][0] = torch.nan
            for length, start, table in zip(lengths, contexts, tables):
                arguments[name][table[-1], :, (start + length - 1) % PAGE + 1 :] = torch.nan
    return arguments


SPEC = OpSpec(
    name="paged_attention",
    cases=(
        {"T": 1, "N": 2, "G": 2, "D": 64, "L": 0},
        {"T": 1, "N": 6, "G": 2, "D": 40, "L": 2100, "handed": 1},
        {"T": 75, "N": 4, "G": 1, "D": 64, "L": 61},
        {"T": 6, "N": 6, "G": 1, "D": 72, "L": 200, "Q": 3, "B": 1},
        {"T": 20, "N": 4, "G": 1, "D": 32, "L": 150, "Q": 10, "S": 70, "B": 1},
        {"T": 70, "N": 2, "G": 2, "D": 72, "L": 203, "S": 70, "B": 1},
    ),
    inputs=_inputs,
    results=lambda arguments, returned: {"o_TND": returned, **left(arguments, returned)},
    bytes_moved=lambda d, size: size * (2 * d["G"] * d["D"] * (d["L"] + d["T"]) + 3 * d["T"] * d["N"] * d["D"]),
    flops=lambda d: 4 * d["T"] * d["N"] * d["D"] * (d["L"] + d["T"]),
)


def reference(
    *,
    q_TND: torch.Tensor,
    gate_TND: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    spans: Spans,
    leave: Handed | None = None,
) -> torch.Tensor:
    """o_TND in q's dtype. Every row's keys and values, this step's included, are in its pages already. `leave`: as in
    `linear`."""
    groups = k_pages.shape[1]
    tokens, heads, dim = q_TND.shape
    q_TGMD = q_TND.view(tokens, groups, heads // groups, dim)
    o_TGMD = torch.empty_like(q_TGMD)
    for index_BC, pages_BP, positions_BC, since_B in spans.cached("attention_tiles", _tiles):
        # Where a row repeats its last token, the same bits are written to the same place again.
        o_TGMD[index_BC] = _attend(q_TGMD[index_BC], positions_BC, since_B, pages_BP, k_pages, v_pages).to(q_TND.dtype)
    gate = sigmoid(gate_TND.to(wide(gate_TND.dtype)))
    o_TND = (o_TGMD.view(tokens, heads, dim) * gate).to(q_TND.dtype)
    if leave is not None:
        leave.leave(o_TND)
    return o_TND


def _tiles(spans: Spans) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """(tokens [B, C], block tables [B, P], positions within these [B, C], first position that counts [B]) of what is
    attended together: decode rows side by side, those with fewer drafts repeating their last token, and longer spans in
    query tiles. Block tables leave out the pages before the first position that counts."""
    short = [r for r, length in enumerate(spans.lengths) if length <= SHORT_ROW]
    short.sort(key=lambda r: spans.contexts[r])
    tiles = [(short[i : i + ROW_TILE], 0, SHORT_ROW) for i in range(0, len(short), ROW_TILE)]
    for r, length in enumerate(spans.lengths):
        if length > SHORT_ROW:
            tiles += [([r], first, QUERY_TILE) for first in range(0, length, QUERY_TILE)]
    out = []
    for rows, first, most in tiles:
        stop = min(first + most, max(spans.lengths[r] for r in rows))
        offsets = [[min(i, spans.lengths[r] - 1) for i in range(first, stop)] for r in rows]
        since = [spans.since[r] if spans.since else 0 for r in rows]
        skip = [position // PAGE for position in since]
        at = [[spans.contexts[r] - PAGE * s + i for i in row] for r, s, row in zip(rows, skip, offsets)]
        count = max(row[-1] for row in at) // PAGE + 1
        tables = [spans.pages[r][s : s + count] for r, s in zip(rows, skip)]
        out.append((
            spans.tensor([[spans.starts[r] + i for i in row] for r, row in zip(rows, offsets)]),
            spans.tensor([table + (0,) * (count - len(table)) for table in tables]),
            spans.tensor(at),
            spans.tensor([position % PAGE for position in since]) if any(s % PAGE for s in since) else None,
        ))
    return out


def _attend(
    q_BCGMD: torch.Tensor,
    positions_BC: torch.Tensor,
    since_B: torch.Tensor | None,
    pages_BP: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
) -> torch.Tensor:
    """o_BCGMD, float32, for C tokens of each of B rows."""
    b, c, groups, m, dim = q_BCGMD.shape
    compute = wide(q_BCGMD.dtype)
    q_BGMD = q_BCGMD.permute(0, 2, 1, 3, 4).reshape(b, groups, c * m, dim).to(compute) * dim**-0.5
    positions_BM = positions_BC.repeat_interleave(m, dim=1)
    padding = -(c * m) % ROWS
    q_BGMD = torch.nn.functional.pad(q_BGMD, (0, 0, 0, padding))
    positions_BM = torch.nn.functional.pad(positions_BM, (0, padding))
    rows = c * m + padding
    o_BGMD = q_BGMD.new_zeros(b * groups, rows, dim)
    total_BGM = q_BGMD.new_zeros(b * groups, rows)
    top_BGM = q_BGMD.new_full((b * groups, rows), -torch.inf)
    for p0 in range(0, pages_BP.shape[1], PAGE_BLOCK):
        pages_PB = pages_BP[:, p0 : p0 + PAGE_BLOCK].t().contiguous()
        p = len(pages_PB)
        key_at_PS = (p0 * PAGE + torch.arange(p * PAGE, device=q_BGMD.device)).view(p, PAGE)
        k_PBGSD = k_pages[pages_PB].to(compute)
        v_PBGSD = v_pages[pages_PB].to(compute)
        # Beyond a row's end lies whatever the page held before; zero weights must not meet an infinity there.
        beyond_PBS = key_at_PS[:, None] > positions_BM.amax(1)[None, :, None]
        v_PBGSD.masked_fill_(beyond_PBS[:, :, None, :, None], 0.0)
        scores_PBGMS = torch.matmul(q_BGMD, k_PBGSD.transpose(-1, -2))
        hidden_PBMS = key_at_PS[:, None, None] > positions_BM[None, :, :, None]
        if since_B is not None:
            hidden_PBMS = hidden_PBMS | (key_at_PS[:, None] < since_B[:, None])[:, :, None]
        scores_PBGMS.masked_fill_(hidden_PBMS[:, :, None], -torch.inf)
        scores = scores_PBGMS.view(p, b * groups, rows, PAGE)
        new_top = torch.maximum(top_BGM, scores.amax(-1).amax(0))
        scale = torch.exp(top_BGM - new_top)
        weights = torch.exp(scores - new_top[None, :, :, None])
        sums = weights.sum(-1)
        o_BGMD = o_BGMD * scale.unsqueeze(-1)
        total_BGM = total_BGM * scale
        values = v_PBGSD.view(p, b * groups, PAGE, dim)
        for i in range(p):
            o_BGMD = torch.baddbmm(o_BGMD, weights[i], values[i])
            total_BGM = total_BGM + sums[i]
        top_BGM = new_top
    o_BGMD = o_BGMD / total_BGM.unsqueeze(-1)
    return o_BGMD.view(b, groups, rows, dim)[:, :, : c * m].view(b, groups, c, m, dim).permute(0, 2, 1, 3, 4)


paged_attention = Op(SPEC, reference, "attention:paged_attention")
