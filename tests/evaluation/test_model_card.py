"""Numbers of rows in the model card of a run."""

from __future__ import annotations

from pathlib import Path

import strop
from strop.evaluation.model_card import format_card
from tests.support.tiny import write_rows


def read_card(folder: Path) -> str:
    return (folder / "adapter" / "README.md").read_text(encoding="utf-8")


def test_held_out_rows_are_not_counted_as_trained(tiny_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    run = strop.train(model=tiny_folder, data=rows, eval="20%", out=tmp_path / "run", **{"train.max_steps": 2})
    held_out = run.report["data_report"]["held_out"]
    card = read_card(run.folder)
    assert held_out > 0 and f"| {24 - held_out} rows, {held_out} more held out, hash" in card
    assert f"Of {held_out} evaluation rows only the loss was measured, not its answers." in card


def test_evaluation_on_train_rows_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    run = strop.train(model=tiny_folder, data=rows, eval=rows, out=tmp_path / "run", **{"train.max_steps": 2})
    assert "not its answers; 8 of them are also train rows." in read_card(run.folder)
    run = strop.train(model=tiny_folder, data=rows, out=tmp_path / "none", **{"train.max_steps": 1})
    assert "It was not evaluated on held-out rows" in read_card(run.folder) and "| 8 rows, hash" in read_card(
        run.folder
    )


def test_scores_of_tasks_and_a_judge_are_listed(tiny_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    run = strop.train(model=tiny_folder, data=rows, out=tmp_path / "run", **{"train.max_steps": 1})
    strop.evaluate(run, data=rows, max_new_tokens=2, judge=lambda *texts: 1)
    judge = run.report["evaluation"]["judge"]
    assert f"{judge['win_rate']:.1%} of 8 rows, by a judge (" in read_card(run.folder)
    assert "It was not measured whether it got worse at other tasks." in read_card(run.folder)
    change = {"value": -0.25, "low": -0.3, "high": -0.2}
    tasks = {"arc": {"acc": {"base": 0.5, "tuned": 0.0, "documents": 20, "difference": change}}}
    card = format_card({**run.report, "tasks": tasks})
    assert "| arc | 20 documents: acc 0.5000 before, 0.0000 after (change -0.2500 (-0.3000 to -0.2000)) |" in card
    assert "It was not measured" not in card
