"""What /metrics tells: the engine's numbers as of its last step, and the latencies of the requests served."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tritium.core import EngineStats, Event, FinishReason

_GAUGES = {
    "running": "requests_running: Requests that hold pages and a slot",
    "waiting": "requests_waiting: Requests in the queue",
    "pages_used": "kv_pages_used: KV pages held by requests",
    "pages_total": "kv_pages_total: KV pages in the pool",
    "pages_cached": "prefix_cache_pages: KV pages of the prefix cache that no request reads",
    "checkpoints": "prefix_cache_checkpoints: Recurrent states in the prefix cache",
    "slots_used": "state_slots_used: Recurrent-state slots held by requests",
    "slots_total": "state_slots_total: Recurrent-state slots in the pool",
}
_COUNTERS = {
    "preemptions": "preemptions: Requests that lost their pages and were queued again",
    "prompt_tokens": "prompt_tokens: Prompt tokens of admitted requests",
    "prefix_hit_tokens": "prefix_cache_hit_tokens: Prompt tokens taken from the prefix cache",
    "generated_tokens": "generated_tokens: Tokens sampled",
    "steps": "steps: Forward passes",
}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """All names begin with `tritium_`. Its own registry, so that two servers in one process do not meet."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats))
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token", _SECONDS)
        self._tpot = self._histogram(
            "time_per_output_token_seconds", "Mean time per token after the first", _SECONDS_PER_TOKEN)
        self._total = self._histogram("request_duration_seconds", "Arrival to last token", _SECONDS)
        self._finished = Counter("tritium_requests_finished", "Choices that ended, by reason", ["reason"],
                                 registry=self._registry)
        self._errors = Counter("tritium_http_errors", "Requests answered with an error, by HTTP status", ["status"],
                               registry=self._registry)

    def finished(self, reason: FinishReason, event: Event | None) -> None:
        """A `Session` observer."""
        self._finished.labels(reason.value).inc()
        if event is not None and event.timing is not None:
            self._ttft.observe(event.timing.queued)
            self._total.observe(event.timing.total)
            if event.timing.per_output_token is not None:
                self._tpot.observe(event.timing.per_output_token)

    def http_error(self, status: int) -> None:
        self._errors.labels(str(status)).inc()

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"tritium_{name}", help_text, buckets=buckets, registry=self._registry)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for family, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for field, line in table.items():
                name, _, help_text = line.partition(": ")
                yield family(f"tritium_{name}", help_text, value=getattr(stats, field))
        phases = CounterMetricFamily("tritium_step_seconds", "Time in steps, by phase", labels=["phase"])
        for phase, seconds in stats.seconds.items():
            phases.add_metric([phase], seconds)
        yield phases
        missed = CounterMetricFamily(
            "tritium_prefix_cache_miss_tokens", "Prompt tokens that had to be computed, by reason", labels=["reason"])
        for reason, count in stats.prefix_miss_tokens.items():
            missed.add_metric([reason], count)
        yield missed
