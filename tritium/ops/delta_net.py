"""The Gated DeltaNet mixer between its two projections: convolution, recurrence, gated norm.

    y = gated_rms_norm(gdn(silu(conv(qkv)), a, b), z)      with x = [q, k, v; z; b; a] from one projection

See `conv`, `gdn` and `norm` for the mathematics of the parts, and `Spans` for drafts, folds and snapshots.

Shapes: T tokens, C = 2 nk dk + nv dv convolution channels, M = nv dv, E = C + M + 2 nv; x_TE, conv_CW, A_log_N,
dt_bias_N and norm_V float32; state [slots + 1, nv, dk, dv], conv [slots + 1, G, C],
pending [slots + 1, D, nv (dk + dv + 2)]; y_TM in x's dtype.
"""

from __future__ import annotations

from typing import Any

import torch

from tritium.ops.conv import reference as conv_reference
from tritium.ops.gdn import reference as gdn_reference
from tritium.ops.handed import Handed, Peak, left
from tritium.ops.norm import gated_reference
from tritium.ops.spans import Spans
from tritium.ops.spec import Dims, Op, OpSpec, randn, wide


def _inputs(dims: Dims, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    nk, nv, dk, dv, drafts = dims["nk"], dims["nv"], dims["dk"], dims["dv"], dims.get("drafts", 0)
    channels, full = 2 * nk * dk + nv * dv, wide(dtype)
    # Short rows with drafts, folds, a checkpoint to start from and one to leave; then long ones with snapshots.
    long, more, context = dims.get("long", 0), dims.get("more", 0), dims.get("context", 64)
    lengths = (1,) if dims.get("handed") else (1 + drafts, 1) + (long,) * (long > 0) + (more,) * (more > 0)
    contexts = (70, 0, context, 2)[: len(lengths)]
    snapshots: tuple[tuple[tuple[int, int], ...], ...] = (((71, 5),) if drafts else (), (), tuple(
        (at, 5 + i) for i, at in enumerate(range(128, context + long, 128), start=1)
    ), ((64, 10), (2 + more, 11)))[: len(lengths)]
    slots = 12
    return {
        **({"leave": Peak(torch.zeros(1, dtype=torch.int32))} if dims.get("handed") else {}),
        "x_TE": randn(generator, sum(lengths), channels + nv * dv + 2 * nv, dtype=dtype),
        "conv_CW": randn(generator, channels, 4, dtype=full, scale=0.5),
        "A_log_N": randn(generator, nv, dtype=full, scale=0.5),
        "dt_bias_N": randn(generator, nv, dtype=full, scale=0.5),
        "norm_V": 1 + randn(generator, dv, dtype=full, scale=0.3),
        "eps": 1e-6,
        "state": randn(generator, slots, nv, dk, dv, dtype=full, scale=0.3),
        "conv": randn(generator, slots, 4 + 3, channels, dtype=dtype),
        "pending": randn(generator, slots, 3, nv * (dk + dv + 2), dtype=full, scale=0.3).abs_(),
        "spans": Spans(
            lengths,
            contexts,
            (1, 2, 3, 8)[: len(lengths)],
            ((1,),) * len(lengths),
            torch.get_default_device(),
            sources=(4 if drafts else 1, 2, 3, 9)[: len(lengths)],
            folds=(drafts and 2, 0, 0, 0)[: len(lengths)],
            drafts=(drafts, 0, 0, 0)[: len(lengths)],
            snapshots=snapshots,
        ),
        "key_heads": nk,
    }


SPEC = OpSpec(
    name="delta_net",
    cases=(
        {"nk": 1, "nv": 1, "dk": 16, "dv": 16},
        {"nk": 2, "nv": 4, "dk": 32, "dv": 64, "handed": 1},
        {"nk": 2, "nv": 6, "dk": 32, "dv": 16, "drafts": 3},
        {"nk": 1, "nv": 2, "dk": 64, "dv": 64, "drafts": 1, "long": 150},
        {"nk": 2, "nv": 2, "dk": 32, "dv": 32, "long": 200, "context": 100},
        {"nk": 1, "nv": 2, "dk": 32, "dv": 16, "long": 70, "context": 62, "more": 90},
    ),
    inputs=_inputs,
    results=lambda arguments, returned: {
        "y_TM": returned, **left(arguments, returned),
        **{name: arguments[name][1:] for name in ("state", "conv", "pending")},
    },
    bytes_moved=lambda d, size: (
        size * (2 + d.get("drafts", 0) + d.get("long", 0)) * (2 * d["nk"] * d["dk"] + 3 * d["nv"] * d["dv"])
        + 8 * (3 if d.get("long") else 2) * d["nv"] * d["dk"] * d["dv"]
    ),
    flops=lambda d: 7 * (2 + d.get("drafts", 0) + d.get("long", 0)) * d["nv"] * d["dk"] * d["dv"],
)


def reference(
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
    """y_TM; updates `state`, `conv` and `pending` in place. `leave`: as in `linear`."""
    heads, value = len(A_log_N), len(norm_V)
    qkv_TC, z, b_TN, a_TN = x_TE.split([len(conv_CW), heads * value, heads, heads], dim=-1)
    o_TNV = gdn_reference(
        qkv_TC=conv_reference(x_TC=qkv_TC, w_CW=conv_CW, state=conv, spans=spans),
        a_TN=a_TN,
        b_TN=b_TN,
        A_log_N=A_log_N,
        dt_bias_N=dt_bias_N,
        state=state,
        pending=pending,
        spans=spans,
        key_heads=key_heads,
    )
    y_TM = gated_reference(x_MD=o_TNV, z_MD=z.view(-1, heads, value), w_D=norm_V, eps=eps).flatten(1)
    if leave is not None:
        leave.leave(y_TM)
    return y_TM


delta_net = Op(SPEC, reference, "delta_net:delta_net")
