"""The engine itself, in process: decoding at any batch and context, prompts, and a context filled to its last token.

Contexts are not computed (256K tokens of 32 requests would take an hour) but placed: the scheduler admits the requests
and is told that their prompts are done, and the pools get random numbers where these prompts would have left theirs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from tritium.bench.ceilings import Ceilings, flops, middle, seconds_of, step_bytes
from tritium.cache import pages_for
from tritium.config import EngineConfig, Speculation
from tritium.core import CapacityError, Request, RowResult, SamplingParams, StepResult
from tritium.engine import Engine
from tritium.nn.batch import AttentionCache

WARM_UP = 8
_SPARE = 8
"""Steps that may be under way beside those that are timed."""


def decode(config: EngineConfig, ceilings: Ceilings, *, rows: Sequence[int], contexts: Sequence[int],
           steps: int, rounds: int, temperature: float = 0.6) -> Iterator[dict[str, Any]]:
    """A cell at a time; one that does not fit says so in `skipped`. `steps` steps are timed, `rounds` times."""
    engine = Engine.load(replace(config, max_num_seqs=max(rows), enable_prefix_caching=False))
    needed = (WARM_UP + steps * rounds + _SPARE) * (1 + Speculation.parse(config.speculate).most)
    for context in contexts:
        for count in rows:
            length = min(context, engine.max_model_len - needed)
            pages = count * pages_for(length + needed)
            cell: dict[str, Any] = {"rows": count, "context": context}
            if length < 0.9 * context or pages > engine.memory_plan.num_pages:
                yield cell | {"skipped": "longer than max_model_len" if length < 0.9 * context else "more KV than fits"}
                continue
            asked = SamplingParams(temperature=temperature, top_p=0.95, top_k=20, max_tokens=needed, ignore_eos=True)
            place(engine, [request(engine, str(i), length, asked, seed=i) for i in range(count)])
            yield cell | _timed(engine, count, length, steps, rounds, ceilings)


def prefill(config: EngineConfig, ceilings: Ceilings, *, lengths: Sequence[int],
            rounds: int) -> Iterator[dict[str, Any]]:
    """Prompts alone, one at a time: seconds to the first token. The first of each length does not count."""
    engine = Engine.load(replace(config, max_num_seqs=1, enable_prefix_caching=False))
    for length in lengths:
        if length >= engine.max_model_len:
            yield {"tokens": length, "skipped": "longer than max_model_len"}
            continue
        seconds = [first_token(engine, length, seed=i) for i in range(rounds + 1)][1:]
        best = min(seconds)
        yield {
            "tokens": length,
            "seconds": best,
            "tokens_per_second": length / best,
            "share_of_dot": flops(engine.model_config, length, length / 2, 1) / best / ceilings.dot,
        }


def fill(config: EngineConfig, *, tokens: int = 64) -> dict[str, Any]:
    """As many requests of max_model_len tokens as the plan declared, at once, to their last token.

    All but the last have the same numbers at the same positions, in pages of their own, and must draw the same tokens,
    and those that one of them draws alone. The last one computes the end of its prompt, the largest step there is.
    """
    engine = Engine.load(config)
    plan, asked = engine.memory_plan, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    rows, length = plan.full_length_requests, engine.max_model_len - tokens
    drawn: list[dict[str, list[int]]] = []
    used = 0
    for count in (1, rows):
        requests = [request(engine, str(i), length, asked, seed=count + i) for i in range(count)]
        for one in requests:
            one.prompt_ids[-1] = 1
        place(engine, requests, alike=True, leave=min(length, engine.scheduler.limits.max_num_batched_tokens) // 2
              if count > 2 else 0)
        while engine.has_work:
            engine.step()
            used = max(used, engine.stats().pages_used)
        drawn.append({one.id: one.output_ids for one in requests})
    alone, together = drawn[0]["0"], list(drawn[1].values())
    same = together[:-1] if rows > 2 else together
    gpu = engine.runner.model.device.type == "cuda"
    return {
        "rows": rows,
        "context": engine.max_model_len,
        "pages_used": used,
        "pages_total": plan.num_pages,
        "planned_bytes": plan.total,
        "peak_bytes": torch.cuda.max_memory_reserved() if gpu else None,
        "preemptions": engine.scheduler.preemptions,
        "complete": all(len(out) == tokens for out in together),
        "alike": all(out == same[0] for out in same),
        "as_alone": sum(a == b for a, b in zip(same[0], alone)) / tokens,
    }


def request(engine: Engine, name: str, length: int, sampling: SamplingParams, seed: int = 0) -> Request:
    """A prompt of `length` random ids, which begins like no other seed's."""
    draw, vocabulary = random.Random(seed), engine.model_config.vocab_size
    ids = [seed % vocabulary, *draw.choices(range(vocabulary), k=length - 1)]
    return Request(id=name, prompt_ids=ids, sampling=sampling, seed=seed)


def first_token(engine: Engine, length: int, seed: int = 0) -> float:
    """Seconds from a random prompt to its first token."""
    return served(engine, [request(engine, "prompt", length, SamplingParams(max_tokens=1, ignore_eos=True), seed=seed)])


def served(engine: Engine, requests: Sequence[Request]) -> float:
    """Seconds that requests take which arrive together."""
    begin = time.perf_counter()
    for one in requests:
        engine.add(one)
    while engine.has_work:
        engine.step()
    return time.perf_counter() - begin


def place(engine: Engine, requests: Sequence[Request], *, alike: bool = False, leave: int = 0) -> None:
    """Admits `requests` to an idle engine with their prompts done, but for `leave` tokens of the last.

    Keys and values depend on the position alone; recurrent states are each request's own, or the same if `alike`.
    Raises `CapacityError` when they do not all fit at once.
    """
    scheduler, limits = engine.scheduler, engine.scheduler.limits
    for one in requests:
        engine.add(one)
    scheduler.limits = replace(limits, max_num_batched_tokens=sum(len(one.prompt_ids) for one in requests) - leave)
    try:
        plan = scheduler.plan()
    finally:
        scheduler.limits = limits
    if plan is None or len(plan.rows) < len(requests):
        clear(engine, requests)
        raise CapacityError(f"{len(requests)} requests of {len(requests[0].prompt_ids)} tokens do not fit at once")
    _scatter(engine, plan.rows, alike)
    done = (RowResult(row.request_id, tokens=(row.ids[-1],) if row.samples else ()) for row in plan.rows)
    scheduler.commit(plan, StepResult(tuple(done)))


def clear(engine: Engine, requests: Sequence[Request]) -> None:
    for one in requests:
        engine.abort(one.id)
    while engine.has_work:
        engine.step()


@torch.inference_mode()
def _scatter(engine: Engine, rows: Sequence[Any], alike: bool) -> None:
    device = engine.runner.model.device
    generator = torch.Generator(device).manual_seed(0)
    tables = [torch.tensor(row.pages, device=device) for row in rows]
    for cache in engine.runner.caches:
        if isinstance(cache, AttentionCache):
            for pool in cache:
                shape = (max(len(table) for table in tables), *pool.shape[1:])
                pages = torch.empty(shape, dtype=pool.dtype, device=device).normal_(generator=generator)
                for table in tables:
                    pool.index_copy_(0, table, pages[: len(table)])
            continue
        for part, scale in ((cache.state, 0.1), (cache.conv, 1.0)):
            for row in rows:
                if alike and row is not rows[0]:
                    part[row.slot].copy_(part[rows[0].slot])
                else:
                    part[row.slot].normal_(0.0, scale, generator=generator)


def _timed(engine: Engine, rows: int, context: int, steps: int, rounds: int, ceilings: Ceilings) -> dict[str, Any]:
    _run(engine, WARM_UP)
    engine.runner.gaps.clear()
    with _replayed() as replayed:
        runs = [_run(engine, steps) for _ in range(rounds)]
    seconds, tokens = (middle([run[i] / steps for run in runs]) for i in (0, 1))
    found: dict[str, Any] = {"ms": 1e3 * seconds}
    if replayed:
        torch.cuda.synchronize()
        of_a_step = replayed[-max(1, len(replayed) // (steps * rounds)) :]

        def once() -> None:
            for graph in of_a_step:
                graph.replay()

        device = seconds_of(once, engine.runner.model.device)
        found |= {"device_ms": 1e3 * device, "host_us": 1e6 * (seconds - device),
                  "gap_us": 1e6 * middle(engine.runner.gaps)}
    clear(engine, [Request(str(i), [], SamplingParams(), 0) for i in range(rows)])
    moved = step_bytes(engine.model_config, rows, context, engine.runner.model.dtype.itemsize)
    return found | {
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_each": tokens / seconds / rows,
        "tokens_per_step": tokens,
        "bytes": moved,
        "flops": flops(engine.model_config, rows, context, rows),
        "share": moved / seconds / ceilings.read,
    }


def _run(engine: Engine, steps: int) -> tuple[float, int]:
    """(seconds, tokens) of so many steps."""
    begin, tokens = time.perf_counter(), 0
    for _ in range(steps):
        tokens += sum(len(event.tokens) for event in engine.step())
    return time.perf_counter() - begin, tokens


@contextmanager
def _replayed() -> Iterator[list[torch.cuda.CUDAGraph]]:
    """The graphs that are replayed meanwhile, in order."""
    seen: list[torch.cuda.CUDAGraph] = []
    replay = torch.cuda.CUDAGraph.replay

    def noting(graph: torch.cuda.CUDAGraph) -> None:
        seen.append(graph)
        replay(graph)

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", noting):
        yield seen
