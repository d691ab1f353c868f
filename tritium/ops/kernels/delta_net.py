"""The Gated DeltaNet mixer: rows of at most 16 tokens here, longer ones in `gdn_chunk`. See `tritium.ops.delta_net`.

One program is a value head of a row. It holds the state, dk x dv float32, in registers, first does what the accepted
drafts do to it, then goes through the tokens of the span: convolution, norms, gates, recurrence, gated norm. What does
not come from this step's projection is loaded, and folded, before the wait. Large batches of single tokens hold one
half of dv at a time (PIECES = 2), so that more programs are resident.

No program reads what another of the launch writes: a span's ring entries never lie on the W - 1 before it, unless it is
longer than G - (W - 1), then a second launch writes them; pending inputs are per value head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tritium.ops.gdn import L2_EPS
from tritium.ops.handed import Handed, Peak
from tritium.ops.kernels.launch import bucket, cdiv, launch, parameters, release_next, wait_for_inputs
from tritium.ops.kernels.one_token import leave_peak
from tritium.ops.spans import Spans

WIDTH = 4
"""Taps of the convolution."""
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""There, a reduction with a function of one's own takes seconds."""


@triton.jit
def _add2(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add3(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _sums2(a, b):
    """Both sums over the first axis, in one pass."""
    if INTERPRETED:
        return tl.sum(a, 0), tl.sum(b, 0)
    return tl.reduce((a, b), 0, _add2)


@triton.jit
def _sums3(a, b, c):
    if INTERPRETED:
        return tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0)
    return tl.reduce((a, b, c), 0, _add3)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _weights(conv_w, at):
    """The four taps of the channels `at`, oldest first."""
    w = conv_w + at * 4
    return tl.load(w), tl.load(w + 1), tl.load(w + 2), tl.load(w + 3)


@triton.jit
def _before(ring, slot, at, d, size, position, G: tl.constexpr, C: tl.constexpr):
    """Channels `at` of the three positions before `position`, oldest first, where d < size; zero before position 0."""
    place = ring + slot * (G * C) + at
    a = tl.load(place + (position + G - 3) % G * C, mask=d < tl.where(position > 2, size, 0), other=0.0)
    b = tl.load(place + (position + G - 2) % G * C, mask=d < tl.where(position > 1, size, 0), other=0.0)
    c = tl.load(place + (position + G - 1) % G * C, mask=d < tl.where(position > 0, size, 0), other=0.0)
    return a.to(tl.float32), b.to(tl.float32), c.to(tl.float32)


@triton.jit
def _inputs(token, qk_at, v_at, both, dv, head, there, C: tl.constexpr, NV: tl.constexpr, DK: tl.constexpr,
            DV: tl.constexpr):  # fmt: skip
    """[q, k], v, z, b, a of one head of a token; zeros where it is not there."""
    value = tl.where(there, DV, 0)
    qk = tl.load(token + qk_at, mask=both < tl.where(there, 2 * DK, 0), other=0.0)
    v = tl.load(token + v_at, mask=dv < value, other=0.0)
    z = tl.load(token + C + head * DV + dv, mask=dv < value, other=0.0)
    b = tl.load(token + C + NV * DV + head, mask=there, other=0.0)
    a = tl.load(token + C + NV * (DV + 1) + head, mask=there, other=0.0)
    return qk.to(tl.float32), v.to(tl.float32), z.to(tl.float32), b.to(tl.float32), a.to(tl.float32)


@triton.jit
def _keep(ring, slot, position, qk_at, v_at, qk, v, first, G: tl.constexpr, C: tl.constexpr):
    """Puts one position's inputs into a slot's ring. The first value head of a group does so for its q and k."""
    place = ring + slot * (G * C) + (position + G) % G * C
    tl.store(place + v_at, v.to(ring.dtype.element_ty))
    if first:
        tl.store(place + qk_at, qk.to(ring.dtype.element_ty))


@triton.jit
def _folded(s, kept, count, k_at, v_at, gate_at, NV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):
    """The state after the first `count` tokens kept beside it."""
    for _ in range(count):
        k, v = tl.load(kept + k_at), tl.load(kept + NV * DK + v_at)
        decay, beta = tl.load(kept + gate_at), tl.load(kept + gate_at + NV)
        s = s * decay
        u = (v - tl.sum(s * k[:, None], 0)) * beta
        s = s + k[:, None] * u[None, :]
        kept += NV * (DK + DV + 2)
    return s


@triton.jit
def _advanced(s, q, k, v, by, decay, beta):
    """The state after one token, and its output from the same pass: S_new' q = S' q + (k.q) u."""
    s = s * decay
    sk, sq = _sums2(s * k[:, None], s * q[:, None])
    u = (v - sk) * beta
    return s + k[:, None] * u[None, :], sq + by * u


@triton.jit(do_not_specialize=["places"])
def _step(x, conv_w, A_log, dt_bias, norm_w, eps, state, ring, pending, y, leave, starts, lengths, contexts, sources,
          slots, folds, drafts, snap_at, snap_slot, x_stride, places, L2: tl.constexpr, NK: tl.constexpr,
          NV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, MANY: tl.constexpr,
          RING: tl.constexpr, PIECES: tl.constexpr, LEAVE: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """D the drafts that a slot can keep; MANY: a row may have more than one token; `places` that each row has in x and
    y, where all have equally many, else 0; RING: write the span's inputs to the ring."""
    tl.static_assert(PIECES == 1 or not MANY)
    C: tl.constexpr = 2 * NK * DK + NV * DV
    M: tl.constexpr = NV * DV
    F: tl.constexpr = NV * (DK + DV + 2)
    E: tl.constexpr = DV // PIECES
    head, row = tl.program_id(0), tl.program_id(1)
    group = head // (NV // NK)
    first = head % (NV // NK) == 0
    length, context, fold = tl.load(lengths + row), tl.load(contexts + row), tl.load(folds + row)
    source, slot = tl.load(sources + row).to(tl.int64), tl.load(slots + row).to(tl.int64)
    start = tl.load(starts + row).to(tl.int64)
    to_snap, snap = tl.load(snap_slot + row).to(tl.int64), tl.load(snap_at + row)
    sure = length  # tokens that change the stored state
    if MANY:
        sure -= tl.load(drafts + row)
    there = length > 0
    snaps = there & (to_snap >= 0)

    dk, dv, e = tl.arange(0, DK), tl.arange(0, DV), tl.arange(0, E)
    both = tl.arange(0, 2 * DK)  # q and k
    qk_at, v_at = (both // DK * NK + group) * DK + both % DK, 2 * NK * DK + head * DV + dv
    tile = dk[:, None] * DV + e[None, :]
    old, new = state + (source * NV + head) * (DK * DV), state + (slot * NV + head) * (DK * DV)
    copy = state + (to_snap * NV + head) * (DK * DV)
    key, value = tl.where(there, DK, 0), tl.where(there, DV, 0)  # an absent row reads nothing
    resumes = dk[:, None] < tl.where(context > fold, key, 0)
    s = tl.load(old + tile, mask=resumes, other=0.0)
    qk3, qk2, qk1 = _before(ring, source, qk_at, both, 2 * key, context, G, C)
    v3, v2, v1 = _before(ring, source, v_at, dv, value, context, G, C)
    qka, qkb, qkc, qkd = _weights(conv_w, qk_at)
    va, vb, vc, vd = _weights(conv_w, v_at)
    norm = tl.load(norm_w + dv)
    rate, bias = tl.exp(tl.load(A_log + head)), tl.load(dt_bias + head)
    kept = pending + source * (D * F)
    gate_at = NV * (DK + DV) + head
    if D > 0:
        fold = tl.where(there, fold, 0)
        s = _folded(s, kept, fold, head * DK + dk, head * DV + e, gate_at, NV, DK, DV)
    wait_for_inputs(pdl)
    qk0, v0, z0, b0, a0 = _inputs(x + start * x_stride, qk_at, v_at, both, dv, head, there, C, NV, DK, DV)
    tl.debug_barrier()  # every warp has read what this program goes on to overwrite
    if there & ((source != slot) | snaps):
        for back in tl.static_range(3, 0, -1):
            at = context - back
            qk, v = (qk3, v3) if back == 3 else ((qk2, v2) if back == 2 else (qk1, v1))
            if (source != slot) & (at >= 0):
                _keep(ring, slot, at, qk_at, v_at, qk, v, first, G, C)
            if snaps & (at >= 0) & (at >= snap - 3):
                _keep(ring, to_snap, at, qk_at, v_at, qk, v, first, G, C)

    for i in range(length if MANY else 1):
        position = context + i
        if RING and there:
            _keep(ring, slot, position, qk_at, v_at, qk0, v0, first, G, C)
        if snaps & (position >= snap - 3) & (position < snap):
            _keep(ring, to_snap, position, qk_at, v_at, qk0, v0, first, G, C)
        qk = _silu(qk3 * qka + qk2 * qkb + qk1 * qkc + qk0 * qkd)
        v = _silu(v3 * va + v2 * vb + v1 * vc + v0 * vd)
        gate = _silu(z0)
        beta = 1.0 / (1.0 + tl.exp(-b0))
        a = a0 + bias
        decay = tl.exp(-rate * (tl.maximum(a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(a)))))
        if MANY:  # the next token's inputs, while this one is worked on
            qk3, qk2, qk1, v3, v2, v1 = qk2, qk1, qk0, v2, v1, v0
            following = x + (start + i + 1) * x_stride
            qk0, v0, z0, b0, a0 = _inputs(following, qk_at, v_at, both, dv, head, i + 1 < length, C, NV, DK, DV)
        q, k = tl.split(tl.permute(tl.reshape(qk, [2, DK]), (1, 0)))
        qq, kk, by = _sums3(q * q, k * k, q * k)
        q_scale, k_scale = tl.rsqrt(qq + L2) * DK**-0.5, tl.rsqrt(kk + L2)
        q, k, by = q * q_scale, k * k_scale, by * q_scale * k_scale
        if PIECES == 1:
            s, o = _advanced(s, q, k, v, by, decay, beta)
            if i == sure - 1:
                tl.store(new + tile, s)
            if snaps & (position + 1 == snap):
                tl.store(copy + tile, s)
            if not MANY:
                release_next(pdl)
        else:
            v_low, v_high = tl.split(tl.permute(tl.reshape(v, [2, E]), (1, 0)))
            s, low = _advanced(s, q, k, v_low, by, decay, beta)
            if there:
                tl.store(new + tile, s)
            if snaps & (position + 1 == snap):
                tl.store(copy + tile, s)
            s = tl.load(old + E + tile, mask=resumes, other=0.0)
            if D > 0:
                s = _folded(s, kept, fold, head * DK + dk, head * DV + E + e, gate_at, NV, DK, DV)
            s, high = _advanced(s, q, k, v_high, by, decay, beta)
            if there:
                tl.store(new + E + tile, s)
            if snaps & (position + 1 == snap):
                tl.store(copy + E + tile, s)
            release_next(pdl)
            o = tl.reshape(tl.permute(tl.join(low, high), (1, 0)), [DV])
        if D > 0 and MANY and i >= sure:
            keep = pending + slot * (D * F) + (i - sure) * F
            tl.store(keep + head * DK + dk, k)
            tl.store(keep + NV * DK + head * DV + dv, v)
            tl.store(keep + gate_at, decay)
            tl.store(keep + gate_at + NV, beta)
        out = o * tl.rsqrt(tl.sum(o * o, 0) / DV + eps) * norm * gate
        rounded = out.to(y.dtype.element_ty)
        tl.store(y + (start + i) * M + head * DV + dv, rounded)
        if LEAVE:
            leave_peak(leave, rounded.to(tl.float32), dv < DV)
    if MANY:
        release_next(pdl)
        for i in range(length, places):
            tl.store(y + (start + i) * M + head * DV + dv, tl.zeros([DV], y.dtype.element_ty))


@triton.jit
def _ring(x, ring, starts, lengths, contexts, slots, x_stride, C: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
          pdl: tl.constexpr):  # fmt: skip
    """The last G inputs of a span into its slot's ring, where they lie on places that the step read."""
    row = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    length, context, slot = tl.load(lengths + row), tl.load(contexts + row), tl.load(slots + row).to(tl.int64)
    start = tl.load(starts + row).to(tl.int64)
    wait_for_inputs(pdl)
    for i in range(tl.maximum(length - G, 0), length):
        inputs = tl.load(x + (start + i) * x_stride + at, mask=at < C)
        tl.store(ring + slot * (G * C) + (context + i) % G * C + at, inputs.to(ring.dtype.element_ty), mask=at < C)
    release_next(pdl)


def delta_net(
    *,
    x_TE: torch.Tensor,
    conv_CW: torch.Tensor,
    A_log_N: torch.Tensor,
    dt_bias_N: torch.Tensor,
    norm_V: torch.Tensor,
    eps: float,
    state: torch.Tensor,
    conv: torch.Tensor,
    pending: torch.Tensor,
    spans: Spans,
    key_heads: int,
    leave: Handed | None = None,
) -> torch.Tensor:
    """Needs four taps, dk and dv powers of two, dense pools."""
    (heads, key, value), (channels, width), rows = state.shape[1:], conv_CW.shape, spans.num_short
    if width != WIDTH:
        raise ValueError(f"the kernel's convolution has {WIDTH} taps, not {width}")
    y_TM = x_TE.new_empty(len(x_TE), heads * value)
    if rows < spans.num_rows:
        from tritium.ops.kernels import gdn_chunk

        qkv_TC, z_TM, b_TN, a_TN = x_TE.split([channels, heads * value, heads, heads], dim=-1)
        gdn_chunk.run(gdn_chunk.plan(spans, rows), qkv_TC, conv_CW, conv, a_TN, b_TN, A_log_N, dt_bias_N, state,
                      key_heads, (z_TM, norm_V, eps), y_TM)  # fmt: skip
    if not rows:
        return y_TM
    tokens, ring, table = max(spans.lengths[:rows]), conv.shape[1], spans.table
    name, depth = "delta_net.step" if tokens == 1 else "delta_net.drafts", pending.shape[1]
    chosen = parameters(name, x_TE, heads=heads, rows=bucket(rows), drafts=int(depth > 0))
    aside = tokens > ring - (width - 1)
    launch(
        _step, (heads, rows), x_TE, conv_CW, A_log_N, dt_bias_N, norm_V, eps, state, conv, pending, y_TM,
        leave.bits_1 if isinstance(leave, Peak) else x_TE, table.starts_R, table.lengths_R, table.contexts_R,
        table.sources_R, table.slots_R, table.folds_R, table.drafts_R, table.snap_at_R, table.snap_slot_R,
        x_TE.stride(0),
        tokens if spans.num_tokens == spans.num_rows * tokens else 0, L2=L2_EPS, NK=key_heads, NV=heads, DK=key,
        DV=value, G=ring, D=depth, MANY=tokens > 1, RING=not aside, LEAVE=isinstance(leave, Peak) and len(x_TE) == 1,
        **chosen,
    )  # fmt: skip
    if aside:
        block = 1024
        launch(
            _ring, (cdiv(channels, block), rows), x_TE, conv, table.starts_R, table.lengths_R, table.contexts_R,
            table.slots_R, x_TE.stride(0), C=channels, G=ring, BLOCK=block, num_warps=4, num_stages=1,
            pdl=chosen["pdl"],
        )  # fmt: skip
    return y_TM
