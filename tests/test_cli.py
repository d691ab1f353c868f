"""The command line: data on stdout, talk on stderr, an error is a line and a hint with the right exit code."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from typing import Any

import click
import pytest
from byte_chat import byte_chat_format
from scripted import ScriptedEngine, session_over

from tritium.api import Limits, Session
from tritium.cli import main as main_module
from tritium.cli.main import main
from tritium.cli.render import Printer, time_table
from tritium.config import EngineConfig
from tritium.core import CheckpointError, ConfigError, Event, Request, Timing, ToolCall, Usage
from tritium.server import ServerSettings


def outcome(*arguments: str) -> int:
    """Exit code of the command line, run in this process."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        (["nonsense"], 2, "No such command 'nonsense'", "tritium --help"),
        (["generate", "--temprature", "1", "x"], 2, "No such option", "tritium generate --help"),
        (["generate", "--temperature", "warm", "x"], 2, "'warm' is not a valid float", "tritium generate --help"),
        (["generate", "--temperature", "-1", "x"], 2, "temperature must be within [0, 100], got -1", None),
        (["generate", "--temperature", "nan", "x"], 2, "temperature must be a finite number", None),
        (["generate", "--n", "0", "x"], 2, "n must be within", None),
        (["generate", ""], 2, "the prompt is empty", "on stdin"),
        (["generate", "--dtype", "int3", "x"], 2, "'int3' is not one of", "tritium generate --help"),
        (["serve", "--tool-call-parser", "hermes"], 2, "'hermes' is not one of 'auto', 'qwen3_xml', 'qwen3_coder'",
         "tritium serve --help"),
        (["generate", "--max-num-seqs", "0", "x"], 2, "--max-num-seqs must be at least 1", None),
        (["generate", "--model", "no/such/dir", "x"], 1, "no/such/dir", "a directory, owner/name"),
        (["generate", "--device", "cuda:77", "x"], 2, "--device cuda:77", "--device"),
        (["generate", "--max-model-len", "99999999", "x"], 2, "above the checkpoint's limit", "--max-model-len"),
        (["serve", "one", "--model", "two"], 2, "two models are named", "name one"),
        (["serve", "--port", "99999"], 2, "99999", "tritium serve --help"),
    ],
)
def test_bad_input_gets_a_line_a_hint_and_a_code(
    arguments: list[str], code: int, message: str, hint: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(*arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    talk = [line for line in err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert message in talk[0]
    assert len(talk) == (1 if hint is None else 2)
    assert hint is None or hint in talk[1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (ConfigError("a", hint="b"), 2, ["error: a", "hint: b"]),
        (CheckpointError("broken"), 1, ["error: broken"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (ZeroDivisionError("oh"), 1, ["error: unexpected ZeroDivisionError: oh", "hint: add --traceback"]),
    ],
)
def test_every_error_ends_in_its_exit_code(
    error: BaseException, code: int, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    @click.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(main_module, "cli", fail)
    assert outcome() == code
    err = capsys.readouterr().err.strip().splitlines()
    assert [line.startswith(start) for line, start in zip(err, lines, strict=True)] == [True] * len(lines)
    assert outcome("--traceback") == code
    assert ("Traceback" in capsys.readouterr().err) == (code != 130)


def test_thinking_goes_to_stderr_and_the_answer_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer(headings=True)
    for thought in ("so ", "it is"):
        printer.show(Event(reasoning=thought))
    for piece in ("\n\n", "4", "2"):
        printer.show(Event(text=piece))
    printer.end()
    out, err = capsys.readouterr()
    assert out == "42\n"
    assert err == "--- thinking\nso it is\n--- answer\n"
    assert (printer.reasoning, printer.text) == ("so it is", "42")


def test_a_tool_call_is_shown_as_a_call(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer()
    printer.show(Event(tool_calls=(ToolCall("c1", "weather", {"city": "Zürich", "days": 2}),)))
    printer.end()
    assert capsys.readouterr().out == 'weather({"city": "Zürich", "days": 2})\n'


def test_where_the_time_went_adds_up() -> None:
    table = time_table(1.0, Usage(10, 5, 3), Timing(0.5, 2.5, 5, 0), {"forward": 3.0, "sample": 1.0})
    assert "2.0 tokens per second, 500.00 ms each" in table
    assert "3.50 s  5 tokens, 3 of them thinking" in table
    assert "forward 75 %, sample 25 %" in table


def test_an_answer_of_one_token_has_no_decode_speed() -> None:
    assert "decode" not in time_table(0.1, Usage(10, 1, 0), Timing(0.5, 0.5, 1, 0), {})


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the model by one that gives these answers in turn; the prompts it saw are put in their place."""
    chat, script = byte_chat_format(), list[str]()

    def answer(request: Request) -> Sequence[int]:
        said = script.pop(0)
        script.append(chat.decode(request.prompt_ids))
        return [*chat.encode(said), 256]

    monkeypatch.setattr(Session, "load", lambda config: session_over(ScriptedEngine(answer), chat))
    return script


def test_generate_answers_a_message(answers: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    answers.append("six times seven</think>\n\n42")
    assert outcome("generate", "--system", "Be brief.", "What is it?", "--stats") == 0
    out, err = capsys.readouterr()
    assert out == "42\n"
    assert "six times seven" in err
    assert "tokens per second" in err
    assert answers[0].index("Be brief.") < answers[0].index("What is it?")


def test_generate_reads_stdin_and_continues_raw_text(
    answers: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Ein Schiff\n")))
    answers.append(" fährt")
    assert outcome("generate", "--raw") == 0
    assert capsys.readouterr().out == " fährt\n"
    assert answers == ["Ein Schiff"]


def test_generate_refuses_stdin_that_is_not_utf8(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert outcome("generate", "-") == 2
    assert "stdin is not UTF-8: byte 2" in capsys.readouterr().err


def test_generate_json_is_one_object_on_stdout(answers: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    answers += ["a</think>1", "b</think>2"]
    assert outcome("generate", "--json", "-n", "2", "Say") == 0
    told = json.loads(capsys.readouterr().out)
    assert [choice["text"] for choice in told["choices"]] == ["1", "2"]
    assert [choice["reasoning"] for choice in told["choices"]] == ["a", "b"]
    assert {choice["finish_reason"] for choice in told["choices"]} == {"stop"}


def test_several_answers_are_told_apart(answers: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    answers += ["a</think>1", "b</think>2"]
    assert outcome("generate", "-n", "2", "Say") == 0
    out, err = capsys.readouterr()
    assert out == "1\n2\n"
    assert "--- 1 of 2" in err


def test_chat_keeps_the_turns_until_reset(
    answers: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["My name is Ada.", "", "What is my name?", "/reset", "And now?", "/quit", "never asked"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    answers += ["hm</think>Hello!", "hm</think>Ada.", "hm</think>Who knows."]
    assert outcome("chat", "--system", "Be kind.") == 0
    assert capsys.readouterr().out == "Hello!\nAda.\nWho knows.\n"
    first, second, third = answers
    assert "Hello!" not in first
    assert second.index("Be kind.") < second.index("Ada.") < second.index("Hello!") < second.index("my name?")
    assert "Ada" not in third
    assert "Be kind." in third


def test_chat_survives_a_turn_that_does_not_fit(
    answers: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 5000 + "\nshort\n"))
    answers.append("hm</think>fine")
    assert outcome("chat") == 0
    out, err = capsys.readouterr()
    assert out == "fine\n"
    assert "error: this model's context is 4096 tokens" in err
    assert "xxx" not in answers[0]


SLOW_CHAT = """
import sys
from scripted import ScriptedEngine, session_over
from tritium.api import Session
from byte_chat import byte_chat_format
from tritium.cli.main import main
chat = byte_chat_format()
said = chat.encode("hm</think>" + "counting... " * 1000)
Session.load = lambda config: session_over(ScriptedEngine(lambda request: said, step_seconds=0.01), chat)
main(["chat"])
"""


def test_on_a_terminal_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_CHAT], stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        cwd=os.path.dirname(__file__), preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    unread = ""

    def wait_for(text: str) -> None:
        nonlocal unread
        while text not in unread:
            assert select.select([controller], [], [], 20)[0], f"no {text!r} in {unread!r}"
            unread += os.read(controller, 1024).decode()
        unread = unread.partition(text)[2]

    try:
        wait_for("> ")
        os.write(controller, b"count\n")
        wait_for("counting... counting")
        os.write(controller, b"\x03")
        wait_for("(stopped)")
        wait_for("> ")
        time.sleep(0.5)  # a signal between readline's prompt and its wait is seen with the next key only
        os.write(controller, b"\x03")  # with no answer to stop, it only reminds of how to leave
        wait_for("/quit")
        wait_for("> ")
        os.write(controller, b"again\n")
        wait_for("counting")
        os.write(controller, b"\x03")
        wait_for("(stopped)")
        wait_for("> ")
        os.write(controller, b"/quit\n")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)


def test_doctor_reports_machine_ops_and_plan(capsys: pytest.CaptureFixture[str]) -> None:
    code = outcome("doctor", "--device", "cpu", "--max-num-seqs", "3")
    out = capsys.readouterr().out
    assert (code == 0) == ("no problems found" in out)
    for words in ("torch 2.", "cpu: ", "paged_attention", "gdn", "memory plan", "3 requests and"):
        assert words in out


def test_doctor_goes_on_after_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome("doctor", "--device", "cuda:77", "--model", "no/such/dir") == 1
    out = capsys.readouterr().out
    assert "problem(s) found" in out
    assert "--device cuda:77" in out
    assert "no/such/dir" in out
    assert "paged_attention" in out


def test_doctor_answers_for_a_chip_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome("doctor", "--target", "gfx1151", "--model", "qwen3.5-27b") == 0
    out = capsys.readouterr().out
    for words in ("Strix Halo", "256 GB/s as published", "linear.gemv", "kernel (Triton)", "memory plan", "at most"):
        assert words in out
    assert outcome("doctor", "--target", "gfx1100", "--model", "qwen3.5-27b") == 1
    assert "does not fit" in capsys.readouterr().out


def test_doctor_compiles_and_fails_on_a_violation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    from tritium.ops.kernels.matrix import Compiled

    wrong = Compiled("gfx1151", "linear._one", "", violations=("spills 3",))
    found = [Compiled("sm_90", "norm._rms_norm", "bf16"), wrong]
    asked: list[Any] = []
    monkeypatch.setattr("tritium.bench.matrix.run", lambda *args: asked.append(args) or [(2, one) for one in found])
    assert outcome("doctor", "--compile", "sm_90,gfx1151", "--models", "qwen3.5-27b", "-q") == 1
    out = capsys.readouterr().out
    assert asked == [(["sm_90", "gfx1151"], ["qwen3.5-27b"])]
    assert "! spills 3" in out
    assert "2 kernels in their configurations, 1 in violation" in out
    found.pop()
    assert outcome("doctor", "--compile", "all", "-q") == 0
    assert outcome("doctor", "--compile", "sm_99", "-q") == 2


def test_serve_passes_on_what_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr("tritium.server.serve", lambda config, settings: told.update(settings=settings, config=config))
    assert outcome(
        "serve", "some/model", "--port", "81", "--served-model-name", "a", "--served-model-name", "b",
        "--max-num-seqs", "7", "--gpu-memory-utilization", "0.5", "--enforce-eager", "-q",
        "--max-queued-requests", "9", "--api-key", "k", "--log-format", "json",
    ) == 0  # fmt: skip
    expected = EngineConfig(
        model="some/model", max_num_seqs=7, gpu_memory_utilization=0.5, enforce_eager=True, show_progress=False
    )
    settings = ServerSettings(port=81, served_model_names=("a", "b"), api_keys=("k",), log_format="json",
                              limits=Limits(max_queued_requests=9))
    assert told == {"config": expected, "settings": settings}


def test_eval_ends_in_one_line_of_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[EngineConfig] = []
    figures = {"word_problems": 0.5, "tool_calls": 0.25, "recall": 1.0, "mtp_acceptance": None}

    def run(config: EngineConfig, *, count: int) -> dict[str, Any]:
        seen.append(config)
        return figures | {"count": count}

    monkeypatch.setattr("tritium.eval.tiny.run", run)
    monkeypatch.setattr("tritium.eval.tiny.table", lambda figures: "a table")
    assert outcome("eval", "tiny", "--json", "--count", "3", "--model", "tritium-moe") == 0
    *_, table, last = capsys.readouterr().out.splitlines()
    assert table == "a table"
    assert json.loads(last) == figures | {"count": 3}
    assert seen == [EngineConfig(model="tritium-moe")]
