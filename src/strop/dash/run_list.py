"""The table of runs: a line each, made anew only where a file of the run has changed.

However long a run is, its line is made from its small files, the two ends of its events and a few places in between.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from strop.dash.files import DAMAGED, inside, read_bytes, read_json, read_places, sizes
from strop.dash.history import short
from strop.dash.status import Watch, standing
from strop.evaluation.metrics import Difference, rows_text, verdict
from strop.runs.folder import RunFolder, is_run

END_BYTES = 16 << 10
WHOLE_BYTES = 48 << 10  # events that are read whole for the small curve
PLACES, PLACE_BYTES = 40, 1024  # where, and how far, a longer file is looked into
PARTS = 20  # of the small curve: the least and the most of each
MOST_EVENTS = 40  # of the end, that say what a run is doing
# as runs.events writes them; a line that is written otherwise is missing in the small curve alone
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
Signature = tuple[tuple[int, int] | None, ...]


class Listing:
    """The runs of a folder. Not for several threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.watch = Watch()
        self._known: dict[str, _Known] = {}

    def names(self) -> tuple[list[str], list[str]]:
        """Folders that may be runs, and what is left out with the reason."""
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
        """Newest first."""
        names = self.names()[0]
        for gone in self._known.keys() - set(names):
            del self._known[gone]
        rows = [row for name in names if (row := self.row(name)) is not None]
        return sorted(rows, key=lambda row: -(row["started"] or row["updated"] or 0))

    def row(self, name: str) -> dict[str, Any] | None:
        """A run's line; None for a folder that is no run, nor about to become one."""
        seen = _signature(os.path.join(self.root, name))
        known = self._known.get(name)
        if known is None or known.seen != seen:
            known = self._known[name] = _Known(seen, _known_of(RunFolder(inside(self.root, name))))
        held = seen[3] is not None  # claim.json is there as long as a process holds the folder, or was killed
        if known.row is not None and not (held and known.live):
            return known.row
        made, folder = known.facts, RunFolder(Path(self.root, name))
        holder = folder.holder if held else None
        known.live = holder is not None
        if not made["is_run"] and holder is None:
            return None
        where = standing(made["events"], made["ended"], holder, made["heartbeat"], self.watch)
        if made["damaged"] and holder is None:
            where = replace(where, why=made["damaged"])
        row = {key: value for key, value in made.items() if key not in ("events", "ended", "is_run", "damaged")}
        over = where.state in ("finished", "stopped", "crashed")
        row |= {"state": where.state, "why": where.why, "phase": where.phase, "pid": holder}
        row |= {"seconds_left": None if over else made["seconds_left"], "can": _can(where.state, made["has_adapter"])}
        known.row = row
        return row


@dataclass
class _Known:
    """What was found of a run when its files were as `seen`. live: a process held it, which may end at any time."""

    seen: Signature
    facts: dict[str, Any]
    row: dict[str, Any] | None = None
    live: bool = True


def aged(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line with the age of its heartbeat, which moves by itself."""
    return {**row, "heartbeat_age": short(max(0.0, time.time() - row["heartbeat"]))}


def _can(state: str, adapter: bool) -> list[str]:
    if state in ("running", "stalled"):
        return ["stop"]
    after = ["evaluate", "export", "talk"] if adapter else []
    return [*(["resume"] if state != "finished" else []), "duplicate", "delete", *after]


def _signature(folder: str) -> Signature:
    return tuple(_stamp(f"{folder}/{name}") for name in ("events.jsonl", "report.json", "lock.json", "claim.json"))


def _stamp(file: str | Path) -> tuple[int, int] | None:
    try:
        found = os.lstat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _known_of(folder: RunFolder) -> dict[str, Any]:
    try:
        facts = _facts(folder)
        json.dumps(facts)
        return facts
    except DAMAGED as error:
        damaged = {
            "is_run": is_run(folder.path),
            "events": [],
            "ended": {},
            "damaged": f"its files are damaged: {error}",
        }
        return {**EMPTY, "name": folder.path.name, "path": str(folder.path), "heartbeat": 0.0, **damaged}


def _facts(folder: RunFolder) -> dict[str, Any]:
    """All of a line that files say."""
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
        "events": [_brief(event) for event in end], "heartbeat": heartbeat,
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
        "score": score_of(report), "sparkline": curve, "bytes": sum(size for _, size in sizes(folder.path)),
        "has_adapter": (folder.adapter / "adapter_config.json").is_file(),
    }  # fmt: skip


def _text(value: Any) -> str | None:
    return ", ".join(map(str, value)) if isinstance(value, list) else None if value is None else str(value)


def score_of(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The score of the run's evaluation with its interval, and what became of it in words; None without one."""
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
        said = f"{metric} went from {base[metric]:.1%} to {tuned[metric]:.1%} on {rows_text(found)}"
        score |= {"verdict": kind, "words": f"{words[0].upper()}{words[1:]}: {said}."}
    except (KeyError, TypeError, ValueError):
        pass
    return score


def _brief(event: dict[str, Any]) -> dict[str, Any]:
    return {name: event.get(name) for name in ("event", "time", "why")}


def _events(lines: list[bytes]) -> list[dict[str, Any]]:
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def _end(file: Path, size: int, *, live: bool) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """The last step, the last evaluation, and the last events: of a live run enough to see how often it writes.

    A resume may just have begun to write: what was before it is looked for too.
    """
    for reach in (END_BYTES, 64 * END_BYTES):
        start = max(0, size - reach)
        lines = read_bytes(file, start, reach).split(b"\n")[1 if start else 0 : -1]
        steps, evaluated = ([line for line in lines if line.startswith(kind)][-1:] for kind in (_OF_STEP, _OF_EVAL))
        if start == 0 or steps:
            break
    step, score = (next(iter(_events(found)), {}) for found in (steps, evaluated))
    return step, score, _events(lines[-MOST_EVENTS if live else -1 :])


def _curve(file: Path, size: int) -> list[tuple[int, float]]:
    """The loss in a few points: of all steps where the file is short, else of steps at even distances."""
    if size <= WHOLE_BYTES:
        found = _STEP.findall(read_bytes(file, 0, WHOLE_BYTES))
    else:
        starts = [place * (size - PLACE_BYTES) // (PLACES - 1) for place in range(PLACES)]
        found = [match.groups() for part in read_places(file, starts, PLACE_BYTES) if (match := _STEP.search(part))]
    points = sorted({int(step): float(loss) for step, loss in found}.items())
    if len(points) > 2 * PARTS:
        low, high = points[0][0], points[-1][0]
        parts: dict[int, list[tuple[int, float]]] = {}
        for point in points:
            parts.setdefault((point[0] - low) * PARTS // (high - low + 1), []).append(point)
        both = (end(part, key=lambda point: point[1]) for part in parts.values() for end in (min, max))
        points = sorted({*both, points[-1]})
    return [(step, float(f"{loss:.4g}")) for step, loss in points]
