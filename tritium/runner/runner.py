"""Executes a plan: batch, forward, sample.

Shapes: T tokens, S rows that sample, H hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from tritium.core import RowPlan, RowResult, StepPlan, StepResult, TokenLogprob
from tritium.models.decoder import Decoder
from tritium.nn.batch import ForwardBatch, LayerCache
from tritium.sampling import Sampler, prompt_logprobs

Observer = Callable[[StepPlan, torch.Tensor], None]
"""Called with the plan and the logits after every one of its tokens, [T, V] float32."""


class Runner:
    """Holds the network and its pools; knows nothing of requests beyond the rows of a plan."""

    def __init__(self, model: Decoder, caches: Sequence[LayerCache], *, probe_drafts: bool = False) -> None:
        self.model = model
        self.caches = caches
        self.sampler = Sampler()
        self.probe_drafts = probe_drafts and model.mtp is not None
        self.observer: Observer | None = None
        self.seconds = {"prepare": 0.0, "forward": 0.0, "sample": 0.0, "draft": 0.0}
        """Time spent in each phase since the start."""

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        with self._timed("prepare"):
            batch = ForwardBatch.from_plan(plan, self.model.device)
        with self._timed("forward"):
            hidden_TH = self.model.forward(batch, self.caches)
            last_S = batch.spans.last_R[list(batch.samples)]
            logits_SV = self.model.logits(hidden_TH[last_S])
        if self.observer is not None:
            self.observer(plan, self.model.logits(hidden_TH))
        rows = [plan.rows[i] for i in batch.samples]
        with self._timed("sample"):
            draws = dict(zip(batch.samples, self.sampler.sample(rows, logits_SV)))
            told = {
                i: self._prompt_logprobs(row, hidden_TH[batch.spans.starts[i] :][: len(row.ids)])
                for i, row in enumerate(plan.rows)
                if row.sampling.prompt_logprobs is not None and row.start < row.prompt_len
            }
        drafts: dict[int, int] = {}
        if self.probe_drafts:
            with self._timed("draft"):
                drafts = self._drafts(plan, batch, hidden_TH, {i: draw.token for i, draw in draws.items()})
        return StepResult(
            tuple(
                RowResult(
                    row.request_id,
                    token=draws[i].token if i in draws else None,
                    logprob=draws[i].logprob if i in draws else None,
                    prompt_logprobs=told.get(i, ()),
                    draft=drafts.get(i),
                )
                for i, row in enumerate(plan.rows)
            )
        )

    def _prompt_logprobs(self, row: RowPlan, hidden_TH: torch.Tensor) -> tuple[TokenLogprob, ...]:
        """About the prompt tokens that follow each of the row's ids."""
        following = (row.ids[1:] + row.next_ids)[: row.prompt_len - 1 - row.start]
        k = row.sampling.prompt_logprobs
        assert k is not None
        return tuple(prompt_logprobs(self.model.logits(hidden_TH[: len(following)]), following, k))

    def _drafts(
        self, plan: StepPlan, batch: ForwardBatch, hidden_TH: torch.Tensor, tokens: dict[int, int | None]
    ) -> dict[int, int]:
        """The MTP head's greedy guess for every row that sampled. Runs over all tokens, so that its KV is complete."""
        following: list[int] = []
        for i, row in enumerate(plan.rows):
            token = tokens.get(i)
            known = row.next_ids or (() if token is None else (token,))
            following += row.ids[1:] + (known or row.ids[-1:])
        drafted_TH = self.model.draft_hidden(
            hidden_TH, batch.spans.tensor(following), batch.spans, self.caches[-1]
        )
        rows = [i for i, token in tokens.items() if token is not None]
        if not rows:
            return {}
        guesses = self.model.logits(drafted_TH[batch.spans.last_R[rows]]).argmax(-1).tolist()
        return dict(zip(rows, guesses))

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - begin
