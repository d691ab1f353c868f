"""q / k norm, partial rotary embedding and page write in one pass. See `tritium.ops.attention_inputs`.

A program takes some heads of one token: query heads, and key heads with their values. Shapes: T tokens, N query heads,
G key / value heads, D head dim, F rotary frequencies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tritium.ops.kernels.launch import cdiv, launch, parameters, power_of_2, release_next, wait_for_inputs
from tritium.ops.spans import Spans


@triton.jit
def _attention_inputs(x, q_weight, k_weight, table, q, k_pages, v_pages, row_T, position_T, pages_RP, eps, x_stride,
                      width, N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, F: tl.constexpr, PAGE: tl.constexpr,
                      HEADS: tl.constexpr, BLOCK: tl.constexpr, pdl: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK)
    # Dims d and `other` turn together: x1 of the first F dims with x2 of the next F.
    turned = d < 2 * F
    other = tl.where(d < F, d + F, tl.where(turned, d - F, d))
    position = tl.load(position_T + token)
    there = position >= 0
    position = tl.maximum(position, 0)
    page = tl.load(pages_RP + tl.load(row_T + token) * width + position // PAGE, mask=there, other=0).to(tl.int64)
    turn = table + (position * F + d % F) * 2
    cos = tl.load(turn, mask=turned, other=1.0)
    sin = tl.load(turn + 1, mask=turned, other=0.0)
    sin = tl.where(d < F, -sin, sin)
    is_q = n < N
    is_k = (n >= N) & (n < tl.where(there, N + G, N))
    q_scale, q_other = 1.0 + tl.load(q_weight + d, mask=d < D), 1.0 + tl.load(q_weight + other, mask=d < D)
    k_scale, k_other = 1.0 + tl.load(k_weight + d, mask=d < D), 1.0 + tl.load(k_weight + other, mask=d < D)
    scale = tl.where(is_q[:, None], q_scale[None, :], k_scale[None, :])
    scale_other = tl.where(is_q[:, None], q_other[None, :], k_other[None, :])
    head = x + token * x_stride + tl.where(is_q, n * 2 * D, (n + N) * D)[:, None]
    here = (n < N + G)[:, None] & (d < D)[None, :]
    wait_for_inputs(pdl)
    value = tl.load(head + d[None, :], mask=here, other=0.0).to(tl.float32)
    value_other = tl.load(head + other[None, :], mask=here, other=0.0).to(tl.float32)
    values = tl.load(head + G * D + d[None, :], mask=here & is_k[:, None], other=0.0)
    unit = tl.rsqrt(tl.sum(value * value, axis=1) / D + eps)[:, None]
    out = value * unit * scale * cos[None, :] + value_other * unit * scale_other * sin[None, :]
    release_next(pdl)
    tl.store(q + ((token * N + n) * D)[:, None] + d[None, :], tl.where(there, out, 0.0).to(q.dtype.element_ty),
             mask=here & is_q[:, None])  # fmt: skip
    place = (((page * G + n - N) * PAGE + position % PAGE) * D)[:, None] + d[None, :]
    mask = here & is_k[:, None]
    tl.store(k_pages + place, out.to(k_pages.dtype.element_ty), mask=mask)
    tl.store(v_pages + place, values.to(v_pages.dtype.element_ty), mask=mask)


def attention_inputs(
    *,
    x_TE: torch.Tensor,
    q_norm_D: torch.Tensor,
    k_norm_D: torch.Tensor,
    eps: float,
    table_LF2: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    spans: Spans,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q_TND contiguous, gate_TND a view of x). A token of no row gets q = 0 and writes to no page."""
    tokens, (_, groups, page, dim) = x_TE.shape[0], k_pages.shape
    heads = (x_TE.shape[1] // dim - 2 * groups) // 2
    found, table = parameters("attention.inputs", x_TE, tokens=tokens, head_dim=dim), spans.table
    together = found.pop("heads")
    q_TND = torch.empty((tokens, heads, dim), dtype=x_TE.dtype, device=x_TE.device)
    launch(
        _attention_inputs, (tokens, cdiv(heads + groups, together)), x_TE, q_norm_D, k_norm_D, table_LF2, q_TND,
        k_pages, v_pages, table.row_T, table.position_T, table.pages_RP, eps, x_TE.stride(0), table.pages_RP.stride(0),
        N=heads, G=groups, D=dim, F=table_LF2.shape[1], PAGE=page, HEADS=together,
        BLOCK=power_of_2(dim), **found,
    )  # fmt: skip
    return q_TND, x_TE.as_strided((tokens, heads, dim), (x_TE.stride(0), 2 * dim, 1), x_TE.storage_offset() + dim)
