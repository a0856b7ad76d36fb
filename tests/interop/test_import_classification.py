"""A script for transformers' sequence classifiers becomes a recipe of `train.objective: classify`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.runs import run

SCRIPT = """
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

model = AutoModelForSequenceClassification.from_pretrained(
    "org/base", num_labels=2, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}
)
model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
rows = load_dataset("json", data_files="rows.jsonl", split="train")
args = TrainingArguments("out", per_device_train_batch_size=4, num_train_epochs=2, learning_rate=2e-4)
Trainer(model=model, args=args, train_dataset=rows).train()
"""


def test_script_of_a_classifier_is_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "train.py", tmp_path / "recipe.yaml"
    file.write_text(SCRIPT)
    code, stdout, err = run("import", "trl", file, "--out", out, "--json", capsys=capsys)
    assert code == 0, err
    text = out.read_text()
    assert "objective: classify" in text and "r: 8" in text and "learning_rate: 0.0002" in text
    assert [line.split("#")[0].strip() for line in text.splitlines() if "labels" in line.split("#")[0]] == [
        "labels: [no, yes]" if "[no, yes]" in text else "labels: ['no', 'yes']"
    ]
    assert "keeps the start of a long text" in " ".join(json.dumps(json.loads(stdout)).split())
