"""Whose fault an error is that comes up while a model is computed: transformers' and peft's own are named as theirs."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from strop.errors import RunError
from strop.machine.memory import is_out_of_memory

THEIRS = ("transformers", "peft")
FAULTS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


@contextmanager
def blaming(family: str) -> Iterator[None]:
    """Raises RunError in the place of an error that came up in transformers' or peft's code below strop's last line.

    family: the model's type. Memory that runs out is another trouble.
    """
    try:
        yield
    except FAULTS as error:
        found = None if is_out_of_memory(error) else _theirs(error, family)
        if found is None:
            raise
        raise found from error


def _theirs(error: Exception, family: str) -> RunError | None:
    ours, places = _place("strop"), {name: _place(name) for name in THEIRS}
    below: list[traceback.FrameSummary] = []
    for frame in traceback.extract_tb(error.__traceback__):
        below = [] if ours in Path(frame.filename).parents else [*below, frame]
    for frame in reversed(below):
        package = next((name for name in THEIRS if places[name] in Path(frame.filename).parents), None)
        if package is not None:
            said = next(iter(str(error).strip().splitlines()), type(error).__name__)
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            what = f"{package} {version(package)} fails on a model of type {family}: {said[:200]} ({where})"
            return RunError(what, fix=f"try another version of {package}; the model is computed by its own code")
    return None


def _place(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
