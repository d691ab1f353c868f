"""The prefix cache: what requests that share a beginning compute, and what checkpoints cost those that do not.

A workload's requests come one after the other, to an empty cache. `fewest`: tokens that none before had there, and
one at least of each prompt. The price is measured pair by pair in one run, and the middle of the ratios counts.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from tritium.bench.decode import served
from tritium.cache import common_prefix
from tritium.chat import ChatFormat, load_chat
from tritium.config import EngineConfig
from tritium.core import Request, SamplingParams
from tritium.engine import Engine

Turns = Sequence[tuple[dict[str, Any], dict[str, Any]]]
"""Questions and answers, as messages."""


def run(config: EngineConfig, turns: Turns, *, rows: int = 4, rounds: int = 5) -> Iterator[dict[str, Any]]:
    """A workload at a time; at last `rows` requests of 1,024 tokens and 256 more, with the cache and without."""
    config = dataclasses.replace(config, max_model_len=config.max_model_len or 7836)
    engine, rng = Engine.load(config), random.Random(0)

    def ids(count: int) -> list[int]:
        return [rng.randrange(engine.model_config.vocab_size) for _ in range(count)]

    long, shared, one = ids(6476), ids(369), ids(1000)
    asked = {"a prompt of 1,000, then with 16 more": [one, one + ids(16)],
             "2,000 prompts of 370 that share 369": [shared + ids(1) for _ in range(2000)]}
    for suffixes in ((40, 376, 1296), (1296, 376, 40)):
        asked[f"6,476 shared, then {', '.join(map(str, suffixes))}"] = [long + ids(count) for count in suffixes]
    asked["a chat; its last answer again; edited"] = chat(load_chat(engine.directory), turns)
    for name, prompts in asked.items():
        engine.scheduler.reuse.cache.flush()
        cached = [serve(engine, [prompt], 1)[1] for prompt in prompts]
        tokens, fewest = sum(map(len, prompts)), 0
        for i, prompt in enumerate(prompts):
            common = max((common_prefix(prompt, before) for before in prompts[max(0, i - 64) : i]), default=0)
            fewest += max(1, len(prompt) - common)
        yield {"workload": name, "requests": len(prompts), "tokens": tokens, "computed": tokens - sum(cached),
               "fewest": fewest, "share": sum(cached) / tokens}
    plain = dataclasses.replace(config, speculate="none")
    pair = [Engine.load(dataclasses.replace(plain, enable_prefix_caching=on)) for on in (True, False)]
    ratios = []
    for turn in range(rounds + 1):  # who goes first changes by turns
        seconds = {i: serve(pair[i], [ids(1024) for _ in range(rows)], 256)[0] for i in (turn % 2, 1 - turn % 2)}
        ratios.append(seconds[1] / seconds[0])
    ratios = sorted(ratios[1:])  # the first round warms up
    yield {"workload": f"{rows} of 1,024 that share nothing, 256 more", "requests": rows * rounds, "share": 0.0,
           "ratio": statistics.median(ratios), "ratios": [round(ratio, 3) for ratio in ratios]}


def chat(form: ChatFormat, turns: Turns) -> list[list[int]]:
    """A prompt each turn; the last once more; and the last with another question."""
    messages, prompts = list[dict[str, Any]](), list[list[int]]()
    for question, answer in turns[:-1]:
        prompts.append(form.encode(form.render([*messages, question])))
        last, messages = messages, [*messages, question, answer]
    return [*prompts, prompts[-1], form.encode(form.render([*last, turns[-1][0]]))]


def serve(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, int]:
    """(seconds, prompt tokens that the cache had) of requests that arrive together."""
    asked = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    requests = [Request(id=str(i), prompt_ids=list(ids), sampling=asked, seed=i) for i, ids in enumerate(prompts)]
    return served(engine, requests), sum(request.num_cached or 0 for request in requests)
