"""The note, the tags and the name of a run, which its user chooses. The note and the tags are in notes.json."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from strop.dash.files import CONTENT_ERRORS, read_json
from strop.errors import FolderError, InputError
from strop.runs.events import read_events
from strop.runs.folder import RunFolder, disk_errors, write_json

NOTES_FILE = "notes.json"
MAX_NOTE_CHARS, MAX_TAGS, MAX_TAG_CHARS = 10_000, 20, 40


def read_notes(folder: Path) -> dict[str, Any]:
    """Return the note and the tags of a run, both empty if it has none."""
    notes = read_json(folder / NOTES_FILE)
    note, tags = notes.get("note"), notes.get("tags")
    texts = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    return {"note": note if isinstance(note, str) else "", "tags": texts}


def check_notes(note: str, tags: list[Any]) -> dict[str, Any]:
    """Return the note and the tags without spaces and repetitions. Raises InputError if they are invalid."""
    if len(note) > MAX_NOTE_CHARS:
        raise InputError(f"note: longer than {MAX_NOTE_CHARS} characters", fix="shorten it")
    stripped = list(dict.fromkeys(tag.strip() for tag in tags if isinstance(tag, str) and tag.strip()))
    if len(stripped) > MAX_TAGS or any(len(tag) > MAX_TAG_CHARS or not tag.isprintable() for tag in stripped):
        raise InputError("tags: invalid", fix=f"give at most {MAX_TAGS} tags of at most {MAX_TAG_CHARS} characters")
    return {"note": note, "tags": stripped}


def write_notes(folder: Path, notes: dict[str, Any]) -> dict[str, Any]:
    """Store the checked note and tags of a run atomically."""
    with _folder_errors(folder), disk_errors(folder):
        write_json(folder / NOTES_FILE, notes)
    return read_notes(folder)


def move_run(folder: Path, target: Path) -> None:
    """Rename the folder of a run. Raises FolderError if a process uses it or the new name is taken."""
    if os.path.lexists(target):
        raise FolderError(f"{target}: exists", fix="choose another name")
    with _folder_errors(folder), disk_errors(folder):
        with RunFolder(folder).claim():  # no process can start to use the folder before it is renamed
            folder.rename(target)
        (target / "claim.json").unlink(missing_ok=True)


def rewrite_report(path: Path) -> None:
    """Write report.html again, with the name of the run's folder and its tags, if the run has one."""
    folder = RunFolder(path)
    if not folder.page.is_file() or folder.page.is_symlink():
        return
    from strop.evaluation.report import write_report  # loads jinja2

    with suppress(OSError, *CONTENT_ERRORS):
        report = folder.read_report()
        report = {**report, "recipe": with_folder(report["recipe"], path)}
        write_report(path, report, read_events(folder.events))


def with_folder(recipe: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Return a recipe whose option `out` is the folder of the run, which may have been renamed."""
    return [{**item, "value": str(path)} if item.get("field") == "out" else item for item in recipe]


@contextmanager
def _folder_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FolderError(f"{folder}: cannot be changed: {error.strerror}", fix="make it writable") from None
