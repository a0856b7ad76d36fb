"""The C library's allocator, measured in fresh processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCKS = """
import resource
from strop.machine.memory import keep_heap_pages

if {kept}:
    keep_heap_pages()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in range(4, 32, 4):
    bytearray(size << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_pages_are_reused() -> None:
    faults = [
        int(subprocess.run([sys.executable, "-c", BLOCKS.format(kept=kept)], capture_output=True, check=True).stdout)
        for kept in (False, True)
    ]
    assert faults[1] < faults[0] / 2
