"""Run code in forks of one process per session, which has done the slow imports and has no threads."""

from __future__ import annotations

import importlib
import json
import os
import select
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import typer

from strop.cli.app import build
from strop.machine.processes import end_session
from tests import ROOT
from tests.faults.harness import Ended, child

MODULES = (
    "numba", "peft", "transformers", "strop.training.run", "tests.distributed.kills", "tests.distributed.sharing",
    "tests.faults.suite",
)  # fmt: skip


class Forks:
    """The client of the process, which starts on first use."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, code: str, folder: Path, seconds: float) -> None:
        """Run code in a fork with the current environment. Raises AssertionError if it fails or takes too long."""
        process = self._process = self._process or _start()
        assert process.stdin is not None and process.stdout is not None
        log = folder / "output-of-the-fork.txt"
        process.stdin.write(json.dumps({"code": code, "log": str(log), "environment": dict(os.environ)}) + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], seconds)[0]:
            self.stop()
            raise AssertionError(f"not done after {seconds} s: {log.read_text()[-6000:]}")
        ended = Ended(**json.loads(process.stdout.readline()))
        assert ended.code == 0, ended.output[-6000:]

    def stop(self) -> None:
        if self._process is not None:
            end_session(self._process, force=True)
            self._process.communicate()
            self._process = None


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from tests.support.forks import main; main()"], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def main() -> None:
    """Fork for each request of standard input, and answer with how the fork ended."""
    requests = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the standard input of the forks
    _import_all()
    assert sys.platform != "linux" or len(os.listdir("/proc/self/task")) == 1  # threads would not work in forks
    for line in requests:
        request = json.loads(line)
        ended = child(lambda request=request: _run(**request), Path(request["log"]))
        print(json.dumps(asdict(ended)), flush=True)


def _import_all() -> None:
    """Import what the forks need, and build the command line, which takes three times as long the first time."""
    for name in MODULES:
        importlib.import_module(name)
    typer.main.get_command(build(["train"]))


def _run(code: str, log: str, environment: dict[str, str]) -> int:
    os.environ.clear()
    os.environ.update(environment, OMP_NUM_THREADS="1")
    exec(code, {"__name__": "__fork__"})
    return 0
