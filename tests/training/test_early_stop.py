"""SIGTERM before the first step: exit code, message, and a "stop" event with the reason."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import strop
from strop.runs.events import EndTraining, read_events
from strop.training.loop import stop_signals
from tests.support.runs import QUICK
from tests.support.runs import run as cli


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


def test_a_stopped_run_can_be_used_and_resumed(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its adapter is that of the last step; all commands say so. Resumed, it has the bits of an uninterrupted run."""

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    options = {"max_steps": 6, "batch_size": 4, "dtype": "fp32", "lora": {"r": 4}, "progress": False}
    data = {"model": tiny_folder, "data": rows_file}
    out = tmp_path / "run"
    with pytest.raises(strop.Stopped, match="after step 3 of 6; its adapter so far is saved"):
        strop.train(**data, out=out, **options, callback=stop)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert (report["exit"], report["ended"], report["steps"], report["adapter_step"]) == (130, "stop", 3, 3)
    assert (out / "report.html").is_file() and not any(e["event"] == "end" for e in read_events(out / "events.jsonl"))
    note = f"{out}: this run has not ended; its adapter is that of step 3"
    assert note in strop.load(out).notes
    words = {"eval": ("--data", rows_file), "merge": ("--out", tmp_path / "merged", "--no-parity")}
    for name, more in words.items():
        code, *printed = cli(name, out, *more, capsys=capsys)
        assert code == 0 and note.replace(str(out), "") in " ".join("".join(printed).split()).replace(str(out), "")
    code, listed, _ = cli("runs", tmp_path, "--json", capsys=capsys)
    assert json.loads(listed)["runs"][0]["finished"] is False
    whole, resumed = strop.train(**data, out=tmp_path / "whole", **options), strop.resume(out, progress=False)
    assert resumed.report["exit"] == 0 and strop.load(out).notes == strop.load(whole).notes
    files = [
        folder / "adapter" / name
        for name in ("adapter_model.safetensors", "strop.json")
        for folder in (out, whole.folder)
    ]
    before = [file.read_bytes() for file in files]
    assert before[0] == before[1] and before[2] == before[3]
    shutil.rmtree(out / "adapter")  # of a finished run: it is written again from the checkpoint
    assert strop.resume(out, progress=False).report["steps"] == 6 and files[0].read_bytes() == before[0]


def test_values_keep_their_origin_when_a_run_is_resumed(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """recipe.yaml, the report and the page say why a value was chosen, not that it stood in the run's own recipe."""

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "run"
    with pytest.raises(strop.Stopped):
        strop.train(
            model=tiny_folder, data=rows_file, out=out, max_steps=4, lora={"r": 4}, callback=stop, progress=False
        )
    before = (out / "recipe.yaml").read_text(encoding="utf-8")
    assert "r: 4  # option" in before and "learning_rate: " in before and "# plan: " in before
    run = strop.resume(out, allow_changed=["train.max_steps"], max_steps=3, progress=False)
    after = (out / "recipe.yaml").read_text(encoding="utf-8")
    assert after == before.replace("max_steps: 4", "max_steps: 3")
    assert "recipe" not in {choice["origin"] for choice in run.report["recipe"]}
    recipes = [event for event in read_events(out / "events.jsonl") if event["event"] == "recipe"]
    assert [event["changed"] for event in recipes] == [None, ["train.max_steps"]]


def test_first_signal_is_announced_at_once(caplog: pytest.LogCaptureFixture) -> None:
    with stop_signals() as stop_requested:
        os.kill(os.getpid(), signal.SIGINT)
        ends = time.monotonic() + 60
        while not caplog.messages and time.monotonic() < ends:
            time.sleep(0.01)
        assert stop_requested() and "Ctrl-C again stops at once, without saving" in caplog.messages[0]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_listener_ends_training_after_an_evaluation(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """The report, the adapter and the checkpoint are complete, and the run counts as finished."""

    def end(event: dict[str, Any]) -> None:
        if event["event"] == "eval" and event["step"] == 4:
            raise EndTraining("enough")

    options = {"max_steps": 12, "eval_steps": 2, "batch_size": 4, "dtype": "fp32", "lora": {"r": 4}}
    data = {"model": tiny_folder, "data": rows_file, "eval": rows_file, "out": tmp_path / "run"}
    run = strop.train(**data, **options, callback=end, progress=False)
    assert run.report["ended"] == "enough" and run.report["steps"] == 4
    stop = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "stop"]
    assert [(event["step"], event["why"]) for event in stop] == [(4, "enough")]
    assert (run.folder / "adapter" / "adapter_model.safetensors").is_file()
    assert strop.resume(run, progress=False).report["steps"] == 4
