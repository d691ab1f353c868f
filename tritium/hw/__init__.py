"""What this machine can do: `probe()` gives a `Target`, by feature rather than by chip."""

from tritium.hw.target import NAMED, Target, named, probe

__all__ = ["NAMED", "Target", "named", "probe"]
