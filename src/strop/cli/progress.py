"""A sign of life while nothing else is printed: what is being done, and for how long."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.status import Status

QUIET_SECONDS = 3.0  # at most, without a word, where there is no terminal to draw on
TICK_SECONDS = 0.5


class Alive(logging.Handler):
    """On a terminal a line that counts the seconds; into a file or a pipe a line every few seconds.

    What is being done comes from `now`, or from what modules of strop log at the level INFO: a few words that go on
    from "still", such as "loading the weights".
    """

    def __init__(self, out: Console, what: str) -> None:
        super().__init__(logging.INFO)
        self._out, self._what = out, what
        self._since = self._told = time.monotonic()
        self._status: Status | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO:
            self.now(record.getMessage())

    def now(self, what: str) -> None:
        """Something else is being done from here on."""
        self._what, self._since = what, time.monotonic()
        self._draw()

    def say(self, what: str) -> None:
        """The same, and it is printed."""
        self._out.print(what, markup=False)
        self.touch()
        self.now(what)

    def touch(self) -> None:
        """Something was printed: there is a sign of life already."""
        self._told = time.monotonic()

    def start(self) -> None:
        if self._out.is_terminal:
            self._status = self._out.status(escape(self._what))
            self._status.start()
        self._thread.start()

    def stop(self) -> None:
        """Leaves the line to what else draws on the terminal."""
        self._ended.set()
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _watch(self) -> None:
        while not self._ended.wait(TICK_SECONDS):
            if self._out.is_terminal:
                self._draw()
            elif time.monotonic() - self._told > QUIET_SECONDS:
                self.touch()
                self._out.print(f"still    {self._said()}", markup=False)

    def _draw(self) -> None:
        status = self._status
        if status is not None:
            status.update(escape(self._said()))

    def _said(self) -> str:
        return f"{self._what} ({time.monotonic() - self._since:.0f} s)"


@contextmanager
def alive(out: Console, what: str) -> Iterator[Alive]:
    """Signs of life from here to the end of the block, or until `stop`."""
    sign, log = Alive(out, what), logging.getLogger("strop")
    before = log.level
    log.setLevel(logging.INFO)
    log.addHandler(sign)
    sign.start()
    try:
        yield sign
    finally:
        sign.stop()
        log.removeHandler(sign)
        log.setLevel(before)
