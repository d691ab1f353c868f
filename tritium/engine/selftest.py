"""The self-test at the start: every op in use against its reference, on this very device and at the model's own sizes.

A decode row, one with drafts and a prompt go through the first layer of each kind, with caches of their own; each op
that a kernel serves is computed by both, from the same inputs. `Runner.compile` is told of these steps, so that
nothing is compiled here.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import torch

from tritium.core import TritiumError
from tritium.models.decoder import Decoder, allocate_caches
from tritium.nn.batch import ForwardBatch
from tritium.ops.handed import Peak, Scaled
from tritium.ops.sampling import sample
from tritium.ops.spans import Spans
from tritium.ops.spec import Op, witnessed

log = logging.getLogger(__name__)

_LARGE = 64 << 20
"""Bytes above which a tensor is a weight, which nobody writes, and is not copied."""


def steps(drafts: int) -> list[tuple[int, ...]]:
    """Lengths of the rows of each."""
    return [(1,), (1, 33), *([(1 + drafts,)] if drafts else [])]


def attest(model: Decoder, drafts: int) -> dict[str, float]:
    """Relative difference of each op from its reference, the largest of its calls. Raises `TritiumError` for an op
    that differs by more than its spec grants."""
    begin, found = time.perf_counter(), dict[str, float]()

    def compared(op: Op, arguments: dict[str, Any]) -> Any:
        hands = {name: x.aside() for name, x in arguments.items() if isinstance(x, (Peak, Scaled))}
        mine, other = _copied(arguments), _copied(arguments) | hands
        returned = op.kernel(**mine)
        want = op.spec.results(other, op.reference(**other))
        for name, value in op.spec.results(mine, returned).items():
            difference = _difference(value, want[name])
            found[op.spec.name] = max(found.get(op.spec.name, 0.0), difference)
            if not difference <= op.spec.attest:
                raise TritiumError(
                    f"self-test: {op.spec.name} differs from its reference by {difference:.3g} in {name} on "
                    f"{model.device}",
                    hint="--device cpu serves by references; please report this with `tritium doctor`",
                )
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor) and mine[name] is not value:
                value.copy_(mine[name])
        return returned

    _run(model, drafts, compared)
    worst = max(found.values(), default=0.0)
    log.info("self-test: %d ops agree with their references within %.2g (%.2f s)", len(found), worst,
             time.perf_counter() - begin)
    return found


@torch.inference_mode()
def _run(model: Decoder, drafts: int, compared: Any) -> None:
    config = model.config
    kinds = config.first_of_each_kind
    small = replace(config, layer_types=tuple(config.layer_types[i] for i in kinds), mtp_layers=0)
    caches = allocate_caches(small, pages=8, slots=4, dtype=model.dtype, device=model.device, drafts=drafts)
    generator = torch.Generator(device=model.device).manual_seed(0)
    for cache in caches:
        for pool in cache:
            pool.copy_(0.1 * torch.randn(pool.shape, generator=generator, device=model.device))
            if pool.shape[1:2] == (drafts,):  # decays and write strengths of drafts lie between 0 and 1
                pool.abs_()
    for lengths in steps(drafts):
        rows, drafted = len(lengths), lengths[0] - 1
        spans = Spans(lengths, (70, 0)[:rows], (1, 2)[:rows], ((1, 2), (3, 4))[:rows], model.device,
                      folds=(min(drafted, 1), 0)[:rows], drafts=(drafted, 0)[:rows])  # fmt: skip
        tokens = spans.num_tokens
        ids_T = torch.randint(config.vocab_size, (tokens,), generator=generator, device=model.device)
        with witnessed(compared):
            hidden_TH = model.forward(ForwardBatch(ids_T, spans, ids_T), caches, layers=kinds)
            logits_SV = model.logits(hidden_TH[:1])
            drawn = torch.ones(1, dtype=torch.int64, device=model.device)
            sample(
                logits_SV=logits_SV, temperature_S=drawn.double(), top_k_S=drawn * 20,
                top_p_S=0.95 * drawn.double(), min_p_S=0.0 * drawn.double(), seed_S=drawn, position_S=drawn,
            )  # fmt: skip


def _copied(arguments: dict[str, Any]) -> dict[str, Any]:
    small = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.nbytes < _LARGE}
    return arguments | {name: x.clone() for name, x in small.items()}


def _difference(value: torch.Tensor, want: torch.Tensor) -> float:
    if not value.is_floating_point():
        return float((value != want).float().mean())
    value, want = value.double(), want.double()
    if not torch.isfinite(value).all():
        return float("inf")
    return float((value - want).norm() / want.norm().clamp_min(1e-30))
