"""Attention in Triton beyond its specs: rows that are not there, and rows that do not see each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import kernel_lane
import ptx
import triton

from tritium.bench import matrix
from tritium.hw.tuned import trial
from tritium.ops.attention import paged_attention
from tritium.ops.attention_inputs import attention_inputs
from tritium.ops.kernels.matrix import Job, _gpu_target
from tritium.ops.spans import Spans

ELSEWHERE = pytest.mark.skipif(not kernel_lane.INTERPRETED, reason="runs in the interpreter, started by the last test")
lane = pytest.mark.gpu if torch.cuda.is_available() else ELSEWHERE
HEADS, GROUPS, DIM, WIDTH = 4, 2, 32, 8


def graph_spans(lengths: tuple[int, ...], contexts: tuple[int, ...], each: int, first_page: int = 1) -> Spans:
    """As a graph's: every row has `each` tokens for the host, and what the table says on the device."""
    rows, device = len(lengths), torch.device(kernel_lane.DEVICE)
    pages = tuple(tuple(range(first_page + r * WIDTH, first_page + (r + 1) * WIDTH)) for r in range(rows))
    spans = Spans((each,) * rows, contexts, tuple(range(1, rows + 1)), pages, device)
    position_T = spans.table.position_T.view(rows, each).clone()
    for r, length in enumerate(lengths):
        position_T[r, length:] = -1
    table = spans.table._replace(
        lengths_R=torch.tensor(lengths, dtype=torch.int32, device=device), position_T=position_T.view(-1)
    )
    spans.__dict__["table"] = table
    return spans


def draw(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).half().to(kernel_lane.DEVICE)


def attend(seed: int, spans: Spans, tokens: int, times: int = 1, kernel: bool = True) -> torch.Tensor:
    q, gate = (draw(seed + i, tokens, HEADS, DIM) * n for i, n in ((1, times), (2, 1)))
    k_pages, v_pages = (draw(seed + i, 1 + 3 * WIDTH, GROUPS, 64, DIM) for i in (3, 4))
    kernel_lane.poison()
    form = paged_attention.kernel if kernel else paged_attention.reference
    return form(q_TND=q, gate_TND=gate, k_pages=k_pages, v_pages=v_pages, spans=spans)


@lane
def test_tokens_that_are_not_there_in_the_interpreter(seed: int) -> None:
    """They get zeros and write to no page; the row of which only some tokens are there is as if it were alone."""
    lengths, contexts, each = (2, 0, 1), (130, 70, 63), 2
    spans = graph_spans(lengths, contexts, each)
    o = attend(seed, spans, 6)
    whole = attend(seed, Spans((2,) * 3, contexts, (1, 2, 3), spans.pages, spans.device), 6)
    assert torch.equal(o[:2], whole[:2])
    assert torch.equal(o[4], whole[4])
    assert o[[2, 3, 5]].count_nonzero() == 0

    table = draw(seed, 200, 4, 2).float()
    weight = draw(seed + 1, DIM).float()
    k_pages, v_pages = (torch.zeros(1 + 3 * WIDTH, GROUPS, 64, DIM, device=kernel_lane.DEVICE).half() for _ in "kv")
    x = draw(seed + 2, 6, 2 * (HEADS + GROUPS) * DIM)
    q, gate = attention_inputs.kernel(
        x_TE=x, q_norm_D=weight, k_norm_D=weight, eps=1e-6, table_LF2=table, k_pages=k_pages, v_pages=v_pages,
        spans=spans,
    )  # fmt: skip
    assert q[[2, 3, 5]].count_nonzero() == 0
    assert (q[[0, 1, 4]] != 0).any(-1).all()
    assert gate.data_ptr() == x.data_ptr() + DIM * x.element_size(), "a view"
    written = {(p, at) for p, _, at, _ in v_pages.nonzero().tolist()}
    assert written == {(spans.pages[0][2], 2), (spans.pages[0][2], 3), (spans.pages[2][0], 63)}


@lane
def test_rows_do_not_see_each_others_contexts_in_the_interpreter(seed: int) -> None:
    """To the bit, with as many rows."""
    first = attend(seed, graph_spans((2, 2), (150, 0), 2), 4)
    for length, context in ((2, 77), (1, 400), (0, 9)):
        other = attend(seed, graph_spans((2, length), (150, context), 2), 4)
        assert torch.equal(first[:2], other[:2]), (length, context)


@lane
@pytest.mark.parametrize(("context", "since", "keys", "times"), [
    (0, 0, 64, 1), (200, 0, 32, 1), (200, 70, 64, 1), (40, 41, 16, 1), (200, 0, 16, 4), (200, 70, 16, 200),
])  # fmt: skip
def test_keys_by_the_copy_engine_in_the_interpreter(context: int, since: int, keys: int, times: int, seed: int) -> None:
    """As by loads, whether a tile has no step without a mask, one or some, and a page that is partly the row's; with
    scores so large that the maximum is raised again, or behind by a weight of nearly 256."""
    length, key = 70, (("groups", GROUPS), ("head_dim", DIM))
    pages = tuple(range(1, 1 + WIDTH))
    spans = Spans((length,), (context,), (1,), (pages,), torch.device(kernel_lane.DEVICE), since=(since,))
    sizes = {"M": 16, "KEYS": keys, "CHUNK": DIM, "num_warps": 4, "num_stages": 2, "pdl": 0}
    by = []
    for bulk in (0, 1) if kernel_lane.INTERPRETED else (0, 1, 2):
        with trial({("attention.prefill", key): {**sizes, "BULK": bulk}}):
            by.append(attend(seed, spans, length, times))
    assert all(kernel_lane.relative(x, by[0]) < 1e-3 for x in by[1:])
    assert torch.equal(by[-1], by[1]), "a product with ones that is left out changes nothing"
    truth = attend(seed, spans, length, times, kernel=False).nan_to_num()  # of no key: zeros
    assert kernel_lane.relative(by[1], truth) < 2e-3


@lane
@pytest.mark.parametrize("bulk", [0, 1])
def test_a_prompt_in_chunks_is_as_whole_in_the_interpreter(bulk: int, seed: int) -> None:
    """To the bit, wherever it is cut: at the end of a tile or within."""
    length, key = 200, (("groups", GROUPS), ("head_dim", DIM))
    q, gate = (draw(seed + i, length, HEADS, DIM) * 3 for i in (1, 2))
    pages = {name: draw(seed + i, 1 + WIDTH, GROUPS, 64, DIM) for i, name in enumerate(("k_pages", "v_pages"))}

    def chunk(begin: int, end: int) -> torch.Tensor:
        table = (tuple(range(1, 1 + WIDTH)),)
        spans = Spans((end - begin,), (begin,), (1,), table, torch.device(kernel_lane.DEVICE))
        return paged_attention.kernel(q_TND=q[begin:end], gate_TND=gate[begin:end], spans=spans, **pages)

    sizes = {"M": 64, "KEYS": 32, "CHUNK": DIM, "BULK": bulk, "num_warps": 4, "num_stages": 2, "pdl": 0}
    with trial({("attention.prefill", key): sizes}):
        whole = chunk(0, length)
        for cut in (32, 64, 96, 100, 160):
            kernel_lane.poison()
            assert torch.equal(torch.cat([chunk(0, cut), chunk(cut, length)]), whole), cut


@pytest.mark.timeout(900)
@pytest.mark.skipif(kernel_lane.INTERPRETED or torch.cuda.is_available(), reason="this starts the interpreter")
def test_these_where_there_is_no_gpu() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "the_interpreter", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("early", [False, True])
def test_a_register_that_a_product_under_way_reads_is_seen_to_be_written(early: bool) -> None:
    """What Triton 3.6 made of weights rounded ahead of the wait, and newer ones do not: on the device, NaN."""
    steps = ["cvt.rn.bf16x2.f32 \t%r1, %r8, %r9;", "wgmma.wait_group.sync.aligned 0;"]
    product = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r4,%r5}, {%r1,%r2}, %rd1, p, 1, 1, 1;"
    body = [*(steps if early else steps[::-1]), product, "wgmma.commit_group.sync.aligned;"]
    text = "\n".join(["$L__BB0_1:  // a loop", *body, "@%p1 bra \t$L__BB0_1;"])
    assert ptx.overwritten(text) == ([steps[0].rstrip(";")] if early else [])


@pytest.mark.parametrize("model", ["qwen3.6-27b", "qwen3.6-35b-a3b"])
def test_no_product_under_way_loses_the_registers_that_it_reads(model: str) -> None:
    """The assembler does not tell, and the interpreter has no products under way."""
    launches = [x for _, x in matrix.launches(model, "sm_90", [matrix.Step(prefill=512)]) if "BULK" in x.options]
    job = Job.of(launches[-1], "sm_90")
    kernel = triton.compile(job.source, target=_gpu_target("sm_90"), options=job.options)
    assert "wgmma.wait_group" in kernel.asm["ptx"]
    assert not ptx.overwritten(kernel.asm["ptx"])
