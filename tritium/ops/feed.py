"""What a step begins with: rows of the embedding; and what a decode step of a graph is fed with, the rows as the host
planned them, with ids that it does not know yet.

    x[t] = embed[id[t]]      in float32 (float64 in float64 networks): the residual stream

A graph keeps one `Table`, ids and positions for R rows of Q tokens; before each replay the host sends one int32 tensor,
and this op fills them from it:

    id[r, i]  = given[r, i] if it is ≥ 0, else max(0, drawn[-1 - given[r, i]]): a token that the step before draws
    a row whose drawn id is among its `ends` is over: its length becomes 0, so that nothing is computed or stored for it
    pages[r, at] = page, where at ≥ 0: the page that a row was given since the last step

Shapes: R rows, Q tokens a row, D drawn tokens, E = MOST_ENDS; host_HR int32 with H = HEADER + Q + E columns: length,
context, source, slot, fold, drafts, snap_at, snap_slot, page_at, page; Q ids; E ids that end a row (-1: none). ids_T
int64 and next_S int64 (positions of the tokens to be drawn), T = S = R Q. V vocabulary, K hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from tritium.core import MOST_ENDS
from tritium.ops.spans import Table
from tritium.ops.spec import Dims, Op, OpSpec, randn, wide

HEADER = 10


def empty_table(rows: int, tokens: int, width: int, device: torch.device) -> Table:
    """A table for `rows` rows of `tokens` tokens, every row absent."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    starts_R = torch.arange(0, rows * tokens, tokens, dtype=torch.int32, device=device)
    row_T = torch.arange(rows, dtype=torch.int32, device=device).repeat_interleave(tokens)
    columns = [zeros(rows) for _ in range(8)]
    absent_R, absent_T = zeros(rows) - 1, zeros(rows * tokens) - 1
    return Table._make((starts_R, *columns, absent_R, zeros(rows, width), row_T, absent_T))


def _inputs(dims: Dims, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    rows, tokens = dims["R"], dims["Q"]
    host_HR = torch.randint(1, 60, (HEADER + tokens + MOST_ENDS, rows), generator=generator, dtype=torch.int32)
    host_HR[0] = torch.randint(0, tokens + 1, (rows,), generator=generator)
    host_HR[8] = torch.randint(-1, 9, (rows,), generator=generator)
    host_HR[HEADER : HEADER + tokens : 2] *= -1
    return {
        "host_HR": host_HR,
        "drawn_D": torch.randint(-1, 60, (64,), generator=generator),
        "table": empty_table(rows, tokens, 9, torch.get_default_device()),
        "ids_T": torch.zeros(rows * tokens, dtype=torch.int64),
        "next_S": torch.zeros(rows * tokens, dtype=torch.int64),
    }


SPEC = OpSpec(
    name="feed",
    cases=({"R": 1, "Q": 1}, {"R": 5, "Q": 3}, {"R": 33, "Q": 2}),
    inputs=_inputs,
    results=lambda arguments, returned: {
        **arguments["table"]._asdict(), "ids_T": arguments["ids_T"], "next_S": arguments["next_S"]
    },
    bytes_moved=lambda d, size: size * d["R"] * (HEADER + d["Q"] + MOST_ENDS + 12),
    flops=lambda d: d["R"] * d["Q"] * MOST_ENDS,
    dtypes=(torch.float32,),
)


def reference(
    *, host_HR: torch.Tensor, drawn_D: torch.Tensor, table: Table, ids_T: torch.Tensor, next_S: torch.Tensor
) -> None:
    """Fills `table`, `ids_T` and `next_S` in place."""
    rows = host_HR.shape[1]
    tokens = len(ids_T) // rows
    given_QR, ends_ER = host_HR[HEADER : HEADER + tokens].long(), host_HR[HEADER + tokens :].long()
    waits_QR = given_QR < 0
    id_QR = torch.where(waits_QR, drawn_D[(-1 - given_QR).clamp_min(0)].clamp_min(0), given_QR)
    over_R = (waits_QR & (id_QR[:, None] == ends_ER[None]).any(1)).any(0)
    lengths_R = torch.where(over_R, 0, host_HR[0])
    for column, values in zip((*table[1:7], *table[8:10]), (lengths_R, *host_HR[1:8]), strict=True):
        column.copy_(values)
    offset_QR = torch.arange(tokens, device=host_HR.device)[:, None].expand(tokens, rows)
    position_QR = host_HR[1] + offset_QR
    table.position_T.copy_(torch.where(offset_QR < lengths_R, position_QR, -1).t().reshape(-1))
    ids_T.copy_(id_QR.t().reshape(-1))
    next_S.copy_((position_QR + 1).t().reshape(-1))
    given = host_HR[8] >= 0
    at_R1 = host_HR[8].clamp_min(0).long()[:, None]
    new_R1 = torch.where(given[:, None], host_HR[9][:, None], table.pages_RP.gather(1, at_R1))
    table.pages_RP.scatter_(1, at_R1, new_R1)


feed = Op(SPEC, reference, "feed:feed")


EMBED_SPEC = OpSpec(
    name="embed",
    cases=({"T": 1, "V": 9, "K": 64}, {"T": 5, "V": 33, "K": 1100}),
    inputs=lambda d, dtype, generator: {
        "ids_T": torch.randint(d["V"], (d["T"],), generator=generator),
        "embed_VK": randn(generator, d["V"], d["K"], dtype=dtype),
        "clear_C": torch.ones(50, dtype=torch.int32),
    },
    results=lambda arguments, returned: {"x_TK": returned, "clear_C": arguments["clear_C"]},
    bytes_moved=lambda d, size: d["T"] * d["K"] * (size + 4),
    flops=lambda d: d["T"] * d["K"],
)


def embed_reference(*, ids_T: torch.Tensor, embed_VK: torch.Tensor, clear_C: torch.Tensor) -> torch.Tensor:
    """x_TK; sets `clear_C` (int32), what the layers of one step leave each other, to 0."""
    clear_C.zero_()
    return functional.embedding(ids_T, embed_VK).to(wide(embed_VK.dtype))


embed = Op(EMBED_SPEC, embed_reference, "feed:embed")
