"""Routed experts beside a shared one. See `tritium.ops.moe`.

One token takes three kernels: router and shared gate_up; the experts' gate_up; down of all and the residual. Each
program of the last two chooses the experts for itself, from the logits. Several tokens are sorted: `moe_grouped`.

Shapes: E experts, K experts a token, H hidden, I expert width, S shared width; logits_TL float32 with L columns: E of
experts, then the shared expert's gate, padded so that rows are aligned.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tritium.ops.handed import Handed
from tritium.ops.kernels.launch import cdiv, launch, parameters, power_of_2, release_next, wait_for_inputs
from tritium.ops.kernels.linear import by_eights
from tritium.ops.kernels.mlp import silu
from tritium.ops.quantized import Weights, row_blocks

LOWEST = tl.constexpr(-(2**31))
"""Below the key of every expert."""


def lanes_of(experts: int) -> tuple[int, int]:
    """(lanes, parts): keys of a token lie in [lanes, parts], so that one warp holds 4 neighbouring lanes a thread and
    finds their largest without the other warps."""
    lanes = max(128, power_of_2(experts) // 4)
    return lanes, power_of_2(cdiv(experts, lanes))


def logits_stride(experts: int) -> int:
    """Columns of a row of logits; at least E + 2."""
    return cdiv(experts + 2, 16) * 16


@triton.jit
def _part(logits, expert, scale, step, E: tl.constexpr, STEPS: tl.constexpr):
    value = tl.load(logits + expert, mask=expert < E, other=0.0)
    for s in tl.static_range(1, STEPS):
        value += tl.load(logits + s * step + expert, mask=expert < E, other=0.0)
    value *= scale
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    key = tl.maximum(tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), LOWEST + 1)
    return tl.where(expert < E, key, LOWEST)


@triton.jit
def keys(logits, row, scale, step, STRIDE: tl.constexpr, E: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr,
         STEPS: tl.constexpr):  # fmt: skip
    """(key, expert) [rows, LANES, PARTS] int32 of these rows: keys sort as the float32 logits do. A logit is the sum
    over STEPS numbers, `step` apart, times `scale`."""
    at = logits + row[:, None] * STRIDE
    e = tl.arange(0, LANES)[None, :] + row[:, None] * 0
    key, expert = _part(at, e, scale, step, E, STEPS), e
    if PARTS == 2:
        key, expert = tl.join(key, _part(at, e + LANES, scale, step, E, STEPS)), tl.join(e, e + LANES)
    if PARTS == 4:
        second = _part(at, e + LANES, scale, step, E, STEPS)
        third = _part(at, e + 2 * LANES, scale, step, E, STEPS)
        fourth = _part(at, e + 3 * LANES, scale, step, E, STEPS)
        key = tl.join(tl.join(key, third), tl.join(second, fourth))
        expert = tl.join(tl.join(e, e + 2 * LANES), tl.join(e + LANES, e + 3 * LANES))
    shape: tl.constexpr = (row.shape[0], LANES, PARTS)
    return tl.reshape(key, shape), tl.reshape(expert, shape)


@triton.jit
def next_expert(key, expert):
    """Of each row the largest logit, the lowest expert that has it, and the keys without it."""
    best = tl.max(tl.max(key, axis=2), axis=1)
    same = tl.where(key == best[:, None, None], expert, 0x7FFFFFFF)
    who = tl.min(tl.min(same, axis=2), axis=1)
    bits = tl.where(best < 0, best ^ 0x7FFFFFFF, best)
    return bits.to(tl.float32, bitcast=True), who, tl.where(expert == who[:, None, None], LOWEST, key)


@triton.jit
def _tile(pointer, k, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of weights that no other program reads; columns from WIDTH on are 0."""
    if WIDTH % BLOCK == 0:
        tile = tl.load(pointer + k[None, :], eviction_policy="evict_first")
    else:
        tile = tl.load(pointer + k[None, :], mask=k[None, :] < WIDTH, other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def _vector(pointer, k, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    return tl.load(pointer + k) if WIDTH % BLOCK == 0 else tl.load(pointer + k, mask=k < WIDTH, other=0.0)


@triton.jit
def _two_rows(a, b, value, weight, a_at, b_at, x, norm, eps, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Two blocks of rows times norm(x): (a · h, b · h), each [ROWS]. `a`, `b`, `value` and `weight` are the first tiles
    of them, of x and of the norm; the next ones are on their way while these are used."""
    k = tl.arange(0, BLOCK)
    sum_a = tl.zeros((ROWS, BLOCK // 8), tl.float32)
    sum_b = tl.zeros((ROWS, BLOCK // 8), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, H, BLOCK):
        if start + BLOCK < H:
            next_a = _tile(a_at, start + BLOCK + k, H, BLOCK)
            next_b = _tile(b_at, start + BLOCK + k, H, BLOCK)
            next_value = _vector(x, start + BLOCK + k, H, BLOCK)
            next_weight = _vector(norm, start + BLOCK + k, H, BLOCK)
        squares += value * value
        value = (value * (1.0 + weight))[None, :]
        sum_a += by_eights(a.to(tl.float32) * value, ROWS, BLOCK)
        sum_b += by_eights(b.to(tl.float32) * value, ROWS, BLOCK)
        if start + BLOCK < H:
            a, b, value, weight = next_a, next_b, next_value, next_weight
    scale = tl.rsqrt(tl.sum(squares, axis=0) / H + eps)
    return tl.sum(sum_a, axis=1) * scale, tl.sum(sum_b, axis=1) * scale


@triton.jit
def _route_one(x, norm, router, shared, logits, inner, eps, H: tl.constexpr, E: tl.constexpr, S: tl.constexpr,
               ROWS: tl.constexpr, BLOCK: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """The first programs: 2 ROWS rows of the router each; the others: ROWS of gate and up of the shared expert."""
    routers: tl.constexpr = (E + 2 * ROWS) // (2 * ROWS)
    block = tl.program_id(0)
    of_router = block < routers
    r = tl.arange(0, ROWS)
    s = (block - routers) * ROWS + r
    e = block * (2 * ROWS) + r
    base = tl.where(of_router, router, shared)
    a_at = base + tl.where(of_router, tl.minimum(e, E), tl.minimum(s, S - 1))[:, None] * H
    b_at = base + tl.where(of_router, tl.minimum(e + ROWS, E), tl.minimum(s, S - 1) + S)[:, None] * H
    k = tl.arange(0, BLOCK)
    a, b, weight = _tile(a_at, k, H, BLOCK), _tile(b_at, k, H, BLOCK), _vector(norm, k, H, BLOCK)
    wait_for_inputs(pdl)
    a, b = _two_rows(a, b, _vector(x, k, H, BLOCK), weight, a_at, b_at, x, norm, eps, H, ROWS, BLOCK)
    release_next(pdl)
    end = tl.where(of_router, E + 1, 0)
    tl.store(logits + e, a, mask=e < end)
    tl.store(logits + e + ROWS, b, mask=e + ROWS < end)
    tl.store(inner + s, (silu(a) * b).to(inner.dtype.element_ty), mask=(s >= 0) & (s < S))


@triton.jit
def _up_one(x, norm, logits, gate_up, inner, eps, H: tl.constexpr, E: tl.constexpr, K: tl.constexpr, I: tl.constexpr,
            STRIDE: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr, COPIES: tl.constexpr, ROWS: tl.constexpr,
            BLOCK: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    """ROWS of gate and up of the expert of rank j, times its weight. COPIES: one for each warp. The ranks below, which
    only its weight depends on, are looked up while the first tiles are on their way."""
    blocks: tl.constexpr = (I + ROWS - 1) // ROWS
    rank = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    weight = _vector(norm, k, H, BLOCK)
    wait_for_inputs(pdl)
    x_first = _vector(x, k, H, BLOCK)
    key, expert = keys(logits, tl.arange(0, COPIES) * 0, 1.0, 0, STRIDE, E, LANES, PARTS, 1)
    largest, chosen, key = next_expert(key, expert)
    total = tl.full((COPIES,), 1.0, tl.float32)
    mine = total
    for _ in range(rank):
        value, chosen, key = next_expert(key, expert)
        mine = tl.exp(value - largest)
        total += mine
    row = tl.max(chosen, axis=0).to(tl.int64) * (2 * I) + tl.minimum(i, I - 1)
    a_at, b_at = gate_up + row[:, None] * H, gate_up + (row + I)[:, None] * H
    a, b = _tile(a_at, k, H, BLOCK), _tile(b_at, k, H, BLOCK)
    for _ in range(rank + 1, K):
        value, chosen, key = next_expert(key, expert)
        total += tl.exp(value - largest)
    a, b = _two_rows(a, b, x_first, weight, a_at, b_at, x, norm, eps, H, ROWS, BLOCK)
    release_next(pdl)
    value = silu(a) * b * tl.max(mine / total, axis=0)
    tl.store(inner + rank * I + i, value.to(inner.dtype.element_ty), mask=i < I)


@triton.jit
def _down_one(x, logits, down, shared, inner, inner_shared, y, H: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
              I: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr,
              COPIES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, EARLY: tl.constexpr,
              pdl: tl.constexpr):  # fmt: skip
    """ROWS of the result. All tiles of weights are on their way at once; EARLY: before the wait, which may be as the
    kernel before this one lets it start after a wait of its own, so the logits are there."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.minimum(row, H - 1)[:, None]
    i, s = tl.arange(0, BLOCK), tl.arange(0, BLOCK_S)
    w_shared = _tile(shared + at * S, s, S, BLOCK_S)
    if not EARLY:
        wait_for_inputs(pdl)
    key, expert = keys(logits, tl.arange(0, COPIES) * 0, 1.0, 0, STRIDE, E, LANES, PARTS, 1)
    gate = tl.load(logits + E)
    tiles = ()
    for _ in tl.static_range(K):
        value, who, key = next_expert(key, expert)
        tile = _tile(down + tl.max(who, axis=0).to(tl.int64) * (H * I) + at * I, i, I, BLOCK)
        tiles += (tile,)  # type: ignore[assignment]
    if EARLY:
        wait_for_inputs(pdl)
    values = ()
    for j in tl.static_range(K):
        values += (_vector(inner + j * I, i, I, BLOCK),)  # type: ignore[assignment]
    of_shared = _vector(inner_shared, s, S, BLOCK_S).to(tl.float32)
    residual = tl.load(x + row, mask=row < H, other=0.0)
    total = tl.zeros((ROWS, BLOCK // 8), tl.float32)
    for j in tl.static_range(K):
        value = values[j].to(tl.float32)
        total += by_eights(tiles[j].to(tl.float32) * value[None, :], ROWS, BLOCK)
    of_shared = tl.sum(by_eights(w_shared.to(tl.float32) * of_shared[None, :], ROWS, BLOCK_S), axis=1)
    release_next(pdl)
    out = tl.sum(total, axis=1) + of_shared / (1.0 + tl.exp(-gate))
    tl.store(y + row, residual + out, mask=row < H)


def moe(
    *,
    x_TH: torch.Tensor,
    norm_H: torch.Tensor,
    eps: float,
    router_FH: torch.Tensor,
    gate_up_EJH: Weights,
    down_EHI: Weights,
    shared_gate_up_SH: Weights,
    shared_down_HS: Weights,
    k: int,
    given: Handed | None = None,
    leave: Handed | None = None,
) -> torch.Tensor:
    """y_TH float32, as x_TH. All tensors contiguous. One token has a form of its own where all but the router's
    matrices are stored alike. Raises ValueError for routed experts of several row blocks."""
    stored: tuple[Any, ...] = gate_up_EJH, down_EHI, shared_gate_up_SH, shared_down_HS
    if any(len(row_blocks(w)) > 1 for w in stored[:2]):
        raise ValueError("routed experts are stored in one scheme for gate and up, and in one for down")
    weights: Any = norm_H, eps, router_FH, *stored, k
    if len(x_TH) == 1:
        from tritium.ops.kernels import moe_quantized

        if all(isinstance(w, torch.Tensor) for w in stored):
            return _one(x_TH, *weights)
        if moe_quantized.serves(stored):
            return moe_quantized.one(x_TH, given, leave, *weights)
    from tritium.ops.kernels.moe_grouped import grouped

    return grouped(x_TH, *weights)


def _one(x_TH: torch.Tensor, norm_H: torch.Tensor, eps: float, router_FH: torch.Tensor, gate_up_EJH: torch.Tensor,
         down_EHI: torch.Tensor, shared_gate_up_SH: torch.Tensor, shared_down_HS: torch.Tensor, k: int
         ) -> torch.Tensor:  # fmt: skip
    (E, H, I), S = down_EHI.shape, shared_down_HS.shape[1]
    lanes, parts = lanes_of(E)
    logits = x_TH.new_empty(logits_stride(E))
    inner, inner_shared = down_EHI.new_empty(k, I), down_EHI.new_empty(S)
    y_TH = torch.empty_like(x_TH)

    route = parameters("moe.route1", x_TH, H=H)
    route["BLOCK"] = min(route["BLOCK"], power_of_2(H))
    programs = cdiv(E + 1, 2 * route["ROWS"]) + cdiv(S, route["ROWS"])
    launch(_route_one, (programs,), x_TH, norm_H, router_FH, shared_gate_up_SH, logits, inner_shared, eps,
           H=H, E=E, S=S, **route)  # fmt: skip

    choice = {"E": E, "K": k, "I": I, "H": H, "STRIDE": len(logits), "LANES": lanes, "PARTS": parts}
    up = parameters("moe.up1", x_TH, H=H, I=I)
    up["BLOCK"] = min(up["BLOCK"], power_of_2(H))
    launch(_up_one, (k * cdiv(I, up["ROWS"]),), x_TH, norm_H, logits, gate_up_EJH, inner, eps,
           COPIES=up["num_warps"], **choice, **up)  # fmt: skip

    down = parameters("moe.down1", x_TH, H=H, I=I)
    down["ROWS"] = max(1, down["ROWS"] * 2 // down_EHI.element_size())
    launch(_down_one, (cdiv(H, down["ROWS"]),), x_TH, logits, down_EHI, shared_down_HS, inner, inner_shared,
           y_TH, S=S, BLOCK=max(8, power_of_2(I)), BLOCK_S=max(8, power_of_2(S)),
           COPIES=down["num_warps"], EARLY=up["pdl"] == 1 and down["pdl"] > 0, **choice, **down)  # fmt: skip
    return y_TH
