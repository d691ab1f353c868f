"""The Triton forms of sampling against the reference, draw for draw: hostile rows, every cut, every path."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import kernel_lane

from tritium.ops.sampling import Edits, logprobs, logprobs_reference, reference, sample

INF = math.inf
LANES = [
    pytest.param(
        "cuda",
        id="on_the_device",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")],
    ),
    pytest.param(
        "cpu",
        id="in_the_interpreter",
        marks=pytest.mark.skipif(not kernel_lane.INTERPRETED, reason="a test below starts the interpreter"),
    ),
]
PATHS = {
    "shipped": ({}, ((1, 14), (33, 28))),
    "many blocks": ({"block": 32, "room": 64}, ((203, 42),)),
    "more than k in a block": ({"block": 256, "room": 128}, ((700, 28),)),
    "lists too short": ({"block": 64, "room": 2}, ((203, 28),)),
}
"""Launch parameters, then sizes."""


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is allocated holds numbers that no kernel wrote."""
    empty = torch.empty

    def garbage(*shape: Any, **options: Any) -> torch.Tensor:
        made = empty(*shape, **options)
        return made.fill_(math.nan if made.is_floating_point() else 91) if made.dtype != torch.bool else made

    monkeypatch.setattr(torch, "empty", garbage)


def rows_of(rng: random.Random, rows: int, vocab: int) -> torch.Tensor:
    """Rows that ordinary text never has, among rows that it has."""
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rng.randrange(2**40))) * 3
    for i in range(rows):
        at = rng.randrange(vocab)
        match i % 14:
            case 1:
                x[i] = (x[i] * 2).round() / 2  # ties
            case 2:
                x[i] = 1.5
            case 3:
                x[i] = -INF
            case 4:
                x[i, at] = math.nan
            case 5:
                x[i, at] = -math.nan
            case 6:
                x[i, at] = INF
            case 7:
                x[i], x[i, at] = -INF, -3.0
            case 8:
                x[i] *= 1e-3
            case 9:
                x[i] = torch.where(x[i] > 0, 3e38, -3e38)
            case 10:
                x[i] = torch.where(x[i] > 0, 0.0, -0.0)
            case 11:
                x[i, at] = 300.0
            case 12:
                x[i, x[i] < 0] = -INF
    return x


def columns_of(rng: random.Random, rows: int, vocab: int) -> dict[str, torch.Tensor]:
    def column(*among: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.tensor([rng.choice(among) for _ in range(rows)], dtype=dtype)

    whole = torch.int64
    return {
        "temperature_S": column(0.0, 1e-4, 0.6, 1.0, 1.0, 3.0, 100.0, 1e6),
        "top_k_S": column(0, 0, 1, 2, 7, 20, vocab // 2, vocab - 1, vocab, 10**5, dtype=whole),
        "top_p_S": column(1.0, 1.0, 0.95, 0.5, 1e-9, 0.0, 1 - 2**-53),
        "min_p_S": column(0.0, 0.0, 0.0, 0.05, 1.0),
        "seed_S": column(0, -1, 2**63 - 1, -(2**63), 1234, -987654321987, dtype=whole),
        "position_S": column(0, 1, 2**32, 2**62, 77, 4095, dtype=whole),
    }


def compare(lane: str, path: dict[str, int], **arguments: Any) -> None:
    want = reference(**arguments)
    mine = kernel_lane.moved(arguments, lane)
    if isinstance(edits := arguments.get("edits"), Edits):
        mine["edits"] = Edits(*(getattr(edits, name).to(lane) for name in Edits.__dataclass_fields__))
    kernel_lane.poison()
    before = mine["logits_SV"].clone()
    token = sample.kernel(**mine, **path).cpu()
    assert torch.equal(mine["logits_SV"].nan_to_num(7), before.nan_to_num(7))
    wrong = (token != want).nonzero()[:, 0].tolist()
    assert not wrong, [
        {name: x[i].item() for name, x in arguments.items() if name not in ("logits_SV", "edits", "allowed_SW")}
        | {"row": i, "want": want[i].item(), "got": token[i].item()}
        for i in wrong[:3]
    ]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lane", LANES)
def test_draws_equal_the_references(lane, path, seed):
    rng = random.Random(f"{seed}/{path}")
    parameters, sizes = PATHS[path]
    for vocab, rows in sizes:
        compare(lane, parameters, logits_SV=rows_of(rng, rows, vocab), **columns_of(rng, rows, vocab))


@pytest.mark.parametrize("block", [64, 1024])
@pytest.mark.parametrize("lane", LANES)
def test_of_equal_weights_the_lower_id_is_kept(lane, block, seed):
    """Though their logits differ, by less than a weight can tell: however many programs share a row."""
    rows, vocab = 24, 700
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 1e-13
    columns = columns_of(random.Random(seed), rows, vocab)
    some = {"temperature_S": torch.ones(rows).double(), "min_p_S": torch.zeros(rows).double(),
            "top_k_S": torch.tensor([7, 20, 40] * 8)}  # fmt: skip
    compare(lane, {"block": block, "room": 128}, logits_SV=x, **(columns | some))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lane", LANES)
def test_logits_of_half_precision_in_strided_rows(lane, dtype, seed):
    rng = random.Random(seed)
    x = rows_of(rng, 14, 150).to(dtype)
    compare(lane, {"block": 64}, logits_SV=x[:, :141], **columns_of(rng, 14, 141))


@pytest.mark.parametrize("lane", LANES)
def test_edits_and_masks(lane, seed):
    rng = random.Random(seed)
    rows, vocab = 28, 77
    where = rng.sample(range(rows * vocab), 150)
    real = [[rng.choice(among) for _ in where] for among in ((0.0, 3.0, -100.0), (1.0, 1.3, 0.5), (0.0, 0.7, INF))]
    edits = Edits(
        torch.tensor([i // vocab for i in where]),
        torch.tensor([i % vocab for i in where]),
        *(torch.tensor(values, dtype=torch.float64) for values in real),
    )
    words = [rng.choice((-1, 0, 1 << 5, -(2**31), rng.randrange(-(2**31), 2**31))) for _ in range(rows * 3)]
    allowed = torch.tensor(words, dtype=torch.int32).view(rows, 3)
    for given in ({"edits": edits}, {"edits": edits, "allowed_SW": allowed}):
        x, columns = rows_of(rng, rows, vocab), columns_of(rng, rows, vocab)
        compare(lane, {"block": 32, "room": 64}, logits_SV=x, **columns, **given)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("scale", [3.0, 0.5, 1e-3])
def test_a_large_vocabulary_on_the_device(scale, seed):
    """Cuts that lie thousands of ids deep, ties by the thousand, lists that overflow."""
    rng = random.Random(seed)
    for vocab in (248_320, 2**19 - 1):
        x = torch.randn(16, vocab, generator=torch.Generator().manual_seed(seed)) * scale
        x[::4] = x[::4].bfloat16().float()
        compare("cuda", {}, logits_SV=x, **columns_of(rng, 16, vocab))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_graph_draws_as_the_call_does_and_nothing_waits(seed):
    rng = random.Random(seed)
    given = {"logits_SV": rows_of(rng, 14, 5000), **columns_of(rng, 14, 5000)}
    static = {name: x.to("cuda") for name, x in given.items()}
    sample(**static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token = sample(**static)
    for _ in range(3):
        given = {"logits_SV": rows_of(rng, 14, 5000), **columns_of(rng, 14, 5000)}
        for name, x in given.items():
            static[name].copy_(x)
        graph.replay()
        assert torch.equal(token.cpu(), reference(**given))
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(**static)
        logprobs(logits_SV=static["logits_SV"], token_S=token, k=20)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("block", [32, 512])
@pytest.mark.parametrize("lane", LANES)
def test_logprobs_equal_the_references(lane, block, seed):
    rng = random.Random(seed)
    for vocab, k in ((1, 3), (33, 0), (203, 20)):
        x = rows_of(rng, 14, vocab)
        token = torch.tensor([rng.randrange(vocab) for _ in range(14)])
        want = logprobs_reference(logits_SV=x, token_S=token, k=k)
        got = [y.cpu() for y in logprobs.kernel(logits_SV=x.to(lane), token_S=token.to(lane), k=k, block=block)]
        fine = x.isfinite().any(-1) & ~x.isnan().any(-1) & ~(x == INF).any(-1)
        for mine, theirs in zip(got, want, strict=True):
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
            torch.testing.assert_close(mine[fine], theirs[fine], rtol=3e-7, atol=1e-7)


@pytest.mark.timeout(900)
@pytest.mark.skipif(kernel_lane.INTERPRETED or torch.cuda.is_available(), reason="this starts the interpreter")
def test_in_a_process_that_interprets() -> None:
    """Triton decides at import whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "-k", "in_the_interpreter", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
