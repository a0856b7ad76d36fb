"""`--devices`: the agent it starts, its signals, threads and arguments."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.launcher import api

import strop
from strop.distributed.devices import RankInfo, find_ranks
from strop.distributed.launch import _resume_fix, count_processes, launch_processes
from strop.errors import InputError, RecipeError
from tests import ROOT
from tests.support import tiny
from tests.support.runs import run

STEPS = ["--model.dtype", "fp32", "--lora.r", "4", "--train.batch_size", "8", "--train.micro_batch", "1"]

Start = Callable[[list[str]], subprocess.Popen[str]]


def words(folder: Path, tiny_folder: Path, out: str, *more: str) -> list[str]:
    rows = tiny.write_rows(folder / "rows.jsonl", 29)
    return ["train", "--model", str(tiny_folder), "--data", str(rows), "--out", str(folder / out), *STEPS, *more]


def without_threads() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


@pytest.fixture
def started() -> Iterator[Start]:
    """Yield a function that starts a command; its processes are killed if the test fails."""
    processes: list[subprocess.Popen[str]] = []

    def start(command: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "strop.cli", *command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def reached(running: subprocess.Popen[str], state: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not state():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def test_exact_run_uses_one_thread_per_rank(tmp_path: Path, tiny_folder: Path) -> None:
    """A single process has one too; a matmul is split by thread, which changes its last bits."""
    command = words(tmp_path, tiny_folder, "two", "--train.max_steps", "1", "--train.exact", "true")
    code = "import strop.distributed.launch as join; join.available_cores = lambda: 8; "
    code += f"join.launch_processes(2, {command!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=without_threads(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads((tmp_path / "two" / "report.json").read_text())["devices"]
    assert (facts["count"], facts["threads"]) == (2, 1)


def test_exact_run_resumes_with_its_number_of_threads(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, out = torch.get_num_threads(), tmp_path / "one"
    more = {"model.dtype": "fp32", "train.max_steps": 1, "train.exact": True}
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 9)
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        torch.set_num_threads(2)
        strop.train(model=str(tiny_folder), data=str(rows), out=str(out), **more)
        (out / "report.json").unlink()  # as if it had been killed before its report
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert strop.resume(out).report["devices"]["threads"] == 2
    finally:
        torch.set_num_threads(before)


def test_ctrl_c_is_reported_by_one_rank(tmp_path: Path, tiny_folder: Path, started: Start) -> None:
    """There is one JSON object on stdout and one error, from the rank that saved."""
    command = words(tmp_path, tiny_folder, "run", "--train.epochs", "9000", "--devices", "2", "--json")
    events = tmp_path / "run" / "events.jsonl"
    running = started(command)
    reached(running, lambda: events.is_file() and '"event": "step"' in events.read_text())
    running.send_signal(signal.SIGINT)
    out, stdout = running.communicate(timeout=120)
    assert running.returncode == 130, stdout
    (line,) = out.splitlines()
    stderr = json.loads(line)
    assert stderr["error"]["kind"] == "Stopped" and stderr["steps"] >= 1
    assert "free for each of 2 processes" in stdout
    assert stdout.count("continue with") == 1 and "error:" not in stdout and "closing signal" not in stdout, stdout
    assert list((tmp_path / "run" / "checkpoints").glob(f"step-*{stderr['steps']}"))
    suggested = re.search(r"continue with `(.*)`", stdout)
    assert suggested is not None and suggested[1].endswith(f" -m strop resume {tmp_path / 'run'} --devices 2"), stdout
    again = subprocess.run([*shlex.split(suggested[1]), "--help"], capture_output=True)
    assert again.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["1", "2"])
def test_second_ctrl_c_is_reported_by_one_rank(devices: str, tmp_path: Path, tiny_folder: Path, started: Start) -> None:
    """The second signal arrives in the middle of a long step, and the run ends at once."""
    command = words(tmp_path, tiny_folder, "run", "--train.max_steps", "2", "--devices", devices, "--json")
    tiny.write_rows(tmp_path / "rows.jsonl", 6000)
    running = started([*command, "--train.batch_size", "6000"])
    reached(running, lambda: (tmp_path / "run" / "checkpoints" / "step-000000").is_dir())
    time.sleep(0.5)
    for _ in range(2):
        running.send_signal(signal.SIGINT)
        time.sleep(0.5)
    out, stdout = running.communicate(timeout=60)
    assert running.returncode == 130, stdout
    (line,) = out.splitlines()
    assert json.loads(line)["error"]["kind"] == "Stopped"
    assert "error:" not in stdout and len(re.findall("continue with `.* -m strop resume", stdout)) == 1, stdout


def test_fix_names_the_run_if_the_command_does() -> None:
    for words, folder in (
        (["resume", "runs/a b", "--devices", "2"], "'runs/a b'"), (["train", "r.yaml", "--out=runs/a"], "runs/a"),
        (["resume", "--memory", "8GB", "runs/a"], "RUN"), (["train", "r.yaml"], "RUN"),
    ):  # fmt: skip
        assert f"`strop resume {folder}`" in _resume_fix(words)


@pytest.mark.slow
def test_sighup_is_reported_as_an_error(tmp_path: Path, tiny_folder: Path, started: Start) -> None:
    """Exit code 130 means that the state was saved."""
    command = words(tmp_path, tiny_folder, "run", "--train.epochs", "9000", "--devices", "2", "--json")
    running = started(command)
    reached(running, lambda: (tmp_path / "run" / "checkpoints" / "step-000000").is_dir())
    running.send_signal(signal.SIGHUP)
    out, stdout = running.communicate(timeout=120)
    assert running.returncode == 1 and stdout.count("error:") == 1, stdout
    assert json.loads(out)["error"]["message"].startswith("ended by SIGHUP")
    assert f"strop resume {tmp_path / 'run'} --devices 2`" in stdout


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"RANK": "abc"}, "RANK 'abc': not a number"),
        ({"RANK": "-1"}, "RANK '-1': not a number"),
        ({"RANK": "2"}, "RANK 2 is not below WORLD_SIZE 2"),
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK 'one': not a number"),
    ],
)
def test_invalid_rank_is_refused(names: dict[str, str], message: str) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "first"}
    assert find_ranks(place) == RankInfo(0, 2, 0, 1)
    with pytest.raises(InputError, match=message):
        find_ranks({**place, **names})


def test_shutdown_timeout_allows_a_long_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, torch's agent kills ranks 30 seconds after Ctrl-C, even if they have not saved."""
    configs: list[Any] = []

    def launch(config: Any, executable: str) -> Any:
        configs.append(config)
        return lambda *words: None

    for name in ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(api, "elastic_launch", launch)
    launch_processes(2, ["train"])
    assert getattr(configs[0], "shutdown_timeout", 3600) == 3600


@pytest.mark.parametrize("asked", ["0", "-1", "two", "²", "1.5"])
def test_invalid_device_count_is_refused(asked: str) -> None:
    with pytest.raises(RecipeError, match="not a number of devices"):
        count_processes(asked, "cpu")


def test_print_recipe_depends_on_the_number_of_devices(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = words(tmp_path, tiny_folder, "run", "--model.device", "cpu", "--print-recipe", "--devices")
    for number, placement in (("1", "auto"), ("2", "replicated")):
        code, shown, _ = run(*command, number, capsys=capsys)
        assert code == 0 and f"placement: {placement}" in shown
