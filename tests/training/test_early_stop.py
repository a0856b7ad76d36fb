"""Ctrl-C and SIGTERM before the first step: a word, the exit code, and an event that says why the run ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from strop.runs.events import read_events
from tests.support.runs import QUICK


def test_a_stop_before_the_first_step_is_told(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """Asked to while the model is being read, which takes a minute here."""
    out, wait = tmp_path / "run", tmp_path / "wait.py"
    wait.write_text(
        "import sys, time\n"
        "import strop.training.run as run\n"
        "run.build_model = lambda *_: time.sleep(60)\n"
        "from strop.cli.app import main\n"
        "main()\n",
        encoding="utf-8",
    )
    words = ["train", "--model", str(tiny_folder), "--data", str(rows_file), "--out", str(out), *QUICK, "--json"]
    command = [sys.executable, str(wait), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        ends = time.monotonic() + 120
        while not (out / "events.jsonl").is_file() or '"data"' not in (out / "events.jsonl").read_text():
            assert process.poll() is None and time.monotonic() < ends
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        said, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "saved before is intact" in told
    assert json.loads(said)["exit"] == 130
    last = list(read_events(out / "events.jsonl"))[-1]
    assert last["event"] == "stop" and "nothing new to save" in last["why"] and last["step"] == 0
