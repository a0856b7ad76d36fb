"""A run's events as columns, read incrementally, and curves that keep every spike at any length.

The trainer appends to events.jsonl, truncates a last line that a crash left incomplete, and repeats steps after a
resume or a rollback. A repeated step counts with its last values; the earlier ones are kept as `undone`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from array import array
from bisect import bisect_left, bisect_right
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from strop.dash.files import CONTENT_ERRORS, open_file
from strop.machine.memory import trim_heap
from strop.runs.events import parse_event

Event = dict[str, Any]
Values = NDArray[np.float64]
AXES = ("step", "epoch", "tokens", "time")
CHUNK_BYTES = 1 << 16
LARGE_BYTES = 4 << 20  # bytes read or drawn after which freed memory is returned to the system
MOST_STEPS = 1 << 40
SMOOTHED_SHARE = 200  # a smoothed point averages this fraction of the run on each side, at least 10 steps
MOST_MARKS, MOST_SAVES, MOST_UNDONE = 5000, 200, 5000
LEVELS = {
    **dict.fromkeys(("skip", "doubt", "shrink", "stop", "note"), "warning"), "rollback": "bad", "end": "good",
}  # fmt: skip
_WITHOUT_MARK = ("machine", "recipe", "data", "step", "eval")
_PLAIN = ("event", "time", "step", "steps", "epoch", "tokens", "seconds_left")
_KEPT = ("machine", "recipe", "data", "start", "rehearsal")


class StreamPosition(NamedTuple):
    """How much of a history a stream has sent."""

    generation: int
    steps: int
    evals: int
    marks: int


class History:
    """The events of a run. `generation` increases when past values change and curves must be redrawn."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.generation = 0
        self._clear()

    def _clear(self) -> None:
        self._offset, self._file = 0, 0
        self.steps, self.clock, self.tokens = array("l"), array("d"), array("d")
        self.columns: dict[str, array[float]] = {}
        self.eval_steps, self.evals = array("l"), array("d")
        self.eval_seconds = array("d")
        self.undone: list[tuple[int, float]] = []  # step and loss, replaced by a resume or a rollback
        self.marks: list[dict[str, Any]] = []
        self.marks_left_out, self.num_marks, self.num_saves = 0, 0, 0
        self.newest: dict[str, Event] = {}
        self.last: Event = {}
        self.notes: list[str] = []
        self._asked: dict[str, dict[str, Any]] = {}
        self.first_time: float | None = None
        self._session, self._before = 0.0, 0.0
        self._epoch_began: dict[int, int] = {}

    @property
    def num_bytes(self) -> int:
        """Approximate size in memory."""
        return len(self.steps) * (24 + 4 * len(self.columns)) + 400 * len(self.marks) + 64 * len(self.undone)

    @property
    def position(self) -> StreamPosition:
        return StreamPosition(self.generation, len(self.steps), len(self.eval_steps), self.num_marks)

    def update(self) -> bool:
        """Read appended events; return whether there were any."""
        try:
            handle = open_file(self.path)
        except OSError:
            if self._offset:
                self._clear()
                self.generation += 1
                return True
            return False
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._file or found.st_size < self._offset:  # another file, or a truncated one
                if self._offset:
                    self.generation += 1
                self._clear()
                self._file = found.st_ino
            file.seek(self._offset)
            before, waiting = self._offset, b""
            while chunk := file.read(CHUNK_BYTES):
                waiting += chunk
                whole = waiting.rfind(b"\n") + 1
                if whole:
                    self._take(waiting[:whole])
                    self._offset += whole
                    waiting = waiting[whole:]
            if self._offset - before > LARGE_BYTES:
                trim_heap()
            return self._offset != before

    def _take(self, lines: bytes) -> None:
        complete = [line for line in lines.decode("utf-8", "replace").split("\n") if line]
        try:
            events = json.loads(f"[{','.join(complete)}]")
        except (ValueError, RecursionError):  # skip damaged lines only
            events = [event for line in complete if (event := parse_event(line)) is not None]
        run: list[Event] = []
        for event in events:
            if not isinstance(event, dict):
                continue
            if event.get("event") == "step":
                run.append(event)
                continue
            self._add_steps(run)
            run = []
            with contextlib.suppress(*CONTENT_ERRORS):
                self._add_event(event)
        self._add_steps(run)

    def _add_steps(self, events: list[Event]) -> None:
        events = [event for event in events if isinstance(event.get("step"), int) and 0 <= event["step"] < MOST_STEPS]
        if not events:
            return
        self.newest["step"] = self.last = events[-1]
        if self.first_time is None:
            self.first_time = self._session = _number(events[0].get("time")) or 0.0
        for name, value in events[0].items():
            if name not in _PLAIN and name not in self.columns and not isinstance(value, (str, bool, list, dict)):
                self.columns[name] = array("f", [np.nan] * len(self.steps))
        first = events[0]["step"]
        if self.steps and first <= self.steps[-1]:
            self._undo(first - 1)
        numbers = [event["step"] for event in events]
        if any(later <= number for number, later in pairwise(numbers)):
            for event in events:  # not written by one session: process one by one
                self._add_steps([event])
            return
        epoch = None
        for number, event in zip(numbers, events, strict=True):
            if event.get("epoch") != epoch and isinstance(event.get("epoch"), int):
                epoch = event["epoch"]
                self._epoch_began.setdefault(epoch, number)
        self.steps.extend(numbers)
        reached = self.clock[-1] if self.clock else 0.0
        for time in _numbers(events, "time"):  # keep the axis monotonic if the clock is set back
            reached = max(reached, self._before + time - self._session)
            self.clock.append(reached)
        self.tokens.extend(_numbers(events, "tokens"))
        for name, column in self.columns.items():
            column.extend(_numbers(events, name))

    def _add_event(self, event: Event) -> None:
        kind, step = str(event.get("event")), event.get("step")
        self.last = event
        time = _number(event.get("time"))
        if self.first_time is None and kind == "start":
            self.first_time = self._session = time
        if kind == "machine":  # a new session; time between sessions is not counted
            self._before, self._session = (self.clock[-1] if self.clock else 0.0), time
        if kind in ("start", "resume") and self._session:
            self._session = time
        if kind in _KEPT:
            self.newest[kind] = event
        if kind == "recipe" and not self._asked:
            self._asked = {str(choice.get("field")): choice for choice in event.get("choices") or []}
        if kind == "note":
            self.notes = [*self.notes, str(event.get("text", ""))][-200:]
        if kind == "eval" and isinstance(step, int):
            self.newest["eval"] = event
            at = bisect_left(self.eval_steps, step)
            self.generation += at < len(self.eval_steps)
            del self.eval_steps[at:], self.evals[at:], self.eval_seconds[at:]
            self.eval_steps.append(step)
            self.evals.append(_number(event.get("loss")))
            self.eval_seconds.append(_number(event.get("seconds")))
        back = event.get("to") if kind == "rollback" else step if kind == "resume" else None
        if isinstance(back, int) and self.steps and back < self.steps[-1]:
            self._undo(back)
            if kind == "resume":
                self._before = self.clock[-1] if self.clock else 0.0
        made = mark_for(event)
        if made is None:
            return
        self.num_marks += 1
        if kind == "save":
            self.num_saves += 1
            saves = [place for place, one in enumerate(self.marks) if one["kind"] == "save"]
            if len(saves) >= MOST_SAVES:
                del self.marks[saves[0]]
        elif len(self.marks) >= MOST_MARKS:
            self.marks_left_out += 1
            return
        self.marks.append(made)

    def _undo(self, step: int) -> None:
        """Move values after `step` to `undone`, because the run repeats them."""
        at = bisect_right(self.steps, step)
        if at < len(self.steps):
            self.generation += 1
            losses = self.columns.get("loss", array("f"))
            self.undone += zip(self.steps[at:], losses[at:], strict=False)
            del self.undone[:-MOST_UNDONE]
        for column in [*self.columns.values(), self.clock, self.tokens]:
            del column[at:]
        del self.steps[at:]
        at = bisect_right(self.eval_steps, step)
        del self.eval_steps[at:], self.evals[at:], self.eval_seconds[at:]
        self._epoch_began = {epoch: began for epoch, began in self._epoch_began.items() if began <= step}

    @property
    def steps_per_epoch(self) -> float | None:
        """Steps per epoch, from the epochs seen so far or from rows and batch size."""
        begun = sorted(self._epoch_began.items())
        if len(begun) > 1:
            (first, a), (last, b) = begun[0], begun[-1]
            return max(1.0, (b - a) / (last - first))
        report = (self.newest.get("data") or {}).get("report") or {}
        rows = (report.get("rows") or {}).get("used")
        batch = next((c["value"] for c in self.choices if c.get("field") == "train.batch_size"), None)
        if isinstance(rows, int) and isinstance(batch, int) and rows and batch:
            return float(-(-(rows - int(report.get("held_out") or 0)) // batch) or 1)
        return None

    @property
    def choices(self) -> list[dict[str, Any]]:
        """The resolved recipe with origin and reason of each value; unchanged values keep those of the start."""
        now = (self.newest.get("recipe") or {}).get("choices") or []
        first = self._asked
        same = {c["field"] for c in now if first.get(c["field"], {}).get("value") == c.get("value")}
        return [first[choice["field"]] if choice["field"] in same else choice for choice in now]

    def axis(self, by: str, steps: Any) -> Values:
        """Return the positions of steps on an axis: step, epoch, tokens or time."""
        asked = np.asarray(steps, dtype=np.float64)
        if by == "step" or not len(self.steps):
            return asked
        if by == "epoch":
            return asked / (self.steps_per_epoch or max(1.0, float(self.steps[-1])))
        column = self.tokens if by == "tokens" else self.clock
        places: Values = np.interp(asked, np.array(self.steps, np.float64), np.array(column, np.float64))
        return places

    def curves(
        self, by: str = "step", points: int = 800, start: float | None = None, end: float | None = None,
        fields: tuple[str, ...] = (),
    ) -> dict[str, Any]:  # fmt: skip
        """Return every series between start and end, with the minimum and maximum of each of `points` parts."""
        x = self.axis(by, self.steps)
        series: dict[str, Any] = {}
        smooth = None
        for name, column in self.columns.items():  # one at a time, because each is as long as the run
            values = np.array(column, dtype=np.float64)
            if not fields or name in fields:
                series[name] = _within(x, values, start, end, points)
            if name == "loss":
                means = smoothed(values)
                smooth = short(float(means[-1])) if len(means) else None
                if not fields or "smoothed" in fields:
                    series["smoothed"] = _within(x, means, start, end, points)
        if not fields or "eval_loss" in fields:
            at = self.axis(by, np.array(self.eval_steps, dtype=np.int64))
            series["eval_loss"] = _within(at, np.array(self.evals, dtype=np.float64), start, end, points)
        if self.undone and (not fields or "undone" in fields):
            numbers, losses = (np.array(part, dtype=np.float64) for part in zip(*self.undone, strict=True))
            series["undone"] = _within(self.axis(by, numbers), losses, start, end, points)
        reach = [float(x[0]), float(x[-1])] if len(x) else None
        last = dict(self.newest.get("step") or {})
        last.pop("event", None)
        if smooth is not None:
            last["smoothed"] = smooth
        if self.num_bytes > LARGE_BYTES:
            trim_heap()
        return {
            "by": by, "range": reach, "rows": len(x), "decimated": len(x) > 2 * points, "series": series,
            "last": last, "generation": self.generation,
        }  # fmt: skip


def smoothed(values: Values) -> Values:
    """Return a centred moving average, which does not lag behind the curve."""
    known = np.isfinite(values)
    count = len(values)
    place = np.arange(count, dtype=np.int32)
    reach = np.minimum(np.minimum(place, count - 1 - place), min(max(10, count // SMOOTHED_SHARE), count // 20))
    low, high = place - reach, place + reach + 1
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    means: Values = total[high] - total[low]
    total = np.concatenate([np.zeros(1, np.int32), np.cumsum(known, dtype=np.int32)])
    with np.errstate(invalid="ignore", divide="ignore"):
        means /= total[high] - total[low]
    return means


def _within(x: Values, y: Values, start: float | None, end: float | None, points: int) -> dict[str, list[Any]]:
    keep = np.isfinite(y) & np.isfinite(x)
    if start is not None:
        keep &= x >= start
    if end is not None:
        keep &= x <= end
    x, y = x[keep], y[keep]
    if len(y) > 2 * points:
        chosen = extremes(x, y, points)
        x, y = x[chosen], y[chosen]
    return {"x": [short(float(one), 9) for one in x], "y": [short(float(one)) for one in y]}


def extremes(x: Values, y: Values, parts: int) -> NDArray[np.int64]:
    """Return the indices of both ends and of each part's extremes: LTTB may drop a spike. x: must be increasing."""
    edges = np.searchsorted(x, np.linspace(x[0], x[-1], parts + 1)[1:-1], side="left")
    chosen = {0, len(x) - 1}
    for low, high in zip([0, *edges.tolist()], [*edges.tolist(), len(x)], strict=True):
        if high > low:
            part = y[low:high]
            chosen |= {low + int(part.argmin()), low + int(part.argmax())}
    return np.array(sorted(chosen), dtype=np.int64)


def short(value: float, digits: int = 6) -> float | None:
    """Round to `digits` significant digits; None for NaN and infinity."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else float("nan")


def _numbers(events: list[Event], name: str) -> list[float]:
    """Return a field of all events; fast if every event has it."""
    try:
        values = [event[name] for event in events]
        array("d", values)
        return values
    except (KeyError, TypeError, OverflowError):
        return [_number(event.get(name)) for event in events]


def mark_for(event: dict[str, Any]) -> dict[str, Any] | None:
    """Return a mark for a curve (kind, step, time, text, level, event), or None for other events."""
    kind = str(event.get("event"))
    if kind in _WITHOUT_MARK:
        return None
    stopped_with_advice = kind == "stop" and event.get("advice") is not None
    return {
        "kind": kind, "step": event.get("step") if _is_int(event.get("step")) else None, "time": event.get("time"),
        "text": _describe(kind, event), "level": "bad" if stopped_with_advice else LEVELS.get(kind, "info"),
        "event": event,
    }  # fmt: skip


def _describe(kind: str, event: dict[str, Any]) -> str:
    step, why = event.get("step"), str(event.get("why") or "")
    if kind == "start":
        parameters = event.get("parameters") or {}
        trained = f", {parameters['trainable']:,} trainable parameters" if _is_int(parameters.get("trainable")) else ""
        return f"starts at step {step} of {event.get('steps')} with the {event.get('engine')} step{trained}"
    if kind == "rollback":
        scale = event.get("rate_scale")
        slower = f"; learning rate times {scale:g}" if isinstance(scale, (int, float)) else ""
        return f"rolled back from step {step} to {event.get('to')}: {why}{slower}"
    if kind == "stop":
        advice = [str(one) for one in event.get("advice") or []]
        text = "stopped by a signal, after saving" if why == "signal" else f"stopped: {why}"
        return "; ".join([text, *advice])
    if kind == "rehearsal" and _is_int(event.get("predicted_bytes")) and _is_int(event.get("usable_bytes")):
        need, usable = event["predicted_bytes"] / 2**30, event["usable_bytes"] / 2**30
        tried = "dry run of the largest micro-batch" if event.get("done") else "fits easily, dry run skipped"
        return f"{need:.2f} GiB predicted, {usable:.1f} usable: {tried}"
    places = [str(row) for row in event.get("rows") or []] if kind in ("skip", "doubt") else []
    rows = f" (rows {', '.join(places[:4])}{', ...' if len(places) > 4 else ''})" if places else ""
    texts = {
        "resume": f"resumed from step {step} ({event.get('checkpoint')})",
        "save": f"saved {event.get('checkpoint')}",
        "skip": f"step {step} skipped: {why}{rows}",
        "doubt": f"step {step} accepted but suspicious: {why}{rows}",
        "override": f"{event.get('field')} changed from {event.get('was')} to {event.get('now')}",
        "shrink": f"out of memory at step {step}; now {event.get('to')}: {why}",
        "end": f"finished at step {step}",
        "note": str(event.get("text", "")),
    }
    if kind in texts:
        return texts[kind]
    rest = {key: value for key, value in event.items() if key not in ("event", "time", "step", "rows")}
    text = ", ".join(f"{key} {_format(value)}" for key, value in rest.items() if value is not None)
    return f"{kind}: {text}" if text else kind


def _format(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return f"{value:,}" if _is_int(value) else str(value)[:200]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
