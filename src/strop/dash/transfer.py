"""Files that the browser downloads from a run, or uploads into the data folder next to the runs."""

from __future__ import annotations

import filecmp
import os
import re
import secrets
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from strop.config.names import DATA_SUFFIXES, is_data_file
from strop.dash.files import file_sizes, open_file
from strop.errors import FolderError, InputError
from strop.runs.folder import RunFolder, disk_errors

CHUNK_BYTES = 1 << 20
MAX_UPLOAD_BYTES = 1 << 30
MAX_NAME_CHARS = 60  # at most 240 bytes of UTF-8; file systems allow 255


def download(folder: RunFolder, kind: str) -> Iterator[bytes]:
    """Return the content of the adapter (as zip), the report or the recipe of a run. Raises FolderError without one."""
    if kind == "adapter":
        names = [] if folder.adapter.is_symlink() else [name for name, _ in file_sizes(folder.adapter)]
        files = [(f"adapter/{name}", folder.adapter / name) for name in names]
        if files:
            return _zip([(name, path) for name, path in files if not path.is_symlink()])
    elif kind in ("report", "recipe"):
        path = folder.page if kind == "report" else folder.recipe
        if path.is_file() and not path.is_symlink():
            return read_file(path)
    raise FolderError(f"{folder.path.name} has no {kind}", fix="wait until the run has written it")


def read_file(path: Path) -> Iterator[bytes]:
    """Return the content of a file. Raises FolderError if it is missing or a link."""
    try:
        return _read(os.fdopen(open_file(path), "rb"))
    except OSError:
        raise FolderError(f"{path}: no such file", fix="it was moved or deleted: write it again") from None


def _read(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


class _Buffer:
    """A file that only collects what is written."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        pass

    def take(self) -> bytes:
        data, self._parts = b"".join(self._parts), []
        return data


def _zip(files: list[tuple[str, Path]]) -> Iterator[bytes]:
    """Yield an uncompressed zip archive while it is made, so that its size in memory is limited."""
    buffer = _Buffer()
    with zipfile.ZipFile(buffer, "w") as archive:  # type: ignore[call-overload]
        for name, path in files:
            info = zipfile.ZipInfo.from_file(path, name, strict_timestamps=False)
            with archive.open(info, "w") as target:
                for chunk in _read(os.fdopen(open_file(path), "rb")):
                    target.write(chunk)
                    yield buffer.take()
    yield buffer.take()


def data_file_name(name: str) -> str:
    """Return a safe name for an uploaded file. Raises InputError if its suffix is not that of a data file."""
    safe = re.sub(r"[^\w.-]+", "-", re.split(r"[/\\]", name)[-1]).strip(".-")[-MAX_NAME_CHARS:].lstrip(".-")
    if not is_data_file(safe):
        raise InputError(f"{name[:200]}: not a data file", fix=f"upload one of {', '.join(DATA_SUFFIXES)}")
    return safe


class Upload:
    """A file that is being uploaded. It has a hidden name until `finish`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, data_file_name(name)
        self._temp = folder / f".upload-{secrets.token_hex(8)}"
        self._file: BinaryIO
        self.num_bytes = 0

    @contextmanager
    def receive(self) -> Iterator[Upload]:
        """Create the file, and delete it after an error. Raises FolderError if the folder is not writable."""
        if self._folder.is_symlink():
            raise FolderError(f"{self._folder}: a link", fix="replace it by a folder, or give a path instead")
        try:
            with disk_errors(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                with self._temp.open("xb") as self._file:
                    yield self
        except OSError as error:
            raise FolderError(f"{self._folder}: cannot be written: {error.strerror}", fix="make it writable") from None
        finally:
            self._temp.unlink(missing_ok=True)

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self.num_bytes += len(chunk)

    def finish(self) -> Path:
        """Give the file its name, with a number if a file with other content has it. Returns an equal file if any."""
        if not self.num_bytes:
            raise InputError(f"{self._name}: empty", fix="choose a file with rows")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        stem, _, suffix = self._name.partition(".")
        number = 1
        while True:
            path = self._folder / (self._name if number == 1 else f"{stem}-{number}.{suffix}")
            try:
                path.open("xb").close()  # reserves the name
            except FileExistsError:
                if path.is_file() and not path.is_symlink() and filecmp.cmp(self._temp, path, shallow=False):
                    return path
                number += 1
                continue
            self._temp.replace(path)
            return path
