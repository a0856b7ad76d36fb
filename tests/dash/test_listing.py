"""The table of runs, and the state of a run, from its files and its process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from strop.dash import runs as runs_module
from strop.dash.history import History
from strop.dash.runs import RunTable
from tests.support.dash import evaluated, make_run, sample, session, step

DONE = {"exit": 0, "ended": "steps", "steps": 5, "eval_loss": 2.5, "tokens": 500}
SAVED = {"event": "stop", "time": 1, "step": 5, "why": "signal"}


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield process
    process.kill()
    process.wait()


def claim(folder: Path, process: subprocess.Popen[bytes]) -> None:
    content = {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
    (folder / "claim.json").write_text(json.dumps(content))


def only(root: Path) -> dict[str, Any]:
    [row] = RunTable(root).rows()
    return row


@pytest.mark.parametrize("kind", ["resume", "rollback"])
def test_undone_steps_are_not_the_last_one_although_none_follows(tmp_path: Path, kind: str) -> None:
    """As after a resume with fewer epochs than the run already had."""
    back = {"event": "resume", "step": 3} if kind == "resume" else {"event": "rollback", "step": 5, "to": 3, "why": ""}
    steps = [step(number, loss=float(number)) | {"steps": 9} for number in range(1, 6)]
    evals = [{"event": "eval", "time": 1, "step": number, "loss": number / 10} for number in (3, 5)]
    started = {"event": "start", "time": 1006, "step": 3, "steps": 2}
    events = [*session(), *steps[:3], evals[0], *steps[3:], evals[1], {**back, "time": 1005}, started]
    folder = make_run(tmp_path, "one", events, {**DONE, "steps": 3})
    row = only(tmp_path)
    assert (row["step"], row["steps"], row["loss"], row["sparkline"][-1]) == (3, 3, 3.0, (3, 3.0))
    assert runs_module.read_last_events(folder / "events.jsonl", live=False)[1]["step"] == 3
    history = History(folder / "events.jsonl")
    history.update()
    last = history.last
    assert (last["step"], last["steps"], last["loss"], last["tokens"]) == (3, 3, 3.0, steps[2]["tokens"])
    assert last["eval_loss"] == 0.3


@pytest.mark.parametrize(
    ("last", "report", "expected", "why"),
    [
        ([], None, "crashed", "the process ended without a reason"),
        ([SAVED], None, "stopped", "on request, after saving"),
        ([{**SAVED, "why": "loss 9 is far above", "advice": []}], None, "stopped", "loss 9 is far above"),
        ([SAVED, *session(2000, start=5)], None, "crashed", "the process ended without a reason"),
        ([{"event": "end", "time": 9}], DONE, "finished", ""),
        ([{"event": "end", "time": 9}], {**DONE, "ended": "time"}, "stopped", "time budget used up"),
    ],
)
def test_runs_without_a_process_have_a_final_state(
    tmp_path: Path, last: list[Any], report: Any, expected: str, why: str
) -> None:
    make_run(tmp_path, "one", [*session(), *(step(number) for number in range(1, 6)), *last], report)
    row = only(tmp_path)
    assert (row["state"], row["why"], row["pid"]) == (expected, why, None)
    assert ("resume" in row["can"]) == (expected != "finished") and "delete" in row["can"]


def test_live_run_is_running_and_killed_run_is_crashed(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    folder = make_run(tmp_path, "one", [*session(), *(step(number) for number in range(1, 6))])
    claim(folder, sleeper)
    runs = RunTable(tmp_path)
    [row] = runs.rows()
    assert (row["state"], row["phase"], row["pid"], row["can"]) == ("running", "training", sleeper.pid, ["stop"])
    sleeper.kill()
    sleeper.wait()
    [row] = runs.rows()  # no file has changed
    assert (row["state"], row["pid"]) == ("crashed", None)


def test_zombie_and_reused_pid_do_not_claim_a_run(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    folder = make_run(tmp_path, "one", [*session(), step(1)])
    sleeper.kill()  # and not reaped
    time.sleep(0.2)
    claim(folder, sleeper)
    assert only(tmp_path)["state"] == "crashed"
    other_process = {"pid": os.getppid(), "started": 12345.0}
    (folder / "claim.json").write_text(json.dumps(other_process))
    assert only(tmp_path)["state"] == "crashed"


def test_a_suspended_run_is_stalled(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    claim(make_run(tmp_path, "one", [*session(), step(1)]), sleeper)
    sleeper.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    row = only(tmp_path)
    assert (row["state"], row["why"]) == ("stalled", "the process is suspended")


def test_run_without_events_is_stalled(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path, "one", [*session(), *(step(number) for number in range(1, 9))])  # one per second
    claim(folder, sleeper)
    for age, expected in ((100, "running"), (130, "stalled")):
        os.utime(folder / "events.jsonl", (time.time() - age,) * 2)
        assert only(tmp_path)["state"] == expected
    assert "no event for 2 min" in only(tmp_path)["why"]
    monkeypatch.setattr(runs_module.CpuUsage, "cores", lambda self, pid: 0.98)  # an evaluation is one event
    assert only(tmp_path)["state"] == "running"
    slow = [*session(), *(step(number, time=1000.0 + 60 * number) for number in range(1, 9))]
    claim(make_run(tmp_path / "slow", "one", slow), sleeper)
    monkeypatch.undo()
    os.utime(tmp_path / "slow" / "one" / "events.jsonl", (time.time() - 600,) * 2)
    assert only(tmp_path / "slow")["state"] == "running"


def test_resumed_run_has_no_time_left_before_its_first_step(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    steps = [step(number, seconds_left=90.0) for number in range(1, 8)]
    folder = make_run(tmp_path, "one", [*session(), *steps, *session(2000.0, start=7)])
    claim(folder, sleeper)
    history = History(folder / "events.jsonl")
    history.update()
    assert only(tmp_path)["phase"] == "training" and only(tmp_path)["seconds_left"] is None
    assert history.last["seconds_left"] is None
    with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(step(8, time=2001.0, seconds_left=80.0)) + "\n")
    history.update()
    assert only(tmp_path)["seconds_left"] == history.last["seconds_left"] == 80.0


def test_child_processes_count_as_the_run() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True)\\nwhile True: pass'])"
    usage = runs_module.CpuUsage()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline()
        [child] = psutil.Process(parent.pid).children()
        assert usage.cores(parent.pid) is None
        before = child.cpu_times().user
        while child.cpu_times().user < before + 0.5 or usage.cores(parent.pid) is None:
            time.sleep(0.1)
        assert (usage.cores(parent.pid) or 0) > 0
        child.kill()
    assert usage.cores(parent.pid) is None


def test_loading_run_is_not_stalled_early(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    folder = make_run(tmp_path, "one", session()[:2])
    claim(folder, sleeper)
    os.utime(folder / "events.jsonl", (time.time() - 900,) * 2)
    assert (only(tmp_path)["state"], only(tmp_path)["phase"]) == ("running", "loading")


def test_500_runs_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = [*session(), *(step(number) for number in range(1, 31)), {"event": "end", "time": 9}]
    for number in range(500):
        make_run(tmp_path, f"run-{number}", events, DONE)
    runs, read = RunTable(tmp_path), []
    facts = runs_module._facts
    monkeypatch.setattr(runs_module, "_facts", lambda folder: (read.append(folder.path.name), facts(folder))[1])
    rows = runs.rows()
    assert len(rows) == len(read) == 500 and {row["state"] for row in rows} == {"finished"}
    read.clear()
    assert runs.rows() == rows and not read
    with (tmp_path / "run-7" / "events.jsonl").open("a") as file:
        file.write("{}\n")
    runs.rows()
    assert read == ["run-7"]


def test_row_of_the_table(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "one", [*session(), *(step(number, 2000) for number in range(1, 2001))], DONE)
    evaluated(folder, [sample(number, number < 2, number < 9) for number in range(10)])
    row = only(tmp_path)
    assert (row["model"], row["objective"], row["rank"], row["started"]) == ("tiny", "sft", 4, 1000.0)
    assert (row["score"]["value"], row["score"]["base"], row["score"]["rows"]) == (0.9, 0.2, 10)
    steps, losses = zip(*row["sparkline"], strict=True)
    assert len(steps) <= 41 and steps[0] < 50 and steps[-1] > 1950 and list(steps) == sorted(steps)
    assert losses[0] > 4.9 and losses[-1] < 4.1
    assert row["bytes"] == sum(file.stat().st_size for file in folder.rglob("*"))


def test_row_of_a_resumed_run_is_newer_than_its_report(tmp_path: Path) -> None:
    report = {"exit": 130, "ended": "stop", "steps": 2, "eval_loss": 0.5, "tokens": 2, "seconds": 59.0}
    evals = [{"event": "eval", "time": 1.0, "step": number, "loss": loss} for number, loss in ((2, 0.5), (4, 0.25))]
    events = [*session(), step(1), step(2, tokens=2), evals[0], *(step(number, tokens=number) for number in (3, 4))]
    make_run(tmp_path, "one", events[:-2], report)
    assert (only(tmp_path)["step"], only(tmp_path)["eval_loss"], only(tmp_path)["seconds"]) == (2, 0.5, 59.0)
    make_run(tmp_path / "resumed", "one", [*events, evals[1]], report)
    row = only(tmp_path / "resumed")
    assert (row["step"], row["eval_loss"], row["tokens"], row["seconds"]) == (4, 0.25, 4, None)


def test_sparkline_keeps_a_spike(tmp_path: Path) -> None:
    events = [step(number, loss=50.0 if number == 77 else 1.0) for number in range(1, 101)]
    make_run(tmp_path, "one", [*session(), *events])
    assert [77, 50.0] in [list(point) for point in only(tmp_path)["sparkline"]]


def test_links_are_ignored_and_damaged_runs_listed(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    make_run(root, "good", [*session(), step(1)])
    make_run(tmp_path, "elsewhere", [*session(), step(1)])
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "empty").mkdir()
    (root / "file").write_text("x")
    broken = make_run(root, "broken", [])
    for name in ("lock.json", "events.jsonl", "report.json"):
        (broken / name).write_bytes(b"\x00[{" * 100)
    secret = make_run(root, "secret", [])
    (tmp_path / "private").write_text(json.dumps({"values": {"model.name": "private"}}))
    (secret / "lock.json").unlink()
    (secret / "lock.json").symlink_to(tmp_path / "private")
    rows = {row["name"]: row for row in RunTable(root).rows()}
    assert set(rows) == {"good", "broken", "secret"} and rows["secret"]["model"] is None
    assert RunTable(root).names()[1] == ["linked: a link"]
