"""Read files of a run safely: inside its folder, no links, bounded sizes.

A run folder may come from anyone, and a link in it could expose any file of this user.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from strop.errors import FolderError, InputError

# raised while parsing a file with unexpected content
CONTENT_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
MAX_BYTES = 256 << 20  # limit for a whole file, such as the answers of a large evaluation


def run_path(root: Path, name: str) -> Path:
    """Return the folder `name` directly below `root`. Raises FolderError for any other path."""
    path = root / name
    plain = name not in ("", ".", "..") and not name.startswith(".") and len(os.fsencode(name)) <= 255
    if not plain or "/" in name or "\\" in name or not name.isprintable() or path.is_symlink():
        raise FolderError("not a run name", fix="choose one from the list")
    return path


def join_names(names: Iterable[str]) -> str:
    """Join names with commas; a comma in a name is escaped as `\\,`."""
    return ",".join(name.replace(",", "\\,") for name in names)


def split_names(text: str) -> list[str]:
    """Split what join_names joined."""
    return [name.replace("\\,", ",") for name in re.split(r"(?<!\\),", text)]


def open_file(path: Path) -> int:
    """Open a regular file that is not a link and return its descriptor. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path}: not a file")
    return handle


def read_bytes(path: Path, start: int = 0, limit: int = MAX_BYTES) -> bytes:
    """Return up to `limit` bytes from `start`; empty if the file does not exist."""
    try:
        with os.fdopen(open_file(path), "rb") as file:
            file.seek(start)
            return file.read(limit)
    except OSError:
        return b""


def read_chunks(path: Path, starts: list[int], limit: int) -> list[bytes]:
    """Return up to `limit` bytes from each offset; empty if the file cannot be opened."""
    parts = []
    try:
        with os.fdopen(open_file(path), "rb", buffering=0) as file:
            for start in starts:
                file.seek(start)
                parts.append(file.read(limit))
    except OSError:
        return []
    return parts


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if it is missing or damaged."""
    try:
        value = json.loads(read_bytes(path))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_tail(path: Path, limit: int) -> str:
    """Return up to `limit` bytes from the end of a text file, starting at a line."""
    try:
        size = path.lstat().st_size
    except OSError:
        return ""
    start = max(0, size - limit)
    data = read_bytes(path, start, limit)
    return (data.partition(b"\n")[2] if start else data).decode("utf-8", "replace")


def file_sizes(folder: Path) -> list[tuple[str, int]]:
    """Return (relative path, bytes) of every file; links are not followed."""
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
    """Return a data report with up to `limit` dropped and truncated rows."""
    result = dict(report or {})
    for name in ("dropped", "cut"):
        rows = result.get(name)
        if isinstance(rows, list) and len(rows) > limit:
            result |= {name: rows[:limit], f"{name}_left_out": len(rows) - limit}
    return result or report


def browse(roots: list[Path], path: str) -> dict[str, Any]:
    """Return the entries of a folder for the file chooser. Raises InputError outside the roots."""
    try:
        folder = Path(path or roots[0]).expanduser().resolve(strict=True)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name.lower())
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: cannot be listed: {error}", fix="choose another folder") from None
    allowed = [root.resolve() for root in roots]
    if not any(folder == root or root in folder.parents for root in allowed):
        raise InputError(f"{path}: outside the folder that strop dash was started in", fix="type the path instead")
    shown = [
        {"name": entry.name, "path": _display_path(Path(entry.path)), "kind": kind, "bytes": size}
        for entry in entries[:5000]
        if not entry.name.startswith(".") and (kind := _kind(entry)) and (size := _bytes(entry)) is not None
    ]
    parent = folder.parent if folder not in allowed else None
    return {"path": _display_path(folder), "parent": str(parent) if parent else None, "entries": shown}


def _display_path(path: Path) -> str:
    """Return a path relative to the current folder if it is below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _bytes(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except OSError:
        return None


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return ""
    if not entry.is_dir():
        data = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
        name = entry.name.lower().removesuffix(".gz").removesuffix(".zst")
        return "model" if name.endswith(".gguf") else "data" if name.endswith(data) else ""
    inner = Path(entry.path)
    if (inner / "recipe.yaml").is_file() and (inner / "lock.json").is_file():
        return "run"
    return "model" if (inner / "config.json").is_file() or (inner / "adapter_config.json").is_file() else "folder"
