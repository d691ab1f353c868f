"""The evaluations: what counts as an answer, runs that are cut and go on, divergences against a plain statement."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from served import MODEL, says, served

from tritium.cli.main import main
from tritium.config import EngineConfig
from tritium.core import ConfigError, RequestError, TritiumError
from tritium.eval import gsm8k, kl, tiny
from tritium.models.checkpoint import find_checkpoint
from tritium.models.save import save

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PROBLEMS = [{"question": f"What is {i} + 2?", "answer": f"{i} + 2 is {i + 2}.\n#### {i + 2}"} for i in range(12)]
SETTINGS = gsm8k.Settings(model=MODEL, engine="server", data="d", fewshot="", shots=0, chat=False, thinking=None,
                          max_tokens=64)  # fmt: skip


def write(path: Path, problems: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path


# --- extraction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("16 - 3 = 13.\n#### 13", "13", "13"),
        ("#### -7", "-7", "-7"),
        ("#### 1,234,567", "1234567", "1234567"),
        ("#### 2.5", "2.5", "2.5"),
        ("#### 18.", "18", "18"),
        ("#### 18\n#### 19", "18", "19"),
        ("#### $18", None, "18"),
        ("####18", None, "18"),
        ("She makes $1,080.50 a day.", None, "1080.50"),
        ("First 5, then 12, so 7", None, "7"),
        ("It is 3 apples.", None, "3"),
        ("so -42 degrees", None, "-42"),
        ("10-4=6", None, "6"),
        ("there is none", None, None),
        ("", None, None),
        ("The answer is 5...", None, "5.."),
        ("the answer is 5 ...", None, ".."),
    ],
)
def test_what_counts_as_the_answer(text: str, strict: str | None, flexible: str | None) -> None:
    assert (gsm8k.strict(text), gsm8k.flexible(text)) == (strict, flexible)


def test_score_and_its_standard_error() -> None:
    texts = ["#### 2", "So 3", "#### 5 or rather 4", "none"]
    figures = gsm8k.score(PROBLEMS[:4], texts)
    assert (figures["strict"], figures["flexible"]) == (0.25, 0.75)
    assert figures["strict_stderr"] == pytest.approx(math.sqrt(0.25 * 0.75 / 3))
    assert figures["flexible_stderr"] == pytest.approx(math.sqrt(0.25 * 0.75 / 3))
    assert gsm8k.score(PROBLEMS[:1], ["2"])["flexible_stderr"] is None


@pytest.mark.parametrize("line", ["no", "[]", '{"question": "x"}', '{"question": "x", "answer": "no number"}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "data", PROBLEMS[:1])
    path.write_text(path.read_text() + line)
    with pytest.raises(ConfigError, match="line 2"):
        gsm8k.read(path)


def test_lines_end_where_json_lines_do(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text('{"question": "a\u2028b\x85c", "answer": "#### 1"}\n\n', encoding="utf-8")
    assert [problem["question"] for problem in gsm8k.read(path)] == ["a\u2028b\x85c"]
    path.write_bytes(b'{"question": "\xff", "answer": "#### 1"}\n')
    with pytest.raises(ConfigError, match="line 1"):
        gsm8k.read(path)


def test_the_published_problems() -> None:
    if not DATA.exists():
        pytest.skip(f"GSM8K is not at {DATA}")
    problems, examples = gsm8k.read(DATA / "gsm8k-test.jsonl"), gsm8k.read(DATA / "gsm8k-train-64.jsonl")[:5]
    assert len(problems) == 1319
    figures = gsm8k.score(problems, [problem["answer"] for problem in problems])
    assert figures["strict"] == figures["flexible"] == 1.0
    prompt = gsm8k.as_text(gsm8k.turns(examples, problems[0]["question"]))
    assert prompt.startswith(f"Question: {examples[0]['question']}\nAnswer: {examples[0]['answer']}\n\nQuestion: ")
    assert prompt.endswith(f"{problems[0]['question']}\nAnswer:")
    assert prompt.count("Question:") == 6


# --- the file of answers, servers -----------------------------------------------------------------------------------


def test_answers_are_kept_and_a_torn_line_is_not(tmp_path: Path) -> None:
    path = tmp_path / "out"
    answers = gsm8k.Answers(path, SETTINGS)
    answers.add(3, "three\nlines")
    answers.close()
    path.write_bytes(path.read_bytes() + b'{"i": 4, "te')
    again = gsm8k.Answers(path, SETTINGS)
    assert again.texts == {3: "three\nlines"}
    again.add(4, "four")
    again.close()
    assert gsm8k.Answers(path, SETTINGS).texts == {3: "three\nlines", 4: "four"}


@pytest.mark.parametrize("change", [{"model": "other"}, {"data": "e"}, {"shots": 5}, {"chat": True}, {"max_tokens": 9}])
def test_answers_to_something_else_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    gsm8k.Answers(tmp_path / "out", SETTINGS).close()
    with pytest.raises(ConfigError, match=next(iter(change))):
        gsm8k.Answers(tmp_path / "out", dataclasses.replace(SETTINGS, **change))  # type: ignore[arg-type]
    (tmp_path / "out").write_text("my diary\n")
    with pytest.raises(ConfigError, match="not of such a file"):
        gsm8k.Answers(tmp_path / "out", SETTINGS)
    assert (tmp_path / "out").read_text() == "my diary\n"


@pytest.mark.parametrize("mine", [b"my diary", b'{"a": 1}', b"\n", b"\xff\xfe"])
def test_a_file_of_one_line_without_its_end_is_not_written_over(tmp_path: Path, mine: bytes) -> None:
    (tmp_path / "out").write_bytes(mine)
    with pytest.raises(ConfigError, match="something else"):
        gsm8k.Answers(tmp_path / "out", SETTINGS)
    assert (tmp_path / "out").read_bytes() == mine


def test_answers_go_to_new_directories_and_on_behind_a_torn_first_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out"
    gsm8k.Answers(path, SETTINGS).close()
    head = path.read_bytes()
    path.write_bytes(head[:20])
    gsm8k.Answers(path, SETTINGS).close()
    assert path.read_bytes() == head


@pytest.mark.parametrize(("flags", "refusal"), [
    (["--url", "localhost:8000"], "localhost:8000 is not an address"),
    (["--url", "http://localhost:8000", "--quantize", "int8"], "does not take quantize=int8"),
])  # fmt: skip
def test_what_no_server_can_be_asked(flags: list[str], refusal: str, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    data = write(tmp_path / "data", PROBLEMS[:1])
    with pytest.raises(SystemExit) as ended:
        main(["eval", "gsm8k", "--data", str(data), "--shots", "0", "--model", MODEL, *flags])
    assert ended.value.code == 2
    assert refusal in capsys.readouterr().err


@pytest.mark.parametrize("chat", [[], ["--chat", "--no-thinking"]])
def test_against_a_server(tmp_path: Path, chat: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data", PROBLEMS)
    with served(says("It is 9, so\n#### 9")) as server:
        with pytest.raises(SystemExit) as ended:
            main(["eval", "gsm8k", "--data", str(data), "--fewshot", str(data), "--url", server.url, "--model", MODEL,
                  "--concurrency", "4", "--out", str(tmp_path / "out"), *chat])  # fmt: skip
        assert not ended.value.code
    out, err = capsys.readouterr()
    figures = json.loads(out.splitlines()[-1])
    assert figures["strict"] == figures["flexible"] == pytest.approx(1 / 12)
    assert (figures["shots"], figures["count"]) == (5, 12)
    assert "8.33%" in err
    assert "12/12" in err


def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    """The first is killed by the system midway; the second asks only what is missing."""
    data, out = write(tmp_path / "data", PROBLEMS), tmp_path / "out"
    with served(says("#### 9 " + "a" * 60, step_seconds=0.004)) as server:
        command = [sys.executable, "-c", "from tritium.cli.main import main; main()", "eval", "gsm8k", "--data",
                   str(data), "--shots", "0", "--url", server.url, "--model", MODEL, "--concurrency", "1", "--out",
                   str(out)]  # fmt: skip
        running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not out.exists() or out.read_bytes().count(b"\n") < 4:
            assert time.monotonic() < deadline
            assert running.poll() is None
            time.sleep(0.01)
        running.kill()
        running.wait()
        kept = out.read_bytes()
        kept = kept[: kept.rfind(b"\n") + 1]
        assert 4 <= kept.count(b"\n") < 13
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(kept)
    entries = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert sorted(entry["i"] for entry in entries) == list(range(12))
    assert json.loads(done.stdout)["strict"] == pytest.approx(1 / 12)


async def _post(handler: object) -> dict[str, object]:
    async with httpx.AsyncClient(base_url="http://x/v1/", transport=httpx.MockTransport(handler)) as client:  # type: ignore[arg-type]
        return await gsm8k.post(client, "completions", {}, pause=0.001)


def test_a_busy_server_is_asked_again() -> None:
    left = [httpx.Response(429, headers={"retry-after": "0"}), httpx.Response(503), httpx.ConnectError("gone"),
            httpx.Response(200, json={"choices": [{"text": "#### 1"}]})]  # fmt: skip

    def busy(request: httpx.Request) -> httpx.Response:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert asyncio.run(_post(busy)) == {"text": "#### 1"}
    seen = []
    with pytest.raises(TritiumError, match="500 out of order"):
        asyncio.run(_post(lambda request: seen.append(1) or httpx.Response(500, text="out of order")))
    assert len(seen) == gsm8k.TRIES
    with pytest.raises(TritiumError, match="404"):
        asyncio.run(_post(lambda request: seen.append(1) or httpx.Response(404)))
    assert len(seen) == gsm8k.TRIES + 1
    with pytest.raises(TritiumError, match="not an answer"):
        asyncio.run(_post(lambda request: httpx.Response(200, text="<html>")))


def test_in_this_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model on its own kind of problem; the second run reads what the first left."""
    sums = ((17, 25), (40, 31), (12, 9))
    problems = [{"question": f"What is {a} + {b}?", "answer": f"#### {a + b}"} for a, b in sums]
    data, out = write(tmp_path / "data", problems), tmp_path / "out"
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main(["eval", "gsm8k", "--data", str(data), "--shots", "0", "--chat", "--no-thinking", "--out", str(out),
                  "-q", "--num-threads", "1"])  # fmt: skip
        assert not ended.value.code
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (figures["count"], figures["strict"]) == (3, 0)
        assert figures["flexible"] >= 2 / 3


# --- divergence -----------------------------------------------------------------------------------------------------


def test_divergence_is_what_a_plain_statement_says() -> None:
    generator = torch.Generator().manual_seed(3)
    p_TV = torch.randn(150, 37, generator=generator) * 4
    q_TV = p_TV + torch.randn(150, 37, generator=generator) * 0.3
    following = torch.randint(37, (149,), generator=generator).tolist()
    found = kl.Divergence()
    found.add(p_TV, q_TV, following)
    figures = found.figures()
    each, losses, same = [], [0.0, 0.0], 0
    for p_V, q_V, token in zip(p_TV.tolist(), q_TV.tolist(), following):
        p = [math.exp(x) / math.fsum(map(math.exp, p_V)) for x in p_V]
        q = [math.exp(x) / math.fsum(map(math.exp, q_V)) for x in q_V]
        each.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q)))
        losses[0] -= math.log(p[token])
        losses[1] -= math.log(q[token])
        same += p.index(max(p)) == q.index(max(q))
    each.sort()
    assert figures["positions"] == 149
    assert figures["kl_mean"] == pytest.approx(math.fsum(each) / 149, rel=1e-9)
    assert figures["kl_median"] == pytest.approx(each[74], rel=1e-9)
    assert figures["kl_p99"] == pytest.approx(each[147], rel=1e-9)
    assert figures["kl_max"] == pytest.approx(each[148], rel=1e-9)
    assert figures["top1_agreement"] == same / 149
    assert figures["perplexity"] == pytest.approx(math.exp(losses[0] / 149), rel=1e-9)
    assert figures["perplexity_quantized"] == pytest.approx(math.exp(losses[1] / 149), rel=1e-9)


def test_tokens_of_probability_zero_add_nothing() -> None:
    p_TV = torch.tensor([[0.0, 1.0, -torch.inf]])
    found = kl.Divergence()
    found.add(p_TV, p_TV, [1])
    assert found.kl == [0.0]


TEXT = "Mia has 14 apples. She buys 3 bags with 6 apples each and gives 9 apples to Tom. " * 12
CONFIG = EngineConfig(show_progress=False, num_threads=1)


def test_a_model_is_no_way_from_itself() -> None:
    figures = kl.run(CONFIG, TEXT, window=100)
    assert (figures["kl_max"], figures["top1_agreement"]) == (0.0, 1.0)
    assert figures["perplexity"] == figures["perplexity_quantized"] > 1.0
    # Windows of 100 tokens, a position for each but the last of a window.
    tokens = len(kl.text_format(CONFIG).encode(TEXT))
    assert figures["positions"] == tokens - -(-tokens // 100)


def test_a_quantized_model_is_some_way_from_itself_and_chunks_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    int4 = dataclasses.replace(CONFIG, quantize="int4")
    figures = kl.run(int4, TEXT, window=300, limit=1)
    assert 1e-6 < figures["kl_median"] < figures["kl_mean"] < figures["kl_p99"] <= figures["kl_max"]
    monkeypatch.setattr(kl, "CHUNK", 64)
    assert kl.run(int4, TEXT, window=300, limit=1)["kl_mean"] == pytest.approx(figures["kl_mean"], rel=1e-3)
    path = tmp_path / "text"
    path.write_text(TEXT)
    arguments = ["eval", "kl", "--text", str(path), "--window", "300", "--limit", "1", "-q", "--num-threads", "1"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--quantize", "int4"])
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["kl_mean"] == pytest.approx(figures["kl_mean"], rel=1e-3)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "--quantize" in capsys.readouterr().err


def test_a_text_of_one_token_is_refused() -> None:
    with pytest.raises(RequestError, match="too short"):
        kl.run(CONFIG, "a")


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(SystemExit) as ended:
        main(["eval", "kl", "--quantize", "int8", "--text", str(tmp_path / "text")])
    assert ended.value.code == 2
    assert "is not text in UTF-8: invalid continuation byte at byte 3" in capsys.readouterr().err
    save(find_checkpoint(dataclasses.replace(CONFIG, quantize="int8")), tmp_path / "saved")
    with pytest.raises(ConfigError, match="compared with itself"):
        kl.run(dataclasses.replace(CONFIG, model=str(tmp_path / "saved"), quantize="int8"), "a text")


# --- schemes --------------------------------------------------------------------------------------------------------


def test_how_schemes_are_spelled() -> None:
    one = tiny.variant(CONFIG, "int8+*in_proj_qkv*+*in_proj_z*-*out_proj*")
    assert (one.quantize, one.keep_bf16) == ("int8", ("*out_proj*",))
    assert one.quantize_also == ("*in_proj_qkv*", "*in_proj_z*")
    assert tiny.variant(one, "none") == CONFIG
    for wrong in ("int9", "", "int8+", "+*in_proj*"):
        with pytest.raises(ConfigError, match="not understood"):
            tiny.variant(CONFIG, wrong)


@pytest.mark.parametrize("flags", [["--schemes", "none,int9"], ["--schemes", "none,int8-*nothing*"],
                                   ["--schemes", "none", "--quantize", "fp8"]])  # fmt: skip
def test_schemes_are_understood_before_any_runs(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["eval", "tiny", "--count", "1", "-q", *flags])
    assert ended.value.code == 2
    assert not capsys.readouterr().out


def test_a_table_of_schemes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["eval", "tiny", "--schemes", "none,int8", "--count", "1", "-q", "--num-threads", "1", "--json"])
    assert not ended.value.code
    none, int8 = json.loads(capsys.readouterr().out.splitlines()[-1])["schemes"]
    assert "kl_mean" not in none
    assert 0 < int8["kl_mean"] < 0.1
    assert int8["bytes_per_token"] < none["bytes_per_token"]
