"""Executes plans: batch, forward, sample, verify drafts, propose the next ones; decode steps from graphs on a GPU.

Shapes: T tokens, S draws, H hidden, V vocabulary.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from tritium.core import PROMPT_LOGITS, SHORT_ROW, RowPlan, RowResult, Site, StepPlan, StepResult, TokenLogprob
from tritium.draft import mtp
from tritium.hw.tuned import Key, trial
from tritium.models.decoder import Decoder
from tritium.nn.batch import AttentionCache, ForwardBatch, LayerCache
from tritium.ops.sampling import call_every_form
from tritium.ops.spans import Spans
from tritium.runner.flight import Flight, in_order, landed
from tritium.runner.graphs import Graphs, Replay, sizes
from tritium.runner.states import States
from tritium.sampling import Sampled, draw, prompt_logprobs

Lengths = tuple[int, ...]
"""Tokens of each row of a step."""
Observer = Callable[[StepPlan, torch.Tensor], None]
"""Called with the plan and the logits after every one of its tokens, [T, V] float32."""


class Runner:
    """Holds the network and its pools; knows nothing of requests beyond the rows of a plan."""

    def __init__(self, model: Decoder, caches: Sequence[LayerCache], *, run_head: bool = False,
                 force_acceptance: float | None = None, host_places: int = 0) -> None:
        """`run_head`: let the MTP head follow and propose where rows want drafts; needs a checkpoint that has one.
        `force_acceptance`: for benchmarks only, accept drafts at this rate whatever is right. `host_places`: of
        checkpoints in host memory."""
        self.model = model
        self.caches = caches
        self.states = States(caches, places=host_places)
        self.run_head = run_head and model.mtp is not None
        self.force_acceptance = force_acceptance
        self.graphs: Graphs | None = None
        """Decode steps; without them, and for all other steps, ops are launched one by one."""
        self.observer: Observer | None = None
        self.seconds = {"prepare": 0.0, "forward": 0.0, "sample": 0.0, "draft": 0.0, "gap": 0.0}
        """Time spent in each phase since the start; gap: the device waited between two graphs."""
        self.gaps: deque[float] = deque(maxlen=1024)
        """The last of these, in seconds."""

    @torch.inference_mode()
    def compile(self, max_rows: int, drafts: int, max_tokens: int, workers: int, also: Iterable[Lengths] = ()) -> None:
        """Compiles all kernels that steps of up to `max_rows` decode rows and `max_tokens` tokens need, `workers` at a
        time, so that none is compiled on a request; what Triton's cache has is not compiled again. Then runs a short
        prompt some times, so that the first request is not the one to load libraries and fill caches.

        A kernel's form goes by the power of two that holds the step's tokens, that which holds its draws, or those that
        hold its short rows and the longest of them; none goes by two of these. So each is met by itself. `also`:
        lengths of rows, of steps through the first layer of each kind alone."""
        from tritium.ops.kernels.launch import compiled_ahead

        rows, tokens = sizes(max_rows, drafts)
        steps = {(n,) * r for r in rows for n in tokens}
        steps |= {(n, *(1,) * (r - 1)) for r in _powers(max_rows) for n in _powers(SHORT_ROW)}
        steps |= {(min(n, max_tokens),) for n in _powers(max_tokens)}
        with compiled_ahead(workers):
            for lengths in sorted(steps):
                self._walk(lengths, max(PROMPT_LOGITS, rows[-1] * tokens[-1]))
            for lengths in also:
                self._walk(lengths, 1, self.model.config.first_of_each_kind)
        for _ in range(8):
            self._walk((64,), 1, range(len(self.model.layers)))

    @torch.inference_mode()
    def compile_for(self, lengths: Lengths, trials: Iterable[Mapping[Key, dict[str, Any]]], workers: int) -> None:
        """For tuning: compiles a step with rows of these lengths for each of several sets of launch parameters."""
        from tritium.ops.kernels.launch import compiled_ahead

        with compiled_ahead(workers, ignore_errors=True):
            for parameters in trials:
                with trial(parameters):
                    self._walk(lengths, len(lengths))

    def _walk(self, lengths: Lengths, draws: int, layers: Sequence[int] = ()) -> None:
        """Calls all ops of a step, of the layers up to where each kind has been there, or of these, on page 0 and slot
        0. Layers in a row: what one leaves decides the form of the next one's kernels."""
        config, device = self.model.config, self.model.device
        layers = layers or range(min(max(2, max(config.first_of_each_kind) + 1), len(self.model.layers)))
        nothing = (0,) * len(lengths)
        spans = Spans(lengths, nothing, nothing, ((0,) * (16 + max(lengths) // 64),) * len(lengths), device)
        ids_T = torch.zeros(spans.num_tokens, dtype=torch.int64, device=device)
        hidden_TH = self.model.forward(ForwardBatch(ids_T, spans, ids_T), [self.caches[i] for i in layers], layers)
        call_every_form(self.model.logits(hidden_TH[:draws]))
        if self.run_head:
            self.model.draft_hidden(hidden_TH, ids_T, spans, self.caches[-1])

    def capture(self, max_rows: int, drafts: int, max_pages: int) -> None:
        """Makes the graphs."""
        self.graphs = Graphs(self.model, self.caches, max_rows=max_rows, drafts=drafts, max_pages=max_pages)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, after: Flight | None = None) -> Flight:
        """Starts a step. `after`: the one before it, where `plan` was made one step ahead."""
        with self._timed("prepare"):
            self.states.move(plan.moves)
            self._copy_pages([row.copy_page for row in plan.rows if row.copy_page])
        if self.graphs is not None and self.observer is None and self.graphs.serves(plan):
            with self._timed("prepare"):
                replay = self.graphs.launch(plan)
            return Flight(plan, lambda: self._landed(replay), under_way=True)
        known = landed(plan, after)
        result = in_order(plan, self._computed(known) if known.rows else [])
        return Flight(plan, lambda: result, under_way=False)

    @torch.inference_mode()
    def _landed(self, replay: Replay) -> StepResult:
        """What a graph found."""
        with self._timed("forward"):
            drawn = replay.wait()
        if replay.gap_seconds is not None:
            self.seconds["gap"] += replay.gap_seconds
            self.gaps.append(replay.gap_seconds)
        plan = replay.plan
        draws = [self._accepted(row, [Sampled(token) for token in tokens]) for row, tokens in zip(plan.rows, drawn)]
        drafts: Sequence[tuple[int, ...]] = [()] * len(plan.rows)
        if self.run_head and any(row.want_drafts for row in plan.rows):
            batch = ForwardBatch.from_plan(plan, self.model.device)
            drafts = self._proposed(plan, batch, replay.hidden_TH(), draws)
        return in_order(plan, _results(plan, draws, drafts))

    def _computed(self, plan: StepPlan) -> list[RowResult]:
        """A step without a graph: launched op by op, and waited for."""
        with self._timed("prepare"):
            batch = ForwardBatch.from_plan(plan, self.model.device)
        with self._timed("forward"):
            hidden_TH = self.model.forward(batch, self.caches)
            logits_SV = self.model.logits(hidden_TH[batch.draws_S])
        if self.observer is not None:
            self.observer(plan, self.model.logits(hidden_TH))
        with self._timed("sample"):
            drawn = self._verified(plan, logits_SV)
            told = {
                i: self._prompt_logprobs(row, hidden_TH[batch.spans.starts[i] :])
                for i, row in enumerate(plan.rows)
                if row.sampling.prompt_logprobs is not None and row.start < row.prompt_len
            }
        drafts = self._proposed(plan, batch, hidden_TH, drawn) if self.run_head else [()] * len(drawn)
        return _results(plan, drawn, drafts, told)

    def _proposed(
        self, plan: StepPlan, batch: ForwardBatch, hidden_TH: torch.Tensor, drawn: Sequence[Sequence[Sampled]]
    ) -> Sequence[tuple[int, ...]]:
        with self._timed("draft"):
            tokens = [_tokens(draws) for draws in drawn]
            return mtp.propose(self.model, self.caches[-1], _drawn, plan, batch, hidden_TH, tokens)

    def _verified(self, plan: StepPlan, logits_SV: torch.Tensor) -> list[list[Sampled]]:
        sites = [row.site(i) for row in plan.rows if row.samples for i in range(row.num_drafts + 1)]
        draws = iter(draw(sites, logits_SV))
        return [
            self._accepted(row, [next(draws) for _ in range(row.num_drafts + 1)] if row.samples else [])
            for row in plan.rows
        ]

    def _accepted(self, row: RowPlan, own: list[Sampled]) -> list[Sampled]:
        """A row's draws up to the first that is not the draft there: the token that the row really has next.

        A draw depends on (seed, position) and the logits alone, so these are the tokens of a run without drafts.
        """
        drafts = row.drafts
        right = next((i for i, token in enumerate(drafts) if own[i].token != token), row.num_drafts)
        if self.force_acceptance is not None and drafts:
            return _forced(row, drafts, own, self.force_acceptance)
        return own[: right + 1]

    def _copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Pages of all attention layers, the MTP head's included, from first to second."""
        if not copies:
            return
        source, target = (list(ids) for ids in zip(*copies, strict=True))
        for cache in self.caches:
            if isinstance(cache, AttentionCache):
                for pages in cache:
                    pages[target] = pages[source]

    def _prompt_logprobs(self, row: RowPlan, hidden_TH: torch.Tensor) -> tuple[TokenLogprob, ...]:
        """About the prompt tokens that follow each of the row's ids."""
        following = (row.ids[1:] + row.next_ids)[: row.prompt_len - 1 - row.start]
        k = row.sampling.prompt_logprobs
        assert k is not None
        told: list[TokenLogprob] = []
        for at in range(0, len(following), PROMPT_LOGITS):
            next_ids = following[at : at + PROMPT_LOGITS]
            told += prompt_logprobs(self.model.logits(hidden_TH[at : at + len(next_ids)]), next_ids, k)
        return tuple(told)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - begin


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... up to the first that is not below `most`."""
    return [2**i for i in range((most - 1).bit_length() + 1)]


def _drawn(sites: Sequence[Site], logits_SV: torch.Tensor) -> list[int | None]:
    return [one.token for one in draw(sites, logits_SV)]


def _tokens(draws: Sequence[Sampled]) -> tuple[int, ...]:
    return tuple(draw.token for draw in draws if draw.token is not None)


def _results(
    plan: StepPlan,
    drawn: Sequence[Sequence[Sampled]],
    drafts: Sequence[tuple[int, ...]],
    told: Mapping[int, tuple[TokenLogprob, ...]] | None = None,
) -> list[RowResult]:
    return [
        RowResult(
            row.request_id,
            tokens=_tokens(drawn[i]),
            logprobs=tuple(draw.logprob for draw in drawn[i] if draw.logprob is not None),
            prompt_logprobs=(told or {}).get(i, ()),
            drafts=drafts[i],
        )
        for i, row in enumerate(plan.rows)
    ]


def _forced(row: RowPlan, drafts: Sequence[int], own: Sequence[Sampled], rate: float) -> list[Sampled]:
    """Drafts accepted at `rate`, by coins that depend on the request's seed and the position: wrong tokens, for
    benchmarks only."""
    first = row.stop - len(drafts)
    coins = (random.Random(row.seed * 1_000_003 + first + i).random() for i in range(len(drafts)))
    right = next((i for i, coin in enumerate(coins) if coin >= rate), len(drafts))
    return [replace(own[i], token=drafts[i]) for i in range(right)] + [own[right]]
