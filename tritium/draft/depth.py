"""How many drafts each request gets: what acceptance was measured to bring, against what a draft was measured to cost.

With a_i the measured chance that a request's i-th draft is right given that those before it were, k drafts bring
E(k) = 1 + a_1 + a_1 a_2 + ... tokens a step. A step over R decode rows with D drafts and P pages of context costs

    T = w_0 + w_1 R + w_2 D + w_3 P        and guessing       H = v_0 passes + v_1 guesses

whose weights are fitted to the steps as they come, old ones fading. The batch takes the k that makes the most tokens a
second, Σ_r E_r(k) / (T + H), and a request fewer where its own k-th draft brings less than the seconds that it costs
are worth. No drafts at all is the choice to beat, by a margin; from there the way back is a probe: a few drafts for one
request, ever more rarely while they do not pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import itemgetter, mul

import numpy as np

from tritium.core import Request, RowPlan, StepPlan, StepResult

_MARGIN = 1.04
"""How much faster speculation must look than none, so that noise does not choose it."""
_FADE = 0.98
"""What an old step counts, for each step that follows it."""
_FADE_TRIALS = 0.95
_PRIOR_TRIALS = 6.0
"""Trials of a request that weigh as much as what others' acceptance says about it."""
_DRIFT = 0.005
_OPTIMISM = 0.8
"""Acceptance of each position while nothing is known."""
_PROBE_STEPS, _PROBE_EVERY, _PROBE_SELDOM = 4, 256, 4096
"""Steps of a probe, and steps from one to the next: at first, and at most."""
_BASELINE_EVERY = 40
"""Steps with drafts from one that verifies none to the next, for batches of about this size and context."""
_LEARNING = (0, 0, 0, 1, 1, 1, 1)
"""Depths of the very first steps."""


class DepthPolicy:
    """Depths of all requests, from 0 to `most`, after every step anew; a `Proposer` of what the head guessed."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.seconds_saved = 0.0
        """What the tokens so far would have cost without drafts, less what they cost; both by the cost model."""
        self._forward, self._head = _Fit(4), _Fit(2)
        self._overall = Acceptance([_OPTIMISM] * most, _PRIOR_TRIALS / 2, fade=0.995)
        self._requests: dict[str, Acceptance] = {}
        self._depths: dict[str, int] = {}
        self._batch_depth = most
        self._idle_steps, self._probe_every = 0, _PROBE_EVERY
        self._steps = 0
        self._baselines: dict[tuple[int, int], int] = {}
        self._is_baseline = False

    def depth(self, request: Request) -> int:
        """Drafts to propose for the request now, and to verify at most."""
        return self._depths.get(request.id, self._batch_depth)

    def propose(self, request: Request, most: int) -> Sequence[int]:
        """The head's drafts, but for a step that shows what going without costs."""
        return () if self._is_baseline else request.drafts[:most]

    def forget(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def observe(self, plan: StepPlan, result: StepResult, seconds: float, head_seconds: float) -> None:
        """What a step brought and took, `head_seconds` of it for guessing."""
        decode = [row for row in plan.rows if row.samples and len(row.ids) == row.num_drafts + 1]
        overall = self._overall.rates()
        for row, out in zip(plan.rows, result.rows, strict=True):
            if out.tokens:
                self._acceptance(row.request_id).add(row.num_drafts, len(out.tokens) - 1)
                self._acceptance(row.request_id).drift(row.num_drafts, overall)
                self._overall.add(row.num_drafts, len(out.tokens) - 1)
        if decode and len(decode) == len(plan.rows):
            guesses = [row.want_drafts for row in decode]
            self._forward.add(_features(decode, sum(row.num_drafts for row in decode)), seconds - head_seconds)
            if any(guesses):
                self._head.add((max(guesses), sum(guesses)), head_seconds)
            tokens = sum(len(out.tokens) for out in result.rows)
            self.seconds_saved += tokens / len(decode) * self._forward.predict(_features(decode, 0)) - seconds
        rows = [row for row in plan.rows if row.samples]
        if not rows:
            return
        mixed = len(decode) < len(plan.rows)
        if mixed:
            # Beside a prompt's chunk drafts are nearly free, and its time is all but this step's.
            drafts = sum(row.num_drafts for row in plan.rows)
            self._take(self._chosen(rows, seconds - head_seconds - drafts * self._forward.weight(2)))
        elif self._forward.known < len(_LEARNING):
            self._take(dict.fromkeys((row.request_id for row in rows), _LEARNING[self._forward.known]))
        else:
            self._take(self._chosen(rows, self._forward.predict(_features(rows, 0))))
            self._probe()
        self._steps += 1
        kind = len(rows).bit_length(), (sum(len(row.pages) for row in rows) // len(rows)).bit_length()
        since = self._steps - self._baselines.get(kind, -_BASELINE_EVERY)
        self._is_baseline = not mixed and self._batch_depth > 0 and since >= _BASELINE_EVERY
        if self._is_baseline or not any(row.num_drafts for row in rows):
            self._baselines[kind] = self._steps

    def _take(self, depths: dict[str, int]) -> None:
        self._depths, self._batch_depth = depths, max(depths.values())

    def _acceptance(self, request_id: str) -> Acceptance:
        if request_id not in self._requests:
            self._requests[request_id] = Acceptance(self._overall.rates(), _PRIOR_TRIALS, fade=_FADE_TRIALS)
        return self._requests[request_id]

    def _chosen(self, rows: Sequence[RowPlan], seconds: float) -> dict[str, int]:
        """Each row's depth in the batch that `rows` are, which takes `seconds` without any drafts."""
        chances = ((-chance, row.request_id, k) for row in rows
                   for k, chance in enumerate(accumulate(self._acceptance(row.request_id).rates(), mul), 1))
        likeliest_first = sorted(chances, key=itemgetter(0))
        depths = dict.fromkeys((row.request_id for row in rows), 0)
        tokens, seconds = float(len(rows)), max(seconds, 1e-9)
        best_rate, best, passes = _MARGIN * tokens / seconds, 0, 0
        each = self._forward.weight(2) + self._head.weight(1)
        for count, (minus_chance, _, k) in enumerate(likeliest_first, 1):
            tokens -= minus_chance
            passes = max(passes, k)
            rate = tokens / (seconds + count * each + passes * self._head.weight(0))
            if rate > best_rate:
                best_rate, best = rate, count
        for _, request_id, k in likeliest_first[:best]:
            depths[request_id] = max(depths[request_id], k)
        return depths

    def _probe(self) -> None:
        """A draft for every row in a few steps when nobody has had one for long."""
        if self._batch_depth:
            self._idle_steps, self._probe_every = 0, _PROBE_EVERY
            return
        self._idle_steps += 1
        if self._idle_steps > self._probe_every:
            self._take(dict.fromkeys(self._depths, 1))
            if self._idle_steps == self._probe_every + _PROBE_STEPS:
                self._idle_steps, self._probe_every = 0, min(_PROBE_SELDOM, 2 * self._probe_every)


class Acceptance:
    """Chance of each position's draft given those before it, from trials that fade, a prior worth some trials first."""

    def __init__(self, prior: Sequence[float], weight: float, *, fade: float) -> None:
        self._hits, self._trials = [rate * weight for rate in prior], [weight] * len(prior)
        self._fade = fade

    def add(self, drafts: int, accepted: int) -> None:
        for i in range(min(drafts, accepted + 1)):
            self._trials[i] = self._trials[i] * self._fade + 1
            self._hits[i] = self._hits[i] * self._fade + (i < accepted)

    def drift(self, first: int, towards: Sequence[float]) -> None:
        """Positions from `first` on, of which a step said nothing, become more like others'."""
        for i in range(first, len(self._hits)):
            self._hits[i] += _DRIFT * (towards[i] * self._trials[i] - self._hits[i])

    def rates(self) -> list[float]:
        return [hits / trials for hits, trials in zip(self._hits, self._trials)]


class _Fit:
    """y ≈ w · x by least squares over fading observations; what they say nothing about stays as it was."""

    def __init__(self, size: int) -> None:
        self._moments = np.zeros((size, size))
        self._products, self._weights = np.zeros(size), np.zeros(size)
        self._scales = np.full(size, 1e-9)
        self.known = 0
        """Observations so far."""

    def weight(self, i: int) -> float:
        return float(self._weights[i])

    def predict(self, x: Sequence[float]) -> float:
        return max(1e-9, float(self._weights @ x))

    def add(self, x: Sequence[float], y: float) -> None:
        self.known += 1
        if self.known > 4:  # a stray step (a page fault, another process) counts as half more than expected at most
            y = min(y, 1.5 * self.predict(x))
        seen = np.asarray(x, dtype=float)
        self._scales = np.maximum(_FADE * self._scales, seen * seen)
        self._products = _FADE * self._products + seen * y
        self._moments = _FADE * self._moments + np.outer(seen, seen)
        # A pull towards the last weights, as strong as a twentieth of an observation along each axis.
        pull = 0.05 * self._scales
        found = np.linalg.solve(self._moments + np.diag(pull), self._products + pull * self._weights)
        self._weights = np.maximum(0.0, found)


def _features(rows: Sequence[RowPlan], drafts: int) -> tuple[float, float, float, float]:
    return 1.0, len(rows), drafts, sum(len(row.pages) for row in rows)
