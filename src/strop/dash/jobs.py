"""Run CLI commands as child processes that outlive the server, each with a folder for its state and output."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from strop.dash.files import join_names, read_bytes, read_json, read_tail, split_names
from strop.errors import FolderError, InputError, RunError
from strop.runs.child_env import safe_path_env
from strop.runs.folder import write_json
from strop.serve.server import KEY_VARIABLE

FOLDER = ".dash"  # in the folder of runs
TOKEN_VARIABLE = "STROP_DASH_TOKEN"
MOST_JOBS = 200  # older ones are deleted
LOG_BYTES = 64 << 10
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[a-z]+-[0-9a-f]{6}")
_SHARE = re.compile(r"(\d+)\s*(?:of|/)\s*(\d+)")


class Busy(InputError):
    """Raised when an action does not fit the current state, such as resuming a running run."""


class Jobs:
    """The jobs of a folder of runs."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / FOLDER / "jobs"
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._over: dict[str, dict[str, Any]] = {}  # final state of jobs that have ended

    def start(
        self, kind: str, words: Sequence[str], run: str | None = None, environment: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """Start `strop WORDS --json`. run: the run it is about. Raises FolderError if the folder is not writable."""
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
        """Return all jobs, newest first, without their results."""
        jobs = [self.about(name, whole=False) for name in self._names()]
        return sorted(jobs, key=lambda job: -(job["started"] or 0.0))

    def folder(self, name: str) -> Path:
        """Raises FolderError for a job that does not exist."""
        if not _ID.fullmatch(name) or not (self._folder / name / "job.json").is_file():
            raise FolderError("no such job", fix="see the list of jobs")
        return self._folder / name

    def about(self, name: str, *, whole: bool = True) -> dict[str, Any]:
        """Return a job's state, and with `whole` its result. Field `asked`: when a stop was requested, or None."""
        if not whole and name in self._over:
            return self._over[name]
        folder = self.folder(name)
        known = read_json(folder / "job.json")
        alive = self._alive(name, known)
        result = read_json(folder / "out") or None
        error = (result or {}).get("error")
        if not alive and result is None:
            text = read_tail(folder / "log", 2000).strip().splitlines()
            what = "the process ended without a result" + (f"; its last line: {text[-1]}" if text else "")
            fix = "it was killed, ran out of memory, or the machine went down; `strop resume` continues a run"
            error = {"kind": "Killed", "message": what, "fix": fix, "where": []}
        stopped = (error or {}).get("kind") == "Stopped"
        state = "running" if alive else "stopped" if stopped else "failed" if error else "done"
        if not alive and "ended" not in known:
            known["ended"] = max(_changed(folder / "out"), _changed(folder / "log"))
            with contextlib.suppress(OSError):  # a full disk must not hide the state
                write_json(folder / "job.json", known)
        last = next((line for line in reversed(read_tail(folder / "log", 4096).splitlines()) if line.strip()), "")
        about = {
            "id": name, "kind": known.get("kind"), "run": known.get("run"), "state": state, "pid": known.get("pid"),
            "command": command(known.get("words") or []), "started": known.get("began"), "ended": known.get("ended"),
            "asked": known.get("asked"), "result": result if whole else None, "error": error,
            "progress": _progress(last),
        }  # fmt: skip
        if not alive:
            self._over[name] = {**about, "result": None}
        return about

    def log(self, name: str, start: int | None = None) -> tuple[str, int]:
        """Return terminal output from byte `start` (None: the last part), and the offset reached."""
        file = self.folder(name) / "log"
        if start is None:
            start = max(0, file.lstat().st_size - LOG_BYTES)
        raw = read_bytes(file, start, 1 << 20)
        return raw.decode("utf-8", "replace"), start + len(raw)

    def stop(self, name: str, number: int = signal.SIGTERM) -> bool:
        """Send a job the signal of Ctrl-C. Returns False if it has already ended."""
        file = self.folder(name) / "job.json"
        known = read_json(file)
        if not self._alive(name, known):
            return False
        with contextlib.suppress(OSError):
            write_json(file, {**known, "asked": time.time()})
        return send(int(known["pid"]), float(known["born"]), number)

    def running(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the running jobs of these kinds."""
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
        if child is None:
            return "ended" not in known and alive(known.get("pid"), known.get("born"))
        if child.poll() is not None:
            del self._children[name]
        return child.returncode is None

    def _prune(self) -> None:
        for name in sorted(self._names())[:-MOST_JOBS]:
            known = read_json(self._folder / name / "job.json")
            if not self._alive(name, known):
                for file in ("job.json", "out", "log", "key"):
                    (self._folder / name / file).unlink(missing_ok=True)
                (self._folder / name).rmdir()
                self._over.pop(name, None)


def command(words: Sequence[str]) -> str:
    """Return a command line as typed in a shell."""
    return shlex.join(["strop", *words])


def option(field: str, value: Any) -> list[str]:
    """Return a recipe field and its value as command-line arguments. Raises InputError if impossible."""
    flag = f"--{field}"
    if isinstance(value, list):
        texts = [str(item) for item in value]
        if field.startswith("data.") or field == "track":
            return [f"{flag}={text}" for text in texts]
        if any("," in text for text in texts):
            raise InputError(f"{flag}: a list value contains a comma", fix="use a recipe file")
        return [f"{flag}={','.join(texts) or '[]'}"]
    if isinstance(value, dict):
        if any("," in f"{key}{item}" or "=" in str(key) for key, item in value.items()):
            raise InputError(f"{flag}: a map value contains a comma", fix="use a recipe file")
        return [f"{flag}={','.join(f'{key}={item}' for key, item in value.items())}"]
    return [f"{flag}={str(value).lower() if value is None or isinstance(value, bool) else value}"]


def alive(pid: Any, born: Any) -> bool:
    """Return whether the process with this id and start time is running."""
    try:
        process = psutil.Process(int(pid))
        same = abs(process.create_time() - float(born)) < 1
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, TypeError, ValueError):
        return False


def send(pid: int, born: float | None, number: int) -> bool:
    """Send a signal to a process; born: its expected start time."""
    if born is not None and not alive(pid, born):
        return False
    try:
        os.kill(pid, number)
    except OSError:
        return False
    return True


def _changed(file: Path) -> float:
    try:
        return file.lstat().st_mtime
    except OSError:
        return 0.0


def _progress(line: str) -> dict[str, Any]:
    """Return the last line of a log, and the share it reports as in "3 of 10"."""
    match = _SHARE.search(line)
    done, total = (int(match[1]), int(match[2])) if match else (0, 0)
    return {"text": line[-300:], "share": done / total if total and done <= total else None}


# --- chat ------------------------------------------------------------------------------------------

TIMEOUT_S = 600.0  # seconds; a long answer on a slow CPU
GONE = {
    "kind": "Killed", "message": "the chat server ended without being stopped from here",
    "fix": "start it again; if memory ran out, close other programs first", "where": [],
}  # fmt: skip


class ChatServer:
    """At most one `strop serve`, because models take much memory. Its state is that of its job."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._own: str | None = None

    def start(self, names: list[str]) -> dict[str, Any]:
        """Start `strop serve` with these names, and stop the previous server."""
        self.stop()
        key = secrets.token_urlsafe(24)
        job = self._jobs.start("serve", ["serve", *names, "--port=0"], join_names(names), {KEY_VARIABLE: key})
        self._own = job["id"]
        file = self._jobs.folder(job["id"]) / "key"
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(key)
        return self.about()

    def stop(self) -> dict[str, Any]:
        for job in self._jobs.running("serve"):
            self._jobs.stop(job["id"])
        return self.about()

    def close(self) -> None:
        """Stop the server if this process started it."""
        if self._own is not None:
            self._jobs.stop(self._own)

    def about(self) -> dict[str, Any]:
        """Return the state (off, starting, ready, failed) and the models."""
        last = next((job for job in self._jobs.all() if job["kind"] == "serve"), None)
        result: dict[str, Any] = {"state": "off", "models": [], "names": [], "error": None, "log": "", "job": None}
        if last is None:
            return result
        about = self._jobs.about(last["id"])
        ready = about["result"] if about["error"] is None else None
        names, log = split_names(str(about["run"] or "")), self._jobs.log(last["id"])[0][-4000:]
        result |= {"job": last["id"], "names": names, "log": log}
        if about["state"] == "running":
            about_models = {"models": ready["models"], "context": ready.get("context")} if ready else {}
            return {**result, "state": "ready" if ready else "starting", **about_models}
        if about["asked"] is None:
            return {**result, "state": "failed", "error": about["error"] or GONE}
        return result

    def where(self) -> tuple[str, int, str]:
        """Return host, port and key of the server. Raises Busy if none is ready."""
        about = self.about()
        if about["state"] != "ready":
            raise Busy(f"no model is being served: {about['state']}", fix="start one first")
        url = urlsplit(str(self._jobs.about(about["job"])["result"]["url"]))
        key = read_bytes(self._jobs.folder(about["job"]) / "key", 0, 200).decode()
        return str(url.hostname), int(url.port or 80), key


async def forward(
    where: tuple[str, int, str], method: str, path: str, body: bytes
) -> tuple[int, str, AsyncIterator[bytes]]:
    """Forward a request; return status, content type and body. Raises RunError if the server does not respond."""
    host, port, key = where
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    try:
        await asyncio.to_thread(connection.request, method, path, body or None, headers)
        response = await asyncio.to_thread(connection.getresponse)
    except OSError as error:
        connection.close()
        raise RunError(f"the chat server does not respond: {error}", fix="see its log") from None

    async def parts() -> AsyncIterator[bytes]:
        try:
            while part := await asyncio.to_thread(response.read1, 1 << 16):
                yield part
        except (OSError, http.client.HTTPException):  # the response was cut off; the reader sees it end early
            return
        finally:  # stops generation when the reader disconnects
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()

    return response.status, response.getheader("content-type") or "application/json", parts()
