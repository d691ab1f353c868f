"""Who may enter the engine, and when: a bounded queue, limits for each key, fair shares between keys."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tritium.config import flag
from tritium.core import ConfigError, TritiumError

_LONGEST_RETRY = 60.0


class BusyError(TritiumError):
    """More than is served at once; `retry_after` says in how many seconds to ask again."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        self.retry_after = min(max(retry_after, 1.0), _LONGEST_RETRY)
        super().__init__(message, hint=f"try again in {self.retry_after:.0f} s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much is served at once. None: no limit."""

    max_queued_requests: int = 1024
    """Requests that wait while the engine is full; one more is refused."""
    max_requests_per_key: int | None = None
    """Requests of one key that wait or run."""
    tokens_per_minute_per_key: int | None = None
    """Prompt and output tokens of one key; a minute's worth may be used at once."""
    request_timeout: float | None = None
    """Seconds from a request's arrival to its end."""

    def __post_init__(self) -> None:
        for name in ("max_requests_per_key", "tokens_per_minute_per_key", "request_timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{flag(name)} must be above 0, got {value}")
        if self.max_queued_requests < 0:
            raise ConfigError(f"--max-queued-requests must be at least 0, got {self.max_queued_requests}")


@dataclass(slots=True)
class _Account:
    """What one key has here."""

    requests: int = 0
    running: int = 0
    """Choices in the engine."""
    served: int = 0
    """Tokens since the key last had no request."""
    allowance: float = 0.0
    """Tokens that it may still use now; below 0 it has to wait."""
    allowed_at: float = float("-inf")
    """When that was worked out last: a new key has all of a minute's."""


class Gate:
    """Lets requests into an engine that runs `capacity` choices at once.

    Among those that wait, the smallest priority goes first; within one, the key with the fewest choices in the
    engine, then the one that was served the fewest tokens, then the first to come. Used on the event loop only.
    """

    def __init__(self, capacity: int, limits: Limits | None = None, *,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits or Limits()
        self.running = 0
        # A few more than run wait inside the engine: a slot that becomes free is taken in the very next step.
        self._capacity = capacity + max(1, capacity // 8)
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._outside: dict[Ticket, None] = {}
        self._seconds = 1.0
        """A request's usual time from arrival to end."""

    @property
    def waiting(self) -> int:
        """Choices that wait outside the engine."""
        return sum(ticket.choices for ticket in self._outside)

    def enter(self, key: str = "", priority: int = 0) -> Ticket:
        """Take a place in the queue. Raises `BusyError`."""
        limits, account = self.limits, self._accounts.setdefault(key, _Account())
        if limits.max_requests_per_key is not None and account.requests >= limits.max_requests_per_key:
            raise BusyError(f"this key has {account.requests} requests under way, which is its limit",
                            retry_after=self._seconds)
        if limits.tokens_per_minute_per_key is not None:
            self._refill(account, limits.tokens_per_minute_per_key)
        if len(self._outside) >= limits.max_queued_requests + max(0, self._capacity - self.running):
            raise BusyError("the queue is full",
                            retry_after=self._seconds * (1 + len(self._outside) / self._capacity))
        account.requests += 1
        ticket = Ticket(self, account, priority, self._clock())
        self._outside[ticket] = None
        return ticket

    def _refill(self, account: _Account, rate: int) -> None:
        now = self._clock()
        account.allowance = min(rate, account.allowance + (now - account.allowed_at) * rate / 60)
        account.allowed_at = now
        if account.allowance <= 0:
            raise BusyError(f"this key has used its {rate} tokens a minute",
                            retry_after=(1 - account.allowance) * 60 / rate)

    def admit(self) -> None:
        """Let in what there is room for."""
        while self.running < self._capacity:
            ready = [ticket for ticket in self._outside if ticket.go is not None]
            if not ready:
                return
            ticket = min(ready, key=Ticket.rank)  # the first to come among equals: the dictionary is in that order
            del self._outside[ticket]
            self.running += ticket.choices
            ticket.account.running += ticket.choices
            assert ticket.go is not None
            ticket.inside = True
            ticket.go()

    def forget(self, ticket: Ticket) -> None:
        self._outside.pop(ticket, None)
        ticket.account.requests -= 1
        if not ticket.account.requests:
            ticket.account.served = 0
        self._seconds += 0.1 * (self._clock() - ticket.entered_at - self._seconds)


class Ticket:
    """One request's place at the gate."""

    __slots__ = ("account", "choices", "entered_at", "gate", "go", "inside", "left", "priority")

    def __init__(self, gate: Gate, account: _Account, priority: int, entered_at: float) -> None:
        self.gate, self.account, self.priority, self.entered_at = gate, account, priority, entered_at
        self.choices = 1
        """That have not ended."""
        self.inside = self.left = False
        self.go: Callable[[], None] | None = None

    def rank(self) -> tuple[int, int, int]:
        return self.priority, self.account.running, self.account.served

    def ready(self, choices: int, prompt_tokens: int, go: Callable[[], None]) -> None:
        """The request is prepared: `go` is called when it may enter the engine, perhaps at once."""
        self.choices, self.go = choices, go
        self.charge(prompt_tokens)
        self.gate.admit()

    def charge(self, tokens: int) -> None:
        self.account.served += tokens
        self.account.allowance -= tokens

    def leave(self) -> None:
        """The request is over. May be called again."""
        if not self.left:
            self.left = True
            self.gate.forget(self)
            self.choices_ended(self.choices)

    def choices_ended(self, choices: int = 1) -> None:
        """So many of them, which give their places to others."""
        self.choices -= choices
        if self.inside and choices:
            self.gate.running -= choices
            self.account.running -= choices
            self.gate.admit()
