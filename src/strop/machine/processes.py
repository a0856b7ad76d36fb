"""Signal other processes, on each operating system."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any


def end_session(process: subprocess.Popen[Any], *, force: bool) -> None:
    """Send SIGTERM, or with `force` SIGKILL, to a process and its children.

    It must have been started with start_new_session. On Windows, only the process itself is ended.
    """
    if sys.platform == "win32":
        process.terminate()
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL if force else signal.SIGTERM)
