"""What the C library keeps of memory that was freed."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

LARGE = 1 << 20  # bytes
_M_MMAP_THRESHOLD = -3  # of mallopt(3)


def large_apart() -> None:
    """From now on a block of 1 MiB or more has pages of its own, which go back to the system when it is freed. glibc
    moves that bound up to 32 MiB as such blocks are freed, and then keeps them in pieces that may fit nothing."""
    if sys.platform == "linux" and not any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        with suppress(AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE)


def give_back() -> None:
    """Returns freed memory that the C library keeps for itself (glibc keeps blocks below 32 MiB) to the system."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
