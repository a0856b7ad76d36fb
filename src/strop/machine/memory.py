"""Memory of this process or of its CUDA device: its peak, a limit on it, and what it was too small for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from pydantic import ByteSize, TypeAdapter, ValidationError

from strop.errors import RecipeError
from strop.runs.folder import cache_folder, write_json

# What torch, oneDNN, numpy and the C++ library say when an allocation fails.
_NO_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "unable to allocate", "could not create a memory")


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


def parse_bytes(text: str) -> int:
    """8GB, 512MiB, or plain bytes. Raises RecipeError."""
    try:
        found = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        found = 0
    if found <= 0:
        raise RecipeError(f"--memory {text}: not a size", fix="write it as 8GB or 512MiB")
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or in RAM; torch has a class of its own for the first only."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(phrase in said for phrase in _NO_MEMORY)


@contextmanager
def memory_limit(device: str, limit_bytes: int, free_bytes: int) -> Iterator[None]:
    """Inside this block an allocation fails with an error before the system would kill the process.

    limit_bytes: resident memory that the process may have. free_bytes: what the machine has left; the smaller counts.
    Linux and CPU only (RLIMIT_DATA bounds private memory, and nothing does so elsewhere): CUDA reports for itself.
    """
    if sys.platform != "linux" or not device.startswith("cpu"):
        yield
        return
    import resource

    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    room = min(limit_bytes - psutil.Process().memory_info().rss, free_bytes)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = int(fields["VmData"].split()[0]) * 1024 + max(room, 0)
    resource.setrlimit(resource.RLIMIT_DATA, (min(wanted, hard) if hard != resource.RLIM_INFINITY else wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def remember(key: str, value: dict[str, Any]) -> None:
    """Keeps what a shape of run needed on this machine, for the next run of that shape."""
    file = cache_folder() / "memory" / f"{key}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, value)


def recall(key: str) -> dict[str, Any]:
    file = cache_folder() / "memory" / f"{key}.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
