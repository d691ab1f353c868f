"""`tritium doctor`: what this machine can do, which form serves each op, what a model would need, what is wrong."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Any

import click

import tritium
from tritium.cli import options
from tritium.core import ConfigError, TritiumError

if TYPE_CHECKING:
    from tritium.config import EngineConfig
    from tritium.hw import Target
    from tritium.models.checkpoint import Checkpoint


CONTEXTS = (4096, 32_768, 131_072, 262_144)


@click.command()
@click.option("--compile", "arches", metavar="ARCHES", help="Compile every kernel as the family launches it for these "
              "chips (gfx1151,sm_90,... or all), which need not be here, and report; 1 if one breaks a limit.")
@click.option("--models", metavar="NAMES", help="With --compile: members of the family, separated by commas.")
@click.option("--target", "arch", metavar="ARCH", help="Ask about a chip that is not here (gfx1151, sm_90, ...).")
@click.option("--tensors", "each", is_flag=True, help="With --quantize: every tensor, not one line for all layers.")
@options.engine_flags
def doctor(arches: str | None, models: str | None, arch: str | None, each: bool, **flags: Any) -> int:
    """Report the machine, the ops, the memory plan of a model, and problems (then the exit code is 1)."""
    if arches:
        return compile_matrix(arches.split(","), models.split(",") if models else None, progress=not flags["quiet"])
    if models:
        raise ConfigError("--models goes with --compile", hint="--model says whose memory to plan")
    config = options.engine_config(flags)

    from importlib.metadata import version

    from tritium.hw import named, probe

    torch = version("torch")
    click.echo(f"tritium {tritium.__version__}, Python {platform.python_version()}, torch {torch}")
    problems: list[TritiumError] = []
    try:
        target = named(arch) if arch else probe(config.device)
    except ConfigError as error:
        problems.append(error)
        target = probe("cpu")
    click.echo(machine(target, here=not arch))
    click.echo("ops\n" + "\n".join(f"  {name:<24}{form}" for name, form in op_forms(target.kind)))
    if target.is_gpu:
        click.echo("launch parameters\n" + parameters(target))
    try:
        click.echo(f"{config.model}\n{plan(config, target, each)}")
    except TritiumError as error:
        problems.append(error)
    problems += [] if arch else trouble(target, torch)
    click.echo("no problems found" if not problems else f"{len(problems)} problem(s) found")
    for problem in problems:
        click.echo(f"  {problem.message}\n    hint: {problem.hint}")
    return int(bool(problems))


def trouble(target: Target, torch: str) -> list[TritiumError]:
    """What on this machine keeps a GPU from being used, or from using its memory."""
    from tritium.engine.memory_plan import size
    from tritium.hw.driver import shared_memory

    found: list[TritiumError] = []
    if target.kind == "cpu" and (driver := next(filter(os.path.exists, ("/dev/nvidiactl", "/dev/kfd")), None)):
        hint = "install the build of torch for your GPU"
        found.append(ConfigError(f"there is a GPU driver ({driver}), but torch {torch} sees no GPU", hint=hint))
    memory = shared_memory() if "unified_memory" in target.features else None
    if memory and memory.advice:
        usable = f"the GPU may map {size(memory.usable)} of {size(memory.machine)}"
        found.append(ConfigError(usable, hint=memory.advice))
    return found


def compile_matrix(arches: list[str], models: list[str] | None, *, progress: bool) -> int:
    """A row for each kernel in each configuration on stdout; 1 when one violates a limit, 0 otherwise."""
    from importlib.util import find_spec

    from tqdm import tqdm

    from tritium.bench import matrix
    from tritium.hw import NAMED, named

    if find_spec("triton") is None:
        raise ConfigError("--compile needs Triton, which is not installed", hint="pip install triton")
    arches = list(NAMED) if arches == ["all"] else [named(arch).arch for arch in arches]
    click.echo(matrix.TITLES)
    done = wrong = 0
    bar = tqdm(unit="kernel", disable=not progress)
    for bar.total, found in matrix.run(arches, models or matrix.MODELS):
        done, wrong = done + 1, wrong + bool(found.violations)
        bar.clear()
        click.echo(matrix.line(found))
        bar.update()
    bar.close()
    click.echo(f"{done} kernels in their configurations, {wrong} in violation")
    return int(bool(wrong))


def machine(target: Target, *, here: bool = True) -> str:
    """The device, as aligned lines."""
    from tritium.engine.memory_plan import size
    from tritium.hw.driver import driver_version, shared_memory

    memory = f"{size(target.memory_total)}, {size(target.memory_available)} available"
    if target.bandwidth:
        memory += f", {target.bandwidth / 1e9:,.0f} GB/s as published"
    rows = {
        "device": f"{target.device}: {target.name} ({target.arch})",
        "cores": f"{target.cores}",
        "memory": memory,
        "features": ", ".join(sorted(target.features)) or "none",
    }
    if target.is_gpu:
        rows["workgroup"] = f"{size(target.shared_memory_per_workgroup)} shared, warps of {target.warp_size}"
    if target.is_gpu and here:
        rows["driver"] = driver_version() or "not found"
    if here and "unified_memory" in target.features and (shared := shared_memory()):
        limit = f", pages_limit {size(shared.limit)}" if shared.limit else ""
        rows["shared"] = f"{size(shared.carved_out)} set aside by the BIOS, GTT {size(shared.gtt)}{limit}"
    return "\n".join(f"  {name:<10}{value}" for name, value in rows.items())


def op_forms(kind: str) -> list[tuple[str, str]]:
    """Every op, and the form that serves it on a device of `kind`, with why where that is the slower one."""
    from importlib.util import find_spec

    from tritium.ops.spec import all_ops

    missing = "" if kind == "cpu" or find_spec("triton") else ": Triton is not installed"
    without = "" if kind == "cpu" else ": it has no kernel"
    return [(op.spec.name, op.form(kind) + (missing if op.launcher else without or missing)) for op in all_ops()]


def parameters(target: Target) -> str:
    """Where the launch parameters of each kernel come from: the chip's file, or the one for all."""
    from tritium.hw.tuned import table

    own, shared = table(target.arch), table("default")
    lines = []
    for name in sorted({*own, *shared}):
        sizes = own.get(name) or shared[name]
        where = f"{target.arch if name in own else 'default'}.json"
        keys = "any size" if sizes == sizes[:1] and not sizes[0]["key"] else f"{len(sizes)} sizes, the nearest serves"
        lines.append(f"  {name:<24}{where:<16}{keys}")
    return "\n".join(lines)


def plan(config: EngineConfig, target: Target, each: bool = False) -> str:
    """The memory plan of the model, which is not loaded, and what is quantized; on a GPU also what would fit, and how
    fast it may decode."""
    from tritium.engine.memory_plan import compute_dtype, fits, plan_memory
    from tritium.models.checkpoint import find_checkpoint
    from tritium.models.parameters import ITEM_BYTES

    checkpoint = find_checkpoint(config, weights=False)
    model, width = checkpoint.config, ITEM_BYTES[compute_dtype(checkpoint.config, config, target)]
    text = plan_memory(model, config, target).table()
    if model.schemes:
        text += "\n" + tensors(checkpoint, width, each)
    elif each:
        raise ConfigError("--tensors lists what is in fewer bits, and nothing is", hint="--quantize int8 --tensors")
    if not target.is_gpu:
        return text

    from tritium.bench.ceilings import step_bytes

    lines = [text, "  tokens      most requests at once" + ("  tokens/s of one, at most" if target.bandwidth else "")]
    for context in CONTEXTS:
        if context <= model.max_position:
            speed = target.bandwidth / step_bytes(model, 1, context, width)
            lines.append(f"  {context:<11,} {fits(model, config, target, context):>21,}"
                         + (f"  {speed:.1f}" if target.bandwidth else ""))
    return "\n".join(lines)


def tensors(checkpoint: Checkpoint, width: int, each: bool) -> str:
    """A line for every tensor of the checkpoint (`each`), or for all that differ in their numbers: scheme and bytes,
    `width` for an element of a matrix that is not quantized."""
    from tritium.engine.memory_plan import size
    from tritium.models.checkpoint import table
    from tritium.quant import pattern

    lines: dict[tuple[str, str], list[int]] = {}
    totals: dict[str, list[int]] = {}
    for name, scheme, count in table(checkpoint, width):
        lines.setdefault((name if each else pattern(name), scheme), []).append(count)
        totals.setdefault(scheme, []).append(count)
    rows = [(name, scheme, found) for (name, scheme), found in lines.items()]
    rows += [("all", scheme, found) for scheme, found in totals.items()]
    longest = max(len(name) for name, _, _ in rows)
    shown = (f"  {name:<{longest}}  {scheme:<10}{len(found):>6}{size(sum(found)):>11}" for name, scheme, found in rows)
    return "\n".join([f"  {'tensors':<{longest}}  {'stored':<10}{'count':>6}{'bytes':>11}", *shown])
