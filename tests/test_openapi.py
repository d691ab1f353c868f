"""The OpenAPI document, the tables in the documentation, the dashboard, and bytes that are no HTTP."""

from __future__ import annotations

import json
import random
import re
import socket
from pathlib import Path

import httpx
from openapi_fuzz import fuzz, fuzzed_server
from served import MODEL, says, served
from serving_tables import BEGIN, DOCUMENT, END, documented

from tritium.server.openapi import ENDPOINTS

ROOT = Path(__file__).resolve().parents[1]


def test_every_endpoint_is_in_the_document_and_no_other():
    with served(says("ok")) as server:
        document = server.get("/openapi.json").json()
        for endpoint in ENDPOINTS:
            path = endpoint.path.replace("{name}", MODEL)
            assert endpoint.method.lower() in document["paths"][endpoint.path]
            status = httpx.request(endpoint.method, server.url + path, content=b"{}", timeout=20).status_code
            assert status in (200, 400), (endpoint.path, status)
        routes = {(next(iter(route.methods - {"HEAD"})), route.path.replace(":path", ""))
                  for route in server.app_routes() if hasattr(route, "methods")}
        assert routes == {(endpoint.method, endpoint.path) for endpoint in ENDPOINTS}


def test_cases_made_from_the_document_find_no_5xx_and_no_violation(seed):
    """A sample; `make fuzz` sends 2,000 and more."""
    with fuzzed_server() as server:
        count, _ = fuzz(server, 6, seed, phases="fuzzing")
        assert count >= 40
        server.wait_idle()


def test_the_documentation_has_the_tables():
    text = DOCUMENT.read_text()
    assert BEGIN in text
    assert END in text
    assert text == documented(text), "python tests/serving_tables.py writes them"


def test_every_metric_of_the_dashboard_exists():
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    named = {name for query in queries for name in re.findall(r"tritium_\w+", query)}
    assert len(named) > 20
    with served(says("ok")) as server:
        server.post("/v1/completions", {"prompt": "x", "stream": True})
        server.post("/v1/completions", {"prompt": ""})
        text = server.get("/metrics").text
    families = dict(re.findall(r"^# TYPE (tritium_\w+) (\w+)$", text, re.MULTILINE))
    told = set()
    for name, kind in families.items():
        told |= {name} if kind != "histogram" else {f"{name}_{part}" for part in ("bucket", "sum", "count")}
    assert not named - told


def test_bytes_that_are_no_http_neither_crash_nor_hang(seed):
    rng = random.Random(seed)
    good = (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 32\r\n\r\n" + b'{"prompt": "xxx", "max_tokens":3}')
    with served(says("ok"), patience=2.0) as server:
        host, port = server.url.removeprefix("http://").split(":")
        for i in range(300):
            data = bytearray(good if i % 3 else rng.randbytes(rng.randrange(1, 200)))
            for _ in range(rng.randrange(1, 8)):
                at = rng.randrange(len(data) + 1)
                data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                answer = b""
                try:
                    while piece := connection.recv(65536):
                        answer += piece
                except ConnectionResetError:
                    continue
                assert not answer or int(answer.split(b" ", 2)[1]) < 500, (bytes(data), answer)
        assert server.post("/v1/completions", {"prompt": "x"}).status_code == 200
        server.wait_idle()
