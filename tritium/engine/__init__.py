"""The engine: ids in, ids out; and the plan of its memory."""

from tritium.engine.engine import Engine
from tritium.engine.memory_plan import MemoryPlan, plan_memory

__all__ = ["Engine", "MemoryPlan", "plan_memory"]
