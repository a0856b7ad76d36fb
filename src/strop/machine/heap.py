"""What the C library keeps of memory that was freed."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress


def give_back() -> None:
    """Returns freed memory that the C library keeps for itself (glibc keeps blocks below 32 MiB) to the system."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
