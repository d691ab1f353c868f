"""What /metrics tells: the engine's numbers as of its last step, and the latencies of the requests served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tritium.api import Session
from tritium.core import Event, FinishReason

_GAUGES = {
    "running": "requests_running: Requests that hold pages and a slot",
    "waiting": "requests_waiting: Requests in the queue",
    "pages_used": "kv_pages_used: KV pages held by requests",
    "pages_total": "kv_pages_total: KV pages in the pool",
    "pages_cached": "prefix_cache_pages: KV pages of the prefix cache that no request reads",
    "checkpoints": "prefix_cache_checkpoints: Recurrent states in the prefix cache",
    "checkpoints_host": "prefix_cache_host_checkpoints: Recurrent states evicted to host memory",
    "slots_used": "state_slots_used: Recurrent-state slots held by requests",
    "slots_total": "state_slots_total: Recurrent-state slots in the pool",
}
_COUNTERS = {
    "preemptions": "preemptions: Requests that lost their pages and were queued again",
    "prompt_tokens": "prompt_tokens: Prompt tokens of admitted requests",
    "prefix_hit_tokens": "prefix_cache_hit_tokens: Prompt tokens taken from the prefix cache",
    "generated_tokens": "generated_tokens: Tokens sampled",
    "steps": "steps: Forward passes",
    "decode_rows": "decode_rows: Rows of forward passes that gave tokens; tokens per forward is generated over this",
}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_OVERHEAD_SECONDS = (0.0001, 0.0002, 0.0003, 0.0004, 0.0005, 0.0006, 0.0008, 0.001, 0.00125, 0.0015, 0.00175, 0.002,
                     0.0025, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.03, 0.1, 1.0)
_TOKENS = tuple(float(4**i) for i in range(11))
_SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """All names begin with `tritium_`. Its own registry, so that two servers in one process do not meet."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(session))
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token", _SECONDS)
        self._tpot = self._histogram(
            "time_per_output_token_seconds", "Mean time per token after the first", _SECONDS_PER_TOKEN)
        self._total = self._histogram("request_duration_seconds", "Arrival to last token", _SECONDS)
        self._sent: list[float] = []
        self._overhead = self._histogram(
            "server_overhead_seconds", "End of the engine's step to the token handed to the socket", _OVERHEAD_SECONDS)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a choice that ended", _TOKENS)
        self._output = self._histogram("request_output_tokens", "Output tokens of a choice that ended", _TOKENS)
        self._finished = self._counter("requests_finished", "Choices that ended, by reason", "reason")
        self._errors = self._counter("http_errors", "Requests answered with an error, by HTTP status", "status")
        self._error_kinds = self._counter("errors", "Errors told to clients, by kind", "kind")
        self._http = self._counter("http_requests", "HTTP requests, by path and status", "path", "status")
        self._http_seconds = self._histogram("http_request_seconds", "HTTP requests, whole", _SECONDS, "path")

    def finished(self, reason: FinishReason, event: Event | None) -> None:
        """A `Session` observer."""
        self._finished.labels(reason.value).inc()
        if event is None:
            return
        if event.usage is not None:
            self._prompt.observe(event.usage.prompt_tokens)
            self._output.observe(event.usage.completion_tokens)
        if event.timing is not None:
            self._ttft.observe(event.timing.queued)
            self._total.observe(event.timing.total)
            if event.timing.per_output_token is not None:
                self._tpot.observe(event.timing.per_output_token)

    def sent(self, event: Event) -> None:
        """A piece of a stream is on its way. Other streams wait for theirs: counted when they have them."""
        if event.made_at and event.token_ids:
            if not self._sent:
                asyncio.get_running_loop().call_soon(self._count_sent)
            self._sent += [time.monotonic() - event.made_at] * len(event.token_ids)

    def _count_sent(self) -> None:
        for seconds in self._sent:
            self._overhead.observe(seconds)
        self._sent.clear()

    def error(self, status: int, kind: str) -> None:
        self._errors.labels(str(status)).inc()
        self._error_kinds.labels(kind).inc()

    def http_done(self, path: str, status: int, seconds: float) -> None:
        """Status 0: the client left before there was one."""
        self._http.labels(path, str(status)).inc()
        self._http_seconds.labels(path).observe(seconds)

    def warning_headers(self) -> list[tuple[bytes, bytes]]:
        """For every response, when its answers cannot be trusted."""
        forced = self._session.stats().forced_acceptance
        return [] if forced is None else [(b"x-tritium-benchmark", b"forced acceptance: answers are wrong")]

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"tritium_{name}", help_text, labels, buckets=buckets, registry=self._registry)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"tritium_{name}", help_text, labels, registry=self._registry)


class _EngineCollector(Collector):
    def __init__(self, session: Session) -> None:
        self._session = session

    def collect(self) -> Iterator[Metric]:
        stats = self._session.stats()
        for family, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for field, line in table.items():
                name, _, help_text = line.partition(": ")
                yield family(f"tritium_{name}", help_text, value=getattr(stats, field))
        yield GaugeMetricFamily("tritium_engine_up", "1 while the engine lives", value=float(self._session.alive))
        yield CounterMetricFamily("tritium_engine_restarts", "Engines that took a dead one's place",
                                  value=self._session.restarts)
        yield GaugeMetricFamily("tritium_server_tasks", "Tasks of the event loop", value=len(asyncio.all_tasks()))
        yield _labelled("step_seconds", "Time in steps, by phase", "phase", stats.seconds)
        yield _labelled("prefix_cache_miss_tokens", "Prompt tokens that had to be computed, by reason", "reason",
                        stats.prefix_miss_tokens)
        yield GaugeMetricFamily(
            "tritium_draft_seconds_saved_estimate", "Seconds that drafts saved, by the cost model of --speculate auto",
            value=stats.draft_seconds_saved)
        if stats.forced_acceptance is not None:
            yield GaugeMetricFamily("tritium_forced_acceptance", "--benchmark-force-acceptance: answers are wrong",
                                    value=stats.forced_acceptance)
        yield _labelled("prefix_cache_checkpoints_moved", "Recurrent states between slots and host memory", "way",
                        stats.checkpoints_moved)
        for name, counts in (("proposed", stats.draft_proposed), ("accepted", stats.draft_accepted)):
            yield _labelled(f"draft_tokens_{name}", f"Drafts {name}, by position", "position",
                            {str(i): count for i, count in enumerate(counts)})


def _labelled(name: str, help_text: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"tritium_{name}", help_text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family
