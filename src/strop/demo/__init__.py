"""The demo data set: spoken commands, each to one line of JSON; made by tools/make_demo_data.py."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def data_files() -> tuple[Path, Path]:
    """The training rows and the held-out rows, as files of the installed package."""
    folder = Path(str(files(__name__)))
    return folder / "train.jsonl", folder / "heldout.jsonl"
