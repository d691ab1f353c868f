"""The examples run as a reader would run them, and are short enough to be read."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Base URL of `tritium serve` with the model that it serves by itself."""
    command = [Path(sys.executable).parent / "tritium", "serve", "--port", "0", "--num-threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"serving on (http://\S+)", line):
                break
        else:
            pytest.fail("".join(said))
        yield f"{found[1]}/v1"
        process.terminate()
        process.wait(30)


def test_examples_are_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lengths) == 3
    assert max(lengths.values()) <= 40


def test_offline() -> None:
    out = run("offline.py")
    assert re.search(r"answer: .*\b22\b", out)
    assert "ended by stop" in out
    assert re.search(r"^0: '.+^1: '", out, re.MULTILINE | re.DOTALL)


def test_openai_client(server: str) -> None:
    out = run("openai_client.py", server)
    assert re.search(r"\b32\b", out)
    assert re.search(r"\d+ prompt tokens, \d+ generated", out)


def test_tool_loop(server: str) -> None:
    out = run("tool_loop.py", server)
    assert 'get_weather({"city": "Paris"}) -> ' in out
    assert "21" in out.splitlines()[-1]
