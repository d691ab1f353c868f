"""A span for every request, where OpenTelemetry is installed; a clear error where it is not."""

from __future__ import annotations

import sys

import httpx
import pytest
from served import MODEL, says, served

from tritium.core import ConfigError
from tritium.server.tracing import Tracer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}


def test_without_the_packages_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match="--otlp-traces-endpoint needs OpenTelemetry") as refused:
        Tracer("http://127.0.0.1:9/v1/traces")
    assert "tritium[otel]" in (refused.value.hint or "")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span(monkeypatch, stream):
    exporters = pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    monkeypatch.setattr(exporters, "OTLPSpanExporter", lambda endpoint: memory)
    with served(says("ok"), tracer=Tracer("http://127.0.0.1:9/v1/traces")) as server:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        url = f"{server.url}/v1/chat/completions"
        usage = httpx.post(url, json=BODY, headers=headers, timeout=20).json()["usage"]
        httpx.post(url, json=BODY | {"stream": stream}, timeout=20)
        server.get("/health")
    first, second = memory.get_finished_spans()  # all are handed over at the end
    assert first.name == "POST /v1/chat/completions"
    assert (f"{first.context.trace_id:032x}", f"{first.parent.span_id:016x}") == (TRACE, PARENT)
    assert second.parent is None
    told = dict(first.attributes)
    for span in (told, dict(second.attributes)):
        times = [span.pop(f"gen_ai.latency.{name}") for name in ("time_in_queue", "time_to_first_token", "e2e")]
        assert 0 <= times[0] <= times[1] <= times[2] < 20
    assert told == {
        "gen_ai.request.id": "mine", "gen_ai.request.model": MODEL, "http.response.status_code": 200,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"], "gen_ai.usage.output_tokens": usage["completion_tokens"]}
