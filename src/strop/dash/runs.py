"""The table of runs, the details of a run, and its state.

A row of the table is made from the small files of a run and from the start, the end and a few samples of its events,
so that the cost does not grow with the length of the run. It is made again only after a file has changed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil

from strop.dash.files import (
    CONTENT_ERRORS,
    file_sizes,
    file_stamp,
    limit_rows,
    read_bytes,
    read_chunks,
    read_json,
    run_path,
)
from strop.dash.history import History, round_significant
from strop.dash.jobs import shell_command
from strop.dash.notes import NOTES_FILE, read_notes, with_folder
from strop.display.tables import describe_caveat
from strop.evaluation.metrics import describe_baseline, describe_change, describe_rows, format_score, score_name
from strop.runs.events import list_row_counts, parse_event
from strop.runs.folder import RunFolder, is_run

NOT_GENERATING = ("SEQ_CLS", "FEATURE_EXTRACTION")  # PEFT's task types; models.adapter_config would load pydantic
TAIL_BYTES = 16 << 10
MAX_WHOLE_BYTES = 48 << 10  # the sparkline uses all steps of an events file up to this size
NUM_SAMPLES, SAMPLE_BYTES = 40, 1024  # for the sparkline of a larger file
SPARKLINE_PARTS = 20  # each keeps its minimum and maximum
NUM_EVENTS = 40  # last events of a live run, from which its state is derived
# the format that runs.events writes; a line that does not match is only missing from the sparkline
_STEP = re.compile(
    rb'\{"event": "step", "time": [\d.]+, "step": (\d+), "steps": \d+, "epoch": \d+, '
    rb'"loss": (-?\d[\d.]*(?:e[-+]?\d+)?)[,}]'
)
_SCANNED = _STEP_START, _EVAL_START, _RUN_START, _RESUME_START, _ROLLBACK_START = [
    b'{"event": "%s"' % kind for kind in (b"step", b"eval", b"start", b"resume", b"rollback")
]
_TIME = re.compile(rb'"time": ([\d.]+)')
EMPTY: Mapping[str, Any] = {
    **dict.fromkeys((
        "step", "steps", "epoch", "seconds_left", "step_time", "seconds", "loss", "eval_loss", "tokens",
        "tokens_per_s", "score", "model", "data", "objective", "preset", "quantization", "rank", "started", "updated",
    )),
    "sparkline": [], "bytes": 0, "has_adapter": False, "generates": False, "note": "", "tags": [],
}  # fmt: skip
SIGNATURE_FILES = ("events.jsonl", "report.json", "lock.json", "claim.json", NOTES_FILE)
Signature = tuple[tuple[int, int] | None, ...]  # modification time and size of each of these files


class RunTable:
    """The runs of a folder. Not thread-safe."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cpu_usage = CpuUsage()
        self._cache: dict[str, _CachedRun] = {}

    def names(self) -> tuple[list[str], list[str]]:
        """Return the names of folders that may be runs, and descriptions of ignored entries."""
        names, ignored = [], []
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
                names.append(entry.name)
        return names, sorted(ignored)

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows, newest first."""
        names = self.names()[0]
        for removed in self._cache.keys() - set(names):
            del self._cache[removed]
        rows = [row for name in names if (row := self.row(name)) is not None]
        return sorted(rows, key=lambda row: -(row["started"] or row["updated"] or 0))

    def row(self, name: str) -> dict[str, Any] | None:
        """Return the row of a run; None for a folder that is not a run."""
        signature = tuple(file_stamp(f"{self.root}/{name}/{file}") for file in SIGNATURE_FILES)
        cached = self._cache.get(name)
        if cached is None or cached.signature != signature:
            cached = self._cache[name] = _CachedRun(signature, _read_facts(RunFolder(run_path(self.root, name))))
        claimed = signature[3] is not None  # claim.json exists while a process owns the folder, or after it was killed
        if cached.row is not None and not (claimed and cached.live):
            return cached.row
        facts = cached.facts
        holder = RunFolder(Path(self.root, name)).holder if claimed else None
        cached.live = holder is not None
        if not facts["is_run"] and holder is None:
            return None
        status = run_status(facts["events"], facts["ended"], holder, facts["heartbeat"], self.cpu_usage)
        if facts["damaged"] and holder is None:
            status = replace(status, why=facts["damaged"])
        row = {key: value for key, value in facts.items() if key not in ("events", "ended", "is_run", "damaged")}
        row |= {"state": status.state, "why": status.why, "phase": status.phase, "pid": holder}
        kinds = (event["event"] for event in reversed(facts["events"]))
        if status.phase != "training" or "step" not in takewhile(lambda kind: kind != "start", kinds):
            # the steps are from before a resume
            row["seconds_left"] = None
        row["can"] = _possible_actions(status.state, facts["has_adapter"], facts["generates"])
        cached.row = row
        return row


@dataclass
class _CachedRun:
    signature: Signature
    facts: dict[str, Any]
    row: dict[str, Any] | None = None
    live: bool = True  # whether a process owned the folder when the row was made


def with_heartbeat_age(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with the seconds since its last heartbeat."""
    return {**row, "heartbeat_age": round_significant(max(0.0, time.time() - row["heartbeat"]))}


def _possible_actions(state: str, has_adapter: bool, generates: bool) -> list[str]:
    if state in ("running", "stalled"):
        return ["stop"]
    actions = ["duplicate", "delete"] if state == "finished" else ["resume", "duplicate", "delete"]
    return [*actions, "evaluate", "export", *(["chat"] if generates else [])] if has_adapter else actions


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
    """Return the fields of a row that come from files, and the fields from which `RunTable.row` derives its state."""
    lock, report = read_json(folder.lock), read_json(folder.report)
    values: Mapping[str, Any] = lock.get("values") or {}
    stamp = file_stamp(folder.events)
    size, claim = stamp[1] if stamp else 0, folder.path / "claim.json"
    first_time = _TIME.search(read_bytes(folder.events, 0, 256))
    step, evaluated, last_events = read_last_events(folder.events, live=file_stamp(claim) is not None)
    sparkline = [point for point in _read_sparkline(folder.events, size) if point[0] <= step.get("step", point[0])]
    other_stamps = [other for file in (folder.lock, claim, folder.path) if (other := file_stamp(file))]
    heartbeat = (stamp or max(other_stamps, default=(0, 0)))[0] / 1e9
    last: tuple[Any, Any] = sparkline[-1] if sparkline else (0, None)
    last_step, loss = (step.get("step"), step.get("loss")) if step else last
    # Of a resumed run, report.json is from before the resume until the run ends again.
    now = {} if (last_step or 0) > (report.get("steps") or 0) else report
    return {
        "name": folder.path.name, "path": str(folder.path), "is_run": is_run(folder.path), "damaged": "",
        "events": [{key: event.get(key) for key in ("event", "time", "why")} for event in last_events],
        "ended": {name: report.get(name) for name in ("exit", "ended")}, "heartbeat": heartbeat,
        "started": float(first_time[1]) if first_time else None, "updated": heartbeat or None,
        "model": values.get("model.name"), "data": join_text(values.get("data.train")),
        "objective": values.get("train.objective"), "preset": values.get("preset"),
        "quantization": values.get("model.quantization"),
        "rank": None if values.get("train.method") == "full" else values.get("lora.r"),
        "step": now.get("steps", last_step), "steps": step.get("steps") or report.get("steps"),
        "epoch": step.get("epoch"), "seconds_left": step.get("seconds_left"), "step_time": step.get("time"),
        "seconds": now.get("seconds"), "loss": loss, "eval_loss": now.get("eval_loss", evaluated.get("loss")),
        "tokens": now.get("tokens", step.get("tokens")),
        "tokens_per_s": now.get("tokens_per_s", step.get("tokens_per_s")),
        "score": evaluation_score(report), "sparkline": sparkline,
        "bytes": sum(size for _, size in file_sizes(folder.path)),
        "has_adapter": folder.is_saved,
        # models with a score head and models of embeddings do not
        "generates": read_json(folder.adapter / "adapter_config.json").get("task_type") not in NOT_GENERATING,
        **read_notes(folder.path),
    }  # fmt: skip


def join_text(value: Any) -> str | None:
    """Return a value of a recipe as text: a list with commas."""
    return ", ".join(map(str, value)) if isinstance(value, list) else None if value is None else str(value)


def evaluation_score(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the score of the last evaluation with its interval and verdict, or None if there is none."""
    evaluation = report.get("evaluation") or {}
    metric, tuned, base = evaluation.get("metric"), evaluation.get("tuned") or {}, evaluation.get("base") or {}
    if not isinstance(tuned.get(metric), (int, float)):
        return None
    low, high = (report.get("intervals") or {}).get("tuned") or (None, None)
    score = {"metric": metric, "value": tuned[metric], "low": low, "high": high, "base": base.get(metric)}
    score |= {"rows": evaluation.get("rows"), "difference": evaluation.get("difference")}
    score |= {"spec": evaluation.get("metric_spec")}
    score |= {"verdict": "plain", "words": "", "caveat": describe_caveat(evaluation)}
    try:
        kind, words = describe_change(evaluation)
        before, after = (format_score(str(metric), side[metric]) for side in (base, tuned))
        text = f"{score_name(str(metric), metric)} went from {before} to {after} on {describe_rows(evaluation)}"
        score |= {"verdict": kind, "words": f"{words[0].upper()}{words[1:]}: {text}."}
    except (KeyError, TypeError, ValueError):
        pass
    if baseline := describe_baseline(evaluation):
        words = f"{baseline[1][0].upper()}{baseline[1][1:]}."
        score |= {"verdict": baseline[0], "words": " ".join(filter(None, [score["words"], words]))}
    return score


def read_last_events(file: Path, *, live: bool) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Return the last step, the last evaluation, and the last event or, of a live run, the last NUM_EVENTS."""
    size = (file_stamp(file) or (0, 0))[1]
    for limit in (TAIL_BYTES, 64 * TAIL_BYTES):  # the second is needed after a resume, which adds many other events
        start = max(0, size - limit)
        lines = read_bytes(file, start, limit).split(b"\n")[1 if start else 0 : -1]
        step, evaluated = _find_last_valid(lines)
        if start == 0 or step:
            break
    last = [event for line in lines[-NUM_EVENTS if live else -1 :] if (event := parse_event(line)) is not None]
    return step, evaluated, last


def _find_last_valid(lines: Sequence[bytes]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the last step and the last evaluation that no later resume or rollback has undone."""
    found: dict[bytes, dict[str, Any]] = {}
    valid, steps = math.inf, None  # the last step that is still valid, and the total after a resume
    for line in reversed(lines):
        kind = next((kind for kind in _SCANNED if line.startswith(kind)), None)
        if kind is None or kind in found or (event := parse_event(line)) is None:
            continue
        number = event.get("to" if kind == _ROLLBACK_START else "step")
        if kind in (_STEP_START, _EVAL_START):
            if isinstance(number, int) and number <= valid:
                found[kind] = event
        elif kind == _RUN_START:
            if _STEP_START not in found:
                steps = steps or event.get("steps")
        elif isinstance(number, int):
            valid = min(valid, number)
        if len(found) == 2:
            break
    step = found.get(_STEP_START, {})
    return step | ({"steps": max(steps, step["step"])} if step and steps else {}), found.get(_EVAL_START, {})


def _read_sparkline(file: Path, size: int) -> list[tuple[int, float]]:
    """Return the loss at a few steps: of all steps of a small file, otherwise of evenly spaced samples."""
    if size <= MAX_WHOLE_BYTES:
        values = _STEP.findall(read_bytes(file, 0, MAX_WHOLE_BYTES))
    else:
        starts = [index * (size - SAMPLE_BYTES) // (NUM_SAMPLES - 1) for index in range(NUM_SAMPLES)]
        values = [match.groups() for part in read_chunks(file, starts, SAMPLE_BYTES) if (match := _STEP.search(part))]
    points = sorted({int(step): float(loss) for step, loss in values}.items())
    if len(points) > 2 * SPARKLINE_PARTS:
        low, high = points[0][0], points[-1][0]
        parts: dict[int, list[tuple[int, float]]] = {}
        for point in points:
            parts.setdefault((point[0] - low) * SPARKLINE_PARTS // (high - low + 1), []).append(point)
        extremes = (choose(part, key=lambda point: point[1]) for part in parts.values() for choose in (min, max))
        points = sorted({*extremes, points[-1]})
    return [(step, float(f"{loss:.4g}")) for step, loss in points]


MAX_LISTED_FILES = 500
MAX_LISTED_ROWS = 1000  # of dropped and truncated rows each


def detail(row: dict[str, Any], history: History) -> dict[str, Any]:
    """Return the details of a run from its row of the table, its events and its files."""
    folder = RunFolder(Path(row["path"]))
    report, lock, newest = read_json(folder.report), read_json(folder.lock), history.newest
    data, start = newest.get("data") or {}, newest.get("start") or {}
    data_report = data.get("report") or report.get("data_report")
    files = file_sizes(folder.path)
    kind = folder.saved.name
    sizes = [size for name, size in files if name.startswith(f"{kind}/")]
    adapter = {"kind": kind, "path": str(folder.saved), "bytes": sum(sizes), "step": report.get("adapter_step")}
    return {
        **row,
        "recipe": with_folder(history.choices or report.get("recipe") or [], folder.path),
        "machine": (newest.get("machine") or {}).get("lines") or [],
        "engine": {"name": start.get("engine"), "why": start.get("why")} if start else None,
        "parameters": start.get("parameters"),
        "data_report": limit_rows(data_report, MAX_LISTED_ROWS),
        "row_counts": list(list_row_counts(data_report)) if data_report else [],
        "notes": history.notes,
        "memory": _memory(report, newest.get("rehearsal") or {}),
        "checkpoints": _checkpoints(files, report),
        "adapter": adapter if sizes else None,
        "report": {name: report.get(name) for name in _REPORTED if name in report} if report else None,
        "report_page": str(folder.page) if folder.page.is_file() else None,
        "lock": {name: lock.get(name) for name in ("base", "data", "template", "seed", "versions", "overrides")},
        "marks": with_axis_positions(history, history.marks),
        "marks_left_out": history.marks_left_out,
        "sample_steps": list(reversed(history.samples)),
        "has_answers": folder.answers.is_file(),
        "resume": shell_command(["resume", str(folder.path)]),
    }


_REPORTED = (
    "steps", "seconds", "eval_seconds", "save_seconds", "tokens", "supervised_tokens", "tokens_per_s", "loss",
    "eval_loss", "objective", "skipped_steps", "rollbacks", "weight_change", "diagnosis", "ended", "data",
    "evaluation", "intervals", "general", "regression", "tasks", "exit",
)  # fmt: skip


def with_axis_positions(history: History, marks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the marks (events that curves show as lines) with their position on each axis."""
    steps = np.array([np.nan if mark["step"] is None else mark["step"] for mark in marks], dtype=np.float64)
    axes = {by: history.axis(by, steps) for by in ("epoch", "tokens", "time")} if marks else {}
    return [
        {**mark, "at": {"step": mark["step"], **{by: round_significant(float(x[index]), 9) for by, x in axes.items()}}}
        for index, mark in enumerate(marks)
    ]


def _memory(report: dict[str, Any], dry_run: dict[str, Any]) -> dict[str, Any]:
    """Return predicted and measured memory, from the report or, before the run ends, from the dry run.

    All are peaks of what training adds to the process, or of PyTorch's memory on a GPU, except resident_bytes: the size
    of the process before the model was loaded, without shared libraries.
    """
    memory = report.get("memory") or {}
    return {
        "predicted_peak_bytes": memory.get("predicted_peak_bytes", dry_run.get("predicted_bytes")),
        "calibrated_peak_bytes": memory.get("calibrated_peak_bytes"),
        "measured_peak_bytes": memory.get("measured_peak_bytes"),
        "dry_run_bytes": dry_run.get("measured_bytes"),
        "resident_bytes": dry_run.get("resident_bytes"),
        "usable_bytes": dry_run.get("usable_bytes"),
        "predicted": memory.get("predicted"),
    }


def _checkpoints(files: list[tuple[str, int]], report: dict[str, Any]) -> list[dict[str, Any]]:
    totals: Counter[int] = Counter()
    for name, size in files:
        if match := re.match(r"checkpoints/step-(\d+)/", name):
            totals[int(match[1])] += size
    best = None if report.get("eval_loss") is None else report.get("adapter_step")  # without an evaluation, the last
    return [{"step": step, "bytes": size, "best": step == best} for step, size in sorted(totals.items())]


def contents(folder: Path) -> dict[str, Any]:
    """Return the files that deleting a run removes."""
    files = file_sizes(folder)
    return {
        "name": folder.name, "path": str(folder), "bytes": sum(size for _, size in files), "num_files": len(files),
        "files": [{"path": name, "bytes": size} for name, size in files[:MAX_LISTED_FILES]],
    }  # fmt: skip


State = Literal["running", "stalled", "stopped", "crashed", "finished"]
# A run is stalled if it has no event for the largest of: this time, and multiples of the median and of the longest time
# between its events.
MIN_STALLED_S = 120.0
LOADING_STALLED_S = 1800.0  # before the first step, when a model may be downloading
BUSY_STALLED_S = 1800.0  # while the process is busy, since an evaluation writes a single event
MEDIAN_FACTOR, LONGEST_FACTOR = 20, 5
BUSY_CORES = 0.2


@dataclass(frozen=True)
class RunStatus:
    state: State
    why: str
    phase: str | None


class CpuUsage:
    """CPU usage of processes between calls."""

    def __init__(self) -> None:
        # time, CPU seconds of the process and its children by id and start, and the result
        self._samples: dict[int, tuple[float, dict[tuple[int, float], float], float | None]] = {}

    def cores(self, pid: int) -> float | None:
        """Return the mean number of cores used since the last call, at least 1 s ago; None at the first call.

        Child processes count too: they compile kernels.
        """
        now, previous = time.monotonic(), self._samples.get(pid)
        if previous is not None and now - previous[0] < 1 and psutil.pid_exists(pid):
            return previous[2]
        used: dict[tuple[int, float], float] = {}
        try:
            process = psutil.Process(pid)
            used[pid, process.create_time()] = _cpu_seconds(process)
            children = process.children(recursive=True)
        except psutil.Error:
            self._samples.pop(pid, None)
            return None
        for child in children:
            with contextlib.suppress(psutil.Error):
                used[child.pid, child.create_time()] = _cpu_seconds(child)
        cores = None
        if previous is not None:  # a child that ended takes its seconds with it
            cores = sum(seconds - previous[1].get(key, 0.0) for key, seconds in used.items()) / (now - previous[0])
        self._samples[pid] = (now, used, cores)
        return cores


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def run_status(
    events: list[dict[str, Any]], report: dict[str, Any], holder: int | None, heartbeat: float, cpu_usage: CpuUsage
) -> RunStatus:
    """Return the state of a run. holder: id of the process that owns the folder. heartbeat: Unix time in seconds."""
    if holder is not None:
        return _live_status(events, holder, heartbeat, cpu_usage)
    if report.get("exit") == 0:
        if report.get("ended") == "time":
            return RunStatus("stopped", "time budget used up", None)
        why = {"patience": "early stopping", "pruned": "pruned by a sweep"}.get(str(report.get("ended")), "")
        return RunStatus("finished", why, None)
    last = events[-1] if events else {}
    if last.get("event") == "stop":
        why = str(last.get("why") or "")
        return RunStatus("stopped", "on request, after saving" if why == "signal" else why, None)
    return RunStatus("crashed", "the process ended without a reason", None)


def _live_status(events: list[dict[str, Any]], holder: int, heartbeat: float, cpu_usage: CpuUsage) -> RunStatus:
    session_start = max((i for i, event in enumerate(events) if event.get("event") == "machine"), default=-1)
    session = events[session_start + 1 :]
    started = any(event.get("event") in ("step", "start") for event in session)
    phase = "training" if started else "loading" if events else "preparing"
    age, cores = time.time() - heartbeat, cpu_usage.cores(holder)
    try:
        if psutil.Process(holder).status() == psutil.STATUS_STOPPED:
            return RunStatus("stalled", "the process is suspended", phase)
    except psutil.Error:
        pass
    limit = LOADING_STALLED_S
    if phase == "training":
        times = [event["time"] for event in session if isinstance(event.get("time"), (int, float))]
        gaps = [later - earlier for earlier, later in pairwise(times) if later >= earlier]
        if gaps:
            limit = max(MIN_STALLED_S, MEDIAN_FACTOR * statistics.median(gaps), LONGEST_FACTOR * max(gaps))
        if cores is not None and cores > BUSY_CORES:
            limit = max(limit, BUSY_STALLED_S)
    if age <= limit:
        return RunStatus("running", "", phase)
    usage = "" if cores is None else f"; the process uses {cores:.0%} of a core"
    duration = f"{age:.0f} s" if age < 120 else f"{age / 60:.0f} min"
    return RunStatus("stalled", f"no event for {duration}{usage}", phase)
