"""Rows are held out only where the run can say that it was not trained on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import strop
from strop.evaluation.held_out import trained_on
from strop.evaluation.run import read_conversations
from tests.support.runs import run

ROWS = [{"prompt": f"what is {n}", "completion": f"it is {n}"} for n in range(8)]
NEW = {"prompt": "what is nine", "completion": "it is 9"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train(folder: Path, data: Path, out: str, **options: Any) -> str:
    small = {"train.max_steps": 1, "train.batch_size": 4, "lora.r": 2, "model.dtype": "fp32"}
    strop.train(model=str(folder), data=str(data), out=str(data.parent / out), **{**small, **options})
    return str(data.parent / out)


@pytest.fixture
def made(tiny_folder: Path, tmp_path: Path) -> str:
    return train(tiny_folder, write(tmp_path / "train.jsonl", ROWS), "made")


def known(name: str, path: Path, rows: list[dict[str, Any]]) -> list[bool] | None:
    return trained_on(name, read_conversations(str(write(path, rows))))


def test_train_rows_are_told_from_others_in_any_format(made: str, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": ROWS[3]["prompt"]}, {"role": "assistant", "content": ROWS[3]["completion"]}]
    assert known(made, tmp_path / "a.jsonl", [ROWS[0], NEW]) == [True, False]
    assert known(f"{made}/adapter", tmp_path / "b.jsonl", [{"messages": turns}]) == [True]


def test_what_is_not_known_is_not_claimed(made: str, tiny_folder: Path, tmp_path: Path) -> None:
    train_file, elsewhere = tmp_path / "train.jsonl", tmp_path / "elsewhere"
    shutil.copytree(Path(made) / "adapter", elsewhere)
    for name in (str(elsewhere), str(tiny_folder)):
        assert known(name, tmp_path / "a.jsonl", [NEW]) is None
    write(train_file, ROWS[1:])  # rows that were trained on have gone elsewhere
    assert known(made, tmp_path / "a.jsonl", ROWS[:1]) is None
    train_file.unlink()
    assert known(made, tmp_path / "a.jsonl", [NEW]) is None


def test_a_share_that_was_held_out_is_held_out(tiny_folder: Path, tmp_path: Path) -> None:
    name = train(tiny_folder, write(tmp_path / "train.jsonl", ROWS), "made", eval="50%")
    found = known(name, tmp_path / "a.jsonl", ROWS)
    held = json.loads((Path(name) / "report.json").read_text())["data_report"]["held_out"]
    assert found is not None and 0 < held == found.count(False) < len(ROWS)


def test_rows_of_the_run_that_it_started_from_count_too(made: str, tiny_folder: Path, tmp_path: Path) -> None:
    pair = {"prompt": NEW["prompt"], "chosen": NEW["completion"], "rejected": "no"}
    options = {"model.adapter": made, "train.objective": "dpo"}
    further = train(tiny_folder, write(tmp_path / "pairs.jsonl", [pair]), "further", **options)
    other = {"prompt": "what is ten", "completion": "it is 10"}
    assert known(further, tmp_path / "a.jsonl", [ROWS[0], NEW, other]) == [True, True, False]


def test_eval_counts_them_everywhere(made: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card, page = Path(made) / "adapter" / "README.md", Path(made) / "report.html"

    def evaluated(rows: list[dict[str, Any]]) -> tuple[Any, str]:
        data = write(tmp_path / "asked.jsonl", rows)
        code, out, err = run("eval", made, "--data", data, "--max-new-tokens", "2", "--json", capsys=capsys)
        assert code == 0, err
        count = json.loads(out)["train_rows"]
        assert json.loads((Path(made) / "report.json").read_text())["evaluation"]["train_rows"] == count
        return count, err

    count, err = evaluated([*ROWS[:3], NEW])
    assert count == 3 and "3 of 4 rows are also train rows" in err and "held-out" not in err
    assert "3 of the 4 rows that it was asked are also train rows" in card.read_text()
    assert "| held-out rows |" not in card.read_text() and "3 of them also train rows" in page.read_text()
    count, err = evaluated([NEW])
    assert count == 0 and "1 held-out rows" in err and "| held-out rows | 1 rows: " in card.read_text()
    assert "train rows" not in card.read_text() + page.read_text()
    (tmp_path / "train.jsonl").unlink()
    count, err = evaluated([NEW])
    assert count is None and "1 rows" in err and "held-out" not in err
    assert "| rows | 1 rows: " in card.read_text() and "is not known" in card.read_text()
