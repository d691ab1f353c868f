"""Sessions that outlive the process: files of the prefix cache, and checkpoints that were evicted to host memory."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from checkpoints import random_checkpoint
from serving import Logits, again, assemble, mixed_requests, prompt, request, run, serve

from tritium.api import LLM
from tritium.config import EngineConfig
from tritium.core import CacheCall, CacheFileError, RequestError, SamplingParams
from tritium.draft.proposers import HeadProposer
from tritium.engine import Engine

LARGE: dict[str, object] = {"num_gpu_blocks_override": 160, "num_checkpoints": 64, "max_num_seqs": 32}
"""What `assemble` takes for granted."""
EMBEDDED = Path(__file__).parents[1] / "tritium" / "embedded" / "dense" / "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Path:
    directory = tmp_path_factory.mktemp("model")
    random_checkpoint(directory, layer_types="lfl", nk=1, nv=2, heads=2, kv_heads=1, seed=seed)
    return directory


def load(model: Path, kept: Path | None = None, **options: object) -> Engine:
    small = {"num_gpu_blocks_override": 100, "num_checkpoints": 16, "max_num_seqs": 8, "speculate": "mtp:2"}
    return Engine.load(EngineConfig(model=str(model), cache_dir=None if kept is None else str(kept),
                                    max_model_len=1024, show_progress=False, num_threads=1, **small | options))


def save(engine: Engine, name: str = "", ids: list[int] | None = None) -> dict[str, object]:
    return engine.keep(CacheCall("", "save", name, None if ids is None else tuple(ids)))


def restore(engine: Engine, name: str = "") -> dict[str, object]:
    return engine.keep(CacheCall("", "load", name))


def ask(engine: Engine, ids: list[int], **sampling: object) -> tuple[list[int], int]:
    """Tokens, and how many of the prompt's were cached."""
    served, _ = run(engine, [each := request("asked", ids, **sampling)])
    assert each.num_cached is not None
    return served["asked"][0], each.num_cached


def flush(engine: Engine) -> dict[str, object]:
    return engine.keep(CacheCall("", "flush"))


# ---- host memory -------------------------------------------------------------------------------------------------


def test_through_host_memory_nothing_changes(model: Path, seed: int) -> None:
    """Hardly a slot for checkpoints: all go out and come back, and hit as if they had stayed."""
    rng = random.Random(seed)
    engine = load(model, swap_space=0.01, **LARGE)
    assert engine.memory_plan.num_host_checkpoints >= 64
    assert "evicted checkpoints, in host memory" in engine.memory_plan.table()
    first = mixed_requests(rng, 8, longest=100)
    requests = first + [replace(r, id=f"{r.id} again", prompt_ids=r.prompt_ids + prompt(rng, 5)) for r in first]
    off, tier = Logits(), Logits()
    want, _ = serve(engine, again(requests), observe=off)
    ample, stats = serve(engine, again(requests), arrive=lambda i: 30 * i, checkpoints=64)
    assert stats.checkpoints_moved == {"evicted": 0, "restored": 0}
    got, few = serve(engine, again(requests), arrive=lambda i: 30 * i, seqs=2, checkpoints=1, host=64, observe=tier)
    assert got == ample == want
    assert few.prefix_hit_tokens == stats.prefix_hit_tokens > 200
    assert few.checkpoints_moved["restored"] >= 8
    assert few.checkpoints_host > 8
    assert all((logits == off.rows[at]).all() for at, logits in tier.rows.items())


@pytest.mark.parametrize("drafts", [0, 2])
def test_where_everything_moves_all_the_time(model: Path, seed: int, drafts: int) -> None:
    """Few pages, few slots, few places in host memory; arrivals, aborts and preemptions."""
    rng = random.Random(seed)
    engine = load(model, swap_space=0.01, **LARGE)
    shared = prompt(rng, 90)
    requests = [request(f"r{i}", shared[: rng.choice((20, 64, 90))] + prompt(rng, rng.randint(1, 30)), max_tokens=20,
                        temperature=i % 2, seed=i) for i in range(24)]  # fmt: skip
    want, _ = serve(engine, again(requests))
    small = assemble(engine, budget=70, pages=8, seqs=4, checkpoints=1, host=4, depth=lambda _: drafts,
                     proposer=HeadProposer() if drafts else None)  # fmt: skip
    for _ in range(2):
        arrivals = [rng.randrange(80) for _ in requests]
        leaves = [rng.choice([None, None, None, rng.randrange(100)]) for _ in requests]
        got, stats = run(small, again(requests), arrive=arrivals.__getitem__, leave=leaves.__getitem__)
        assert got == {name: want[name] for name in got}
    assert min(stats.checkpoints_moved.values()) > 5


# ---- files -------------------------------------------------------------------------------------------------------


def test_what_was_saved_goes_on_as_if_nothing_had_happened(model: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    chats = [prompt(rng, length) for length in (30, 64, 250)]
    engine = load(model, tmp_path)
    answers = [ask(engine, ids, max_tokens=20)[0] for ids in chats]
    saved = save(engine)
    next_turn = [[*ids, *answer, *prompt(rng, 9)] for ids, answer in zip(chats, answers)]
    other_turn = [[*ids, *prompt(rng, 9)] for ids in chats]
    want = [ask(engine, ids, max_tokens=20) for ids in (*next_turn, *other_turn)]

    after = load(model, tmp_path)  # restored at its start
    stats = after.stats()
    assert (stats.pages_cached, stats.checkpoints) == (saved["pages"], saved["checkpoints"])
    assert [ask(after, ids, max_tokens=20) for ids in (*next_turn, *other_turn)] == want
    assert all(len(ids) - cached <= 64 for ids, (_, cached) in zip(next_turn, want))
    assert restore(after)["pages"] == 0  # it is all there


def test_a_cache_larger_than_memory_keeps_what_was_used_last(model: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    chats = [prompt(rng, 200) for _ in range(5)]
    engine = load(model, tmp_path)
    for ids in (*chats, chats[0]):
        ask(engine, ids)
    save(engine)
    small = load(model, tmp_path, num_gpu_blocks_override=16, num_checkpoints=1, max_num_seqs=2, swap_space=0.0002)
    assert small.stats().checkpoints + small.stats().checkpoints_host >= 3
    assert small.stats().checkpoints_host > 0
    assert ask(small, chats[0])[1] == 199
    assert ask(small, chats[4])[1] >= 199 - 64


def test_one_session_and_what_continues_it(model: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    engine = load(model, tmp_path)
    mine, other = prompt(rng, 150), prompt(rng, 150)
    other[:70] = mine[:70]
    [answer, _], _ = ask(engine, mine), ask(engine, other)
    assert save(engine, "mine", mine)["tokens"] == 157  # the last token of an answer is never computed
    flush(engine)
    assert ask(engine, other)[1] == 0
    flush(engine)
    restore(engine, "mine")
    assert ask(engine, mine + answer)[1] == 157
    assert ask(engine, other)[1] <= 70
    ask(engine, mine[:100] + prompt(rng, 30))
    assert save(engine, "part", mine[:100] + prompt(rng, 100))["tokens"] == 100  # as far as they agree
    with pytest.raises(CacheFileError, match="nothing to save"):
        save(engine, "none", prompt(rng, 50))


def test_a_fork_costs_no_copy_of_kv(model: Path, seed: int) -> None:
    rng = random.Random(seed)
    engine = assemble(load(model, **LARGE), checkpoints=16)
    shared = prompt(rng, 640)
    ask(engine, shared)
    used = engine.stats().pages_cached
    run(engine, [request(f"fork {i}", shared + [i + 1], max_tokens=2) for i in range(8)])
    assert engine.stats().pages_cached == used + 8  # each fork has a page of its own behind the ten that all read


# ---- refused -----------------------------------------------------------------------------------------------------


def reheaded(file: Path, change: dict[str, str]) -> bytes:
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] |= change
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def test_files_that_are_refused(model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, seed: int
                                ) -> None:
    rng = random.Random(seed)
    engine = load(model, tmp_path)
    ids = prompt(rng, 150)
    want = ask(engine, ids)[0]
    save(engine, "good")
    good = (tmp_path / "good.safetensors").read_bytes()
    flush(engine)

    def refused(data: bytes, why: str, by: Engine = engine) -> None:
        (tmp_path / "bad.safetensors").write_bytes(data)
        before = by.stats().pages_cached
        with pytest.raises(CacheFileError, match=why) as told:
            restore(by, "bad")
        assert "\n" not in str(told.value)
        assert by.stats().pages_cached == before == 0

    refused(b"", "empty")
    refused(good[:5], "damaged")
    refused(good[: len(good) // 2], "damaged")
    refused(good[:-1], "damaged")
    refused(good + b"\0", "damaged")
    refused(reheaded(tmp_path / "good.safetensors", {"version": "0"}), "version 0")
    refused(reheaded(tmp_path / "good.safetensors", {"version": "2"}), "version 2")
    refused((model / "model.safetensors").read_bytes(), "not a cache of Tritium's")
    header = 8 + int.from_bytes(good[:8], "little")
    for at in [*range(8), *rng.sample(range(8, header), 60), *rng.sample(range(header, len(good)), 10), len(good) - 1]:
        flipped = bytearray(good)
        flipped[at] ^= 1 << rng.randrange(8)
        refused(bytes(flipped), "safetensors")
    refused(good, "another dtype \\(float32, here bfloat16\\)", load(model, tmp_path, dtype="bfloat16"))
    other = tmp_path_factory.mktemp("other")
    random_checkpoint(other, layer_types="lfl", nk=1, nv=2, heads=2, kv_heads=1, seed=seed + 1)
    refused(good, "another model", load(other, tmp_path))
    with pytest.raises(CacheFileError, match="no saved cache 'absent'"):
        restore(engine, "absent")
    for name in ("../good", "a/b", ".hidden", "x" * 65, "ö", "a\n", " "):
        with pytest.raises(RequestError, match="is no name"):
            restore(engine, name)
    restore(engine, "good")
    assert ask(engine, ids) == (want, 149)
    # One that is refused at the start leaves an empty cache and an engine that serves.
    (tmp_path / "cache.safetensors").write_bytes(good[:-1])
    assert ask(load(model, tmp_path), ids) == (want, 0)


def test_a_crash_midway_leaves_the_old_file(model: Path, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
                                            ) -> None:
    engine = load(model, tmp_path)
    ask(engine, ids := prompt(random.Random(seed), 150))
    save(engine)
    old = (tmp_path / "cache.safetensors").read_bytes()
    ask(engine, prompt(random.Random(seed + 1), 150))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, full)
            with pytest.raises(CacheFileError, match="No space left on device"):
                save(engine)
        assert [path.name for path in tmp_path.iterdir()] == ["cache.safetensors"]
        assert (tmp_path / "cache.safetensors").read_bytes() == old
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, hard))  # a write itself fails, half of the file is there
    try:
        with pytest.raises(CacheFileError, match="cannot be written: File too large") as refused:
            save(engine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused.value.hint == "what was there is as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["cache.safetensors"]
    assert (tmp_path / "cache.safetensors").read_bytes() == old
    (tmp_path / ".cache.safetensors.123.tmp").write_bytes(b"half of a")
    assert ask(load(model, tmp_path), ids)[1] == 149
    assert [path.name for path in tmp_path.iterdir()] == ["cache.safetensors"]


def test_a_full_disk(model: Path, tmp_path: Path, seed: int) -> None:
    """A file system of its own, too small for a second file: one clear line, the old file whole, and the engine goes
    on."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        engine = load(model, tmp_path)
        want, _ = ask(engine, ids := prompt(random.Random(seed), 150))
        size = save(engine)["bytes"]
        assert isinstance(size, int)
        old = (tmp_path / "cache.safetensors").read_bytes()
        (tmp_path / "ballast").write_bytes(bytes(2**20 - size - size // 2))
        with pytest.raises(CacheFileError, match="cannot be written: No space left on device"):
            save(engine)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ballast", "cache.safetensors"]
        assert (tmp_path / "cache.safetensors").read_bytes() == old
        assert ask(engine, ids)[0] == ask(load(model, tmp_path), ids)[0] == want
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_without_a_directory_nothing_is_kept(model: Path) -> None:
    for action in ("save", "load"):
        with pytest.raises(RequestError, match="--cache-dir"):
            load(model).keep(CacheCall("", action))


def test_offline_saves_when_it_closes(tmp_path: Path) -> None:
    if not EMBEDDED.is_file():
        pytest.skip("the embedded model is not in this checkout")
    for cached in (False, True):
        with LLM("tritium-dense", cache_dir=str(tmp_path), max_model_len=512, show_progress=False) as llm:
            usage = llm.generate("One two three four five six seven.", SamplingParams(max_tokens=4))[0].usage
        assert (usage.cached_tokens == usage.prompt_tokens - 1) is cached


# ---- over HTTP ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(directory: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`tritium serve` in a process of its own, and where it listens."""
    command = [sys.executable, "-c", "from tritium.cli.main import main; main()", "serve", "tritium-dense",
               "--port", "0", "--cache-dir", str(directory), "--max-model-len", "1024", "--num-threads", "1",
               "--log-format", "none", "--quiet"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "serving on" in line)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield line.split()[-1], process
    finally:
        process.kill()
        process.wait()


def test_a_server_that_is_killed(tmp_path: Path) -> None:
    if not EMBEDDED.is_file():
        pytest.skip("the embedded model is not in this checkout")
    story = [{"role": "user", "content": "Say the alphabet, and after that the numbers. " * 6}]
    body = {"messages": story, "temperature": 0, "max_tokens": 24}

    def chat(url: str, **more: object) -> tuple[str, int, int]:
        answer = httpx.post(f"{url}/v1/chat/completions", json=body | more, timeout=60).json()
        usage = answer["usage"]
        return (answer["choices"][0]["message"]["content"], usage["prompt_tokens"],
                usage["prompt_tokens_details"]["cached_tokens"])

    def cache(url: str, action: str, **fields: object) -> tuple[int, dict]:
        answer = httpx.post(f"{url}/cache/{action}", json=fields, timeout=60)
        return answer.status_code, answer.json()

    with server(tmp_path) as (url, process):
        text, length, _ = chat(url)
        turn = [*story, {"role": "assistant", "content": text}, {"role": "user", "content": "Go on."}]
        status, saved = cache(url, "save")
        assert status == 200
        assert saved["tokens"] >= length
        status, mine = cache(url, "save", name="story", messages=story)
        assert (status, mine["name"], mine["tokens"]) == (200, "story", saved["tokens"])
        went_on = chat(url, messages=turn)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with server(tmp_path) as (url, process):
        again_text, _, cached = chat(url)
        assert again_text == text
        assert cached >= length - 64
        assert chat(url, messages=turn)[:2] == went_on[:2]
        assert cache(url, "flush")[1]["pages"] > 0
        assert chat(url)[2] == 0
        cache(url, "flush")
        assert cache(url, "load", name="story")[0] == 200
        assert chat(url) == (text, length, length - 1)
        (tmp_path / "torn.safetensors").write_bytes((tmp_path / "story.safetensors").read_bytes()[:-9])
        status, refused = cache(url, "load", name="torn")
        assert (status, refused["error"]["code"]) == (409, "cache_file")
        assert "damaged" in refused["error"]["message"]
        assert cache(url, "load", name="../story")[0] == 400
        assert chat(url)[0] == text
        (tmp_path / "cache.safetensors").unlink()
        process.terminate()  # drains, and saves
        assert process.wait(60) in (0, -signal.SIGTERM)
    assert (tmp_path / "cache.safetensors").is_file()
