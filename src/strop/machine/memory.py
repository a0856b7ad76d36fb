"""Peak memory of this process or of its CUDA device, from a mark on."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class MemoryMark:
    """Resident bytes of the process when the mark was set, and the CUDA device to look at instead, if any."""

    resident_bytes: int
    device: str

    def peak_bytes(self) -> int:
        """CUDA: the allocator's peak since the mark. Else peak resident memory less what was resident at the mark."""
        if self.device.startswith("cuda"):
            import torch

            return int(torch.cuda.max_memory_allocated(self.device))
        return max(0, _peak_resident_bytes() - self.resident_bytes)


def mark(device: str) -> MemoryMark:
    """Starts counting peaks anew, where the system lets a process do so (Linux, CUDA)."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # not allowed in some sandboxes: the peak then counts from the start of the process
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    return MemoryMark(psutil.Process().memory_info().rss, device)


def _peak_resident_bytes() -> int:
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", info.rss))
