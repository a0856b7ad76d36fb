"""Run folders: their files, atomic writes, and a lock (the claim) against use by two processes at once.

recipe.yaml  lock.json  events.jsonl  checkpoints/step-000120/  adapter/ or model/  report.json  report.html
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from strop.errors import MAX_SHOWN_LOCATIONS, DiskError, FolderError, closest
from strop.runs.events import read_events

_CHECKPOINT_NAME = re.compile(r"step-(\d{6,})")
_VALID_NAME = re.compile(r"[^\x00-\x1f\x7f]+")
_DISK_ERRNOS = (errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC))
_CLAIM_FILE, _CLAIM_LOCK = "claim.json", ".claim.lock"
# what train.keep and train.teacher have computed
_COMPUTED_FILES = ("kept.jsonl", "kept.safetensors", "teacher.jsonl", "teacher.safetensors")


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.lock = path / "lock.json"
        self.events = path / "events.jsonl"
        self.adapter = path / "adapter"
        self.model = path / "model"  # of a run that trained all weights
        self.reference = path / "reference.safetensors"  # log-probabilities under the reference model
        self.report = path / "report.json"
        self.page = path / "report.html"
        self.kept = path / "kept.jsonl"  # the rows of train.keep
        self.teacher = path / "teacher.jsonl"  # the answers of train.teacher
        self.answers = path / "answers.json"  # completions of base and tuned model in the last evaluation

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def has_model(self) -> bool:
        """True if the run trained all weights and has saved its model."""
        return (self.model / "config.json").is_file()

    @property
    def saved(self) -> Path:
        """The folder of the adapter, or of the model if all weights were trained."""
        return self.model if self.has_model else self.adapter

    @property
    def is_saved(self) -> bool:
        return self.has_model or (self.adapter / "adapter_config.json").is_file()

    @property
    def holder(self) -> int | None:
        """The id of another running process that has claimed the folder, or None."""
        return _find_claim_holder(self.path / _CLAIM_FILE)

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Return (step, folder) of each checkpoint, oldest first, without temporary folders."""
        folder = self.path / "checkpoints"
        names = [(match, entry) for entry in _entries(folder) if (match := _CHECKPOINT_NAME.fullmatch(entry.name))]
        return sorted((int(match[1]), entry) for match, entry in names)

    @property
    def finished(self) -> bool:
        """True if the run is complete. A run that reached its time limit is not, and can be resumed."""
        report = self.read_report()
        return bool(report.get("exit") == 0 and report.get("ended") != "time")

    def read_report(self) -> dict[str, Any]:
        """Return report.json, or {} if it is missing or damaged, as `strop resume` can write it again."""
        return read_json(self.report)

    def read_lock(self) -> dict[str, Any]:
        """Return lock.json. Raises FolderError if it is damaged, as it cannot be written again."""
        try:
            lock = json.loads(self.lock.read_bytes())
            missing = [name for name in ("base", "data", "values", "versions", "threads") if name not in lock]
            problem = f"{missing[0]} is missing" if missing else ""
        except (OSError, ValueError, RecursionError, TypeError) as error:
            problem = str(error)
        if problem:
            raise FolderError(f"{self.lock}: damaged: {problem}", fix="restore the file, or start a new run")
        return dict(lock)

    def remove_if_unused(self, failed: bool) -> bool:
        """Remove the folder of a run without events, or of one that failed before its first step; return whether."""
        failed = failed and all(event["event"] not in ("step", "skip") for event in read_events(self.events))
        unused = self.path.is_dir() and (_is_unused(self.path) or failed)
        if unused:
            shutil.rmtree(self.path)
            if self.path.parent.name == "runs":  # made for it, if no --out was given
                with suppress(OSError):  # it has other runs
                    self.path.parent.rmdir()
        return unused

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Claim the folder for this process with a file lock and claim.json. Raises FolderError if it is in use."""
        file, lock = self.path / _CLAIM_FILE, FileLock(self.path / _CLAIM_LOCK, timeout=0)
        try:
            acquired = lock.acquire()
        except Timeout:
            raise self._in_use_error(_find_claim_holder(file)) from None
        with acquired:
            if (holder := _find_claim_holder(file)) is not None:  # the file system may not support locks
                raise self._in_use_error(holder)
            _remove_leftovers(self.path)
            _remove_leftovers(self.path / "checkpoints")
            started, resolved = psutil.Process().create_time(), str(self.path.resolve())
            write_atomic(file, json.dumps({"pid": os.getpid(), "started": started, "folder": resolved}))
            try:
                yield
            finally:
                file.unlink(missing_ok=True)

    def _in_use_error(self, pid: int | None) -> FolderError:
        by = f"process {pid}" if pid is not None else "another process"
        fix = "wait for it" if pid is None else f"wait for it, or stop it with `kill {pid}`"
        return FolderError(f"{self.path}: in use by {by}", fix=fix)


def is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file() and (path / "lock.json").is_file()


def check_new_run(path: Path) -> None:
    """Raise FolderError if a new run cannot use this folder, which may have files of a run without events."""
    if not _VALID_NAME.fullmatch(path.name):
        raise FolderError(f"{str(path)!r}: not a valid name for a run folder", fix="give another folder with --out")
    fix = f"give another folder, such as {suggest_new(path)}"
    if is_run(path) and RunFolder(path).finished:
        raise FolderError(f"{path}: contains a run, which is finished", fix=fix)
    if is_run(path):
        raise FolderError(
            f"{path}: contains a run", fix=f"resume it with `strop resume {shlex.quote(str(path))}`, or {fix}"
        )
    if path.is_dir() and not _is_unused(path):
        raise FolderError(f"{path}: is not empty", fix=fix)


def suggest_new(path: Path) -> str:
    """Return the option --out with a name next to a path that does not exist yet."""
    stem, suffix = (str(path), "") if path.is_dir() else os.path.splitext(path)
    names = (f"{stem}-{number}{suffix}" for number in count(2))
    return f"--out {shlex.quote(next(name for name in names if not os.path.exists(name)))}"


def create_run_folder(path: Path) -> RunFolder:
    """Create a run folder, and check that it is writable. Raises FolderError."""
    check_new_run(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"strop")
        for name in _COMPUTED_FILES:  # of a run that was killed before it began, maybe with another model
            (path / name).unlink(missing_ok=True)
    except OSError as error:
        raise FolderError(
            f"{path}: cannot be written: {error.strerror}", fix="give another folder with --out"
        ) from None
    return RunFolder(path)


def _is_unused(path: Path) -> bool:
    """Return whether a folder contains only files that a run writes before its first event."""
    names = {re.sub(r"^\.(.+)\.tmp-\d+$", r"\1", entry.name) for entry in path.iterdir()}
    return names <= {_CLAIM_FILE, _CLAIM_LOCK, "recipe.yaml", "lock.json", *_COMPUTED_FILES}


def free_bytes(path: Path) -> int:
    """Return the free bytes on the disk of `path`, which need not exist."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Convert errors of a full, broken or read-only disk to DiskError, which names `path`, or a file outside of it."""
    try:
        yield
    except Exception as error:  # tokenizers raise a bare one for errors of the disk
        match = re.search(r"os error (\d+)", str(error))  # Rust's message, of tokenizers and safetensors
        number = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
        if re.fullmatch(r"\d+ requested and \d+ written", str(error)):  # numpy reports no error number
            number = errno.ENOSPC
        if number is None or number not in _DISK_ERRNOS:
            raise
        filename = getattr(error, "filename", None)
        file = path if filename is None else Path(os.fsdecode(filename))
        file = path if path.absolute() in file.absolute().parents else file
        change = "make it writable" if number == errno.EROFS else "free some space or repair the disk"
        fix = f"{change}, then try again; completed files are intact"
        if file != path and overlaps_cache(file):
            fix = f"{change}, or set STROP_CACHE to a writable folder"
        raise DiskError(f"{file}: cannot be written: {os.strerror(number)}", fix=fix) from None


def open_run(path: Path) -> RunFolder:
    """Open an existing run folder. Raises FolderError, which suggests a similar name, if there is none."""
    if not is_run(path):
        near = suggest_path(str(path), (str(run.path) for run in find_runs(path.parent)))
        what = "not a run folder" if path.exists() else f"no such run{near}"
        raise FolderError(f"{path}: {what}", fix=name_runs(str(path), "see `strop runs`"))
    return RunFolder(path)


def nearest_path(name: str, known: Iterable[str] | None = None) -> str | None:
    """Return the run, the model or the file that an unknown name probably means, or None.

    known: the names beside runs in runs/; by default the entries of the folder, and demo.
    """
    if is_run(Path("runs", name)):
        return str(Path("runs", name))
    parent = Path(name).parent if Path(name).parent.is_dir() else Path()
    return closest(name, [*map(str, parent.iterdir()), "demo"] if known is None else known)


def suggest_path(name: str, known: Iterable[str] | None = None) -> str:
    """Return " (did you mean x?)" for the result of `nearest_path`, or ""."""
    near = nearest_path(name, known)
    return f" (did you mean {near}?)" if near else ""


def name_runs(name: str, fix: str) -> str:
    """Return a fix for a run that does not exist: the newest runs next to it, or in runs/, or else `fix`."""
    for folder in dict.fromkeys((Path(name).parent, Path("runs"))):
        if runs := find_runs(folder)[: -MAX_SHOWN_LOCATIONS - 1 : -1]:
            return f"give one of the runs {', '.join(str(run.path) for run in runs)}"
    return fix


def _remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove temporary files of killed processes, and restore what they were replacing. name: only this entry."""
    for entry in _entries(folder):
        match = re.fullmatch(r"\.?(.+)\.(tmp|old)-\d+", entry.name)
        if match is None or name not in (None, match[1]):
            continue
        if match[2] == "old" and not entry.with_name(match[1]).exists():
            entry.replace(entry.with_name(match[1]))
        elif entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _find_claim_holder(file: Path) -> int | None:
    """Return the id of another process that has made this claim and still runs, or None."""
    try:
        claim = json.loads(file.read_text(encoding="utf-8"))
        folder = str(file.parent.resolve())
        if claim.get("folder", folder) != folder:  # the claim was copied with its folder
            return None
        process = psutil.Process(int(claim["pid"]))
        is_same_process = abs(process.create_time() - float(claim["started"])) < 1  # ids are reused
        is_running = is_same_process and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError, psutil.NoSuchProcess):
        return None
    return process.pid if is_running and process.pid != os.getpid() else None


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file atomically: after a crash it has either the old or the new content. Text is written in UTF-8."""
    temp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temp.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or {} if the file is missing or damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def fsync_folder(path: Path) -> None:
    """Flush a folder's entries to disk. Does nothing on Windows, which cannot open folders."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def cache_folder() -> Path:
    """Return the cache folder: $STROP_CACHE, else $XDG_CACHE_HOME/strop, else ~/.cache/strop."""
    try:
        if configured := os.environ.get("STROP_CACHE"):
            return Path(configured).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "strop"
    except RuntimeError:  # a container's user without an entry in the user database
        fix = "set STROP_CACHE to a writable folder"
        raise FolderError("this user has no home folder for the cache", fix=fix) from None


def overlaps_cache(path: Path) -> bool:
    """Return whether a path is in the cache folder, or is one of its parents."""
    path, cache = path.absolute(), cache_folder().absolute()
    return cache in (path, *path.parents) or path in cache.parents


def apply_umask(file: Path) -> None:
    """Give a file the permissions of its folder. safetensors makes files readable by their owner only."""
    mode = file.parent.stat().st_mode & 0o666
    if os.name == "posix" and not file.is_symlink() and file.stat().st_mode & 0o666 != mode:
        file.chmod(mode)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `final` when the block succeeds, and is deleted when it fails."""
    temp = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    try:
        yield temp
        replace_folder(temp, final)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def replace_folder(temp: Path, final: Path) -> None:
    """Flush a folder to disk and rename it, so that `final` is complete even after a power failure."""
    for file in temp.rglob("*"):
        if file.is_file():
            apply_umask(file)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    fsync_folder(temp)
    old = final.with_name(f"{final.name}.old-{os.getpid()}")
    if final.exists():
        final.replace(old)
    temp.replace(final)
    fsync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def build_once(folder: Path, is_complete: Callable[[Path], bool], build: Callable[[Path], None]) -> Path:
    """Build a cache folder unless it is complete. Waits if another process is building it."""
    if not is_complete(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            _remove_leftovers(folder.parent, folder.name)
            if not is_complete(folder):
                build(folder)
    return folder


def check_new_output(out: Path, suffix: str = "") -> None:
    """Raise an InputError for an output that exists, lacks the suffix, or cannot be written."""
    if out.exists():
        raise FolderError(f"{out}: already exists", fix=f"give another name, such as {suggest_new(out)}")
    if not out.name.endswith(suffix):
        named = out.with_name(out.name + suffix)
        raise FolderError(f"{out}: the name must end in {suffix}", fix=f"give --out {shlex.quote(str(named))}")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        why = "is not writable" if parent.is_dir() else "is a file"
        raise FolderError(f"{out}: cannot be written: {parent} {why}", fix="give another folder with --out")


@contextmanager
def exclusive_output(out: Path) -> Iterator[None]:
    """Lock an output path. Raises FolderError if it exists, or if another process is writing it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.with_name(f".{out.name}.lock")
    was_killed = lock.exists()  # a process that ends normally removes its lock
    try:
        acquired = FileLock(lock, timeout=0).acquire()
    except Timeout:
        what, fix = f"{out}: another process is writing it", "wait for it, or give another name with --out"
        raise FolderError(what, fix=fix) from None
    with acquired:
        try:
            check_new_output(out)
            for entry in _entries(out.parent) if was_killed else ():
                if re.fullmatch(rf"{re.escape(out.name)}\.tmp-\d+", entry.name):  # nothing is ever replaced: no .old-N
                    shutil.rmtree(entry)
            yield
        finally:
            if os.name == "posix":  # Windows cannot remove an open file
                lock.unlink(missing_ok=True)


def find_runs(folder: Path) -> list[RunFolder]:
    runs = [RunFolder(entry) for entry in _entries(folder) if is_run(entry)]
    return sorted(runs, key=lambda run: run.recipe.stat().st_mtime)


def run_name(data: str) -> str:
    """Return the name, without a number, of a run that trains on this data file."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data).stem).strip(".-")
    return name or "run"  # the stem may have no ASCII letters


def next_numbered(folder: Path, name: str) -> Path:
    """Return FOLDER/NAME-N, where N is one above the highest number in use."""
    matches = (re.fullmatch(rf"{re.escape(name)}-(\d+)", entry.name) for entry in _entries(folder))
    return folder / f"{name}-{max((int(match[1]) for match in matches if match), default=0) + 1}"
