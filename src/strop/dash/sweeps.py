"""Sweeps in the folder of runs: their rows in the table of runs, and their trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from strop.dash.files import CONTENT_ERRORS, file_stamp, read_json, run_path
from strop.dash.runs import EMPTY, RunTable
from strop.errors import FolderError
from strop.runs.folder import RunFolder

STATE_FILE = "sweep.json"
ENDED = ("finished", "pruned", "failed")


class SweepTable:
    """The sweeps of a folder. Not thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._cache: dict[str, tuple[Any, dict[str, Any]]] = {}  # by name: stamp of sweep.json, and its content
        self._runs: dict[str, RunTable] = {}

    def rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the rows of those folders that are sweeps; a damaged one has failed."""
        rows = []
        for name in names:
            if file_stamp(f"{self._root}/{name}/{STATE_FILE}") is None:
                continue
            try:
                rows.append(self.row(name))
            except CONTENT_ERRORS:
                why = f"{STATE_FILE} is damaged"
                path = str(self._root / name)
                failed: dict[str, Any] = {
                    "state": "failed",
                    "why": why,
                    "phase": None,
                    "pid": None,
                    "can": [],
                    "heartbeat": 0.0,
                }
                rows.append({**EMPTY, "kind": "sweep", "name": name, "path": path, **failed})
        return rows

    def read(self, name: str) -> dict[str, Any]:
        """Return sweep.json of a sweep. Raises FolderError if there is none."""
        path = run_path(self._root, name)
        stamp = file_stamp(f"{path}/{STATE_FILE}")
        if stamp is None:
            raise FolderError(f"no such sweep: {name}", fix="choose one from the list of runs")
        if name not in self._cache or self._cache[name][0] != stamp:
            self._cache[name] = stamp, read_json(path / STATE_FILE)
        return self._cache[name][1]

    def row(self, name: str) -> dict[str, Any]:
        """Return a sweep as a row of the table of runs, in which its trials are the steps."""
        state, path = self.read(name), run_path(self._root, name)
        trials = state.get("trials") or []
        result, recipe = state.get("result"), state["request"]["recipe"]
        pid = None if result else self._holder(path)
        stamp = path.joinpath(STATE_FILE).stat().st_mtime
        scored = [trial["score"] for trial in trials if trial.get("score") is not None]
        words = "the best trial on the selection rows"
        score = {"value": max(scored), "metric": state["metric"], "words": words} if scored else None
        started = path.joinpath("recipe.yaml").stat().st_mtime if path.joinpath("recipe.yaml").is_file() else stamp
        return {
            **EMPTY, "kind": "sweep", "name": name, "path": str(path), "model": recipe.get("model.name"),
            "data": _first(recipe.get("data.train")), "objective": "sweep", "started": started, "updated": stamp,
            "heartbeat": stamp, "state": "finished" if result else "running" if pid else "stopped", "phase": None,
            "why": result["sentence"] if result else "", "pid": pid, "can": [], "score": score,
            "step": sum(trial["state"] in ENDED for trial in trials), "steps": len(trials) or None,
            "seconds": sum(trial["seconds"] or 0 for trial in trials) or None,
        }  # fmt: skip

    def detail(self, name: str) -> dict[str, Any]:
        """Return sweep.json with the progress of running trials and the processes that work on the sweep."""
        state, path = self.read(name), run_path(self._root, name)
        row = self.row(name)
        runs = self._runs.setdefault(name, RunTable(path / "trials"))
        trials = [self._with_progress(trial, runs, path) for trial in state.get("trials") or []]
        fields = ("request", "split", "plan", "metric", "default", "selection", "final", "result")
        about = {field: state.get(field) for field in fields}
        winner = str(path / "winner.yaml") if (path / "winner.yaml").is_file() else None
        return {**about, "name": name, "path": str(path), "state": row["state"], "trials": trials, "winner": winner}

    @staticmethod
    def _with_progress(trial: Mapping[str, Any], runs: RunTable, path: Path) -> dict[str, Any]:
        if trial["state"] != "running":
            return {**trial, "step": trial["steps"]}
        name = f"{trial['number']:03d}"
        row = runs.row(name) or {}
        progress = {field: row.get(field) for field in ("step", "steps", "loss")}
        is_claimed = RunFolder(path / "claims" / name).holder is not None
        return {**trial, **progress, "state": "running" if is_claimed else "stopped"}

    @staticmethod
    def _holder(path: Path) -> int | None:
        """Return the id of a process that works on the sweep, or None."""
        claims = path / "claims"
        names = [entry for entry in claims.iterdir() if not entry.is_symlink()] if claims.is_dir() else []
        return next(filter(None, (RunFolder(entry).holder for entry in names)), None)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value
