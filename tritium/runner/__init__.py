"""Executes plans on a device."""

from tritium.runner.runner import Runner

__all__ = ["Runner"]
