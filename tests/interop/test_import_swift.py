"""Shell scripts and data options of ms-swift."""

from __future__ import annotations

from pathlib import Path

import pytest

from strop.errors import InputError
from strop.interop.draft import Draft, import_config
from tests.interop.test_import_distillation import notes

CONFIG = "model: demo\ndataset: a.jsonl\n"


def script(folder: Path, text: str) -> Draft:
    (folder / "run.sh").write_text(text, encoding="utf-8")
    return import_config("swift", folder / "run.sh").draft


def config(folder: Path, text: str) -> Draft:
    (folder / "run.yaml").write_text(CONFIG + text, encoding="utf-8")
    return import_config("swift", folder / "run.yaml").draft


def test_a_number_sign_within_a_word_is_not_a_comment(tmp_path: Path) -> None:
    """The layout of ms-swift's README."""
    text = "swift sft \\\n    --model demo \\\n    --dataset a.jsonl#500 \\\n              b.jsonl#500 \\\n"
    draft = script(tmp_path, f"{text}    --system 'it is #1' --lora_rank 64 \\\n    --seed 1 # not --seed 2, don't\n")
    assert draft.get("data.train") == ["a.jsonl", "b.jsonl"] and draft.get("lora.r") == 64 and draft.get("seed") == 1
    assert "strop reads all rows" in notes(draft.unsupported)["dataset"]
    assert notes(draft.unsupported)["system"] == "'it is #1': write it into the rows"


@pytest.mark.parametrize("end", ["> log.txt 2>&1 &", "&& swift export --seed 9", "; echo --seed 9", "| tee --seed 9"])
def test_the_command_ends_before_another(end: str, tmp_path: Path) -> None:
    draft = script(tmp_path, f"swift sft --model demo --dataset a.jsonl --seed 7 {end}\n")
    assert draft.get("seed") == 7 and draft.get("data.train") == "a.jsonl"


def test_variables_that_the_script_sets_are_read(tmp_path: Path) -> None:
    text = "export MODEL='demo'\nLR=3e-5\nN=$(nproc)\nNPROC_PER_NODE=$N swift sft --model $MODEL --dataset a.jsonl"
    text += " --learning_rate ${LR} --gradient_accumulation_steps $(expr 32 / $N) --lora_rank $RANK --seed 5\n"
    draft = script(tmp_path, text)
    assert (draft.get("model.name"), draft.get("train.learning_rate"), draft.get("seed")) == ("demo", 3e-5, 5)
    unread = notes(draft.unsupported)
    assert unread["gradient_accumulation_steps"] == (
        "$(expr 32 / $N): strop does not run the shell; set it in the recipe"
    )
    assert unread["lora_rank"].startswith("$RANK: ")


def test_a_quote_that_is_not_closed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a quote is not closed"):
        script(tmp_path, "swift sft --model demo --system 'it is\n")


def test_files_to_evaluate_go_before_a_share(tmp_path: Path) -> None:
    draft = config(tmp_path, "val_dataset: b.jsonl\nsplit_dataset_ratio: 0.1\n")
    assert draft.get("data.eval") == "b.jsonl" and "split_dataset_ratio" in notes(draft.unsupported)
    assert config(tmp_path, "split_dataset_ratio: 0.1\n").get("data.eval") == "10%"
    draft = config(tmp_path, "split_dataset_ratio: 0.1\neval_strategy: no\n")
    assert draft.get("data.eval") is None and "split_dataset_ratio" in notes(draft.ignored)


def test_loss_scale_all_is_the_loss_of_all_tokens(tmp_path: Path) -> None:
    draft = config(tmp_path, "loss_scale: all\n")
    assert draft.get("data.loss") == "all" and not draft.unsupported
    assert "loss_scale" in notes(config(tmp_path, "loss_scale: react\n").unsupported)


def test_other_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="task_type: seq_cls: of ms-swift, only causal_lm"):
        config(tmp_path, "task_type: seq_cls\nnum_labels: 3\n")


@pytest.mark.parametrize(
    ("line", "differs", "unsupported"),
    [
        ("", "0.95 by default in swift; 0.999 in strop", None),
        ("adam_beta2: 0.999\n", None, None),
        ("adam_beta2: 0.9\n", None, "0.9: 0.999 in strop"),
    ],
)
def test_beta2_is_reported_once(line: str, differs: str | None, unsupported: str | None, tmp_path: Path) -> None:
    draft = config(tmp_path, line)
    assert notes(draft.differs).get("adam_beta2") == differs
    assert notes(draft.unsupported).get("adam_beta2") == unsupported
