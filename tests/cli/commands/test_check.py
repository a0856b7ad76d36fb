"""`strop check`: rows that are repeated by a weight, files of several formats, and `--fix`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.runs import run


def test_fix_reports_the_cleaned_copy(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = tiny.write_rows(Path("rows.jsonl"), 5)
    rows.write_text(rows.read_text() + rows.read_text().splitlines()[0] + "\n")
    code, _, err = run("check", "--model", tiny_folder, "--data", rows, "--fix", "clean.jsonl", capsys=capsys)
    assert code == 0 and "wrote clean.jsonl: 5 rows, 1 dropped (see clean.jsonl.changes.jsonl)" in err
    assert f"next     strop train --model {tiny_folder} --data clean.jsonl" in err


def test_fix_refuses_existing_paths(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 5)
    for out in (Path("."), tmp_path, rows):
        code, _, err = run("check", "--model", tiny_folder, "--data", rows, "--fix", out, capsys=capsys)
        assert code == 2 and f"error: {out}" in err


def test_copy_without_rows_is_not_written(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": ""}\n' * 3, encoding="utf-8")
    code, _, err = run("check", "--model", tiny_folder, "--data", "rows.jsonl", "--fix", "clean.jsonl", capsys=capsys)
    assert code == 2 and "no row is usable, so clean.jsonl was not written" in err and "next" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_row_that_a_weight_repeats_is_shown_once_and_no_duplicate(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a long path would be cut
    rows = tiny.write_rows(Path("rows.jsonl"), 5)
    words = ["check", "--model", tiny_folder, "--data"]
    code, _, err = run(*words, f"{rows}@3", "--show", "2", capsys=capsys)
    assert code == 0 and "15 rows read" in err and "repeat an earlier" not in err
    assert [err.count(f"rows.jsonl:{line}  ") for line in (1, 2, 3)] == [1, 1, 0]
    rows.write_text(2 * rows.read_text())
    report = json.loads(run(*words, f"{rows}@3", "--json", capsys=capsys)[1])
    assert report["duplicates"]["within"] == 5 and "5 training rows repeat an earlier one" in report["warnings"]


def test_file_without_a_format_next_to_others_is_not_read_with_options_for_all(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, table = tiny.write_rows(tmp_path / "rows.jsonl", 5), tmp_path / "qa.csv"
    table.write_text("question,answer,notes\nwhat is 3,three,easy\n", encoding="utf-8")
    alone = "Fix: --data.format question-answer (without notes)"
    assert alone in run("check", "--model", tiny_folder, "--data", table, capsys=capsys)[2]
    err = run("check", "--model", tiny_folder, "--data", rows, "--data", table, capsys=capsys)[2]
    assert alone not in err and "Fix: rename or remove columns of this file" in " ".join(err.split())
