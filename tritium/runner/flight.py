"""A step that was launched: its plan, and its result when it is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tritium.core import AHEAD, RowResult, StepPlan, StepResult


class Flight:
    """`result` waits for the device where the step is still under way."""

    def __init__(self, plan: StepPlan, finish: Callable[[], StepResult], *, under_way: bool) -> None:
        self.plan = plan
        self.under_way = under_way
        """Whether the device may still work on it, so that the host has time to plan ahead."""
        self._finish = finish
        self._result: StepResult | None = None

    def result(self) -> StepResult:
        if self._result is None:
            self._result, self.under_way = self._finish(), False
        return self._result


def landed(plan: StepPlan, before: Flight | None) -> StepPlan:
    """A plan made one step ahead with the ids that the step before drew, without the rows that these ended."""
    if before is None:
        return plan
    drawn = {row.request_id: row.tokens[:1] for row in before.result().rows}
    rows = [replace(row, ids=drawn[row.request_id]) if row.ids == (AHEAD,) else row for row in plan.rows]
    return replace(plan, rows=tuple(row for row in rows if row.ids and row.ids[0] not in row.ends))


def in_order(plan: StepPlan, found: list[RowResult]) -> StepResult:
    """The results of all rows of `plan`; those that nothing was computed for are empty."""
    by_id = {row.request_id: row for row in found}
    return StepResult(tuple(by_id.get(row.request_id) or RowResult(row.request_id) for row in plan.rows))
