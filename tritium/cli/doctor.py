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
@options.engine_flags
def doctor(**flags: Any) -> int:
    """Report the machine, the ops, the memory plan of a model, and problems (then the exit code is 1)."""
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
