"""Plain words of the engine: no torch, no I/O, no globals."""

from tritium.core.constraint import AnswerRules, Constrain, Constraint
from tritium.core.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    EngineDeadError,
    RequestError,
    TritiumError,
)
from tritium.core.sampling_params import SamplingParams
from tritium.core.stages import (
    PAGE_TOKENS,
    EngineStats,
    Event,
    FinishReason,
    Request,
    RowPlan,
    RowResult,
    Status,
    StepPlan,
    StepResult,
    Timing,
    TokenEvent,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)

__all__ = [
    "PAGE_TOKENS",
    "AnswerRules",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "Constrain",
    "Constraint",
    "EngineDeadError",
    "EngineStats",
    "Event",
    "FinishReason",
    "Request",
    "RequestError",
    "RowPlan",
    "RowResult",
    "SamplingParams",
    "Status",
    "StepPlan",
    "StepResult",
    "Timing",
    "TokenEvent",
    "TokenLogprob",
    "ToolCall",
    "ToolCallDelta",
    "TritiumError",
    "Usage",
]
