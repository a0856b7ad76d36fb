"""Sweeps on the page: their row among the runs, parallel coordinates, the live table of trials, and the winner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.dash.conftest import HOSTILE
from tests.support.browser import DESK, PHONE, at, open_browser, open_tab
from tests.support.dash import Dash, make_run, run_dash, session, step
from tests.support.tiny import write_rows


def trial(number: int, state: str = "finished", score: float | None = 0.7, **fields: Any) -> dict[str, Any]:
    setting = {"lora.r": 4 * (number + 1), "train.learning_rate": 1e-4 * 3**number}
    ended = state == "finished"
    return {
        "number": number, "state": state, "setting": setting, "score": score if ended else None,
        "low": 0.5 if ended else None, "high": 0.9 if ended else None, "loss": 0.3 if ended else None,
        "steps": 30 if ended else None, "tokens": None, "train_s": None, "seconds": 12.0 if ended else None,
        "peak_bytes": None, "same_as": None, "run": f"trials/{number:03d}", "error": None, **fields,
    }  # fmt: skip


def state(trials: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    part = {"rows": 40, "files": []}
    over = {"lora.r": {"choices": [4, 8, 12]}, "train.learning_rate": {"low": 1e-4, "high": 1e-3, "log": True}}
    request = {"recipe": {"model.name": "tiny", "data.train": "rows.jsonl"}, "over": over, "sampler": "tpe", "seeds": 3}
    return {
        "version": 1, "request": request, "metric": "exact", "plan": {}, "default": {}, "trials": trials,
        "split": {"train": part, "selection": part, "test": part, "notes": [], "labels": None}, "selection": None,
        "final": [], "result": None, **fields,
    }  # fmt: skip


def finished(trials: list[dict[str, Any]]) -> dict[str, Any]:
    ranking = [
        {"trials": [one["number"]], "standing": standing, "setting": one["setting"], "parameters": 1000}
        for one, standing in zip(trials, ("equal", "best", "worse"), strict=False)
    ]
    test = {"default": {"value": 0.6, "low": 0.5, "high": 0.7}, "chosen": {"value": 0.8, "low": 0.7, "high": 0.9}}
    result = {"sentence": "use lora.r 8: it is better than the default", "test": test, "verdict": "better"}
    return state(trials, selection={"ranking": ranking}, result=result)


def write(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json.new").write_text(json.dumps(content), encoding="utf-8")
    (folder / "sweep.json.new").replace(folder / "sweep.json")
    return folder


@pytest.fixture
def dash(tmp_path: Path) -> Any:
    with run_dash(tmp_path / "runs", tmp_path) as started:
        yield started


def test_a_sweep_is_a_row_among_the_runs(dash: Dash, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    make_run(runs, "one", [*session(), step(1)])
    write(runs / "sweep-1", state([trial(0), trial(1, score=0.8), trial(2, "waiting")]))
    write(runs / "damaged", {"version": 1})
    rows = {row["name"]: row for row in dash.get("/api/runs").json()["runs"]}
    assert rows.keys() == {"one", "sweep-1", "damaged"}
    sweep = rows["sweep-1"]
    assert (sweep["kind"], sweep["state"], sweep["step"], sweep["steps"]) == ("sweep", "stopped", 2, 3)
    assert sweep["score"]["value"] == 0.8 and sweep["model"] == "tiny"
    assert rows["damaged"]["state"] == "failed" and rows["damaged"]["why"] == "sweep.json is damaged"
    write(runs / "sweep-1", finished([trial(0), trial(1)]))
    assert dash.get("/api/sweeps/sweep-1").json()["state"] == "finished"


def test_running_trials_show_their_steps(dash: Dash, tmp_path: Path) -> None:
    folder = write(tmp_path / "runs" / "sweep-1", state([trial(0), trial(1, "running")]))
    make_run(folder / "trials", "001", [*session(), *(step(number) for number in range(1, 8))])
    events = dash.events("/api/sweeps/sweep-1/stream")
    name, shown = next(events)
    assert name == "sweep" and shown["trials"][1]["step"] == 7 and shown["trials"][1]["steps"] == 100
    assert shown["trials"][1]["state"] == "stopped"  # no process has claimed it
    claim = folder / "claims" / "001"
    claim.mkdir(parents=True)
    process = psutil.Process()
    about = {"pid": process.pid, "started": process.create_time(), "folder": str(claim)}
    (claim / "claim.json").write_text(json.dumps(about), encoding="utf-8")
    assert next(events)[1]["trials"][1]["state"] == "running"
    write(folder, state([trial(0), trial(1)]))
    assert next(events)[1]["trials"][1]["state"] == "finished"


@pytest.mark.parametrize("path", ["sweeps/none", "sweeps/none/stream", "sweeps/..%2Fone"])
def test_an_unknown_sweep_is_not_found(path: str, dash: Dash) -> None:
    assert dash.get(f"/api/{path}").status_code == 404


def test_a_sweep_without_a_winner_cannot_be_trained(dash: Dash, tmp_path: Path) -> None:
    write(tmp_path / "runs" / "sweep-1", state([trial(0)]))
    refused = dash.post("/api/sweeps/sweep-1/train")
    assert refused.status_code == 409 and "no winner yet" in refused.json()["error"]["message"]


def test_the_screen_of_a_sweep(dash: Dash, tmp_path: Path, tiny_folder: Path) -> None:
    folder = tmp_path / "runs" / "sweep-1"
    error = {"kind": "DivergedError", "message": HOSTILE, "fix": "", "where": []}
    trials = [trial(0), trial(1, score=0.8), trial(2, "failed", error=error)]
    write(folder, state([*trials[:2], trial(2, "waiting", setting=None)]))
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    with open_browser() as browser:
        for size in (DESK, PHONE):
            with open_tab(browser, dash) as tab:
                tab.page.set_viewport_size(size)
                tab.page.goto(at(dash, "/runs"))
                tab.page.click("text=sweep-1")
                tab.page.wait_for_selector("svg.parallel polyline.default")
                assert tab.page.locator("svg.parallel polyline").count() == 2
                assert tab.page.locator("svg.parallel .name").all_text_contents() == [
                    "lora.r", "learning_rate", "loss", "exact",
                ]  # fmt: skip
                assert tab.page.locator("tbody tr").count() == 3
                assert "80.0%" in tab.page.locator("tbody tr").first.inner_text()
                tab.axe(f"sweep {size}")
                tab.check(f"sweep {size}")
        with open_tab(browser, dash) as tab:
            tab.page.goto(at(dash, "/sweep/sweep-1"))
            tab.page.wait_for_selector("text=2 of 3 trials")
            assert tab.page.locator("text=Train the winner").count() == 0
            recipe = {"model": {"name": str(tiny_folder), "dtype": "fp32"}, "data": {"train": str(rows)}}
            recipe |= {"train": {"max_steps": 2}}
            (folder / "winner.yaml").write_text(json.dumps(recipe), encoding="utf-8")
            write(folder, finished(trials))
            tab.page.wait_for_selector("text=Verdict: use lora.r 8")  # without a reload
            assert tab.page.locator("svg.parallel polyline.best").count() == 1
            assert HOSTILE.partition("\u202e")[0] in tab.page.locator("tbody").inner_text()
            tab.axe("finished sweep")
            tab.page.click("text=Train the winner on all rows")
            tab.page.wait_for_selector("h1:has-text('sweep-1-1')")
            assert "#/run/sweep-1-1" in tab.page.url
            tab.check("finished sweep")
    dash.wait(
        "/api/runs", lambda found: any(x["name"] == "sweep-1-1" and x["state"] == "finished" for x in found["runs"])
    )
