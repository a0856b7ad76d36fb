"""The errors that strop raises. Each one says what is wrong, where, and how to fix it.

The command line exits with code 2 for an InputError, 1 for a RunError, 130 for Stopped, and with the failed process's
code for PeerFailed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

TROUBLESHOOTING_PAGE = "docs/troubleshooting.md"
MAX_SHOWN_LOCATIONS = 10  # an error lists this many locations and counts the rest
FIX = "Fix: "  # begins an error's last line

_OPTION = re.compile(r"(`[^`]*`|\b(?:pip|hf|strop) [a-z][^,;)]*)|(?<![\w'\"-])--([a-z][\w.-]*\w)")
_PYTHON_NAMES = {"no-parity": "measure=False", "resume": "resume_existing"}  # where they differ from the option's name


@dataclass(frozen=True)
class Location:
    """A location in the user's input: a file, a line number from 1 (None: the whole file), and what is wrong there."""

    file: str
    line: int | None
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}" if self.line else f"{self.file}: {self.what}"


class StropError(Exception):
    """Base class of all errors of strop.

    Args:
        what: what is wrong, in one sentence.
        fix: what to do about it.
        where: the locations in the user's input that are wrong.
    """

    exit_code = 1
    page = ""  # anchor of the heading in docs/troubleshooting.md about this error

    def __init__(self, what: str, *, fix: str = "", where: Sequence[Location] = ()) -> None:
        super().__init__(what)
        self.what = what
        self.fix = "; ".join(part for part in (fix, self.page and f"see {TROUBLESHOOTING_PAGE}#{self.page}") if part)
        self.where = tuple(where)
        self.partial_result: dict[str, Any] = {}  # results from before the failure, for `--json`

    @property
    def kind(self) -> str:
        return type(self).__name__

    def __str__(self) -> str:
        """Return the locations, what is wrong, and the fix, with options by their names in Python."""
        lines = self.lines()
        if all(self.what not in line for line in lines):
            lines.insert(len(self.where), self.what)
        return "\n".join(map(_name_fields, lines))

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows in place of the traceback."""
        return [f"strop {self.kind}: {self}"]

    def lines(self) -> list[str]:
        """Return the lines to print in a terminal: the locations, what is wrong, and the fix."""
        shown = [str(location) for location in self.where[:MAX_SHOWN_LOCATIONS]]
        if more := len(self.where) - len(shown):
            shown.append(f"... and {more} more")
        return [*shown, *([self.what] if len(shown) != 1 else []), *([f"{FIX}{self.fix}"] if self.fix else [])]

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "message": self.what,
            "fix": self.fix,
            "where": [asdict(location) for location in self.where],
        }


class InputError(StropError):
    """Raised when the user's input is wrong, before weights load."""

    exit_code = 2


class RecipeError(InputError):
    """Raised when an option or a recipe has an unknown key or an invalid value."""


class DataError(InputError):
    """Raised when a data file or some of its rows are wrong."""


class ModelError(InputError):
    """Raised when a model, an adapter, a tokenizer or a chat template cannot be used."""


class GatedError(ModelError):
    """Raised when the Hub denies this account access to a model."""

    page = "gated"


class QuantizerError(ModelError):
    """Raised when bitsandbytes is missing or does not work on this machine."""

    page = "bitsandbytes"


class DeviceError(InputError):
    """Raised when torch cannot use the requested device on this machine."""

    page = "cuda"


class FolderError(InputError):
    """Raised when a folder or file cannot be written, or exists already."""


class RunError(StropError):
    """Raised when a command was tried and failed."""


class DivergedError(RunError):
    """Raised when training diverges and rolling back does not help."""


class NonFiniteError(DivergedError):
    """Raised when the loss or a gradient stays NaN or infinite."""

    page = "nan"


class ParityError(RunError):
    """Raised when a merged, exported or served model differs from the tuned one beyond the limit."""


class MemoryLimitError(RunError):
    """Raised when memory runs out and no setting is left that would need less."""

    page = "memory"


class DiskError(RunError):
    """Raised when the disk is full or broken."""

    page = "disk"


class CheckpointError(RunError):
    """Raised when no checkpoint is complete and undamaged."""


class PeerFailed(StropError):
    """Raised when another process of this run failed. That process prints the error; this one prints nothing."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of this run has failed")
        self.exit_code = exit_code


class Stopped(StropError):
    """Raised after Ctrl-C or SIGTERM, once the run is saved."""

    exit_code = 130


def _name_fields(text: str) -> str:
    """Replace options by their names in Python (--data.train by data.train), except in commands for a shell."""
    return _OPTION.sub(lambda match: match[1] or _PYTHON_NAMES.get(match[2]) or match[2].replace("-", "_"), text)


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word most similar to `word`, or None if none is similar. Equal file suffixes do not count."""
    for match in difflib.get_close_matches(word, [candidate for candidate in known if candidate != word], n=5):
        paths = PurePath(word), PurePath(match)
        names = [path.stem if paths[0].suffix == paths[1].suffix else str(path) for path in paths]
        if difflib.SequenceMatcher(None, names[0], names[1]).ratio() >= 0.6:
            return match
    return None


def suggest(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean x?)" for the known word most similar to `word`, or "" if none is similar."""
    match = closest(word, known)
    return f" (did you mean {match}?)" if match else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
