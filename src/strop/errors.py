"""The errors that strop raises. Each one says what is wrong, where, and how to fix it.

The command line exits with code 2 for an InputError, 1 for a RunError, 130 for Stopped, and with the failed process's
code for PeerFailed.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import PurePath
from typing import Any

TROUBLESHOOTING_PAGE = "docs/troubleshooting.md"
MAX_SHOWN_LOCATIONS = 10  # an error lists this many locations and counts the rest
MAX_SAME_LOCATIONS = 3  # of more lines of a file with the same error, the first is shown with their number
FIX = "Fix: "  # begins an error's last line

_END = r"(?=:?(?:\s|$)|[;,()\[\]`])"  # follows a value
_VALUE = (
    r"""('[^']*'|"[^"]*"|\w+=[^\s;,()`]+(?:,\w+=[^\s;,()`]+)*"""  # quoted, or a map
    rf"|(?=[^\s;,()\[\]`]*[\dA-Z=./_])[^\s;,()\[\]`]+?{_END}"  # not a word of the sentence
    r"|(?!(?:out|and|or|with)\b)[a-z-]+(?=:\s|[;,)`]|$| or | and ))"
)
_NUMBER = r"-?\d+(\.\d+)?(e-?\d+)?"
_OVER = re.compile(r"--over ([\w.]+)=([\w.+-]+(?:,[\w.+-]+)*)")
_OPTION = re.compile(
    rf"`strop ([^`]*)`(?! in a terminal)|(`[^-`][^`]*`|\b(?:pip|hf|strop) [a-z][^,;)]*)"
    rf"|(?<![\w'\"-])--([a-z][\w.-]*\w)(?: {_VALUE})?"
)
_OTHER_VALUES = re.compile(r'="[\w-]+"(?: or [\w-]+)+(?=$|;| \()')  # overlong="drop" or split
_PYTHON_NAMES = {"no-parity": "measure=False", "resume": "resume_existing"}  # where they differ from the option's name
_PYTHON_FIELDS = {"model.name": "model", "data.train": "data"}  # other fields: the last part of the name
_FUNCTIONS = {"eval": "evaluate"} | {
    name: name for name in ("check", "export", "merge", "plan", "push", "resume", "sweep", "train")
}

in_terminal = ContextVar("in_terminal", default=False)  # whether the command line calls the public functions


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

    Attributes:
        what: what is wrong, in one sentence.
        fix: what to do about it.
        where: the locations in the user's input that are wrong, each with `file`, `line` and `what`.
        partial_result: results from before the failure, such as the folder of the run.
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
        what = self.what.removeprefix(f"{self.where[0].file}: ") if self.where else self.what
        if all(what not in line for line in lines):
            lines.insert(-1 if self.fix else len(lines), self.what)
        return "\n".join(in_python(line, is_fix=line.startswith(FIX)) for line in lines)

    def use_python_names(self) -> None:
        """Write the attributes as for a caller in Python instead of the terminal."""
        name = partial(in_python, is_fix=False)
        self.what, self.fix = name(self.what), in_python(self.fix)
        self.where = tuple(replace(place, file=name(place.file), what=name(place.what)) for place in self.where)

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows in place of the traceback."""
        return [f"strop {self.kind}: {self}"]

    def lines(self) -> list[str]:
        """Return the lines to print in a terminal: the locations, what is wrong, and the fix."""
        groups: dict[tuple[str, str], list[Location]] = {}
        for location in self.where:
            groups.setdefault((location.file, location.what), []).append(location)
        entries: list[tuple[str, int]] = []  # a line, and for how many locations it stands
        for same in groups.values():
            if len(same) > MAX_SAME_LOCATIONS:
                entries.append((f"{same[0]} ({len(same) - 1:,} more rows have the same error)", len(same)))
            else:
                entries += [(str(location), 1) for location in same]
        shown = [line for line, _ in entries[:MAX_SHOWN_LOCATIONS]]
        if more := sum(count for _, count in entries[MAX_SHOWN_LOCATIONS:]):
            shown.append(f"... and {more} more")
        what = [self.what] if len(self.where) != 1 and self.what not in shown else []
        return [*shown, *what, *([f"{FIX}{self.fix}"] if self.fix else [])]

    def as_json(self) -> dict[str, Any]:
        """Return the error as a dictionary with `kind`, `message`, `fix` and `where`."""
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


def in_python(text: str, *, is_fix: bool = True) -> str:
    """Write options and commands of the terminal in Python: `--data.bad_rows drop` as `bad_rows="drop"`.

    is_fix: False only names options (data.bad_rows drop), as in a text about what was given. Commands without a
    function in Python, and those of other programs, stay as they are.
    """

    def translate(match: re.Match[str]) -> str:
        command, unchanged, option, value = match.groups()
        if option in _PYTHON_FIELDS and not value:
            return _PYTHON_FIELDS[option] + ("=..." if is_fix else "")
        if option and not value and is_fix and text[: match.start()].endswith(("give ", "with ")):
            return f"{_argument(option, None)}=..."
        if command:
            return _call(command)
        if value and not is_fix:
            return f"{_argument(option, None)} {value}"
        return unchanged or _argument(option, value) + ("," if value and text[match.end() :].startswith(" --") else "")

    if is_fix:
        text = _OVER.sub(lambda match: f'over={{"{match[1]}": {_sweep_values(match[2])}}}', text)
    text = _OPTION.sub(translate, text)
    return _OTHER_VALUES.sub(lambda match: re.sub(r"(?<= or )[\w-]+", r'"\g<0>"', match[0]), text)


def _sweep_values(spec: str) -> str:
    """Write the values of --over in Python: 8,16,32 as a list, and 1e-4..1e-3 as a tuple."""
    if ".." in spec:
        return f"({', '.join(spec.split('..'))})"
    return f"[{', '.join(part if re.fullmatch(_NUMBER, part) else json.dumps(part) for part in spec.split(','))}]"


def _argument(option: str, value: str | None) -> str:
    name = option.replace("-", "_")
    if option in _PYTHON_NAMES or value is None:
        return _PYTHON_NAMES.get(option, name) + (f" {value}" if value else "")
    text, pairs = value, value.strip("'\"")
    if re.fullmatch(r"\w+=[^=,]+(,\w+=[^=,]+)*", pairs):
        text = json.dumps(dict(pair.split("=") for pair in pairs.split(",")), ensure_ascii=False)
    elif value in ("true", "false"):
        text = value.title()
    elif not re.fullmatch(rf"{_NUMBER}|\.\.\.", value):
        text = json.dumps(pairs, ensure_ascii=False)
    return f"{_PYTHON_FIELDS.get(name, name.rpartition('.')[2])}={text}"


def _call(command: str) -> str:
    """Return the call of a function that does what `strop COMMAND` does."""
    name, *words = (word.strip("'") for word in re.findall(r"'[^']*'|\S+", command))
    if name not in _FUNCTIONS:
        return f"`strop {command}` in a terminal"
    function, arguments = f"strop.{_FUNCTIONS[name]}", list[str]()
    if words in (["--help"], ["--help-all"]):
        return f"`help({function})`"
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
            arguments.append(_argument(word[2:], value))
        else:
            arguments.append(json.dumps(word, ensure_ascii=False))
    return f"`{function}({', '.join(arguments)})`" if arguments else f"`{function}`"


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word most similar to `word`, or None. Suffixes such as .json and .jsonl do not count."""
    known = list(known)
    parts = sorted(word.split("_"))
    if swapped := next((other for other in known if other != word and sorted(other.split("_")) == parts), None):
        return swapped
    for match in difflib.get_close_matches(word, [candidate for candidate in known if candidate != word], n=5):
        paths = PurePath(word), PurePath(match)
        longer, shorter = sorted((path.suffix for path in paths), key=len, reverse=True)
        are_alike = longer == shorter or (shorter and longer.startswith(shorter))  # .jsonl and .json
        names = [path.stem if are_alike else str(path) for path in paths]
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
