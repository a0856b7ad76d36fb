"""`strop check --fix`."""

from __future__ import annotations

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
