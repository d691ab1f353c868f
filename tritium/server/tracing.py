"""OpenTelemetry: a span for every request. Nothing of it is imported unless it is asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from tritium.core import ConfigError

_NAMES = {"request_id": "gen_ai.request.id", "model": "gen_ai.request.model",
          "prompt_tokens": "gen_ai.usage.input_tokens", "completion_tokens": "gen_ai.usage.output_tokens",
          "queue": "gen_ai.latency.time_in_queue", "ttft": "gen_ai.latency.time_to_first_token",
          "seconds": "gen_ai.latency.e2e", "status": "http.response.status_code"}
"""What the log calls it, and what a span does."""


class Tracer:
    def __init__(self, endpoint: str) -> None:
        """Spans go to `endpoint`, an OTLP collector's HTTP address, in batches from a thread of their own. Raises
        `ConfigError` where the packages are missing."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(f"--otlp-traces-endpoint needs OpenTelemetry, which is not all here: {error}",
                              hint="pip install 'tritium[otel]'") from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "tritium"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("tritium")
        self._propagator = TraceContextTextMapPropagator()

    def span(self, headers: Mapping[bytes, bytes], name: str, line: Mapping[str, Any]) -> None:
        """A request that has just ended: `line` as the log has it, its parent from the traceparent header."""
        end = time.time_ns()
        sent = {key: headers.get(key.encode(), b"").decode("latin-1") for key in ("traceparent", "tracestate")}
        span = self._tracer.start_span(
            name, context=self._propagator.extract(sent), start_time=end - int(1e9 * line["seconds"]),
            attributes={_NAMES[key]: value for key, value in line.items() if key in _NAMES})
        span.end(end)

    def close(self) -> None:
        self._provider.shutdown()
