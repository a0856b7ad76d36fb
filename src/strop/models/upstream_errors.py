"""Report errors that are raised by the model code of transformers and peft."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from strop.errors import RunError, first_line
from strop.machine.memory import is_out_of_memory

PACKAGES = ("transformers", "peft")


@contextmanager
def convert_model_errors(family: str) -> Iterator[None]:
    """Convert an error in the model code of transformers or peft to a RunError that names the package and the line."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        translated = None if is_out_of_memory(error) else _package_error(error, family)
        if translated is None:
            raise
        raise translated from error


def _package_error(error: Exception, family: str) -> RunError | None:
    """Return a RunError if the error was raised in, or by a call from, transformers or peft; else None."""
    strop_folder, folders = _package_folder("strop"), {name: _package_folder(name) for name in PACKAGES}
    frames: list[traceback.FrameSummary] = []  # called by strop's innermost frame
    for frame in traceback.extract_tb(error.__traceback__):
        frames = [] if strop_folder in Path(frame.filename).parents else [*frames, frame]
    for frame in reversed(frames):
        package = next((name for name in PACKAGES if folders[name] in Path(frame.filename).parents), None)
        if package is not None:
            line = f"{Path(frame.filename).name}:{frame.lineno}"
            what = f"{package} {version(package)} fails on a model of type {family}: {first_line(error)[:200]} ({line})"
            return RunError(what, fix=f"try another version of {package}; its own code runs this model")
    return None


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
