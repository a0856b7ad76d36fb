"""Compiling beforehand: nothing is left to the process that trains."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from strop.engine.cpu import warm

COMPILED = """
import numba.core.event as events, sys, torch
from strop.engine.exercise import exercise
heard = events.RecordingListener()
events.register("numba:compile", heard)
exercise(getattr(torch, sys.argv[1]))
found = [event.data["dispatcher"] for _, event in heard.buffer]
print([getattr(one, "py_func", one).__name__ for one in found])
"""


def test_the_parts_compile_all_that_a_run_calls(tmp_path: Path) -> None:
    """Loops that it compiles itself give other last bits than those of a run that is resumed."""
    about = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    begun = [
        subprocess.Popen([sys.executable, "-m", "strop.engine.exercise", "bfloat16", part], env=about)
        for part in ("attention", "products")
    ]
    assert [process.wait() for process in begun] == [0, 0]
    found = subprocess.run(
        [sys.executable, "-c", COMPILED, "bfloat16"], env=about, capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines()[-1] == "[]"


def test_it_is_said_where_they_cannot_be_compiled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warm.compile_once(torch.float32, tmp_path, exercise="strop.no_such_module")
    assert "(exit 1)" in caplog.text and "No module named strop.no_such_module" in caplog.text
    caplog.clear()
    warm.compile_once(torch.float32, tmp_path, exercise="strop.no_such_module")
    assert not caplog.text  # once


def test_loops_of_other_sources_are_not_kept(tmp_path: Path) -> None:
    for name in ("loop-1.nbi", "loop-1.1.nbc", "strop-other-exercise-float32"):
        (tmp_path / name).touch()
    warm.compile_once(torch.float32, tmp_path, exercise="strop.no_such_module")
    (tmp_path / "loop-2.nbi").touch()
    warm.compile_once(torch.bfloat16, tmp_path, exercise="strop.no_such_module")
    kept = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock")
    assert [name.rpartition("-")[2] for name in kept] == ["2.nbi", "bfloat16", "float32"]
