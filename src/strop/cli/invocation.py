"""The command line that calls strop in this environment, for messages that users can copy."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path


def command_name() -> str:
    """Return how strop was called: `strop` if it is on the PATH, otherwise a path or `python -m strop`."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{Path(sys.executable).name} -m strop"
    on_path = shutil.which(called.name)
    if called.name != "strop" or (on_path is not None and Path(on_path).resolve() == called.resolve()):
        return "strop"
    try:
        return str(called.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(called)


def with_command_name(text: str) -> str:
    """Replace `strop COMMAND` in a message by a command that works in this environment."""
    name = command_name()
    return text if name == "strop" else re.sub(r"(?<![\w/.-])strop (?=[a-z])", f"{name} ", text)
