"""The process that compiles loops: begun ahead where there is something to compile, told what later, ended with its
own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from strop.engine.kernels import compiler
from tests import ROOT


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waiting, and two cores are there."""
    monkeypatch.setattr(compiler, "_ahead", [])
    monkeypatch.setattr("os.cpu_count", lambda: 2)


def test_it_is_begun_only_where_nothing_is_compiled(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    (tmp_path / "cpu_1").mkdir()
    (tmp_path / "cpu_1" / "strop-0-exercise-bfloat16").touch()
    compiler.begin_ahead("exercise")
    assert compiler._ahead == []
    (tmp_path / "cpu_1" / "strop-0-exercise-bfloat16").unlink()
    compiler.begin_ahead("exercise")
    compiler.begin_ahead("exercise")
    [begun] = compiler._ahead
    assert begun.waits and compiler.take() is begun and compiler._ahead == []
    assert begun.run([["strop.no_such_module"], ["this"]])[0] == 1
    assert not begun.waits


def test_parts_run_side_by_side_with_their_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_part.py").write_text("import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])")
    monkeypatch.syspath_prepend(str(tmp_path))
    parts = [["a_part", str(tmp_path / name), name] for name in ("one", "two")]
    assert compiler.Compiler().run(parts) == (0, "")
    assert [(tmp_path / name).read_text() for name in ("one", "two")] == ["one", "two"]
    code, said = compiler.Compiler().run([*parts, ["no_such_part"]])
    assert code == 1 and "No module named no_such_part" in said


def test_it_ends_with_the_command_that_began_it(tmp_path: Path) -> None:
    program = (
        "from strop.engine import compiler\n"
        "compiler._ahead.append(compiler.Compiler())\n"
        "print(compiler._ahead[0]._process.pid)"
    )
    words = [sys.executable, "-c", program]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(found.stdout)).wait(timeout=60)
