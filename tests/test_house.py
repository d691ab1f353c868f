"""The house rules that a machine can hold: layers, size, names, start-up, words."""

from __future__ import annotations

import ast
import dataclasses
import io
import re
import subprocess
import sys
import time
import tokenize
from pathlib import Path

import click
import pytest

import tritium
from tritium.cli.main import cli
from tritium.cli.options import ENGINE_FLAGS, SAMPLING_FLAGS
from tritium.config import EngineConfig
from tritium.core import SamplingParams

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tritium"
BIN = Path(sys.executable).parent
BUDGET = 17_300
"""Lines of code in tritium/: what is left without blank lines, comments and docstrings. (15,200, and the 480 of
eval/tasks.py, which were not counted while words and sentences stood between them.)"""
LONGEST_FILE = 600
FORBIDDEN = ("/" + "work/", "/" + "root/", "/" + "opt/wheels")


def code_lines(path: Path) -> int:
    text = path.read_text()
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    starts = text.splitlines()
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        docstring = token.type == tokenize.STRING and starts[token.start[0] - 1].lstrip().startswith('"""')
        if token.type not in skipped and not docstring:
            found.update(range(token.start[0], token.end[0] + 1))
    return len(found)


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def run_cli(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [BIN / "tritium", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)


def commands() -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in cli.commands.items():
        group = command.commands if isinstance(command, click.Group) else {}
        found |= {f"{name} {inner}": inner_command for inner, inner_command in group.items()} or {name: command}
    return found


def test_layers() -> None:
    done = subprocess.run([BIN / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_size_of_the_project() -> None:
    total = sum(map(code_lines, sources()))
    assert total <= BUDGET, f"{total} lines of code in tritium/, and {BUDGET} are the budget"


def test_size_of_files() -> None:
    long = {str(path.relative_to(ROOT)): code_lines(path) for path in sources() if code_lines(path) > LONGEST_FILE}
    assert not long


def test_public_names() -> None:
    names = ["LLM", "Completion", "EngineConfig", "Event", "SamplingParams", "Session", "TritiumError"]
    assert tritium.__all__ == names
    assert all(getattr(tritium, name).__name__ == name for name in names)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tritium.nothing


def test_the_version_is_said_once() -> None:
    assert f'version = "{tritium.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert run_cli("--version").stdout == f"tritium {tritium.__version__}\n"


@pytest.mark.parametrize("names", ["tritium", "tritium.cli.main", "tritium.sched, tritium.cache, tritium.chat"])
def test_importing_these_imports_no_torch(names: str) -> None:
    check = f"import {names}, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_help_comes_within_a_second() -> None:
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        done = run_cli("--help")
        seconds.append(time.perf_counter() - begin)
        assert done.returncode == 0
    assert min(seconds) < 1.0, seconds


def test_help_names_every_command() -> None:
    text = run_cli("--help").stdout
    for name in ("serve", "chat", "generate", "eval", "doctor"):
        assert re.search(rf"^  {name} ", text, re.MULTILINE), name
    assert all(command.help for command in commands().values())
    for name, command in commands().items():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"tritium {name} {parameter.opts[0]} has no help"


def test_every_field_of_the_configuration_has_a_flag() -> None:
    set_otherwise = {"model", "show_progress"}
    assert set(ENGINE_FLAGS) | set_otherwise == {field.name for field in dataclasses.fields(EngineConfig)}
    assert set(SAMPLING_FLAGS) < {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize("name", ["serve", "chat", "generate", "eval tiny", "doctor"])
def test_every_command_takes_the_engines_flags_by_vllms_names(name: str) -> None:
    flags = {flag for parameter in commands()[name].params for flag in parameter.opts}
    assert flags >= {
        "--model", "--revision", "--download-dir", "--tokenizer", "--dtype", "--device", "--max-model-len",
        "--max-num-seqs", "--max-num-batched-tokens", "--gpu-memory-utilization", "--kv-cache-memory-bytes",
        "--num-gpu-blocks-override", "--enforce-eager", "--load-format", "--seed",
    }  # fmt: skip


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and path.suffix not in {".safetensors", ".png"}]


def test_kernels_are_read_by_the_oldest_triton() -> None:
    """Triton 3.6, which comes with torch 2.11, knows no tuple within a tuple on the left of an assignment."""
    nested = [
        f"{path.name}:{node.lineno}"
        for path in (PACKAGE / "ops" / "kernels").glob("*.py")
        for kernel in ast.walk(ast.parse(path.read_text()))
        if isinstance(kernel, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in kernel.decorator_list)
        for node in ast.walk(kernel)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
        and any(isinstance(part, ast.Tuple) for part in node.targets[0].elts)
    ]
    assert not nested


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in tracked()
        for word in FORBIDDEN
        if word in path.read_text(encoding="utf-8", errors="replace")
    ]
    assert not found
