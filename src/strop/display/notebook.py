"""Show a run and its results in a notebook, as HTML that IPython updates in place."""

from __future__ import annotations

import contextvars
import html
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strop.display.numbers import format_duration
from strop.errors import in_python
from strop.runs.events import ON_REQUEST, Event

if TYPE_CHECKING:
    from strop.display.plots import Series

REFRESH_SECONDS = 1.0  # time between updates
PLOT_SECONDS = 5.0  # time between plots, which take 0.05 s each
MAX_ROWS = 8  # steps and notes that are shown
PLOT_INCHES = 6.0, 2.0
PLOT_COLOURS = "--base:#1192a8;--tuned:#d9730d"


def is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook, which shows HTML."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and getattr(shell, "kernel", None) is not None


def html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with its text at the left, which notebooks put at the right. headings: () for none."""

    def line(tag: str, cells: Sequence[str]) -> str:
        style = 'style="text-align:left"'
        return "<tr>" + "".join(f"<{tag} {style}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = f"<thead>{line('th', headings)}</thead>" if headings else ""
    body = "".join(line("td", row) for row in rows)
    return f"<table>{head}<tbody>{body}</tbody></table>"


class NotebookDisplay:
    """An output of a notebook cell that shows the present activity, and the steps of a run.

    A thread of its own draws it, so that training does not wait for a plot.
    """

    def __init__(self, activity: str) -> None:
        from IPython.display import HTML, display

        self._activity, self._start = activity, time.monotonic()
        self._training = ""  # the activity that evaluations and saves interrupt
        self._train: Series = {}
        self._evaluated: Series = {}
        self._rows: deque[tuple[str, ...]] = deque(maxlen=MAX_ROWS)
        self._notes: deque[str] = deque(maxlen=MAX_ROWS)
        self._done, self._total = 0, 0
        self._plot, self._plotted = "", 0.0  # the last plot, and when it was drawn
        self._html = HTML
        self._handle = display(HTML(self._render()), display_id=True)
        self._ended = threading.Event()
        context = contextvars.copy_context()  # it names the cell to which IPython sends output
        self._thread = threading.Thread(target=lambda: context.run(self._refresh), daemon=True)
        self._thread.start()

    def _refresh(self) -> None:
        while not self._ended.wait(REFRESH_SECONDS):
            self._draw()

    def update(self, activity: str, done: int = 0, total: int = 0) -> None:
        """Show another activity. done, total: how much of it is finished; total 0 shows no bar."""
        self._activity, self._done, self._total = activity, done, total

    def show_activity(self, activity: str) -> None:
        """Show an activity that is part of the current one, whose bar stays."""
        self._activity = activity

    def add_note(self, text: str) -> None:
        self._notes.append(in_python(text))

    def on_event(self, event: Event) -> None:
        """Show an event of a run."""
        kind = event["event"]
        if kind == "start":
            self._set_training("computing the first step", event["step"], event["steps"])
        elif kind == "step":
            if math.isfinite(event["loss"]):
                self._train[event["step"]] = event["loss"]
            left = format_duration(event["seconds_left"])
            self._rows.append((str(event["step"]), f"{event['loss']:.4f}", f"{event['tokens_per_s']:.0f}", left))
            total = event.get("steps", self._total)
            self._set_training("saving" if event["step"] == total else "training", event["step"], total)
        elif kind in ("eval", "samples", "save"):
            if kind == "eval" and event["loss"] is not None:
                self._evaluated[event["step"]] = event["loss"]
                self._notes.append(f"eval loss {event['loss']:.4f} at step {event['step']}")
            if self._training:
                self.show_activity(self._training)
        elif kind == "note":
            self._notes.append(in_python(event["text"]))
        elif kind == "stop":
            why = "" if event["why"] in ON_REQUEST else f": {event['why']}"
            self._notes.append(f"stopped after step {event['step']}{why}")
        elif kind in ("skip", "rollback", "shrink"):
            self._notes.append(f"step {event['step']}: {kind}: {event.get('why', 'out of memory')}")
        elif kind == "end":
            self.update("writing the report")

    def _set_training(self, activity: str, done: int, total: int) -> None:
        self._training = activity
        self.update(activity, done, total)

    def close(self, final: str) -> None:
        """Draw once more, with a last line and without the table of steps. final: "" shows nothing."""
        self._ended.set()
        self._thread.join()
        self.update(final)
        self._rows.clear()
        self._plotted = 0.0
        self._draw()

    def _draw(self) -> None:
        if time.monotonic() - self._plotted > PLOT_SECONDS and len(self._train) > 1:
            from strop.display.plots import plot_loss

            train, evaluated = dict(self._train), dict(self._evaluated)  # other threads add values
            self._plot = f'<div style="{PLOT_COLOURS}">{plot_loss(train, evaluated, *PLOT_INCHES)}</div>'
            self._plotted = time.monotonic()
        with suppress(Exception):  # a closed notebook must not end the run
            self._handle.update(self._html(self._render()))

    def _render(self) -> str:
        if not self._activity:
            return ""
        seconds = time.monotonic() - self._start
        parts = [f"<div><b>{html.escape(self._activity)}</b> ({seconds:.0f} s)"]
        if self._total:
            parts.append(f' <progress max="{self._total}" value="{self._done}"></progress> {self._done}/{self._total}')
        parts += ["</div>", self._plot]
        if self._rows:
            parts.append(html_table(("step", "loss", "tokens/s", "left"), list(self._rows)))
        parts += [f"<div>{html.escape(note)}</div>" for note in list(self._notes)]
        return "".join(parts)


def run_summary(folder: Path, report: Mapping[str, Any], finished: bool) -> list[tuple[str, str]]:
    """Return the names and values of a summary of a run that has ended; its loss curve is in the output of `train`."""
    if not report:
        return [("run", str(folder)), ("state", "ended before its report was written")]
    steps, kept = report["steps"], report.get("adapter_step")
    parts = {"": report["seconds"], "evaluation and samples ": report.get("eval_seconds", 0)}
    parts["saving "] = report.get("save_seconds", 0)
    times = [f"{name}{seconds:.0f} s" for name, seconds in parts.items() if not name or round(seconds)]
    losses = [report["loss"][name] for name in ("first", "last")]
    first, last = (f"{loss:.4f}" if loss is not None else "-" for loss in losses)
    rows = [
        ("run", str(folder)),
        ("steps", f"{steps}" + ("" if finished else f"; stopped: strop.resume({str(folder)!r}) continues it")),
        ("tokens", f"{report['tokens']:,} ({report['tokens_per_s']:.0f} tokens/s)"),
        ("time", ", ".join(times)),
        ("loss", f"{first} in the first step, {last} in the last one"),
    ]
    if (loss := report.get("eval_loss")) is not None:
        rows.append(("eval loss", f"{loss:.4f}" + (f" at step {kept}, the lowest" if kept else "")))
    rows += [
        (kind, str(report[kind]) + (f" (weights of step {kept} of {steps})" if kept else ""))
        for kind in ("adapter", "model")
        if kind in report
    ]
    return [*rows, *(("finding", in_python(finding)) for finding in report.get("diagnosis", []))]
