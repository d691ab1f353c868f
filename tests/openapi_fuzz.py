"""schemathesis at a scripted server: `python tests/openapi_fuzz.py --cases 2000`."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from served import EOS, Served, scripted, served

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def fuzz(server: Served, examples: int, seed: int, phases: str = "coverage,fuzzing") -> tuple[int, str]:
    """At most so many examples of each operation; -> (cases sent, what schemathesis says). Raises when it fails."""
    command = [Path(sys.executable).parent / "schemathesis", "run", f"{server.url}/openapi.json", "--checks", CHECKS,
               "--max-examples", str(examples), "--seed", str(seed), "--phases", phases, "--no-color",
               "--request-timeout", "20", "--mode", "all", "--continue-on-failure"]
    with tempfile.TemporaryDirectory() as folder:  # it keeps what it saw where it runs
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600, cwd=folder)
    found = re.search(r"(\d[\d,]*) generated", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert done.returncode == 0, done.stdout
    return int(found[1].replace(",", "")), done.stdout


def fuzzed_server():
    """Answers with the prompt, in a small context, so that cases are quick."""
    return served(scripted(lambda request: [*request.prompt_ids[:20], EOS], max_model_len=256, chunk=32))


@click.command(help=__doc__)
@click.option("--cases", default=2000, show_default=True, help="At least so many.")
@click.option("--seed", default=0, show_default=True)
def main(cases: int, seed: int) -> None:
    total = 0
    with fuzzed_server() as server:
        while total < cases:
            count, said = fuzz(server, 100, seed)
            total, seed = total + count, seed + 1
            print(said)
        server.wait_idle()
    print(f"{total} cases, no 5xx, no violation of the schema")


if __name__ == "__main__":
    main()
