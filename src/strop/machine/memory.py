"""Measure and limit the memory of this process or its GPU, and configure the C library's allocator."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from strop.errors import RecipeError
from strop.runs.folder import cache_folder, read_json, write_json

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
USABLE = 0.9  # of a memory limit; the rest is for a layer's workspace and the head, which are not seen between layers
HEAP_BLOCK_BYTES, HEAP_TOP_BYTES = 32 << 20, 64 << 20  # smaller blocks come from the heap; this much stays at its end
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
# Messages of failed allocations: of torch, oneDNN, numpy and the C++ library, and of CUDA libraries without room for
# their workspace (cuBLAS reports "not initialized" where even its handle has none).
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "bad_alloc",
    "unable to allocate",
    "could not create a memory",
    "could not create a primitive",
    "cublas_status_not_initialized",
    "_status_alloc_failed",  # of cuBLAS, cuSOLVER, cuSPARSE and cuDNN
    "cudnn_status_internal_error_host_allocation_failed",
    "cudnn_status_internal_error_device_allocation_failed",
    "nvml_success ==",  # PyTorch, where it cannot ask the driver how full the GPU is (pytorch#112377)
)


def keep_heap_pages() -> None:
    """Allocate blocks below 32 MiB from the heap, whose pages stay mapped for reuse when a block is freed."""
    # glibc reaches this state too, but only as such blocks are freed; mapping and clearing new pages for each block
    # took a quarter of a step (docs/log).
    if sys.platform == "linux" and not any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        with suppress(AttributeError):
            library = ctypes.CDLL(None)
            library.mallopt(_M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES)
            library.mallopt(_M_TRIM_THRESHOLD, HEAP_TOP_BYTES)


def trim_heap() -> None:
    """Return freed memory from glibc's heap to the system."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)


def map_pages(size: int) -> mmap.mmap:
    """Map zeroed pages outside the heap; each takes memory once it is written. Raises OSError without room."""
    flags: dict[str, Any] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return mmap.mmap(-1, size, **flags)


@dataclass(frozen=True)
class PeakTracker:
    """Peak memory since `start_peak`, of the process (`resident_bytes` at the start) or of a CUDA device."""

    resident_bytes: int
    device: str

    def peak_bytes(self) -> int:
        """Return the CUDA allocator's peak, or the growth of the process's peak resident memory."""
        if self.device.startswith("cuda"):
            import torch

            return int(torch.cuda.max_memory_allocated(self.device))
        info = psutil.Process().memory_info()
        peak = int(getattr(info, "peak_wset", info.rss))
        if sys.platform == "linux":
            status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            peak = next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")), peak)
        return max(0, peak - self.resident_bytes)


def start_peak(device: str) -> PeakTracker:
    """Reset the peak where the system allows it (Linux, CUDA) and return a tracker."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # forbidden in some sandboxes: the peak then counts from the start of the process
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    return PeakTracker(psutil.Process().memory_info().rss, device)


def parse_bytes(text: str | int) -> int:
    """Parse a size: 8GB, 512MiB, or plain bytes. Raises RecipeError."""
    from pydantic import ByteSize, TypeAdapter, ValidationError  # which the page's server does not load

    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size <= 0:
        raise RecipeError(f"--memory {text}: not a size", fix="write it as 8GB or 512MiB")
    return size


def limit_bytes(memory: str | int | None) -> int | None:
    """Parse a memory limit; None means no limit. Raises RecipeError."""
    return None if memory is None else parse_bytes(memory)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on a device or in RAM; torch's own exception covers only the former."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or any(phrase in message for phrase in _NO_MEMORY)


class MemoryWatch:
    """Raises MemoryError before this process exceeds its limit; on a CPU the system would kill it silently."""

    # Memory grows between layers: call `begin` before each micro-batch, and the watch itself before each layer.
    # (RLIMIT_DATA was tried instead: small allocations inside oneDNN then fail too.)

    def __init__(self, limit_bytes: int, free_bytes: int) -> None:
        """Set the limit to the smaller of `limit_bytes` and what the machine has left, `free_bytes`."""
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
            used, allowed = now / 2**20, self.limit_bytes / 2**20
            raise MemoryError(f"out of memory: {used:,.0f} MiB in use of {allowed:,.0f} MiB allowed, before a layer")


def _resident_bytes() -> int:
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE_BYTES
    return int(psutil.Process().memory_info().rss)


def save_measured(key: str, value: dict[str, Any]) -> None:
    """Store what a kind of run needed on this machine, for the next run of that kind."""
    file = cache_folder() / "memory" / f"{key}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, value)


def load_measured(key: str) -> dict[str, Any]:
    return read_json(cache_folder() / "memory" / f"{key}.json")
