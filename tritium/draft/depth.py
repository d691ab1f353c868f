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

from collections.abc import Iterable, Sequence

from tritium.core import Request, RowPlan, StepPlan, StepResult

_MARGIN = 1.02
"""How much faster speculation must look than none, so that noise does not choose it."""
_FADE = 0.98
"""What an old step counts, for each step that follows it."""
_FADE_TRIALS = 0.95
_PRIOR_TRIALS = 6.0
"""Trials of a request that weigh as much as what others' acceptance says about it."""
_OPTIMISM = 0.8
"""Acceptance of each position while nothing is known."""
_PROBE_STEPS, _PROBE_EVERY, _PROBE_SELDOM = 4, 256, 4096
"""Steps of a probe, and steps from one to the next: at first, and at most."""
_LEARNING = (0, 0, 0, 1, 1, 1, 1)
"""Depths of the very first steps."""


class DepthPolicy:
    """Depths of all requests, from 0 to `most`, after every step anew."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.seconds_saved = 0.0
        """What the tokens so far would have cost without drafts, less what they cost; both by the cost model."""
        self._forward, self._head = _Fit(4), _Fit(2)
        self._overall = Acceptance(most, [(_OPTIMISM, _PRIOR_TRIALS / 2)] * most, fade=0.999)
        self._requests: dict[str, Acceptance] = {}
        self._depths: dict[str, int] = {}
        self._batch_depth = most
        self._idle_steps, self._probe_every = 0, _PROBE_EVERY

    def depth(self, request: Request) -> int:
        """Drafts to propose for the request now, and to verify at most."""
        return self._depths.get(request.id, self._batch_depth)

    def observe(self, plan: StepPlan, result: StepResult, seconds: float, head_seconds: float) -> None:
        """What a step brought and took, `head_seconds` of it for guessing."""
        decode = [row for row in plan.rows if row.samples and len(row.ids) == row.num_drafts + 1]
        for row, out in zip(plan.rows, result.rows, strict=True):
            if row.num_drafts and out.tokens:
                self._acceptance(row.request_id).add(row.num_drafts, len(out.tokens) - 1)
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
        if len(self._requests) > 2 * len(rows) + 256:  # those that ended are never told
            self._requests = {row.request_id: self._acceptance(row.request_id) for row in rows}
        if self._forward.known < len(_LEARNING):
            self._take(dict.fromkeys((row.request_id for row in rows), _LEARNING[self._forward.known]))
        else:
            self._take(self._chosen(rows))
            self._probe()

    def _take(self, depths: dict[str, int]) -> None:
        self._depths, self._batch_depth = depths, max(depths.values())

    def _acceptance(self, request_id: str) -> Acceptance:
        found = self._requests.get(request_id)
        if found is None:
            prior = [(rate, _PRIOR_TRIALS) for rate in self._overall.rates()]
            found = self._requests[request_id] = Acceptance(self.most, prior, fade=_FADE_TRIALS)
        return found

    def _chosen(self, rows: Sequence[RowPlan]) -> dict[str, int]:
        """Each row's depth in the batch that `rows` are."""
        chances = [list(_running_products(self._acceptance(row.request_id).rates())) for row in rows]
        best, best_rate = 0, _MARGIN * len(rows) / self._forward.predict(_features(rows, 0))
        tokens = float(len(rows))
        for k in range(1, self.most + 1):
            tokens += sum(chance[k - 1] for chance in chances)
            drafts = k * len(rows)
            rate = tokens / (self._forward.predict(_features(rows, drafts)) + self._head.predict((k, drafts)))
            if rate > best_rate:
                best, best_rate = k, rate
        worth = best_rate * (self._forward.weight(2) + self._head.weight(1))  # tokens that a draft's seconds make
        return {
            row.request_id: next((k for k in range(best, 0, -1) if chance[k - 1] > worth), 0)
            for row, chance in zip(rows, chances, strict=True)
        }

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
    """Chance of each position's draft given those before it, from trials that fade and a prior worth some trials."""

    def __init__(self, most: int, prior: Sequence[tuple[float, float]], *, fade: float) -> None:
        self._hits, self._trials = [0.0] * most, [0.0] * most
        self._prior, self._fade = prior, fade

    def add(self, drafts: int, accepted: int) -> None:
        for i in range(min(drafts, accepted + 1)):
            self._trials[i] = self._trials[i] * self._fade + 1
            self._hits[i] = self._hits[i] * self._fade + (i < accepted)

    def rates(self) -> list[float]:
        return [
            (hits + rate * weight) / (trials + weight)
            for hits, trials, (rate, weight) in zip(self._hits, self._trials, self._prior)
        ]


class _Fit:
    """y ≈ w · x by least squares over fading observations; what they say nothing about stays as it was."""

    def __init__(self, size: int) -> None:
        self._moments = [[0.0] * size for _ in range(size)]
        self._products = [0.0] * size
        self._scales = [1e-9] * size
        self._weights = [0.0] * size
        self.known = 0
        """Observations so far."""

    def weight(self, i: int) -> float:
        return self._weights[i]

    def predict(self, x: Sequence[float]) -> float:
        return max(1e-9, sum(w * value for w, value in zip(self._weights, x)))

    def add(self, x: Sequence[float], y: float) -> None:
        self.known += 1
        if self.known > 4:  # a stray step (a page fault, another process) counts as half more than expected at most
            y = min(y, 1.5 * self.predict(x))
        for i, value in enumerate(x):
            self._scales[i] = max(_FADE * self._scales[i], value * value)
            self._products[i] = _FADE * self._products[i] + value * y
            self._moments[i] = [_FADE * m + value * other for m, other in zip(self._moments[i], x)]
        # A pull towards the last weights, as strong as a twentieth of an observation along each axis.
        pull = [0.05 * scale for scale in self._scales]
        matrix = [[*row] for row in self._moments]
        for i, strength in enumerate(pull):
            matrix[i][i] += strength
        right = [p + s * w for p, s, w in zip(self._products, pull, self._weights)]
        self._weights = [max(0.0, w) for w in _solve(matrix, right)]


def _features(rows: Sequence[RowPlan], drafts: int) -> tuple[float, float, float, float]:
    return 1.0, len(rows), drafts, sum(len(row.pages) for row in rows)


def _running_products(rates: Iterable[float]) -> Iterable[float]:
    chance = 1.0
    for rate in rates:
        chance *= rate
        yield chance


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """x with matrix x = right; the matrix is symmetric and positive definite. Both are overwritten."""
    size = len(right)
    for i in range(size):
        for j in range(i + 1, size):
            factor = matrix[j][i] / matrix[i][i]
            for k in range(i, size):
                matrix[j][k] -= factor * matrix[i][k]
            right[j] -= factor * right[i]
    for i in reversed(range(size)):
        right[i] = (right[i] - sum(matrix[i][k] * right[k] for k in range(i + 1, size))) / matrix[i][i]
    return right
