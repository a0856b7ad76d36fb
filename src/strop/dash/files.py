"""Read files of a run that may come from an untrusted source.

Links are not followed, since a link in a run folder could expose any file of the user, and sizes are limited.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from strop.config.names import is_data_file
from strop.errors import FolderError, InputError
from strop.runs.folder import is_run

# errors of code that parses a file with unexpected content
CONTENT_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
MAX_FILE_BYTES = 256 << 20  # enough for the answers of a large evaluation


def run_path(root: Path, name: str) -> Path:
    """Return the folder `name` directly below `root`. Raises FolderError for any other path."""
    path = root / name
    invalid = not name or name.startswith(".") or len(os.fsencode(name)) > 255
    if invalid or "/" in name or "\\" in name or not name.isprintable() or path.is_symlink():
        fix = "give a name without / and \\ that does not start with a dot"
        raise FolderError(f"{name}: not a name for a run" if name else "the name is empty", fix=fix)
    return path


def join_names(names: Iterable[str]) -> str:
    """Join names with commas; a comma in a name is escaped as `\\,`."""
    return ",".join(name.replace(",", "\\,") for name in names)


def split_names(text: str) -> list[str]:
    """Invert `join_names`."""
    return [name.replace("\\,", ",") for name in re.split(r"(?<!\\),", text)]


def open_file(path: Path) -> int:
    """Open a regular file that is not a link and return its descriptor. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path}: not a file")
    return handle


def read_bytes(path: Path, start: int = 0, limit: int = MAX_FILE_BYTES) -> bytes:
    """Return up to `limit` bytes from `start`, or nothing if the file cannot be read."""
    try:
        with os.fdopen(open_file(path), "rb") as file:
            file.seek(start)
            return file.read(limit)
    except OSError:
        return b""


def read_chunks(path: Path, starts: list[int], limit: int) -> list[bytes]:
    """Return up to `limit` bytes from each offset in `starts`, or [] if the file cannot be read."""
    chunks = []
    try:
        with os.fdopen(open_file(path), "rb", buffering=0) as file:
            for start in starts:
                file.seek(start)
                chunks.append(file.read(limit))
    except OSError:
        return []
    return chunks


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or {} if the file is missing or damaged."""
    try:
        value = json.loads(read_bytes(path))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_tail(path: Path, limit: int) -> str:
    """Return the lines that begin in the last `limit` bytes of a text file."""
    stamp = file_stamp(path)
    start = max(0, stamp[1] - limit) if stamp else 0
    data = read_bytes(path, start, limit)
    return (data.partition(b"\n")[2] if start else data).decode("utf-8", "replace")


def file_stamp(path: str | Path) -> tuple[int, int] | None:
    """Return the modification time in ns and the size of a file, or None if it does not exist."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def file_sizes(folder: Path) -> list[tuple[str, int]]:
    """Return the relative path and the size of every file in a folder, without following links."""
    entries, root = [], str(folder)
    for parent, _, names in os.walk(root):
        for name in names:
            path = os.path.join(parent, name)
            try:
                entries.append((path[len(root) + 1 :], os.lstat(path).st_size))
            except OSError:  # deleted in the meantime
                continue
    return sorted(entries)


def limit_rows(report: dict[str, Any] | None, limit: int) -> dict[str, Any] | None:
    """Return a data report that lists at most `limit` dropped rows and `limit` truncated rows."""
    result = dict(report or {})
    for name in ("dropped", "cut"):
        rows = result.get(name)
        if isinstance(rows, list) and len(rows) > limit:
            result |= {name: rows[:limit], f"{name}_left_out": len(rows) - limit}
    return result or report


CHOICES = {"data": ("data",), "model": ("model", "run"), "": ("data", "model", "run")}  # of the file chooser
MAX_SEARCHED_ENTRIES = 5000  # in one listing


def browse(roots: list[Path], path: str, kind: str) -> dict[str, Any]:
    """Return the entries of a folder for the file chooser. kind: of CHOICES. Raises InputError outside the roots."""
    if kind not in CHOICES:
        raise InputError(f"kind: {kind}: unknown", fix="data or model")
    try:
        folder = Path(path or roots[0]).expanduser().resolve(strict=True)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name.lower())
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: cannot be listed: {error}", fix="choose another folder") from None
    allowed = [root.resolve() for root in roots]
    if not any(folder == root or root in folder.parents for root in allowed):
        raise InputError(f"{path}: outside the folder that strop dash was started in", fix="type the path instead")
    finder = _Finder(CHOICES[kind])
    listed = [
        {"name": entry.name, "path": display_path(Path(entry.path)), "kind": found, "bytes": size}
        for entry in entries[:5000]
        if (found := finder.kind(entry)) and (size := _size(entry)) is not None
    ]
    parent = None if folder in allowed else str(folder.parent)
    return {"path": display_path(folder), "parent": parent, "entries": listed}


class _Finder:
    """Finds entries of some kinds, also in folders. Folders are listed without a search once it took long."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        self._kinds = kinds
        self._num_left = MAX_SEARCHED_ENTRIES

    def kind(self, entry: os.DirEntry[str]) -> str:
        """Return the kind of an entry, or "" if neither it nor an entry below it is of these kinds."""
        kind = "" if entry.name.startswith(".") else _entry_kind(entry)
        if kind in self._kinds:
            return kind
        return kind if kind == "folder" and self._contains(entry.path) else ""

    def _contains(self, folder: str) -> bool:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    self._num_left -= 1
                    if self._num_left < 0 or self.kind(entry):
                        return True
        except (OSError, RecursionError):
            pass
        return False


def display_path(path: Path) -> str:
    """Return a path relative to the current folder, or the full path if it is outside."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _size(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except OSError:
        return None


def _entry_kind(entry: os.DirEntry[str]) -> str:
    """Return run, model, data or folder, or "" for an entry that the file chooser does not list."""
    if entry.is_symlink():
        return ""
    if not entry.is_dir():
        is_model = entry.name.lower().endswith((".gguf", ".gguf.gz", ".gguf.zst"))
        return "model" if is_model else "data" if is_data_file(entry.name) else ""
    folder = Path(entry.path)
    if is_run(folder):
        return "run"
    return "model" if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file() else "folder"
