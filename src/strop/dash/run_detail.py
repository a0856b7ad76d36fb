"""All of one run that its page shows, out of its folder and its events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from strop.dash.files import read_json, sizes
from strop.dash.history import History, short
from strop.runs.folder import RunFolder

MOST_FILES = 500
MOST_PLACES = 1000  # of dropped and cut rows


def detail(row: dict[str, Any], history: History) -> dict[str, Any]:
    """row: its line of the table. history: its events, read up to now."""
    folder = RunFolder(Path(row["path"]))
    report, lock, newest = read_json(folder.report), read_json(folder.lock), history.newest
    data, start = newest.get("data") or {}, newest.get("start") or {}
    files = sizes(folder.path)
    adapter = [size for name, size in files if name.startswith("adapter/")]
    return {
        **row,
        "recipe": history.choices or report.get("recipe") or [],
        "machine": (newest.get("machine") or {}).get("lines") or [],
        "engine": {"name": start.get("engine"), "why": start.get("why")} if start else None,
        "parameters": start.get("parameters"),
        "data_report": _brief(data.get("report") or report.get("data_report")),
        "notes": history.notes,
        "memory": _memory(report, newest.get("rehearsal") or {}),
        "checkpoints": _checkpoints(files, report),
        "adapter": {"path": str(folder.adapter), "bytes": sum(adapter), "step": report.get("adapter_step")}
        if adapter
        else None,
        "report": {name: report.get(name) for name in _REPORTED if name in report} if report else None,
        "report_page": str(folder.page) if folder.page.is_file() else None,
        "lock": {name: lock.get(name) for name in ("base", "data", "template", "seed", "versions", "overrides")},
        "marks": placed(history, history.marks),
        "marks_left_out": history.marks_left_out,
        "has_answers": folder.answers.is_file(),
        "resume": f"strop resume {folder.path}",
    }


_REPORTED = (
    "steps", "seconds", "eval_seconds", "save_seconds", "tokens", "supervised_tokens", "tokens_per_s", "loss",
    "eval_loss", "objective", "skipped_steps", "rollbacks", "weight_change", "diagnosis", "ended", "data",
    "evaluation", "intervals", "general", "regression", "tasks", "exit",
)  # fmt: skip


def placed(history: History, marks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Marks with their place on each axis."""
    steps = np.array([np.nan if mark["step"] is None else mark["step"] for mark in marks], dtype=np.float64)
    places = {by: history.axis(by, steps) for by in ("epoch", "tokens", "time")} if marks else {}
    return [
        {**mark, "at": {"step": mark["step"], **{by: short(float(x[number]), 9) for by, x in places.items()}}}
        for number, mark in enumerate(marks)
    ]


def _brief(report: dict[str, Any] | None) -> dict[str, Any] | None:
    """The account of the data without endless lists."""
    if report is None:
        return None
    told = dict(report)
    for name in ("dropped", "cut"):
        rows = told.get(name)
        if isinstance(rows, list) and len(rows) > MOST_PLACES:
            told |= {name: rows[:MOST_PLACES], f"{name}_left_out": len(rows) - MOST_PLACES}
    return told


def _memory(report: dict[str, Any], rehearsal: dict[str, Any]) -> dict[str, Any]:
    """Of the plan and as measured; before the end of a run, of the rehearsal of its largest micro-batch."""
    told = report.get("memory") or {}
    return {
        "predicted_peak_bytes": told.get("predicted_peak_bytes", rehearsal.get("predicted_bytes")),
        "calibrated_peak_bytes": told.get("calibrated_peak_bytes"),
        "measured_peak_bytes": told.get("measured_peak_bytes", rehearsal.get("measured_bytes")),
        "usable_bytes": rehearsal.get("usable_bytes"),
        "predicted": told.get("predicted"),
    }


def _checkpoints(files: list[tuple[str, int]], report: dict[str, Any]) -> list[dict[str, Any]]:
    found: dict[int, int] = {}
    for name, size in files:
        parts = Path(name).parts
        if len(parts) > 2 and parts[0] == "checkpoints" and parts[1].startswith("step-") and parts[1][5:].isdigit():
            found[int(parts[1][5:])] = found.get(int(parts[1][5:]), 0) + size
    return [
        {"step": step, "bytes": size, "best": step == report.get("adapter_step")}
        for step, size in sorted(found.items())
    ]


def contents(folder: Path) -> dict[str, Any]:
    """What deleting a run deletes."""
    files = sizes(folder)
    return {
        "name": folder.name, "path": str(folder), "bytes": sum(size for _, size in files), "num_files": len(files),
        "files": [{"path": name, "bytes": size} for name, size in files[:MOST_FILES]],
    }  # fmt: skip
