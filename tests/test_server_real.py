"""The same doors over the real engine and the embedded model: identities that a client can see."""

from __future__ import annotations

import random
from pathlib import Path

import openai
import pytest
from served import Served, served

import tritium
from tritium.api.door import load
from tritium.bench.load import Load, run_load
from tritium.config import EngineConfig

EMBEDDED = Path(tritium.__file__).parent / "embedded" / "dense"
QUESTION = [{"role": "user", "content": "Tom has 3 apples and buys 4 more. How many apples does he have?"}]


@pytest.fixture(scope="module")
def real_server():
    if not (EMBEDDED / "model.safetensors").is_file():
        pytest.skip("the embedded model is not in this checkout")
    config = EngineConfig(model="tritium-dense", max_model_len=1024, max_num_seqs=16, num_threads=1,
                          show_progress=False)
    engine, door = load(config)
    with served(engine, door.chat, model="tritium-dense") as server:
        yield server


def ask(server: Served, **fields) -> dict:
    return {"model": server.model, "messages": QUESTION, "max_tokens": 40, "temperature": 0.8} | fields


def test_streamed_is_whole(real_server, seed):
    create = real_server.client.chat.completions.create
    whole = create(**ask(real_server, seed=seed, logprobs=True, top_logprobs=2))
    chunks = list(create(**ask(real_server, seed=seed, logprobs=True, top_logprobs=2), stream=True,
                         stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    message = whole.choices[0].message
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert "".join(getattr(delta, "reasoning", "") for delta in deltas) == getattr(message, "reasoning", "")
    entries = [e for c in chunks[:-1] if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [entry.token for entry in entries] == [entry.token for entry in whole.choices[0].logprobs.content]
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    usage, first = chunks[-1].usage, whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (first.prompt_tokens, first.completion_tokens)
    # The very prompt of the answer before: all but its last token are reused.
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


def test_n_is_n_separate_seeds(real_server, seed):
    create = real_server.client.completions.create
    fields = {"model": real_server.model, "prompt": "The answer is", "max_tokens": 20, "temperature": 1.0}
    together = create(**fields, n=3, seed=seed)
    apart = [create(**fields, seed=seed + i) for i in range(3)]
    assert [choice.text for choice in together.choices] == [done.choices[0].text for done in apart]


def test_a_stop_string_cuts_the_same_text(real_server, seed):
    create = real_server.client.completions.create
    fields = {"model": real_server.model, "prompt": "Once", "max_tokens": 40, "seed": seed,
              "extra_body": {"ignore_eos": True}}
    text = create(**fields).choices[0].text
    at = random.Random(seed).randrange(len(text) // 2, len(text) - 3)
    stop = text[at : at + 3]
    stopped = create(**fields, stop=stop).choices[0]
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"


def test_echo_scores_a_token_as_generation_does(real_server):
    """Each prompt token's log-probability is that of the token when a bias forces it after what precedes it."""
    create = real_server.client.completions.create
    prompt = real_server.post("/tokenize", {"prompt": "Seven and five make twelve, don't they?"}).json()["tokens"]
    fields = {"model": real_server.model, "logprobs": 0, "max_tokens": 1}
    scores = create(prompt=prompt, echo=True, **fields).choices[0].logprobs.token_logprobs
    assert (len(scores), scores[0]) == (len(prompt) + 1, None)
    for i in range(1, len(prompt)):
        forced = create(prompt=prompt[:i], logit_bias={str(prompt[i]): 100}, temperature=0, **fields)
        assert forced.choices[0].logprobs.token_logprobs[0] == pytest.approx(scores[i], abs=1e-4)


def test_too_long_a_prompt_is_refused_with_the_numbers(real_server):
    with pytest.raises(openai.BadRequestError, match="context is 1024 tokens and the prompt has"):
        real_server.client.completions.create(model=real_server.model, prompt="word " * 2000)


def test_load_with_a_third_of_the_clients_killed(real_server):
    """More streams than slots; none is corrupted, and all pages and slots are back within a second."""
    load = Load(clients=24, requests=24, max_tokens=24, kill_fraction=1 / 3, verify=6, prompts=("Hi", "Count to 9."))
    report = run_load(real_server.url, load)
    assert (report.completed, report.killed, report.errors) == (16, 8, 0)
    assert (report.verified, report.corrupted) == (6, 0)
    assert report.freed_seconds is not None
    assert report.freed_seconds < 1
    assert report.idle_seconds is not None
    assert report.idle_seconds < 1
    real_server.wait_idle()
