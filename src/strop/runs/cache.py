"""List and delete what strop keeps in its cache folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from strop.runs.folder import cache_folder, disk_errors

DAY_S = 86400
GIVEN = ("rows", "images")  # without which runs that were started in Python may not resume
KINDS = {  # the first level of the cache folder
    "gguf": "GGUF files as 16-bit folders, and their tokenizers",
    "quantized": "quantized bases",
    "layers": "bases that are streamed from disk",
    "data": "prepared rows",
    "rows": "rows given in Python, which their runs need",
    "images": "downloaded images, and those given in Python",
    "features": "encoded images",
    "teacher": "a teacher's answers and probabilities",
    "keep": "a base's answers for train.keep",
}
OTHER = "measurements"  # of the machine; small, and not worth deleting


@dataclass(frozen=True)
class CacheEntry:
    """A folder or file of the cache.

    used: when it was last read or written, in seconds since 1970. File systems may store it with an error of a day.
    """

    kind: str
    path: Path
    size: int
    used: float

    @property
    def unused_days(self) -> float:
        return (time.time() - self.used) / DAY_S


def list_entries() -> list[CacheEntry]:
    """Return what can be deleted, by kind. A folder that another process is writing is left out."""
    entries = [entry for kind in KINDS for entry in _list_kind(kind)]
    others = [path for path in _children(cache_folder()) if path.name not in KINDS]
    return entries + [CacheEntry(OTHER, path, *_measure(path)) for path in others]


def select_entries(entries: Sequence[CacheEntry], kinds: Sequence[str], unused_days: float = 0) -> list[CacheEntry]:
    """Return the entries of some kinds (`all`: every kind but GIVEN) that were not used for some days."""
    chosen = {*kinds, *(KINDS.keys() - GIVEN if "all" in kinds else ())}
    return [entry for entry in entries if entry.kind in chosen and entry.unused_days >= unused_days]


def delete_entries(entries: Sequence[CacheEntry]) -> None:
    """Delete entries. What a process has open stays readable to it on Linux and macOS. Raises DiskError."""
    for entry in entries:
        with disk_errors(entry.path):
            if entry.path.is_dir() and not entry.path.is_symlink():
                shutil.rmtree(entry.path)
            else:
                entry.path.unlink(missing_ok=True)


def _list_kind(kind: str) -> Iterator[CacheEntry]:
    for path in _children(cache_folder() / kind):
        if not _is_locked(path):
            yield CacheEntry(kind, path, *_measure(path))


def _children(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix != ".lock") if folder.is_dir() else []


def _is_locked(path: Path) -> bool:
    """Return whether a process is writing this entry (data.store) or a folder in it (runs.folder.build_once)."""
    for lock in path.glob("*lock") if path.is_dir() else ():  # `lock`, and `.NAME.lock`
        try:
            with FileLock(lock, timeout=0):
                pass
        except Timeout:
            return True
    return False


def _measure(path: Path) -> tuple[int, float]:
    """Return the bytes of an entry, and when it was last used."""
    files = [file for file in path.rglob("*") if not file.is_dir()] if path.is_dir() else [path]
    size, used = 0, path.lstat().st_mtime
    for file in files:
        stat = file.lstat()
        size, used = size + stat.st_size, max(used, stat.st_atime, stat.st_mtime)
    return size, used
