"""What the C library keeps of memory that was freed, and memory that it does not manage."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from contextlib import suppress
from typing import Any

LARGE, KEPT = 32 << 20, 64 << 20  # bytes: of a block, and at the heap's end
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_pages() -> None:
    """From now on a block below 32 MiB comes from the heap, whose pages stay when it is freed: what a step needs for a
    moment, layer after layer, finds pages that are there. glibc gets there too, but only as such blocks are freed; with
    pages of its own for each block, getting and clearing them took a quarter of a step (docs/log)."""
    if sys.platform == "linux" and not any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        with suppress(AttributeError):
            library = ctypes.CDLL(None)
            library.mallopt(_M_MMAP_THRESHOLD, LARGE)
            library.mallopt(_M_TRIM_THRESHOLD, KEPT)


def give_back() -> None:
    """Returns freed memory that the C library keeps for itself (glibc keeps blocks below 32 MiB) to the system."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


def own_pages(size: int) -> mmap.mmap:
    """Zeros, in pages of their own, each of which takes memory from when it is written. Raises OSError where there is
    no room for so many."""
    flags: dict[str, Any] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return mmap.mmap(-1, size, **flags)
