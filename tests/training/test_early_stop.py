"""SIGTERM before the first step: exit code, message, and a "stop" event with the reason."""

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


def test_sigterm_before_the_first_step_logs_a_stop_event(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """The signal arrives while the model is loaded, which takes a minute in this test."""
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
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped at once: 0 steps are complete" in stderr
    assert json.loads(stdout)["exit"] == 130
    last = list(read_events(out / "events.jsonl"))[-1]
    assert last["event"] == "stop" and "interrupted" in last["why"] and last["step"] == 0
