"""The table of runs, the details of a run, and its state.

A row is rebuilt only if a file of the run has changed, from its small files and from the start, the end and a few
samples of its events, so that the cost does not grow with the length of the run.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil

from strop.dash.files import CONTENT_ERRORS, file_sizes, limit_rows, read_bytes, read_chunks, read_json, run_path
from strop.dash.history import History, short
from strop.evaluation.metrics import Difference, rows_text, verdict
from strop.runs.events import parse_event
from strop.runs.folder import RunFolder, is_run

END_BYTES = 16 << 10
WHOLE_BYTES = 48 << 10  # events files up to this size are read whole for the sparkline
PLACES, PLACE_BYTES = 40, 1024  # samples of a longer file, and bytes per sample
PARTS = 20  # of the sparkline; each keeps its minimum and maximum
MOST_EVENTS = 40  # last events, which show what a run is doing
# the format of runs.events; other lines are only missing from the sparkline
_STEP = re.compile(
    rb'\{"event": "step", "time": [\d.]+, "step": (\d+), "steps": \d+, "epoch": \d+, '
    rb'"loss": (-?\d[\d.]*(?:e[-+]?\d+)?)[,}]'
)
_OF_STEP, _OF_EVAL = (b'{"event": "%s"' % kind for kind in (b"step", b"eval"))
_TIME = re.compile(rb'"time": ([\d.]+)')
EMPTY: Mapping[str, Any] = {
    **dict.fromkeys(("step", "steps", "epoch", "seconds_left", "seconds", "loss", "eval_loss", "tokens")),
    **dict.fromkeys(("tokens_per_s", "score", "model", "data", "objective", "preset", "quantization", "rank")),
    **dict.fromkeys(("started", "updated")),
    "sparkline": [], "bytes": 0, "has_adapter": False,
}  # fmt: skip
Signature = tuple[tuple[int, int] | None, ...]  # time and size of each of these files
SIGNATURE_FILES = ("events.jsonl", "report.json", "lock.json", "claim.json")


class RunTable:
    """The runs of a folder. Not thread-safe."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.watch = CpuUsage()
        self._known: dict[str, _Known] = {}

    def names(self) -> tuple[list[str], list[str]]:
        """Return folders that may be runs, and ignored entries with the reason."""
        found, ignored = [], []
        try:
            entries = list(os.scandir(self.root))
        except OSError:
            return [], []
        for entry in entries:
            if entry.name.startswith(".") or not (entry.is_symlink() or entry.is_dir()):
                continue
            if entry.is_symlink() or not entry.name.isprintable():
                ignored.append(f"{entry.name}: {'a link' if entry.is_symlink() else 'not a name for a run'}")
            else:
                found.append(entry.name)
        return found, sorted(ignored)

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows, newest first."""
        names = self.names()[0]
        for gone in self._known.keys() - set(names):
            del self._known[gone]
        rows = [row for name in names if (row := self.row(name)) is not None]
        return sorted(rows, key=lambda row: -(row["started"] or row["updated"] or 0))

    def row(self, name: str) -> dict[str, Any] | None:
        """Return the row of a run; None for a folder that is not a run."""
        seen = tuple(_stamp(f"{self.root}/{name}/{file}") for file in SIGNATURE_FILES)
        known = self._known.get(name)
        if known is None or known.seen != seen:
            known = self._known[name] = _Known(seen, _read_facts(RunFolder(run_path(self.root, name))))
        claimed = seen[3] is not None  # claim.json exists while a process owns the folder, or after it was killed
        if known.row is not None and not (claimed and known.live):
            return known.row
        facts = known.facts
        holder = RunFolder(Path(self.root, name)).holder if claimed else None
        known.live = holder is not None
        if not facts["is_run"] and holder is None:
            return None
        status = run_status(facts["events"], facts["ended"], holder, facts["heartbeat"], self.watch)
        if facts["damaged"] and holder is None:
            status = replace(status, why=facts["damaged"])
        row = {key: value for key, value in facts.items() if key not in ("events", "ended", "is_run", "damaged")}
        row |= {"state": status.state, "why": status.why, "phase": status.phase, "pid": holder}
        if status.state in ("finished", "stopped", "crashed"):
            row["seconds_left"] = None
        row["can"] = _possible_actions(status.state, facts["has_adapter"])
        known.row = row
        return row


@dataclass
class _Known:
    """Cached facts of a run. seen: signature of its files. live: a process owned the folder at that time."""

    seen: Signature
    facts: dict[str, Any]
    row: dict[str, Any] | None = None
    live: bool = True


def with_heartbeat_age(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with the current age of its heartbeat."""
    return {**row, "heartbeat_age": short(max(0.0, time.time() - row["heartbeat"]))}


def _possible_actions(state: str, adapter: bool) -> list[str]:
    if state in ("running", "stalled"):
        return ["stop"]
    after = ["evaluate", "export", "talk"] if adapter else []
    return [*(["resume"] if state != "finished" else []), "duplicate", "delete", *after]


def _stamp(file: str | Path) -> tuple[int, int] | None:
    try:
        found = os.lstat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _read_facts(folder: RunFolder) -> dict[str, Any]:
    try:
        facts = _facts(folder)
        json.dumps(facts)
        return facts
    except CONTENT_ERRORS as error:
        return {
            **EMPTY, "name": folder.path.name, "path": str(folder.path), "is_run": is_run(folder.path), "events": [],
            "ended": {}, "heartbeat": 0.0, "damaged": f"its files are damaged: {error}",
        }  # fmt: skip


def _facts(folder: RunFolder) -> dict[str, Any]:
    """Return all parts of a row that come from files."""
    lock, report = read_json(folder.lock), read_json(folder.report)
    values: Mapping[str, Any] = lock.get("values") or {}
    stamp = _stamp(folder.events)
    size, live = stamp[1] if stamp else 0, _stamp(folder.path / "claim.json") is not None
    first = _TIME.search(read_bytes(folder.events, 0, 256))
    step, evaluated, end = _end(folder.events, size, live=live)
    curve = _curve(folder.events, size)
    stamps = [seen for file in (folder.lock, folder.path / "claim.json", folder.path) if (seen := _stamp(file))]
    heartbeat = (stamp or max(stamps, default=(0, 0)))[0] / 1e9
    number = step.get("step") if step else curve[-1][0] if curve else 0
    loss = step.get("loss") if step else curve[-1][1] if curve else None
    return {
        "name": folder.path.name, "path": str(folder.path), "is_run": is_run(folder.path), "damaged": "",
        "events": [{key: event.get(key) for key in ("event", "time", "why")} for event in end], "heartbeat": heartbeat,
        "ended": {name: report.get(name) for name in ("exit", "ended")},
        "started": float(first[1]) if first else None, "updated": heartbeat or None,
        "model": values.get("model.name"), "data": _text(values.get("data.train")),
        "objective": values.get("train.objective"), "preset": values.get("preset"),
        "quantization": values.get("model.quantization"), "rank": values.get("lora.r"),
        "step": report.get("steps", number), "steps": step.get("steps") or report.get("steps"),
        "epoch": step.get("epoch"), "seconds_left": step.get("seconds_left"),
        "seconds": report.get("seconds"), "loss": loss, "eval_loss": report.get("eval_loss", evaluated.get("loss")),
        "tokens": report.get("tokens", step.get("tokens")),
        "tokens_per_s": report.get("tokens_per_s", step.get("tokens_per_s")),
        "score": evaluation_score(report), "sparkline": curve,
        "bytes": sum(size for _, size in file_sizes(folder.path)),
        "has_adapter": (folder.adapter / "adapter_config.json").is_file(),
    }  # fmt: skip


def _text(value: Any) -> str | None:
    return ", ".join(map(str, value)) if isinstance(value, list) else None if value is None else str(value)


def evaluation_score(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the evaluation score with interval and verdict; None without an evaluation."""
    found = report.get("evaluation") or {}
    metric, tuned, base = found.get("metric"), found.get("tuned") or {}, found.get("base") or {}
    if not isinstance(tuned.get(metric), (int, float)):
        return None
    low, high = (report.get("intervals") or {}).get("tuned") or (None, None)
    score = {"metric": metric, "value": tuned[metric], "low": low, "high": high, "base": base.get(metric)}
    score |= {"rows": found.get("rows"), "difference": found.get("difference"), "verdict": "plain", "words": ""}
    try:
        change = Difference(*(found["difference"][name] for name in ("value", "low", "high")))
        kind, words = verdict(change)
        text = f"{metric} went from {base[metric]:.1%} to {tuned[metric]:.1%} on {rows_text(found)}"
        score |= {"verdict": kind, "words": f"{words[0].upper()}{words[1:]}: {text}."}
    except (KeyError, TypeError, ValueError):
        pass
    return score


def _end(file: Path, size: int, *, live: bool) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Return the last step, the last evaluation and the last events (more for a live run, to see its pace)."""
    for reach in (END_BYTES, 64 * END_BYTES):  # after a fresh resume, steps are further back
        start = max(0, size - reach)
        lines = read_bytes(file, start, reach).split(b"\n")[1 if start else 0 : -1]
        steps, evaluated = ([line for line in lines if line.startswith(kind)][-1:] for kind in (_OF_STEP, _OF_EVAL))
        if start == 0 or steps:
            break
    step, score, last = (
        [event for line in part if (event := parse_event(line)) is not None]
        for part in (steps, evaluated, lines[-MOST_EVENTS if live else -1 :])
    )
    return step[0] if step else {}, score[0] if score else {}, last


def _curve(file: Path, size: int) -> list[tuple[int, float]]:
    """Return the loss at a few points: from all steps of a short file, otherwise from evenly spaced samples."""
    if size <= WHOLE_BYTES:
        found = _STEP.findall(read_bytes(file, 0, WHOLE_BYTES))
    else:
        starts = [place * (size - PLACE_BYTES) // (PLACES - 1) for place in range(PLACES)]
        found = [match.groups() for part in read_chunks(file, starts, PLACE_BYTES) if (match := _STEP.search(part))]
    points = sorted({int(step): float(loss) for step, loss in found}.items())
    if len(points) > 2 * PARTS:
        low, high = points[0][0], points[-1][0]
        parts: dict[int, list[tuple[int, float]]] = {}
        for point in points:
            parts.setdefault((point[0] - low) * PARTS // (high - low + 1), []).append(point)
        both = (end(part, key=lambda point: point[1]) for part in parts.values() for end in (min, max))
        points = sorted({*both, points[-1]})
    return [(step, float(f"{loss:.4g}")) for step, loss in points]


MOST_FILES = 500
MOST_PLACES = 1000  # dropped and truncated rows listed


def detail(row: dict[str, Any], history: History) -> dict[str, Any]:
    """Return the details of a run. row: its row of the table. history: its events so far."""
    folder = RunFolder(Path(row["path"]))
    report, lock, newest = read_json(folder.report), read_json(folder.lock), history.newest
    data, start = newest.get("data") or {}, newest.get("start") or {}
    files = file_sizes(folder.path)
    adapter = [size for name, size in files if name.startswith("adapter/")]
    return {
        **row,
        "recipe": history.choices or report.get("recipe") or [],
        "machine": (newest.get("machine") or {}).get("lines") or [],
        "engine": {"name": start.get("engine"), "why": start.get("why")} if start else None,
        "parameters": start.get("parameters"),
        "data_report": limit_rows(data.get("report") or report.get("data_report"), MOST_PLACES),
        "notes": history.notes,
        "memory": _memory(report, newest.get("rehearsal") or {}),
        "checkpoints": _checkpoints(files, report),
        "adapter": {"path": str(folder.adapter), "bytes": sum(adapter), "step": report.get("adapter_step")}
        if adapter
        else None,
        "report": {name: report.get(name) for name in _REPORTED if name in report} if report else None,
        "report_page": str(folder.page) if folder.page.is_file() else None,
        "lock": {name: lock.get(name) for name in ("base", "data", "template", "seed", "versions", "overrides")},
        "marks": with_axis_positions(history, history.marks),
        "marks_left_out": history.marks_left_out,
        "has_answers": folder.answers.is_file(),
        "resume": f"strop resume {folder.path}",
    }


_REPORTED = (
    "steps", "seconds", "eval_seconds", "save_seconds", "tokens", "supervised_tokens", "tokens_per_s", "loss",
    "eval_loss", "objective", "skipped_steps", "rollbacks", "weight_change", "diagnosis", "ended", "data",
    "evaluation", "intervals", "general", "regression", "tasks", "exit",
)  # fmt: skip


def with_axis_positions(history: History, marks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return marks with their position on each axis."""
    steps = np.array([np.nan if mark["step"] is None else mark["step"] for mark in marks], dtype=np.float64)
    places = {by: history.axis(by, steps) for by in ("epoch", "tokens", "time")} if marks else {}
    return [
        {**mark, "at": {"step": mark["step"], **{by: short(float(x[number]), 9) for by, x in places.items()}}}
        for number, mark in enumerate(marks)
    ]


def _memory(report: dict[str, Any], dry_run: dict[str, Any]) -> dict[str, Any]:
    """Return predicted and measured memory; before a run ends, from the dry run."""
    result = report.get("memory") or {}
    return {
        "predicted_peak_bytes": result.get("predicted_peak_bytes", dry_run.get("predicted_bytes")),
        "calibrated_peak_bytes": result.get("calibrated_peak_bytes"),
        "measured_peak_bytes": result.get("measured_peak_bytes", dry_run.get("measured_bytes")),
        "usable_bytes": dry_run.get("usable_bytes"),
        "predicted": result.get("predicted"),
    }


def _checkpoints(files: list[tuple[str, int]], report: dict[str, Any]) -> list[dict[str, Any]]:
    totals: Counter[int] = Counter()
    for name, size in files:
        if match := re.match(r"checkpoints/step-(\d+)/", name):
            totals[int(match[1])] += size
    best = report.get("adapter_step")
    return [{"step": step, "bytes": size, "best": step == best} for step, size in sorted(totals.items())]


def contents(folder: Path) -> dict[str, Any]:
    """Return the files that deleting a run removes."""
    files = file_sizes(folder)
    return {
        "name": folder.name, "path": str(folder), "bytes": sum(size for _, size in files), "num_files": len(files),
        "files": [{"path": name, "bytes": size} for name, size in files[:MOST_FILES]],
    }  # fmt: skip


State = Literal["running", "stalled", "stopped", "crashed", "finished"]
# seconds without events, and GAPS times the usual interval, after which a run counts as stalled
LEAST_STALLED_S = 120.0
LOADING_STALLED_S = 1800.0  # before the first step, when a model may be downloading
BUSY_STALLED_S = 1800.0  # while the process is busy: an evaluation is one event
GAPS, LONGEST_GAPS = 20, 5
BUSY = 0.2  # fraction of a core


@dataclass(frozen=True)
class RunStatus:
    state: State
    why: str
    phase: str | None


class CpuUsage:
    """CPU usage of processes between calls."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float, float | None]] = {}

    def share(self, pid: int) -> float | None:
        """Return cores used since the previous call, at least a second ago; None at the first call."""
        try:
            used = psutil.Process(pid).cpu_times()
        except psutil.Error:
            self._seen.pop(pid, None)
            return None
        now, spent = time.monotonic(), used.user + used.system
        before = self._seen.get(pid)
        if before is not None and now - before[0] < 1:
            return before[2]
        share = None if before is None else (spent - before[1]) / (now - before[0])
        self._seen[pid] = (now, spent, share)
        return share


def run_status(
    events: list[dict[str, Any]], report: dict[str, Any], holder: int | None, heartbeat: float, watch: CpuUsage
) -> RunStatus:
    """Return the state of a run. holder: id of the process that owns the folder. heartbeat: Unix time in seconds."""
    if holder is not None:
        return _live_status(events, holder, heartbeat, watch)
    if report.get("exit") == 0 and report.get("ended") != "time":
        ended = {"patience": "early stopping"}.get(str(report.get("ended")), "")
        return RunStatus("finished", ended, None)
    last = events[-1] if events else {}
    if report.get("exit") == 0:
        return RunStatus("stopped", "time budget used up", None)
    if last.get("event") == "stop":
        why = str(last.get("why") or "")
        return RunStatus("stopped", "by a signal, after saving" if why == "signal" else why, None)
    return RunStatus("crashed", "the process ended without a reason", None)


def _live_status(events: list[dict[str, Any]], holder: int, heartbeat: float, watch: CpuUsage) -> RunStatus:
    kinds = [event.get("event") for event in events]
    began = max((place for place, kind in enumerate(kinds) if kind == "machine"), default=-1)
    here = kinds[began + 1 :]
    phase = "training" if "step" in here or "start" in here else "loading" if kinds else "preparing"
    age, share = time.time() - heartbeat, watch.share(holder)
    try:
        if psutil.Process(holder).status() == psutil.STATUS_STOPPED:
            return RunStatus("stalled", "the process is suspended", phase)
    except psutil.Error:
        pass
    limit = LOADING_STALLED_S
    if phase == "training":
        times = [event["time"] for event in events[began + 1 :] if isinstance(event.get("time"), (int, float))]
        gaps = [later - earlier for earlier, later in pairwise(times) if later >= earlier]
        limit = max(LEAST_STALLED_S, GAPS * statistics.median(gaps), LONGEST_GAPS * max(gaps)) if gaps else limit
        if share is not None and share > BUSY:
            limit = max(limit, BUSY_STALLED_S)
    if age <= limit:
        return RunStatus("running", "", phase)
    busy = "" if share is None else f"; the process uses {share:.0%} of a core"
    length = f"{age:.0f} s" if age < 120 else f"{age / 60:.0f} min"
    return RunStatus("stalled", f"no event for {length}{busy}", phase)
