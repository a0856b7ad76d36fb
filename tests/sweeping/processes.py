"""Sweeps in several processes, which are forks of one that has imported strop (tests/support/forks.py runs them)."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna  # noqa: F401 (imported before the forks, which then start sooner)

from strop.cli import app
from strop.runs.events import read_events
from strop.runs.folder import read_json
from tests.faults.harness import Ended, start, wait
from tests.sweeping.support import progress, without_times, words, write_rows


@dataclass
class Command:
    """A running strop command. log: its stdout and stderr."""

    pid: int
    log: Path
    started: float

    @property
    def is_running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(self) -> Ended:
        return wait(self.pid, self.log, self.started)


def strop_command(arguments: list[str], folder: Path, name: str = "output") -> Command:
    """Start a strop command in a folder."""

    def work() -> int:
        os.chdir(folder)
        sys.argv = ["strop", *arguments]
        app.main()
        return 0

    log = folder / f"{name}.txt"
    return Command(start(work, log), log, time.monotonic())


def json_of(ended: Ended) -> Any:
    assert ended.code == 0, ended.output
    (line,) = [line for line in ended.output.splitlines() if line.startswith("{")]
    return json.loads(line)


def kill_a_sweep(root: Path, model: Path) -> None:
    arguments = words(model, "--over", "lora.r=2,8,16", "--over", "lr=1e-6..2e-2", "--trials", "5", "--prune")
    arguments += ["--seeds", "1", "--out", "s", "--json", "--resume"]
    for name in ("whole", "killed"):
        (root / name).mkdir()
        write_rows(root / name / "rows.jsonl")
    whole = json_of(strop_command(arguments, root / "whole").end())
    chosen, kills, folder = random.Random(3), 0, root / "killed"
    mean = progress(root / "whole" / "s") // 7
    while True:
        process = strop_command(arguments, folder)
        limit = progress(folder / "s") + chosen.randint(mean // 2, mean * 3 // 2)
        while process.is_running and progress(folder / "s") < limit:
            time.sleep(0.005)
        if not process.is_running:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.end()
        kills += 1
    again = json_of(process.end())
    assert kills >= 5, kills
    assert without_times(again) == without_times(whole), (again, whole)
    adapters = [*(root / "whole" / "s").glob("*/*/adapter/*.safetensors")]
    assert adapters
    for file in adapters:
        assert file.read_bytes() == (folder / "s" / file.relative_to(root / "whole" / "s")).read_bytes(), file


def interrupt_a_sweep(root: Path, model: Path) -> None:
    write_rows(root / "rows.jsonl")
    arguments = words(model, "--over", "lora.r=2,16", "--train.max_steps", "5000", "--out", "s", "--json")
    process = strop_command(arguments, root)
    while process.is_running and progress(root / "s") < 60:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    ended = process.end()
    assert ended.code == 130, ended.output
    assert "s: stopped after step" in ended.output and "strop sweep --resume s`" in ended.output, ended.output
    assert list((root / "s" / "trials" / "000" / "checkpoints").glob("step-*"))
    assert [trial["state"] for trial in read_json(root / "s" / "sweep.json")["trials"]] == ["running", "waiting"]


def share_a_sweep(root: Path, model: Path) -> None:
    write_rows(root / "rows.jsonl")
    arguments = words(model, "--over", "lora.r=2,4,6,8,12,16", "--seeds", "2", "--out", "s", "--json", "--resume")
    processes = [strop_command(arguments, root, name) for name in ("one", "two")]
    both = [process.end() for process in processes]
    first, second = map(json_of, both)
    assert first == second and len(first["trials"]) == 6, (first, second)
    for trial in [*first["trials"], *first["final"]]:
        folder = root / "s" / trial.get("run", f"final/{trial.get('name')}")
        if trial.get("seed", 0) is not None:
            kinds = [event["event"] for event in read_events(folder / "events.jsonl")]
            assert kinds.count("start") == 1 and "resume" not in kinds, kinds
    lines = [len(re.findall(r"^(?:trial|check)    ", ended.output, re.M)) for ended in both]
    assert sum(lines) == len(first["trials"]) + len(first["final"]) and min(lines) > 0, lines
