"""Which tokens of which requests a step computes: integers only, no device."""

from tritium.sched.scheduler import Limits, Scheduler

__all__ = ["Limits", "Scheduler"]
