"""A run folder: the names in it, atomic writes, and the claim that keeps a second run out.

recipe.yaml  lock.json  events.jsonl  checkpoints/step-000120/  adapter/  report.json  report.html
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from strop.errors import DiskError, FolderError, nearest

_STEP = re.compile(r"step-(\d{6,})")
_NAME = re.compile(r"[^\x00-\x1f\x7f]+")
_DISK_FAULTS = (errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC))
_CLAIM = ("claim.json", ".claim.lock")


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def lock(self) -> Path:
        return self.path / "lock.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def reference(self) -> Path:
        """How likely each answer was when training began, for objectives that compare with that."""
        return self.path / "reference.safetensors"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    @property
    def answers(self) -> Path:
        """What base and tuned answered to each row of the last evaluation."""
        return self.path / "answers.json"

    @property
    def holder(self) -> int | None:
        """The live process, another than this one, that holds the folder."""
        return _live_holder(self.path / _CLAIM[0])

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of each checkpoint, oldest first; temp folders are not checkpoints."""
        folder = self.path / "checkpoints"
        names = [(match, entry) for entry in _entries(folder) if (match := _STEP.fullmatch(entry.name))]
        return sorted((int(match[1]), entry) for match, entry in names)

    @property
    def finished(self) -> bool:
        """Whether all that the recipe asks for was done; a run that its time budget ended can go on."""
        report = self.read_report()
        return bool(report.get("exit") == 0 and report.get("ended") != "time")

    def read_report(self) -> dict[str, Any]:
        """What report.json holds; nothing where it is absent or damaged (`strop resume` writes it again)."""
        return read_json(self.report)

    def read_lock(self) -> dict[str, Any]:
        """What lock.json holds. Raises FolderError where it is damaged: nothing else tells what a run is made of."""
        try:
            found = json.loads(self.lock.read_bytes())
            lacking = [name for name in ("base", "data", "values", "versions", "threads") if name not in found]
            why = f"it lacks {lacking[0]}" if lacking else ""
        except (OSError, ValueError, RecursionError, TypeError) as error:
            why = str(error)
        if why:
            raise FolderError(f"{self.lock}: damaged: {why}", fix="put it back, or start a new run")
        return dict(found)

    def remove_if_empty(self) -> None:
        """Takes back a folder that was made for a run which never began: no event is told of."""
        if self.path.is_dir() and _is_bare(self.path):
            shutil.rmtree(self.path)

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Holds the folder for this process. Raises FolderError while another live process holds it.

        The lock is the system's own: it ends with the process, however that ends. claim.json says who holds it.
        """
        file, lock = self.path / _CLAIM[0], FileLock(self.path / _CLAIM[1], timeout=0)
        try:
            held = lock.acquire()
        except Timeout:
            raise self._in_use(_live_holder(file)) from None
        with held:
            holder = _live_holder(file)  # a file system without locks would have let both in
            if holder is not None:
                raise self._in_use(holder)
            for place in (self.path, self.path / "checkpoints"):
                _sweep(place)
            held_by = {
                "pid": os.getpid(),
                "started": psutil.Process().create_time(),
                "folder": str(self.path.resolve()),
            }
            write_atomic(file, json.dumps(held_by))
            try:
                yield
            finally:
                file.unlink(missing_ok=True)

    def _in_use(self, pid: int | None) -> FolderError:
        by = f"process {pid}" if pid is not None else "another process"
        return FolderError(f"{self.path}: in use by {by}", fix="wait for it, or give --out another folder")


def is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file() and (path / "lock.json").is_file()


def create(path: Path) -> RunFolder:
    """Makes an empty run folder and proves by a real write that it can be written to.

    A folder whose run was killed before it had a recipe and a lock counts as empty.
    Raises FolderError where the path is a file, holds anything already, or cannot be written.
    """
    if not _NAME.fullmatch(path.name):
        raise FolderError(f"{str(path)!r}: not a name for a run folder", fix="give --out another folder")
    new = "give --out a new folder"
    if is_run(path):
        raise FolderError(f"{path}: holds a run", fix=f"go on with `strop resume {path}`, or {new}")
    if path.is_dir() and not _is_bare(path):
        raise FolderError(f"{path}: is not empty", fix=new)
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / ".write-test", "strop")
        (path / ".write-test").unlink()
    except OSError as error:
        raise FolderError(f"{path}: cannot be written: {error.strerror}", fix="give --out another folder") from None
    return RunFolder(path)


def _is_bare(path: Path) -> bool:
    """Whether a folder holds nothing but what a run has before its first event."""
    names = {re.sub(r"^\.(.+)\.tmp-\d+$", r"\1", entry.name) for entry in path.iterdir()}
    return names <= {*_CLAIM, ".write-test", "recipe.yaml", "lock.json"}


def free_bytes(path: Path) -> int:
    """Bytes that can be written where `path` is or will be."""
    existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Inside this block a disk that is full, broken or read-only is a DiskError that names `path`, or what is elsewhere
    (a file of the cache)."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"os error (\d+)", str(error))  # safetensors passes on what its own language says
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if re.fullmatch(r"\d+ requested and \d+ written", str(error)):  # numpy, which does not say why
            number = errno.ENOSPC
        if number is None or number not in _DISK_FAULTS:
            raise
        named = getattr(error, "filename", None)
        place = path if named is None else Path(os.fsdecode(named))
        place = path if path.absolute() in place.absolute().parents else place
        fix = "free some space or mend the disk, and go on: what was complete before is still there"
        if place != path and is_cache(place):
            fix = "free some space there, or set STROP_CACHE to a folder of your own that can be written"
        raise DiskError(f"{place}: cannot be written: {os.strerror(number)}", fix=fix) from None


def open_run(path: Path) -> RunFolder:
    """An existing run folder. Raises FolderError with the nearest existing name."""
    if not is_run(path):
        siblings = [str(entry) for entry in _entries(path.parent) if is_run(entry)]
        what = "not a run folder" if path.exists() else f"no such run{nearest(str(path), siblings)}"
        raise FolderError(f"{path}: {what}", fix="see `strop runs`")
    return RunFolder(path)


def _sweep(folder: Path, name: str | None = None) -> None:
    """Removes what a killed process left half done in a folder, and puts back what it was about to replace.

    name: of the one entry that this process may clean up after; default: all.
    """
    for entry in _entries(folder):
        made = re.fullmatch(r"\.?(.+)\.(tmp|old)-\d+", entry.name)
        if made is None or name not in (None, made[1]):
            continue
        if made[2] == "old" and not entry.with_name(made[1]).exists():
            entry.replace(entry.with_name(made[1]))
        elif entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _live_holder(file: Path) -> int | None:
    """The process that holds a claim and still runs (same pid and start time), else None. The claim in a copy of a
    folder is the original's."""
    try:
        claim = json.loads(file.read_text(encoding="utf-8"))
        if claim.get("folder", str(file.parent.resolve())) != str(file.parent.resolve()):
            return None
        process = psutil.Process(int(claim["pid"]))
        alive = abs(process.create_time() - float(claim["started"])) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError, psutil.NoSuchProcess):
        return None
    return process.pid if alive and process.pid != os.getpid() else None


def write_atomic(path: Path, text: str) -> None:
    """Writes text so that a reader, or a crash, sees the old file or the new one, never a part."""
    temp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temp.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds; an empty one where the file is absent or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def fsync_folder(path: Path) -> None:
    """Makes the names in a folder durable; systems that cannot open a folder (Windows) do without."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def cache_folder() -> Path:
    """Where strop keeps what it can make again: $STROP_CACHE, else $XDG_CACHE_HOME/strop, else ~/.cache/strop."""
    try:
        if own := os.environ.get("STROP_CACHE"):
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "strop"
    except RuntimeError:  # a container's user that no list of users has
        what = "this user has no home folder, in which to keep what can be used again"
        raise FolderError(what, fix="set STROP_CACHE to a folder that can be written") from None


def is_cache(place: Path) -> bool:
    """Whether a place that cannot be written is in the cache, or is a folder that the cache is to be made in."""
    place, cache = place.absolute(), cache_folder().absolute()
    return cache in (place, *place.parents) or place in cache.parents


def apply_umask(file: Path) -> None:
    """Gives a file the rights that the user's umask gave its folder: safetensors writes files for their user alone."""
    mode = file.parent.stat().st_mode & 0o666
    if os.name == "posix" and not file.is_symlink() and file.stat().st_mode & 0o666 != mode:
        file.chmod(mode)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temp folder beside `final` that becomes it, whole and synced, when the block ends well; else it is removed."""
    temp = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    try:
        yield temp
        publish(temp, final)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def publish(made: Path, final: Path) -> None:
    """Gives a folder its name, once all that it holds is on the disk: a power cut leaves no half of it under that name.
    What had the name before is removed."""
    for file in made.rglob("*"):
        if file.is_file():
            apply_umask(file)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    fsync_folder(made)
    old = final.with_name(f"{final.name}.old-{os.getpid()}")
    if final.exists():
        final.replace(old)
    made.replace(final)
    fsync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def build_once(folder: Path, is_made: Callable[[Path], bool], make: Callable[[Path], None]) -> Path:
    """A folder of the cache: made here, or waited for while another process makes it. Nobody sees it replaced. What a
    killed process left of it is removed."""
    if not is_made(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            _sweep(folder.parent, folder.name)
            if not is_made(folder):
                make(folder)
    return folder


@contextmanager
def exclusive_output(out: Path) -> Iterator[None]:
    """Inside this block no other process makes what a command was asked for. Raises FolderError where one does, or has.

    Two that write the same half-made file would mix their models in it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.with_name(f".{out.name}.lock")
    was_killed = lock.exists()  # one that ends removes it
    try:
        held = FileLock(lock, timeout=0).acquire()
    except Timeout:
        raise FolderError(
            f"{out}: another process is making it", fix="wait for it, or give --out another name"
        ) from None
    with held:
        try:
            if out.exists():
                raise FolderError(f"{out}: is there already", fix="give --out another name")
            for half in _entries(out.parent) if was_killed else ():
                if re.fullmatch(rf"{re.escape(out.name)}\.tmp-\d+", half.name):
                    shutil.rmtree(half)
            yield
        finally:
            if os.name == "posix":  # elsewhere a file that is open cannot be removed
                lock.unlink(missing_ok=True)


def find_runs(folder: Path) -> list[RunFolder]:
    """The runs in a folder of runs, oldest first."""
    found = [RunFolder(entry) for entry in _entries(folder) if is_run(entry)]
    return sorted(found, key=lambda run: run.recipe.stat().st_mtime)


def run_name(data: str) -> str:
    """What a run on a data file is called, without its number."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data).stem).strip(".-")
    return plain or "run"  # nothing is left of a name in another script


def next_numbered(folder: Path, name: str) -> Path:
    """runs/demo-1, runs/demo-2, ...: the first number that is free."""
    taken = [
        int(match[1]) for entry in _entries(folder) if (match := re.fullmatch(rf"{re.escape(name)}-(\d+)", entry.name))
    ]
    return folder / f"{name}-{max(taken, default=0) + 1}"
