"""What a process keeps of freed memory: in processes of their own, whose heaps nobody else has used."""

from __future__ import annotations

import subprocess
import sys

import pytest

HOLES = """
import psutil
from strop.machine.heap import large_apart

if {apart}:
    large_apart()
large = bytearray(20 << 20)
del large  # as glibc is without it, blocks up to this size come from its heap from now on
held = [bytearray(size) for _ in range(50) for size in (2 << 20, 1 << 12)]
del held[::2]  # between the small ones, that stay
print(psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_large_blocks_go_back_to_the_system() -> None:
    found = [
        int(subprocess.run([sys.executable, "-c", HOLES.format(apart=apart)], capture_output=True, check=True).stdout)
        for apart in (False, True)
    ]
    assert found[1] < found[0] - (20 << 20)
