"""Random steps of `delta_net`, kernel against reference: drafts accepted or not, snapshots, states resumed from them,
rows that are absent, as they come or as a CUDA graph lays them out."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from tritium.ops.delta_net import delta_net
from tritium.ops.spans import Spans, Table

NK, NV, DK, DV, ROWS, STEPS = 1, 2, 16, 16, 3, 6
CHANNELS = 2 * NK * DK + NV * DV
CPU = torch.device("cpu")


def as_in_a_graph(spans: Spans, rows: list[int], tokens: int, device: str) -> Spans:
    """`spans` of the rows present, among ROWS of `tokens` places each; host numbers are those of a graph."""
    real, total = spans.table, ROWS * tokens
    columns = {name: torch.zeros(ROWS, dtype=torch.int32) for name in Table._fields[:10]}
    columns["starts_R"] = torch.arange(0, total, tokens, dtype=torch.int32)
    for name in Table._fields[1:10]:
        columns[name][rows] = getattr(real, name)
    offset_T, row_T = torch.arange(total) % tokens, torch.arange(total) // tokens
    position_T = torch.where(offset_T < columns["lengths_R"][row_T], columns["contexts_R"][row_T] + offset_T, -1)
    rest = (torch.ones(ROWS, 1, dtype=torch.int32), row_T.int(), position_T.int())
    fixed = Spans((tokens,) * ROWS, (0,) * ROWS, (0,) * ROWS, ((1,),) * ROWS, torch.device(device))
    fixed.__dict__["table"] = Table(*(x.to(device) for x in (*columns.values(), *rest)))
    return fixed


def check(seed: int, graphs: bool, most: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`most` drafts a row; with `graphs`, steps of one token a row and of 1 + `most`, else any. Places that nobody
    writes stay NaN in both forms."""
    from tritium.ops.kernels import delta_net as kernels

    def parameters(name: str, x: torch.Tensor, **key: int) -> dict[str, int]:
        return {"PIECES": 2 if name == "delta_net.step" else 1, "num_warps": 4, "num_stages": 1, "pdl": 0}

    monkeypatch.setattr(kernels, "parameters", parameters)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weights = {"conv_CW": noise(CHANNELS, 4), "A_log_N": noise(NV), "dt_bias_N": noise(NV), "norm_V": noise(DV)}
    shapes = {"state": (NV, DK, DV), "conv": (4 + most, CHANNELS), "pending": (most, NV * (DK + DV + 2))}
    pools = {name: torch.full((4 * ROWS + 1, *shape), float("nan")) for name, shape in shapes.items()}
    on_device: dict[str, Any] = {name: x.to(device, copy=True) for name, x in {**weights, **pools}.items()}
    at, fold, source = [0] * ROWS, [0] * ROWS, [r + 1 for r in range(ROWS)]
    for _ in range(STEPS):
        rows = sorted(rng.sample(range(ROWS), rng.randint(1, ROWS)))
        graph_tokens = rng.choice((1, 1 + most)) if graphs else 0
        drafts = [rng.randint(0, graph_tokens - 1 if graphs else most) for _ in rows]
        sure = [1 if fold[r] or graphs else rng.randint(1, 6) for r in rows]
        spare = [ROWS + 1 + 2 * r + (source[r] == ROWS + 1 + 2 * r) for r in rows]  # not the slot that it comes from
        snapshots = [((at[r] + rng.randint(1, n), slot),) if rng.random() < 0.4 else ()
                     for r, n, slot in zip(rows, sure, spare)]  # fmt: skip
        slots = [r + 1 + rng.randint(0, 1) * 3 * ROWS for r in rows]
        spans = Spans(
            tuple(s + d for s, d in zip(sure, drafts)), tuple(at[r] for r in rows), tuple(slots),
            ((1,),) * len(rows), CPU, tuple(source[r] for r in rows), tuple(fold[r] for r in rows), tuple(drafts),
            tuple(snapshots),
        )  # fmt: skip
        x_TE = noise(spans.num_tokens, CHANNELS + NV * (DV + 2))
        common: dict[str, Any] = {"eps": 1e-6, "key_heads": NK}
        want = delta_net.reference(x_TE=x_TE, **weights, **pools, **common, spans=spans)
        places = torch.arange(spans.num_tokens)
        theirs, x_there = replace(spans, device=torch.device(device)), x_TE
        if graph_tokens:
            places = torch.cat([r * graph_tokens + torch.arange(n) for r, n in zip(rows, spans.lengths)])
            theirs = as_in_a_graph(spans, rows, graph_tokens, device)
            x_there = torch.full((ROWS * graph_tokens, x_TE.shape[1]), float("nan"))
            x_there[places] = x_TE
        y_TM = delta_net.kernel(x_TE=x_there.to(device), **on_device, **common, spans=theirs).cpu()
        expected = torch.zeros_like(y_TM)
        expected[places] = want
        torch.testing.assert_close(y_TM, expected, rtol=2e-4, atol=2e-5)
        for name, pool in pools.items():
            torch.testing.assert_close(on_device[name].cpu()[1:], pool[1:], rtol=2e-4, atol=2e-5, equal_nan=True)
        for r, s, d, slot, taken in zip(rows, sure, drafts, slots, snapshots):
            fold[r] = rng.randint(0, d)
            at[r] += s + fold[r]
            source[r] = taken[0][1] if taken and not fold[r] and taken[0][0] == at[r] else slot
