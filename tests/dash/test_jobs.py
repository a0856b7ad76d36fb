"""Jobs of the page: the command that is shown is the one that runs, and the state is read from the job's folder."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from strop.dash.jobs import Jobs, option_flags, parse_options, shell_command
from strop.dash.previews import typed_options
from strop.errors import FolderError
from tests.support.dash import make_run, session, step


def ended(jobs: Jobs, name: str) -> dict[str, Any]:
    for _ in range(600):
        about = jobs.status(name)
        if about["state"] != "running":
            return about
        time.sleep(0.1)
    raise AssertionError(about)


def test_job_returns_result_and_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROP_DASH_TOKEN", "secret")
    make_run(tmp_path, "one", [*session(), step(1)])
    jobs = Jobs(tmp_path)
    started = jobs.start("train", ["runs", str(tmp_path)], "one")
    assert started["command"] == f"strop runs {tmp_path}" and started["run"] == "one"
    child = psutil.Process(started["pid"])
    assert "STROP_DASH_TOKEN" not in child.environ() and os.getsid(child.pid) == child.pid
    about = ended(jobs, started["id"])
    assert about["state"] == "done" and about["result"]["runs"][0]["run"] == str(tmp_path / "one")
    assert "step 1" in jobs.log(started["id"])[0]
    later = Jobs(tmp_path)  # of a restarted server
    assert later.status(started["id"]) == about and [job["id"] for job in later.all()] == [started["id"]]
    assert stat.S_IMODE((tmp_path / ".dash").stat().st_mode) == 0o700


def test_running_job_has_no_error_while_it_ends(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    name = jobs.start("doctor", ["doctor"])["id"]
    os.kill(jobs.status(name)["pid"], signal.SIGSTOP)
    error = {"kind": "Stopped", "message": "stopped after step 2", "fix": "strop resume runs/one", "where": []}
    (jobs.folder(name) / "out").write_text(json.dumps({"error": error}))
    assert (jobs.status(name)["state"], jobs.status(name)["error"]) == ("running", None)
    os.kill(jobs.status(name)["pid"], signal.SIGKILL)
    assert (ended(jobs, name)["state"], ended(jobs, name)["error"]) == ("stopped", error)


def test_failed_and_killed_jobs_report_an_error(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    wrong = ended(jobs, jobs.start("merge", ["merge", "no-such-run", "--out=x"])["id"])
    assert wrong["state"] == "failed" and "no-such-run" in wrong["error"]["message"]
    killed = jobs.start("serve", ["doctor"])
    os.kill(killed["pid"], signal.SIGKILL)
    psutil.wait_procs([psutil.Process(killed["pid"])], timeout=60)
    (jobs.folder(killed["id"]) / "log").write_text("step 3  loss 1.5\n")
    about = ended(jobs, killed["id"])
    assert about["error"]["message"].endswith("; its last line: step 3  loss 1.5") and "killed" in about["error"]["fix"]
    assert (about["state"], about["error"]["kind"]) == ("failed", "Killed")
    stopped = jobs.start("serve", ["doctor"])
    while not any("cli" in word for word in psutil.Process(stopped["pid"]).cmdline()):
        time.sleep(0.05)
    time.sleep(1)  # its signal handlers are installed
    assert Jobs(tmp_path).stop(stopped["id"])
    assert ended(jobs, stopped["id"])["state"] == "failed" or ended(jobs, stopped["id"])["error"]["kind"] == "Stopped"
    assert not jobs.stop(stopped["id"])
    with pytest.raises(FolderError):
        jobs.status("../../etc")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("lora.r", 16, ["--lora.r=16"]),
        ("train.learning_rate", 0.0002, ["--train.learning_rate=0.0002"]),
        ("lora.use_dora", True, ["--lora.use_dora=true"]),
        ("train.max_steps", None, ["--train.max_steps=none"]),
        ("data.train", ["a.jsonl", "b,c.jsonl"], ["--data.train=a.jsonl", "--data.train=b,c.jsonl"]),
        ("lora.target_modules", ["q_proj", "v_proj"], ['--lora.target_modules=["q_proj", "v_proj"]']),
        ("data.columns", {"prompt": "q"}, ['--data.columns={"prompt": "q"}']),
        ("data.train", "--help; rm -rf $HOME", ["--data.train=--help; rm -rf $HOME"]),
    ],
)
def test_fields_become_arguments(field: str, value: Any, words: list[str]) -> None:
    assert option_flags(field, value) == words
    assert shlex.split(shell_command(words)) == ["strop", *words]


def test_values_with_commas_survive_as_arguments() -> None:
    for field, value in (("lora.modules_to_save", ["a,b"]), ("data.columns", {"a": "b,c", "a=b": "é"})):
        assert typed_options({field: value}) == {field: value}


def test_old_jobs_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from strop.dash import jobs as module

    monkeypatch.setattr(module, "MAX_JOBS", 2)
    old = tmp_path / ".dash" / "jobs"
    for number in range(4):
        folder = old / f"20200101-00000{number}-train-abcdef"
        folder.mkdir(parents=True)
        (folder / "job.json").write_text(json.dumps({"kind": "train", "ended": 1.0}))
    jobs = Jobs(tmp_path)
    (old / "20300101-000000-train-abcdef").mkdir()  # of a server that was killed while starting the job
    new = jobs.start("merge", ["runs", str(tmp_path)])
    assert [job["id"] for job in jobs.all()] == [new["id"], "20200101-000003-train-abcdef"]
    ended(jobs, new["id"])


def test_options_are_read_from_a_command() -> None:
    options = {"model.name": "a b", "data.train": ["x.jsonl", "y=z.jsonl"], "lora.r": "4", "train.exact": "true"}
    flags = [flag for field, value in options.items() for flag in option_flags(field, value)]
    assert parse_options(shell_command(["train", *flags, "--memory=8GB", "--out=runs/x"])) == options
