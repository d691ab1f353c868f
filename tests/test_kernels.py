"""Every Triton form against its op's reference in float64: in the interpreter here, on the device with `make gpu`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import delta_net_steps
import kernel_lane

from tritium.hw import probe
from tritium.hw.tuned import launch_parameters, observed, trial
from tritium.ops.kernels import quantized
from tritium.ops.kernels.launch import launch
from tritium.ops.linear import linear
from tritium.ops.moe import moe
from tritium.ops.spec import all_ops

CASES = [
    pytest.param(op, dims, dtype, id=f"{op.spec.name}-{'-'.join(f'{k}{v}' for k, v in dims.items())}-{str(dtype)[6:]}")
    for op in all_ops()
    if op.launcher
    for dims in op.spec.cases
    for dtype in kernel_lane.DTYPES
    # Kernels of fewer bits take their time in the interpreter: one dtype of activations there.
    if dtype in op.spec.dtypes and not (kernel_lane.INTERPRETED and "scheme" in dims and dtype == torch.float32)
]


def check(op, dims, dtype, seed: int) -> None:  # type: ignore[no-untyped-def]
    for name, ratio in kernel_lane.ratios(op, dims, dtype, seed).items():
        assert ratio <= 1, f"{name}: {ratio:.2f} times the error that is allowed"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize(("op", "dims", "dtype"), CASES)
def test_on_the_device(op, dims, dtype, seed: int) -> None:  # type: ignore[no-untyped-def]
    check(op, dims, dtype, seed)


@pytest.mark.skipif(not kernel_lane.INTERPRETED, reason="runs in the interpreter, started by the test below")
@pytest.mark.parametrize(("op", "dims", "dtype"), CASES)
def test_in_the_interpreter(op, dims, dtype, seed: int) -> None:  # type: ignore[no-untyped-def]
    check(op, dims, dtype, seed)


def check_moe(seed: int) -> None:
    """Equal logits go to the lower expert, and who shares a step changes no bit."""
    dims = {"T": 20, "E": 140, "K": 4, "H": 64, "I": 32, "S": 32}
    given = moe.spec.inputs(dims, torch.float32, torch.Generator().manual_seed(seed))
    given["router_FH"] = given["router_FH"][torch.arange(141) % 3]
    mine = kernel_lane.moved(given, kernel_lane.DEVICE)
    few, one = ({**mine, "x_TH": mine["x_TH"][:n]} for n in (5, 1))
    y = moe.kernel(**mine)
    assert kernel_lane.relative(y, moe.reference(**given)) < 1e-6
    assert kernel_lane.relative(moe.kernel(**one), y[:1]) < 1e-6
    assert torch.equal(moe.kernel(**few), y[:5])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_moe_ties_and_company_on_the_device(seed: int) -> None:
    check_moe(seed)


@pytest.mark.skipif(not kernel_lane.INTERPRETED, reason="runs in the interpreter, started by the test below")
def test_moe_ties_and_company_in_the_interpreter(seed: int) -> None:
    check_moe(seed)


def check_split(scheme: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of a quantized weight shared out between programs, of which the last adds up."""
    launched: list[int] = []
    monkeypatch.setattr(quantized, "launch", lambda kernel, grid, *arguments, **options: (
        launched.append(options.get("EACH", 0)), launch(kernel, grid, *arguments, **options)))
    dims, dtype = {"M": 5, "N": 70, "K": 1156, "residual": 1, "scheme": scheme}, torch.float16
    with observed() as seen:
        check(linear, dims, dtype, seed)
    (key,) = (key for key in seen if key[0] == "quantized.tile")
    found = launch_parameters(key[0], probe(kernel_lane.DEVICE), key[1])
    assert not any(launched)
    for _ in range(2):  # the second finds the counts as the first left them
        with trial({key: {**found, "depth": 128, "splits": 3}}):
            check(linear, dims, dtype, seed)
    assert 512 in launched
    with trial({key: {**found, "depth": 512}}):  # of which the last tile lies beyond K for the most part
        check(linear, dims, dtype, seed)


SPLIT = pytest.mark.parametrize("scheme", [2, 4, 5])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@SPLIT
def test_columns_split_between_programs_on_the_device(scheme: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_split(scheme, seed, monkeypatch)


@pytest.mark.skipif(not kernel_lane.INTERPRETED, reason="runs in the interpreter, started by the test below")
@SPLIT
def test_columns_split_between_programs_in_the_interpreter(
    scheme: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_split(scheme, seed, monkeypatch)


def check_peaks(seed: int) -> None:
    """The largest x changes no bit, whether it was left or each program looks for it."""
    for scheme in (1, 2):
        dims = {"M": 1, "N": 20, "K": 1160, "norm": 1, "handed": 1, "scheme": scheme}
        given = linear.spec.inputs(dims, torch.float16, torch.Generator().manual_seed(seed))
        told = linear.kernel(**kernel_lane.moved(given, kernel_lane.DEVICE))
        given["given"].bits_1.zero_()
        assert torch.equal(told, linear.kernel(**kernel_lane.moved(given, kernel_lane.DEVICE)))
        given["given"].bits_1.view(torch.float32).fill_(1e3)
        assert not torch.equal(told, linear.kernel(**kernel_lane.moved(given, kernel_lane.DEVICE)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_peak_that_was_left_on_the_device(seed: int) -> None:
    check_peaks(seed)


@pytest.mark.skipif(not kernel_lane.INTERPRETED, reason="runs in the interpreter, started by the test below")
def test_a_peak_that_was_left_in_the_interpreter(seed: int) -> None:
    check_peaks(seed)


def check_blocks(scheme: int, seed: int) -> None:
    """Blocks of rows of a program, where the last program has fewer and where there are fewer in all."""
    gated = {"N": 35, "K": 1152, "gated": 1, "norm": 1}
    for more in ({"N": 70, "K": 1160, "residual": 1}, gated, {"N": 11, "K": 1160}):
        dims = {"M": 1, "scheme": scheme, **more}
        with observed() as seen:
            check(linear, dims, torch.float16, seed)
        (key,) = (key for key in seen if key[0] == "quantized.one")
        found = launch_parameters(key[0], probe(kernel_lane.DEVICE), key[1])
        with trial({key: {**found, "rows": 4, "blocks": 3, "columns": 512}}):
            check(linear, dims, torch.float16, seed)


BLOCKS = pytest.mark.parametrize("scheme", range(1, 6))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@BLOCKS
def test_blocks_of_one_program_on_the_device(scheme: int, seed: int) -> None:
    check_blocks(scheme, seed)


@pytest.mark.skipif(not kernel_lane.INTERPRETED, reason="runs in the interpreter, started by the test below")
@BLOCKS
def test_blocks_of_one_program_in_the_interpreter(scheme: int, seed: int) -> None:
    check_blocks(scheme, seed)


STEPS = pytest.mark.parametrize(("graphs", "most"), [(False, 3), (True, 3), (True, 0)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@STEPS
def test_delta_net_over_steps_on_the_device(graphs, most, seed: int, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    delta_net_steps.check(seed, graphs, most, "cuda", monkeypatch)


@pytest.mark.skipif(not kernel_lane.INTERPRETED, reason="runs in the interpreter, started by the test below")
@STEPS
def test_delta_net_over_steps_in_the_interpreter(graphs, most, seed: int, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    delta_net_steps.check(seed, graphs, most, "cpu", monkeypatch)


@pytest.mark.timeout(900)
@pytest.mark.skipif(kernel_lane.INTERPRETED or torch.cuda.is_available(), reason="this starts the interpreter")
def test_every_op_in_the_interpreter() -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", "in_the_interpreter"]
    command = [sys.executable, "-m", "pytest", *options, __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
