"""Processes that end with their parent."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

PARENT = """
import subprocess, sys, time
from strop.machine.processes import end_with_parent

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], preexec_fn=end_with_parent(),
                         start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_child_ends_when_its_parent_is_killed() -> None:
    """As vLLM when the kernel kills strop for memory."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.send_signal(signal.SIGKILL)
        parent.wait(30)
        assert child.wait(30) is None or not child.is_running()
