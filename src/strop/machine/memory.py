"""Measure and limit the memory of this process or its GPU, and configure the C library's allocator."""

from __future__ import annotations

import ctypes
import gc
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
MIN_LIMIT_BYTES = 1 << 20  # a lower limit is a typing error, such as 8 for 8GB
USABLE_SHARE = 0.9  # of a memory limit; the rest is for allocations within a layer, which are not measured
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
# HEAP_BLOCK_BYTES: larger blocks are mapped outside the heap. HEAP_TOP_BYTES: free memory kept at the heap's end.
HEAP_BLOCK_BYTES, HEAP_TOP_BYTES = 32 << 20, 64 << 20
# Messages of failed allocations by torch, oneDNN, numpy and the C++ library, and by CUDA libraries for their workspaces
# (cuBLAS reports "not initialized" if there is no memory for its handle).
_OUT_OF_MEMORY_PHRASES = (
    "out of memory", "can't allocate memory", "bad_alloc", "unable to allocate", "could not create a memory",
    "could not create a primitive", "cublas_status_not_initialized", "_status_alloc_failed",
    "cudnn_status_internal_error_host_allocation_failed", "cudnn_status_internal_error_device_allocation_failed",
    "cuda driver error: device not ready",  # in WSL (microsoft/WSL#41176)
    "nvml_success ==",  # of PyTorch, if it cannot query the GPU's free memory (pytorch#112377)
)  # fmt: skip


def keep_heap_pages() -> None:
    """Make glibc allocate blocks below 32 MiB from the heap, whose pages are reused after a block is freed."""
    # By default, glibc does this only after it has freed a block of this size. Mapping and clearing new pages for each
    # block took a quarter of a training step (docs/log).
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


def free_memory() -> None:
    """Free unreferenced models. Their modules form reference cycles, which only a garbage collection frees."""
    gc.collect()
    trim_heap()


def map_pages(size: int) -> mmap.mmap:
    """Map zeroed pages outside the heap, which use memory once they are written. Raises OSError if that fails."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@dataclass(frozen=True)
class PeakTracker:
    """Measures the peak memory of this process or of a CUDA device since `start_peak`."""

    resident_bytes: int  # of the process at the start
    library_bytes: int  # of which pages of shared libraries
    device: str

    def peak_bytes(self) -> int:
        """Return the CUDA allocator's peak, or the growth of the process's peak resident memory.

        Without pages of shared libraries, since their number depends on how the system has cached the files.
        """
        if self.device.startswith("cuda"):
            import torch

            return int(torch.cuda.max_memory_allocated(self.device))
        info = psutil.Process().memory_info()
        peak = int(getattr(info, "peak_wset", info.rss))
        if sys.platform == "linux":
            status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            peak = next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")), peak)
        libraries = max(0, library_bytes() - self.library_bytes)
        return max(0, peak - libraries - self.resident_bytes)


def start_peak(device: str) -> PeakTracker:
    """Reset the peak memory if the system supports it (Linux, CUDA), and return a tracker."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # not permitted in some sandboxes, where the peak is since the start of the process
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    return PeakTracker(psutil.Process().memory_info().rss, library_bytes(), device)


def library_bytes(pid: int | None = None) -> int:
    """Return the resident bytes of a process's shared libraries, by default of this process, or 0 if they are unknown.

    Takes 60 ms.
    """
    # With each page that is used, Linux maps those around it that it holds in memory as one block. The libraries that a
    # run loads had 86 MiB in one environment, and 154 MiB in a new one with the same versions (docs/log).
    if sys.platform != "linux":
        return 0
    try:
        return sum(one.rss for one in psutil.Process(pid).memory_maps() if ".so" in Path(one.path).name)
    except (psutil.Error, OSError):  # the process has ended, or a sandbox has no such file
        return 0


def parse_memory(memory: str | int | None) -> int | None:
    """Parse a memory limit such as 8GB, 512MiB, a number of bytes, or None for no limit. Raises RecipeError."""
    from pydantic import ByteSize, TypeAdapter, ValidationError  # not imported by the server of `strop dash`

    if memory is None:
        return None
    try:
        size = int(TypeAdapter(ByteSize).validate_python(memory))
    except ValidationError:
        size = 0
    if size <= 0:
        raise RecipeError(f"--memory {memory}: not a size", fix="write it as 8GB or 512MiB")
    if size < MIN_LIMIT_BYTES:
        unit = f"--memory {size}GB" if str(memory).strip() == str(size) and size < 1000 else "8GB or 512MiB"
        raise RecipeError(f"--memory {memory}: only {size:,} bytes", fix=f"write {unit}")
    return size


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is a failed allocation in host or device memory."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or any(phrase in message for phrase in _OUT_OF_MEMORY_PHRASES)


class MemoryWatch:
    """Raises MemoryError before this process exceeds a limit, at which the operating system would kill it.

    Call `begin` before each micro-batch, and the watch itself before each layer. RLIMIT_DATA is not used, because small
    allocations inside oneDNN would fail too.

    limit_bytes: the limit. free_bytes: memory that the machine has left, which can reduce the limit.
    """

    def __init__(self, limit_bytes: int, free_bytes: int) -> None:
        self.limit_bytes = min(limit_bytes, _resident_bytes() + free_bytes)
        self._last_bytes = self._growth = 0

    def begin(self) -> None:
        self._growth, self._last_bytes = 0, _resident_bytes()
        if self._last_bytes > 0.8 * USABLE_SHARE * self.limit_bytes:
            trim_heap()
            self._last_bytes = _resident_bytes()

    def __call__(self) -> None:
        resident = _resident_bytes()
        self._growth = max(self._growth, resident - self._last_bytes)  # of one layer; the next may need as much
        self._last_bytes = resident
        if resident + self._growth > USABLE_SHARE * self.limit_bytes:
            used, allowed = resident / 2**20, self.limit_bytes / 2**20
            raise MemoryError(f"out of memory: {used:,.0f} MiB in use of {allowed:,.0f} MiB allowed, before a layer")


def memory_in_use(device: str) -> dict[str, int]:
    """Return the field of step events with the memory in use: what PyTorch has allocated on a CUDA device, without
    waiting for it, otherwise the resident memory of this process. Takes microseconds.
    """
    if device.startswith("cuda"):
        import torch

        return {"allocated_bytes": int(torch.cuda.memory_allocated(device))}
    return {"resident_bytes": _resident_bytes()}


def _resident_bytes() -> int:
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE_BYTES
    return int(psutil.Process().memory_info().rss)


def save_measured(key: str, value: dict[str, Any]) -> None:
    """Store the memory settings that a run needed, for later runs with the same key."""
    file = cache_folder() / "memory" / f"{key}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, value)


def load_measured(key: str) -> dict[str, Any]:
    return read_json(cache_folder() / "memory" / f"{key}.json")
