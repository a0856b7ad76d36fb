"""One tree of errors. Each carries what is wrong, what to do about it, and where.

StropError                what, fix, where; never raised itself
├── InputError            the user's input is wrong; found before weights load      exit 2
│   ├── RecipeError       an option or a recipe: unknown key, bad value
│   ├── DataError         a data file or its rows
│   ├── ModelError        a model, an adapter, a tokenizer, a chat template
│   │   ├── GatedError        the Hub does not let this account have it
│   │   └── QuantizerError    bitsandbytes is missing or does not fit this machine
│   ├── DeviceError       a device that torch cannot use here
│   └── FolderError       a folder that cannot be written, or holds something already
├── RunError              it was tried and failed                                   exit 1
│   ├── DivergedError     training went wrong and going back did not help
│   │   └── NonFiniteError    loss or gradient is NaN or infinite
│   ├── ParityError       what was made is not the model it was made of
│   ├── MemoryLimitError  out of memory, and nothing left that would save some
│   ├── DiskError         the disk is full or broken
│   └── CheckpointError   no checkpoint that verifies
├── Elsewhere             another process of this run has failed, and says why      exits as that one
└── Stopped               Ctrl-C or SIGTERM, after saving                           exit 130
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

TROUBLESHOOTING_PAGE = "docs/troubleshooting.md"
MAX_SHOWN_PLACES = 10  # how many places an error lists before it only counts them


@dataclass(frozen=True)
class Where:
    """A place in the user's input: a file, a line from 1 (None: the whole file), and what is wrong there."""

    file: str
    line: int | None
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}" if self.line else f"{self.file}: {self.what}"


class StropError(Exception):
    """what went wrong, how to fix it, and where (any number of places)."""

    exit_code = 1
    page = ""  # the part of docs/troubleshooting.md that is about it

    def __init__(self, what: str, *, fix: str = "", where: Sequence[Where] = ()) -> None:
        super().__init__(what)
        self.what = what
        self.fix = "; ".join(
            part for part in (fix, f"see {TROUBLESHOOTING_PAGE}#{self.page}" if self.page else "") if part
        )
        self.where = tuple(where)
        self.partial_result: dict[str, Any] = {}  # what `--json` reports beside the error

    @property
    def kind(self) -> str:
        return type(self).__name__

    def lines(self) -> list[str]:
        """The error as a person reads it: one line a place, then the fix."""
        if len(self.where) == 1:
            return [f"{self.where[0]}" + (f": {self.fix}" if self.fix else "")]
        if not self.where:
            return [self.what + (f": {self.fix}" if self.fix else "")]
        shown = [str(place) for place in self.where[:MAX_SHOWN_PLACES]]
        more = len(self.where) - len(shown)
        rest = [f"... and {more} more"] if more else []
        return [*shown, *rest, self.what + (f": {self.fix}" if self.fix else "")]

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "message": self.what,
            "fix": self.fix,
            "where": [asdict(place) for place in self.where],
        }


class InputError(StropError):
    exit_code = 2


class RecipeError(InputError):
    pass


class DataError(InputError):
    pass


class ModelError(InputError):
    pass


class GatedError(ModelError):
    page = "gated"


class QuantizerError(ModelError):
    page = "bitsandbytes"


class DeviceError(InputError):
    page = "cuda"


class FolderError(InputError):
    pass


class RunError(StropError):
    pass


class DivergedError(RunError):
    pass


class NonFiniteError(DivergedError):
    page = "nan"


class ParityError(RunError):
    pass


class MemoryLimitError(RunError):
    page = "memory"


class DiskError(RunError):
    page = "disk"


class CheckpointError(RunError):
    pass


class PeerFailed(StropError):
    """Nothing to print: the process of another device does."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of this run has failed")
        self.exit_code = exit_code


class Stopped(StropError):
    exit_code = 130


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean x?)' for another known word that is most like `word`, else ''."""
    close = difflib.get_close_matches(word, [other for other in known if other != word], n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def first_line(error: BaseException) -> str:
    """Of what a library says; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
