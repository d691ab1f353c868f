"""What a request asks of the sampler, validated once at the door."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tritium.core.errors import RequestError

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 16
_MOST = 2**31 - 1
_RANGES = (
    ("temperature", "[", 0.0, 100.0), ("top_p", "(", 0.0, 1.0), ("min_p", "[", 0.0, 1.0),
    ("presence_penalty", "[", -2.0, 2.0), ("frequency_penalty", "[", -2.0, 2.0),
    ("repetition_penalty", "(", 0.0, 100.0), ("top_k", "[", 0, _MOST), ("min_tokens", "[", 0, _MOST),
    ("n", "[", 1, MAX_N), ("logprobs", "[", 0, MAX_LOGPROBS), ("prompt_logprobs", "[", 0, MAX_LOGPROBS),
    ("max_tokens", "[", 1, _MOST),
)  # fmt: skip
"""Field, whether its lowest value is one of its values, lowest and highest; of integers where these are."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn and when a generation ends.

    The order of the filters is: logit_bias and penalties on the logits, temperature, min_p, top_k, top_p; then
    one seeded draw. `temperature` 0 takes the largest logit (ties: the lowest id). Raises `RequestError` naming
    the field when a value is out of range, so that an instance is always valid.
    """

    temperature: float = 1.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all (-1 is accepted and means 0)."""
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    """None draws a fresh seed when the request is added; request i of `n` uses seed + i."""
    logprobs: int | None = None
    """None: none. k: log-probability of each sampled token and the k most likely beside it (0 <= k <= 20).
    Taken from the model's raw distribution, before bias, penalties, temperature and filters."""
    prompt_logprobs: int | None = None
    max_tokens: int | None = None
    """None: up to the model's context."""
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        for name, bracket, low, high in _RANGES:
            value = getattr(self, name)
            if value is None and name in ("logprobs", "prompt_logprobs", "max_tokens"):
                continue
            kind, what = (int, "an integer") if isinstance(high, int) else ((int, float), "a finite number")
            if isinstance(value, bool) or not isinstance(value, kind) or value != value or abs(value) == math.inf:
                raise RequestError(f"{name} must be {what}, got {value!r}", param=name)
            if value > high or value < low or (bracket == "(" and value == low):
                raise RequestError(f"{name} must be within {bracket}{low:g}, {high:g}], got {value!r:.50}", param=name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens})",
                               param="min_tokens")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise RequestError("seed must fit in 64 bits", param="seed")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"at most {MAX_STOP_STRINGS} stop strings, got {len(self.stop)}", param="stop")
        if any(not text for text in self.stop):
            raise RequestError("a stop string must not be empty", param="stop")
        for token, bias in self.logit_bias.items():
            if not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
                raise RequestError(f"logit_bias of token {token} must be within [-100, 100]", param="logit_bias")

    @property
    def uses_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1
