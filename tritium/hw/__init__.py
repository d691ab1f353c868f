"""What this machine can do: `probe()` gives a `Target`, by feature rather than by chip."""

from tritium.hw.host import available_cores
from tritium.hw.target import NAMED, Target, named, probe

__all__ = ["NAMED", "Target", "available_cores", "named", "probe"]
