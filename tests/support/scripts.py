"""Scripts of tools/ and benchmarks/, which are no packages, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def script(file: Path) -> ModuleType:
    """The module of a script. It is looked up by its name from then on, as dataclasses and its neighbours do."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = made
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(made)
    finally:
        sys.path.remove(str(file.parent))
    return made
