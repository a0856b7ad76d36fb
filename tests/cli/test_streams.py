"""Results are on stdout; progress, notes and errors are on stderr."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from strop.display.tables import console
from tests.support.dash import make_run, session, step
from tests.support.runs import QUICK, run

STROP = (sys.executable, "-m", "strop")
TERMINAL = {"TERM": "xterm-256color", "COLUMNS": "120"}


def strop(*words: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [*STROP, *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)


def test_results_are_on_stdout(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    rows = ["--model", tiny_folder, "--data", rows_file]
    planned = strop("plan", *rows, "--device", "cpu", folder=tmp_path)
    assert planned.returncode == 0 and "it fits" in planned.stdout and "it fits" not in planned.stderr
    assert "next     " in planned.stderr and "next     " not in planned.stdout
    checked = strop("check", *rows, "--show", "1", folder=tmp_path)
    assert checked.returncode == 0 and "24 rows read" in checked.stdout and "rows.jsonl:1 " in checked.stdout
    assert "24 rows read" not in checked.stderr
    trained = strop("train", *rows, "--out", "runs/mine", *QUICK, "--train.max_steps", "2", folder=tmp_path)
    assert trained.returncode == 0 and trained.stdout.startswith("done     2 steps, ")
    assert "train    2 steps" in trained.stderr and "done " not in trained.stderr
    listed = strop("runs", folder=tmp_path)
    assert listed.returncode == 0 and "mine" in listed.stdout and listed.stderr == ""
    evaluated = strop("eval", "runs/mine", "--data", rows_file, "--max-new-tokens", "2", folder=tmp_path)
    assert evaluated.returncode == 0 and "tuned" in evaluated.stdout and "held-out" not in evaluated.stderr
    as_json = strop("eval", "runs/mine", "--data", rows_file, "--max-new-tokens", "2", "--json", folder=tmp_path)
    assert json.loads(as_json.stdout)["rows"] == 24
    assert all(line in as_json.stderr for line in evaluated.stdout.splitlines() if line.startswith("sample"))


def test_errors_are_on_stderr(tmp_path: Path) -> None:
    ended = strop("check", "nope.jsonl", folder=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "") and ended.stderr.startswith("error: nope.jsonl: no such file")


def test_results_are_on_stderr_with_json_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "one", [*session(), step(4)])
    code, out, err = run("runs", tmp_path, "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["runs"][0]["run"] == f"{tmp_path}/one" and "one" in err
    code, out, err = run("runs", tmp_path, capsys=capsys)
    assert code == 0 and "one" in out and err == ""
    assert run("runs", tmp_path / "nope", "--json", capsys=capsys)[0] == 2 and not console.stderr


@pytest.mark.parametrize("words", [["runs", "."], ["schema"], ["train", "--model", "m", "--print-recipe"], ["cache"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_pipe_ends_a_command_silently(
    words: list[str], unbuffered: str, tiny_folder: Path, tmp_path: Path
) -> None:
    make_run(tmp_path, "one", [*session(), step(4)])
    (tmp_path / "m").symlink_to(tiny_folder)
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [*STROP, *words, *(["--data", "rows.jsonl"] if "--model" in words else [])]
    with os.fdopen(writer) as pipe:
        ended = subprocess.run(
            command, cwd=tmp_path, env=environment, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ended.returncode in (0, 1) and ended.stderr == "", ended


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize("terminal", ["stdout", "stderr"])
def test_only_a_terminal_gets_colours(terminal: str, options: list[str], tmp_path: Path) -> None:
    make_run(tmp_path, "one", [*session(), step(4)])
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    parent, child = pty.openpty()
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, terminal: child}
    process = subprocess.Popen([*STROP, "runs", ".", *options], cwd=tmp_path, env=environment | TERMINAL, **streams)
    os.close(child)
    file = b"".join(text for text in process.communicate(timeout=100) if text)
    try:
        shown = os.read(parent, 10**6)
    except OSError:  # nothing was written
        shown = b""
    os.close(parent)
    has_table = terminal == ("stderr" if options else "stdout")
    assert process.returncode == 0 and b"\x1b" not in file
    assert (b"\x1b[1m" in shown) == has_table
    assert "│ one ".encode() in (shown if has_table else file)
