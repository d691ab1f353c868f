"""Any server with OpenAI's completions: what its clients see, by how many there are."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from tritium.bench.load import Load, run_load
from tritium.core import ConfigError

_IDS = range(100, 250)
"""Plain tokens of every vocabulary: bytes, in those that begin with them."""


def run(url: str, *, concurrency: Sequence[int], prompt: int = 512, tokens: int = 128, each: int = 4,
        model: str | None = None, api_key: str | None = None, ignore_eos: bool = True, allow_remote: bool = False,
        seed: int = 0, limit: float = 600.0) -> Iterator[dict[str, Any]]:
    """A number of clients at a time, each of which asks `each` times, one after the other, for `tokens` tokens after
    a prompt of `prompt` random ids of its own. Latencies in seconds as {p50, p90, p99, max}; of Tritium's own server
    also what it spends in each phase of a step."""
    model = model or _first_model(url, api_key)
    draw = random.Random(seed)
    for clients in concurrency:
        prompts = [tuple(draw.choices(_IDS, k=prompt)) for _ in range(clients * each)]
        load = Load(prompts=prompts, clients=clients, requests=len(prompts), max_tokens=tokens, ignore_eos=ignore_eos,
                    model=model, api_key=api_key, allow_remote=allow_remote, seconds=limit, seed=seed)
        before = _steps(url)
        report, after = dataclasses.asdict(run_load(url, load)), _steps(url)
        steps = after.pop("", 0.0) - before.pop("", 0.0)
        kept = ("clients", "completed", "errors", "first_error", "seconds", "output_tokens", "tokens_per_second",
                "ttft", "tpot", "itl")
        spent = {phase: 1e6 * (value - before.get(phase, 0.0)) / steps for phase, value in after.items() if steps}
        yield {"model": model, "prompt": prompt, "tokens": tokens, "step_us": spent} | {
            name: report[name] for name in kept}


def _steps(url: str) -> dict[str, float]:
    """Seconds in steps so far by phase, and under "" the number of steps; empty of another server."""
    page = httpx.get(f"{url.rstrip('/')}/metrics", timeout=10).text
    found = re.findall(r'^tritium_step(?:s|_seconds)_total(?:{phase="(.*)"})? (.+)$', page, re.MULTILINE)
    return {phase: float(value) for phase, value in found}


def _first_model(url: str, api_key: str | None) -> str:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        listed = httpx.get(f"{url.rstrip('/')}/v1/models", headers=headers, timeout=10).raise_for_status().json()
        return str(listed["data"][0]["id"])
    except httpx.TransportError as error:
        raise ConfigError(f"no server answers at {url}: {error}", hint="tritium serve, or the right URL") from None
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise ConfigError(f"{url} does not say which models it serves: {error}",
                          hint="--model, or the right URL") from None
