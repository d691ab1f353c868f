"""Gated DeltaNet over rows of many tokens: chunks of up to 64 tokens, parallel but for one pass over their states.

With G the sum of log decays of a chunk's tokens up to one, D_ij = exp(G_i - G_j) for j <= i, and S the state before the
chunk, the recurrence of `tritium.ops.gdn` over a chunk is (Yang et al., arXiv:2406.06484 and arXiv:2412.06464):

    T = (I + tril(β K Kᵀ D, -1))^-1                              (of every chunk at once)
    u = T (β v - β exp(G) K S)      S <- exp(G_last) S + (exp(G_last - G) K)ᵀ u          (in order)
    o = exp(G) Q S + tril(Q Kᵀ D) u                              (of every chunk at once)

Chunks end at positions that are multiples of 64 and at snapshots, so a prompt's states do not depend on how it was cut
at multiples of 64. They are padded to 64 tokens with zeros (k, v, β and log decay), which leave the state as it is: no
mask but at the step's own tensors. States, v and u are kept transposed, [dv, dk] and [dv, 64], so that the pass can
feed its products from registers, as attention does. Exponents are never positive; their sums, decay, are float64 where
the inputs are float32, because differences of neighbours are what counts. All are powers of 2.

Shapes: T tokens, N = nv value heads, C chunks; scratch in the inputs' dtype: qk [C, 2 nk, 64, dk], v [C, N, dv, 64]
(β v, after the pass u), mix (T) [C, N, 64, 64], h [C, N, dv, dk] (states before the chunks); decay (G) [C, N, 64];
scale [C, N, 2, 64]: β exp(G) and exp(G_last - G).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from tritium.ops.gdn import L2_EPS
from tritium.ops.kernels.launch import cdiv, launch, parameters, release_next, wait_for_inputs
from tritium.ops.spans import Spans

CHUNK = 64
C64 = tl.constexpr(CHUNK)
EPS = tl.constexpr(L2_EPS)
LOG2E = tl.constexpr(1.4426950408889634)


class Plan(NamedTuple):
    """The rows of a step as chunks, int32 on the device; made once a step."""

    chunks: torch.Tensor
    """[C, 5]: first token, tokens, tokens of the row before it, position, slot that the row starts from."""
    rows: torch.Tensor
    """[rows, 5]: slot that the row starts from, first token, position, first of its segments, end of them."""
    segments: torch.Tensor
    """[segments, 4]: first chunk, end of the chunks, slot to store the state to after them, its position."""


def plan(spans: Spans, first: int) -> Plan:
    """For the rows from `first` on."""
    return spans.cached(f"gdn_chunks_{first}", lambda spans: _plan(spans, first))


def _plan(spans: Spans, first: int) -> Plan:
    chunks: list[tuple[int, ...]] = []
    rows: list[tuple[int, ...]] = []
    segments: list[tuple[int, ...]] = []
    for r in range(first, spans.num_rows):
        start, at, source = spans.starts[r], spans.contexts[r], spans.sources[r]
        stop = at + spans.lengths[r]
        saves = [*sorted(spans.snapshots[r]), (stop, spans.slots[r])]
        if spans.folds[r] or spans.drafts[r]:
            raise ValueError(f"row {r} has drafts, as only rows of few tokens may")
        rows.append((source, start, at, len(segments), len(segments) + len(saves)))
        for position, slot in saves:
            begin = len(chunks)
            while at < position:
                end, done = min((at // CHUNK + 1) * CHUNK, position), at - spans.contexts[r]
                chunks.append((start + done, end - at, done, at, source))
                at = end
            segments.append((begin, len(chunks), slot, position))
    # Each part begins on a multiple of 16 bytes.
    parts = [[x for item in part for x in item] for part in (chunks, rows, segments)]
    flat = spans.tensor([x for part in parts for x in (*part, *(0,) * (-len(part) % 4))], torch.int32)
    room = flat.split([len(part) + -len(part) % 4 for part in parts])
    return Plan._make(x[: len(part)].view(-1, width) for x, part, width in zip(room, parts, (5, 5, 4), strict=True))


@triton.jit
def _sigmoid(x, exact: tl.constexpr):
    """Exact but for its rounding, or within 2^-21 at half the instructions."""
    if exact:
        return 1.0 / (1.0 + tl.exp(-x))
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return root * root


@triton.jit
def _convolved(x, x_stride, conv_w, ring, chunk_at, t, c, channels, WIDTH: tl.constexpr, RING: tl.constexpr):
    """silu(conv(x)) of tokens t of a chunk in channels c, float32, zero beyond its end; WIDTH 0: x as it is."""
    start, length, done = tl.load(chunk_at), tl.load(chunk_at + 1), tl.load(chunk_at + 2)
    position, source = tl.load(chunk_at + 3), tl.load(chunk_at + 4)
    live = t < length
    from_x = x + (start + t).to(tl.int64)[:, None] * x_stride + c[None, :]
    if WIDTH == 0:
        y = tl.load(from_x, mask=live[:, None], other=0.0).to(tl.float32)
    else:
        y = tl.zeros((t.shape[0], c.shape[0]), tl.float32)
        if done < WIDTH - 1:  # the row's first chunk: oldest taps come from the ring
            for j in tl.static_range(WIDTH - 1):
                p = position + t - (WIDTH - 1 - j)
                kept = live & (done + t < WIDTH - 1 - j) & (p >= 0)
                at = (source.to(tl.int64) * RING + p % RING)[:, None] * channels + c[None, :]
                past = tl.load(ring + at, mask=kept[:, None], other=0.0).to(tl.float32)
                y += past * tl.load(conv_w + c * WIDTH + j)[None, :]
        for j in tl.static_range(WIDTH):
            inside = live & (done + t >= WIDTH - 1 - j)
            value = tl.load(from_x - (WIDTH - 1 - j) * x_stride, mask=inside[:, None], other=0.0).to(tl.float32)
            y += value * tl.load(conv_w + c * WIDTH + j)[None, :]
        y *= _sigmoid(y, x.dtype.element_ty == tl.float32)
    return y


@triton.jit
def _queries_and_keys(x, x_stride, conv_w, ring, chunks, qk, channels, NK: tl.constexpr, DK: tl.constexpr,
                      WIDTH: tl.constexpr, RING: tl.constexpr, tokens: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """Convolution and L2 norm of one head; q comes out scaled."""
    head, chunk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t, d = tl.program_id(2) * tokens + tl.arange(0, tokens), tl.arange(0, DK)
    wait_for_inputs(pdl)
    y = _convolved(x, x_stride, conv_w, ring, chunks + chunk * 5, t, head * DK + d, channels, WIDTH, RING)
    y = y * tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None] * tl.where(head < NK, DK**-0.5, 1.0)
    release_next(pdl)
    tl.store(qk + ((chunk * 2 * NK + head) * C64 + t[:, None]) * DK + d[None, :], y.to(qk.dtype.element_ty))


@triton.jit
def _values(x, x_stride, conv_w, ring, b, gate_stride, chunks, v, channels, N: tl.constexpr, NK: tl.constexpr,
            DK: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, RING: tl.constexpr, tokens: tl.constexpr,
            values: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """Convolution of `values` channels of v, times β."""
    c, chunk = tl.program_id(0) * values + tl.arange(0, values), tl.program_id(1).to(tl.int64)
    t = tl.program_id(2) * tokens + tl.arange(0, tokens)
    wait_for_inputs(pdl)
    at = (tl.load(chunks + chunk * 5) + t).to(tl.int64) * gate_stride + tl.program_id(0) * values // DV
    beta = tl.load(b + at, mask=t < tl.load(chunks + chunk * 5 + 1), other=0.0).to(tl.float32)
    y = _convolved(x, x_stride, conv_w, ring, chunks + chunk * 5, t, 2 * NK * DK + c, channels, WIDTH, RING)
    y *= _sigmoid(beta, True)[:, None]
    release_next(pdl)
    tl.store(v + (chunk * N * DV + c[None, :]) * C64 + t[:, None], y.to(v.dtype.element_ty))


@triton.jit
def _inverse(x):
    """(I + x)^-1 for x strictly lower triangular, 64 x 64, float32: of the blocks of 2 on the diagonal, then of blocks
    twice as large, (A, 0; B, C)^-1 = (A^-1, 0; -C^-1 B A^-1, C^-1). Products are of halves: of a Gated DeltaNet's keys,
    no number here is larger than 1."""
    i = tl.arange(0, C64)
    t = tl.where(i[:, None] == i[None, :], 1.0, tl.where(i[:, None] == i[None, :] ^ 1, -x, 0.0))
    x = (-x).to(tl.float16)
    for level in tl.static_range(1, 6):
        low, block = t.to(tl.float16), i >> level
        below = tl.where(block[:, None] == (block ^ 1)[None, :], tl.dot(low, x), 0.0)
        t = tl.dot(below.to(tl.float16), low, t)
    return t


@triton.jit
def _quartered(x, B: tl.constexpr, n: tl.constexpr):
    """Of B matrices 2n x 2n: the 2B blocks on their diagonals, and the B below."""
    left, right = tl.split(tl.permute(tl.reshape(x, (B, 2, n, 2, n)), (0, 2, 4, 1, 3)))
    upper, below = tl.split(left)
    _, lower = tl.split(right)
    return tl.reshape(tl.permute(tl.join(upper, lower), (0, 3, 1, 2)), (2 * B, n, n)), below


@triton.jit
def _merged(x, below, B: tl.constexpr, n: tl.constexpr, precision: tl.constexpr):
    """The inverse of the B unit lower triangular matrices with blocks `below`, from those of their diagonal blocks."""
    upper, lower = tl.split(tl.permute(tl.reshape(x, (B, 2, n, n)), (0, 2, 3, 1)))
    product = tl.dot(lower, below, input_precision=precision)
    left = tl.join(upper, -tl.dot(product, upper, input_precision=precision))
    whole = tl.join(left, tl.join(tl.zeros_like(lower), lower))
    return tl.reshape(tl.permute(whole, (0, 3, 1, 4, 2)), (B, 2 * n, 2 * n))


@triton.jit
def _exact_inverse(x, precision: tl.constexpr):
    """The same in smaller products of float32: blocks of 8 as (I - x)(I + x^2)(I + x^4), then merges. Powers may grow
    far beyond the inverse: C(7, 3) = 35 times in a block of 8, 6435 times in one of 16.
    """
    halves, below_32 = _quartered(tl.reshape(x, (1, 64, 64)), 1, 32)
    blocks, below_16 = _quartered(halves, 2, 16)
    i = tl.arange(0, 16)[None, :, None]
    j = tl.arange(0, 16)[None, None, :]
    near = tl.where(i // 8 == j // 8, blocks, 0.0)
    t = tl.where(i == j, 1.0, -near)
    power = tl.dot(near, near, input_precision=precision)
    t = tl.dot(t, power, t, input_precision=precision)
    power = tl.dot(power, power, input_precision=precision)
    t = tl.dot(t, power, t, input_precision=precision)
    t -= tl.dot(tl.dot(t, blocks - near, input_precision=precision), t, input_precision=precision)
    return tl.reshape(_merged(_merged(t, below_16, 2, 16, precision), below_32, 1, 32, precision), (64, 64))


@triton.jit
def _prepare(a, b, gate_stride, A_log, dt_bias, chunks, qk, mix, decay, scale, N: tl.constexpr, NK: tl.constexpr,
             DK: tl.constexpr, keys: tl.constexpr, precision: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """Gates and T of one chunk and value head; `keys` of dk at a time."""
    head, chunk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t, d = tl.arange(0, C64), tl.arange(0, keys)
    rate, bias = tl.exp(tl.load(A_log + head)) * -LOG2E, tl.load(dt_bias + head)
    exact: tl.constexpr = mix.dtype.element_ty == tl.float32
    wait_for_inputs(pdl)
    at = (tl.load(chunks + chunk * 5) + t).to(tl.int64) * gate_stride + head
    live = t < tl.load(chunks + chunk * 5 + 1)
    step = tl.load(a + at, mask=live, other=0.0).to(tl.float32) + bias
    beta = tl.where(live, _sigmoid(tl.load(b + at, mask=live, other=0.0).to(tl.float32), True), 0.0)
    in_k = qk + (chunk * 2 * NK + NK + head // (N // NK)) * C64 * DK + t[:, None] * DK + d[None, :]
    coupling = tl.zeros((C64, C64), tl.float32)
    for piece in range(DK // keys):
        k = tl.load(in_k + piece * keys)
        coupling = tl.dot(k, tl.trans(k), coupling, input_precision="ieee")
    step = rate * (tl.maximum(step, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(step))))
    total = tl.cumsum(tl.where(live, step, 0.0).to(decay.dtype.element_ty), 0)
    last = tl.sum(tl.where(t == C64 - 1, total, 0.0), 0)
    base = chunk * N + head
    tl.store(decay + base * C64 + t, total)
    tl.store(scale + base * 2 * C64 + t, beta * tl.exp2(total.to(tl.float32)))
    tl.store(scale + (base * 2 + 1) * C64 + t, tl.exp2((last - total).to(tl.float32)))
    gap = tl.where(t[:, None] > t[None, :], (total[:, None] - total[None, :]).to(tl.float32), float("-inf"))
    x = coupling * beta[:, None] * tl.exp2(gap)
    inverse = _exact_inverse(x, precision) if exact else _inverse(x)
    release_next(pdl)
    tl.store(mix + (base * C64 + t[:, None]) * C64 + t[None, :], inverse.to(mix.dtype.element_ty))


@triton.jit
def _keep(x, x_stride, ring, rows, segments, channels, WIDTH: tl.constexpr, RING: tl.constexpr, block: tl.constexpr,
          pdl: tl.constexpr):  # fmt: skip
    """Inputs before the end of every segment of a row go to the rings: after all that read one."""
    row, c = rows + tl.program_id(0) * 5, tl.program_id(1) * block + tl.arange(0, block)
    source, start, context = tl.load(row).to(tl.int64), tl.load(row + 1).to(tl.int64), tl.load(row + 2)
    first, end = tl.load(row + 3), tl.load(row + 4)
    wait_for_inputs(pdl)
    for segment in range(first, end):  # the row's own slot is the last one: it may be the one read for the others
        slot, stop = tl.load(segments + segment * 4 + 2).to(tl.int64), tl.load(segments + segment * 4 + 3)
        least = tl.where(segment == end - 1, tl.maximum(context - (WIDTH - 1), stop - RING), stop - (WIDTH - 1))
        least = tl.maximum(least, 0)
        for i in range(stop - least):
            p = least + i
            given = tl.zeros_like(c) + p >= context
            value = tl.load(x + (start + p - context) * x_stride + c, mask=(c < channels) & given, other=0.0)
            past = tl.load(ring + (source * RING + p % RING) * channels + c, mask=(c < channels) & ~given, other=0.0)
            value = tl.where(given, value.to(ring.dtype.element_ty), past)
            tl.store(ring + (slot * RING + p % RING) * channels + c, value, mask=c < channels)
    release_next(pdl)


@triton.jit
def _advance(state, qk, mix, v, decay, scale, h, rows, segments, N: tl.constexpr, NK: tl.constexpr, DK: tl.constexpr,
             DV: tl.constexpr, values: tl.constexpr, stages: tl.constexpr, from_registers: tl.constexpr,
             pdl: tl.constexpr):  # fmt: skip
    """The states of a row, one value head and `values` of its dv: chunk after chunk. They are the left factors of the
    products, `from_registers`, or the right ones, where the other factors would be more than the registers hold."""
    pieces: tl.constexpr = DV // values
    head, row = tl.program_id(0) // pieces, rows + tl.program_id(1) * 5
    e = (tl.program_id(0) % pieces) * values + tl.arange(0, values)
    t, d = tl.arange(0, C64), tl.arange(0, DK)
    source, context, first, last = tl.load(row), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    in_h, in_v = e[:, None] * DK + d[None, :], e[:, None] * C64 + t[None, :]
    in_mix, in_k = t[:, None] * C64 + t[None, :], t[:, None] * DK + d[None, :]
    wait_for_inputs(pdl)
    s = tl.zeros((values, DK), tl.float32)
    if context > 0:
        s += tl.load(state + (source.to(tl.int64) * N + head) * DK * DV + d[None, :] * DV + e[:, None])
    for segment in range(first, last):
        begin, end = tl.load(segments + segment * 4), tl.load(segments + segment * 4 + 1)
        for i in tl.range(0, end - begin, num_stages=stages):
            chunk = begin.to(tl.int64) + i
            base = chunk * N + head
            s_low = s.to(h.dtype.element_ty)
            tl.store(h + base * DV * DK + in_h, s_low)
            k_tile = tl.load(qk + (chunk * 2 * NK + NK + head // (N // NK)) * C64 * DK + in_k)
            # Loads that are on their way already stand where they are used: what they bring waits in shared memory.
            if from_registers:
                known = tl.dot(s_low, tl.trans(k_tile), input_precision="ieee")
            v_tile = tl.load(v + base * DV * C64 + in_v).to(tl.float32)
            grown = tl.load(scale + base * 2 * C64 + t)[None, :]
            if from_registers:
                rest = (v_tile - grown * known).to(v.dtype.element_ty)
            mixer = tl.load(mix + base * C64 * C64 + in_mix)
            faded = tl.load(scale + (base * 2 + 1) * C64 + t)[None, :]
            if from_registers:
                new = tl.dot(rest, tl.trans(mixer), input_precision="ieee")
            else:
                rest = v_tile - grown * tl.trans(tl.dot(k_tile, tl.trans(s_low), input_precision="ieee"))
                new = tl.trans(tl.dot(mixer, tl.trans(rest.to(v.dtype.element_ty)), input_precision="ieee"))
            tl.store(v + base * DV * C64 + in_v, new.to(v.dtype.element_ty))
            new = (new * faded).to(v.dtype.element_ty)
            s *= tl.exp2(tl.load(decay + base * C64 + C64 - 1).to(tl.float32))
            if from_registers:
                s = tl.dot(new, k_tile, s, input_precision="ieee")
            else:
                s = tl.trans(tl.dot(tl.trans(k_tile), tl.trans(new), tl.trans(s), input_precision="ieee"))
        slot = tl.load(segments + segment * 4 + 2).to(tl.int64)
        tl.store(state + (slot * N + head) * DK * DV + d[None, :] * DV + e[:, None], s.to(state.dtype.element_ty))
    release_next(pdl)


@triton.jit
def _outputs(qk, v, h, decay, z, z_stride, norm, eps, y, chunks, N: tl.constexpr, NK: tl.constexpr, DK: tl.constexpr,
             DV: tl.constexpr, GATED: tl.constexpr, keys: tl.constexpr, stages: tl.constexpr,
             pdl: tl.constexpr):  # fmt: skip
    """y of one chunk and value head: from the state before it and from its own tokens, then the gated norm."""
    head, chunk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    base = chunk * N + head
    t, d, e = tl.arange(0, C64), tl.arange(0, keys), tl.arange(0, DV)
    token = (tl.load(chunks + chunk * 5) + t).to(tl.int64)[:, None]
    live = (t < tl.load(chunks + chunk * 5 + 1))[:, None]
    in_q = qk + (chunk * 2 * NK + head // (N // NK)) * C64 * DK + t[:, None] * DK + d[None, :]
    in_h = h + (base * DV + e[:, None]) * DK + d[None, :]
    in_v, in_z = v + (base * DV + e[:, None]) * C64 + t[None, :], z + token * z_stride + head * DV + e[None, :]
    wait_for_inputs(pdl)
    weights, o = tl.zeros((C64, C64), tl.float32), tl.zeros((C64, DV), tl.float32)
    for piece in tl.range(DK // keys, num_stages=stages):
        q, k = tl.load(in_q + piece * keys), tl.load(in_q + NK * C64 * DK + piece * keys)
        before = tl.load(in_h + piece * keys)
        weights = tl.dot(q, tl.trans(k), weights, input_precision="ieee")
        o = tl.dot(q, tl.trans(before), o, input_precision="ieee")
    new = tl.load(in_v)
    total = tl.load(decay + base * C64 + t)
    gap = tl.where(t[:, None] >= t[None, :], (total[:, None] - total[None, :]).to(tl.float32), float("-inf"))
    weights = (weights * tl.exp2(gap)).to(v.dtype.element_ty)
    o *= tl.exp2(total.to(tl.float32))[:, None]
    o = tl.dot(weights, tl.trans(new), o, input_precision="ieee")
    if GATED:
        gate = tl.load(in_z, mask=live, other=0.0).to(tl.float32)
        o = o * tl.rsqrt(tl.sum(o * o, 1) / DV + eps)[:, None] * tl.load(norm + e)[None, :]
        o = o * gate * _sigmoid(gate, z.dtype.element_ty == tl.float32)
    release_next(pdl)
    tl.store(y + (token * N + head) * DV + e[None, :], o.to(y.dtype.element_ty), mask=live)


def gdn(
    *,
    qkv_TC: torch.Tensor,
    a_TN: torch.Tensor,
    b_TN: torch.Tensor,
    A_log_N: torch.Tensor,
    dt_bias_N: torch.Tensor,
    state: torch.Tensor,
    pending: torch.Tensor,
    spans: Spans,
    key_heads: int,
) -> torch.Tensor:
    """The recurrence alone, for rows of any length without drafts: what tests and benchmarks call."""
    _, heads, _, value = state.shape
    o_TNV = torch.empty(len(qkv_TC), heads, value, dtype=torch.float32, device=qkv_TC.device)
    run(plan(spans, 0), qkv_TC, None, None, a_TN, b_TN, A_log_N, dt_bias_N, state, key_heads, None, o_TNV)
    return o_TNV


def run(plan: Plan, x: torch.Tensor, conv_CW: torch.Tensor | None, conv: torch.Tensor | None, a: torch.Tensor,
        b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor, state: torch.Tensor, key_heads: int,
        gate: tuple[torch.Tensor, torch.Tensor, float] | None, y: torch.Tensor) -> None:  # fmt: skip
    """Fills y of the rows in `plan`, [T, N, dv] or as wide; updates `state` and `conv` in place. `gate`: z, the weights
    and eps of the gated norm."""
    _, N, DK, DV = state.shape
    count, rows, channels, exact = len(plan.chunks), len(plan.rows), x.shape[1], x.dtype == torch.float32
    width, ring = (0, 1) if conv_CW is None or conv is None else (conv_CW.shape[1], conv.shape[1])
    sizes: dict[str, Any] = {"N": N, "NK": key_heads, "DK": DK, "DV": DV}
    taps: dict[str, Any] = {"WIDTH": width, "RING": ring}
    key = {"heads": N, "size": x.element_size()}
    qk = x.new_empty(count, 2 * key_heads, CHUNK, DK)
    v = x.new_empty(count, N, DV, CHUNK)
    mix = x.new_empty(count, N, CHUNK, CHUNK)
    h = x.new_empty(count, N, DV, DK)
    decay = x.new_empty(count, N, CHUNK, dtype=torch.float64 if exact else torch.float32)
    scale = x.new_empty(count, N, 2, CHUNK, dtype=torch.float32)
    options = parameters("gdn.queries_and_keys", x, **key)
    launch(
        _queries_and_keys, (2 * key_heads, count, CHUNK // options["tokens"]), x, x.stride(0), conv_CW, conv,
        plan.chunks, qk, channels, NK=key_heads, DK=DK, **taps, **options,
    )  # fmt: skip
    options = parameters("gdn.values", x, **key)
    options["values"] = min(options["values"], DV)
    launch(
        _values, (N * DV // options["values"], count, CHUNK // options["tokens"]), x, x.stride(0), conv_CW, conv, b,
        b.stride(0), plan.chunks, v, channels, **sizes, **taps, **options,
    )  # fmt: skip
    options = parameters("gdn.prepare", x, **key)
    options["keys"] = min(options["keys"], DK)
    launch(
        _prepare, (N, count), a, b, a.stride(0), A_log, dt_bias, plan.chunks, qk, mix, decay, scale, N=N,
        NK=key_heads, DK=DK, **options,
    )  # fmt: skip
    if width:
        options = parameters("gdn.keep", x, **key)
        launch(
            _keep, (rows, cdiv(channels, options["block"])), x, x.stride(0), conv, plan.rows, plan.segments,
            channels, **taps, **options,
        )  # fmt: skip
    options = parameters("gdn.chunk_state", x, **key)
    options["values"] = min(options["values"], DV)
    launch(
        _advance, (N * DV // options["values"], rows), state, qk, mix, v, decay, scale, h, plan.rows, plan.segments,
        **sizes, **options,
    )  # fmt: skip
    z, norm, eps = gate or (x, A_log, 0.0)
    options = parameters("gdn.outputs", x, **key)
    options["keys"] = min(options["keys"], DK)
    launch(
        _outputs, (N, count), qk, v, h, decay, z, z.stride(0), norm, eps, y, plan.chunks, **sizes,
        GATED=gate is not None, **options,
    )  # fmt: skip
