"""Run CLI commands as child processes that outlive the server, each with a folder for its state and output."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
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

from strop.dash.files import file_stamp, join_names, read_bytes, read_json, read_tail, split_names
from strop.errors import FolderError, InputError, RunError
from strop.runs.child_env import safe_path_env
from strop.runs.folder import write_json
from strop.serve.server import KEY_VARIABLE

FOLDER = ".dash"  # created in the folder of runs
TOKEN_VARIABLE = "STROP_DASH_TOKEN"
MAX_JOBS = 200  # older ones are deleted
LOG_BYTES = 64 << 10
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[a-z]+-[0-9a-f]{6}")
_SHARE = re.compile(r"(\d+)\s*(?:of|/)\s*(\d+)")
_STILL = re.compile(r"still\s+(.*?)(?: \((\d+) s(?:, [^()]* left)?\))?\s*")  # as display.terminal prints it


class Busy(InputError):
    """Raised when an action does not fit the current state, such as resuming a running run."""


class Jobs:
    """The jobs of a folder of runs."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / FOLDER / "jobs"
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._ended: dict[str, dict[str, Any]] = {}  # final status of jobs, without results

    def start(
        self, kind: str, arguments: Sequence[str], run: str | None = None, environment: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """Start `strop ARGUMENTS --json`, for a run if given. Raises FolderError if the folder is not writable."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{kind}-{secrets.token_hex(3)}"
        folder = self._folder / name
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.chmod(self._root / FOLDER, 0o700)  # logs may contain rows of the data
            folder.mkdir()
        except OSError as error:
            raise FolderError(f"{self._folder}: cannot be written: {error.strerror}", fix="make it writable") from None
        started = time.time()
        inherited = {key: value for key, value in os.environ.items() if key != TOKEN_VARIABLE}
        with (folder / "out").open("wb") as out, (folder / "log").open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "strop.cli", *arguments, "--json"],
                stdin=subprocess.DEVNULL, stdout=out, stderr=log, start_new_session=True,
                env={**inherited, **safe_path_env(), "COLUMNS": "120", "PYTHONUNBUFFERED": "1", **(environment or {})},
            )  # fmt: skip
        self._children[name] = child
        try:
            born = psutil.Process(child.pid).create_time()
        except psutil.Error:  # already ended
            born = 0.0
        job = {"id": name, "kind": kind, "run": run, "words": list(arguments), "started": started}
        write_json(folder / "job.json", {**job, "pid": child.pid, "born": born})
        self._prune()
        return self.status(name)

    def all(self) -> list[dict[str, Any]]:
        """Return all jobs, newest first, without their results."""
        jobs = [self.status(name, with_result=False) for name in self._names()]
        return sorted(jobs, key=lambda job: -(job["started"] or 0.0))

    def folder(self, name: str) -> Path:
        """Return the folder of a job. Raises FolderError if the job does not exist."""
        if not _ID.fullmatch(name) or not (self._folder / name / "job.json").is_file():
            raise FolderError("no such job", fix="see the list of jobs")
        return self._folder / name

    def status(self, name: str, *, with_result: bool = True) -> dict[str, Any]:
        """Return the state and the result of a job.

        Field `asked`: time of a request to stop, or None. Field `activity`: what the job does while it prints nothing,
        and `activity_since`: Unix time at which that began.
        """
        if not with_result and name in self._ended:
            return self._ended[name]
        folder = self.folder(name)
        job = read_json(folder / "job.json")
        running = self._is_running(name, job)
        result = read_json(folder / "out") or None
        error = None if running else (result or {}).get("error")  # written a moment before the process ends
        lines = [line for line in read_tail(folder / "log", 4096).splitlines() if line.strip()]
        last_line = lines[-1] if lines else ""
        still = _STILL.fullmatch(last_line) if running else None
        printed = (file_stamp(folder / "log") or (0, 0))[0] / 1e9
        if not running and result is None and job.get("asked"):  # before it could handle the signal
            error = {"kind": "Stopped", "message": "stopped on request", "fix": "", "where": []}
        elif not running and result is None:
            message = "the process ended without a result" + (f"; its last line: {last_line.strip()}" if lines else "")
            fix = "it was killed, ran out of memory, or the machine went down; `strop resume` continues a run"
            error = {"kind": "Killed", "message": message, "fix": fix, "where": []}
        stopped = (error or {}).get("kind") == "Stopped"
        state = "running" if running else "stopped" if stopped else "failed" if error else "done"
        if not running and "ended" not in job:
            job["ended"] = max((file_stamp(folder / file) or (0, 0))[0] for file in ("out", "log")) / 1e9
            with contextlib.suppress(OSError):  # a full disk must not hide the state
                write_json(folder / "job.json", job)
        status = {
            "id": name, "kind": job.get("kind"), "run": job.get("run"), "state": state, "pid": job.get("pid"),
            "command": shell_command(job.get("words") or []), "started": job.get("started"), "ended": job.get("ended"),
            "asked": job.get("asked"), "result": result if with_result else None, "error": error,
            "progress": _parse_progress(last_line),
            "activity": still[1] if still else None,
            "activity_since": round(printed - int(still[2] or 0)) if still else None,
        }  # fmt: skip
        if not running:
            self._ended[name] = {**status, "result": None}
        return status

    def log(self, name: str, start: int | None = None) -> tuple[str, int]:
        """Return terminal output from byte `start` (by default the last part), and the offset of its end."""
        file = self.folder(name) / "log"
        if start is None:
            start = max(0, file.lstat().st_size - LOG_BYTES)
        raw = read_bytes(file, start, 1 << 20)
        return raw.decode("utf-8", "replace"), start + len(raw)

    def stop(self, name: str, number: int = signal.SIGTERM) -> bool:
        """Send a job a signal, by default SIGTERM, which strop handles like Ctrl-C. Returns False if it has ended."""
        file = self.folder(name) / "job.json"
        job = read_json(file)
        if not self._is_running(name, job):
            return False
        with contextlib.suppress(OSError):
            write_json(file, {**job, "asked": time.time()})
        return send_signal(int(job["pid"]), float(job["born"]), number)

    def rename_run(self, old: Path, new: Path) -> None:
        """Change the run's name and the paths below its folder in its ended jobs, so that their output is found."""
        for job in self.all():
            if job["run"] == old.name:
                folder = self._folder / job["id"]
                moved = _replace_folder(read_json(folder / "job.json"), str(old), str(new))
                write_json(folder / "job.json", {**moved, "run": new.name})
                if result := read_json(folder / "out"):
                    write_json(folder / "out", _replace_folder(result, str(old), str(new)))
                self._ended.pop(job["id"], None)

    def remove(self, run: str) -> dict[str, Any]:
        """Remove the jobs of a run that has no folder, and return the newest."""
        jobs = [job for job in self.all() if job["run"] == run]
        for job in jobs:
            self._remove(job["id"])
        return jobs[0]

    def running(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the running jobs of these kinds."""
        names = sorted(set(self._names()) - self._ended.keys(), reverse=True)
        jobs = [(name, read_json(self._folder / name / "job.json")) for name in names]
        return [job for name, job in jobs if job.get("kind") in kinds and self._is_running(name, job)]

    def _names(self) -> list[str]:
        try:
            names = [entry.name for entry in os.scandir(self._folder) if _ID.fullmatch(entry.name)]
            return [name for name in names if name in self._ended or (self._folder / name / "job.json").is_file()]
        except OSError:
            return []

    def _is_running(self, name: str, job: dict[str, Any]) -> bool:
        child = self._children.get(name)
        if child is None:
            return "ended" not in job and is_running(job.get("pid"), job.get("born"))
        if child.poll() is not None:
            del self._children[name]
        return child.returncode is None

    def _prune(self) -> None:
        for name in sorted(self._names())[:-MAX_JOBS]:
            if not self._is_running(name, read_json(self._folder / name / "job.json")):
                self._remove(name)

    def _remove(self, name: str) -> None:
        for file in ("job.json", "out", "log", "key"):
            (self._folder / name / file).unlink(missing_ok=True)
        (self._folder / name).rmdir()
        self._ended.pop(name, None)


def _replace_folder(value: Any, old: str, new: str, key: str = "") -> Any:
    """Replace a folder in all paths, options and commands of a JSON value."""
    if isinstance(value, dict):
        return {key: _replace_folder(item, old, new, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace_folder(item, old, new, key) for item in value]
    if not isinstance(value, str):
        return value
    if key == "commands":
        return shlex.join(_replace_folder(shlex.split(value), old, new))
    return re.sub(rf"(^|^--[\w.-]+=){re.escape(old)}(?=/|$)", lambda match: match[1] + new, value)


def shell_command(arguments: Sequence[str]) -> str:
    """Return the command line that runs strop with these arguments in a shell."""
    return shlex.join(["strop", *arguments])


def option_flags(field: str, value: Any) -> list[str]:
    """Return a recipe field and its value as command-line arguments."""
    flag = f"--{field}"
    if isinstance(value, list) and (field.startswith("data.") or field == "track"):
        return [f"{flag}={item}" for item in value]
    if isinstance(value, list | dict):
        return [f"{flag}={json.dumps(value, ensure_ascii=False)}"]
    return [f"{flag}={str(value).lower() if value is None or isinstance(value, bool) else value}"]


def parse_options(command: str) -> dict[str, Any]:
    """Return the recipe fields that a `strop train` command sets; those that it repeats as lists."""
    options: dict[str, Any] = {}
    for flag in shlex.split(command)[2:]:
        field, _, value = flag.removeprefix("--").partition("=")
        if field not in ("out", "memory"):
            options.setdefault(field, []).append(value)
    return {field: values if len(values) > 1 else values[0] for field, values in options.items()}


def is_running(pid: Any, start_time: Any) -> bool:
    """Return whether the process with this id and start time is running."""
    try:
        process = psutil.Process(int(pid))
        is_same = abs(process.create_time() - float(start_time)) < 1
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, TypeError, ValueError):
        return False


def send_signal(pid: int, start_time: float | None, number: int) -> bool:
    """Send a signal to the process with this id and, if known, start time. Return whether it was sent."""
    if start_time is not None and not is_running(pid, start_time):
        return False
    try:
        os.kill(pid, number)
    except OSError:
        return False
    return True


def _parse_progress(line: str) -> dict[str, Any]:
    """Return the end of a line, and the fraction in it, such as 0.3 for "3 of 10"."""
    match = _SHARE.search(line)
    done, total = (int(match[1]), int(match[2])) if match else (0, 0)
    return {"text": line[-300:], "share": done / total if total and done <= total else None}


# --- chat ------------------------------------------------------------------------------------------

TIMEOUT_S = 600.0  # for a long answer on a slow CPU
SERVER_ENDED = {
    "kind": "Killed", "message": "the chat server ended without being stopped from here",
    "fix": "start it again; if memory ran out, close other programs first", "where": [],
}  # fmt: skip


class ChatServer:
    """Runs `strop serve` as a job, at most one at a time, because models need much memory."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._started_job: str | None = None

    def start(self, names: list[str]) -> dict[str, Any]:
        """Start `strop serve` with these names, and stop the previous server."""
        self.stop()
        key = secrets.token_urlsafe(24)
        job = self._jobs.start("serve", ["serve", *names, "--port=0"], join_names(names), {KEY_VARIABLE: key})
        self._started_job = job["id"]
        file = self._jobs.folder(job["id"]) / "key"
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(key)
        return self.status()

    def stop(self) -> dict[str, Any]:
        for job in self._jobs.running("serve"):
            self._jobs.stop(job["id"])
        return self.status()

    def close(self) -> None:
        """Stop the server if this process started it."""
        if self._started_job is not None:
            self._jobs.stop(self._started_job)

    def status(self) -> dict[str, Any]:
        """Return the state (off, starting, ready or failed) and the models of the server."""
        last = next((job for job in self._jobs.all() if job["kind"] == "serve"), None)
        status: dict[str, Any] = {"state": "off", "models": [], "names": [], "log": ""}
        status |= dict.fromkeys(("error", "job", "activity", "activity_since", "started"))
        if last is None:
            return status
        job = self._jobs.status(last["id"])
        names, log = split_names(str(job["run"] or "")), self._jobs.log(last["id"])[0][-4000:]
        status |= {"job": last["id"], "names": names, "log": log, "started": last["started"]}
        if job["state"] == "running":
            if (ready := job["result"]) is None or job["error"] is not None:
                return {**status, "state": "starting", **{key: job[key] for key in ("activity", "activity_since")}}
            return {**status, "state": "ready", "models": ready["models"], "context": ready.get("context")}
        if job["asked"] is None:
            return {**status, "state": "failed", "error": job["error"] or SERVER_ENDED}
        return status

    def address(self) -> tuple[str, int, str]:
        """Return host, port and key of the server. Raises Busy if no server is ready."""
        status = self.status()
        if status["state"] != "ready":
            raise Busy(f"no model is being served: {status['state']}", fix="start one first")
        url = urlsplit(str(self._jobs.status(status["job"])["result"]["url"]))
        key = read_bytes(self._jobs.folder(status["job"]) / "key", 0, 200).decode()
        return str(url.hostname), int(url.port or 80), key


async def forward(
    address: tuple[str, int, str], method: str, path: str, body: bytes
) -> tuple[int, str, AsyncIterator[bytes]]:
    """Send a request to the chat server; returns status, content type and body. Raises RunError if it fails."""
    host, port, key = address
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    try:
        await asyncio.to_thread(connection.request, method, path, body or None, headers)
        response = await asyncio.to_thread(connection.getresponse)
    except OSError as error:
        connection.close()
        raise RunError(f"the chat server does not respond: {error}", fix="see its log") from None

    async def chunks() -> AsyncIterator[bytes]:
        try:
            while chunk := await asyncio.to_thread(response.read1, 1 << 16):
                yield chunk
        except (OSError, http.client.HTTPException):  # the response was cut off; the client sees it end early
            return
        finally:  # if the client disconnects, this stops the generation
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()

    return response.status, response.getheader("content-type") or "application/json", chunks()
