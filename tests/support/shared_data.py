"""Where the third-party test data lies; it is never part of the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import ROOT

FOLDER = Path(os.environ.get("STROP_TEST_DATA") or ROOT.parent / "shared" / "data")


def shared(name: str) -> str:
    """The path of a shared file. Skips the test where it is absent, except in CI, where it fails."""
    path = FOLDER / name
    if not path.exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no {path}: set STROP_TEST_DATA")
    return str(path)
