"""Numbers of rows in the model card of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

import strop
from strop.evaluation.model_card import format_card
from tests.support.texts import write
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


def test_everything_that_is_trained_is_named_with_the_commands_that_load_it(tiny_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    options = {"train.max_steps": 1, "lora.r": 12, "lora.alpha": 24, "lora.target_modules": ["q_proj", "v_proj"]}
    first = strop.train(model=tiny_folder, data=rows, out=tmp_path / "first", **options)
    card = read_card(first.folder)
    assert "| rank 12, alpha 24, on q_proj, v_proj |" in card and "--max-lora-rank 16 " in card
    longer = strop.train(model=first.folder, data=rows, out=tmp_path / "second", **{"train.max_steps": 1})
    card = read_card(longer.folder)
    assert "| continues | the adapter of `first` |" in card and "the runs that it continues are not counted" in card
    options |= {"lora.rank_pattern": {"q_proj": 32}, "lora.modules_to_save": ["down_proj"], "lora.use_dora": True}
    options |= {"lora.bias": "lora_only", "lora.new_tokens": ["<a>", "<b>"]}
    card = read_card(strop.train(model=tiny_folder, data=rows, out=tmp_path / "all", **options).folder)
    text = "q_proj, v_proj; rank 32 on q_proj; DoRA; down_proj trained in full; biases (lora_only); 2 new tokens |"
    assert text in card and "vllm serve" not in card and "vLLM does not load this adapter" in card


@pytest.mark.parametrize("dora", [False, True])
def test_embedder_with_dora_is_merged_for_sentence_transformers(dora: bool, tiny_folder: Path, tmp_path: Path) -> None:
    pairs = [{"anchor": f"what is {n}", "positive": f"it is {n}"} for n in range(8)]
    rows = write(tmp_path / "rows.jsonl", pairs)
    options = {"train.objective": "embed", "train.max_steps": 1, "lora.use_dora": dora}
    card = read_card(strop.train(model=tiny_folder, data=rows, out=tmp_path / "run", **options).folder)
    assert ('SentenceTransformer("MERGED")' in card) == dora != ('SentenceTransformer("THIS_FOLDER")' in card)
