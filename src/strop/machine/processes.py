"""Signal other processes, on each operating system."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> Callable[[], object] | None:
    """Return a `preexec_fn` with which a process gets SIGTERM when its parent ends, also by SIGKILL.

    More precisely, when the thread that started it ends. None on other systems than Linux.
    """
    if sys.platform != "linux":
        return None
    return partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, int(signal.SIGTERM))


def end_session(process: subprocess.Popen[Any], *, force: bool) -> None:
    """Send SIGTERM, or with `force` SIGKILL, to a process and its children.

    It must have been started with start_new_session. On Windows, only the process itself is ended.
    """
    if sys.platform == "win32":
        process.terminate()
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL if force else signal.SIGTERM)
