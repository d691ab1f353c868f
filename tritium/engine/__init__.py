"""The engine: ids in, ids out."""

from tritium.engine.engine import Engine

__all__ = ["Engine"]
