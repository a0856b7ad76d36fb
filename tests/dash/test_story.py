"""All actions of the server on one run, with real training of a tiny model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.dash import Dash, run_dash
from tests.support.tiny import write_rows

NAME = "the run"
MORE = 1_000  # longer than the page's polling interval


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("story")
    write_rows(folder / "rows.jsonl", 24)
    write_rows(folder / "held.jsonl", 4)
    return folder


@pytest.fixture(scope="module")
def options(tiny_folder: Path) -> dict[str, Any]:
    return {
        "model.name": str(tiny_folder), "data.train": "rows.jsonl", "lora.r": 4, "train.batch_size": 4,
        "model.dtype": "fp32", "train.max_steps": 20_000, "train.save_steps": 20,
    }  # fmt: skip


def row(dash: Dash) -> Any:
    return dash.get("/api/runs").json()["runs"][0]


def until_step(dash: Dash, least: int) -> dict[str, Any]:
    result: dict[str, Any] = dash.wait(f"/api/runs/{NAME}", lambda run: (run.get("step") or 0) >= least)
    return result


def check_plan_and_start(dash: Dash, place: Path, options: dict[str, Any]) -> None:
    result = dash.post("/api/data", {"options": {name: options[name] for name in ("model.name", "data.train")}}).json()
    assert result["report"]["rows"]["used"] == result["num_rows"] == 24
    plan = dash.post("/api/plan", {"options": options, "name": NAME}).json()
    assert plan["fits"] and plan["out"] == str(place / "runs" / NAME)
    assert dash.post("/api/plan", {"options": {**options, "lora.r": 0}}).json()["error"]["where"]
    started = dash.post("/api/start", {"options": options, "name": NAME}).json()
    assert started["job"]["command"] == plan["command"] and started["run"] == NAME
    assert (row(dash)["name"], row(dash)["state"]) == (NAME, "running")  # immediately, before its folder exists
    assert dash.post("/api/start", {"options": options, "name": NAME}).status_code == 404
    steps: list[int] = []
    for name, data in dash.events(f"/api/runs/{NAME}/stream"):
        steps += [one["step"] for one in data["rows"]] if name == "steps" else []
        if name == "history" and data["rows"]:
            steps = [int(x) for x in data["series"]["loss"]["x"]]
        if len(steps) > 60:
            break
    assert steps == list(range(1, len(steps) + 1))


def kill_the_trainer(dash: Dash, place: Path, options: dict[str, Any]) -> None:
    run = until_step(dash, 60)  # it has outlived the server that started it
    assert run["state"] == "running" and run["engine"] and run["can"] == ["stop"]
    assert dash.get(f"/api/system?run={NAME}").json()["process"]["pid"] == run["pid"]
    assert dash.post(f"/api/runs/{NAME}/delete", {"confirm": NAME}).status_code == 409
    assert dash.post(f"/api/runs/{NAME}/resume", {}).status_code == 409
    os.kill(run["pid"], signal.SIGKILL)
    crashed = dash.wait("/api/runs", lambda reply: reply["runs"][0]["state"] == "crashed", seconds=10)["runs"][0]
    assert crashed["pid"] is None and "resume" in crashed["can"]


def resume_after_a_restart_and_stop(dash: Dash, place: Path, options: dict[str, Any]) -> None:
    before = dash.get(f"/api/runs/{NAME}/history").json()
    with run_dash(place / "runs", place) as other:  # two servers, two pages
        assert other.get(f"/api/runs/{NAME}/history").json() == before
        assert row(other)["state"] == "crashed"
    last = before["last"]["step"]
    job = dash.post(f"/api/runs/{NAME}/resume", {}).json()
    assert job["command"].startswith("strop resume ") and job["kind"] == "resume"
    assert dash.post(f"/api/runs/{NAME}/resume", {}).status_code == 409
    run = until_step(dash, last + 20)
    assert [mark["kind"] for mark in run["marks"] if mark["kind"] in ("start", "resume")] == [
        "start",
        "resume",
        "start",
    ]
    assert {choice["field"]: choice["origin"] for choice in run["recipe"]}["lora.r"] == "option"
    assert dash.post(f"/api/runs/{NAME}/stop", {}).json() == {"asked": True}
    stopped = dash.wait("/api/runs", lambda found: found["runs"][0]["state"] == "stopped")["runs"][0]
    assert stopped["why"] == "on request, after saving"
    ended = dash.wait(f"/api/jobs/{job['id']}", lambda job: job["state"] != "running")
    assert (ended["state"], ended["error"]["kind"]) == ("stopped", "Stopped")
    steps = dash.get(f"/api/runs/{NAME}/history").json()["series"]["loss"]["x"]
    assert steps == list(range(1, stopped["step"] + 1))


def resume_in_a_terminal(dash: Dash, place: Path, options: dict[str, Any]) -> None:
    stream = dash.events("/api/runs/stream")
    step = next(stream)[1]["runs"][0]["step"]
    words = ["resume", f"runs/{NAME}", f"--train.max_steps={step + MORE}", "--allow-changed=schedule", "--json"]
    command = [sys.executable, "-m", "strop.cli", *words]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as trainer:
        states = []
        for name, data in stream:
            states += [run["state"] for run in data["runs"]] if name == "changed" else []
            if "finished" in states:
                break
        assert trainer.wait(60) == 0
    stream.close()
    assert states[0] == "running"
    run = dash.get(f"/api/runs/{NAME}").json()
    assert run["step"] == step + MORE and run["adapter"] and run["report"]["ended"] == "steps"
    assert run["memory"]["measured_peak_bytes"] and run["data_report"]["rows"]["used"] == 24
    assert "train.max_steps changed" in " ".join(mark["text"] for mark in run["marks"])
    assert [source["command"].split()[1] for source in dash.get(f"/api/runs/{NAME}/log").json()["sources"]] == [
        "resume",
        "train",
    ]


def compare_answers(dash: Dash, place: Path, options: dict[str, Any]) -> None:
    job = dash.post(f"/api/runs/{NAME}/evaluate", {"data": "held.jsonl", "max_new_tokens": 4}).json()
    events = list(dash.events(f"/api/jobs/{job['id']}/stream"))
    last = [data for name, data in events if name == "job"][-1]
    assert last["state"] == "done" and last["result"]["rows"] == 4
    result = dash.get(f"/api/runs/{NAME}/answers").json()
    assert result["complete"] and result["total"] == 4 and result["rows"][0]["place"] == "held.jsonl:1"
    assert row(dash)["score"]["rows"] == 4


def merge_the_adapter(dash: Dash, place: Path, options: dict[str, Any]) -> None:
    job = dash.post(f"/api/runs/{NAME}/export", {"kind": "merge", "out": "merged", "data": "held.jsonl"}).json()
    done = dash.wait(f"/api/jobs/{job['id']}", lambda job: job["state"] != "running")
    assert (
        done["state"] == "done" and done["result"]["parity"]["passed"] and (place / "merged" / "config.json").is_file()
    )
    wrong = dash.post(f"/api/runs/{NAME}/export", {"kind": "merge", "out": "merged"}).json()
    assert wrong["error"]["message"] == "merged: already exists"  # before a job starts
    assert dash.post(f"/api/runs/{NAME}/export", {"kind": "zip", "out": "x"}).status_code == 400


def chat_with_the_run(dash: Dash, place: Path, options: dict[str, Any]) -> None:
    assert dash.post("/api/chat/start", {"names": [NAME]}).json()["state"] == "starting"
    ready = dash.wait("/api/chat", lambda chat: chat["state"] in ("ready", "failed"))
    assert ready["models"] == [NAME, "base"]
    request = {"model": "base", "messages": [{"role": "user", "content": "what is 3"}], "max_tokens": 4}
    whole = dash.post("/api/chat/v1/chat/completions", request)
    assert whole.status_code == 200 and whole.json()["choices"][0]["message"]["role"] == "assistant"
    with dash.post("/api/chat/v1/chat/completions", {**request, "model": NAME, "stream": True}, stream=True) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = answer.text
    assert text.count("data: ") >= 2 and text.endswith("data: [DONE]\n\n")
    assert dash.post("/api/chat/v1/chat/completions", {**request, "temprature": 1}).status_code == 400
    assert {model["id"] for model in dash.get("/api/chat/v1/models").json()["data"]} == {NAME, "base"}
    dash.post("/api/chat/stop", {})
    assert dash.wait("/api/chat", lambda chat: chat["state"] == "off")["models"] == []


def check_a_damaged_file(dash: Dash, place: Path, options: dict[str, Any]) -> None:
    (place / "bad.jsonl").write_text('{"messages": []}\n{broken\n')
    started = dash.post("/api/start", {"options": {**options, "data.train": "bad.jsonl"}}).json()
    assert started["run"] == "bad-1"
    job = dash.wait(f"/api/jobs/{started['job']['id']}", lambda job: job["state"] != "running")
    assert job["state"] == "failed" and {place["line"] for place in job["error"]["where"]} == {1, 2}
    run = next(run for run in dash.get("/api/runs").json()["runs"] if run["name"] == "bad-1")
    assert (run["state"], run["why"]) == ("failed", job["error"]["message"]) and not (place / "runs" / "bad-1").exists()
    assert dash.get("/api/runs/bad-1/duplicate").json()["options"]["data.train"] == "bad.jsonl"
    assert dash.post("/api/runs/bad-1/delete", {"confirm": "bad-1"}).json()["id"] == started["job"]["id"]
    assert "bad-1" not in {run["name"] for run in dash.get("/api/runs").json()["runs"]}


CHAPTERS = (
    check_plan_and_start,
    kill_the_trainer,
    resume_after_a_restart_and_stop,
    resume_in_a_terminal,
    compare_answers,
    merge_the_adapter,
    chat_with_the_run,
    check_a_damaged_file,
)


@pytest.mark.slow
def test_the_whole_story(place: Path, options: dict[str, Any]) -> None:
    """This is one test because each part continues the run of the previous one; each part starts a new server."""
    for chapter in CHAPTERS:
        with run_dash(place / "runs", place) as dash:
            chapter(dash, place, options)
            assert dash.stop() == 130, chapter.__name__
