"""Processes with injected faults. Standard library only, so that another tool's environment can run it too.

Children are forks: the parent has done the slow imports and has started no threads.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Work = Callable[[], int]


@dataclass(frozen=True)
class Ended:
    """The end of a process. code: exit status, or minus its signal. seconds: run time. output: stderr and stdout."""

    code: int
    seconds: float
    output: str


def child(work: Work, log: Path, *, hurt: tuple[int, float] | None = None) -> Ended:
    """Run `work` in a fork. hurt: (signal, seconds after the start) to send to it."""
    started = time.monotonic()
    pid = start(work, log)
    if hurt is not None:
        number, after = hurt
        while time.monotonic() - started < after:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
            time.sleep(min(0.002, max(0.0, after - (time.monotonic() - started))))
        os.kill(pid, number)  # if it has ended already, it is a zombie and the signal is harmless
    return wait(pid, log, started)


def start(work: Work, log: Path) -> int:
    """Start `work` in a fork and return its process id."""
    pid = os.fork()
    if pid == 0:
        _be_child(work, log)
    return pid


def wait(pid: int, log: Path, started: float) -> Ended:
    _, status = os.waitpid(pid, 0)
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return Ended(os.waitstatus_to_exitcode(status), time.monotonic() - started, text)


def _be_child(work: Work, log: Path) -> None:
    code = 99
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = work()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException as error:  # the child must never go back into the parent's code
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def instants(number: int, longest: float, seed: int) -> list[float]:
    """Return random instants of a run, one in each of `number` equal parts, in random order."""
    chance = random.Random(seed)
    result = [(part + chance.random()) * longest / number for part in range(number)]
    chance.shuffle(result)
    return result


def die_at(call: int) -> Callable[[], None]:
    """Make this process kill itself just before its n-th call (from 1) that durably changes the disk."""
    count = 0

    def install() -> None:
        for name in ("fsync", "replace", "unlink", "rmdir"):
            setattr(os, name, _deadly(getattr(os, name)))

    def _deadly(function: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return counted

    return install
