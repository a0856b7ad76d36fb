"""`strop demo`, on a tiny model and a few of its rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from strop import api
from strop.demo import data_files
from tests.support.runs import run


def shorten_demo(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the demo train the tiny model on six rows, in tmp_path."""
    files = [tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"]
    for source, file in zip(data_files(), files, strict=True):
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)[:6]
        file.write_text("".join(lines), encoding="utf-8")
    train = api.train

    def train_tiny(**options: Any) -> Any:
        return train(**{**options, "model": tiny_folder, "train.max_steps": 2, "model.dtype": "fp32"})

    monkeypatch.setattr("strop.demo.data_files", lambda: tuple(files))
    monkeypatch.setattr(api, "train", train_tiny)
    monkeypatch.chdir(tmp_path)


def test_demo_trains_evaluates_and_names_the_next_commands(
    tiny_folder: Path, tmp_path: Path, few_questions: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shorten_demo(tiny_folder, tmp_path, monkeypatch)
    code, out, err = run("demo", "--json", capsys=capsys)
    result = json.loads(out)
    assert code == 0 and result["run"] == "runs/demo-1" and result["metric"] == "exact_json"
    assert result["rows"] == 6 and result["train_rows"] == 0 and {"base", "tuned", "difference"} <= set(result)
    report = json.loads((tmp_path / "runs" / "demo-1" / "report.json").read_text(encoding="utf-8"))
    assert report["evaluation"]["rows"] == 6
    assert re.search(rf"{few_questions} general questions: \d+% right before, \d+% after", err)
    assert "tuned minus base" in err and "strop chat runs/demo-1" in err and err.count("prompt  ") == 3


def test_interrupted_demo_resumes(
    tiny_folder: Path, tmp_path: Path, few_questions: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shorten_demo(tiny_folder, tmp_path, monkeypatch)
    evaluate = api.evaluate

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "evaluate", stop)
    code, _, err = run("demo", capsys=capsys)
    assert code == 130 and "resuming" not in err and "error" not in err
    assert "stopped; the training up to the last save is kept in runs/demo-1; continue with `strop demo`" in err
    monkeypatch.setattr(api, "evaluate", evaluate)
    code, out, err = run("demo", "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["run"] == "runs/demo-1"
    assert "resuming runs/demo-1, which was interrupted; to start afresh: strop demo --out runs/demo-2" in err
    code, out, err = run("demo", "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["run"] == "runs/demo-2" and "resuming" not in err
