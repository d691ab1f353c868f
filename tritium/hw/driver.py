"""What Linux says of GPUs without asking torch: the driver, and on an AMD APU how it shares the machine's memory.

Files: /proc/driver/nvidia/version; /sys/module/amdgpu/version, else that of Linux; for a card in /sys/class/drm,
device/mem_info_vram_total (what the BIOS set aside) and device/mem_info_gtt_total (what may be mapped of the rest);
/sys/module/ttm/parameters/pages_limit (4 KiB pages that all cards together may map). See the kernel's gpu/amdgpu
documentation, and AMD's "Strix Halo system optimization".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tritium.hw.host import host_memory, text

_PAGE = 4096
_OF_SYSTEM = 8 << 30
"""Bytes that stay with the system when all the rest may go to the GPU."""
_SMALL = 1 << 30


def driver_version(root: Path = Path("/")) -> str:
    """In words; empty where there is no driver. `root` stands in for / in tests."""
    if told := text(root / "proc/driver/nvidia/version"):
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", told.splitlines()[0])
        return f"NVIDIA {found[0]}" if found else "NVIDIA"
    if (root / "sys/module/amdgpu").is_dir():
        version, kernel = text(root / "sys/module/amdgpu/version"), text(root / "proc/sys/kernel/osrelease")
        return f"amdgpu {version}" if version else f"amdgpu of Linux {kernel}"
    return ""


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """Bytes, on an AMD APU."""

    machine: int
    """That the system has; without what the BIOS set aside."""
    carved_out: int
    gtt: int
    limit: int
    """Of all that may be mapped; 0: not known."""

    @property
    def usable(self) -> int:
        """That the GPU may map of the machine's memory."""
        return min(self.gtt, self.limit or self.gtt)

    @property
    def advice(self) -> str:
        """What to set so that the GPU may use all but 8 GiB; empty where it may use most."""
        could = self.machine + max(0, self.carved_out - (_SMALL >> 1)) - _OF_SYSTEM
        if self.usable >= could * 9 // 10:
            return ""
        bios = "set the GPU's memory in the BIOS to the least (512 MB), then " if self.carved_out > _SMALL else ""
        pages = could // _PAGE
        return f"{bios}boot Linux with ttm.pages_limit={pages} ttm.page_pool_size={pages}"


def shared_memory(root: Path = Path("/")) -> SharedMemory | None:
    """Of the AMD card that may map the most; None where there is none."""
    cards = [
        (int(text(card / "mem_info_gtt_total")), int(text(card / "mem_info_vram_total") or 0))
        for card in (root / "sys/class/drm").glob("card*/device")
        if text(card / "mem_info_gtt_total")
    ]
    if not cards:
        return None
    gtt, vram = max(cards)
    limit = int(text(root / "sys/module/ttm/parameters/pages_limit") or 0) * _PAGE
    return SharedMemory(machine=host_memory(root)[0], carved_out=vram, gtt=gtt, limit=limit)
