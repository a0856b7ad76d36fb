"""Show the progress of the Python functions: a bar in a terminal, the steps in a notebook, and lines in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from strop.errors import Stopped
from strop.runs.events import Event

LOG_SECONDS = 30.0  # between lines in a log

if TYPE_CHECKING:
    from strop.display.notebook import NotebookDisplay
    from strop.display.terminal import StatusLine


def _mode(progress: bool | None, is_main: bool = True) -> str:
    """Return "notebook", "terminal" (or its lines in a log, with True), "log" or "off"."""
    if progress is False or not is_main:
        return "off"
    from strop.display.notebook import is_notebook

    if is_notebook():
        return "notebook"
    return "terminal" if progress or sys.stderr.isatty() else "log"


@contextmanager
def _log(activity: str) -> Iterator[StatusLine]:
    """Yield a line that is printed with the time of its activity every LOG_SECONDS."""
    from strop.display.tables import messages
    from strop.display.terminal import StatusLine, activity_messages

    status = StatusLine(messages, activity, quiet=[LOG_SECONDS])
    status.start()
    try:
        with activity_messages(status.update, status.print_line):
            yield status
    finally:
        status.stop()


@contextmanager
def show_run(progress: bool | None, is_main: bool) -> Iterator[Callable[[Event], None] | None]:
    """Yield a listener that shows the events of a run, or None."""
    mode = _mode(progress, is_main)
    if mode == "off":
        yield None
    elif mode == "log":
        activity = ""  # of the training, which evaluations and saves interrupt
        with _log("preparing the run") as line:

            def log(event: Event) -> None:
                nonlocal activity
                if event["event"] == "start":
                    activity = "computing the first step"
                elif event["event"] == "step":
                    activity = f"training: step {event['step']} of {event['steps']}, loss {event['loss']:.4f}"
                if event["event"] in ("start", "step", "eval", "samples", "save") and activity:
                    line.update(activity)

            yield log
    elif mode == "notebook":
        with _notebook("loading the libraries", keep=True) as display:
            yield display.on_event
    else:
        from strop.display.tables import messages
        from strop.display.terminal import run_progress

        with run_progress() as listener:

            def show(event: Event) -> None:
                listener(event)
                if event["event"] == "end":  # the command line prints a summary instead
                    messages.print(f"run      {Path(event.get('adapter') or event['model']).parent}", markup=False)

            yield show


@contextmanager
def show_answers(
    progress: bool | Callable[[str, int, int], None] | None, is_main: bool
) -> Iterator[Callable[[str, float, int], None] | None]:
    """Yield a callback that shows how many answers are generated: label, done, total; or None."""
    if callable(progress):
        yield _whole_counts(progress) if is_main else None
    elif (mode := _mode(progress, is_main)) == "off":
        yield None
    elif mode == "log":
        with _log("loading the model") as line:
            yield lambda label, done, total: line.update(f"generating answers: {label}, {int(done)} of {total}")
    elif mode == "notebook":
        with _notebook("loading the model") as display:
            yield lambda label, done, total: display.update(f"generating answers: {label}", int(done), total)
    else:
        from strop.display.terminal import generation_progress

        with generation_progress() as advance:
            yield advance


def _whole_counts(progress: Callable[[str, int, int], None]) -> Callable[[str, float, int], None]:
    """Return a callback that passes on finished answers, without the fractions of unfinished ones."""
    last = ("", -1)

    def advance(label: str, done: float, total: int) -> None:
        nonlocal last
        if last != (label, int(done)):
            last = (label, int(done))
            progress(label, int(done), total)

    return advance


@contextmanager
def show_steps(progress: bool | Callable[[str], None] | None, activity: str) -> Iterator[Callable[[str], None]]:
    """Yield a callback that shows the description of each step."""
    if callable(progress):
        yield progress
    elif (mode := _mode(progress)) == "off":
        yield lambda text: None
    elif mode in ("notebook", "log"):
        with _notebook(activity) if mode == "notebook" else _log(activity) as display:
            yield display.update
    else:
        from strop.display.terminal import status_line

        with status_line(activity) as status:
            yield status.update


@contextmanager
def show_wait(progress: bool | None, activity: str) -> Iterator[StatusLine | None]:
    """Yield a line that is printed every LOG_SECONDS in a terminal and a notebook too, or None if `progress` is False.

    Several threads may wait at once.
    """
    if progress is False:
        yield None
        return
    from strop.display.tables import SafeConsole
    from strop.display.terminal import StatusLine

    out = SafeConsole(stderr=True, highlight=False, soft_wrap=True, force_terminal=False, force_jupyter=False)
    line = StatusLine(out, activity, quiet=[LOG_SECONDS])
    line.start()
    try:
        yield line
    finally:
        line.stop()


@contextmanager
def _notebook(activity: str, keep: bool = False) -> Iterator[NotebookDisplay]:
    """Yield a display in the notebook's cell, which disappears after a success unless it is to be kept."""
    from strop.display.notebook import NotebookDisplay
    from strop.display.terminal import activity_messages

    display, final = NotebookDisplay(activity), "done" if keep else ""
    try:
        with activity_messages(display.show_activity, display.add_note):
            yield display
    except BaseException as error:
        final = "stopped" if isinstance(error, KeyboardInterrupt | Stopped) else "failed"
        raise
    finally:
        display.close(final)
