"""Distillation in configs of other tools: the resulting recipe, and what is reported of each setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from strop.errors import InputError
from strop.interop.draft import Draft, Imported, import_config

SCRIPT = """
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl.experimental.gkd import GKDConfig, GKDTrainer

student = AutoModelForCausalLM.from_pretrained("demo")
teacher = AutoModelForCausalLM.from_pretrained("runs/large")
args = {kind}Config(output_dir="out", {arguments})
trainer = {kind}Trainer(
    {model}, teacher_model={teacher}, args=args, peft_config=LoraConfig(r=4, lora_dropout=0.05),
    train_dataset=load_dataset("json", data_files="a.jsonl", split="train"),
)
trainer.train()
"""
TRL_YAML = "model_name_or_path: demo\nuse_peft: true\ndataset_name: a.jsonl\nteacher_model_name_or_path: big\n"
AXOLOTL = """
base_model: demo
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
plugins: [axolotl.integrations.kd.KDPlugin]
kd_trainer: true
datasets:
  - {path: a.jsonl, type: axolotl.integrations.kd.chat_template, logprobs_field: logprobs, temperature: 1.0}
"""
SWIFT = "rlhf_type: gkd\nmodel: demo\nteacher_model: big\ndataset: a.jsonl\nmax_length: 512\n"


def write(folder: Path, tool: str, text: str, name: str = "config.yaml") -> Imported:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return import_config(tool, file)


def script(folder: Path, arguments: str, kind: str = "GKD", model: str = "student", teacher: str = "teacher") -> Draft:
    text = SCRIPT.format(arguments=arguments, kind=kind, model=model, teacher=teacher)
    return write(folder, "trl", text, "train.py").draft


def notes(found: Any) -> dict[str, str]:
    return {note.key: note.text for note in found}


def train(draft: Draft) -> dict[str, Any]:
    return {name[6:]: value for name, (value, _) in draft.fields.items() if name.startswith("train.")}


@pytest.mark.parametrize(("model", "teacher"), [("student", "teacher"), ('"demo"', '"runs/large"')])
def test_lmbda_0_is_the_teachers_probabilities_on_rows(model: str, teacher: str, tmp_path: Path) -> None:
    draft = script(tmp_path, "lmbda=0.0, beta=0.0, temperature=0.7", model=model, teacher=teacher)
    fields = train(draft)
    assert (fields["teacher"], fields["teacher_weight"], fields["learning_rate"]) == ("runs/large", 1.0, 2e-5)
    assert draft.get("model.name") == "demo" and "objective" not in fields and draft.get("lora.dropout") == 0.0
    left_out = notes(draft.unsupported)
    assert not {"lmbda", "beta", "temperature", "seq_kd"} & set(left_out)
    assert "at temperature 1" in notes(draft.ignored)["temperature"]  # it is that of sampling
    assert "32 largest" in notes(draft.differs)["teacher"]


def test_lmbda_1_is_the_teachers_judgement_of_own_completions(tmp_path: Path) -> None:
    draft = script(tmp_path, "lmbda=1.0, beta=1.0, temperature=1.0, max_new_tokens=64, per_device_train_batch_size=4")
    fields = train(draft)
    assert {key: fields[key] for key in ("objective", "teacher", "answer_tokens", "group", "beta", "batch_size")} == {
        "objective": "grpo", "teacher": "runs/large", "answer_tokens": 64, "group": 2, "beta": 0.0, "batch_size": 4,
    }  # fmt: skip
    assert "micro_batch" not in fields and "teacher_weight" not in fields and fields["learning_rate"] == 2e-5
    assert not {"lmbda", "beta", "temperature"} & set(notes(draft.unsupported))


def test_own_completions_without_an_adapter_there_get_one(tmp_path: Path) -> None:
    text = SCRIPT.replace("peft_config=LoraConfig(r=4, lora_dropout=0.05),", "")
    text = text.format(arguments="lmbda=1.0, beta=1.0", kind="GKD", model="student", teacher="teacher")
    draft = write(tmp_path, "trl", text, "train.py").draft
    assert train(draft)["objective"] == "grpo" and "method" not in train(draft)
    assert "strop trains an adapter" in notes(draft.differs)["weights"]


def test_settings_between_the_kinds_are_reported_by_name(tmp_path: Path) -> None:
    draft = script(tmp_path, "")
    left_out = notes(draft.unsupported)
    assert left_out["lmbda"].startswith("0.5 (trl's default): ") and left_out["beta"].startswith("0.5 (trl's default)")
    draft = script(tmp_path, "lmbda=1.0, beta=0.5, seq_kd=True")
    left_out = notes(draft.unsupported)
    assert left_out["beta"].startswith("0.5: strop has 1") and left_out["temperature"].startswith("0.9 (trl's default)")
    assert "no effect" in notes(draft.ignored)["seq_kd"]
    draft = script(tmp_path, "lmbda=0, beta=0, seq_kd=True")
    assert "remove the answers from the rows" in notes(draft.differs)["seq_kd"]
    assert "greedily" in notes(draft.differs)["temperature"]


def test_a_teacher_that_is_not_named_is_asked_for(tmp_path: Path) -> None:
    draft = script(tmp_path, "lmbda=0, beta=0", teacher="make_teacher()")
    assert "make_teacher()" in notes(draft.unsupported)["teacher_model"]
    imported = draft.finish()
    assert imported.missing == ["train.teacher"] and "# teacher: set it, or use --train.teacher" in imported.to_yaml()


def test_trl_distillation_is_on_own_completions(tmp_path: Path) -> None:
    draft = script(tmp_path, "max_completion_length=32", "Distillation")
    fields = train(draft)
    assert (fields["objective"], fields["answer_tokens"], fields["learning_rate"]) == ("grpo", 32, 1e-6)
    assert draft.get("lora.dropout") == 0.0 and draft.get("data.max_length") is None
    assert notes(draft.differs)["lora_dropout"].startswith("0.05: none")
    assert notes(script(tmp_path, "beta=0.5, top_k=5", "Distillation").unsupported).keys() >= {"beta", "top_k"}


def test_trl_yaml_is_read_as_the_command_of_its_keys(tmp_path: Path) -> None:
    draft = write(tmp_path, "trl", f"{TRL_YAML}lmbda: 0\nbeta: 0\n").draft
    assert "read as gkd" in notes(draft.differs)["the command"] and train(draft)["teacher_weight"] == 1.0
    draft = write(tmp_path, "trl", f"{TRL_YAML}teacher_model_revision: main\n").draft
    assert "read as distillation" in notes(draft.differs)["the command"] and train(draft)["objective"] == "grpo"
    assert train(draft)["teacher"] == "big" and not notes(draft.unsupported)


def test_axolotl_weights_become_shares_of_1(tmp_path: Path) -> None:
    imported = write(tmp_path, "axolotl", f"{AXOLOTL}kd_alpha: 1.5\nkd_ce_alpha: 0.5\nkd_temperature: 2.0\n")
    draft = imported.draft
    assert train(draft)["teacher_weight"] == 0.75 and imported.missing == ["train.teacher"]
    assert (
        "divided by 2" in notes(draft.differs)["kd_alpha"] and "set train.teacher" in notes(draft.differs)["kd_trainer"]
    )
    assert train(draft)["teacher_temperature"] == 2
    assert "datasets[0].logprobs_field" in notes(draft.ignored) and "plugins" not in notes(draft.unsupported)
    online = "kd_online_server_base_url: http://a:1\nkd_online_server_model: big\nkd_beta: 1.0\nkd_online_topk: 64\n"
    imported = write(tmp_path, "axolotl", AXOLOTL + online)
    assert train(imported.draft)["teacher"] == "big" and not imported.missing
    assert "kd_beta" in notes(imported.draft.unsupported) and "64" in notes(imported.draft.differs)["kd_online_topk"]


def test_swift_gkd_is_imported_from_yaml_and_from_a_script(tmp_path: Path) -> None:
    draft = write(tmp_path, "swift", f"{SWIFT}lmbda: 0\nbeta: 0\ntemperature: 1.0\nsft_alpha: 1\n").draft
    fields = train(draft)
    assert (fields["teacher"], fields["teacher_weight"], fields["batch_size"]) == ("big", 0.5, 16)
    assert (draft.get("lora.r"), draft.get("lora.alpha"), draft.get("lora.dropout")) == (8, 32, 0.05)
    assert not notes(draft.unsupported)
    command = "# a comment\nCUDA_VISIBLE_DEVICES=0 \\\nswift rlhf \\\n    --rlhf_type gkd --model demo \\\n"
    command += "    --teacher_model big --dataset 'a.jsonl#20' b.jsonl --lmbda 1 --beta=1 --temperature 0.9\n"
    draft = write(tmp_path, "swift", command, "run.sh").draft
    assert train(draft)["objective"] == "grpo" and draft.get("data.train") == ["a.jsonl", "b.jsonl"]
    assert {"dataset", "temperature", "top_p", "top_k"} <= set(notes(draft.unsupported))
    draft = write(tmp_path, "swift", SWIFT).draft
    assert notes(draft.unsupported).keys() >= {"lmbda", "beta"} and train(draft)["teacher_temperature"] == 0.9
    draft = write(tmp_path, "swift", f"{SWIFT}lmbda: 0\nbeta: 0\ntemperature: 2\nsft_alpha: 0.75\n").draft
    assert train(draft)["teacher_weight"] == 0.25  # a quarter of the divergence, which is multiplied by 4
    sft = write(tmp_path, "swift", "model: demo\ndataset: a.jsonl\ntrain_type: lora\ntarget_modules: [all-linear]\n")
    assert "teacher" not in train(sft.draft) and not sft.missing
    with pytest.raises(InputError, match="only sft and gkd are imported"):
        write(tmp_path, "swift", "rlhf_type: dpo\nmodel: demo\n")
