"""Decode steps as captured graphs, from ids to drawn tokens, so that a step costs the host one copy and one launch.

A graph serves up to R rows of up to Q tokens (a token and its drafts); rows that are not there have length 0. What
changes between replays is one int32 tensor (see `ops.feed`); block tables stay on the device and get the pages that
rows gain; sampling parameters are sent when the rows change. Drawn tokens stay on the device, where the next step
finds them, and follow to the host.

Shapes: R rows, Q tokens a row, S = T = R Q draws, P pages of a row at most, H columns of the host (see `ops.feed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tritium.core import AHEAD, MOST_ENDS, RowPlan, StepPlan
from tritium.models.decoder import Decoder
from tritium.nn.batch import ForwardBatch, LayerCache
from tritium.ops.feed import HEADER, empty_table, feed
from tritium.ops.sampling import sample
from tritium.ops.spans import Spans, Table

ROWS = (1, 2, 4, 8, 16, 32, 64)
_BUFFERS = 4
"""Pinned buffers a graph goes round: more than steps are ever under way."""


@dataclass
class _Step:
    """A graph for R rows of Q tokens and all that it reads and writes."""

    rows: int
    tokens: int
    graph: torch.cuda.CUDAGraph
    batch: ForwardBatch
    """Kept because the graph reads and fills it."""
    host_BHR: torch.Tensor
    """Pinned; B buffers."""
    host_HR: torch.Tensor
    columns: dict[str, torch.Tensor]
    hidden_TH: torch.Tensor
    results_BS: torch.Tensor
    """Pinned: drawn tokens."""
    known: tuple[object, ...] = ()
    """Whose sampling parameters `columns` holds."""
    turn: int = 0


@dataclass
class Replay:
    """A graph that runs. `wait` gives drawn tokens [R][Q], None where the logits were not finite."""

    step: _Step
    plan: StepPlan
    results_S: torch.Tensor
    began: torch.cuda.Event
    ended: torch.cuda.Event
    copied: torch.cuda.Event
    before: torch.cuda.Event | None
    """End of the step before, where this one was launched while it ran."""
    gap_seconds: float | None = None
    """How long the device waited between the two, known once this one has ended."""

    def wait(self) -> list[list[int | None]]:
        self.copied.synchronize()
        if self.before is not None:
            self.gap_seconds = self.before.elapsed_time(self.began) / 1e3
            self.before = None
        found = [None if token < 0 else token for token in self.results_S.tolist()]
        width = self.step.tokens
        return [found[r * width : r * width + len(row.ids)] for r, row in enumerate(self.plan.rows)]

    def hidden_TH(self) -> torch.Tensor:
        """Of the plan's tokens, side by side."""
        places = [r * self.step.tokens + i for r, row in enumerate(self.plan.rows) for i in range(len(row.ids))]
        return self.step.hidden_TH[torch.tensor(places, device=self.step.hidden_TH.device)]


def sizes(max_rows: int, drafts: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows of graphs, up to the first number that holds `max_rows`, and tokens a row: one, and one with `drafts`."""
    rows = tuple(n for i, n in enumerate(ROWS) if i == 0 or ROWS[i - 1] < max_rows)
    return rows, (1, drafts + 1) if drafts else (1,)


class Graphs:
    """The graphs of one network. `serves` says which plans they can run."""

    def __init__(
        self, model: Decoder, caches: Sequence[LayerCache], *, max_rows: int, drafts: int, max_pages: int
    ) -> None:
        """Captures one graph for each of `sizes`."""
        self.model, self.caches = model, caches
        self.rows, self.tokens = sizes(max_rows, drafts)
        most = self.rows[-1] * self.tokens[-1]
        self._table = empty_table(self.rows[-1], 1, -(-max_pages // 16) * 16, model.device)
        self._pages: list[tuple[int, ...]] = [()] * self.rows[-1]
        self._drawn_D = torch.zeros(most, dtype=torch.int64, device=model.device)
        """Of the step that was launched last; -1 where the logits were not finite."""
        self._pool = torch.cuda.graph_pool_handle()
        self._steps: dict[tuple[int, int], _Step] = {}
        self._last: Replay | None = None
        # The largest first: the smaller ones then fit into the memory that its capture took.
        with torch.inference_mode():
            for rows in reversed(self.rows):
                for tokens in reversed(self.tokens):
                    self._steps[rows, tokens] = self._captured(rows, tokens)
        torch.cuda.synchronize(model.device)

    def serves(self, plan: StepPlan) -> bool:
        """Whether every row decodes, and draws by nothing but its own parameters."""
        return len(plan.rows) <= self.rows[-1] and all(
            row.samples
            and len(row.ids) == row.num_drafts + 1 <= self.tokens[-1]
            and row.constraint is None
            and not row.eos_ids
            and not (row.sampling.uses_penalties or row.sampling.logit_bias)
            and row.sampling.logprobs is None
            and (row.sampling.prompt_logprobs is None or row.start >= row.prompt_len)
            and len(row.snapshots) <= 1
            and len(row.ends) <= MOST_ENDS
            for row in plan.rows
        )

    def launch(self, plan: StepPlan) -> Replay:
        """Enqueues a step that `serves`. Ids that are `AHEAD` are those that the graph launched last draws."""
        rows = next(size for size in self.rows if size >= len(plan.rows))
        tokens = next(size for size in self.tokens if all(len(row.ids) <= size for row in plan.rows))
        step = self._steps[rows, tokens]
        step.turn = (step.turn + 1) % _BUFFERS
        host_HR = step.host_BHR[step.turn]
        host_HR.copy_(torch.tensor(self._columns(step, plan.rows), dtype=torch.int32).view(rows, -1).t())
        self._send_parameters(step, plan.rows)
        began, ended, copied = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        step.host_HR.copy_(host_HR, non_blocking=True)
        began.record()
        step.graph.replay()
        ended.record()
        results_S = step.results_BS[step.turn]
        results_S.copy_(self._drawn_D[: len(results_S)], non_blocking=True)
        copied.record()
        before = self._last.ended if self._last and any(row.ids == (AHEAD,) for row in plan.rows) else None
        self._last = Replay(step, plan, results_S, began, ended, copied, before)
        return self._last

    @torch.inference_mode()
    def capture_again(self, rows: int, tokens: int) -> None:
        """For tuning: one graph anew, with the launch parameters of now."""
        self._steps.pop((rows, tokens), None)
        self._steps[rows, tokens] = self._captured(rows, tokens)

    def _columns(self, step: _Step, rows: Sequence[RowPlan]) -> list[int]:
        out: list[int] = []
        index = {row.request_id: r for r, row in enumerate(self._last.plan.rows)} if self._last else {}
        for r, row in enumerate(rows):
            at, page = self._gained(r, row.pages)
            snap_at, snap_slot = row.snapshots[0] if row.snapshots else (0, -1)
            source = row.slot if row.source is None else row.source
            ids = row.ids
            if ids == (AHEAD,):
                assert self._last is not None
                ids = (-1 - index[row.request_id] * self._last.step.tokens,)
            out += (len(ids), row.start, source, row.slot, row.fold, row.num_drafts, snap_at, snap_slot, at, page)
            out += ids + (0,) * (step.tokens - len(ids))
            out += (*row.ends, *(-1,) * (MOST_ENDS - len(row.ends)))
        absent = (0,) * 7 + (-1, -1, 0) + (0,) * step.tokens + (-1,) * MOST_ENDS
        return out + list(absent) * (step.rows - len(rows))

    def _gained(self, r: int, pages: tuple[int, ...]) -> tuple[int, int]:
        """(place, page) that row r of the block table has to gain, (-1, 0) for none; sends all where it is more."""
        before, self._pages[r] = self._pages[r], pages
        if before is pages:
            return -1, 0
        if len(pages) == len(before) + 1 and pages[:-1] == before:
            return len(before), pages[-1]
        if pages != before:
            row_P = torch.tensor(pages, dtype=torch.int32).pin_memory()
            self._table.pages_RP[r, : len(pages)].copy_(row_P, non_blocking=True)
        return -1, 0

    def _send_parameters(self, step: _Step, rows: Sequence[RowPlan]) -> None:
        known = tuple((row.request_id, row.seed, id(row.sampling)) for row in rows)
        if known == step.known:
            return
        step.known = known
        spare = step.rows - len(rows)
        for name, default in (("temperature", 0.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            values = [getattr(row.sampling, name) for row in rows] + [default] * spare
            self._send(step, name, values)
        self._send(step, "seed", [row.seed for row in rows] + [0] * spare)

    @staticmethod
    def _send(step: _Step, name: str, values: list[float] | list[int]) -> None:
        column_S = step.columns[f"{name}_S"]
        values_R = torch.tensor(values, dtype=column_S.dtype).repeat_interleave(step.tokens)
        column_S.copy_(values_R.pin_memory(), non_blocking=True)

    def _captured(self, rows: int, tokens: int) -> _Step:
        device, draws = self.model.device, rows * tokens
        fresh = empty_table(rows, tokens, 1, device)
        table = Table._make([*fresh[:10], self._table.pages_RP[:rows], *fresh[11:]])
        spans = Spans((tokens,) * rows, (0,) * rows, (0,) * rows, ((0,),) * rows, device)
        spans.__dict__["table"] = table
        columns = {f"{name}_S": torch.zeros(draws, dtype=dtype, device=device) for name, dtype in _COLUMNS.items()}
        columns["top_p_S"].fill_(1.0)
        height = HEADER + tokens + MOST_ENDS
        host_HR = torch.zeros(height, rows, dtype=torch.int32, device=device)
        host_HR[7:9] = -1
        ids_T = torch.zeros(draws, dtype=torch.int64, device=device)

        batch = ForwardBatch(ids_T, spans, ids_T)

        def body() -> torch.Tensor:
            feed(host_HR=host_HR, drawn_D=self._drawn_D, table=table, ids_T=ids_T, next_S=columns["position_S"])
            hidden_TH = self.model.forward(batch, self.caches)
            sample(logits_SV=self.model.logits(hidden_TH), token_S=self._drawn_D[:draws], **columns)
            return hidden_TH

        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            body()  # compiles, and lets libraries make their workspaces
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            hidden_TH = body()
        return _Step(
            rows, tokens, graph, batch,
            torch.zeros(_BUFFERS, height, rows, dtype=torch.int32, pin_memory=True), host_HR, columns, hidden_TH,
            torch.zeros(_BUFFERS, draws, dtype=torch.int64, pin_memory=True),
        )  # fmt: skip


_COLUMNS = {"temperature": torch.float64, "top_k": torch.int64, "top_p": torch.float64, "min_p": torch.float64,
            "seed": torch.int64, "position": torch.int64}  # fmt: skip
