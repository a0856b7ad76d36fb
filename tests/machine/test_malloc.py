"""What a process keeps of freed memory: in processes of their own, whose heaps nobody else has used."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCKS = """
import resource
from strop.machine.memory import keep_pages

if {kept}:
    keep_pages()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in range(4, 32, 4):
    bytearray(size << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_blocks_find_the_pages_of_those_before() -> None:
    found = [
        int(subprocess.run([sys.executable, "-c", BLOCKS.format(kept=kept)], capture_output=True, check=True).stdout)
        for kept in (False, True)
    ]
    assert found[1] < found[0] / 2
