"""Whose fault an error is that comes up while a model is computed: transformers' and peft's own are named as theirs."""

from __future__ import annotations

import traceback
from importlib.metadata import version
from pathlib import Path

from strop.errors import RunError

THEIRS = ("transformers", "peft")


def theirs(error: Exception, family: str) -> RunError | None:
    """The error as one of transformers or peft, where it came up in their code below strop's last line; else None."""
    below: list[traceback.FrameSummary] = []
    for frame in traceback.extract_tb(error.__traceback__):
        below = [] if "strop" in Path(frame.filename).parts else [*below, frame]
    for frame in reversed(below):
        package = next((name for name in THEIRS if name in Path(frame.filename).parts), None)
        if package is not None:
            said = next(iter(str(error).strip().splitlines()), type(error).__name__)
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            what = f"{package} {version(package)} cannot train a model of type {family}: {said[:200]} ({where})"
            return RunError(what, fix=f"try another version of {package}; the model is computed by its own code")
    return None
