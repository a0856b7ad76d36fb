"""`strop runs`: listing and deleting."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.dash import evaluated, make_run, sample, session, step
from tests.support.runs import run


def test_delete_needs_a_name_and_yes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "runs", "mine", [*session(), step(1)])
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "file").write_text("mine")
    (folder / "link").symlink_to(outside)
    code, out, err = run("runs", tmp_path / "runs", "--delete", "mine", "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["deleted"] is False and json.loads(out)["files"] == 4
    assert (
        "events.jsonl" in err
        and "4 files" in err
        and str(folder / "events.jsonl") not in err
        and "add --yes" in err
        and folder.is_dir()
    )
    code, out, _ = run("runs", tmp_path / "runs", "--delete", "mine", "--yes", "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["deleted"] is True
    assert not folder.exists() and (outside / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["nope", "..", ".", "", "../runs/mine", "empty", "linked"])
def test_other_names_are_not_deleted(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "runs", "mine", [*session(), step(1)])
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(folder)
    code, _, _ = run("runs", tmp_path / "runs", "--delete", name, "--yes", capsys=capsys)
    assert code == 2 and (folder / "lock.json").is_file() and (tmp_path / "runs" / "linked").is_symlink()


def test_run_in_use_is_not_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path, "mine", [*session(), step(1)])
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        claim = {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
        (folder / "claim.json").write_text(json.dumps(claim))
        code, _, err = run("runs", tmp_path, "--delete", "mine", "--yes", capsys=capsys)
        process.communicate(b"\n")
    assert code == 2 and "in use" in err and (folder / "events.jsonl").is_file()
    assert "--out" not in err and f"kill {process.pid}" in err


def test_run_is_deleted_by_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "runs", "mine", [*session(), step(1)])
    assert run("runs", tmp_path / "runs", "--delete", f"{folder}/", "--yes", capsys=capsys)[0] == 0
    assert not folder.exists()


def test_running_run_is_shown_as_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path, "mine", [*session(), step(3)])
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        claim = {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
        (folder / "claim.json").write_text(json.dumps(claim))
        _, out, err = run("runs", tmp_path, "--json", capsys=capsys)
        process.communicate(b"\n")
    assert json.loads(out)["runs"][0]["state"] == "running" and "running," in err and "step 3" in err


def test_table_is_readable_in_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strop.display.tables.console._width", 80)
    report = {"exit": 0, "steps": 9, "loss": {"first": 2.0, "last": 0.01325}, "eval_loss": 0.015, "seconds": 700}
    evaluated(make_run(tmp_path, "support-tickets", [*session(), step(9)], report), [sample(1, False, True)])
    make_run(tmp_path, "two", [*session(), step(4)])
    out = run("runs", tmp_path, capsys=capsys)[1]
    assert "…" not in out and "support-tickets" in out and "finished" in out and "step 4" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("ended", "shown"),
    [
        ("time", "stopped, time budget used up, step 9"),
        ("patience", "finished, early stopping, step 9"),
        ("steps", "finished"),
    ],
)
def test_state_has_its_reason(
    ended: str, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strop.display.tables.console._width", 200)
    make_run(tmp_path, "one", [*session(), step(9)], {"exit": 0, "steps": 9, "ended": ended})
    _, out, err = run("runs", tmp_path, "--json", capsys=capsys)
    (line,) = (line for line in err.splitlines() if "one" in line)
    cells = [cell.strip() for cell in line.split("│")]
    moment = time.localtime(json.loads(out)["runs"][0]["started"])
    assert (cells[2], cells[-2]) == (f"{moment.tm_mday} {time.strftime('%b %H:%M', moment)}", shown)


def test_yes_without_delete_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("runs", tmp_path, "--yes", capsys=capsys)[0] == 2


def test_markup_in_names_is_printed_literally(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "a[red]x", [*session(), step(1)])
    make_run(tmp_path, "b[", [*session(), step(1)])
    code, out, _ = run("runs", tmp_path, capsys=capsys)
    assert code == 0 and "a[red]x" in out
    code, out, _ = run("runs", tmp_path, "--delete", "a[red]x", capsys=capsys)
    assert code == 0 and out.startswith(f"would delete {tmp_path}/a[red]x: ")


@pytest.mark.parametrize(
    ("report", "recipe"),
    [
        ('{"loss": null, "evaluation": {"metric": "exact", "tuned": null}, "seconds": "long", "steps": null}', "{}"),
        ('{"loss": 3, "evaluation": [], "eval_loss": 5e-05}', "model: demo\ndata: 3\n"),
        ("[]", "data: {train: {a: 1}}\nmodel: {name: 7}\n"),
        ('{"loss": ', "- a\n"),
    ],
)
def test_damaged_run_is_listed_with_the_others(
    report: str, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, "intact", [*session(), step(1)])
    folder = make_run(tmp_path, "damaged", [*session(), step(1)])
    (folder / "report.json").write_text(report)
    (folder / "recipe.yaml").write_text(recipe)
    code, out, err = run("runs", tmp_path, "--json", capsys=capsys)
    assert code == 0 and "damaged" in err and "intact" in err
    assert {Path(row["run"]).name for row in json.loads(out)["runs"]} == {"damaged", "intact"}


def test_losses_and_scores_are_named_and_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strop.display.tables.console._width", 200)
    report = {"exit": 0, "steps": 9, "loss": {"first": 2.0, "last": 0.01325}, "eval_loss": 0.015}
    evaluated(make_run(tmp_path, "done", [*session(), step(9)], report), [sample(1, False, True)], train_rows=1)
    (make_run(tmp_path, "live", [*session(), step(5), step(6)]) / "checkpoints" / "step-000004").mkdir(parents=True)
    code, out, err = run("runs", tmp_path, "--json", capsys=capsys)
    rows = {Path(row["run"]).name: row for row in json.loads(out)["runs"]}
    assert code == 0 and "train loss" in err and "eval loss" in err
    assert "0.01325" in err and "0.015" in err and "1 of 1 rows trained on" in err
    assert (rows["done"]["train_loss"], rows["done"]["eval_loss"], rows["done"]["loss"]) == (0.01325, 0.015, 0.015)
    assert (rows["live"]["step"], rows["live"]["train_loss"], rows["live"]["eval_loss"]) == (6, 4.94, None)
    assert "crashed, the process ended without a reason, step 6" in err
