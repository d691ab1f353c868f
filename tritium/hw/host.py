"""Memory and cores that this process may use: the machine's, or less where a control group says so.

Linux reports both in files: /proc/meminfo, and under /sys/fs/cgroup in the form of version 2 (one tree) or
version 1 (one tree a controller); see the kernel's admin-guide/cgroup-v2 and cgroup-v1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 1 << 60
"""Version 1 writes "no limit" as a number near 2^63."""


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of memory (total, available) that this process may use. `root` stands in for / in tests."""
    total, available = _machine_memory(root)
    for group in _groups(root, "memory"):
        limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        if limit is None or limit >= _UNLIMITED:
            continue
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
        stat = dict(line.split() for line in text(group / "memory.stat").splitlines())
        total = min(total, limit)
        available = min(available, max(0, limit - used + int(stat.get("inactive_file", 0))))
    return total, available


def available_cores(root: Path = Path("/")) -> int:
    """Threads that this process may run at once: its affinity, or less by a quota, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    for group in _groups(root, "cpu"):
        # CPU time and the period it is for, in microseconds; no number where there is no quota.
        told = text(group / "cpu.max").split() or [text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        quota, period = (int(number) if number.isdecimal() else 0 for number in told)
        if quota and period:
            cores = min(cores, quota // period)
    return max(1, cores)


def _machine_memory(root: Path) -> tuple[int, int]:
    lines = text(root / "proc/meminfo").splitlines()
    if not lines:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total // 2  # what is free cannot be asked portably
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    kib = {key: int(value.split()[0]) for key, value in fields.items() if value.strip()}
    return kib["MemTotal"] * 1024, kib.get("MemAvailable", kib["MemFree"]) * 1024


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The control groups above this process, innermost first, then the root of the tree."""
    for line in text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        group = base / path.lstrip("/")
        yield from (parent for parent in (group, *group.parents) if parent.is_relative_to(base))


def _number(path: Path) -> int | None:
    """None where the file is absent, or says "max"."""
    return int(found) if (found := text(path)).isdecimal() else None


def text(path: Path) -> str:
    """What a small file says; empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
