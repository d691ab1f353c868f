"""What this machine can do: `probe()` gives a `Target`, by feature rather than by chip."""

from tritium.hw.target import Target, probe

__all__ = ["Target", "probe"]
