"""`tritium doctor`: what this machine can do, which form serves each op, what a model would need, what is wrong."""

from __future__ import annotations

import importlib
import os
import pkgutil
import platform
from typing import TYPE_CHECKING, Any

import click

import tritium
from tritium.cli import options
from tritium.core import ConfigError, TritiumError

if TYPE_CHECKING:
    from tritium.config import EngineConfig
    from tritium.hw import Target


@click.command()
@click.option("--compile", "arches", metavar="ARCHES", help="Compile every kernel as the family launches it for these "
              "chips (gfx1151,sm_90,... or all), which need not be here, and report; 1 if one breaks a limit.")
@click.option("--models", metavar="NAMES", help="With --compile: members of the family, separated by commas.")
@options.engine_flags
def doctor(arches: str | None, models: str | None, **flags: Any) -> int:
    """Report the machine, the ops, the memory plan of a model, and problems (then the exit code is 1)."""
    if arches:
        return compile_matrix(arches.split(","), models.split(",") if models else None, progress=not flags["quiet"])
    config = options.engine_config(flags)

    from importlib.metadata import version

    from tritium.hw import probe

    torch = version("torch")
    click.echo(f"tritium {tritium.__version__}, Python {platform.python_version()}, torch {torch}")
    problems: list[TritiumError] = []
    try:
        target = probe(config.device)
    except ConfigError as error:
        problems.append(error)
        target = probe("cpu")
    click.echo(machine(target))
    click.echo("ops\n" + "\n".join(f"  {name:<24}{form}" for name, form in op_forms(target.kind)))
    try:
        click.echo(f"{config.model}\n{plan(config, target)}")
    except TritiumError as error:
        problems.append(error)
    if target.kind == "cpu" and (driver := next(filter(os.path.exists, ("/dev/nvidiactl", "/dev/kfd")), None)):
        hint = "install the build of torch for your GPU"
        problems.append(ConfigError(f"there is a GPU driver ({driver}), but torch {torch} sees no GPU", hint=hint))
    click.echo("no problems found" if not problems else f"{len(problems)} problem(s) found")
    for problem in problems:
        click.echo(f"  {problem.message}\n    hint: {problem.hint}")
    return int(bool(problems))


def compile_matrix(arches: list[str], models: list[str] | None, *, progress: bool) -> int:
    """A row for each kernel in each configuration on stdout; 1 when one violates a limit, 0 otherwise."""
    from importlib.util import find_spec

    from tqdm import tqdm

    from tritium.bench import matrix
    from tritium.hw import NAMED, named

    if find_spec("triton") is None:
        raise ConfigError("--compile needs Triton, which is not installed", hint="pip install triton")
    arches = list(NAMED) if arches == ["all"] else [named(arch).arch for arch in arches]
    click.echo(matrix.HEADER)
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


def machine(target: Target) -> str:
    """The device, as aligned lines."""
    from tritium.engine.memory_plan import size

    memory = f"{size(target.memory_total)}, {size(target.memory_available)} available"
    rows = {
        "device": f"{target.device}: {target.name} ({target.arch})",
        "cores": f"{target.cores}",
        "memory": memory,
        "features": ", ".join(sorted(target.features)) or "none",
    }
    if target.is_gpu:
        rows["workgroup"] = f"{size(target.shared_memory_per_workgroup)} shared, warps of {target.warp_size}"
    return "\n".join(f"  {name:<10}{value}" for name, value in rows.items())


def op_forms(kind: str) -> list[tuple[str, str]]:
    """Every op and the form that serves it on a device of `kind`."""
    from tritium import ops
    from tritium.ops.spec import Op

    found: dict[str, str] = {}
    for module in pkgutil.iter_modules(ops.__path__):
        members = vars(importlib.import_module(f"{ops.__name__}.{module.name}")).values()
        found |= {op.spec.name: op.form(kind) for op in members if isinstance(op, Op)}
    return sorted(found.items())


def plan(config: EngineConfig, target: Target) -> str:
    """The memory plan of the model, which is not loaded."""
    from tritium.engine.memory_plan import plan_memory
    from tritium.models.checkpoint import find_checkpoint

    return plan_memory(find_checkpoint(config, weights=False).config, config, target).table()
