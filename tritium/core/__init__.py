"""Plain words of the engine: no torch, no I/O, no globals."""

from tritium.core.constraint import AnswerRules, Constrain, Constraint
from tritium.core.errors import (
    CacheFileError,
    CapacityError,
    CheckpointError,
    ConfigError,
    EngineDeadError,
    RequestError,
    TritiumError,
)
from tritium.core.sampling_params import SamplingParams
from tritium.core.stages import (
    AHEAD,
    MOST_ENDS,
    PAGE_TOKENS,
    PROMPT_LOGITS,
    SHORT_ROW,
    CacheCall,
    EngineStats,
    Event,
    FinishReason,
    Request,
    RowPlan,
    RowResult,
    Site,
    StateMove,
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
    "AHEAD", "MOST_ENDS", "PAGE_TOKENS", "PROMPT_LOGITS", "SHORT_ROW", "AnswerRules", "CacheCall", "CacheFileError",
    "CapacityError", "CheckpointError", "ConfigError", "Constrain", "Constraint", "EngineDeadError", "EngineStats",
    "Event", "FinishReason", "Request", "RequestError", "RowPlan", "RowResult", "SamplingParams", "Site", "StateMove",
    "StepPlan", "StepResult", "Timing", "TokenEvent", "TokenLogprob", "ToolCall", "ToolCallDelta", "TritiumError",
    "Usage",
]  # fmt: skip
