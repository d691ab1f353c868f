"""What ops leave each other (`tritium.ops.handed`), in a whole network: no token changes by it.

Kernels in Triton's interpreter, ahead of them the self-test, which runs some of the layers, and references that leave
something, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import kernel_lane
from checkpoints import Spec, random_checkpoint
from serving import Logits, Served, request

from tritium.config import EngineConfig
from tritium.core import TritiumError
from tritium.engine import Engine
from tritium.engine.selftest import attest
from tritium.ops import spec
from tritium.ops.handed import MOST, MOST_PARTS, Peak, Scaled
from tritium.ops.linear import linear

INSIDE = pytest.mark.skipif(not kernel_lane.INTERPRETED, reason="runs in the interpreter, started by the test below")


def load(directory: Path, **options: Any) -> Engine:
    limits: dict[str, Any] = {"max_num_seqs": 2, "max_model_len": 128, "max_num_batched_tokens": 64}
    return Engine.load(EngineConfig(model=str(directory), device="cpu", dtype="float32", speculate="none",
                                    show_progress=False, enable_prefix_caching=False, **limits, **options))  # fmt: skip


def served(engine: Engine) -> tuple[Served, dict[tuple[str, int], torch.Tensor]]:
    """A prompt by itself, one beside a decode step, a decode step of one token; and all logits."""
    logits, tokens, out = Logits(), dict[str, list[int]](), Served()
    engine.runner.observer = logits
    for name, count in (("a", 19), ("b", 4)):
        tokens[name] = []
        engine.add(request(name, [3 + 7 * i % 90 for i in range(count)], max_tokens=2))
        for event in engine.step():
            tokens[event.request_id] += event.tokens
    while engine.has_work:
        for event in engine.step():
            tokens[event.request_id] += event.tokens
            if event.finish_reason:
                out[event.request_id] = tokens[event.request_id], event.finish_reason
    return out, dict(logits.rows)


def by_kernels(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """From now on; the arguments of all ops that may be handed something."""
    model = engine.runner.model
    model.peaks = model._handed(leave=True)
    monkeypatch.setattr(spec, "_on_device", lambda arguments: True)
    return [link[0] for layer in model.layers for block in (layer.mixer, layer.mlp) for link in block.chain]


@INSIDE
@pytest.mark.parametrize("moe", [False, True])
def test_a_networks_kernels_give_the_tokens_of_its_references(moe: bool, tmp_path: Path, monkeypatch: Any) -> None:
    directory = random_checkpoint(tmp_path, Spec(moe=moe, layer_types="lfl", experts=4))
    want, _ = served(load(directory))
    engine = load(directory)
    links = by_kernels(engine, monkeypatch)
    attest(engine.runner.model, 0)
    assert sum(isinstance(arguments.get("given"), Scaled) for arguments in links) == (0 if moe else 5)
    assert served(engine)[0] == want


@INSIDE
def test_logits_are_the_same_whoever_looks_for_the_largest_number(tmp_path: Path, monkeypatch: Any) -> None:
    engine = load(random_checkpoint(tmp_path, Spec(layer_types="lf")), quantize="int8")
    links = by_kernels(engine, monkeypatch)
    attest(engine.runner.model, 0)
    engine.runner.model.peaks.view(torch.float32).fill_(1e6)  # of a step before: gone as the next one begins
    told, logits = served(engine)
    assert [arguments.pop("given") for arguments in links if isinstance(arguments.get("given"), Peak)]
    alone, others = served(engine)
    assert told == alone
    assert all(torch.equal(row, others[at]) for at, row in logits.items())


@INSIDE
def test_the_self_test_looks_at_what_is_left(tmp_path: Path, monkeypatch: Any) -> None:
    engine = load(random_checkpoint(tmp_path, Spec(layer_types="lf")))
    by_kernels(engine, monkeypatch)
    right = linear.kernel

    def spoils(**arguments: Any) -> torch.Tensor:
        y = right(**arguments)
        if (leave := arguments.get("leave")) is not None:
            leave.x_MK.fill_(7.0)
        return y

    monkeypatch.setitem(vars(linear), "kernel", spoils)
    with pytest.raises(TritiumError, match=r"linear differs from its reference by .* in scaled"):
        attest(engine.runner.model, 0)


@INSIDE
@pytest.mark.parametrize(("tokens", "results", "parts"), [(1, 32, 0), (2, 32, 4), (65, 32, 0), (2, 8256, 0)])
def test_a_product_says_anew_whether_it_left_its_result(tokens: int, results: int, parts: int) -> None:
    leave = Scaled(torch.zeros(MOST, results), torch.zeros(MOST_PARTS, MOST), torch.zeros(results), parts=5)
    x_MK, w_JK = torch.ones(tokens, 16), torch.ones(results, 16)
    linear.kernel(x_MK=x_MK, w_JK=w_JK, residual_MN=torch.zeros(tokens, results), leave=leave)
    assert leave.parts == parts


@pytest.mark.timeout(600)
@pytest.mark.skipif(kernel_lane.INTERPRETED or torch.cuda.is_available(), reason="this starts the interpreter")
def test_a_network_in_the_interpreter() -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
