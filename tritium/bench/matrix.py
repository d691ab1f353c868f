"""The compile matrix: every kernel that the family launches, in every shipped configuration, for chips not here.

A network of two GDN layers and one of attention with tensors of the meta device goes through steps of every kind; what
it would launch is recorded and compiled. So nothing is listed by hand, and nothing can be forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tritium.core import MOST_ENDS, SHORT_ROW, ConfigError
from tritium.hw import named
from tritium.hw.host import available_cores
from tritium.models.checkpoint import published_names
from tritium.models.config import FULL, LINEAR, ModelConfig, parse_config
from tritium.models.decoder import Decoder, allocate_caches
from tritium.models.families import FAMILY, family_config
from tritium.models.parameters import quantizable
from tritium.models.weights import allocate
from tritium.nn.batch import ForwardBatch
from tritium.ops.feed import HEADER, feed
from tritium.ops.quantized import SCHEMES
from tritium.ops.sampling import call_every_form
from tritium.ops.spans import Spans
from tritium.quant import select

if TYPE_CHECKING:
    from tritium.ops.kernels.launch import Launch
    from tritium.ops.kernels.matrix import Compiled

MODELS = ("qwen3.5-0.8b", "qwen3.5-27b", "qwen3.5-35b-a3b")
CACHE = Path.home() / ".cache" / "tritium" / "matrix"
_META = torch.device("meta")
_PAGES, _SLOTS, _DRAFTS, _POSITIONS = 4096, 64, 3, 4096


@dataclass(frozen=True)
class Step:
    """A kind of step: `decode` rows of 1 + `drafts` tokens, then a prompt's chunk of `prefill` tokens."""

    decode: int = 0
    drafts: int = 0
    prefill: int = 0

    def __str__(self) -> str:
        parts = [f"decode {self.decode} x {1 + self.drafts}"] if self.decode else []
        return " + ".join(parts + ([f"prefill {self.prefill}"] if self.prefill else []))

    def batch(self) -> ForwardBatch:
        rows = self.decode + bool(self.prefill)

        def each(short: Any, long: Any) -> tuple[Any, ...]:
            return (short,) * self.decode + (long,) * bool(self.prefill)

        spans = Spans(
            lengths=each(1 + self.drafts, self.prefill),
            contexts=each(1000, 1024),
            slots=tuple(range(1, rows + 1)),
            pages=(tuple(range(1, 64)),) * rows,
            device=_META,
            sources=tuple(range(2, rows + 2)),
            folds=each(self.drafts, 0),
            drafts=each(self.drafts, 0),
            snapshots=each((), ((1024 + self.prefill // 2, 60), (1023 + self.prefill, 61))),
        )
        draws = list(range(spans.num_tokens - self.prefill)) + [spans.num_tokens - 1] * bool(self.prefill)
        return ForwardBatch(spans.tensor([0] * spans.num_tokens), spans, spans.tensor(draws))


STEPS = (
    Step(decode=1), Step(decode=8), Step(decode=32), Step(decode=1, drafts=_DRAFTS), Step(decode=8, drafts=_DRAFTS),
    Step(prefill=SHORT_ROW + 1), Step(prefill=2048), Step(decode=8, prefill=504),
)  # fmt: skip
QUANTIZED_STEPS = (Step(decode=1), Step(decode=8), Step(prefill=2048))
"""Of the schemes: of their launches with the same launch parameters only the last is compiled, of the largest model."""


def launches(model: str, arch: str, steps: Sequence[Step] = STEPS, scheme: str = "") -> Iterator[tuple[str, Launch]]:
    """(step in words, launch) of everything that `model` launches on `arch`, all that may be quantized in `scheme`."""
    from tritium.ops.kernels.launch import recorded

    raw = family_config(model)
    if raw is None:
        raise ConfigError(f"{model} is not a model of the family", hint=", ".join(FAMILY))
    config = in_scheme(replace(parse_config(raw), layer_types=(LINEAR, LINEAR, FULL)), scheme)
    decoder, caches = stand_in(config, named(arch).features)
    for step in steps:
        with recorded(arch) as found:
            _run(decoder, caches, step.batch())
        yield from ((str(step), launch) for launch in found)


def in_scheme(config: ModelConfig, scheme: str) -> ModelConfig:
    """With all that fp8 takes by default, which no scheme takes more than, and the head, in a scheme; "": as it is."""
    fused = published_names(config)
    could = {name: name for name in quantizable(config) if name in fused}
    chosen = select("fp8", (), [name for name in could if name == "lm_head.weight"], could) if scheme else ()
    return replace(config, schemes=tuple((name, scheme) for name in chosen))


def stand_in(config: ModelConfig, features: frozenset[str] | None = None) -> tuple[Decoder, list[Any]]:
    """A network and its pools without memory, as they are on a target of these features."""
    parameters = allocate(config, dtype=torch.bfloat16, device=_META, features=features)
    caches = allocate_caches(config, pages=_PAGES, slots=_SLOTS, dtype=torch.bfloat16, device=_META, drafts=_DRAFTS)
    return Decoder(parameters, config, _POSITIONS), caches


def _run(decoder: Decoder, caches: list[Any], batch: ForwardBatch) -> None:
    """What the runner does in a step, with every feature of the sampler."""
    hidden_TH = decoder.forward(batch, caches)
    call_every_form(decoder.logits(hidden_TH[batch.draws_S]))
    rows = batch.spans.num_rows
    if batch.spans.num_short == rows:  # a graph's step, which may be fed with ids that the host does not know
        per_row = batch.spans.num_tokens // rows
        host_HR = torch.empty(HEADER + per_row + MOST_ENDS, rows, dtype=torch.int32, device=_META)
        drawn, next_S = (torch.empty(n, dtype=torch.int64, device=_META) for n in (512, rows * per_row))
        feed(host_HR=host_HR, drawn_D=drawn, table=batch.spans.table, ids_T=batch.ids_T, next_S=next_S)
    if decoder.mtp is not None:
        decoder.draft_hidden(hidden_TH, batch.ids_T, replace(batch.spans, drafts=(), snapshots=()), caches[-1])


_COLUMNS = "{:<8} {:<34} {:>5} {:>6} {:>5} {:>6} {:>8} {:>5} {:>6}  {}"
TITLES = _COLUMNS.format(
    "target", "kernel", "warps", "stages", "regs", "spills", "shared", "occ", "s", "matrix instructions, configuration"
)


def line(found: Compiled) -> str:
    """One row below `TITLES`."""
    cells = (found.arch, found.kernel, found.num_warps, found.num_stages, found.registers, found.spills, found.shared,
             f"{found.occupancy:.0%}", f"{found.seconds:.1f}", f"{found.dots or '-'}  {found.settings}")  # fmt: skip
    wrong = "".join(f"\n         ! {violation}" for violation in found.violations)
    return _COLUMNS.format(*cells) + wrong


def run(arches: Sequence[str], models: Sequence[str] = MODELS, *, sample: bool = False, workers: int = 0,
        cache: Path | None = CACHE) -> Iterator[tuple[int, Compiled]]:
    """(how many there are in all, one of them) as they are done. `sample`: of the launches of a form of a kernel with
    the same launch parameters only the last, of the largest model. `workers`: processes; 0: one a core."""
    from tritium.ops.kernels.matrix import Job, compile_all

    jobs: dict[object, Job] = {}
    for arch in arches:
        for model in models:
            for scheme in ("", *SCHEMES):
                for _, launch in launches(model, arch, QUANTIZED_STEPS if scheme else STEPS, scheme):
                    job = Job.of(launch, arch)
                    form = tuple(value for value in launch.options.values() if isinstance(value, (bool, str)))
                    jobs[(arch, launch.kernel, launch.entries, form) if sample or scheme else job.key] = job
    wanted = {job.key: job for job in jobs.values()}
    for found in compile_all(wanted.values(), workers=workers or available_cores(), cache=cache):
        yield len(wanted), found
