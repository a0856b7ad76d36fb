"""A script of sentence-transformers becomes a recipe of `train.objective: embed`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.runs import run

SCRIPT = """
from datasets import load_dataset
from peft import LoraConfig, TaskType
from sentence_transformers import (
    SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments, losses,
)
from sentence_transformers.training_args import BatchSamplers

model = SentenceTransformer("org/base", model_kwargs={"torch_dtype": "bfloat16"})
model.max_seq_length = 256
model.add_adapter(LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=8, lora_alpha=16, target_modules=["q_proj"]))
rows = load_dataset("json", data_files="rows.jsonl", split="train")
loss = losses.CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=16)
args = SentenceTransformerTrainingArguments(
    "out", per_device_train_batch_size=64, num_train_epochs=2, learning_rate=2e-4,
    batch_sampler=BatchSamplers.NO_DUPLICATES,
)
SentenceTransformerTrainer(model=model, args=args, train_dataset=rows, loss=loss).train()
"""
MODULES = """SentenceTransformer(modules=[
    models.Transformer("org/base", max_seq_length=128), models.Pooling(64, pooling_mode="lasttoken")])"""


def read(folder: Path, script: str, capsys: Any) -> tuple[dict[str, Any], str]:
    """Return the recipe, and the report as text."""
    file, out = folder / "train.py", folder / "recipe.yaml"
    file.write_text(script)
    code, stdout, err = run("import", "trl", file, "--out", out, "--json", capsys=capsys)
    assert code == 0, err
    return yaml.safe_load(out.read_text()), " ".join(json.dumps(json.loads(stdout)).split())


def test_script_of_sentence_transformers_is_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, report = read(tmp_path, SCRIPT, capsys)
    expected = {
        "objective": "embed", "pooling": "mean", "temperature": 0.02, "batch_size": 64, "micro_batch": 16,
        "epochs": 2.0, "learning_rate": 2e-4,
    }  # fmt: skip
    assert {name: recipe["train"][name] for name in expected} == expected
    assert recipe["model"] == {"name": "org/base", "dtype": "bf16", "quantization": "none"}
    assert recipe["data"]["train"] == "rows.jsonl" and recipe["data"]["max_length"] == 256
    assert (recipe["lora"]["r"], recipe["lora"]["alpha"], recipe["lora"]["target_modules"]) == (8, 16.0, ["q_proj"])
    assert "set train.pooling last" in report and "needs no batch sampler" in report
    assert '"no_equivalent": [], "own_way"' in report


def test_modules_and_the_plain_loss_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = SCRIPT.replace('SentenceTransformer("org/base", model_kwargs={"torch_dtype": "bfloat16"})', MODULES)
    script = script.replace("model.max_seq_length = 256\n", "").replace("CachedMultiple", "Multiple")
    script = script.replace(", scale=50.0, mini_batch_size=16", "")
    recipe, report = read(tmp_path, script, capsys)
    assert recipe["train"]["pooling"] == "last" and recipe["train"]["temperature"] == 0.05
    assert recipe["model"]["name"] == "org/base" and recipe["data"]["max_length"] == 128
    assert recipe["train"]["micro_batch"] == 64 and "of the effective batch" in report


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=16)",
            "CoSENTLoss(model)",
            "CoSENTLoss",
        ),
        ("model.add_adapter", "print", "LoraConfig"),
    ],
)
def test_other_losses_and_full_training_are_refused_or_named(
    old: str, new: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.py"
    file.write_text(SCRIPT.replace(old, new))
    code, stdout, err = run("import", "trl", file, "--out", tmp_path / "recipe.yaml", capsys=capsys)
    assert message in stdout + err and (code == 2 or new == "print")


def test_a_script_without_lora_gets_adapters_and_dropout_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [adapter] = [line for line in SCRIPT.splitlines() if "add_adapter" in line]
    recipe, report = read(tmp_path, SCRIPT.replace(adapter, ""), capsys)
    assert recipe["train"]["objective"] == "embed" and "method" not in recipe["train"]
    assert "strop trains adapters on all linear layers" in report
    (tmp_path / "recipe.yaml").unlink()
    recipe, _ = read(tmp_path, SCRIPT.replace("r=8,", "r=8, lora_dropout=0.1,"), capsys)
    assert recipe["lora"]["dropout"] == 0.1
