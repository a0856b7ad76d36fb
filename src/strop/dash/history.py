"""Read the events of a run incrementally, and make curves of at most a given length that keep every spike.

The trainer appends to events.jsonl, truncates an incomplete last line after a crash, and repeats steps after a resume
or a rollback. Curves have the last values of a repeated step; the earlier losses are in the series "undone".
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from strop.dash.files import CONTENT_ERRORS, open_file
from strop.machine.memory import trim_heap
from strop.runs.events import (
    count_used,
    describe_turns,
    find_undone_recoveries,
    is_slower_than_planned,
    parse_event,
    plan_of_steps,
    split_prompt,
)

Event = dict[str, Any]
Values = NDArray[np.float64]
AXES = ("step", "epoch", "tokens", "time")
CHUNK_BYTES = 1 << 16
MAX_LEAD = 5000  # losses before a part of the curve, from which its smoothed values begin
TRIM_BYTES = 4 << 20  # after handling this many bytes, freed memory is returned to the system
MAX_STEP = 1 << 40
MAX_MARKS, MAX_SAVES, MAX_UNDONE = 5000, 200, 5000
LEVELS = {
    **dict.fromkeys(("skip", "doubt", "shrink", "stop", "note"), "warning"), "rollback": "bad", "end": "good",
}  # fmt: skip
MAX_SAMPLE_STEPS, MAX_SAMPLES, MAX_SAMPLE_CHARS = 100, 50, 4000  # evaluations, completions of each, length of a text
_WITHOUT_MARK = ("machine", "recipe", "data", "step", "eval", "samples", "answers")
_NOT_COLUMNS = ("event", "time", "step", "steps", "epoch", "tokens", "seconds", "seconds_left")
_BEFORE_STEPS = ("start", "rehearsal", "reference", "reference-check")  # the time of the first step begins after them
_STORED_EVENTS = ("machine", "recipe", "data", "start", "rehearsal")


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
        self._offset, self._inode = 0, 0
        self.steps, self.clock, self.tokens = array("l"), array("d"), array("d")
        self.trained = array("d")  # seconds in steps up to each step, as `seconds` of report.json
        self.columns: dict[str, array[float]] = {}
        self.eval_steps, self.evals = array("l"), array("d")
        self.undone: list[tuple[int, float]] = []  # (step, loss) of steps that were repeated
        self.marks: list[dict[str, Any]] = []
        self.marks_left_out, self.num_marks, self.num_saves = 0, 0, 0
        self.newest: dict[str, Event] = {}
        self.notes: list[str] = []
        self.samples: dict[int, list[dict[str, Any]]] = {}  # completions at evaluations by step, oldest first
        self._first_time: float | None = None
        self._session_start, self._earlier_seconds = 0.0, 0.0
        self._step_start, self._last_time, self._lost_seconds = 0.0, 0.0, 0.0
        self.eval_seconds = 0.0  # in evaluations with samples
        self._epoch_starts: dict[int, int] = {}  # first step of each epoch

    @property
    def num_bytes(self) -> int:
        """Return the approximate size in memory."""
        values = (value for samples in self.samples.values() for sample in samples for value in sample.values())
        curves = len(self.steps) * (32 + 4 * len(self.columns))
        return curves + 400 * len(self.marks) + 64 * len(self.undone) + sum(len(str(value)) for value in values)

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
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:  # another file, or a truncated one
                if self._offset:
                    self.generation += 1
                self._clear()
                self._inode = status.st_ino
            file.seek(self._offset)
            start, buffer = self._offset, b""
            while chunk := file.read(CHUNK_BYTES):
                buffer += chunk
                length = buffer.rfind(b"\n") + 1
                if length:
                    self._add_lines(buffer[:length])
                    self._offset += length
                    buffer = buffer[length:]
            if self._offset - start > TRIM_BYTES:
                trim_heap()
            return self._offset != start

    def _add_lines(self, data: bytes) -> None:
        lines = [line for line in data.decode("utf-8", "replace").split("\n") if line]
        try:
            events = json.loads(f"[{','.join(lines)}]")
        except (ValueError, RecursionError):  # skip damaged lines only
            events = [event for line in lines if (event := parse_event(line)) is not None]
        steps: list[Event] = []  # adding consecutive steps at once is faster
        for event in events:
            if not isinstance(event, dict):
                continue
            if event.get("event") == "step":
                steps.append(event)
                continue
            self._add_steps(steps)
            steps = []
            with contextlib.suppress(*CONTENT_ERRORS):
                self._add_event(event)
        self._add_steps(steps)

    def _add_steps(self, events: list[Event]) -> None:
        events = [event for event in events if isinstance(event.get("step"), int) and 0 <= event["step"] < MAX_STEP]
        if not events:
            return
        self.newest["step"] = events[-1]
        if self._first_time is None:
            self._first_time = self._session_start = _number(events[0].get("time")) or 0.0
            self._step_start = self._session_start
        for name in dict.fromkeys(chain.from_iterable(events)):  # a step may lack metrics that others have
            if name in _NOT_COLUMNS or name in self.columns:
                continue
            value = next(event[name] for event in events if name in event)
            if not isinstance(value, (str, bool, list, dict)):
                self.columns[name] = array("f", [np.nan] * len(self.steps))
        first = events[0]["step"]
        if self.steps and first <= self.steps[-1]:
            self._undo(first - 1)
        numbers = [event["step"] for event in events]
        if any(later <= number for number, later in pairwise(numbers)):
            for event in events:  # the steps are from several sessions
                self._add_steps([event])
            return
        epoch = None
        for number, event in zip(numbers, events, strict=True):
            if event.get("epoch") != epoch and isinstance(event.get("epoch"), int):
                epoch = event["epoch"]
                self._epoch_starts.setdefault(epoch, number)
        self.steps.extend(numbers)
        elapsed = self.clock[-1] if self.clock else 0.0
        for time in _numbers(events, "time"):
            elapsed = max(elapsed, self._earlier_seconds + time - self._session_start)  # the clock may be set back
            self.clock.append(elapsed)
            seconds = max(0.0, time - self._step_start) + self._lost_seconds
            self.trained.append((self.trained[-1] if self.trained else 0.0) + seconds)
            self._step_start, self._lost_seconds = time, 0.0
        self._last_time = self._step_start
        self.tokens.extend(_numbers(events, "tokens"))
        for name, column in self.columns.items():
            column.extend(_numbers(events, name))

    def _add_event(self, event: Event) -> None:
        kind, step = str(event.get("event")), event.get("step")
        time = _number(event.get("time"))
        if self._first_time is None and kind == "start":
            self._first_time = self._session_start = time
        if kind == "machine":  # a new session; time between sessions is not counted
            self._earlier_seconds, self._session_start = (self.clock[-1] if self.clock else 0.0), time
        if kind in ("start", "resume") and self._session_start:
            self._session_start = time
        if kind in _STORED_EVENTS:
            self.newest[kind] = event
        if kind == "start" and "step" in self.newest and _is_int(event.get("steps")):  # resumed with another number
            done = self.newest["step"]
            self.newest["step"] = {**done, "steps": max(event["steps"], done["step"])}
        if kind in _BEFORE_STEPS:
            self._step_start = time
        elif kind in ("eval", "save", "samples"):  # not part of the next step's time
            seconds = time - self._last_time if kind == "samples" else _number(event.get("seconds"))
            if math.isfinite(seconds):
                self._step_start += seconds
                self.eval_seconds += seconds if kind != "save" else 0.0
        self._last_time = time
        if kind == "note":
            self.notes = [*self.notes, str(event.get("text", ""))][-200:]
        if kind == "eval" and isinstance(step, int):
            self.newest["eval"] = event
            index = bisect_left(self.eval_steps, step)
            self.generation += index < len(self.eval_steps)
            del self.eval_steps[index:], self.evals[index:]
            self.eval_steps.append(step)
            self.evals.append(_number(event.get("loss")))
        if kind == "samples" and isinstance(step, int):
            self._add_samples(step, event["samples"][:MAX_SAMPLES])
        if kind == "answers" and isinstance(step, int):
            sample = {**event, "completion": event.get("answer")}
            if isinstance(event.get("messages"), list):  # in an environment
                prompt, turns = split_prompt(event["messages"])
                sample |= {"prompt": prompt, "completion": describe_turns(turns)}
            self._add_samples(step, [sample])
        before = self.trained[-1] if self.trained else 0.0
        last_valid = event.get("to") if kind == "rollback" else step if kind == "resume" else None
        if isinstance(last_valid, int) and self.steps and last_valid < self.steps[-1]:
            self._undo(last_valid)
            if kind == "rollback":  # a rollback keeps the time of the steps that it undoes
                self._lost_seconds += before - (self.trained[-1] if self.trained else 0.0)
            if kind == "resume":
                self._earlier_seconds = self.clock[-1] if self.clock else 0.0
        if kind == "resume" and isinstance(step, int):
            undone = find_undone_recoveries([earlier["event"] for earlier in self.marks], step)
            self.generation += bool(undone)
            self.marks = [earlier for index, earlier in enumerate(self.marks) if index not in undone]
        mark = mark_for(event)
        if mark is None:
            return
        self.num_marks += 1
        if kind == "save":
            self.num_saves += 1
            saves = [index for index, earlier in enumerate(self.marks) if earlier["kind"] == "save"]
            if len(saves) >= MAX_SAVES:
                del self.marks[saves[0]]
        elif len(self.marks) >= MAX_MARKS:
            self.marks_left_out += 1
            return
        self.marks.append(mark)

    def _add_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        self.samples.pop(step, None)
        self.samples[step] = [_sample(sample) for sample in samples]
        if len(self.samples) > MAX_SAMPLE_STEPS:  # rather the answer of a step than those of an evaluation
            del self.samples[min(self.samples, key=lambda number: (len(self.samples[number]) > 1, number))]

    def _undo(self, step: int) -> None:
        """Remove the values after `step`, because the run repeats these steps, and add their losses to `undone`."""
        index = bisect_right(self.steps, step)
        if index < len(self.steps):
            self.generation += 1
            losses = self.columns.get("loss", array("f"))
            self.undone += zip(self.steps[index:], losses[index:], strict=False)
            del self.undone[:-MAX_UNDONE]
        for column in [*self.columns.values(), self.clock, self.tokens, self.trained]:
            del column[index:]
        del self.steps[index:]
        index = bisect_right(self.eval_steps, step)
        del self.eval_steps[index:], self.evals[index:]
        self._epoch_starts = {epoch: start for epoch, start in self._epoch_starts.items() if start <= step}
        self.samples = {number: samples for number, samples in self.samples.items() if number <= step}
        undone = self.newest.pop("step", {})
        if self.steps:
            values = {name: column[-1] for name, column in self.columns.items() if math.isfinite(column[-1])}
            self.newest["step"] = {
                "event": "step", "time": self._last_time, "step": self.steps[-1], "steps": undone.get("steps"),
                "epoch": max(self._epoch_starts, default=undone.get("epoch")), **values, "tokens": int(self.tokens[-1]),
            }  # fmt: skip

    @property
    def steps_per_epoch(self) -> float | None:
        """Return the steps per epoch.

        Where an earlier version did not store them, they are estimated from the starts of two epochs, or from the
        number of rows and the batch size.
        """
        known = _number((self.newest.get("start") or {}).get("steps_per_epoch"))
        if known >= 1:
            return known
        starts = sorted(self._epoch_starts.items())
        if len(starts) > 1:
            (first, first_start), (last, last_start) = starts[0], starts[-1]
            return max(1.0, (last_start - first_start) / (last - first))
        report = (self.newest.get("data") or {}).get("report") or {}
        rows = count_used(report.get("rows") or {})
        batch = next((c["value"] for c in self.choices if c.get("field") == "train.batch_size"), None)
        if isinstance(batch, int) and rows and batch:
            return float(-(-(rows - int(report.get("held_out") or 0)) // batch) or 1)
        return None

    @property
    def choices(self) -> list[dict[str, Any]]:
        """Return the resolved recipe with the origin and reason of each value."""
        return list((self.newest.get("recipe") or {}).get("choices") or [])

    @property
    def last(self) -> dict[str, Any]:
        """Return the values of the last step, with times, mean speed, epochs and eval_loss of the run."""
        values = {name: value for name, value in (self.newest.get("step") or {}).items() if name != "event"}
        if _number((self.newest.get("start") or {}).get("time")) > _number(values.get("time")):
            values["seconds_left"] = None  # of a step before a resume
        if self.trained:
            values |= {"seconds": round_significant(self.trained[-1]), "eval_seconds": self.eval_seconds}
            predicted = (self.newest.get("rehearsal") or {}).get("predicted_seconds")
            planned = plan_of_steps(values.get("step"), values.get("steps"), predicted)
            values |= {"planned_seconds": planned, "is_slow": is_slower_than_planned(self.trained[-1], planned)}
            values["tokens_per_s"] = round_significant(self.tokens[-1] / max(self.trained[-1], 1e-9))
            values["epochs"] = round_significant(values.get("steps", math.nan) / (self.steps_per_epoch or math.nan))
        return values | {"eval_loss": round_significant(self.evals[-1])} if self.evals else values

    def axis(self, by: str, steps: Any) -> Values:
        """Return the positions of steps on an axis: step, epoch, tokens or time."""
        x = np.asarray(steps, dtype=np.float64)
        if by == "step" or not len(self.steps):
            return x
        if by == "epoch":
            return x / (self.steps_per_epoch or max(1.0, float(self.steps[-1])))
        column = self.tokens if by == "tokens" else self.clock
        positions: Values = np.interp(x, np.array(self.steps, np.float64), np.array(column, np.float64))
        return positions

    def curves(
        self, by: str = "step", points: int = 800, start: float | None = None, end: float | None = None,
        fields: tuple[str, ...] = (),
    ) -> dict[str, Any]:  # fmt: skip
        """Return series, by default all, between start and end. Long ones are reduced to extremes of `points` parts."""
        x = self.axis(by, self.steps)
        series: dict[str, Any] = {}
        for name, column in self.columns.items():  # one at a time, because each is as long as the run
            values = np.array(column, dtype=np.float64)
            if not fields or name in fields:
                series[name] = _reduce(x, values, start, end, points)
                if name == "loss" and start is not None:  # so that the smoothed curve is the same at every zoom
                    before = _select(x, values, None, np.nextafter(start, -np.inf))[1][-MAX_LEAD:]
                    series[name]["before"] = [round_significant(float(value)) for value in before]
            if name == "loss" and (not fields or "loss_mean" in fields):
                series |= _means(x, values, start, end, points)
        if not fields or "eval_loss" in fields:
            eval_x = self.axis(by, np.array(self.eval_steps, dtype=np.int64))
            series["eval_loss"] = _reduce(eval_x, np.array(self.evals, dtype=np.float64), start, end, points)
        if self.undone and (not fields or "undone" in fields):
            steps, losses = (np.array(values, dtype=np.float64) for values in zip(*self.undone, strict=True))
            series["undone"] = _reduce(self.axis(by, steps), losses, start, end, points)
        if self.num_bytes > TRIM_BYTES:
            trim_heap()
        return {
            "by": by, "range": [float(x[0]), float(x[-1])] if len(x) else None, "rows": len(x),
            "decimated": len(x) > 2 * points, "series": series, "last": self.last, "generation": self.generation,
        }  # fmt: skip


def _reduce(x: Values, y: Values, start: float | None, end: float | None, points: int) -> dict[str, list[Any]]:
    """Return the finite points between start and end, reduced to extremes if they are many."""
    x, y = _select(x, y, start, end)
    if len(y) > 2 * points:
        chosen = extremes(x, y, points)
        x, y = x[chosen], y[chosen]
    return _series(x, y)


def _means(x: Values, y: Values, start: float | None, end: float | None, points: int) -> dict[str, Any]:
    """Return the series loss_mean, which the page smooths, if `_reduce` leaves points out: a mean for each part."""
    x, y = _select(x, y, start, end)
    if len(y) <= 2 * points:
        return {}
    edges = np.linspace(0, len(x), points + 1, dtype=np.int64)
    sizes = np.diff(edges)
    means = np.add.reduceat(y, edges[:-1]) / sizes
    return {"loss_mean": {**_series(x[(edges[:-1] + edges[1:]) // 2], means), "steps": float(np.mean(sizes))}}


def _select(x: Values, y: Values, start: float | None, end: float | None) -> tuple[Values, Values]:
    """Return the finite points between start and end."""
    keep = np.isfinite(y) & np.isfinite(x)
    if start is not None:
        keep &= x >= start
    if end is not None:
        keep &= x <= end
    return x[keep], y[keep]


def _series(x: Values, y: Values) -> dict[str, Any]:
    return {
        "x": [round_significant(float(value), 9) for value in x],
        "y": [round_significant(float(value)) for value in y],
    }


def extremes(x: Values, y: Values, parts: int) -> NDArray[np.int64]:
    """Return the indices of both ends and of the minimum and maximum of each part of the range of x (increasing)."""
    edges = np.searchsorted(x, np.linspace(x[0], x[-1], parts + 1)[1:-1], side="left")
    chosen = {0, len(x) - 1}
    for low, high in zip([0, *edges.tolist()], [*edges.tolist(), len(x)], strict=True):
        if high > low:
            part = y[low:high]
            chosen |= {low + int(part.argmin()), low + int(part.argmax())}
    return np.array(sorted(chosen), dtype=np.int64)


def round_significant(value: float, digits: int = 6) -> float | None:
    """Round to `digits` significant digits. Returns None for NaN and infinity."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else float("nan")


def _numbers(events: list[Event], name: str) -> list[float]:
    """Return a field of all events, NaN for events without it."""
    try:  # fast if every event has the field
        values = [event[name] for event in events]
        array("d", values)
        return values
    except (KeyError, TypeError, OverflowError):
        return [_number(event.get(name)) for event in events]


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: str(sample.get(name) or "")[:MAX_SAMPLE_CHARS] for name in ("prompt", "reference", "completion")}
    reward = round_significant(_number(sample.get("reward")))
    return texts | ({"cut": True} if sample.get("cut") else {}) | ({} if reward is None else {"reward": reward})


def mark_for(event: dict[str, Any]) -> dict[str, Any] | None:
    """Return the mark of an event on the curves, or None for an event that has no mark."""
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
        suffix = f", {parameters['trainable']:,} trainable parameters" if _is_int(parameters.get("trainable")) else ""
        return f"starts at step {step} of {event.get('steps')} with the {event.get('engine')} step{suffix}"
    if kind == "rollback":
        scale = event.get("rate_scale")
        suffix = f"; learning rate times {scale:g}" if isinstance(scale, (int, float)) else ""
        return f"rolled back from step {step} to {event.get('to')}: {why}{suffix}"
    if kind == "stop":
        text = "stopped on request, after saving" if why == "signal" else f"stopped: {why}"
        return "; ".join([text, *map(str, event.get("advice") or [])])
    if kind == "rehearsal" and _is_int(event.get("predicted_bytes")) and _is_int(event.get("usable_bytes")):
        need, usable = event["predicted_bytes"] / 2**30, event["usable_bytes"] / 2**30
        action = "dry run of the largest micro-batch" if event.get("done") else "fits easily, dry run skipped"
        return f"{need:.2f} GiB predicted, {usable:.1f} GiB usable at that time: {action}"
    numbers = [str(row) for row in event.get("rows") or []] if kind in ("skip", "doubt") else []
    rows = f" (rows {', '.join(numbers[:4])}{', ...' if len(numbers) > 4 else ''})" if numbers else ""
    texts = {
        "resume": f"resumed from step {step} ({event.get('checkpoint')})",
        "save": f"saved {event.get('checkpoint')}",
        "skip": f"step {step} skipped: {why}{rows}",
        "doubt": f"step {step} accepted but suspicious: {why}{rows}",
        "override": f"{event.get('field')} changed from {event.get('was')} to {event.get('now')}",
        "shrink": f"out of memory at step {step}; now {event.get('to')}: {why}",
        "reference": f"log-probabilities of the reference: {_format(event.get('rows'))} rows computed",
        "reference-check": f"reference unchanged, log-probabilities differ by {_format(event.get('off'))} at most",
        "end": f"finished at step {step}",
        "note": str(event.get("text", "")),
    }
    if kind in texts:
        return texts[kind]
    fields = [key for key, value in event.items() if key not in ("event", "time", "step", "rows") and value is not None]
    text = ", ".join(f"{key} {_format(event[key])}" for key in fields)
    return f"{kind}: {text}" if text else kind


def _format(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return f"{value:,}" if _is_int(value) else str(value)[:200]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
