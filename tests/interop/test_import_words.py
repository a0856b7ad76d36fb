"""The most frequent keys of other tools' configs, one by one: the resulting recipe and the printed notes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from strop.errors import InputError, RecipeError
from strop.interop.draft import Draft, import_config

AXOLOTL = "base_model: demo\nadapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n"
ROWS = "datasets: [{path: a.jsonl, type: chat_template}]\n"
TRL = """
from datasets import load_dataset
from peft import LoraConfig
from trl import {config}, {trainer}
{before}
args = {config}(output_dir="out", {arguments})
{after}
trainer = {trainer}(model={model}, args=args, train_dataset=load_dataset("json", data_files="a.jsonl", split="train"),
                    peft_config=LoraConfig(r=4, lora_dropout=0.05))
trainer.train()
"""


def axolotl(folder: Path, more: str, rows: str = ROWS) -> Draft:
    file = folder / "config.yml"
    file.write_text(AXOLOTL + rows + more, encoding="utf-8")
    imported_config = import_config("axolotl", file)
    assert "Left out" in imported_config.to_yaml() or not imported_config.draft.ignored
    return imported_config.draft


def trl(
    folder: Path, arguments: str = "", kind: str = "SFT", before: str = "", after: str = "", model: str = '"demo"'
) -> Draft:
    file = folder / "train.py"
    words = {"config": f"{kind}Config", "trainer": f"{kind}Trainer", "model": model}
    file.write_text(TRL.format(**words, arguments=arguments, before=before, after=after), encoding="utf-8")
    return import_config("trl", file).draft


def llamafactory(folder: Path, more: str = "") -> Draft:
    file = folder / "factory.yaml"
    file.write_text(f"model_name_or_path: demo\n{more}", encoding="utf-8")
    return import_config("llamafactory", file).draft


def read_script(folder: Path, text: str, tool: str = "trl") -> Draft:
    file = folder / "train.py"
    file.write_text(text, encoding="utf-8")
    return import_config(tool, file).draft


def find_row_warnings(notes: Any) -> dict[str, str]:
    return {note.key: note.text for note in notes}


# --- axolotl -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "warmup"),
    [
        ("warmup_steps: 0", 0),
        ("warmup_ratio: 0.0", 0.0),
        ("warmup_steps: 7", 7),
        ("warmup_ratio: 0.1", 0.1),
        ("", 0.03),
        ("lr_scheduler: constant\nwarmup_steps: 7", 0),
        ("lr_scheduler: constant_with_warmup\nwarmup_steps: 7", 7),
    ],
)
def test_axolotl_warmup_is_imported(given: str, warmup: float, tmp_path: Path) -> None:
    draft = axolotl(tmp_path, given)
    assert draft.get("train.warmup") == warmup
    assert ("warmup" in find_row_warnings(draft.differs)) == (
        warmup > 0
    )  # only a schedule that warms up starts elsewhere
    if "constant\n" in given:
        assert "constant" in find_row_warnings(draft.ignored)["warmup_steps"]


def test_axolotl_template_name_is_imported_if_strop_has_it(tmp_path: Path) -> None:
    draft = axolotl(tmp_path, "chat_template: chatml\n")
    assert draft.get("data.template") == "chatml" and "chat_template" not in find_row_warnings(draft.differs)
    draft = axolotl(tmp_path, "chat_template: tokenizer_default\n")
    assert draft.get("data.template") is None and "chat_template" not in find_row_warnings(draft.differs)
    draft = axolotl(tmp_path, "chat_template: llama3\n")
    assert draft.get("data.template") is None and "llama3.jinja" in find_row_warnings(draft.differs)["chat_template"]


def test_detectable_columns_are_not_written(tmp_path: Path) -> None:
    rows = """datasets:
  - {path: a.jsonl, type: chat_template}
  - path: b.jsonl
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
  - {path: c.jsonl, type: alpaca}
"""
    draft = axolotl(tmp_path, "", rows)
    assert draft.get("data.columns") is None and "datasets" not in find_row_warnings(draft.unsupported)
    named = "datasets: [{path: a.jsonl, type: chat_template, field_messages: talk}]\n"
    assert axolotl(tmp_path, "", named).get("data.columns") == {"messages": "talk"}
    draft = axolotl(
        tmp_path, "", "datasets: [{path: a.jsonl, type: chat_template, field_messages: talk}, {path: b.jsonl}]\n"
    )
    assert draft.get("data.columns") is None and "talk" in find_row_warnings(draft.unsupported)["datasets"]
    draft = axolotl(tmp_path, "rl: dpo\n", named)
    assert draft.get("data.columns") == {"conversations": "talk", "chosen": "chosen", "rejected": "rejected"}


def test_mixed_text_and_conversations_keep_format_auto(tmp_path: Path) -> None:
    draft = axolotl(
        tmp_path, "", "datasets: [{path: a.jsonl, type: completion}, {path: b.jsonl, type: chat_template}]\n"
    )
    assert draft.get("data.format") is None and draft.get("data.loss") is None
    draft = axolotl(tmp_path, "", "datasets: [{path: a.jsonl, type: completion}]\n")
    assert draft.get("data.format") == "text" and draft.get("data.loss") == "all"


def test_unsupported_axolotl_keys_name_the_replacement(tmp_path: Path) -> None:
    draft = axolotl(
        tmp_path,
        "wandb_project: mine\nwandb_entity: us\nuse_tensorboard: true\ndeepspeed: zero2.json\nadam_beta1: 0.9\n"
        "adam_beta2: 0.95\nplugins: [axolotl.integrations.liger.LigerPlugin, mine.Plugin]\nliger_rope: true\n"
        "evals_per_epoch: 4\nsave_steps: 0.25\nshuffle_merged_datasets: false\nbf16: auto\nhub_model_id: me/it\n",
    )
    assert draft.get("track") == ["wandb", "tensorboard"]
    unsupported = find_row_warnings(draft.unsupported)
    assert "WANDB_PROJECT=mine" in unsupported["wandb_project"] and "WANDB_ENTITY=us" in unsupported["wandb_entity"]
    assert (
        "--devices" in unsupported["deepspeed"]
        and unsupported["adam_beta2"] == "0.95: 0.999 in strop"
        and "adam_beta1" not in unsupported
    )
    assert "mine.Plugin" in unsupported["plugins"] and "liger_rope" not in unsupported
    assert "train.eval_steps" in unsupported["evals_per_epoch"] and "train.save_steps" in unsupported["save_steps"]
    assert "shuffles" in unsupported["shuffle_merged_datasets"] and "strop push" in unsupported["hub_model_id"]
    assert {"bf16", "plugins", "liger_rope"} <= set(find_row_warnings(draft.ignored))


def test_preference_objectives_disable_lora_dropout(tmp_path: Path) -> None:
    """trl switches it off (disable_dropout), and axolotl trains through trl."""
    draft = axolotl(tmp_path, "lora_dropout: 0.05\nrl: dpo\n")
    assert draft.get("lora.dropout") == 0.0 and "0.05" in find_row_warnings(draft.differs)["lora_dropout"]
    assert axolotl(tmp_path, "lora_dropout: 0.05\n").get("lora.dropout") == 0.05
    assert trl(tmp_path, kind="DPO").get("lora.dropout") == 0.0
    assert trl(tmp_path, "disable_dropout=False", kind="DPO").get("lora.dropout") == 0.05
    assert trl(tmp_path).get("lora.dropout") == 0.05
    file = tmp_path / "factory.yaml"
    for stage, share in (("dpo", 0.0), ("sft", 0.1)):
        file.write_text(f"model_name_or_path: demo\nstage: {stage}\nlora_dropout: 0.1\n", encoding="utf-8")
        assert import_config("llamafactory", file).draft.get("lora.dropout") == share


def test_grpo_config_is_refused_with_a_fix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"GRPO|grpo") as raised:
        axolotl(tmp_path, "rl: grpo\n")
    assert "train.rewards" in raised.value.fix
    with pytest.raises(InputError, match=r"GRPO|grpo"):
        trl(tmp_path, kind="GRPO")


# --- scripts -----------------------------------------------------------------------------------------------------


def test_script_variables_are_resolved(tmp_path: Path) -> None:
    before = """
NAME, STEPS = "tiny", 2
RATE = 2e-4 / 2
COMMON = dict(logging_steps=5, warmup_ratio=1 / 10)
def settings():
    epochs = 2
"""
    arguments = "learning_rate=RATE, num_train_epochs=epochs, run_name=f'{NAME}-x', max_steps=STEPS * 10, **COMMON"
    draft = trl(tmp_path, arguments, before=before, after="args.seed = 7")
    got = {
        field: draft.get(f"train.{field}") for field in ("learning_rate", "epochs", "max_steps", "log_steps", "warmup")
    }
    assert got == {"learning_rate": 1e-4, "epochs": 2, "max_steps": 20, "log_steps": 5, "warmup": 0.1}
    assert draft.get("seed") == 7 and not draft.unsupported


def test_unreadable_values_are_listed_with_their_line(tmp_path: Path) -> None:
    before = "import sys\nmore = read()\nlr = 1\nfor lr in (1, 2): pass"
    after = "args.weight_decay = f()\nargs.seed += 1"
    draft = trl(tmp_path, "learning_rate=lr, **more", before=before, after=after, model="sys.argv[1]")
    lines = {note.key: note.line for note in draft.unsupported}
    unread = {"SFTConfig.learning_rate": 9, "SFTConfig(**...)": 9, "SFTConfig.weight_decay": 10, "SFTConfig.seed": 11}
    assert lines == {"model": 12, **unread}
    assert draft.fields["train.learning_rate"] == (2e-5, "trl's default: line 9 cannot be read, set it here")
    recipe = import_config("trl", tmp_path / "train.py")
    assert recipe.missing == ["model.name"] and "# name: set it, or use --model" in recipe.to_yaml()


def test_dict_items_set_later_are_imported(tmp_path: Path) -> None:
    before = """
kw = dict(num_train_epochs=1, seed=1)
kw["num_train_epochs"] = 5
kw.update(weight_decay=0.2, **{"seed": 3})
kw.update({"logging_steps": 7})
options = {"dtype": "float32"}
options["revision"] = "r1"
"""
    draft = trl(tmp_path, "model_init_kwargs=options, **kw", before=before, after="kw2 = {}\nkw2['seed'] = 9")
    got = [draft.get(name) for name in ("train.epochs", "train.weight_decay", "seed", "train.log_steps")]
    assert got == [5, 0.2, 3, 7] and not draft.unsupported
    assert (draft.get("model.dtype"), draft.get("model.revision")) == ("fp32", "r1")


@pytest.mark.parametrize(
    "change",
    ["kw[key] = 3", "kw.update(f())", "kw.pop('seed')", "del kw['seed']", "kw['seed'] += 1", "kw.update(kw)",
     "if f():\n    kw['seed'] = 3", "for n in '12':\n    kw.update(seed=n)"],
)  # fmt: skip
def test_dict_changes_that_cannot_be_read_are_listed(change: str, tmp_path: Path) -> None:
    draft = trl(tmp_path, "**kw", before=f"kw = dict(seed=1)\n{change}")
    (note,) = draft.unsupported
    assert note.key == "SFTConfig(**...)" and note.line == 6 + change.count("\n")


def test_changed_list_is_listed_as_not_read(tmp_path: Path) -> None:
    before = "names = ['tensorboard']\nnames.append('wandb')\noptions = {'a': []}\noptions['a'].append(1)"
    draft = trl(tmp_path, "report_to=names, model_init_kwargs=options", before=before)
    assert draft.get("track") is None
    assert set(find_row_warnings(draft.unsupported)) == {"SFTConfig.report_to", "SFTConfig.model_init_kwargs"}


def test_positional_arguments_are_imported_or_listed(tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    for kind, reference in (("SFT", ""), ("DPO", "None, ")):
        text = f"held = load_dataset('b.jsonl')\ncfg = {kind}Config('runs/x', 3)\n"
        call = (
            f"{kind}Trainer('demo', {reference}cfg, collate, load_dataset('a.jsonl'), held, peft_config=LoraConfig())\n"
        )
        file.write_text(text + call, encoding="utf-8")
        draft = import_config("trl", file).draft
        assert (draft.get("out"), draft.get("data.train"), draft.get("data.eval")) == ("runs/x", "a.jsonl", "b.jsonl")
        assert set(find_row_warnings(draft.unsupported)) == {f"{kind}Config", f"{kind}Trainer.data_collator"}
    file.write_text(
        "model, tokenizer = FastLanguageModel.from_pretrained('demo', 512, None, False)\n"
        "model = FastLanguageModel.get_peft_model(model, 32, ['q_proj'], 64, 0.1)\n"
        "SFTTrainer(model, SFTConfig())\n",
        encoding="utf-8",
    )
    draft = import_config("unsloth", file).draft
    got = {name: draft.get(f"lora.{name}") for name in ("r", "alpha", "dropout", "target_modules")}
    assert got == {"r": 32, "alpha": 64, "dropout": 0.1, "target_modules": ["q_proj"]}
    assert (draft.get("data.max_length"), draft.get("model.quantization")) == (512, "none")


def test_swift_does_not_quantize_without_a_method(tmp_path: Path) -> None:
    file = tmp_path / "swift.yaml"
    for method, expected in (("", "none"), ("quant_method: bnb\n", "int8")):
        file.write_text(f"model: demo\ndataset: [a.jsonl]\nquant_bits: 8\n{method}", encoding="utf-8")
        imported = import_config("swift", file)
        assert imported.draft.get("model.quantization") == expected
        assert ("quant_bits" in str(imported.draft.ignored)) is not bool(method)


def test_argparse_defaults_are_imported_and_noted(tmp_path: Path) -> None:
    before = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--base-model", default="demo")
parser.add_argument("-e", "--epochs", type=int, default=2)
parser.add_argument("--lr", type=float)
cli = parser.parse_args()
"""
    draft = trl(tmp_path, "num_train_epochs=cli.epochs, learning_rate=cli.lr", before=before, model="cli.base_model")
    assert (draft.get("model.name"), draft.get("train.epochs")) == ("demo", 2)
    assert {"base_model", "epochs"} <= set(find_row_warnings(draft.differs))
    assert [(note.key, note.line) for note in draft.unsupported] == [("SFTConfig.learning_rate", 13)]


def test_later_changes_to_model_and_tokenizer_are_listed(tmp_path: Path) -> None:
    before = """
from transformers import AutoModelForCausalLM, AutoTokenizer
class Mine(SFTTrainer):
    pass
tokenizer = AutoTokenizer.from_pretrained("demo")
tokenizer.pad_token = tokenizer.eos_token
tokenizer.chat_template = open("t.jinja").read()
tokenizer.add_tokens(["<a>"])
model = AutoModelForCausalLM.from_pretrained("demo", load_in_4bit=True)
model = PeftModel.from_pretrained(model, "old", is_trainable=True)
"""
    draft = trl(tmp_path, before=before, after="trainer.train(resume_from_checkpoint=True)", model="model")
    assert draft.get("model.adapter") == "old"
    assert draft.get("model.quantization") == "fp4"  # the default of bitsandbytes
    assert set(find_row_warnings(draft.unsupported)) == {
        "Mine",
        "tokenizer.chat_template",
        "add_tokens",
        "resume_from_checkpoint",
        "train",
    }
    assert "tokenizer.pad_token" in find_row_warnings(draft.ignored)


@pytest.mark.parametrize(
    ("flags", "dtype", "is_mixed"),
    [("", "fp32", False), ("bf16=True", "bf16", True), ("fp16=True", "fp16", True), ("bf16=False", "fp32", False)],
)
def test_mixed_precision_on_fp32_weights_has_another_meaning(
    flags: str, dtype: str, is_mixed: bool, tmp_path: Path
) -> None:
    before = (
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('demo', torch_dtype=torch.float32)"
    )
    draft = trl(tmp_path, flags, before=before, model="model")
    assert draft.get("model.dtype") == dtype
    assert ("dtype" in find_row_warnings(draft.differs)) == is_mixed


INLINE = 'load_dataset("json", data_files="{0}.jsonl", split="train")'


@pytest.mark.parametrize(
    ("before", "given", "evaluated"),
    [
        (f"test = {INLINE.format('test')}", f"train_dataset={INLINE.format('a')}", None),
        ("", f"eval_dataset={INLINE.format('b')}, train_dataset={INLINE.format('a')}", "b.jsonl"),
        (f"b = {INLINE.format('b')}\na = {INLINE.format('a')}\nmixed = a.shuffle(1)",
         "train_dataset=mixed, eval_dataset=b", "b.jsonl"),
    ],
)  # fmt: skip
def test_data_comes_from_the_trainer_arguments(before: str, given: str, evaluated: str | None, tmp_path: Path) -> None:
    words = {"config": "SFTConfig", "trainer": "SFTTrainer", "model": '"demo"', "arguments": "", "after": ""}
    text = TRL.format(**words, before=before).replace(f"train_dataset={INLINE.format('a')}", given)
    (tmp_path / "train.py").write_text(text, encoding="utf-8")
    draft = import_config("trl", tmp_path / "train.py").draft
    assert (draft.get("data.train"), draft.get("data.eval")) == ("a.jsonl", evaluated)


@pytest.mark.parametrize(
    ("written", "patience"),
    [
        ("EarlyStoppingCallback(early_stopping_patience=3)", 3),
        ("EarlyStoppingCallback(2, 0.01)", 2),
        ("transformers.EarlyStoppingCallback()", 1),
        ("EarlyStoppingCallback", 1),
        ("stop", 4),
    ],
)
@pytest.mark.parametrize("how", ["args.push_to_hub = False", "trainer.add_callback({0})"])
def test_early_stopping_is_imported_and_other_callbacks_are_listed(
    written: str, patience: int, how: str, tmp_path: Path
) -> None:
    before = "stop = EarlyStoppingCallback(early_stopping_patience=4)" if written == "stop" else ""
    added = how.format(written)
    callbacks = "" if "add_callback" in added else f"callbacks=[{written}, Printer()], "
    file = tmp_path / "train.py"
    words = {"config": "SFTConfig", "trainer": "SFTTrainer", "model": '"demo"', "arguments": "", "after": "pass"}
    text = TRL.format(**words, before=f"watch = Watch()\n{before}")
    text = text.replace(
        "args=args", f'{callbacks}eval_dataset=load_dataset("json", data_files="b.jsonl", split="train")'
    )
    file.write_text(f"{text}{added}\ntrainer.add_callback(watch)\n", encoding="utf-8")
    draft = import_config("trl", file).draft
    assert draft.get("train.early_stopping") == patience and draft.get("data.eval") == "b.jsonl"
    others = [note.text.partition(":")[0] for note in draft.unsupported if note.key == "callbacks"]
    assert others == (["Printer()", "Watch()"] if callbacks else ["Watch()"])
    assert ("early_stopping_threshold" in find_row_warnings(draft.unsupported)) == ("0.01" in written)


def test_callbacks_appended_to_a_list_are_read(tmp_path: Path) -> None:
    before = "todo = []\ntodo.append(EarlyStoppingCallback(3))\ntodo.append(Printer())"
    draft = trl(tmp_path, before=before, model='"demo", callbacks=todo, eval_dataset=load_dataset("b.jsonl")')
    assert draft.get("train.early_stopping") == 3
    assert [note.text.partition(":")[0] for note in draft.unsupported] == ["Printer()"]


@pytest.mark.parametrize("given", ["callbacks=None", "callbacks=[]", ""])
def test_absent_callbacks_add_no_note(given: str, tmp_path: Path) -> None:
    draft = trl(tmp_path, model=f'"demo", {given}' if given else '"demo"')
    assert not draft.unsupported and draft.get("train.early_stopping") is None


def test_early_stopping_without_eval_data_is_unsupported(tmp_path: Path) -> None:
    draft = axolotl(tmp_path, "early_stopping_patience: 3\nval_set_size: 100\n")
    assert draft.get("train.early_stopping") is None
    assert "train.early_stopping 3" in find_row_warnings(draft.unsupported)["early_stopping_patience"]


def test_notebook_is_imported(tmp_path: Path) -> None:
    code = [
        ["%%capture\n", "!pip install trl\n", "if True:\n", "    !nvidia-smi"],
        ["from trl import SFTConfig, SFTTrainer\n", "rate = 3e-4\n"],
        ["SFTTrainer('demo', args=SFTConfig(learning_rate=rate, num_train_epochs=f()), peft_config=LoraConfig(),\n",
         "           train_dataset=load_dataset('a.jsonl'))"],
    ]  # fmt: skip
    cells = [{"cell_type": "markdown", "source": ["# it\n"]}, *({"cell_type": "code", "source": cell} for cell in code)]
    file = tmp_path / "n.ipynb"
    file.write_text(json.dumps({"cells": cells, "nbformat": 4}), encoding="utf-8")
    draft = import_config("trl", file).draft
    assert draft.get("train.learning_rate") == 3e-4 and draft.get("data.train") == "a.jsonl"
    assert [(note.key, note.line) for note in draft.unsupported] == [("SFTConfig.num_train_epochs", 8)]
    for text in ("[]", "{"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="not a notebook"):
            import_config("trl", file)


def test_files_by_split_become_train_and_eval(tmp_path: Path) -> None:
    file = tmp_path / "s.py"
    file.write_text(
        "data = load_dataset('json', data_files={'train': 'a.jsonl', 'test': 'b.jsonl'})\n"
        "SFTTrainer('demo', args=SFTConfig(), train_dataset=data['train'], eval_dataset=data['test'],\n"
        "           peft_config=LoraConfig())\n",
        encoding="utf-8",
    )
    draft = import_config("trl", file).draft
    assert (draft.get("model.name"), draft.get("data.train"), draft.get("data.eval")) == ("demo", "a.jsonl", "b.jsonl")


def test_completion_collator_matches_the_default_loss(tmp_path: Path) -> None:
    file = tmp_path / "s.py"
    file.write_text(
        "SFTTrainer('demo', args=SFTConfig(), peft_config=LoraConfig(), train_dataset=load_dataset('a.jsonl'),\n"
        "           data_collator=DataCollatorForCompletionOnlyLM('### Answer:', tokenizer=tokenizer))\n",
        encoding="utf-8",
    )
    draft = import_config("trl", file).draft
    assert not draft.unsupported and "assistant_only_loss" not in find_row_warnings(draft.differs)


def test_trl_yaml_without_target_modules_notes_the_default(tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text("model_name_or_path: demo\nuse_peft: true\n", encoding="utf-8")
    assert "all linear layers" in find_row_warnings(import_config("trl", file).draft.differs)["lora_target_modules"]
    file.write_text("model_name_or_path: demo\nuse_peft: true\nlora_target_modules: all-linear\n", encoding="utf-8")
    assert "lora_target_modules" not in find_row_warnings(import_config("trl", file).draft.differs)


def test_model_init_kwargs_are_imported(tmp_path: Path) -> None:
    draft = trl(tmp_path, "model_init_kwargs={'dtype': 'float32', 'attn_implementation': 'sdpa', 'odd': 1}")
    assert draft.get("model.dtype") == "fp32" and set(find_row_warnings(draft.unsupported)) == {"odd"}
    assert trl(tmp_path, "warmup_steps=0.4").get("train.warmup") == 0.4  # a share, as in transformers 5.24


def test_text_column_and_template_file_are_imported(tmp_path: Path) -> None:
    draft = trl(tmp_path, "dataset_text_field='quote', chat_template_path='t.jinja', activation_checkpointing=True")
    assert draft.get("data.columns") == {"text": "quote"} and draft.get("data.template") == "t.jinja"
    assert draft.get("train.gradient_checkpointing") == "on" and not draft.unsupported
    assert trl(tmp_path, "dataset_text_field='text'").get("data.columns") is None


def test_command_line_config_is_refused_with_a_fix(tmp_path: Path) -> None:
    file = tmp_path / "s.py"
    file.write_text("args, = TrlParser(SFTConfig).parse_args_and_config()\n", encoding="utf-8")
    with pytest.raises(InputError, match="SFTConfig") as raised:
        import_config("trl", file)
    assert "YAML" in raised.value.fix


def test_simpo_defaults_are_those_of_trl(tmp_path: Path) -> None:
    """Beta 0.1, a margin of 0.5 and a cross entropy besides, where strop has 2, 1 and none."""
    imported = trl(tmp_path, "loss_type='simpo'", kind="CPO")
    assert (imported.get("train.beta"), imported.get("train.gamma")) == (0.1, 0.5) and "1.0" in find_row_warnings(
        imported.unsupported
    )["cpo_alpha"]
    imported = trl(tmp_path, "loss_type='simpo', beta=2.5, simpo_gamma=1.2, cpo_alpha=0", kind="CPO")
    assert (imported.get("train.beta"), imported.get("train.gamma")) == (2.5, 1.2) and not imported.unsupported
    imported = axolotl(tmp_path, "rl: simpo\nsimpo_gamma: 0.4\n")
    assert (imported.get("train.beta"), imported.get("train.gamma")) == (0.1, 0.4) and "cpo_alpha" in find_row_warnings(
        imported.unsupported
    )
    imported = axolotl(tmp_path, "rl: simpo\nsimpo_gamma: 0.4\nrl_beta: 3\ncpo_alpha: 0\n")
    assert imported.get("train.beta") == 3 and not imported.unsupported


def test_regular_expression_targets_are_unsupported(tmp_path: Path) -> None:
    """strop expects names; as a name, the expression would match nothing or be split at its commas."""
    file = tmp_path / "s.py"
    for written in (r"r'.*\.(q|v)_proj'", r"'model.layers.[0-9]{1,2}.self_attn.q_proj'"):
        file.write_text(
            "SFTTrainer('demo', args=SFTConfig(), train_dataset=load_dataset('a.jsonl'),\n"
            f"           peft_config=LoraConfig(target_modules={written}))\n",
            encoding="utf-8",
        )
        draft = import_config("trl", file).draft
        assert draft.get("lora.target_modules") is None
        assert (
            "regular expression" in find_row_warnings(draft.unsupported)["target_modules"]
            and draft.unsupported[0].line == 2
        )
    file = tmp_path / "sft.yaml"
    file.write_text("model_name_or_path: demo\nuse_peft: true\nlora_target_modules: '.*[qv]_proj'\n", encoding="utf-8")
    draft = import_config("trl", file).draft
    assert "lora_target_modules" in find_row_warnings(
        draft.unsupported
    ) and "lora_target_modules" not in find_row_warnings(draft.differs)


def test_other_splits_are_unsupported(tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    start = "model_name_or_path: demo\nuse_peft: true\ndataset_name: owner/chat\n"
    file.write_text(start + "dataset_train_split: train_sft\ndataset_test_split: test_sft\neval_strategy: steps\n")
    draft = import_config("trl", file).draft
    assert (
        "train_sft" in find_row_warnings(draft.unsupported)["dataset_train_split"]
        and "test_sft" in find_row_warnings(draft.unsupported)["dataset_test_split"]
    )
    file.write_text(start + "dataset_train_split: train\n")
    assert not import_config("trl", file).draft.unsupported


@pytest.mark.parametrize(
    "more",
    [
        "gradient_accumulation_steps: auto",
        "sequence_len: [1]",
        "max_steps: 1.5",
        "save_total_limit: all",
        "warmup_steps: x",
    ],
)
def test_invalid_number_is_refused_by_key(more: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=more.partition(":")[0]):
        axolotl(tmp_path, more + "\n")
    file = tmp_path / "factory.yaml"
    file.write_text("model_name_or_path: demo\nlora_rank: all\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="lora_rank: all"):
        import_config("llamafactory", file)


def test_step_counts_follow_their_strategy(tmp_path: Path) -> None:
    draft = trl(tmp_path, "save_strategy='epoch', save_steps=10, eval_strategy='no', eval_steps=5, logging_steps=3")
    assert [draft.get(f"train.{name}_steps") for name in ("save", "eval", "log")] == [None, None, 3]
    assert "save_strategy is epoch" in find_row_warnings(draft.ignored)["save_steps"] and not draft.unsupported
    draft = axolotl(tmp_path, "save_strategy: steps\nsave_steps: 10\neval_steps: 5\n")
    assert (draft.get("train.save_steps"), draft.get("train.eval_steps")) == (10, 5)


def test_assignment_in_a_branch_is_not_imported(tmp_path: Path) -> None:
    draft = trl(tmp_path, "learning_rate=3e-4", after="args.seed = 7\nif DEBUG:\n    args.max_steps = 10\n")
    assert (draft.get("seed"), draft.get("train.max_steps"), draft.get("train.learning_rate")) == (7, None, 3e-4)
    assert "branch" in find_row_warnings(draft.unsupported)["args.max_steps"]


@pytest.mark.parametrize("given", ["0.1", "test_size=0.1"])
def test_train_test_split_becomes_an_eval_share(given: str, tmp_path: Path) -> None:
    file = tmp_path / "s.py"
    file.write_text(
        f"data = load_dataset('json', data_files='a.jsonl', split='train').train_test_split({given})\n"
        "SFTTrainer('demo', args=SFTConfig(), train_dataset=data['train'], eval_dataset=data['test'],\n"
        "           peft_config=LoraConfig())\n",
        encoding="utf-8",
    )
    assert import_config("trl", file).draft.get("data.eval") == "10%"


@pytest.mark.parametrize("losses", [["sigmoid", "hinge"], ["sft"], ["sigmoid", "ipo", "sft"], ["hinge", "sft"]])
def test_several_losses_are_refused(losses: list[str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=losses[-1]):
        trl(tmp_path, f"loss_type={losses}", kind="DPO")


@pytest.mark.parametrize(
    ("losses", "weights", "objective", "share"),
    [(["sigmoid", "sft"], None, "dpo", 1), (["sft", "ipo"], [0.5, 1], "ipo", 0.5),
     (["sigmoid", "sft"], [2, 1], "dpo", 0.5)],
)  # fmt: skip
def test_sft_loss_becomes_sft_weight(losses: Any, weights: Any, objective: str, share: float, tmp_path: Path) -> None:
    given = f"dpo_loss_type: {losses}\n" + (f"dpo_loss_weights: {weights}\n" if weights else "")
    for draft, prefix in (
        (trl(tmp_path, f"loss_type={losses}, loss_weights={weights}", kind="DPO"), ""),
        (axolotl(tmp_path, f"rl: dpo\n{given}"), "dpo_"),
    ):
        assert (draft.get("train.objective"), draft.get("train.sft_weight")) == (objective, share)
        notes = find_row_warnings(draft.differs)
        assert "averages" in notes[f"{prefix}loss_type"] and (f"{prefix}loss_weights" in notes) == (weights == [2, 1])
        assert not draft.unsupported


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_label_smoothing_without_effect_is_left_out(loss: str, tmp_path: Path) -> None:
    """TRL's losses sigmoid and ipo do not read it; LLaMA-Factory's own DPO and TRL's SimPO do."""
    draft = trl(tmp_path, f"label_smoothing=0.1, loss_type='{loss}'", kind="DPO")
    assert draft.get("train.label_smoothing") is None and not draft.unsupported
    assert find_row_warnings(draft.ignored)["label_smoothing"] == f"no effect in TRL's {loss} loss"
    draft = axolotl(tmp_path, f"rl: {'dpo' if loss == 'sigmoid' else 'ipo'}\ndpo_label_smoothing: 0.1\n")
    assert draft.get("train.label_smoothing") is None and not draft.unsupported
    assert find_row_warnings(draft.ignored)["dpo_label_smoothing"] == f"no effect in TRL's {loss} loss"
    assert trl(tmp_path, "label_smoothing=0.1, loss_type='simpo'", kind="CPO").get("train.label_smoothing") == 0.1
    draft = llamafactory(tmp_path, "stage: dpo\ndpo_label_smoothing: 0.1\n")
    assert draft.get("train.label_smoothing") == 0.1


def test_options_that_an_objective_lacks_are_listed(tmp_path: Path) -> None:
    draft = llamafactory(tmp_path, "stage: dpo\npref_ftx: 0.5\nkto_chosen_weight: 2.0\n")
    assert draft.get("train.sft_weight") == 0.5 and "pref_ftx" not in find_row_warnings(draft.differs)
    assert set(find_row_warnings(draft.unsupported)) == {"kto_chosen_weight"}
    draft = llamafactory(tmp_path, "stage: dpo\npref_loss: orpo\npref_ftx: 0.5\n")
    assert find_row_warnings(draft.unsupported) == {"pref_ftx": "0.5: orpo has no sft_weight in strop"}
    draft = axolotl(tmp_path, "rl_beta: 0.5\n")
    assert find_row_warnings(draft.unsupported) == {"rl_beta": "0.5: sft has no beta in strop"}


def test_ends_of_rows_are_kept_as_the_config_says(tmp_path: Path) -> None:
    draft = trl(tmp_path, "max_length=64, truncation_mode='keep_end'")
    assert draft.get("data.overlong") == "truncate-start" and "max_length" not in find_row_warnings(draft.differs)
    draft = trl(tmp_path, "max_length=64, truncation_mode='keep_start'")
    assert draft.get("data.overlong") is None and "max_length" in find_row_warnings(draft.differs)


def test_files_to_evaluate_go_before_a_share(tmp_path: Path) -> None:
    info = {"rows": {"file_name": "rows.jsonl", "formatting": "sharegpt", "tags": {"user_tag": "gpt"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    data = f"dataset_dir: {tmp_path}\ndataset: rows\neval_dataset: rows\nval_size: 0.2\n"
    draft = llamafactory(tmp_path, data)
    assert str(draft.get("data.eval")).endswith("rows.jsonl")
    assert "the usual role names only" in find_row_warnings(draft.unsupported)["rows.tags"]  # gpt is the user
    assert find_row_warnings(draft.unsupported)["val_size"].startswith("0.2: rows to evaluate are those of ")


def test_orpo_loss_of_trl_is_noted(tmp_path: Path) -> None:
    assert "prompt and answer" in find_row_warnings(trl(tmp_path, kind="ORPO").differs)["ORPOConfig"]
    assert "prompt and answer" in find_row_warnings(axolotl(tmp_path, "rl: orpo\n").differs)["rl"]
    draft = llamafactory(tmp_path, "stage: dpo\npref_loss: orpo\n")  # its own loss is that of strop
    assert not any("prompt and answer" in note.text for note in draft.differs)


def test_kept_weights_are_noted_if_they_are_the_last(tmp_path: Path) -> None:
    split = 'load_dataset("json", data_files="b.jsonl", split="train")'
    model = f'"demo", eval_dataset={split}'
    key = "load_best_model_at_end"
    assert "last weights" in find_row_warnings(trl(tmp_path, model=model).differs)[key]
    assert key not in find_row_warnings(trl(tmp_path).differs)
    assert key not in find_row_warnings(trl(tmp_path, f"{key}=True", model=model).differs)
    draft = trl(tmp_path, f"{key}=True, metric_for_best_model='accuracy'", model=model)
    assert find_row_warnings(draft.differs)["metric_for_best_model"].startswith("accuracy: ")
    for read in (axolotl, llamafactory):
        size = "val_set_size: 0.1\n" if read is axolotl else "val_size: 0.1\n"
        assert key in find_row_warnings(read(tmp_path, size).differs)
        assert key not in find_row_warnings(read(tmp_path, f"{size}{key}: true\n").differs)
    assert key not in find_row_warnings(axolotl(tmp_path, "val_set_size: 0.1\nearly_stopping_patience: 2\n").differs)


@pytest.mark.parametrize(
    ("kind", "row", "noted"),
    [
        ("SFT", {"prompt": "a", "completion": "b"}, True),
        ("SFT", {"messages": [{"role": "user", "content": "a"}]}, False),
        ("SFT", {"prompt": [{}], "completion": [{}]}, False),
        ("SFT", {"text": "a"}, False),
        ("SFT", None, True),
        ("DPO", {"prompt": "a", "chosen": "b", "rejected": "c"}, True),
        ("DPO", {"chosen": [{}], "rejected": [{}]}, False),
        ("KTO", {"prompt": "a", "completion": "b", "label": True}, True),
    ],
)
def test_rows_of_strings_are_noted(
    kind: str, row: Any, noted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if row is not None:
        (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    text = find_row_warnings(trl(tmp_path, kind=kind).differs).get("prompt", "")
    assert ("without a chat template" in text) is noted
    if kind == "SFT":
        assert "prompt" not in find_row_warnings(trl(tmp_path, "assistant_only_loss=True").differs)
    if kind == "DPO":  # Axolotl leaves rows without a type to TRL
        assert (
            "datasets" in find_row_warnings(axolotl(tmp_path, "rl: dpo\n", "datasets: [a.jsonl]\n").differs)
        ) is noted
        assert "datasets" not in find_row_warnings(axolotl(tmp_path, "rl: dpo\n").differs)


def test_score_head_is_not_a_module_to_save(tmp_path: Path) -> None:
    file = tmp_path / "s.py"
    for modules, left in ((["score"], []), (["score", "embed_tokens"], ["embed_tokens"])):
        file.write_text(
            f"RewardTrainer('demo', args=RewardConfig(), peft_config=LoraConfig(modules_to_save={modules}))\n", "utf-8"
        )
        draft = import_config("trl", file).draft
        assert (
            draft.get("lora.modules_to_save") == left
            and "score head" in find_row_warnings(draft.ignored)["modules_to_save"]
        )
        draft = axolotl(tmp_path, f"reward_model: true\nlora_modules_to_save: {modules}\n")
        assert draft.get("lora.modules_to_save") == left
        draft = llamafactory(tmp_path, f"stage: rm\nadditional_target: {','.join(modules)}\n")
        assert draft.get("lora.modules_to_save") == left


def test_trained_adapter_without_lora_config_is_imported(tmp_path: Path) -> None:
    file = tmp_path / "s.py"
    text = (
        "model = AutoModelForCausalLM.from_pretrained('demo')\n"
        "model = PeftModel.from_pretrained(model, 'old', is_trainable=True)\n"
        "{0}Trainer(model, args={0}Config())\n"
    )
    for kind, dropout in (("SFT", None), ("DPO", 0.0)):
        file.write_text(text.format(kind), encoding="utf-8")
        draft = import_config("trl", file).draft
        fields = {name: draft.get(name) for name in draft.fields if name.startswith(("lora.", "model."))}
        expected = {"model.name": "demo", "model.adapter": "old", "model.quantization": "none"}
        assert fields == expected | ({} if dropout is None else {"lora.dropout": dropout}) and not draft.unsupported
    file.write_text(text.format("SFT").replace("PeftModel", "Other"), encoding="utf-8")
    with pytest.raises(InputError, match="LoraConfig is not called: strop trains LoRA adapters, or all weights"):
        import_config("trl", file)


@pytest.mark.parametrize(
    ("model_type", "modules"), [("llama", ["q_proj", "v_proj"]), ("gpt2", ["c_attn"]), ("new", None), ("gemma4", None)]
)
def test_default_targets_are_those_of_peft(model_type: str, modules: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    draft = trl(tmp_path, model=repr(str(tmp_path)))
    assert draft.get("lora.target_modules") == modules
    assert ("target_modules" in find_row_warnings(draft.differs)) is (modules is None)
    file = tmp_path / "sft.yaml"
    file.write_text(f"model_name_or_path: {tmp_path}\nuse_peft: true\n", encoding="utf-8")
    assert import_config("trl", file).draft.get("lora.target_modules") == modules


def test_unread_targets_are_not_called_missing(tmp_path: Path) -> None:
    file = tmp_path / "s.py"
    file.write_text("SFTTrainer('demo', args=SFTConfig(), peft_config=LoraConfig(target_modules=f()))\n", "utf-8")
    draft = import_config("trl", file).draft
    assert "target_modules" not in find_row_warnings(draft.differs)
    assert "LoraConfig.target_modules" in find_row_warnings(draft.unsupported)


def test_torchtune_output_and_warmup_are_read(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    model = "model: {_component_: torchtune.models.qwen3.lora_qwen3_8b, lora_attn_modules: [q_proj]}\n"
    start = model + "output_dir: runs/a\ncheckpointer: {checkpoint_dir: demo"
    file.write_text(start + "}\n", encoding="utf-8")
    draft = import_config("torchtune", file).draft
    assert draft.get("out") == "runs/a" and "lr_scheduler" not in find_row_warnings(draft.differs)
    scheduler = "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"
    file.write_text(
        f"{start}, output_dir: runs/b}}\nlr_scheduler: {{_component_: {scheduler}, num_warmup_steps: 5}}\n", "utf-8"
    )
    draft = import_config("torchtune", file).draft
    assert draft.get("out") == "runs/b" and "lr_scheduler" in find_row_warnings(draft.differs)
    data = "torchtune.datasets.chat_dataset, source: json, data_files: b.jsonl"
    file.write_text(f"{start}}}\ndataset_val: {{_component_: {data}}}\n", "utf-8")
    assert "last weights" in find_row_warnings(import_config("torchtune", file).draft.differs)["dataset_val"]


# --- llamafactory, torchtune and unsloth -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "fields", "joins"),
    [
        (None, None, True),
        ({"prompt": "p", "query": "q", "response": "r"}, {"instruction": "p", "input": "q", "output": "r"}, True),
        (
            {"prompt": "instruction", "query": "input", "response": "output"},
            {"instruction": "instruction", "input": "input", "output": "output"},
            True,
        ),
        ({"prompt": "p", "response": "r"}, {"instruction": "p", "output": "r"}, False),
        # without query, LLaMA-Factory does not read the column `input`, which strop would detect
        (
            {"prompt": "instruction", "response": "output"},
            {"instruction": "instruction", "output": "output"},
            False,
        ),
    ],
)
def test_llamafactory_query_is_noted_and_read_only_if_named(
    columns: dict[str, str] | None, fields: dict[str, str] | None, joins: bool, tmp_path: Path
) -> None:
    entry = {"file_name": "a.jsonl", **({"columns": columns} if columns else {})}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}), encoding="utf-8")
    (tmp_path / "c.yaml").write_text(f"model_name_or_path: demo\ndataset_dir: {tmp_path}\ndataset: mine\n", "utf-8")
    draft = import_config("llamafactory", tmp_path / "c.yaml").draft
    assert draft.get("data.columns") == fields
    assert ("blank line" in find_row_warnings(draft.differs).get("mine.columns.query", "")) is joins


def test_prompts_that_other_tools_add_are_noted(tmp_path: Path) -> None:
    rows = "datasets: [{path: a.jsonl, type: {field_instruction: q, field_input: i, field_output: a}}]\n"
    draft = axolotl(tmp_path, "", rows=rows)
    assert "blank line before the input" in find_row_warnings(draft.differs)["datasets[0].type"]


@pytest.mark.parametrize(("seed", "differs"), [(7, True), (3407, False)])
def test_second_seed_is_noted_if_it_differs(seed: int, differs: bool, tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text(
        "from unsloth import FastLanguageModel\nfrom trl import SFTConfig, SFTTrainer\n"
        'model, tokenizer = FastLanguageModel.from_pretrained("demo")\n'
        f"model = FastLanguageModel.get_peft_model(model, r=8, random_state={seed})\n"
        f"trainer = SFTTrainer(model=model, args=SFTConfig(seed=3407, data_seed={seed}))\n",
        encoding="utf-8",
    )
    draft = import_config("unsloth", file).draft
    notes = find_row_warnings(draft.differs)
    assert {"random_state", "data_seed"} & notes.keys() == ({"random_state", "data_seed"} if differs else set())
    assert not {"random_state", "data_seed"} & find_row_warnings(draft.ignored).keys()
    assert not differs or notes["random_state"].startswith("7: strop has one seed, here 3407")
    assert ("data_seed" in find_row_warnings(axolotl(tmp_path, f"seed: 3407\ndata_seed: {seed}\n").differs)) is differs


UNSLOTH = """
from unsloth import FastLanguageModel
from trl import {kind}Config, {kind}Trainer
model, tokenizer = FastLanguageModel.from_pretrained("demo"{length})
model = FastLanguageModel.get_peft_model(model)
trainer = {kind}Trainer(model=model, args={config}({arguments}), train_dataset=load_dataset("a.jsonl"))
"""


def unsloth(folder: Path, arguments: str = "", kind: str = "SFT", config: str = "", length: str = "") -> Draft:
    words = {"kind": kind, "config": config or f"{kind}Config", "arguments": arguments, "length": length}
    (folder / "train.py").write_text(UNSLOTH.format(**words), encoding="utf-8")
    return import_config("unsloth", folder / "train.py").draft


@pytest.mark.parametrize("kind", ["SFT", "DPO", "Reward"])
def test_unsloth_replaces_the_defaults_of_trl(kind: str, tmp_path: Path) -> None:
    fields = unsloth(tmp_path, kind=kind).fields
    expected = {
        "train.micro_batch": 4, "train.batch_size": 8, "train.learning_rate": 5e-5, "train.warmup": 0.1,
        "train.optimizer": "adamw_8bit", "train.weight_decay": 0.001, "seed": 3407,
    }  # fmt: skip
    assert {name: fields[name][0] for name in expected} == expected
    assert {fields[name][1] for name in expected} == {"unsloth's default"}
    given = unsloth(tmp_path, "warmup_steps=0, seed=1, optim='adamw_torch', weight_decay=0", kind=kind)
    got = [given.get(name) for name in ("train.warmup", "seed", "train.optimizer", "train.weight_decay")]
    assert got == [0, 1, "adamw", 0]


def test_unsloth_keeps_the_defaults_of_training_arguments(tmp_path: Path) -> None:
    draft = unsloth(tmp_path, config="TrainingArguments")
    names = ("train.batch_size", "train.learning_rate", "train.warmup", "train.optimizer", "train.weight_decay", "seed")
    assert [draft.get(name) for name in names] == [8, 5e-5, 0, "adamw", 0.0, 42]


@pytest.mark.parametrize(
    ("kind", "model_length", "trainer_length", "used"),
    [("SFT", "", "", 2048), ("SFT", 512, "", 512), ("SFT", 512, 256, 256), ("SFT", 512, 4096, 512),
     ("DPO", "", "", 1024), ("DPO", 512, "", 512), ("DPO", "", 4096, 2048), ("DPO", "", None, 2048)],
)  # fmt: skip
def test_unsloth_limits_the_trainers_length_to_the_models(
    kind: str, model_length: Any, trainer_length: Any, used: int, tmp_path: Path
) -> None:
    length = f", max_seq_length={model_length}" if model_length else ""
    draft = unsloth(tmp_path, "" if trainer_length == "" else f"max_length={trainer_length}", kind, length=length)
    assert draft.get("data.max_length") == used


def test_adafactor_has_no_difference(tmp_path: Path) -> None:
    """transformers switches its scaling by the norm of the weights off (scale_parameter=False)."""
    draft = trl(tmp_path, "optim='adafactor'")
    assert draft.get("train.optimizer") == "adafactor" and "optim" not in find_row_warnings(draft.differs)


@pytest.mark.parametrize("weights", ["0.5", "[1.0]", "[0, 1]"])
def test_loss_weights_that_strop_cannot_express_are_refused(weights: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="sigmoid, sft"):
        trl(tmp_path, f"loss_type=['sigmoid', 'sft'], loss_weights={weights}", kind="DPO")


# --- differences that once were not named ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        *((f"ds = ds.{method}", True) for method in ("take(10)", "skip(3)", "repeat(3)", "to_pandas().head(5)")),
        ("ds = ds[:10]", True),
        ("ds = Dataset.from_list(list(ds)[:10])", True),
        ("ds = subsample(ds)", True),
        ("ds, other = ds, None", False),
        ("ds = ds.train_test_split(0.9)['test']", True),
        ("ds = ds.train_test_split(0.9)['train']", True),
        ("other = ds[:10]", False),
        ("ds = DatasetDict(train=ds)['train']", True),
        ("ds = ds.shuffle(seed=1)", False),
    ],
)
def test_changed_rows_are_named(change: str, named: bool, tmp_path: Path) -> None:
    draft = read_script(
        tmp_path,
        f"ds = load_dataset('json', data_files='a.jsonl', split='train')\n{change}\n"
        "SFTTrainer('demo', args=SFTConfig(), peft_config=LoraConfig(), train_dataset=ds)\n"
        "ds = ds.take(1)\n",
    )
    notes = [note for note in draft.unsupported if note.key == "train_dataset"]
    assert [note.line for note in notes] == [2] * named and draft.get("data.train") == "a.jsonl"
    assert all("dataset.to_json" in note.text for note in notes)


def test_last_assignment_of_a_data_set_counts(tmp_path: Path) -> None:
    draft = read_script(
        tmp_path,
        "ds = load_dataset('json', data_files='a.jsonl')\nds = load_dataset('json', data_files='b.jsonl')\n"
        "SFTTrainer('demo', args=SFTConfig(), peft_config=LoraConfig(), train_dataset=ds)\n",
    )
    assert draft.get("data.train") == "b.jsonl"


def test_data_set_from_other_code_is_named(tmp_path: Path) -> None:
    trainer = "SFTTrainer('demo', args=SFTConfig(), peft_config=LoraConfig(), train_dataset=rows)\n"
    assert "train_dataset" in find_row_warnings(read_script(tmp_path, f"def main(rows):\n    {trainer}").unsupported)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ("dataloader_drop_last=True", "dataloader_drop_last"),
        ("group_by_length=True", "group_by_length"),
        ("packing=True, packing_strategy='wrapped'", "packing_strategy"),
        ("packing=True, packing_strategy='bfd_split'", "packing_strategy"),
        ("dataset_kwargs={'skip_prepare_dataset': True}", "dataset_kwargs"),
        ("optim_args='a=1'", "optim_args"),
        ("accelerator_config={'split_batches': True}", "accelerator_config"),
    ],
)
def test_arguments_that_change_training_are_named(arguments: str, key: str, tmp_path: Path) -> None:
    draft = trl(tmp_path, arguments)
    named = {**find_row_warnings(draft.differs), **find_row_warnings(draft.unsupported)}
    assert key in named and key not in find_row_warnings(draft.ignored)
    plain = trl(tmp_path, "packing=True, packing_strategy='bfd', dataloader_drop_last=False")
    assert not {"packing_strategy", "dataloader_drop_last"} & {
        note.key for note in (*plain.differs, *plain.unsupported)
    }


def test_parameters_trained_by_code_are_named(tmp_path: Path) -> None:
    loop = "for name, p in model.named_parameters():\n    p.requires_grad = {}"
    for value, named in (("True", True), ("'norm' in name", True), ("False", False)):
        draft = trl(tmp_path, before=loop.format(value))
        assert ("requires_grad" in find_row_warnings(draft.unsupported)) is named
    draft = trl(tmp_path, before="model.lm_head.requires_grad_(True)\nset_seed(77)")
    assert "requires_grad_" in find_row_warnings(draft.unsupported)
    assert "77" in find_row_warnings(draft.differs)["set_seed"]


@pytest.mark.parametrize("kind", ["DPO", "KTO", "Reward"])
def test_line_break_after_the_stop_token_is_named(kind: str, tmp_path: Path) -> None:
    assert "line break" in find_row_warnings(trl(tmp_path, kind=kind).differs)["stop token"]


def test_unsloth_trains_embeddings_in_full_and_obeys_its_flags(tmp_path: Path) -> None:
    text = UNSLOTH.format(kind="SFT", config="SFTConfig", arguments="", length="")
    targets = "target_modules=['q_proj', 'up_proj', 'lm_head', 'embed_tokens'], finetune_mlp_modules=False"
    draft = read_script(tmp_path, text.replace("get_peft_model(model)", f"get_peft_model(model, {targets})"), "unsloth")
    assert draft.get("lora.target_modules") == ["q_proj"]
    assert draft.get("lora.modules_to_save") == ["lm_head", "embed_tokens"]


@pytest.mark.parametrize(
    ("rows", "overlong"),
    [
        ("datasets: [{path: a.txt, type: completion}]", "split"),
        ("pretraining_dataset: [{path: a.txt}]", "split"),
        ("datasets: [{path: a.txt, type: completion}, {path: b.jsonl, type: chat_template}]", "drop"),
    ],
)
def test_axolotl_cuts_long_texts(rows: str, overlong: str, tmp_path: Path) -> None:
    draft = axolotl(tmp_path, "sequence_len: 64\n", f"{rows}\n")
    assert draft.get("data.overlong") == overlong
    notes = {**find_row_warnings(draft.differs), **find_row_warnings(draft.unsupported)}
    assert "pieces" in notes["sequence_len"]


def test_axolotl_keys_that_change_training_are_named(tmp_path: Path) -> None:
    more = "train_on_inputs: true\nloss_watchdog_threshold: 5.0\nloss_watchdog_patience: 3\nsample_packing: true\n"
    more += "tokens: ['<A>']\nlora_modules_to_save: [embed_tokens, lm_head]\n"
    draft = axolotl(tmp_path, more)
    notes = find_row_warnings(draft.differs)
    assert "between them" in notes["train_on_inputs"] and "5.0" in notes["loss_watchdog_threshold"]
    assert "last, smaller batch" in notes["sample_packing"] and "embed_tokens" in notes["lora_modules_to_save"]
    assert draft.get("lora.new_tokens") == ["<A>"] and draft.get("lora.modules_to_save") == []


@pytest.mark.parametrize(
    ("packing", "overlong"), [("", "split"), ("packing: true\n", "split"), ("packing: false\n", None)]
)
def test_llamafactory_packs_texts_by_default(packing: str, overlong: str | None, tmp_path: Path) -> None:
    draft = llamafactory(tmp_path, f"stage: pt\n{packing}")
    assert draft.get("data.overlong") == overlong
    assert ("packing" in find_row_warnings(draft.differs)) is (overlong == "split")


@pytest.mark.parametrize("method", ["bnb", "bitsandbytes"])
def test_llamafactory_quantization_by_both_names_of_bitsandbytes(method: str, tmp_path: Path) -> None:
    draft = llamafactory(tmp_path, f"quantization_bit: 4\nquantization_method: {method}\n")
    assert draft.get("model.quantization") == "nf4"
    assert not [line for line in draft.unsupported if "quantization" in str(line)]


@pytest.mark.parametrize("tool", ["llamafactory", "axolotl"])
def test_columns_that_only_strop_would_read_are_left_out(tool: str, tmp_path: Path) -> None:
    row = {"instruction": "a", "input": "", "output": "b"}
    rows = tmp_path / "a.json"

    def columns() -> Any:
        if tool == "axolotl":
            return axolotl(tmp_path, "", f"datasets: [{{path: {rows}, type: alpaca}}]\n").get("data.columns")
        (tmp_path / "dataset_info.json").write_text(json.dumps({"a": {"file_name": "a.json"}}), encoding="utf-8")
        return llamafactory(tmp_path, f"dataset: a\ndataset_dir: {tmp_path}\n").get("data.columns")

    rows.write_text(json.dumps([row, row]), encoding="utf-8")
    assert columns() is None
    rows.write_text(json.dumps([row, {**row, "system": "s", "history": []}]), encoding="utf-8")
    assert columns() == {name: name for name in row}


def test_settings_of_an_adapter_to_start_from_are_its_own(tmp_path: Path) -> None:
    draft = llamafactory(tmp_path, "stage: dpo\nadapter_name_or_path: old,newer\nlora_rank: 4\nlora_dropout: 0.1\n")
    assert (
        draft.get("model.adapter") == "newer" and "old" in find_row_warnings(draft.unsupported)["adapter_name_or_path"]
    )
    assert {name for name in draft.fields if name.startswith("lora.")} == {"lora.dropout"}
    assert draft.get("lora.dropout") == 0.0 and "4" in find_row_warnings(draft.ignored)["lora_rank"]
    assert "reference" in find_row_warnings(draft.differs)["adapter_name_or_path"]


def test_torchtune_drops_the_last_batch(tmp_path: Path) -> None:
    file = tmp_path / "tune.yaml"
    file.write_text(
        "model: {_component_: torchtune.models.llama3.lora_llama3_8b, lora_attn_modules: [q_proj]}\n"
        "checkpointer: {checkpoint_dir: demo}\n",
        encoding="utf-8",
    )
    assert "last, smaller batch" in find_row_warnings(import_config("torchtune", file).draft.differs)["batch_size"]


@pytest.mark.parametrize(("second", "differs"), [("alpaca_cleaned_dataset", False), ("chat_dataset", True)])
def test_torchtune_data_sets_with_other_losses_are_named(second: str, differs: bool, tmp_path: Path) -> None:
    """Alpaca's data sets train on prompts by default."""
    file = tmp_path / "tune.yaml"
    names = ("alpaca_dataset", second)
    sets = ", ".join(f"{{_component_: torchtune.datasets.{name}, source: a}}" for name in names)
    file.write_text(
        "model: {_component_: torchtune.models.llama3.lora_llama3_8b, lora_attn_modules: [q_proj]}\n"
        f"checkpointer: {{checkpoint_dir: demo}}\ndataset: [{sets}]\n",
        encoding="utf-8",
    )
    assert (
        "dataset.train_on_input" in find_row_warnings(import_config("torchtune", file).draft.unsupported)
    ) is differs


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("packing: true", "packing"),
        ("add_tokens: '<A>'", "add_tokens"),
        ("create_new_adapter: true\nadapter_name_or_path: old", "adapter_name_or_path"),
        ("stage: dpo", "stop token"),
    ],
)
def test_llamafactory_differences_are_named(more: str, key: str, tmp_path: Path) -> None:
    draft = llamafactory(tmp_path, f"{more}\n")
    assert key in {**find_row_warnings(draft.differs), **find_row_warnings(draft.unsupported)}
    assert draft.get("model.adapter") is None
    neat = llamafactory(tmp_path, "packing: true\nneat_packing: true\n")
    assert not {"packing", "neat_packing"} & set(find_row_warnings(neat.unsupported))


@pytest.mark.parametrize(
    ("code", "key"),
    [
        ("tokenizer = AutoTokenizer.from_pretrained('other')", "AutoTokenizer"),
        ("tokenizer = AutoTokenizer.from_pretrained('demo', add_eos_token=True)", "AutoTokenizer.add_eos_token"),
        ("add_new_tokens(model, tokenizer, new_tokens=['<a>'])", "add_new_tokens"),
        ("DataCollatorForCompletionOnlyLM('answer')", "DataCollatorForCompletionOnlyLM"),
        ("train_on_responses_only(1, last_response_only=True)", "last_response_only"),
        ("config.set_optimizer(learning_rate=1)", "set_optimizer"),
    ],
)
def test_code_that_changes_training_is_named(code: str, key: str, tmp_path: Path) -> None:
    draft = trl(tmp_path, before=f"model = AutoModelForCausalLM.from_pretrained('demo')\n{code}", model="model")
    assert key in {**find_row_warnings(draft.differs), **find_row_warnings(draft.unsupported)}


def test_adapter_that_is_merged_first_is_not_continued(tmp_path: Path) -> None:
    before = "model = AutoModelForCausalLM.from_pretrained('demo')\nmodel = PeftModel.from_pretrained(model, 'old')\n"
    draft = trl(tmp_path, before=f"{before}model = model.merge_and_unload()", model="model")
    assert draft.get("model.adapter") is None and draft.get("lora.r") == 4
    assert "strop merge" in find_row_warnings(draft.unsupported)["merge_and_unload"]


def test_axolotl_trains_to_the_end_with_rl_and_reads_every_beta(tmp_path: Path) -> None:
    rows = "rl: orpo\ndatasets: [{path: a.jsonl, type: chat_template.default}]\nval_set_size: 0.1\n"
    draft = axolotl(tmp_path, "early_stopping_patience: 2\nrl_beta: 0.7\norpo_alpha: 0.3\n", rows)
    assert draft.get("train.early_stopping") is None and draft.get("train.beta") == 0.7
    assert "last weights" in find_row_warnings(draft.differs)["load_best_model_at_end"]
    assert axolotl(tmp_path, "rl_beta: 0.7\ntrl: {beta: 0.2}\n", rows).get("train.beta") == 0.2
    with pytest.raises(RecipeError, match="special_tokens: x: not a mapping"):
        axolotl(tmp_path, "special_tokens: x\n", rows)


@pytest.mark.parametrize(
    ("keys", "objective"),
    [
        ("loss_type: kto\n", "kto"),
        ("desirable_weight: 2\n", "kto"),
        ("lora_task_type: SEQ_CLS\n", "reward"),
        ("", None),
    ],
)
def test_trl_yaml_is_read_as_its_command(keys: str, objective: str | None, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"model_name_or_path: demo\nuse_peft: true\n{keys}", encoding="utf-8")
    assert import_config("trl", file).draft.get("train.objective") == objective


def test_rows_of_text_files_are_named(tmp_path: Path) -> None:
    draft = axolotl(tmp_path, "", "datasets: [{path: a.txt, type: completion}]\n")
    assert "paragraph" in find_row_warnings(draft.differs)["data"]


# --- rows that only one of the tools reads -----------------------------------------------------------------------

CHAT_ROW = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
ALPACA_ROW = {"instruction": "a", "input": "", "output": "b"}
MESSAGES_ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def factory_data(folder: Path, entries: dict[str, dict[str, Any]], rows: list[dict[str, Any]], more: str) -> Draft:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    info = {name: {"file_name": "rows.jsonl", **entry} for name, entry in entries.items()}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return llamafactory(folder, f"dataset_dir: {folder}\n{more}\n")


@pytest.mark.parametrize("stage", ["sft", "kto"])
@pytest.mark.parametrize(
    ("entry", "row", "unread", "columns"),
    [
        ({"formatting": "sharegpt", "columns": {"messages": "conversations"}}, CHAT_ROW, "system",
         {"conversations": "conversations"}),
        ({"formatting": "openai", "columns": {"messages": "messages"}}, MESSAGES_ROW, "tools",
         {"conversations": "messages"}),
        ({"columns": {"prompt": "instruction", "query": "input", "response": "output"}}, ALPACA_ROW, "history",
         {name: name for name in ALPACA_ROW}),
        ({}, ALPACA_ROW, "messages", {name: name for name in ALPACA_ROW}),
    ],
)  # fmt: skip
def test_llamafactory_reads_only_the_columns_it_names(
    entry: dict[str, Any], row: dict[str, Any], unread: str, columns: dict[str, str], stage: str, tmp_path: Path
) -> None:
    plain = factory_data(tmp_path, {"a": entry}, [row, row], f"dataset: a\nstage: {stage}")
    assert plain.get("data.columns") is None
    rows = [row, {**row, unread: "x"}]  # only a later row has the column
    draft = factory_data(tmp_path, {"a": entry}, rows, f"dataset: a\nstage: {stage}")
    assert draft.get("data.columns") == columns


def test_llamafactory_columns_of_evaluation_rows_do_not_apply_to_training_rows(tmp_path: Path) -> None:
    entries = {"a": {"formatting": "sharegpt"}, "b": {"columns": {"prompt": "p", "response": "r"}}}
    draft = factory_data(tmp_path, entries, [CHAT_ROW], "dataset: a\neval_dataset: b")
    assert draft.get("data.columns") is None and "rename" in find_row_warnings(draft.unsupported)["dataset"]


def test_torchtune_columns_of_several_data_sets_must_agree(tmp_path: Path) -> None:
    sets = [
        f"{{_component_: x.chat_dataset, source: json, data_files: {x}.jsonl, conversation_column: {x}}}" for x in "ab"
    ]
    text = "model: {_component_: x.lora_llama3, lora_attn_modules: [q_proj]}\ncheckpointer: {checkpoint_dir: demo}\n"
    file = tmp_path / "c.yaml"
    for data, columns in ((f"dataset: {sets[0]}", {"conversations": "a"}), (f"dataset: [{', '.join(sets)}]", None),
                          (f"dataset: {sets[0]}\ndataset_val: {sets[1]}", None)):  # fmt: skip
        file.write_text(text + data, encoding="utf-8")
        draft = import_config("torchtune", file).draft
        assert draft.get("data.columns") == columns
        assert ("dataset" in find_row_warnings(draft.unsupported)) is (columns is None)


def test_rows_that_llamafactory_skips_or_changes_are_noted(tmp_path: Path) -> None:
    for formatting, changes in (("sharegpt", False), ("openai", True)):
        draft = factory_data(tmp_path, {"a": {"formatting": formatting}}, [CHAT_ROW], "dataset: a")
        note = find_row_warnings(draft.differs)["a.formatting"]
        assert "skipped" in note and ("detailed thinking off" in note) is changes


@pytest.mark.parametrize("thinking", ["true", "false"])
def test_llamafactory_without_thinking_drops_reasoning(thinking: str, tmp_path: Path) -> None:
    draft = llamafactory(tmp_path, f"enable_thinking: {thinking}\n")
    assert draft.get("data.reasoning") == (None if thinking == "true" else "drop")


def test_every_import_names_what_it_did_not_compare(tmp_path: Path) -> None:
    file = tmp_path / "tune.yaml"
    file.write_text(
        "model: {_component_: x.lora_llama3, lora_attn_modules: [q_proj]}\ncheckpointer: {checkpoint_dir: demo}\n",
        encoding="utf-8",
    )
    drafts = [axolotl(tmp_path, ""), llamafactory(tmp_path), trl(tmp_path), unsloth(tmp_path)]
    for draft in (*drafts, import_config("torchtune", file).draft):
        note = find_row_warnings(draft.differs)["rows"]
        assert all(word in note for word in ("template", "system texts", "weight", "skips"))


@pytest.mark.parametrize(
    ("row", "read_by_trl", "read_by_unsloth"),
    [
        ({"text": "t"}, False, False),
        ({"text": "t", **ALPACA_ROW}, True, True),
        ({"text": "t", "question": "a", "answer": "b"}, True, True),
        ({"text": "t", **MESSAGES_ROW}, False, True),
        ({"text": "t", **CHAT_ROW}, False, True),
        ({"text": "t", "conversations": MESSAGES_ROW["messages"]}, True, True),
        ({"text": "t", "prompt": "a", "completion": "b"}, False, False),
        (ALPACA_ROW, False, False),
    ],
)
def test_text_column_is_read_where_the_trainer_reads_it(
    row: dict[str, Any], read_by_trl: bool, read_by_unsloth: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    script = UNSLOTH.replace("a.jsonl", "./a.jsonl").format(kind="SFT", config="SFTConfig", arguments="", length="")
    drafts = trl(tmp_path), read_script(tmp_path, script, "unsloth")
    columns = [draft.get("data.columns") for draft in drafts]
    assert columns == [{"text": "text"} if is_read else None for is_read in (read_by_trl, read_by_unsloth)]
    is_text = read_by_unsloth or set(row) == {"text"}
    assert ("stop token" in find_row_warnings(drafts[1].differs).get("dataset_text_field", "")) is is_text
    (tmp_path / "a.jsonl").write_text(json.dumps({"formatted": "t", **row}) + "\n", encoding="utf-8")
    draft = trl(tmp_path, "dataset_text_field='formatted'")
    expected = None if {"messages", "prompt"} & set(row) or row.get("conversations") == CHAT_ROW["conversations"] else 1
    assert draft.get("data.columns") == (expected and {"text": "formatted"})


# --- the argument that is passed counts --------------------------------------------------------------------------

SPLIT = """
data = load_dataset("json", data_files="a.jsonl", split="train")
{0}
SFTTrainer("demo", SFTConfig(), train_dataset={1}, eval_dataset={2}, peft_config=LoraConfig())
"""


@pytest.mark.parametrize(
    ("arguments", "share", "is_part"),
    [
        ("", "25%", False),
        ("0.1", "10%", False),
        ("train_size=0.9, seed=42", "10%", False),
        ("None, 0.8", "20%", False),
        ("test_size=0.1, train_size=0.9", "10%", False),
        ("0.1, 0.5", "10%", True),
        ("train_size=50", None, False),
        ("0.1, 50", "10%", True),
        ("test_size=n", None, False),
    ],
)
def test_split_sizes_are_those_of_datasets(arguments: str, share: str | None, is_part: bool, tmp_path: Path) -> None:
    text = SPLIT.format(f"parts = data.train_test_split({arguments})", 'parts["train"]', 'parts["test"]')
    draft = read_script(tmp_path, text)
    assert draft.get("data.eval") == share
    notes = find_row_warnings(draft.unsupported)
    assert ("train_dataset" in notes) is is_part and ("train_test_split" in notes) is (share is None)


TWO_SPLITS = 'a = data.train_test_split(0.2)\nb = a["{0}"].train_test_split(0.5)'


@pytest.mark.parametrize(
    ("code", "train", "evaluation"),
    [
        (TWO_SPLITS.format("train"), 'b["train"]', 'b["test"]'),
        (TWO_SPLITS.format("test"), 'a["train"]', 'b["train"]'),
        ("a = data.train_test_split(0.2)", 'a["test"]', 'a["train"]'),
        ("a = data.train_test_split(0.2)", 'a["train"]', "None"),
    ],
)
def test_other_parts_of_splits_are_named(code: str, train: str, evaluation: str, tmp_path: Path) -> None:
    draft = read_script(tmp_path, SPLIT.format(code, train, evaluation))
    notes = find_row_warnings(draft.unsupported)
    assert draft.get("data.eval") is None and "strop trains on all rows" in notes["train_dataset"]
    assert ("set data.eval" in str(draft.unsupported)) is (evaluation != "None")


LOAD = 'model = AutoModelForCausalLM.from_pretrained("demo"{0})'
QUANTIZED = LOAD.format(", quantization_config=bnb")


@pytest.mark.parametrize(
    ("code", "quantization", "noted"),
    [
        (QUANTIZED, "nf4", None),
        (LOAD.format(", **{'quantization_config': bnb}"), "nf4", None),
        ("def make():\n    return bnb\n" + LOAD.format(", quantization_config=make()"), "nf4", None),
        (LOAD.format(""), "none", "BitsAndBytesConfig"),
        (LOAD.format(", quantization_config=bnb if cli.use_4bit else None"), "nf4", "quantization_config"),
        ("q = None\nif cli.q:\n    q = bnb\n" + LOAD.format(", quantization_config=q"), "nf4", "quantization_config"),
        (f"if cli.use_4bit:\n    {QUANTIZED}\nelse:\n    {LOAD.format('')}", "nf4", "model"),
        (LOAD.format(", quantization_config=f(cli)"), "nf4", "quantization_config"),
    ],
)  # fmt: skip
def test_quantization_is_that_of_the_model_that_is_passed(
    code: str, quantization: str, noted: str | None, tmp_path: Path
) -> None:
    bnb = 'bnb = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")'
    draft = trl(tmp_path, before=f"{bnb}\n{code}", model="model")
    assert draft.get("model.quantization") == quantization and draft.get("model.name") == "demo"
    notes = {**find_row_warnings(draft.differs), **find_row_warnings(draft.unsupported)}
    assert [key for key in ("quantization_config", "BitsAndBytesConfig", "model") if key in notes] == [noted] * bool(
        noted
    )


def test_several_evaluation_data_sets_are_named(tmp_path: Path) -> None:
    text = SPLIT.format('a = load_dataset("b.jsonl")', "data", '{"x": a, "y": load_dataset("c.jsonl")}')
    assert "eval_dataset" in find_row_warnings(read_script(tmp_path, text).unsupported)


def test_reference_model_is_not_the_trained_one(tmp_path: Path) -> None:
    before = 'ref = AutoModelForCausalLM.from_pretrained("big")\n' + LOAD.format("")
    draft = trl(tmp_path, before=before, model="get_peft_model(model, LoraConfig(r=2)).to(device)", kind="DPO")
    assert draft.get("model.name") == "demo" and "from_pretrained" in find_row_warnings(draft.unsupported)


@pytest.mark.parametrize(
    ("passed", "rank", "noted"),
    [
        ("b", 2, {"LoraConfig"}),
        ("b if cli.lora else None", 2, {"LoraConfig", "peft_config"}),
        ("c", 1, {"LoraConfig", "peft_config"}),
        ("IA3Config(target_modules=['q_proj'])", None, set()),
    ],
)
def test_adapter_is_the_one_that_is_passed(passed: str, rank: int | None, noted: set[str], tmp_path: Path) -> None:
    code = "a = LoraConfig(r=1)\nb = LoraConfig(r=2)\nif f():\n    c = b\nelse:\n    c = a\n"
    script = f"{code}SFTTrainer('demo', SFTConfig(), peft_config={passed})\n"
    if rank is None:
        with pytest.raises(InputError, match="IA3Config"):
            read_script(tmp_path, script)
        return
    draft = read_script(tmp_path, script)
    assert draft.get("lora.r") == rank
    assert noted == {"LoraConfig", "peft_config"} & {note.key for note in (*draft.differs, *draft.unsupported)}


@pytest.mark.parametrize("tool", ["trl", "unsloth"])
@pytest.mark.parametrize(
    ("trainer", "objective", "more"),
    [("DPOTrainer", "dpo", "beta=0.5, max_length=64"), ("RewardTrainer", "reward", "max_length=64"),
     ("SFTTrainer", None, "max_seq_length=64"), ("Trainer", None, "")],
)  # fmt: skip
def test_objective_is_that_of_the_trainer(
    trainer: str, objective: str | None, more: str, tool: str, tmp_path: Path
) -> None:
    script = UNSLOTH if tool == "unsloth" else "model = 'demo'\nLoraConfig(lora_dropout=0.1)\n"
    script = (
        script.partition("trainer =")[0]
        .format(kind="DPO", length="")
        .replace("model(model)", "model(model, lora_dropout=0.1)")
    )
    for args in ("args=TrainingArguments(),", ""):  # older scripts, and the quick start of TRL
        text = f"{script}{trainer}(model=model, {args} {more})\n"
        draft = read_script(tmp_path, text, tool)
        assert draft.get("train.objective") == objective
        assert draft.get("lora.dropout") == (0.1 if objective is None else 0.0)
        assert draft.get("train.beta") == (0.5 if objective == "dpo" else None)
        assert not more or draft.get("data.max_length") == 64
        assert not draft.unsupported


def test_defaults_without_a_config_are_those_of_trl(tmp_path: Path) -> None:
    for kind, rate in (("SFT", 2e-5), ("DPO", 1e-6), ("Reward", 1e-4)):
        draft = read_script(
            tmp_path, f"{kind}Trainer('demo', peft_config=LoraConfig(), train_dataset=load_dataset('a.jsonl'))"
        )
        assert (draft.get("train.learning_rate"), draft.get("train.batch_size")) == (rate, 8)
    with pytest.raises(InputError, match="SFTConfig"):
        read_script(tmp_path, "SFTTrainer('demo', args=f(), peft_config=LoraConfig())")


def test_config_is_the_one_that_is_passed(tmp_path: Path) -> None:
    configs = "a = SFTConfig(seed=1)\nb = SFTConfig(seed=2)\n"
    draft = read_script(
        tmp_path, f"{configs}SFTTrainer('demo', args=b, peft_config=LoraConfig())\nDPOTrainer('demo')\n"
    )
    assert draft.get("seed") == 2 and set(find_row_warnings(draft.unsupported)) == {"SFTConfig", "DPOTrainer"}


def test_settings_after_the_first_training_are_not_imported(tmp_path: Path) -> None:
    before = LOAD.format("")
    text = TRL.format(
        config="SFTConfig", trainer="SFTTrainer", model="model", arguments="", before=before, after="pass"
    )
    text = text.replace("trainer.train()", "args.seed = 1\ntrainer.train()\nargs.seed = 2\nmodel.config.x = 1\n{0}")
    for again in ("", "trainer.train()"):
        draft = read_script(tmp_path, text.replace("{0}", again))
        assert draft.get("seed") == 1 and set(find_row_warnings(draft.unsupported)) == ({"train"} if again else set())


@pytest.mark.parametrize(
    ("code", "key"),
    [
        ("setattr(args, 'seed', 1)", "setattr"),
        ("trainer.optimizer.param_groups[0]['lr'] = 1", "trainer.optimizer.param_groups[0]['lr']"),
        ("args.lr_scheduler_kwargs['x'] = 1", "lr_scheduler_kwargs['x']"),
        ("for p in model.parameters():\n    p.requires_grad = False", "requires_grad"),
        ("model.lm_head.requires_grad_(False)", "requires_grad_"),
    ],
)
def test_what_code_sets_before_training_is_listed(code: str, key: str, tmp_path: Path) -> None:
    before = f"{LOAD.format('')}\nmodel = get_peft_model(model, LoraConfig())"
    text = TRL.format(config="SFTConfig", trainer="SFTTrainer", model="model", arguments="", before=before, after="")
    first, last = ("", code) if code.startswith("trainer") else (code, "")
    text = text.replace("trainer = ", f"{first}\ntrainer = ").replace("trainer.train()", f"{last}\ntrainer.train()")
    assert key in find_row_warnings(read_script(tmp_path, text).unsupported)


@pytest.mark.parametrize(
    "line", ["files = !ls", "info, x = %env", "?SFTTrainer", "trainer.train??", "%%bash\nls -l | x"]
)
def test_lines_for_ipython_are_skipped(line: str, tmp_path: Path) -> None:
    sources = [line, "SFTTrainer('demo', SFTConfig(seed=f()), peft_config=LoraConfig())"]
    cells = [{"cell_type": "code", "source": source} for source in sources]
    file = tmp_path / "n.ipynb"
    file.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    draft = import_config("trl", file).draft
    assert draft.get("model.name") == "demo"
    assert [note.line for note in draft.unsupported] == [2 + line.count("\n")]


def test_torchtune_step_limit_is_named_as_an_upper_limit(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    model = "model: {_component_: x.lora_llama3, lora_attn_modules: [q_proj]}\ncheckpointer: {checkpoint_dir: demo}\n"
    file.write_text(f"{model}max_steps_per_epoch: 100\nepochs: 2\n", encoding="utf-8")
    draft = import_config("torchtune", file).draft
    assert draft.get("train.max_steps") == 200
    assert "at most" in find_row_warnings(draft.differs)["max_steps_per_epoch"]


def test_axolotl_truncation_does_not_apply_to_texts(tmp_path: Path) -> None:
    for rows, noted in (("datasets: [{path: a.txt, type: completion}]\n", False), (ROWS, True)):
        draft = axolotl(tmp_path, "excess_length_strategy: truncate\n", rows)
        assert ("excess_length_strategy" in find_row_warnings(draft.unsupported)) is noted


# --- GRPO in an environment --------------------------------------------------------------------------------------

GRPO = """
from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from shop import Shop, add as plus, look, asked
{more}
args = GRPOConfig(output_dir="out", num_generations=4, max_completion_length=64, {arguments})
trainer = GRPOTrainer("demo", {code}, args=args, peft_config=LoraConfig(r=4, lora_dropout=0.05),
                      train_dataset=load_dataset("json", data_files="a.jsonl", split="train"))
trainer.train()
"""


def grpo(folder: Path, code: str, arguments: str = "", more: str = "") -> Draft:
    (folder / "shop.py").write_text("", encoding="utf-8")
    file = folder / "train.py"
    file.write_text(GRPO.format(code=code, arguments=arguments, more=more), encoding="utf-8")
    return import_config("trl", file).draft


def test_environment_and_its_rewards_are_imported(tmp_path: Path) -> None:
    draft = grpo(tmp_path, "environment_factory=Shop, reward_funcs=[asked]", "max_tool_calling_iterations=3, beta=0.02")
    values = {name: value for name, (value, _) in draft.fields.items()}
    expected = {
        "train.objective": "grpo", "train.environment": f"{tmp_path / 'shop.py'}:Shop", "train.turns": 4,
        "train.rewards": [f"{tmp_path / 'shop.py'}:asked"], "train.group": 4, "train.answer_tokens": 64,
        "train.beta": 0.02, "train.batch_size": 2, "train.clip_high": 0.2, "lora.dropout": 0.0,
    }  # fmt: skip
    assert expected.items() <= values.items()
    assert not draft.unsupported, draft.unsupported


def test_tools_are_imported_as_functions(tmp_path: Path) -> None:
    draft = grpo(tmp_path, "tools=[plus, look], reward_funcs=asked", 'loss_type="dr_grpo", epsilon_high=0.28')
    assert draft.get("train.environment") == f"{tmp_path / 'shop.py'}:add,look"
    assert draft.get("train.group_loss") == "dr_grpo" and draft.get("train.clip_high") == 0.28


def test_code_of_the_script_is_named_with_the_field_that_takes_it(tmp_path: Path) -> None:
    more = "class Own:\n    pass\n\ndef judge(environments, **kwargs):\n    return [1.0] * len(environments)\n"
    draft = grpo(tmp_path, "environment_factory=Own, reward_funcs=judge", more=more)
    texts = {note.key: note.text for note in draft.unsupported}
    assert "train.environment FILE.py:" in texts["environment_factory"] and "train.rewards" in texts["reward_funcs"]
    assert draft.get("train.environment") is None
    with pytest.raises(InputError, match="GRPOConfig"):
        grpo(tmp_path, "reward_funcs=[asked]")


def test_8_bit_of_unsloth_and_trl_is_named_with_its_difference(tmp_path: Path) -> None:
    text = """from unsloth import FastLanguageModel
from trl import SFTConfig, SFTTrainer
model, tokenizer = FastLanguageModel.from_pretrained("m", load_in_4bit=False, load_in_8bit=True)
model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)
trainer = SFTTrainer(model=model, args=SFTConfig(), train_dataset="a.jsonl")
"""
    draft = read_script(tmp_path, text, "unsloth")
    assert draft.get("model.quantization") == "int8"
    assert "outliers in 16 bit" in find_row_warnings(draft.differs)["load_in_8bit"]


def test_of_two_warmups_the_steps_have_priority(tmp_path: Path) -> None:
    draft = llamafactory(tmp_path, "warmup_ratio: 0.1\nwarmup_steps: 5\n")
    assert draft.get("train.warmup") == 5
    assert "warmup_steps has priority" in find_row_warnings(draft.ignored)["warmup_ratio"]
