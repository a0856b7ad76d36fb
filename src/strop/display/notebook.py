"""Show a run and its results in a notebook, as HTML that IPython updates in place."""

from __future__ import annotations

import contextvars
import html
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from strop.runs.events import Event

UPDATE_SECONDS = 0.5  # minimum time between updates
REFRESH_SECONDS = 1.0  # time between updates of the clock
MAX_ROWS = 8  # of the table of steps
MAX_POINTS = 300  # of the loss curve
WIDTH, HEIGHT = 480, 120  # of the loss curve, in pixels


def is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook, which shows HTML."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and getattr(shell, "kernel", None) is not None


def loss_curve(losses: Sequence[tuple[int, float]], evals: Sequence[tuple[int, float]] = ()) -> str:
    """Return an SVG of losses by step: a line for training, and a dot for each evaluation."""
    points = [(step, loss) for step, loss in losses if loss == loss]
    points = points[:: max(1, len(points) // MAX_POINTS)]
    if len(points) < 2:
        return ""
    shown = [*points, *evals]
    first, last = min(step for step, _ in shown), max(step for step, _ in shown)
    low, high = min(loss for _, loss in shown), max(loss for _, loss in shown)

    def place(step: int, loss: float) -> tuple[float, float]:
        x = 44 + (WIDTH - 54) * (step - first) / max(1, last - first)
        y = 10 + (HEIGHT - 30) * (high - loss) / (high - low or 1.0)
        return round(x, 1), round(y, 1)

    line = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
    dots = "".join(
        f'<circle cx="{x}" cy="{y}" r="3.5" fill="#d9730d"><title>eval loss {loss:.4f} at step {step}</title></circle>'
        for step, loss in evals
        for x, y in [place(step, loss)]
    )
    labels = (
        f'<text x="0" y="14">{high:.3g}</text><text x="0" y="{HEIGHT - 18}">{low:.3g}</text>'
        f'<text x="44" y="{HEIGHT - 4}">step {first}</text>'
        f'<text x="{WIDTH - 10}" y="{HEIGHT - 4}" text-anchor="end">{last}</text>'
    )
    return (
        f'<svg role="img" aria-label="loss by step" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'style="font:11px sans-serif;fill:currentColor;max-width:100%">'
        f'<polyline points="{line}" fill="none" stroke="#1192a8" stroke-width="1.8"/>{dots}{labels}</svg>'
    )


def html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class NotebookDisplay:
    """An output of a notebook cell that shows the present activity, and the steps of a run."""

    def __init__(self, activity: str) -> None:
        self._activity, self._start = activity, time.monotonic()
        self._losses: list[tuple[int, float]] = []
        self._evals: list[tuple[int, float]] = []
        self._rows: list[tuple[str, ...]] = []
        self._notes: list[str] = []
        self._done, self._total = 0, 0
        self._last_update = 0.0
        from IPython.display import HTML, display

        self._html = HTML
        self._handle = display(HTML(self._render()), display_id=True)
        self._ended = threading.Event()
        context = contextvars.copy_context()  # it names the cell to which IPython sends output
        threading.Thread(target=lambda: context.run(self._refresh), daemon=True).start()

    def _refresh(self) -> None:
        while not self._ended.wait(REFRESH_SECONDS):
            self._draw(now=True)

    def update(self, activity: str, done: int = 0, total: int = 0) -> None:
        """Show another activity. done, total: how much of it is finished; total 0 shows no bar."""
        self._activity, self._done, self._total = activity, done, total
        self._draw(now=total == 0)

    def on_event(self, event: Event) -> None:
        """Show an event of a run."""
        kind = event["event"]
        if kind == "start":
            self.update("computing the first step", event["step"], event["steps"])
        elif kind == "step":
            self._losses.append((event["step"], event["loss"]))
            minutes, seconds = divmod(int(event["seconds_left"]), 60)
            self._rows.append(
                (str(event["step"]), f"{event['loss']:.4f}", f"{event['tokens_per_s']:.0f}", f"{minutes}:{seconds:02d}")
            )
            self.update("training", event["step"], event.get("steps", self._total))
        elif kind == "eval" and event["loss"] is not None:
            self._evals.append((event["step"], event["loss"]))
            self._notes.append(f"eval loss {event['loss']:.4f} at step {event['step']}")
        elif kind == "note":
            self._notes.append(event["text"])
        elif kind == "stop":
            self._notes.append(f"stopped after step {event['step']}, saved: {event['why']}")
        elif kind in ("skip", "rollback", "shrink"):
            self._notes.append(f"step {event['step']}: {kind}: {event.get('why', 'out of memory')}")
        elif kind == "end":
            self.update("writing the report")

    def close(self, final: str) -> None:
        """Draw once more, with a last line and without the table of steps."""
        self._ended.set()
        self._activity, self._done, self._total, self._rows = final, 0, 0, []
        self._draw(now=True)

    def _draw(self, *, now: bool) -> None:
        if now or time.monotonic() - self._last_update >= UPDATE_SECONDS:
            self._last_update = time.monotonic()
            with suppress(Exception):  # a closed notebook must not end the run
                self._handle.update(self._html(self._render()))

    def _render(self) -> str:
        seconds = time.monotonic() - self._start
        parts = [f"<div><b>{html.escape(self._activity)}</b> ({seconds:.0f} s)"]
        if self._total:
            parts.append(f' <progress max="{self._total}" value="{self._done}"></progress> {self._done}/{self._total}')
        parts.append("</div>")
        parts.append(loss_curve(self._losses, self._evals))
        if self._rows:
            parts.append(html_table(("step", "loss", "tokens/s", "left"), self._rows[-MAX_ROWS:]))
        parts += [f"<div>{html.escape(note)}</div>" for note in self._notes[-MAX_ROWS:]]
        return "".join(parts)


def run_html(folder: Path, report: Mapping[str, Any]) -> str:
    """Return a summary of a finished run; its loss curve is in the output of `train`."""
    rows = [
        ("run", str(folder)),
        ("steps", f"{report['steps']}"),
        ("tokens", f"{report['tokens']:,} ({report['tokens_per_s']:.0f} tokens/s)"),
        ("time", f"{report['seconds']:.0f} s"),
        ("loss", f"{report['loss']['first']:.4f} to {report['loss']['last']:.4f}"),
        *([("eval loss", f"{report['eval_loss']:.4f}")] if report.get("eval_loss") is not None else []),
        ("adapter", str(report["adapter"])),
    ]
    return html_table(("", ""), rows)
