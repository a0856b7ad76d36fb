"""The data and the actions behind the requests of the page. Only the reader thread of the server uses a Dashboard."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from strop.dash import answers
from strop.dash.files import CONTENT_ERRORS, read_json, read_tail, run_path, split_names
from strop.dash.history import AXES, History, StreamPosition, round_significant
from strop.dash.jobs import LOG_BYTES, Busy, ChatServer, Jobs, parse_options, send_signal
from strop.dash.notes import check_notes, move_run, rewrite_report, write_notes
from strop.dash.runs import EMPTY, RunTable, contents, detail, join_text, with_axis_positions, with_heartbeat_age
from strop.dash.sweeps import SweepTable
from strop.dash.transfer import download, read_file
from strop.dash.worker import Worker
from strop.errors import FolderError, InputError, RunError
from strop.machine.memory import library_bytes
from strop.machine.probe import probe
from strop.runs.folder import RunFolder

_EXPORTING = "it is being exported", "wait until the export ends, or stop it on the run's Export screen"
USES = {  # kinds of jobs that use the folder of a run: what they do, and what to do about it
    "evaluate": ("its evaluation is running", "wait until it ends, or stop it on the run's Answers screen"),
    "delete": ("it is being deleted", "wait until it is gone"),
    **dict.fromkeys(("merge", "gguf", "ollama"), _EXPORTING),
}  # fmt: skip
HISTORY_BYTES = 24 << 20  # maximum size of cached histories; the one in use is always kept
MAX_STEPS = 2000  # new steps that a stream sends one by one; for more it sends the whole curve


class Dashboard:
    """The runs, jobs, votes and machine facts of one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data_folder = root.absolute().parent / "data"  # of uploaded files
        self.jobs = Jobs(root)
        self.listing = RunTable(root)
        self.sweeps = SweepTable(root)
        self.system = System(root)
        self._histories: dict[str, History] = {}
        self._votes = answers.Votes()

    def runs(self) -> list[dict[str, Any]]:
        """Return the table of runs, including those that are about to start or failed before their first step."""
        rows = [self._with_resume(row) for row in self.listing.rows()]
        sweeps = self.sweeps.rows(self.listing.names()[0])
        rows = sorted([*rows, *sweeps], key=lambda row: -(row["started"] or row["updated"] or 0)) if sweeps else rows
        names = {row["name"] for row in rows}
        return [*(row for name, row in self._rows_without_folder().items() if name not in names), *rows]

    def running_names(self) -> list[str]:
        """Return the runs that train now."""
        return [row["name"] for row in self.runs() if row["state"] == "running"]

    def _rows_without_folder(self) -> dict[str, dict[str, Any]]:
        """Return rows by name for the newest job of each run, if it starts the run or has failed to."""
        rows: dict[str, dict[str, Any]] = {}
        for job in reversed(self.jobs.all()):
            rows.pop(job["run"], None)
            if job["kind"] != "train" or job["state"] not in ("running", "failed"):
                continue
            failed = job["state"] == "failed"
            options = parse_options(job["command"])
            rows[job["run"]] = {
                **EMPTY, "name": job["run"], "path": str(self.root / job["run"]), "started": job["started"],
                "state": "failed" if failed else "running", "phase": None if failed else "preparing",
                "why": job["error"]["message"] if failed else "", "pid": None if failed else job["pid"],
                "model": options.get("model.name"), "data": join_text(options.get("data.train")),
                "updated": job["started"], "heartbeat": job["started"],
                "can": ["duplicate", "delete"] if failed else ["stop"], "job": job["id"],
            }  # fmt: skip
        return rows

    def row(self, name: str) -> dict[str, Any]:
        """Return the row of a run. Raises FolderError if it does not exist."""
        path = run_path(self.root, name)
        row = self.listing.row(name) if path.is_dir() else None
        row = row or self._rows_without_folder().get(name)
        if row is None:
            raise FolderError(f"no such run: {name}", fix="choose one from the list")
        return self._with_resume(row)

    def _with_resume(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row as that of a run that prepares, if a process that resumes it has not yet written events."""
        jobs = self.jobs.running("resume")
        # a process that ends has written events since it started
        job = next((job for job in jobs if job["run"] == row["name"] and job["started"] > row["heartbeat"]), None)
        if job is None:
            return row
        now = {"state": "running", "why": "", "phase": "preparing", "seconds_left": None, "can": ["stop"]}
        return {**row, **now, "pid": row["pid"] or job["pid"], "job": job["id"]}

    def history(self, name: str) -> History:
        """Return the events of a run, read up to now."""
        history = self._histories.pop(name, None) or History(RunFolder(run_path(self.root, name)).events)
        self._histories[name] = history  # most recently used last
        history.update()
        while len(self._histories) > 1 and sum(cached.num_bytes for cached in self._histories.values()) > HISTORY_BYTES:
            del self._histories[next(iter(self._histories))]
        return history

    @contextmanager
    def _run(self, name: str) -> Iterator[RunFolder]:
        """Yield the folder of a run. Raises FolderError if there is none, RunError if its files are damaged."""
        self.row(name)
        with damaged_files_as_run_error(name):
            yield RunFolder(run_path(self.root, name))

    def detail(self, name: str) -> dict[str, Any]:
        row = self.row(name)
        with damaged_files_as_run_error(name):
            return {**detail(with_heartbeat_age(row), self.history(name)), "jobs": self.jobs_of(name)}

    def sweep(self, name: str) -> dict[str, Any]:
        """Return the trials of a sweep, and how they compare."""
        with damaged_files_as_run_error(name):
            return {**self.sweeps.detail(name), "jobs": self.jobs_of(name)}

    def train_winner(self, name: str, run: str) -> dict[str, Any]:
        """Train the recommended setting of a sweep on all rows, as a new run."""
        winner = self.sweep(name)["winner"]
        if winner is None:
            raise Busy(f"{name} has no winner yet", fix="wait until it is finished")
        return {"job": self.train(run or self.unused_run_name(name), [winner])}

    def curves(
        self, name: str, by: str, points: float, start: float | None, end: float | None, fields: str
    ) -> dict[str, Any]:
        """Return the curves of a run. fields: names with commas; empty for all. Raises InputError for unknown axes."""
        if by not in AXES:
            raise InputError(f"by: {by}: unknown axis", fix=", ".join(AXES))
        if not 50 <= points <= 5000:
            raise InputError(f"points: {points:g}", fix="give 50 to 5000")
        with self._run(name):
            return self.history(name).curves(by, int(points), start, end, tuple(filter(None, fields.split(","))))

    def updates(
        self, name: str, by: str, points: int, sent: StreamPosition | None
    ) -> tuple[str, dict[str, Any] | None, StreamPosition]:
        """Return the next event of a stream: its name, its data (None if nothing is new), the position after it."""
        with damaged_files_as_run_error(name):
            history = self.history(name)
            now = history.position
            if sent is None or sent.generation != now.generation or now.steps - sent.steps > MAX_STEPS:
                return "history", history.curves(by, points), now
            if now == sent:
                return "steps", None, now
            steps, losses = history.eval_steps[sent.evals :], history.evals[sent.evals :]
            evals = [
                {"step": step, "x": float(x), "loss": round_significant(loss)}
                for step, x, loss in zip(steps, history.axis(by, list(steps)), losses, strict=True)
            ]
            marks = history.marks[-(now.marks - sent.marks) :] if now.marks > sent.marks else []
            result = {
                "rows": _step_rows(history, by, sent.steps), "evals": evals,
                "marks": with_axis_positions(history, marks), "last": history.last, "x": by,
            }  # fmt: skip
            return "steps", result, now

    def system_state(self, name: str | None) -> dict[str, Any]:
        """Return the state of the machine and of the process of a run, and the names of other runs that train."""
        state = self.system.state(self.row(name)["pid"] if name else None, self.listing.cpu_usage.cores)
        return {**state, "other_runs": [other for other in self.running_names() if other != name]}

    def contents(self, name: str) -> dict[str, Any]:
        self.row(name)
        return contents(run_path(self.root, name))

    def jobs_of(self, name: str, limit: int = 20) -> list[dict[str, Any]]:
        return [job for job in self.jobs.all() if job["run"] == name][:limit]

    def log(self, name: str) -> dict[str, Any]:
        """Return the terminal output of processes started from here, and the run's events."""
        row = self.row(name)
        jobs = [job for job in self.jobs_of(name) if job["kind"] in ("train", "resume")]
        parts = [f"$ {job['command']}\n{self.jobs.log(job['id'])[0]}" for job in reversed(jobs)]
        return {
            "text": "\n".join(parts)[-LOG_BYTES:],
            "sources": [{"job": job["id"], "command": job["command"], "state": job["state"]} for job in jobs],
            "events": read_tail(RunFolder(Path(row["path"])).events, LOG_BYTES),
        }

    def duplicate(self, name: str) -> dict[str, Any]:
        """Return the options that were set for a run, and a name, to start a similar one."""
        row = self.row(name)
        match = re.fullmatch(r"(.+)-(\d+)", name)
        new_name = self.unused_run_name(match[1] if match else name, int(match[2]) + 1 if match else 2)
        if row["state"] == "failed":
            return {"options": parse_options(self.jobs.status(row["job"])["command"]), "name": new_name}
        with self._run(name):
            options = {
                choice["field"]: choice["value"]
                for choice in self.history(name).choices
                if choice.get("origin") not in ("default", "plan", "preset") and choice.get("field") != "out"
            }
            return {"options": options, "name": new_name}

    def answers(self, name: str, *query: Any) -> dict[str, Any]:
        with self._run(name) as folder:
            return answers.answers(folder, *query)

    def download(self, name: str, kind: str) -> Iterator[bytes]:
        with self._run(name) as folder:
            return download(folder, kind)

    def download_export(self, job: str) -> Iterator[bytes]:
        """Return the content of the file that an export to GGUF has written."""
        status = self.jobs.status(job)
        out = (status["result"] or {}).get("out") if status["kind"] == "gguf" and status["state"] == "done" else None
        if out is None:
            raise FolderError("this job has written no file", fix="wait until the export is done")
        return read_file(Path(out))

    def samples(self, name: str, step: float | None) -> dict[str, Any]:
        """Return the completions that were sampled at an evaluation, by default at the last one."""
        with self._run(name):
            samples = self.history(name).samples
            chosen = step if step in samples else next(reversed(samples), None)
            return {"step": chosen, "samples": samples.get(int(chosen), []) if chosen is not None else []}

    def ballot(self, name: str) -> dict[str, Any]:
        with self._run(name) as folder:
            return self._votes.ballot(folder)

    def vote(self, name: str, ballot: str, choice: str) -> dict[str, Any]:
        with self._run(name) as folder:
            return self._votes.vote(folder, ballot, choice)

    def compare(self, names: list[str]) -> dict[str, Any]:
        if not 1 < len(set(names)) <= 12:
            raise InputError("runs: give 2 to 12 names with commas between them; a comma in a name is written \\,")
        rows = [with_heartbeat_age(self.row(name)) for name in dict.fromkeys(names)]
        with damaged_files_as_run_error(", ".join(names)):
            recipes = {row["name"]: _recipe_values(RunFolder(Path(row["path"]))) for row in rows}
            evaluating = sorted({str(job["run"]) for job in self.jobs.running("evaluate")} & recipes.keys())
            return {**answers.compare(rows, recipes), "evaluating": evaluating}

    def machine(self) -> dict[str, Any]:
        """Return machine facts and the last `strop doctor` result started from here."""
        jobs = [job for job in self.jobs.all() if job["kind"] == "doctor"]
        last = next((status for job in jobs if (status := self.jobs.status(job["id"]))["result"]), None)
        result = {**last["result"], "when": last["ended"] or last["started"]} if last else None
        return {"facts": asdict(probe()), "doctor": result, "job": jobs[0] if jobs else None}

    # --- actions ------------------------------------------------------------------------------------

    def stop(self, name: str, force: bool) -> dict[str, Any]:
        """Stop a run after its current step, with a checkpoint; with force, kill it at once."""
        row = self.row(name)
        if row["pid"] is None:
            raise Busy(f"{name} is not running", fix="there is nothing to stop")
        number = getattr(signal, "SIGKILL", signal.SIGTERM) if force else signal.SIGTERM
        if "job" in row:  # it has not claimed the folder yet
            return {"asked": self.jobs.stop(row["job"], number)}
        claim = read_json(run_path(self.root, name) / "claim.json")
        start_time = claim.get("started") if claim.get("pid") == row["pid"] else None
        if start_time is None:
            raise Busy(f"{name}: another process has just taken over the run", fix="reload and try again")
        if sys.platform != "win32" and row["why"] == "the process is suspended":
            send_signal(row["pid"], start_time, signal.SIGCONT)  # a suspended process cannot save
        job = next((job for job in self.jobs.running("train", "resume") if job["pid"] == row["pid"]), None)
        if job is not None and not force:  # also records that it was asked
            return {"asked": self.jobs.stop(job["id"])}
        return {"asked": send_signal(row["pid"], start_time, number)}

    def resume(self, name: str, arguments: list[str]) -> dict[str, Any]:
        if "resume" not in self.row(name)["can"]:
            raise Busy(f"{name} is running or finished: there is nothing to resume", fix="stop it first")
        return self.jobs.start("resume", ["resume", str(run_path(self.root, name)), *arguments], name)

    def delete(self, name: str, confirmed: str) -> dict[str, Any]:
        self._check_unused(name)
        if confirmed != name:
            raise InputError("confirm: not the run's name", fix="type the name of the run to delete")
        if not run_path(self.root, name).is_dir():  # it failed to start
            return self.jobs.remove(name)
        return self.jobs.start("delete", ["runs", str(self.root), "--delete", name, "--yes"], name)

    def set_notes(self, name: str, note: str, tags: list[Any], new_name: str | None = None) -> dict[str, Any]:
        """Store the note and the tags of a run, and rename it if a new name is given; all of it or nothing."""
        with self._run(name) as folder:
            notes = check_notes(note, tags)
            if new_name not in (None, name):
                folder = RunFolder(run_path(self.root, self.rename(name, str(new_name))["name"]))
            return write_notes(folder.path, notes)

    def rename(self, name: str, new_name: str) -> dict[str, Any]:
        """Rename a run and its folder. Raises Busy if a process uses it, FolderError if the name is taken."""
        path, target = run_path(self.root, name), run_path(self.root, new_name)
        if any(str(path) in split_names(str(job["run"])) for job in self.jobs.running("serve")):
            raise Busy(f"{name} is loaded for a chat", fix="unload the model on the Chat screen, then rename the run")
        self._check_unused(name)
        if target.exists() or new_name in self._rows_without_folder():  # of a run that starts, or failed to
            raise FolderError(f"{new_name}: a run with this name exists", fix="choose another name")
        move_run(path, target)
        rewrite_report(target)
        self.jobs.rename_run(path, target)
        self._histories.pop(name, None)
        return {"name": new_name}

    def adapter_path(self, name: str) -> str:
        """Return the path of a run with an adapter. Raises Busy if it has none."""
        if not self.row(name)["has_adapter"]:
            fix = "resume it" if "resume" in self.row(name)["can"] else "wait"
            raise Busy(f"{name} has no adapter yet: it is written at the end of training", fix=fix)
        return str(self.root / name)

    def new_run_path(self, name: str) -> Path:
        """Return the folder for a new run. Raises FolderError if the name is taken."""
        path = run_path(self.root, name)
        if path.exists() or any(job["run"] == name for job in self.jobs.running("train")):
            raise FolderError(f"{name}: a run with this name exists", fix="choose another name")
        return path

    def train(self, name: str, arguments: list[str]) -> dict[str, Any]:
        path = self.new_run_path(name)
        return self.jobs.start("train", ["train", *arguments, f"--out={path}"], name)

    def doctor(self) -> dict[str, Any]:
        if self.jobs.running("doctor"):
            raise Busy("strop doctor is running", fix="wait for it")
        return self.jobs.start("doctor", ["doctor"])

    def start_chat(self, chat: ChatServer, names: list[Any], model: str | None) -> dict[str, Any]:
        """Serve the runs with these names, or one model."""
        if bool(names) == bool(model) or any(not isinstance(name, str) for name in names):
            raise InputError("give either names of runs or a model")
        return chat.start([str(run_path(self.root, name)) for name in names] if names else [str(model)])

    def unused_run_name(self, stem: str, number: int = 1) -> str:
        """Return the first of stem-1, stem-2, ..., from this number on, that no run or job uses."""
        starting = {job["run"] for job in self.jobs.running("train")}
        while f"{stem}-{number}" in starting or (self.root / f"{stem}-{number}").exists():
            number += 1
        return f"{stem}-{number}"

    def _check_unused(self, name: str) -> None:
        """Raise Busy if a process uses the folder of a run. One that trains claims it, and may outlive its claim."""
        row = self.row(name)
        if row["pid"] is not None or "delete" not in row["can"]:
            raise Busy(f"{name} is running", fix="stop the run first")
        kind = next((str(job["kind"]) for job in self.jobs.running(*USES) if job["run"] == name), None)
        if kind is not None:
            what, fix = USES[kind]
            raise Busy(f"{name}: {what}", fix=fix)


class Services:
    """The dashboard, the reader thread in which all its methods run, the workers, and the chat server."""

    def __init__(self, root: Path, opened: str | None) -> None:
        self.dashboard = Dashboard(root)
        self.opened = opened
        self.planner, self.data = Worker("plan"), Worker("data")
        self._schema: Any = None
        self.chat = ChatServer(self.dashboard.jobs)
        self._reader = ThreadPoolExecutor(1, "strop-dash-reader")

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the reader thread and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, function, *arguments)

    async def schema(self) -> Any:
        """Return the recipe options. The first call, when the server starts, also loads the planner."""
        self._schema = self._schema or await self.planner.call("schema")
        return self._schema

    def close(self) -> None:
        """Stop the workers and the chat server; runs and exports continue."""
        self.planner.stop()
        self.data.stop()
        self.chat.close()
        self._reader.shutdown(cancel_futures=True)


@contextmanager
def damaged_files_as_run_error(name: str) -> Iterator[None]:
    """Convert errors caused by unexpected content of a run's files to RunError."""
    try:
        yield
    except CONTENT_ERRORS as error:
        message = f"{name}: its files are damaged: {type(error).__name__}: {error}"
        raise RunError(message, fix="restore the folder from a copy, or delete the run") from error


def _step_rows(history: History, by: str, start: int) -> list[dict[str, Any]]:
    """Return the values of each step from index `start`."""
    rows = []
    for index, x in enumerate(history.axis(by, list(history.steps[start:])), start):
        values = {name: round_significant(column[index]) for name, column in history.columns.items()}
        rows.append({"step": history.steps[index], "x": float(x), "tokens": history.tokens[index], **values})
    return rows


def _recipe_values(folder: RunFolder) -> dict[str, Any]:
    """Return the recipe values of a run by field, with the hashes of its base model and data."""
    lock = read_json(folder.lock)
    base = lock.get("base") or {}
    return {**(lock.get("values") or {}), "base": base.get("fingerprint"), "rows": lock.get("data")}


# --- the machine ------------------------------------------------------------------------------------------

GPU_QUERY_S = 4.0  # seconds between queries of the driver
LIBRARIES_S = 10.0  # seconds between measurements of a process's libraries, which take 60 ms


class System:
    """CPU, memory, GPUs and disk of this machine. Not thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = root
        psutil.cpu_percent()
        self._gpus: tuple[float, list[dict[str, Any]]] = (0.0, [])  # time of the last query, and its result
        self._nvidia_smi = shutil.which("nvidia-smi")
        self._libraries: tuple[float, int | None, int] = (0.0, None, 0)  # time, process, and its libraries' bytes

    def state(self, pid: int | None, cores_used: Callable[[int], float | None]) -> dict[str, Any]:
        """Return the state of the machine and of the process `pid`. CPU usage is the average since the last call."""
        machine, memory = probe(), psutil.virtual_memory()
        process, cpu = self._process_state(pid, cores_used), psutil.cpu_percent() / 100
        used = (process or {}).get("cpu")
        other_cores = None if used is None else max(0.0, cpu * (psutil.cpu_count() or 1) - used)
        try:
            usage = shutil.disk_usage(self._root if self._root.is_dir() else Path.cwd())
            disk: dict[str, int | None] = {"free": usage.free, "total": usage.total}
        except OSError:
            disk = {"free": None, "total": None}
        return {
            "time": time.time(), "cpu": cpu, "cores": machine.cores, "other_cores": other_cores,
            "load": [round(load, 2) for load in psutil.getloadavg()],
            "memory": {
                "total": machine.memory_bytes, "used": machine.memory_bytes - machine.free_bytes,
                "available": machine.free_bytes, "whole_machine": memory.total,
            },
            "process": process, "gpus": self._query_gpus(), "disk": disk,
            "dash": {"rss": psutil.Process().memory_info().rss},
        }  # fmt: skip

    def _process_state(self, pid: int | None, cores_used: Callable[[int], float | None]) -> dict[str, Any] | None:
        if pid is None:
            return None
        measured, measured_pid, _ = self._libraries
        if measured_pid != pid or time.monotonic() - measured > LIBRARIES_S:
            self._libraries = (time.monotonic(), pid, library_bytes(pid))
        try:
            process, cpu = psutil.Process(pid), cores_used(pid)
            rss, children = process.memory_info().rss, len(process.children(recursive=True))
        except psutil.Error:
            return None
        return {"pid": pid, "rss": rss, "library_bytes": self._libraries[2], "cpu": cpu, "children": children}

    def _query_gpus(self) -> list[dict[str, Any]]:
        if self._nvidia_smi is None:
            return []
        queried, gpus = self._gpus
        if time.monotonic() - queried < GPU_QUERY_S:
            return gpus
        fields = "name,utilization.gpu,memory.used,memory.total,temperature.gpu,power.draw"
        command = [self._nvidia_smi, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        try:
            text = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
        except (OSError, subprocess.TimeoutExpired):  # do not query a hanging driver again
            self._nvidia_smi, text = None, ""
        gpus = [_parse_gpu(line.split(", ")) for line in text.splitlines() if line.count(", ") == 5]
        self._gpus = (time.monotonic(), gpus)
        return gpus


def _parse_gpu(parts: list[str]) -> dict[str, Any]:
    percent, used, total, celsius, watts = (_parse_number(part) for part in parts[1:])
    mib = 1 << 20
    return {
        "name": parts[0], "utilization": None if percent is None else percent / 100,
        "memory_used": None if used is None else int(used * mib),
        "memory_total": None if total is None else int(total * mib), "celsius": celsius, "watts": watts,
    }  # fmt: skip


def _parse_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return None
