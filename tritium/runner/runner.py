"""Executes a plan: batch, forward, sample, verify drafts, propose the next ones.

Shapes: T tokens, S draws, H hidden, V vocabulary.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from tritium.core import RowPlan, RowResult, Site, StepPlan, StepResult, TokenLogprob
from tritium.draft import mtp
from tritium.models.decoder import Decoder
from tritium.nn.batch import AttentionCache, ForwardBatch, LayerCache
from tritium.runner.states import States
from tritium.sampling import Sampled, Sampler, prompt_logprobs

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
        self.sampler = Sampler()
        self.run_head = run_head and model.mtp is not None
        self.force_acceptance = force_acceptance
        self.observer: Observer | None = None
        self.seconds = {"prepare": 0.0, "forward": 0.0, "sample": 0.0, "draft": 0.0}
        """Time spent in each phase since the start."""

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        with self._timed("prepare"):
            self.states.move(plan.moves)
            self._copy_pages([row.copy_page for row in plan.rows if row.copy_page])
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
        tokens = [tuple(draw.token for draw in draws if draw.token is not None) for draws in drawn]
        drafts: Sequence[tuple[int, ...]] = [()] * len(tokens)
        if self.run_head:
            with self._timed("draft"):
                drafts = mtp.propose(self.model, self.caches[-1], self._draw, plan, batch, hidden_TH, tokens)
        return StepResult(
            tuple(
                RowResult(
                    row.request_id,
                    tokens=tokens[i],
                    logprobs=tuple(draw.logprob for draw in drawn[i] if draw.logprob is not None),
                    prompt_logprobs=told.get(i, ()),
                    drafts=drafts[i],
                )
                for i, row in enumerate(plan.rows)
            )
        )

    def _verified(self, plan: StepPlan, logits_SV: torch.Tensor) -> list[list[Sampled]]:
        """Each row's draws up to the first that is not the draft there: the token that row really has next.

        A draw depends on (seed, position) and the logits alone, so these are the tokens of a run without drafts.
        """
        sites = [row.site(i) for row in plan.rows if row.samples for i in range(row.num_drafts + 1)]
        draws = iter(self.sampler.sample(sites, logits_SV))
        out: list[list[Sampled]] = []
        for row in plan.rows:
            drafts = row.drafts
            own = [next(draws) for _ in range(row.num_drafts + 1)] if row.samples else []
            right = next((i for i, token in enumerate(drafts) if own[i].token != token), row.num_drafts)
            out.append(own[: right + 1])
            if self.force_acceptance is not None and drafts:
                out[-1] = _forced(row, drafts, own, self.force_acceptance)
        return out

    def _draw(self, sites: Sequence[Site], logits_SV: torch.Tensor) -> list[int | None]:
        return [draw.token for draw in self.sampler.sample(sites, logits_SV)]

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
        return tuple(prompt_logprobs(self.model.logits(hidden_TH[: len(following)]), following, k))

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - begin


def _forced(row: RowPlan, drafts: Sequence[int], own: Sequence[Sampled], rate: float) -> list[Sampled]:
    """Drafts accepted at `rate`, by coins that depend on the request's seed and the position: wrong tokens, for
    benchmarks only."""
    first = row.stop - len(drafts)
    coins = (random.Random(row.seed * 1_000_003 + first + i).random() for i in range(len(drafts)))
    right = next((i for i, coin in enumerate(coins) if coin >= rate), len(drafts))
    return [replace(own[i], token=drafts[i]) for i in range(right)] + [own[right]]
