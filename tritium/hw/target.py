"""The device that the engine runs on, described by what it can do.

Importing this module touches no device; `probe` imports torch and asks.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritium.core import ConfigError
from tritium.hw.host import available_cores, host_memory, text

_CPU_FEATURES = {
    "dot_bf16": {"avx512_bf16", "amx_bf16", "bf16"},
    "dot_int8": {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"},
}
"""Feature: the flags in /proc/cpuinfo of which one suffices (x86 and Arm)."""

_CUDA_FEATURES = {
    "dot_fp16": (7, 0),
    "dot_int8": (7, 5),
    "dot_bf16": (8, 0),
    "dot_fp8": (8, 9),
    "dependent_launch": (9, 0),
}
"""Feature: the first compute capability that has it."""

_HIP_FEATURES = {
    "gfx90a": {"dot_fp16", "dot_bf16", "dot_int8"},
    "gfx94": {"dot_fp16", "dot_bf16", "dot_int8", "dot_fp8"},
    "gfx95": {"dot_fp16", "dot_bf16", "dot_int8", "dot_fp8"},
    "gfx11": {"dot_fp16", "dot_bf16", "dot_int8"},
    "gfx12": {"dot_fp16", "dot_bf16", "dot_int8", "dot_fp8"},
}
"""Prefix of the architecture: the matrix instructions it has."""


@dataclass(frozen=True, slots=True)
class Target:
    """One device. Memory in bytes; `cores` are threads on a CPU and multiprocessors on a GPU."""

    kind: str
    """cpu, cuda or hip."""
    device: str
    """What torch calls it: cpu, cuda:0 (also for hip)."""
    name: str
    arch: str
    """sm_90, gfx1151, avx512, ..."""
    cores: int
    memory_total: int
    memory_available: int
    features: frozenset[str] = frozenset()
    """dot_fp16, dot_bf16, dot_int8, dot_fp8 (matrix products of the type), unified_memory, dependent_launch."""
    host_memory: int = 0
    """Bytes available beside a GPU; 0 where it has no memory of its own."""
    warp_size: int = 0
    shared_memory_per_workgroup: int = 0
    bandwidth: int = 0
    """Bytes a second of its memory as published; 0 where nobody says."""

    @property
    def is_gpu(self) -> bool:
        return self.kind != "cpu"


_CHIPS = {
    "sm_80": ("NVIDIA A100", 108, 166_912, 32, 80, 2039),
    "sm_90": ("NVIDIA H100 / H200", 132, 232_448, 32, 141, 4800),
    "sm_120": ("NVIDIA RTX 5090", 170, 101_376, 32, 32, 1792),
    "gfx942": ("AMD Instinct MI300X", 304, 65_536, 64, 192, 5300),
    "gfx950": ("AMD Instinct MI355X", 256, 163_840, 64, 288, 8000),
    "gfx1100": ("AMD Radeon RX 7900 XTX", 48, 65_536, 32, 24, 960),
    "gfx1151": ("AMD Radeon 8060S (Strix Halo)", 20, 65_536, 32, 128, 256),
    "gfx1201": ("AMD Radeon RX 9070 XT", 32, 65_536, 32, 16, 640),
}
"""Architecture: a chip that has it (sm_90: the H200), its multiprocessors, shared memory of a workgroup in bytes, warp
size, GiB of memory (Strix Halo: of the whole machine, at most) and GB/s, as the vendors publish them (CUDA programming
guide, table of compute capabilities; AMD's GPU hardware specifications; data sheets). On RDNA a multiprocessor is a
workgroup processor, two compute units, which is what HIP counts (github.com/ROCm/hip/issues/3767)."""

NAMED = tuple(_CHIPS)
"""Architectures that ship with launch parameters and are compiled for where there is no GPU."""


def named(arch: str) -> Target:
    """A GPU that need not be here, all of its memory free. Raises `ConfigError` for one that is not in `NAMED`."""
    if arch not in _CHIPS:
        raise ConfigError(f"{arch} is not a target that Tritium knows", hint=", ".join(NAMED))
    name, cores, shared, warp, memory, speed = _CHIPS[arch]
    return Target(
        kind="hip" if arch.startswith("gfx") else "cuda",
        device="meta",
        name=name,
        arch=arch,
        cores=cores,
        memory_total=memory << 30,
        memory_available=memory << 30,
        features=_features(arch, unified=arch == "gfx1151"),
        warp_size=warp,
        shared_memory_per_workgroup=shared,
        bandwidth=speed * 10**9,
    )


def _features(arch: str, *, unified: bool) -> frozenset[str]:
    """Of a GPU, which shares the machine's memory if `unified`."""
    if arch.startswith("gfx"):
        found = {feature for prefix, has in _HIP_FEATURES.items() if arch.startswith(prefix) for feature in has}
    else:
        capability = int(arch[3:-1]), int(arch[-1])
        found = {feature for feature, since in _CUDA_FEATURES.items() if capability >= since}
    return frozenset(found | {"unified_memory"} if unified else found)


def probe(device: str = "auto") -> Target:
    """Describes `device`: auto (a GPU if torch sees one), cpu, cuda or cuda:N (AMD GPUs included).

    Raises `ConfigError` for a device that is not here, saying why when it can be known.
    """
    kind, _, index = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise ConfigError(f"--device {device} is not supported", hint="auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return _probe_cpu()
    import torch

    if not torch.cuda.is_available():
        if kind == "auto":
            return _probe_cpu()
        built = torch.version.cuda or torch.version.hip
        raise ConfigError(
            f"--device {device}: torch sees no GPU on this machine",
            hint="check the driver (nvidia-smi, rocminfo), or use --device cpu"
            if built
            else f"torch {torch.__version__} is a CPU build: install one for your GPU, or use --device cpu",
        )
    number = int(index or 0)
    if number >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {device}: this machine has {torch.cuda.device_count()} GPU(s), numbered from 0",
            hint="choose another number, or --device auto",
        )
    return _probe_gpu(number)


def _probe_cpu() -> Target:
    import torch

    total, available = host_memory()
    name, flags = _cpu_identity()
    return Target(
        kind="cpu",
        device="cpu",
        name=name,
        arch=torch.backends.cpu.get_cpu_capability().lower(),
        cores=available_cores(),
        memory_total=total,
        memory_available=available,
        features=frozenset(feature for feature, any_of in _CPU_FEATURES.items() if any_of & flags),
    )


def _cpu_identity() -> tuple[str, set[str]]:
    """Name of the CPU and the instruction flags that Linux reports (none elsewhere)."""
    first = text(Path("/proc/cpuinfo")).split("\n\n")[0]
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = told.get("model name") or platform.processor() or platform.machine()
    return name, set((told.get("flags") or told.get("Features", "")).split())


def _probe_gpu(index: int) -> Target:
    import torch

    properties: Any = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    hip = bool(torch.version.hip)
    arch = str(properties.gcnArchName).split(":")[0] if hip else f"sm_{properties.major}{properties.minor}"
    return Target(
        kind="hip" if hip else "cuda",
        device=f"cuda:{index}",
        name=properties.name,
        arch=arch,
        cores=properties.multi_processor_count,
        memory_total=total,
        memory_available=free,
        features=_features(arch, unified=bool(properties.is_integrated)),
        host_memory=0 if properties.is_integrated else host_memory()[1],
        warp_size=properties.warp_size,
        shared_memory_per_workgroup=getattr(
            properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
        ),
    )
