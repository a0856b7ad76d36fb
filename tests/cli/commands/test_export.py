"""Commands that are printed after `strop merge` and `strop eval`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.runs import QUICK, run


@pytest.mark.parametrize("has_template", [True, False])
def test_a_merged_model_chats_only_with_a_template(
    has_template: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, rows, out = tiny.save_tiny(tmp_path / "base"), tmp_path / "rows.jsonl", tmp_path / "merged"
    if not has_template:
        (base / "chat_template.jinja").unlink()
    rows.write_text('{"text": "once upon a time there was a fox"}\n' * 8, encoding="utf-8")
    code, _, err = run("train", "--model", base, "--data", rows, "--out", tmp_path / "run", *QUICK, capsys=capsys)
    assert code == 0, err
    code, _, err = run("merge", tmp_path / "run", "--out", out, "--no-parity", capsys=capsys)
    chat = f"next     strop chat {out}\n         strop serve {out}\n"
    assert code == 0 and (chat if has_template else f"next     strop serve {out}\n") in err, err


def test_a_run_with_new_tokens_is_merged_before_its_export(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", tiny_folder, "--data", rows_file, "--out", tmp_path / "run", "--lora.new_tokens", '["<fin>"]']
    code, _, err = run("train", *words, *QUICK, "--train.max_steps", "1", capsys=capsys)
    assert code == 0, err
    code, _, err = run("eval", tmp_path / "run", "--data", rows_file, "--max-new-tokens", "2", capsys=capsys)
    assert code == 0 and "strop export gguf run-merged --out run.gguf" in err
