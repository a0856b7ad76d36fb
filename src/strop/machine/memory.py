"""Memory of this process or of its CUDA device: its peak, a limit on it, and what it was too small for."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from pydantic import ByteSize, TypeAdapter, ValidationError

from strop.errors import RecipeError
from strop.machine.memory import trim_heap
from strop.runs.folder import cache_folder, read_json, write_json

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
USABLE = 0.9  # of a memory limit: a layer's own workspace and the head come on top of what is seen between layers
# What torch, oneDNN, numpy and the C++ library say when an allocation fails, and CUDA's libraries when they find no
# room for their workspace (cuBLAS, where not even its handle has any, that it is not initialized).
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "bad_alloc",
    "unable to allocate",
    "could not create a memory",
    "could not create a primitive",
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",
    "cusolver_status_alloc_failed",
    "cusparse_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cudnn_status_internal_error_host_allocation_failed",
    "cudnn_status_internal_error_device_allocation_failed",
    "nvml_success ==",  # what PyTorch says where it cannot ask the driver how full the card is (pytorch#112377)
)


@dataclass(frozen=True)
class PeakTracker:
    """Resident bytes of the process when the mark was set, and the CUDA device to look at instead, if any."""

    resident_bytes: int
    device: str

    def peak_bytes(self) -> int:
        """CUDA: the allocator's peak since the mark. Else peak resident memory less what was resident at the mark."""
        if self.device.startswith("cuda"):
            import torch

            return int(torch.cuda.max_memory_allocated(self.device))
        return max(0, _peak_resident_bytes() - self.resident_bytes)


def start_peak(device: str) -> PeakTracker:
    """Starts counting peaks anew, where the system lets a process do so (Linux, CUDA)."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # not allowed in some sandboxes: the peak then counts from the start of the process
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    return PeakTracker(psutil.Process().memory_info().rss, device)


def _peak_resident_bytes() -> int:
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", info.rss))


def parse_bytes(text: str | int) -> int:
    """8GB, 512MiB, or plain bytes. Raises RecipeError."""
    try:
        found = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        found = 0
    if found <= 0:
        raise RecipeError(f"--memory {text}: not a size", fix="write it as 8GB or 512MiB")
    return found


def limit_bytes(memory: str | int | None) -> int | None:
    """What a limit was given as, in bytes; None where there is none. Raises RecipeError."""
    return None if memory is None else parse_bytes(memory)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or in RAM; torch has a class of its own for the first only."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(phrase in said for phrase in _NO_MEMORY)


class MemoryWatch:
    """Raises MemoryError before this process holds more than it may; on a CPU the system would kill it without a word.

    Looked at between layers, where memory grows: `begin` a micro-batch, then call before each layer. Resident memory
    is what counts. (RLIMIT_DATA was tried in its place: small allocations then fail too, in the middle of oneDNN.)
    """

    def __init__(self, limit_bytes: int, free_bytes: int) -> None:
        """limit_bytes: what the process may hold. free_bytes: what the machine has left now; the smaller counts."""
        self.limit_bytes = min(limit_bytes, _resident_bytes() + free_bytes)
        self._before = self._growth = 0

    def begin(self) -> None:
        self._growth, self._before = 0, _resident_bytes()
        if self._before > 0.8 * USABLE * self.limit_bytes:
            trim_heap()
            self._before = _resident_bytes()

    def __call__(self) -> None:
        now = _resident_bytes()
        self._growth = max(self._growth, now - self._before)  # of one layer; the next will need as much
        self._before = now
        if now + self._growth > USABLE * self.limit_bytes:
            have, may = now / 2**20, self.limit_bytes / 2**20
            raise MemoryError(f"out of memory: {have:,.0f} MiB in use, {may:,.0f} MiB allowed, and a layer to come")


def _resident_bytes() -> int:
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE_BYTES
    return int(psutil.Process().memory_info().rss)


def save_measured(key: str, value: dict[str, Any]) -> None:
    """Keeps what a shape of run needed on this machine, for the next run of that shape."""
    file = cache_folder() / "memory" / f"{key}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, value)


def load_measured(key: str) -> dict[str, Any]:
    file = cache_folder() / "memory" / f"{key}.json"
    return read_json(file)


# ---- from strop.machine.malloc ----
"""What the C library keeps of memory that was freed, and memory that it does not manage."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from contextlib import suppress
from typing import Any

HEAP_BLOCK_BYTES, KEPT = 32 << 20, 64 << 20  # bytes: of a block, and at the heap's end
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_heap_pages() -> None:
    """From now on a block below 32 MiB comes from the heap, whose pages stay when it is freed: what a step needs for a
    moment, layer after layer, finds pages that are there. glibc gets there too, but only as such blocks are freed; with
    pages of its own for each block, getting and clearing them took a quarter of a step (docs/log)."""
    if sys.platform == "linux" and not any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        with suppress(AttributeError):
            library = ctypes.CDLL(None)
            library.mallopt(_M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES)
            library.mallopt(_M_TRIM_THRESHOLD, KEPT)


def trim_heap() -> None:
    """Returns freed memory that the C library keeps for itself (glibc keeps blocks below 32 MiB) to the system."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


def map_pages(size: int) -> mmap.mmap:
    """Zeros, in pages of their own, each of which takes memory from when it is written. Raises OSError where there is
    no room for so many."""
    flags: dict[str, Any] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return mmap.mmap(-1, size, **flags)
