"""What the page asks for, answered from the folder. One thread uses it: the server's reader."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from strop.dash import answers as votes
from strop.dash.chat import Talk
from strop.dash.files import DAMAGED, inside, read_json, tail
from strop.dash.history import AXES, History, short
from strop.dash.http import Busy
from strop.dash.jobs import LOG_BYTES, Jobs, send
from strop.dash.run_detail import contents, detail, placed
from strop.dash.runs import EMPTY, Listing, aged
from strop.dash.system import System
from strop.errors import FolderError, InputError, RunError
from strop.machine.probe import probe
from strop.runs.folder import RunFolder

MOST_BYTES = 24 << 20  # of histories that are kept in memory: that of the run that is looked at always is
MOST_ROWS = 2000  # that a stream sends one by one; beyond that the curve is drawn anew


class Desk:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs = Jobs(root)
        self.listing = Listing(root)
        self.system = System(root)
        self._histories: dict[str, History] = {}
        self._votes = votes.Votes()

    def runs(self) -> list[dict[str, Any]]:
        """The table, with runs that a job is about to make."""
        rows = self.listing.rows()
        known = {row["name"] for row in rows}
        coming = [self._coming(job) for job in self.jobs.running("train") if job["run"] not in known]
        return [*coming, *rows]

    def _coming(self, job: dict[str, Any]) -> dict[str, Any]:
        """The line of a run whose process has not yet made its folder."""
        return {
            **EMPTY, "name": job["run"], "path": str(self.root / job["run"]), "state": "running", "why": "",
            "phase": "preparing", "pid": job["pid"], "started": job["began"], "updated": job["began"],
            "heartbeat": job["began"], "can": [], "job": job["id"],
        }  # fmt: skip

    def row(self, name: str) -> dict[str, Any]:
        """A run's line. Raises FolderError where there is no such run."""
        path = inside(self.root, name)
        row = self.listing.row(name) if path.is_dir() else None
        if row is None:
            row = next((self._coming(job) for job in self.jobs.running("train") if job["run"] == name), None)
        if row is None:
            raise FolderError(f"no such run: {name}", fix="choose one from the list")
        return row

    def history(self, name: str) -> History:
        """A run's events, read up to now."""
        history = self._histories.pop(name, None) or History(RunFolder(inside(self.root, name)).events)
        self._histories[name] = history  # the last one used stands last
        history.update()
        while len(self._histories) > 1 and sum(one.num_bytes for one in self._histories.values()) > MOST_BYTES:
            del self._histories[next(iter(self._histories))]
        return history

    def detail(self, name: str) -> dict[str, Any]:
        row = self.row(name)
        with undamaged(name):
            return {**detail(aged(row), self.history(name)), "jobs": self.jobs_of(name)}

    def drawn(
        self, name: str, by: str, points: int, start: float | None, end: float | None, fields: tuple[str, ...]
    ) -> dict[str, Any]:
        """The curves of a run. Raises InputError for an axis that there is not."""
        if by not in AXES:
            raise InputError(f"by: {by}: no such axis", fix=", ".join(AXES))
        if not 50 <= points <= 5000:
            raise InputError(f"points: {points}", fix="give 50 to 5000")
        self.row(name)
        with undamaged(name):
            return self.history(name).drawn(by, points, start, end, fields)

    def news(self, name: str, by: str, points: int, seen: Seen | None) -> tuple[str, dict[str, Any] | None, Seen]:
        """What a stream that has sent `seen` sends next: history (all of it), steps (what was added), or nothing."""
        with undamaged(name):
            return self._news(self.history(name), by, points, seen)

    def _news(
        self, history: History, by: str, points: int, seen: Seen | None
    ) -> tuple[str, dict[str, Any] | None, Seen]:  # what is appended meanwhile is the next news
        now = Seen(history)
        if seen is None or seen.generation != now.generation or now.steps - seen.steps > MOST_ROWS:
            return "history", history.drawn(by, points), now
        if now == seen:
            return "steps", None, now
        at = history.axis(by, list(history.eval_steps[seen.evals :]))
        evaluated = [
            {"step": step, "x": float(x), "loss": short(loss)}
            for step, x, loss in zip(history.eval_steps[seen.evals :], at, history.evals[seen.evals :], strict=True)
        ]
        new = history.marks[-(now.marks - seen.marks) :] if now.marks > seen.marks else []
        rows = self._rows(history, by, seen.steps)
        last = dict(history.newest.get("step") or {})
        told = {"rows": rows, "evals": evaluated, "marks": placed(history, new), "last": last, "x": by}
        return "steps", told, now

    def _rows(self, history: History, by: str, start: int) -> list[dict[str, Any]]:
        places = history.axis(by, list(history.steps[start:]))
        rows = []
        for number, x in enumerate(places, start):
            row: dict[str, Any] = {"step": history.steps[number], "x": float(x), "tokens": history.tokens[number]}
            for name, column in history.columns.items():
                row[name] = short(column[number])
            rows.append(row)
        return rows

    def look(self, name: str | None) -> dict[str, Any]:
        """The machine, and the process of a run."""
        return self.system.look(self.row(name)["pid"] if name else None, self.listing.watch.share)

    def contents(self, name: str) -> dict[str, Any]:
        self.row(name)
        return contents(inside(self.root, name))

    def jobs_of(self, name: str, limit: int = 20) -> list[dict[str, Any]]:
        return [job for job in self.jobs.all() if job["run"] == name][:limit]

    def log(self, name: str) -> dict[str, Any]:
        """What the processes of a run wrote to the terminal, as far as they were started from here, and its events."""
        row = self.row(name)
        jobs = [job for job in self.jobs_of(name) if job["kind"] in ("train", "resume")]
        parts = [f"$ {job['command']}\n{self.jobs.log(job['id'])[0]}" for job in reversed(jobs)]
        return {
            "text": "\n".join(parts)[-LOG_BYTES:],
            "sources": [{"job": job["id"], "command": job["command"], "state": job["state"]} for job in jobs],
            "events": tail(RunFolder(Path(row["path"])).events, LOG_BYTES),
        }

    def duplicate(self, name: str) -> dict[str, Any]:
        """What a run was asked for and what differs from the defaults, to start another like it."""
        self.row(name)
        with undamaged(name):
            asked = {
                choice["field"]: choice["value"]
                for choice in self.history(name).choices
                if choice.get("origin") not in ("default", "plan", "preset") and choice.get("field") != "out"
            }
            return {"options": asked, "name": name}

    def answers(self, name: str, *how: Any) -> dict[str, Any]:
        self.row(name)
        with undamaged(name):
            return votes.answers(RunFolder(inside(self.root, name)), *how)

    def ballot(self, name: str) -> dict[str, Any]:
        self.row(name)
        with undamaged(name):
            return self._votes.ballot(RunFolder(inside(self.root, name)))

    def vote(self, name: str, ballot: str, choice: str) -> dict[str, Any]:
        self.row(name)
        return self._votes.vote(RunFolder(inside(self.root, name)), ballot, choice)

    def compare(self, names: list[str]) -> dict[str, Any]:
        if not 1 < len(set(names)) <= 12:
            raise InputError("runs: give 2 to 12 names with commas between them; a comma in a name is written \\,")
        rows = [aged(self.row(name)) for name in dict.fromkeys(names)]
        with undamaged(", ".join(names)):
            recipes = {row["name"]: _values(RunFolder(Path(row["path"]))) for row in rows}
            return votes.compare(rows, recipes)

    def machine(self) -> dict[str, Any]:
        """Facts, and what `strop doctor` found when it was last asked from here."""
        jobs = [job for job in self.jobs.all() if job["kind"] == "doctor"]
        found = next((about for job in jobs if (about := self.jobs.about(job["id"]))["result"]), None)
        told = {**found["result"], "when": found["ended"] or found["started"]} if found else None
        return {"facts": asdict(probe()), "doctor": told, "job": jobs[0] if jobs else None}

    # --- what changes something ------------------------------------------------------------------------------------

    def stop(self, name: str, *, force: bool) -> dict[str, Any]:
        """Ends a run as Ctrl-C does: after the step, saved; force: at once, what was saved before stays."""
        row = self.row(name)
        if row["pid"] is None:
            raise Busy(f"{name} does not run", fix="nothing is to be stopped")
        claim = read_json(inside(self.root, name) / "claim.json")
        born = claim.get("started") if claim.get("pid") == row["pid"] else None
        if born is None and "job" not in row:
            raise Busy(f"{name}: its process has just changed", fix="look again")
        if row["state"] == "stalled" and row["why"] == "the process is suspended":
            send(row["pid"], born, signal.SIGCONT)  # it cannot save before
        number = getattr(signal, "SIGKILL", signal.SIGTERM) if force else signal.SIGTERM
        return {"asked": send(row["pid"], born, number)}

    def resume(self, name: str, words: list[str]) -> dict[str, Any]:
        if "resume" not in self.row(name)["can"] or self._working(name, "resume"):
            raise Busy(f"{name} runs, or is finished: there is nothing to resume", fix="stop it first")
        return self.jobs.start("resume", ["resume", str(inside(self.root, name)), *words], name)

    def delete(self, name: str, confirmed: str) -> dict[str, Any]:
        if "delete" not in self.row(name)["can"] or self._working(name):
            raise Busy(f"{name} is in use", fix="stop it first")
        if confirmed != name:
            raise InputError("confirm: not the run's name", fix="type the name of the run that is to be deleted")
        return self.jobs.start("delete", ["runs", str(self.root), "--delete", name, "--yes"], name)

    def act(self, kind: str, name: str, words: list[str]) -> dict[str, Any]:
        """Evaluate or export: what needs an adapter."""
        if not self.row(name)["has_adapter"]:
            raise Busy(f"{name} has no adapter yet", fix="let it finish first")
        return self.jobs.start(kind, words, name)

    def train(self, name: str, words: list[str]) -> dict[str, Any]:
        """Starts a run in the folder. Raises FolderError where the name is taken."""
        path = inside(self.root, name)
        if path.exists() or any(job["run"] == name for job in self.jobs.running("train")):
            raise FolderError(f"{path}: there is such a run already", fix="choose another name")
        return self.jobs.start("train", ["train", *words, f"--out={path}"], name)

    def doctor(self) -> dict[str, Any]:
        if self.jobs.running("doctor"):
            raise Busy("strop doctor is under way", fix="wait for it")
        return self.jobs.start("doctor", ["doctor"])

    def talk_start(self, talk: Talk, names: list[Any], model: str | None) -> dict[str, Any]:
        """Runs by name, or one model by its own."""
        if bool(names) == bool(model) or any(not isinstance(name, str) for name in names):
            raise InputError("give names of runs, or a model")
        return talk.start([str(inside(self.root, name)) for name in names] if names else [str(model)])

    def free_name(self, stem: str) -> str:
        """stem-1, stem-2, ...: the first that neither a run nor a job has."""
        taken = {job["run"] for job in self.jobs.running("train")}
        number = 1
        while f"{stem}-{number}" in taken or (self.root / f"{stem}-{number}").exists():
            number += 1
        return f"{stem}-{number}"

    def _working(self, name: str, *kinds: str) -> bool:
        kinds = kinds or ("train", "resume", "evaluate", "merge", "gguf", "ollama", "delete")
        return any(job["run"] == name for job in self.jobs.running(*kinds))


@contextmanager
def undamaged(name: str) -> Iterator[None]:
    """Inside this block, files of a run that hold what no trainer writes are a RunError."""
    try:
        yield
    except DAMAGED as error:
        what = f"{name}: its files are damaged: {type(error).__name__}: {error}"
        raise RunError(what, fix="put the folder back from a copy, or delete the run") from error


@dataclass
class Seen:
    """How much of a history a stream has sent."""

    generation: int
    steps: int
    evals: int
    marks: int

    def __init__(self, history: History) -> None:
        self.generation, self.steps = history.generation, len(history.steps)
        self.evals, self.marks = len(history.eval_steps), history.num_marks


def _values(folder: RunFolder) -> dict[str, Any]:
    """A run's recipe by field, and what its base and rows were."""
    lock = read_json(folder.lock)
    base = lock.get("base") or {}
    return {**(lock.get("values") or {}), "base": base.get("fingerprint"), "rows": lock.get("data")}
