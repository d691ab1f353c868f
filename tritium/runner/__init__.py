"""Executes plans on a device."""

from tritium.runner.flight import Flight
from tritium.runner.runner import Runner

__all__ = ["Flight", "Runner"]
