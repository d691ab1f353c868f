"""Compiles recorded launches for chips that need not be here, and says what came out.

Triton compiles for a named chip without a driver. Each launch is specialised as its call would be (dtypes, pointers
that 16 divides, integers that are 1 or that 16 divides), so what is compiled here is what a device of that kind runs.

    registers   of a thread, of `most` (255 on NVIDIA, 256 on RDNA, 512 on CDNA)
    spills      NVIDIA: bytes a thread; AMD: registers, else bytes of scratch
    occupancy   warps resident on a multiprocessor over the most that there may be:
                blocks = min(quarters · ⌊registers / of a warp⌋ / warps,  ⌊shared / of a block⌋,  most blocks)
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from tritium.hw import Target, named
from tritium.ops.kernels.launch import Launch

SLOWEST = 60.0
"""Seconds that a kernel may take to compile on one core."""
_GIVEN_UP = 4 * SLOWEST
_RECURRENT = ("delta_net", "gdn_chunk")
"""Modules whose kernels keep a state in registers: on RDNA a pipeline deeper than 2 is more than the registers hold."""
_MATRIX_INSTRUCTION = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_wmma_\w+|v_swmmac_\w+|v_mfma_\w+)")
_NARROW_DOT = re.compile(r"tt\.dot(?:_scaled)? .*: tensor<[0-9x]+x(?:bf16|f16|f8E\w+|i8)>")
_DOT_BY_LANES = re.compile(r"tt\.dot .*parent = #blocked")


class _Core(NamedTuple):
    """What the warps of a multiprocessor share (on RDNA, of two compute units: a workgroup processor)."""

    registers: int
    """Of a lane, in each of the four quarters."""
    granule: int
    warps: int
    """Of a quarter."""
    shared: int
    overhead: int
    """Shared memory that the system takes of each block."""
    blocks: int


_CORES = {
    "sm_80": _Core(512, 8, 16, 164 << 10, 1024, 32),
    "sm_90": _Core(512, 8, 16, 228 << 10, 1024, 32),
    "sm_120": _Core(512, 8, 12, 100 << 10, 1024, 24),
    "gfx942": _Core(512, 8, 8, 64 << 10, 0, 16),
    "gfx950": _Core(512, 8, 8, 160 << 10, 0, 16),
    "gfx1100": _Core(1536, 24, 16, 128 << 10, 0, 32),
    "gfx1151": _Core(1536, 24, 16, 128 << 10, 0, 32),
    "gfx1201": _Core(1536, 24, 16, 128 << 10, 0, 32),
}
"""CUDA programming guide, technical specifications per compute capability; LLVM's AMDGPU back end (VGPRs of a SIMD and
their granule by wave size); AMD's ISA documents for LDS."""


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration for one chip."""

    arch: str
    kernel: str
    """module.function"""
    settings: str
    """Dtypes of its pointers and its constexprs."""
    num_warps: int = 0
    num_stages: int = 0
    registers: int = 0
    spills: int = 0
    shared: int = 0
    occupancy: float = 0.0
    dots: str = ""
    """Matrix instructions in the assembly."""
    seconds: float = 0.0
    violations: tuple[str, ...] = ()
    """In words; empty is what is wanted."""


@dataclass(frozen=True)
class Job:
    """A launch, specialised for a chip. `key` tells it from all others and outlives the process."""

    arch: str
    kernel: Any
    source: Any
    options: dict[str, Any]
    settings: str
    key: str

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"

    @classmethod
    def of(cls, launch: Launch, arch: str) -> Job:
        """Raises whatever Triton says of arguments and options that do not go together."""
        kernel, options = launch.kernel, dict(launch.options)
        if options.get("pdl"):
            options["launch_pdl"] = True
        backend = make_backend(_gpu_target(arch))
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialised, _ = bind(*launch.arguments, **options)
        parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialised, options)
        source = ASTSource(kernel, signature, constants, attributes)
        names = list(bound)
        told = [str(value).lstrip("*") for value in signature.values() if str(value).startswith("*")]
        shown = {names[path[0]]: value for path, value in constants.items() if len(path) == 1}
        shown.pop("pdl", None)
        settings = ",".join(dict.fromkeys(told)) + " " + " ".join(f"{k}={_short(v)}" for k, v in shown.items())
        identity = (triton.__version__, _this_file(), arch, kernel.cache_key, source.hash(), parsed.hash())
        return cls(arch, kernel, source, parsed.__dict__, settings, hashlib.sha256(repr(identity).encode()).hexdigest())


def compile_all(jobs: Iterable[Job], *, workers: int, cache: Path | None = None) -> Iterator[Compiled]:
    """Each job once, in processes of their own, `workers` at a time; results that `cache` (a directory) has are not
    computed again. A compiler that crashes or hangs is a violation like others."""
    waiting: list[Job] = []
    running: dict[Any, tuple[Job, Any, float]] = {}
    for job in {job.key: job for job in jobs}.values():
        found = cache / f"{job.key}.json" if cache else None
        if found and found.exists():
            yield _judged(job, Compiled(**json.loads(found.read_text())))
        else:
            waiting.append(job)
    waiting.reverse()
    context = multiprocessing.get_context("fork")
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop()
                mine, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(job, theirs), daemon=True)
                process.start()
                theirs.close()
                running[mine] = (job, process, time.monotonic())
            ready = set(wait(list(running), timeout=1.0))
            for pipe, (job, process, since) in list(running.items()):
                if pipe not in ready and time.monotonic() - since < _GIVEN_UP:
                    continue
                del running[pipe]
                yield _finished(job, pipe, process, time.monotonic() - since, pipe in ready, cache)
    finally:
        for _, process, _ in running.values():
            process.kill()


def _finished(job: Job, pipe: Any, process: Any, seconds: float, ready: bool, cache: Path | None) -> Compiled:
    nothing = Compiled(job.arch, job.name, job.settings, seconds=seconds)
    if not ready:
        process.kill()
        return replace(nothing, violations=(f"given up after {seconds:.0f} s",))
    try:
        outcome = pipe.recv()
    except EOFError:
        process.join()
        return replace(nothing, violations=(f"the compiler died ({process.exitcode})",))
    process.join()
    if isinstance(outcome, str):
        return replace(nothing, violations=(outcome,))
    if cache:
        cache.mkdir(parents=True, exist_ok=True)
        part = cache / f"{job.key}.part{process.pid}"
        part.write_text(json.dumps(asdict(outcome)))
        part.rename(cache / f"{job.key}.json")
    return _judged(job, outcome)


def _judged(job: Job, found: Compiled) -> Compiled:
    return replace(found, violations=(*found.violations, *violations(found, named(job.arch))))


def violations(found: Compiled, target: Target) -> list[str]:
    """What the chip or the house does not allow, of what numbers can tell."""
    out = []
    if found.spills:
        out.append(f"spills {found.spills}")
    if found.shared > target.shared_memory_per_workgroup:
        out.append(f"{found.shared} bytes of shared memory, {target.shared_memory_per_workgroup} are there")
    if found.seconds > SLOWEST:
        out.append(f"compiles for {found.seconds:.0f} s, {SLOWEST:.0f} are allowed")
    rdna = target.kind == "hip" and target.warp_size == 32
    if rdna and found.num_stages > 2 and found.kernel.partition(".")[0] in _RECURRENT:
        out.append(f"num_stages {found.num_stages} of a recurrence, 2 on RDNA at most")
    if not found.occupancy and not out:
        out.append("no block fits")
    return out


def occupancy(arch: str, *, registers: int, shared: int, num_warps: int) -> float:
    """Share of a multiprocessor's warps that are resident; 0 where not one block fits."""
    core = _CORES[arch]
    of_warp = max(core.granule, -(-registers // core.granule) * core.granule)
    warps = 4 * min(core.warps, core.registers // of_warp)
    blocks = min(warps // num_warps, core.shared // max(1, shared + core.overhead), core.blocks)
    return blocks * num_warps / (4 * core.warps)


def _work(job: Job, pipe: Connection) -> None:
    try:
        outcome: Compiled | str = _compiled(job)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # Triton wraps an error once for each call that it is in
            cause = cause.__cause__
        told = [line.strip() for line in str(cause).splitlines() if line.strip(" ^")] or [""]
        outcome = f"does not compile: {type(cause).__name__}: {told[-1][:200]}"
    pipe.send(outcome)
    pipe.close()


def _compiled(job: Job) -> Compiled:
    begin = sum(os.times()[:4])
    with tempfile.TemporaryDirectory() as scratch:
        triton.knobs.cache.dir = scratch
        kernel = triton.compile(job.source, target=_gpu_target(job.arch), options=job.options)
        asm, shared = kernel.asm, kernel.metadata.shared
        if job.arch.startswith("gfx"):
            registers, spills = _amd_resources(asm["amdgcn"])
        else:
            registers, spills = _nvidia_resources(asm, job.arch, Path(scratch))
    seconds = sum(os.times()[:4]) - begin  # of this process and its assembler, whatever else the machine does
    text = asm["amdgcn" if job.arch.startswith("gfx") else "ptx"]
    instructions = sorted(set(_MATRIX_INSTRUCTION.findall(text)))
    warps = kernel.metadata.num_warps
    return Compiled(
        arch=job.arch,
        kernel=job.name,
        settings=job.settings,
        num_warps=warps,
        num_stages=kernel.metadata.num_stages,
        registers=registers,
        spills=spills,
        shared=shared,
        occupancy=occupancy(job.arch, registers=registers, shared=shared, num_warps=warps),
        dots=" ".join(instructions),
        seconds=round(seconds, 2),
        violations=_missing(asm["ttir"], asm["ttgir"], instructions),
    )


def _missing(ttir: str, ttgir: str, instructions: Sequence[str]) -> tuple[str, ...]:
    """Products of 16-bit numbers, or narrower ones, that the matrix unit does not compute."""
    narrow = len(_NARROW_DOT.findall(ttir))
    wide = ttir.count("tt.dot ") - narrow
    if narrow and (not instructions or (not wide and _DOT_BY_LANES.search(ttgir))):
        return (f"{narrow} product(s) of narrow numbers without a matrix instruction",)
    return ()


def _amd_resources(text: str) -> tuple[int, int]:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])  # type: ignore[index]

    return field("vgpr_count"), field("vgpr_spill_count") or field("private_segment_fixed_size")


def _nvidia_resources(asm: Any, arch: str, scratch: Path) -> tuple[int, int]:
    """From the binary; a stack in it may be a spill or an array, which only the assembler can tell."""
    binary, tools = scratch / "kernel.cubin", Path(triton.backends.nvidia.compiler.__file__).parent / "bin"
    binary.write_bytes(asm["cubin"])
    usage = subprocess.run([tools / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage.stdout)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    if not stack:
        return registers, 0
    (scratch / "kernel.ptx").write_text(asm["ptx"])
    gpu = re.search(r"\.target (\S+?)[,\s]", asm["ptx"])[1]  # type: ignore[index]
    command = [get_ptxas(_gpu_target(arch).arch).path, "-v", f"--gpu-name={gpu}", scratch / "kernel.ptx", "-o", binary]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return registers, sum(map(int, re.findall(r"(\d+) bytes spill stores", told)))


@lru_cache
def _gpu_target(arch: str) -> GPUTarget:
    target = named(arch)
    return GPUTarget(target.kind, arch if target.kind == "hip" else int(arch[3:]), target.warp_size)


@lru_cache
def _this_file() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _short(value: Any) -> str:
    return getattr(value, "__name__", None) or ("" if value is None else str(value))
