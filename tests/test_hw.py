"""What a process may use: the machine's memory and cores, or less where a control group says so."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tritium.core import ConfigError
from tritium.hw import probe
from tritium.hw.driver import SharedMemory, driver_version, shared_memory
from tritium.hw.host import available_cores, host_memory

GIB = 1 << 30


def machine(root: Path, files: dict[str, object]) -> Path:
    meminfo = f"MemTotal: {16 * GIB // 1024} kB\nMemFree: {GIB // 1024} kB\nMemAvailable: {12 * GIB // 1024} kB\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    return root


def test_without_a_control_group_it_is_the_machines(tmp_path: Path) -> None:
    assert host_memory(machine(tmp_path, {})) == (16 * GIB, 12 * GIB)


def test_version_2_the_tightest_group_above_the_process_counts(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/user"
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user/app\n",
            f"{group}/app/memory.max": "max",
            f"{group}/memory.max": 4 * GIB,
            f"{group}/memory.current": 3 * GIB,
            f"{group}/memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}\n",
            f"{group}/app/cpu.max": "100000 100000",
        },
    )
    assert host_memory(root) == (4 * GIB, 3 * GIB)
    assert available_cores(root) == 1


def test_version_1_with_the_group_mounted_as_the_root_of_a_container(tmp_path: Path) -> None:
    memory = "sys/fs/cgroup/memory"
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/container/x\n2:cpu,cpuacct:/container/x\n",
            f"{memory}/memory.limit_in_bytes": 2 * GIB,
            f"{memory}/memory.usage_in_bytes": 3 * GIB,
        },
    )
    assert host_memory(root) == (2 * GIB, 0)


@pytest.mark.parametrize("told", ["max 100000", "0 100000", "100000 0"])
def test_a_quota_that_says_nothing_takes_no_core_away(told: str, tmp_path: Path) -> None:
    every = available_cores(machine(tmp_path / "free", {}))
    files = {"proc/self/cgroup": "0::/app\n", "sys/fs/cgroup/app/cpu.max": told}
    assert available_cores(machine(tmp_path / "told", files)) == every


def test_version_1_without_a_limit(tmp_path: Path) -> None:
    limit = {"sys/fs/cgroup/memory/memory.limit_in_bytes": (1 << 63) - 4096}
    root = machine(tmp_path, {"proc/self/cgroup": "4:memory:/\n", **limit})
    assert host_memory(root) == (16 * GIB, 12 * GIB)


def test_a_cpu_is_always_there() -> None:
    target = probe("cpu")
    assert (target.kind, target.device) == ("cpu", "cpu")
    assert target.cores >= 1
    assert 0 < target.memory_available <= target.memory_total


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:1", "", "cuda:"])
def test_a_device_that_does_not_exist_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="not supported"):
        probe(device)


def test_a_gpu_that_is_not_here_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert probe("auto").kind == "cpu"
    with pytest.raises(ConfigError, match="sees no GPU") as caught:
        probe("cuda")
    assert "--device cpu" in (caught.value.hint or "")


@pytest.mark.gpu
def test_a_gpu_is_described_by_what_it_can_do() -> None:
    import torch

    target = probe()
    assert target.kind in ("cuda", "hip")
    again = probe("cuda:0")  # what is free changes with whoever else is there
    free = {"memory_available": target.memory_available, "host_memory": target.host_memory}
    assert dataclasses.replace(again, **free) == target
    assert target.memory_available <= target.memory_total
    assert target.warp_size in (32, 64)
    assert target.shared_memory_per_workgroup >= 32 << 10
    assert target.cores == torch.cuda.get_device_properties(0).multi_processor_count
    with pytest.raises(ConfigError, match="numbered from 0"):
        probe(f"cuda:{torch.cuda.device_count()}")


def apu(root: Path, gtt: int, vram: int, pages: int) -> Path:
    card = "sys/class/drm/card1/device"
    files = {f"{card}/mem_info_gtt_total": gtt, f"{card}/mem_info_vram_total": vram}
    return machine(root, {**files, "sys/module/ttm/parameters/pages_limit": pages})


def test_an_apu_that_may_map_little_of_the_memory_is_told_what_to_set(tmp_path: Path) -> None:
    found = shared_memory(apu(tmp_path, gtt=4 * GIB, vram=512 << 20, pages=GIB // 4096))
    assert found == SharedMemory(machine=16 * GIB, carved_out=512 << 20, gtt=4 * GIB, limit=GIB)
    assert found.usable == GIB
    pages = 8 * GIB // 4096
    assert found.advice == f"boot Linux with ttm.pages_limit={pages} ttm.page_pool_size={pages}"


def test_an_apu_whose_memory_the_bios_keeps_is_told_so(tmp_path: Path) -> None:
    found = shared_memory(apu(tmp_path, gtt=8 * GIB, vram=16 * GIB, pages=2**40))
    assert found is not None
    assert "BIOS" in found.advice
    assert f"ttm.pages_limit={(16 + 16 - 8) * GIB // 4096 - GIB // 2 // 4096}" in found.advice


def test_an_apu_that_may_map_most_needs_nothing(tmp_path: Path) -> None:
    found = shared_memory(apu(tmp_path, gtt=15 * GIB, vram=512 << 20, pages=0))
    assert found is not None
    assert found.advice == ""
    assert shared_memory(machine(tmp_path / "none", {})) is None


def test_the_driver_as_linux_tells_it(tmp_path: Path) -> None:
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Release Build"
    assert driver_version(machine(tmp_path / "a", {"proc/driver/nvidia/version": line})) == "NVIDIA 580.159.04"
    assert driver_version(machine(tmp_path / "b", {"sys/module/amdgpu/version": "6.16.6\n"})) == "amdgpu 6.16.6"
    files = {"sys/module/amdgpu/refcnt": 1, "proc/sys/kernel/osrelease": "6.18.1"}
    assert driver_version(machine(tmp_path / "c", files)) == "amdgpu of Linux 6.18.1"
    assert driver_version(machine(tmp_path / "d", {})) == ""
