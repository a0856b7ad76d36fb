"""Child processes of the CLI: each in a session of its own, with a folder that says what it is and what it said.

They outlive the page and the server. What became of one is read from its folder and its process alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from strop.dash.files import read_bytes, read_json, tail
from strop.errors import FolderError, InputError
from strop.runs.child_env import safe_path_env
from strop.runs.folder import write_json

FOLDER = ".dash"  # in the folder of runs; a name that no run has
TOKEN_VARIABLE = "STROP_DASH_TOKEN"
MOST_JOBS = 200  # that are kept; the oldest go
LOG_BYTES = 64 << 10
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[a-z]+-[0-9a-f]{6}")
_SHARE = re.compile(r"(\d+)\s*(?:of|/)\s*(\d+)")


class Jobs:
    """The jobs of a folder of runs."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / FOLDER / "jobs"
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._over: dict[str, dict[str, Any]] = {}  # what is known for good of jobs that have ended

    def start(
        self, kind: str, words: Sequence[str], run: str | None = None, environment: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """Starts `strop WORDS --json`. run: that it is about. Raises FolderError where nothing can be written."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{kind}-{secrets.token_hex(3)}"
        folder = self._folder / name
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.chmod(self._root / FOLDER, 0o700)  # logs are as private as rows
            folder.mkdir()
        except OSError as error:
            raise FolderError(f"{self._folder}: cannot be written: {error.strerror}", fix="free it") from None
        about = {"id": name, "kind": kind, "run": run, "words": list(words), "began": time.time()}
        own = {key: value for key, value in os.environ.items() if key != TOKEN_VARIABLE}
        with (folder / "out").open("wb") as out, (folder / "log").open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "strop.cli", *words, "--json"],
                stdin=subprocess.DEVNULL, stdout=out, stderr=log, start_new_session=True,
                env={**own, **safe_path_env(), "COLUMNS": "120", "PYTHONUNBUFFERED": "1", **(environment or {})},
            )  # fmt: skip
        self._children[name] = child
        try:
            born = psutil.Process(child.pid).create_time()
        except psutil.Error:  # it has ended already
            born = 0.0
        write_json(folder / "job.json", {**about, "pid": child.pid, "born": born})
        self._prune()
        return self.about(name)

    def all(self) -> list[dict[str, Any]]:
        """All jobs, newest first, without what they gave."""
        jobs = [self.about(name, whole=False) for name in self._names()]
        return sorted(jobs, key=lambda job: -(job["started"] or 0.0))

    def folder(self, name: str) -> Path:
        """Raises FolderError for a job that does not exist."""
        if not _ID.fullmatch(name) or not (self._folder / name / "job.json").is_file():
            raise FolderError("no such job", fix="see the list of jobs")
        return self._folder / name

    def about(self, name: str, *, whole: bool = True) -> dict[str, Any]:
        """What a job is and what became of it. whole: with its result. asked: when it was asked to end, or None."""
        if not whole and name in self._over:
            return self._over[name]
        folder = self.folder(name)
        known = read_json(folder / "job.json")
        alive = self._alive(name, known)
        result = _result(folder)
        error = (result or {}).get("error")
        if not alive and result is None:
            said = tail(folder / "log", 2000).strip().splitlines()
            what = "the process ended without an answer" + (f"; its last line: {said[-1]}" if said else "")
            fix = "it was killed, there was no memory, or the machine went down; `strop resume` goes on with a run"
            error = {"kind": "Killed", "message": what, "fix": fix, "where": []}
        stopped = (error or {}).get("kind") == "Stopped"
        state = "running" if alive else "stopped" if stopped else "failed" if error else "done"
        if not alive and "ended" not in known:
            known["ended"] = max(_changed(folder / "out"), _changed(folder / "log"))
            with contextlib.suppress(OSError):  # a full disk must not hide what is known
                write_json(folder / "job.json", known)
        last = next((line for line in reversed(tail(folder / "log", 4096).splitlines()) if line.strip()), "")
        share = _SHARE.search(last)
        about = {
            "id": name, "kind": known.get("kind"), "run": known.get("run"), "state": state, "pid": known.get("pid"),
            "command": command(known.get("words") or []), "started": known.get("began"), "ended": known.get("ended"),
            "asked": known.get("asked"), "result": result if whole else None, "error": error,
            "progress": {"text": last[-300:], "share": _ratio(share)},
        }  # fmt: skip
        if not alive:
            self._over[name] = {**about, "result": None}
        return about

    def log(self, name: str, start: int | None = None) -> tuple[str, int]:
        """What it wrote to the terminal, from a byte on (None: the end of it), and up to where."""
        file = self.folder(name) / "log"
        if start is None:
            start = max(0, file.lstat().st_size - LOG_BYTES)
        raw = read_bytes(file, start, 1 << 20)
        return raw.decode("utf-8", "replace"), start + len(raw)

    def stop(self, name: str, number: int = signal.SIGTERM) -> bool:
        """Asks a job to end, as Ctrl-C does. False where it has ended."""
        file = self.folder(name) / "job.json"
        known = read_json(file)
        if not self._alive(name, known):
            return False
        with contextlib.suppress(OSError):
            write_json(file, {**known, "asked": time.time()})
        return send(int(known["pid"]), float(known["born"]), number)

    def running(self, *kinds: str) -> list[dict[str, Any]]:
        """Jobs of these kinds that are under way."""
        found = []
        for name in sorted(set(self._names()) - self._over.keys(), reverse=True):
            known = read_json(self._folder / name / "job.json")
            if known.get("kind") in kinds and "ended" not in known and self._alive(name, known):
                found.append({**known, "words": known.get("words") or []})
        return found

    def _names(self) -> list[str]:
        try:
            names = [entry.name for entry in os.scandir(self._folder) if _ID.fullmatch(entry.name)]
            return [name for name in names if name in self._over or (self._folder / name / "job.json").is_file()]
        except OSError:
            return []

    def _alive(self, name: str, known: dict[str, Any]) -> bool:
        child = self._children.get(name)
        if child is not None:
            if child.poll() is None:
                return True
            del self._children[name]
            return False
        if "ended" in known:
            return False
        return alive(known.get("pid"), known.get("born"))

    def _prune(self) -> None:
        for name in sorted(self._names())[:-MOST_JOBS]:
            known = read_json(self._folder / name / "job.json")
            if not self._alive(name, known):
                for file in ("job.json", "out", "log", "key"):
                    (self._folder / name / file).unlink(missing_ok=True)
                (self._folder / name).rmdir()
                self._over.pop(name, None)


def command(words: Sequence[str]) -> str:
    """As a person types it."""
    return shlex.join(["strop", *words])


def option(field: str, value: Any) -> list[str]:
    """A recipe's field and its value as the command line takes them. Raises InputError for what it cannot take."""
    flag = f"--{field}"
    if isinstance(value, bool):
        return [f"{flag}={str(value).lower()}"]
    if value is None:
        return [f"{flag}=none"]
    if isinstance(value, (int, float)):
        return [f"{flag}={value!r}"]
    if isinstance(value, list):
        texts = [str(one) for one in value]
        if field.startswith("data.") or field == "track":
            return [f"{flag}={text}" for text in texts]
        if any("," in text for text in texts):
            raise InputError(f"{flag}: a comma in a list's value", fix="put it into a recipe file")
        return [f"{flag}={','.join(texts)}"] if texts else [f"{flag}=[]"]
    if isinstance(value, dict):
        if any("," in f"{key}{one}" or "=" in str(key) for key, one in value.items()):
            raise InputError(f"{flag}: a comma in a map's value", fix="put it into a recipe file")
        return [f"{flag}={','.join(f'{key}={one}' for key, one in value.items())}"]
    return [f"{flag}={value}"]


def alive(pid: Any, born: Any) -> bool:
    """Whether that very process still runs."""
    try:
        process = psutil.Process(int(pid))
        same = abs(process.create_time() - float(born)) < 1
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, TypeError, ValueError):
        return False


def send(pid: int, born: float | None, number: int) -> bool:
    """Signals a process; born: it must have been started then."""
    try:
        if born is not None and not alive(pid, born):
            return False
        os.kill(pid, number)
    except (OSError, psutil.Error):
        return False
    return True


def _result(folder: Path) -> dict[str, Any] | None:
    raw = read_bytes(folder / "out").strip()
    if not raw:
        return None
    try:
        found = json.loads(raw)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _changed(file: Path) -> float:
    try:
        return file.lstat().st_mtime
    except OSError:
        return 0.0


def _ratio(found: re.Match[str] | None) -> float | None:
    if found is None or not int(found[2]) or int(found[1]) > int(found[2]):
        return None
    return int(found[1]) / int(found[2])
