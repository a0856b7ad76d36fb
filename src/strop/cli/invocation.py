"""Commands of strop as they work when they are typed here."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path


def as_typed() -> str:
    """How this strop is called from here: as it was, where that is not on the PATH (`.venv/bin/strop`)."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{Path(sys.executable).name} -m strop"
    found = shutil.which(called.name)
    if called.name != "strop" or (found is not None and Path(found).resolve() == called.resolve()):
        return "strop"
    try:
        return str(called.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(called)


def typed(text: str) -> str:
    """A message whose commands of strop work as they stand."""
    name = as_typed()
    return text if name == "strop" else re.sub(r"(?<![\w/.-])strop (?=[a-z])", f"{name} ", text)
