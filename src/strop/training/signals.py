"""What ends a run early: signals and time. All clocks here are monotonic: a laptop that sleeps, or a clock that is
set, moves nothing."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


def seconds(text: str) -> float:
    """90s, 30m, 2h, 1d or plain seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    assert match is not None  # the schema has checked it
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM once: the function yielded says True. Twice: KeyboardInterrupt at once."""
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if asked:
            before = old[signal.Signals(number)]
            if callable(before):  # the command's own, which notes that it is to say so
                before(number, frame)
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield lambda: False
        return
    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
