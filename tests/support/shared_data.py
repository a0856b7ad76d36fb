"""Paths of third-party test data, which is not part of the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import ROOT

FOLDER = Path(os.environ.get("STROP_TEST_DATA") or ROOT.parent / "shared" / "data")


def shared(name: str) -> str:
    """Return the path of a shared file. Skips the test if it is absent, except in CI, where the test fails."""
    path = FOLDER / name
    if not path.exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no {path}: set STROP_TEST_DATA")
    return str(path)
