"""The stages a request passes: Request -> StepPlan -> (ForwardBatch) -> StepResult -> TokenEvent -> Event.

Plain words only: integers, strings and floats, never a tensor. `ForwardBatch`, the plan as tensors, lives in `nn`.
"""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import Any

from tritium.core.constraint import AnswerRules, Constraint
from tritium.core.sampling_params import SamplingParams

PAGE_TOKENS = 64
"""Tokens in a KV page. Never depends on the size of the recurrent state."""


class FinishReason(enum.StrEnum):
    """Why a generation ended, in OpenAI's words where it has one."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True, eq=False)
class Request:
    """One sequence: its ids, what it asks, and how far it is computed. Owned by the scheduler once added."""

    id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    seed: int
    """Resolved seed; the draw at a position depends on (seed, position) alone."""
    eos_ids: frozenset[int] = frozenset()
    max_total_tokens: int = 0
    """Prompt plus output tokens at which the generation ends with LENGTH; set by the engine when it is added."""
    rules: AnswerRules | None = None
    constraint: Constraint | None = None
    """Made from `rules` when the engine takes the request in; it stands after output_ids."""
    priority: int = 0
    """Smaller is served first; first come, first served within one priority."""
    arrival: int = -1
    """Order of arrival, set by the scheduler, kept over preemption."""
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens of prompt + output whose KV and recurrent state are in the pools."""
    pages: list[int] = field(default_factory=list)
    slot: int | None = None
    """While it runs."""
    fold: int = 0
    """The last `fold` computed tokens were drafts: the slot's state is that of num_computed - fold, and their inputs
    are kept beside it."""
    drafts: tuple[int, ...] = ()
    """Proposed after the last token; verified by the next step."""
    head_since: int = 0
    """Position from which the MTP head has followed every token."""
    turn_starts: tuple[int, ...] = ()
    """Positions in the prompt at which a turn of the conversation begins."""
    num_cached: int | None = None
    """Prompt tokens that were taken from the prefix cache when it first ran; None before."""
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The id that ended the generation, when one did."""
    num_preemptions: int = 0
    num_prompt_logprobs: int = 0
    """Prompt log-probabilities already told: a prompt that is computed again does not tell them again."""
    arrived_at: float = field(default_factory=time.monotonic)
    first_token_at: float | None = None
    finished_at: float | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    def ids(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens [start, stop) of prompt + output."""
        n = len(self.prompt_ids)
        return (*self.prompt_ids[start:stop], *self.output_ids[max(0, start - n) : max(0, stop - n)])


PROMPT_LOGITS = 128
"""The most tokens of a prompt whose logits are there at once: 127 MB of them where the vocabulary has 248,320."""
SHORT_ROW = 16
"""Tokens of a row up to which it counts as short: decode rows with their drafts, and the ends of prompts. Short rows
come first in a step."""
MOST_ENDS = 8
"""Ids that a row planned one step ahead can end by; a request with more of them is not planned ahead."""
AHEAD = -1
"""In the place of an id: the one that the step before draws for the same request."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """One request's share of a step: compute `ids` at positions start, start + 1, ...

    The last `num_drafts` ids are guesses: the logits before each of them are sampled too, and a guess counts only when
    it is the token that was drawn there.
    """

    request_id: str
    ids: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    """Block table: page of tokens [64 i, 64 i + 64), covering at least start + len(ids) tokens."""
    slot: int
    samples: bool
    """Whether the logits after the last of `ids` are sampled (false for all but the last chunk of a prompt)."""
    sampling: SamplingParams
    seed: int
    eos_ids: frozenset[int] = frozenset()
    """Ids the sampler must not pick in this step: those that end a generation while it is below min_tokens."""
    prompt_len: int = 0
    history: tuple[int, ...] | None = None
    """Prompt + output so far, only where penalties need it."""
    next_ids: tuple[int, ...] = ()
    """What follows `ids` when it is already known (prompt ids, or recomputed output), else empty: at most one id.
    The MTP head reads it, and prompt log-probabilities are about it."""
    constraint: Constraint | None = None
    """Says which tokens may be drawn. It stands before the drafts, until the step is committed."""
    num_drafts: int = 0
    want_drafts: int = 0
    """How many tokens to propose after what this row samples. Without any, the MTP head leaves the row's tokens out."""
    head_since: int = 0
    """Position from which the MTP head has followed every token."""
    source: int | None = None
    """Slot that holds the state to start from, when it is not the row's own: a checkpoint, read and left as it is."""
    fold: int = 0
    """As in `Request`, at the start of the step."""
    snapshots: tuple[tuple[int, int], ...] = ()
    """(position, slot): put the state after `position` tokens there."""
    copy_page: tuple[int, int] | None = None
    """(from, to): copy this page before the forward pass, because the row will write into the second."""
    ends: frozenset[int] = frozenset()
    """Of a row planned one step ahead, whose only id is `AHEAD`: the ids that end it. If the step before draws one of
    them, nothing is computed for the row."""

    @property
    def stop(self) -> int:
        return self.start + len(self.ids)

    @property
    def drafts(self) -> tuple[int, ...]:
        return self.ids[len(self.ids) - self.num_drafts :]

    def site(self, i: int) -> Site:
        """What the i-th draw of the row sees (0 .. num_drafts)."""
        return Site(self, self.drafts[:i])


@dataclass(slots=True)
class Site:
    """A place to draw at: a row, and the tokens taken to follow those of it that are certain."""

    row: RowPlan
    new: tuple[int, ...] = ()
    may_end: bool = False
    """Whether the ids that the row must not pick are allowed again."""

    @property
    def sampling(self) -> SamplingParams:
        return self.row.sampling

    @property
    def position(self) -> int:
        return self.row.stop - self.row.num_drafts + len(self.new)

    @property
    def history(self) -> tuple[int, ...] | None:
        """Prompt + output so far, only where penalties need it."""
        return None if self.row.history is None else self.row.history + self.new

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset() if self.may_end else self.row.eos_ids

    @property
    def allowed(self) -> bytes | None:
        """The tokens that may be drawn, as `Constraint.mask` writes them."""
        constraint = self.row.constraint
        return None if constraint is None else constraint.mask(self.new)


@dataclass(frozen=True, slots=True)
class StateMove:
    """A checkpoint between a slot and a place in host memory."""

    slot: int
    host: int
    out: bool
    """To the host; else from there."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one forward pass computes. Decode rows come first, then prefill chunks."""

    rows: tuple[RowPlan, ...]
    preempted: tuple[str, ...] = ()
    """Requests whose pages and slot were taken back while planning, for metrics and logs."""
    moves: tuple[StateMove, ...] = ()
    """Done in this order, before the forward pass reads or writes a slot."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token and of the most likely ones at its position, best first."""

    token: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RowResult:
    """What a step found out about one row.

    A row that samples and has no token failed: its logits were not finite, and the scheduler ends it with ERROR.
    """

    request_id: str
    tokens: tuple[int, ...] = ()
    """The accepted drafts and the token drawn after them."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One a token, where asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """About the prompt tokens that follow each of the row's ids (so the prompt's first token has none)."""
    drafts: tuple[int, ...] = ()
    """Guesses of the tokens after these, at most `want_drafts`."""


@dataclass(frozen=True, slots=True)
class StepResult:
    rows: tuple[RowResult, ...]


@dataclass(slots=True)  # not frozen: one is made for every token, at a third of the cost
class TokenEvent:
    """What the engine tells about one request after a step: ids only."""

    request_id: str
    tokens: tuple[int, ...] = ()
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache had."""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    drafts: tuple[int, ...] = ()
    """What is proposed to come next."""
    num_drafts: int = 0
    """Drafts that were found right or wrong in this step; those after the end of an answer are neither."""
    num_accepted: int = 0
    """Those that were right: the first so many of `tokens`."""
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    error: str | None = None
    timing: Timing | None = None
    """Set with `finish_reason`."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, as seen by the engine."""

    queued: float
    """Arrival to first token (TTFT)."""
    total: float
    """Arrival to the end."""
    output_tokens: int
    preemptions: int
    waited: float = 0.0
    """Arrival to being let into the engine."""

    @property
    def per_output_token(self) -> float | None:
        """TPOT: seconds per token after the first; None with fewer than two tokens."""
        return (self.total - self.queued) / (self.output_tokens - 1) if self.output_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the model wrote, its arguments typed by the request's schema."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a call while it is written. The first of a call has its id and name; the fragments of `arguments`
    add up to the JSON of `ToolCall.arguments`."""

    index: int
    """Of the call in its answer, from 0."""
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    accepted_drafts: int = 0
    """Of the completion's tokens, those that were guessed before."""
    rejected_drafts: int = 0


@dataclass(slots=True)  # not frozen: one is made for every token, at a third of the cost
class Event:
    """A piece of an answer as the caller sees it. Fields that a piece does not carry are empty.

    `index` is the choice (0 .. n-1). The last event of a choice has `finish_reason`, `usage` and `timing`.
    """

    index: int = 0
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls that are complete; all their deltas came before, or come with them."""
    tool_deltas: tuple[ToolCallDelta, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or token id that ended the text, when one did."""
    usage: Usage | None = None
    timing: Timing | None = None
    error: str | None = None
    made_at: float = 0.0
    """When the engine's step ended, on the monotonic clock; 0 where that was not measured."""


@dataclass(frozen=True, slots=True)
class CacheCall:
    """Something to be done with the prefix cache between two steps."""

    id: str
    action: str
    """save, load or flush."""
    name: str = ""
    """Of the file."""
    ids: tuple[int, ...] | None = None
    """Save only what begins with these, and their own pages; None: all."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine. Gauges first; from `preemptions` on, counters since the engine was made."""

    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
    slots_used: int = 0
    slots_total: int = 0
    pages_cached: int = 0
    """Pages of the prefix cache that no request reads; `pages_used` leaves them out."""
    checkpoints: int = 0
    """Recurrent states in the prefix cache; `slots_used` leaves them out."""
    checkpoints_host: int = 0
    """Those that were evicted to host memory."""
    preemptions: int = 0
    prompt_tokens: int = 0
    """Prompt tokens of the requests that were admitted."""
    prefix_hit_tokens: int = 0
    """Prompt tokens taken from the prefix cache, each request counted when it first ran."""
    prefix_miss_tokens: dict[str, int] = field(default_factory=dict)
    """The others by reason: never_seen, parted, pages_evicted, checkpoint_evicted."""
    checkpoints_moved: dict[str, int] = field(default_factory=dict)
    """Between slots and host memory: evicted, restored."""
    generated_tokens: int = 0
    steps: int = 0
    draft_proposed: tuple[int, ...] = ()
    """Drafts verified, by position: the first guess of a step, the second, ..."""
    draft_accepted: tuple[int, ...] = ()
    decode_rows: int = 0
    """Rows of steps that gave tokens: tokens per forward of one request = generated_tokens / decode_rows."""
    draft_seconds_saved: float = 0.0
    """What speculation saved, by the cost model of `--speculate auto`; 0 without."""
    forced_acceptance: float | None = None
    """The rate of --benchmark-force-acceptance: the answers are wrong."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time by phase: schedule, prepare, forward, sample, draft."""
