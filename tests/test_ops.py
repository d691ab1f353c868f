"""Every op against float64 and against a statement of its mathematics that shares no code with it."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from tritium.ops.attention import paged_attention
from tritium.ops.attention_inputs import attention_inputs
from tritium.ops.conv import reference as causal_conv
from tritium.ops.delta_net import delta_net
from tritium.ops.elementwise import silu_mul
from tritium.ops.gdn import gdn
from tritium.ops.linear import linear
from tritium.ops.moe import moe
from tritium.ops.norm import gated_reference, rms_norm
from tritium.ops.spans import Spans
from tritium.ops.spec import Op, all_ops

CPU = torch.device("cpu")


CASES = [
    pytest.param(op, dims, id=f"{op.spec.name}-{'-'.join(f'{k}{v}' for k, v in dims.items())}")
    for op in all_ops()
    for dims in op.spec.cases
]


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    assert torch.isfinite(x).all()
    return float((x.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))


def run(op: Op, dims: dict[str, int], dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    arguments = op.spec.inputs(dims, dtype, torch.Generator().manual_seed(seed))
    return op.spec.results(arguments, op(**arguments))


@pytest.mark.parametrize(("op", "dims"), CASES)
def test_float32_is_close_to_float64_and_half_precisions_to_their_rounding(
    op: Op, dims: dict[str, int], seed: int
) -> None:
    truth = run(op, dims, torch.float64, seed)
    for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        if dtype in op.spec.dtypes:
            got = run(op, dims, dtype, seed)
            assert got.keys() == truth.keys()
            for name, value in got.items():
                assert relative(value, truth[name]) < bound + op.spec.floor(dims), (name, dtype)


@pytest.mark.parametrize(("op", "dims"), CASES)
def test_a_call_states_its_bytes_and_flops(op: Op, dims: dict[str, int]) -> None:
    assert op.spec.bytes_moved(dims, 2) > 0
    assert op.spec.bytes_moved(dims, 4) > op.spec.bytes_moved(dims, 2)
    assert op.spec.flops(dims) > 0


def test_every_op_is_in_the_list() -> None:
    assert len(all_ops()) >= 9


# --- the mathematics, stated once more -------------------------------------------------------------------------


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_norms(seed: int) -> None:
    x, w, z = draw(seed, 5, 24), draw(seed + 1, 24), draw(seed + 2, 5, 24)
    unit = x / (x.pow(2).sum(-1, keepdim=True) / 24 + 1e-6).sqrt()
    torch.testing.assert_close(rms_norm(x_MD=x, w_D=w, eps=1e-6), unit * (1 + w))
    torch.testing.assert_close(
        gated_reference(x_MD=x, z_MD=z, w_D=w, eps=1e-6), unit * w * torch.nn.functional.silu(z)
    )


def test_silu_mul(seed: int) -> None:
    x = draw(seed, 7, 18)
    torch.testing.assert_close(silu_mul(x_TJ=x), torch.nn.functional.silu(x[:, :9]) * x[:, 9:])


def test_causal_convolution_is_torchs_conv1d_over_the_whole_sequence(seed: int) -> None:
    x, w = draw(seed, 30, 6), draw(seed + 1, 6, 4)
    whole = torch.nn.functional.conv1d(torch.nn.functional.pad(x.t()[None], (3, 0)), w[:, None], groups=6)[0].t()
    state = torch.full((3, 4, 6), float("nan"), dtype=torch.float64)
    parts = []
    for start, stop in ((0, 1), (1, 3), (3, 20), (20, 21), (21, 30)):
        spans = Spans((stop - start,), (start,), (2,), ((1,),), CPU)
        parts.append(causal_conv(x_TC=x[start:stop], w_CW=w, state=state, spans=spans))
    torch.testing.assert_close(torch.cat(parts), torch.nn.functional.silu(whole))
    torch.testing.assert_close(state[2, [p % 4 for p in (27, 28, 29)]], x[27:])
    assert state[:2].isnan().all(), "only the row's own slot is written"


def test_gdn_is_the_delta_rule_token_by_token(seed: int) -> None:
    tokens, nk, nv, dk, dv = 12, 2, 4, 8, 6
    qkv, a, b = draw(seed, tokens, 2 * nk * dk + nv * dv), draw(seed + 1, tokens, nv), draw(seed + 2, tokens, nv)
    a_log, bias = draw(seed + 3, nv), draw(seed + 4, nv)
    state = torch.full((2, nv, dk, dv), float("nan"), dtype=torch.float64)
    got = gdn(
        qkv_TC=qkv, a_TN=a, b_TN=b, A_log_N=a_log, dt_bias_N=bias, state=state,
        pending=torch.zeros(2, 0, nv * (dk + dv + 2), dtype=torch.float64),
        spans=Spans((tokens,), (0,), (1,), ((1,),), CPU), key_heads=nk,
    )  # fmt: skip
    for h in range(nv):
        s, group = torch.zeros(dk, dv, dtype=torch.float64), h // (nv // nk)
        for t in range(tokens):
            q = qkv[t, group * dk : (group + 1) * dk]
            k = qkv[t, (nk + group) * dk : (nk + group + 1) * dk]
            v = qkv[t, 2 * nk * dk + h * dv : 2 * nk * dk + (h + 1) * dv]
            q, k = (x / (x @ x + 1e-6).sqrt() for x in (q, k))
            g = -a_log[h].exp() * torch.nn.functional.softplus(a[t, h] + bias[h])
            s = g.exp() * s
            s = s + torch.outer(k, torch.sigmoid(b[t, h]) * (v - s.t() @ k))
            torch.testing.assert_close(got[t, h], s.t() @ q / dk**0.5)
        torch.testing.assert_close(state[1, h], s)


def test_attention_is_torchs_scaled_dot_product_over_gathered_pages(seed: int) -> None:
    heads, groups, dim, total = 6, 2, 16, 150
    k, v, q, gate = (draw(seed + i, total, n, dim) for i, n in enumerate((groups, groups, heads, heads)))
    pages = (4, 1, 3)
    k_pages, v_pages = (torch.full((6, groups, 64, dim), float("inf"), dtype=torch.float64) for _ in range(2))
    for t in range(total):
        k_pages[pages[t // 64], :, t % 64], v_pages[pages[t // 64], :, t % 64] = k[t], v[t]
    o = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], is_causal=True, enable_gqa=True
    )[0].transpose(0, 1) * torch.sigmoid(gate)
    for start, stop in ((0, total), (0, 1), (63, 64), (64, 65), (100, 150)):
        got = paged_attention(
            q_TND=q[start:stop], gate_TND=gate[start:stop], k_pages=k_pages, v_pages=v_pages,
            spans=Spans((stop - start,), (start,), (1,), (pages,), CPU),
        )  # fmt: skip
        torch.testing.assert_close(got, o[start:stop])


def test_attention_inputs_turn_norm_and_write(seed: int) -> None:
    heads, groups, dim, half, position = 2, 1, 12, 3, 70
    x, qw, kw = draw(seed, 1, 2 * heads * dim + 2 * groups * dim), draw(seed + 1, dim), draw(seed + 2, dim)
    angle = torch.outer(
        torch.arange(100, dtype=torch.float64), torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64)
    )
    k_pages, v_pages = (torch.zeros(4, groups, 64, dim, dtype=torch.float64) for _ in range(2))
    q, gate = attention_inputs(
        x_TE=x, q_norm_D=qw, k_norm_D=kw, eps=1e-6, table_LF2=torch.stack([angle.cos(), angle.sin()], -1),
        k_pages=k_pages, v_pages=v_pages, spans=Spans((1,), (position,), (1,), ((3, 2),), CPU),
    )  # fmt: skip

    def expected(y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = y / (y.pow(2).mean() + 1e-6).sqrt() * (1 + w)
        turned = torch.complex(y[:half], y[half : 2 * half]) * torch.polar(
            torch.ones(half).double(), angle[position]
        )
        return torch.cat([turned.real, turned.imag, y[2 * half :]])

    for head in range(heads):
        torch.testing.assert_close(q[0, head], expected(x[0, 2 * head * dim : (2 * head + 1) * dim], qw))
        torch.testing.assert_close(gate[0, head], x[0, (2 * head + 1) * dim : (2 * head + 2) * dim])
    torch.testing.assert_close(k_pages[2, 0, 6], expected(x[0, 4 * dim : 5 * dim], kw))
    torch.testing.assert_close(v_pages[2, 0, 6], x[0, 5 * dim :])
    assert k_pages.count_nonzero() == dim, "one key is written, no other"


def test_experts_are_a_loop_over_tokens(seed: int) -> None:
    tokens, e, k, h, i, s = 9, 5, 3, 8, 6, 4
    shapes = {
        "x_TH": (tokens, h), "norm_H": (h,), "router_FH": (e + 1, h), "gate_up_EJH": (e, 2 * i, h),
        "down_EHI": (e, h, i), "shared_gate_up_SH": (2 * s, h), "shared_down_HS": (h, s),
    }  # fmt: skip
    given = {name: draw(seed + n, *shape) for n, (name, shape) in enumerate(shapes.items())}
    y = moe(**given, eps=1e-6, k=k)

    def expert(gate_up: torch.Tensor, down: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        gate, up = (gate_up @ unit).chunk(2)
        return down @ (torch.nn.functional.silu(gate) * up)

    for t, x in enumerate(given["x_TH"]):
        unit = x / (x.pow(2).mean() + 1e-6).sqrt() * (1 + given["norm_H"])
        logits = given["router_FH"] @ unit
        p = torch.softmax(logits[:e], -1)
        best = sorted(range(e), key=lambda j: -p[j])[:k]
        routed = [
            p[j] / p[best].sum() * expert(given["gate_up_EJH"][j], given["down_EHI"][j], unit) for j in best
        ]
        shared = expert(given["shared_gate_up_SH"], given["shared_down_HS"], unit)
        torch.testing.assert_close(y[t], x + sum(routed) + torch.sigmoid(logits[e]) * shared)


def test_ties_go_to_the_lower_expert(seed: int) -> None:
    given = moe.spec.inputs(moe.spec.cases[2], torch.float32, torch.Generator().manual_seed(seed)) | {"k": 2}
    given["router_FH"] = torch.zeros_like(given["router_FH"])
    first = {name: given[name][:2] for name in ("gate_up_EJH", "down_EHI")} | {"router_FH": given["router_FH"][:3]}
    assert torch.equal(moe(**given), moe(**given | first))


# --- what shares a step never changes a row ----------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_linear_rows_do_not_depend_on_their_number(seed: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(seed)
        for n, k in ((64, 64), (77, 100), (768, 256), (256, 512), (3584, 1024)):
            x, w = torch.randn(130, k, generator=generator), torch.randn(n, k, generator=generator)
            whole = linear(x_MK=x, w_JK=w)
            for rows in (1, 2, 3, 5, 7, 8, 9, 31, 64, 65, 129):
                assert torch.equal(linear(x_MK=x[1 : 1 + rows], w_JK=w), whole[1 : 1 + rows]), (n, k, rows)
    finally:
        torch.set_num_threads(before)


def test_poison_in_unused_memory_reaches_nobody(seed: int) -> None:
    """A row reads its own pages up to its own position, and its own slot unless it is fresh."""
    for op in (paged_attention, gdn, delta_net):
        for dims in op.spec.cases:
            clean = op.spec.inputs(dims, torch.float32, torch.Generator().manual_seed(seed))
            dirty = copy.deepcopy(clean)
            spans = dirty["spans"]
            for name in ("state", "conv", "k_pages", "v_pages"):
                if name not in dirty:
                    continue
                used = torch.zeros(dirty[name].shape[0], 64, dtype=torch.bool)
                for row in range(spans.num_rows):
                    if name in ("state", "conv"):
                        used[spans.sources[row]] = spans.begins[row] > 0
                    else:
                        for t in range(spans.contexts[row] + spans.lengths[row]):
                            used[spans.pages[row][t // 64], t % 64] = True
                if name in ("state", "conv"):
                    dirty[name][~used[:, 0]] = float("nan")
                else:
                    dirty[name].transpose(1, 2)[~used] = float("nan")
            want, got = op(**clean), op(**dirty)
            assert torch.equal(want, got), op.spec.name


# --- drafts, snapshots and resumed states leave every bit as it is ------------------------------------------------


def test_drafts_accepted_or_not_are_as_if_never_drafted(seed: int) -> None:
    """Random acceptance, several rows, snapshots at random committed positions, resumption from a snapshot's slot."""
    nk, nv, dk, dv, width, most, total, rows = 1, 2, 16, 8, 4, 3, 40, 3
    rng, channels = random.Random(seed), 2 * nk * dk + nv * dv
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, a, b = noise(rows, total, channels), noise(rows, total, nv), noise(rows, total, nv)
    weight, a_log, bias = noise(channels, width), noise(nv), noise(nv)

    def pools(slots: int) -> dict[str, torch.Tensor]:
        kept = nv * (dk + dv + 2)
        shapes = {"state": (nv, dk, dv), "conv": (width + most, channels), "pending": (most, kept)}
        return {name: torch.full((slots + 1, *shape), float("nan")) for name, shape in shapes.items()}

    def past(position: int) -> list[int]:
        return [p % (width + most) for p in range(max(0, position - width + 1), position)]

    def step(pool: dict[str, torch.Tensor], spans: Spans, x_TC: torch.Tensor, a_TN: torch.Tensor, b_TN: torch.Tensor):
        mixed = causal_conv(x_TC=x_TC, w_CW=weight, state=pool["conv"], spans=spans)
        return gdn(
            qkv_TC=mixed, a_TN=a_TN, b_TN=b_TN, A_log_N=a_log, dt_bias_N=bias, state=pool["state"],
            pending=pool["pending"], spans=spans, key_heads=nk,
        )  # fmt: skip

    plain, plain_pool = torch.empty(rows, total, nv, dv), pools(rows)
    after: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    for r in range(rows):
        for t in range(total):
            spans = Spans((1,), (t,), (r + 1,), ((1,),), CPU)
            plain[r, t] = step(plain_pool, spans, x[r, t : t + 1], a[r, t : t + 1], b[r, t : t + 1])[0]
            after[r, t + 1] = plain_pool["state"][r + 1].clone(), plain_pool["conv"][r + 1, past(t + 1)].clone()

    pool = pools(4 * rows)
    at, fold, source = [0] * rows, [0] * rows, [r + 1 for r in range(rows)]
    while min(at) < total:
        active = [r for r in range(rows) if at[r] < total]
        drafts = {r: rng.randint(0, min(most, total - at[r] - 1)) for r in active}
        accepted = {r: rng.randint(0, drafts[r]) for r in active}
        sure = {r: rng.randint(1, min(4, total - at[r] - drafts[r])) if not fold[r] else 1 for r in active}
        spare = {r: rows + 1 + r + rows * rng.randrange(2) for r in active}
        snapshots = {
            r: ((rng.randint(at[r] + 1, at[r] + sure[r]), spare[r]),) if rng.random() < 0.5 else ()
            for r in active
        }
        spans = Spans(
            tuple(sure[r] + drafts[r] for r in active), tuple(at[r] for r in active), tuple(r + 1 for r in active),
            ((1,),) * len(active), CPU, tuple(source[r] for r in active), tuple(fold[r] for r in active),
            tuple(drafts[r] for r in active), tuple(snapshots[r] for r in active),
        )  # fmt: skip
        inputs = []
        for full in (x, a, b):
            parts = []
            for r in active:
                part = full[r, at[r] : at[r] + sure[r] + drafts[r]].clone()
                part[sure[r] + accepted[r] :] = noise(*part[sure[r] + accepted[r] :].shape)  # wrong drafts
                parts.append(part)
            inputs.append(torch.cat(parts))
        out = step(pool, spans, *inputs)
        for i, r in enumerate(active):
            good = sure[r] + accepted[r]
            assert torch.equal(out[spans.starts[i] : spans.starts[i] + good], plain[r, at[r] : at[r] + good])
            source[r] = r + 1
            for position, slot in snapshots[r]:
                assert torch.equal(pool["state"][slot], after[r, position][0])
                assert torch.equal(pool["conv"][slot, past(position)], after[r, position][1])
                if position == at[r] + good and not accepted[r]:
                    source[r] = slot  # go on from the copy
            at[r], fold[r] = at[r] + good, accepted[r]
