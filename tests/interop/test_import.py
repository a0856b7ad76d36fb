"""Configs of other tools become recipes that train, and every key is imported or listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import strop
from strop.config.load import resolve
from strop.errors import InputError, RecipeError
from strop.interop.draft import (
    IMPORTERS,
    IN_FULL_NOTE,
    NO_LIMIT_NOTE,
    PROJECTOR_NOTE,
    TRUNCATION_NOTE,
    Imported,
    import_config,
)
from strop.interop.script_parser import UNREADABLE, Script
from tests.support.runs import run

FOLDER = Path(__file__).parent / "peers"
CONFIGS = sorted(file.name for file in FOLDER.glob("*-*"))
# keys of each config that strop does not support
UNSUPPORTED = {
    "axolotl-alpaca-lora.yaml": {"evals_per_epoch"},
    "axolotl-chat-qlora.yaml": {"deepspeed"},
    "axolotl-dpo.yaml": set(),
    "axolotl-completion.yaml": {"optimizer", "lr_scheduler", "cosine_min_lr_ratio", "neftune_noise_alpha"},
    "axolotl-kto.yaml": set(),
    "llamafactory-sft.yaml": {"max_samples"},
    "llamafactory-qlora.yaml": {"mask_history", "packing"},
    "llamafactory-dpo.yaml": set(),
    "llamafactory-kto.yaml": set(),
    "llamafactory-pretrain.yaml": {"streaming", "neftune_noise_alpha", "lr_scheduler_type"},
    "swift-chat.sh": {"system"},
    "swift-gkd.yaml": set(),
    "swift-own.sh": {"beta", "dataset", "top_k"},
    "swift-qlora.yaml": {"deepspeed", "truncation_strategy"},
    "swift-sft.yaml": set(),
    "torchtune-lora.yaml": set(),
    "torchtune-qlora.yaml": {"tokenizer.prompt_template"},
    "torchtune-dora.yaml": {"lr_scheduler.num_cycles"},
    "torchtune-dpo.yaml": set(),
    "torchtune-text.yaml": {"dataset.add_eos", "optimizer.momentum"},
    "trl-sft.py": {"neftune_noise_alpha"},
    "trl-qlora.py": {"map", "load_dataset.split", "SFTConfig.output_dir"},
    "trl-dpo.py": set(),
    "trl-kto.py": set(),
    "trl-config.yaml": set(),
    "unsloth-alpaca.py": {"map"},
    "unsloth-chat.py": {"SFTConfig.fp16"},
    "unsloth-dpo.py": {"max_prompt_length"},
    "unsloth-rslora.py": set(),
    "unsloth-text.py": {"embedding_learning_rate"},
}


def rows(folder: Path) -> dict[str, Path]:
    """Write a file of each row format, by the placeholder used in the configs."""

    def chat(n: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"it is {n}"}]

    def pair(n: int) -> dict[str, object]:
        good, bad = ({"role": "assistant", "content": text} for text in (f"yes {n}", f"no {n}"))
        return {"conversation": chat(n)[:1], "chosen": good, "rejected": bad}

    def whole(n: int) -> dict[str, object]:
        bad = [chat(n)[0], {"role": "assistant", "content": f"no {n}"}]
        return {"chosen": chat(n), "rejected": bad}

    imported_config = {
        "ALPACA": lambda n: {"instruction": f"add {n}", "input": "", "output": f"{n + 1}"},
        "CHAT": lambda n: {"messages": chat(n)},
        "QA": lambda n: {"question": f"what is {n}", "answer": f"it is {n}"},
        "TEXT": lambda n: {"text": f"there were {n} of them"},
        "PAIRS": pair,
        "WHOLE": whole,
        "JUDGED": lambda n: {"messages": chat(n), "label": n % 2 == 0},
    }
    files = {}
    for name, make in imported_config.items():
        files[name] = folder / f"{name.lower()}.jsonl"
        files[name].write_text("".join(json.dumps(make(n)) + "\n" for n in range(24)), encoding="utf-8")
    return files


def written(name: str, folder: Path, model: Path, more: str = "") -> Path:
    """Copy a config to `folder` with real paths."""
    words = {**rows(folder), "MODEL": model, "OUT": folder / "out"}
    for file in (name, "dataset_info.json"):
        text = (FOLDER / file).read_text(encoding="utf-8")
        for word, path in words.items():
            text = text.replace(word, str(path)).replace(f'os.environ["{path}"]', 'os.environ["OUT"]')
        (folder / file).write_text(text + more * (file == name), encoding="utf-8")
    return folder / name


def imported(name: str, path: Path) -> Imported:
    return import_config(name.partition("-")[0], path)


def test_five_configs_of_each_tool_are_tested() -> None:
    assert {peer: sum(name.startswith(f"{peer}-") for name in CONFIGS) for peer in IMPORTERS} == dict.fromkeys(
        IMPORTERS, 5
    )
    assert set(UNSUPPORTED) == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_converts_and_trains(name: str, tmp_path: Path, tiny_folder: Path) -> None:
    path = written(name, tmp_path, tiny_folder)
    imported_config = imported(name, path)
    assert {note.key for note in imported_config.draft.unsupported} == UNSUPPORTED[name]
    assert not imported_config.missing
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(imported_config.to_yaml(), encoding="utf-8")
    assert resolve(recipe).recipe == imported_config.resolved.recipe  # the written recipe is the checked one
    assert all(
        note.key in imported_config.to_yaml()
        for note in (*imported_config.draft.unsupported, *imported_config.draft.differs, *imported_config.draft.ignored)
    )
    run = strop.train(recipe, **{"train.max_steps": 2, "out": str(tmp_path / "run"), "model.dtype": "fp32"})
    assert run.report["steps"] == 2 and (run.report["loss"]["last"] > 0 or "own" in name)  # of grpo, it may be below 0


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.endswith(".yaml")])
def test_unknown_key_is_listed_as_unsupported(name: str, tmp_path: Path, tiny_folder: Path) -> None:
    imported_config = imported(name, written(name, tmp_path, tiny_folder, "\ninvented_key: {a: 1}\n"))
    assert "invented_key" in {note.key for note in imported_config.draft.unsupported}


def test_fields_of_one_config_of_each_tool(tmp_path: Path, tiny_folder: Path) -> None:
    """One config of each, field by field."""
    got = {}
    for name in (
        "axolotl-chat-qlora.yaml",
        "llamafactory-qlora.yaml",
        "torchtune-lora.yaml",
        "trl-sft.py",
        "unsloth-alpaca.py",
    ):
        fields = imported(name, written(name, tmp_path, tiny_folder)).draft.fields
        got[name.partition("-")[0]] = {field: value for field, (value, _) in fields.items()}
    expected: dict[str, dict[str, object]] = {
        "axolotl": {
            "model.quantization": "nf4", "lora.r": 8, "lora.alpha": 16, "lora.use_rslora": True, "train.batch_size": 2,
            "train.max_steps": 20, "train.optimizer": "adamw", "train.lr_scheduler": "constant", "train.warmup": 2,
            "data.overlong": "refuse", "data.eval": "25%", "seed": 7, "train.early_stopping": 3,
        },
        "llamafactory": {
            "lora.alpha": 32, "lora.target_modules": ["q_proj", "v_proj"], "train.batch_size": 4, "seed": 3,
            "train.lr_scheduler": "linear", "train.warmup": 0, "train.lora_plus_ratio": 16.0, "data.max_length": 128,
            "model.double_quantization": False, "train.keep_checkpoints": 1, "train.early_stopping": 2,
        },
        "torchtune": {
            "lora.target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "train.learning_rate": 3e-4, "train.warmup": 100, "train.max_grad_norm": 0, "train.weight_decay": 0.01,
            "data.columns": {"prompt": "question", "completion": "answer"}, "model.dtype": "bf16",
            "train.batch_size": 8,
        },
        "trl": {
            "lora.r": 4, "lora.alpha": 16, "lora.target_modules": "all-linear", "train.learning_rate": 2e-4,
            "data.eval": "20%", "train.batch_size": 4, "train.warmup": 0.03, "seed": 42,
            "train.gradient_checkpointing": "on",
        },
        "unsloth": {
            "lora.alpha": 16, "train.weight_decay": 0.01, "train.warmup": 5, "seed": 3407, "data.max_length": 256,
            "train.optimizer": "adamw_8bit", "model.quantization": "nf4", "train.max_steps": 60,
        },
    }  # fmt: skip
    assert {peer: {field: got[peer].get(field) for field in fields} for peer, fields in expected.items()} == expected


def test_defaults_of_the_other_tool_are_written(tmp_path: Path, tiny_folder: Path) -> None:
    fields = imported("trl-dpo.py", written("trl-dpo.py", tmp_path, tiny_folder)).draft.fields
    assert fields["train.lr_scheduler"][0] == "linear" and fields["seed"] == (42, "trl's default")
    assert yaml.safe_load(imported("trl-dpo.py", tmp_path / "trl-dpo.py").to_yaml())["train"]["objective"] == "dpo"


def test_keys_with_another_meaning_are_listed(tmp_path: Path, tiny_folder: Path) -> None:
    expected = {
        note.key
        for note in imported(
            "axolotl-alpaca-lora.yaml", written("axolotl-alpaca-lora.yaml", tmp_path, tiny_folder)
        ).draft.differs
    }
    assert {"sample_packing", "val_set_size", "datasets[0].type", "warmup"} <= expected
    expected = {note.key for note in imported("trl-kto.py", written("trl-kto.py", tmp_path, tiny_folder)).draft.differs}
    assert {"max_length", "load_best_model_at_end", "warmup_steps"} <= expected


def noted(draft: Any) -> dict[str, str]:
    return {note.key: note.text for note in (*draft.unsupported, *draft.differs, *draft.ignored)}


AXOLOTL = """base_model: MODEL
adapter: qlora
load_in_4bit: true
datasets:
  - path: rows.jsonl
    type: {}
"""


def test_a_warmup_over_all_steps_is_not_a_warmup_of_one_step(tmp_path: Path) -> None:
    axolotl, factory = tmp_path / "a.yaml", tmp_path / "l.yaml"
    axolotl.write_text(AXOLOTL.format("chat_template") + "warmup_ratio: 1\n", encoding="utf-8")
    factory.write_text(
        "model_name_or_path: m\nstage: sft\nfinetuning_type: lora\nwarmup_ratio: 1.0\n", encoding="utf-8"
    )
    for tool, file in (("axolotl", axolotl), ("llamafactory", factory)):
        draft = import_config(tool, file).draft
        assert draft.get("train.warmup") is None and "over all steps" in noted(draft)["warmup_ratio"]


def test_settings_of_bitsandbytes_and_of_inputs_in_axolotl(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    more = "bnb_config_kwargs: {bnb_4bit_quant_type: fp4, bnb_4bit_use_double_quant: false}\n"
    file.write_text(AXOLOTL.format("chat_template") + more, encoding="utf-8")
    draft = import_config("axolotl", file).draft
    assert (draft.get("model.quantization"), draft.get("model.double_quantization")) == ("fp4", False)
    assert "bnb_config_kwargs" not in noted(draft)
    pairs = AXOLOTL.format("chatml.intel") + "rl: ipo\ntrain_on_inputs: true\n"
    file.write_text(pairs, encoding="utf-8")
    draft = import_config("axolotl", file).draft
    assert draft.get("data.loss") is None and "not use it with rl" in noted(draft)["train_on_inputs"]
    mixed = AXOLOTL.format("completion") + "  - {path: b.jsonl, type: alpaca}\nexcess_length_strategy: raise\n"
    file.write_text(mixed, encoding="utf-8")
    draft = import_config("axolotl", file).draft
    assert draft.get("data.overlong") == "refuse" and "strop refuses them" in noted(draft)["sequence_len"]


def test_steps_between_evaluations_of_torchtune(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    data = "{_component_: torchtune.datasets.chat_dataset, source: json, data_files: ROWS.jsonl}"
    text = (
        "model: {_component_: torchtune.models.llama3.lora_llama3_8b, lora_attn_modules: [q_proj]}\n"
        "checkpointer: {checkpoint_dir: m}\n"
        f"dataset: {data}\nrun_val_every_n_steps: 7\n"
    )
    for more, expected in ((f"dataset_val: {data}\n", 7), ("", None)):
        file.write_text(text + more, encoding="utf-8")
        draft = import_config("torchtune", file).draft
        assert draft.get("train.eval_steps") == expected
        assert ("run_val_every_n_steps" in noted(draft)) is (expected is None)


def test_max_length_none_is_not_replaced_by_the_default(tmp_path: Path) -> None:
    text = (FOLDER / "trl-dpo.py").read_text(encoding="utf-8")
    for given, length in (("", 1024), ("max_length=None,", None), ("max_length=99,", 99)):
        (tmp_path / "train.py").write_text(text.replace("max_length=256,", given), encoding="utf-8")
        draft = import_config("trl", tmp_path / "train.py").draft
        assert draft.get("data.max_length") == length
        assert [note.text for note in draft.differs if note.key == "max_length"] == [
            NO_LIMIT_NOTE if length is None else TRUNCATION_NOTE
        ]


def test_arguments_that_choose_rows_of_a_data_set_are_listed(tmp_path: Path) -> None:
    start = (
        "from trl import SFTTrainer\nfrom peft import LoraConfig\nfrom datasets import load_dataset\nSFTTrainer('m', "
    )
    end = ", peft_config=LoraConfig(target_modules='all-linear'))\n"
    for arguments, data, listed in (
        ("'own/rows', data_dir='extra', split='train'", None, ["load_dataset.data_dir"]),
        ("'parquet', data_dir='folder'", None, ["load_dataset.data_dir"]),
        ("'own/rows', split='train', num_proc=4, streaming=True", "own/rows", []),
        ("'json', data_files='a.json', field='rows'", "a.json", ["load_dataset.field"]),
    ):
        (tmp_path / "train.py").write_text(f"{start}train_dataset=load_dataset({arguments}){end}", encoding="utf-8")
        draft = import_config("trl", tmp_path / "train.py").draft
        assert draft.get("data.train") in (data, data and str(tmp_path / data)), draft.get("data.train")
        assert [note.key for note in draft.unsupported if "load_dataset" in note.key] == listed


REFUSED = {
    "axolotl": ("base_model: m\nadapter: llama-adapter\n", "adapter"),
    "llamafactory": ("model_name_or_path: m\nfinetuning_type: freeze\n", "finetuning_type"),
    "swift": ("model: m\ntuner_type: longlora\n", "tuner_type"),
    "torchtune": ("tokenizer: {}\n", "no model is given"),
    "trl": ("from trl import GRPOConfig\nargs = GRPOConfig()\n", "GRPOConfig"),
    "unsloth": ("from trl import SFTConfig\nargs = SFTConfig()\n", "get_peft_model"),
}


FULL = {
    "axolotl": "base_model: m\ndatasets: [{path: rows.jsonl, type: alpaca}]\nlearning_rate: 2e-5\nbf16: true\n",
    "llamafactory": "model_name_or_path: m\nfinetuning_type: full\nlearning_rate: 2.0e-5\npure_bf16: true\n",
    "swift": "model: m\ntuner_type: full\nlearning_rate: 2e-5\n",
    "torchtune": (
        "model: {_component_: torchtune.models.llama3.llama3_8b}\ncheckpointer: {checkpoint_dir: m}\n"
        "optimizer: {_component_: torch.optim.AdamW, lr: 2e-5}\n"
    ),
    "trl": (
        "from trl import SFTConfig, SFTTrainer\nargs = SFTConfig(learning_rate=2e-5)\n"
        "trainer = SFTTrainer(model='m', args=args, train_dataset=None)\n"
    ),
    "unsloth": (
        "from unsloth import FastLanguageModel\nfrom trl import SFTConfig, SFTTrainer\n"
        "model, tokenizer = FastLanguageModel.from_pretrained('m', full_finetuning=True)\n"
        "trainer = SFTTrainer(model=model, args=SFTConfig(learning_rate=2e-5), train_dataset=None)\n"
    ),
}


@pytest.mark.parametrize("peer", IMPORTERS)
def test_configs_that_train_all_weights(peer: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text(FULL[peer], encoding="utf-8")
    done = import_config(peer, file)
    recipe = done.resolved.recipe
    assert (recipe.train.method, recipe.model.quantization, recipe.train.learning_rate) == ("full", "none", 2e-5)
    assert not any(name.startswith("lora.") for name in done.draft.fields)
    assert "weights" in {note.key for note in done.draft.differs}


@pytest.mark.parametrize("peer", IMPORTERS)
def test_configs_of_other_methods_are_refused(peer: str, tmp_path: Path) -> None:
    text, expected = REFUSED[peer]
    file = tmp_path / "file"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=expected):
        import_config(peer, file)
    file.write_text("][", encoding="utf-8")
    with pytest.raises(InputError, match=r"not YAML|not Python"):
        import_config(peer, file)
    file.write_text(f"a: {'[' * 5000}" if peer not in ("trl", "unsloth") else f"a = {'-' * 100_000}1", encoding="utf-8")
    with pytest.raises(InputError, match=r"too deep"):
        import_config(peer, file)
    with pytest.raises(InputError, match="cannot be read"):
        import_config(peer, tmp_path / "none")


@pytest.mark.parametrize("out", ["nowhere/x.yaml", "there.yaml/x.yaml", "there.yaml", "."])
def test_unwritable_output_exits_with_2(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("base_model: a/b\nadapter: lora\ndatasets: [{path: rows.jsonl, type: alpaca}]\n")
    (tmp_path / "there.yaml").write_text("mine")
    code, _, err = run("import", "axolotl", config, "--out", f"{tmp_path}/{out}", capsys=capsys)
    assert code == 2 and "error: " in err and (tmp_path / "there.yaml").read_text() == "mine"


def test_unknown_tool_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean axolotl"):
        import_config("axolotle", tmp_path)


def test_script_values_are_read_only_if_assigned_once(tmp_path: Path) -> None:
    file = tmp_path / "s.py"
    file.write_text(
        "a = 1\nb = 1\nb = 2\nc = f()\nif a:\n    d = 4\n"
        "f(a, b, c, d, [a, 2], 'x' + 'y', a / 4, f'{a}-x', 'x' * 9, 2 ** 9, a + c, f'{c}', 1 / 0, f'{a:02d}')\n",
        encoding="utf-8",
    )
    script = Script(file)
    call = script.calls[-1]
    read = [script.value(node) for node in call.arguments]
    assert read == [1, UNREADABLE, UNREADABLE, UNREADABLE, [1, 2], "xy", 0.25, "1-x", *[UNREADABLE] * 6]


def test_missing_dataset_info_leaves_data_train_missing(tmp_path: Path, tiny_folder: Path) -> None:
    path = written("llamafactory-sft.yaml", tmp_path, tiny_folder)
    (tmp_path / "dataset_info.json").unlink()
    imported_config = import_config("llamafactory", path)
    assert imported_config.missing == ["data.train"] and "dataset" in {
        note.key for note in imported_config.draft.unsupported
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(imported_config.to_yaml(), encoding="utf-8")
    with pytest.raises(RecipeError, match="data is required") as raised:
        resolve(recipe)
    assert "data.train" in raised.value.lines()[0]
    assert resolve(recipe, {"data": "rows.jsonl"}).recipe.data.train == "rows.jsonl"


UNSLOTH_VISION = """
from unsloth import FastVisionModel
from unsloth.trainer import UnslothVisionDataCollator
from trl import SFTConfig, SFTTrainer
model, processor = FastVisionModel.from_pretrained("m", load_in_4bit=True, use_gradient_checkpointing="unsloth")
model = FastVisionModel.get_peft_model(model, finetune_language_layers=True{})
trainer = SFTTrainer(
    model=model, data_collator=UnslothVisionDataCollator(model, processor), args=SFTConfig(output_dir="out"),
)
"""


@pytest.mark.parametrize(
    ("flag", "vision"),
    [("", "all"), (", finetune_vision_layers=True", "all"), (", finetune_vision_layers=False", None)],
)
def test_trained_image_encoder_of_unsloth(flag: str, vision: str | None, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(UNSLOTH_VISION.format(flag), encoding="utf-8")
    draft = import_config("unsloth", tmp_path / "train.py").draft
    assert draft.get("lora.vision") == vision
    assert (IN_FULL_NOTE in [note.text for note in draft.differs]) == (vision == "all")
    assert not {"finetune_vision_layers", "finetune_language_layers"} & {note.key for note in draft.unsupported}
    assert not any("collator" in note.key or "checkpointing" in note.key for note in draft.unsupported)


def test_refused_values_are_named_by_the_keys_of_their_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    lines = [
        "base_model: m",
        "datasets: [{path: a.jsonl, type: alpaca}]",
        "adapter: lora",
        "lora_r: 0",
        "learning_rate: -1",
    ]
    file.write_text("\n".join([*lines, "micro_batch_size: 2"]), encoding="utf-8")
    with pytest.raises(RecipeError) as raised:
        import_config("axolotl", file)
    text = str(raised.value)
    assert "lora_r: must be at least 1 (got 0)" in text and "learning_rate: must be above 0 (got -1)" in text
    assert str(file) in text and "lora.r" not in text and "--" not in text


UNSLOTH_TEXT = """
from unsloth import FastLanguageModel
from unsloth.chat_templates import train_on_responses_only
from trl import SFTConfig, SFTTrainer
MASKED, OTHER = False, True
model, tokenizer = FastLanguageModel.from_pretrained("m")
model = FastLanguageModel.get_peft_model(model)
rows = load_dataset("json", data_files="a.jsonl", split="train")
{rows}
trainer = SFTTrainer(model=model, train_dataset=rows, args=SFTConfig(output_dir="out"))
{mask}
trainer.train()
"""


@pytest.mark.parametrize(
    ("mask", "is_masked", "is_conditional"),
    [
        ("{call}", True, False), ("if MASKED:\n    {call}", False, False), ("if False:\n    {call}", False, False),
        ("if not MASKED:\n    {call}", True, False), ("{call} if MASKED else trainer", False, False),
        ("if MASKED:\n    pass\nelse:\n    {call}", True, False), ("if ask():\n    {call}", True, True),
        ("{call} if ask() else trainer", True, True), ("def masked():\n    {call}", True, True),
        ("def masked():\n    {call}\nmasked()", True, False),
    ],
)  # fmt: skip
def test_calls_in_branches_are_left_out_or_reported(
    mask: str, is_masked: bool, is_conditional: bool, tmp_path: Path
) -> None:
    text = UNSLOTH_TEXT.format(rows="", mask=mask.format(call="trainer = train_on_responses_only(trainer)"))
    (tmp_path / "train.py").write_text(text, encoding="utf-8")
    notes = import_config("unsloth", tmp_path / "train.py").draft.differs
    assert any("without assistant_only_loss" in note.text for note in notes) != is_masked
    conditions = [note.key for note in notes if note.text.endswith("depends on a condition")]
    assert conditions == ["train_on_responses_only"] * is_conditional


@pytest.mark.parametrize(("condition", "file"), [("False", "a"), ("MASKED", "a"), ("OTHER", "b"), ("ask()", "b")])
def test_data_sets_in_branches_are_left_out_or_reported(condition: str, file: str, tmp_path: Path) -> None:
    other = f'if {condition}:\n    rows = load_dataset("json", data_files="b.jsonl", split="train")'
    (tmp_path / "train.py").write_text(UNSLOTH_TEXT.format(rows=other, mask=""), encoding="utf-8")
    draft = import_config("unsloth", tmp_path / "train.py").draft
    assert draft.get("data.train") == f"{file}.jsonl"
    conditions = [note.key for note in draft.differs if note.text.endswith("depends on a condition")]
    assert conditions == ["load_dataset"] * (condition == "ask()")


@pytest.mark.parametrize(
    ("lines", "vision"),
    [
        ("freeze_vision_tower: false\n", "all"), ("freeze_multi_modal_projector: false\n", "projector"),
        ("freeze_vision_tower: false\nfreeze_multi_modal_projector: false\n", "all"),
        ("freeze_vision_tower: true\n", None), ("", None),
    ],
)  # fmt: skip
def test_trained_image_encoder_of_llamafactory(lines: str, vision: str | None, tmp_path: Path) -> None:
    entry = {
        "file_name": "rows.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps({"seen": entry}), encoding="utf-8")
    config = f"model_name_or_path: m\ndataset: seen\ndataset_dir: .\nmedia_dir: pictures\n{lines}"
    (tmp_path / "a.yaml").write_text(config, encoding="utf-8")
    draft = import_config("llamafactory", tmp_path / "a.yaml").draft
    assert draft.get("lora.vision") == vision and draft.get("data.image_folder") == "pictures"
    assert not draft.unsupported


@pytest.mark.parametrize(
    ("lines", "vision", "differs", "unsupported"),
    [
        ("freeze_multi_modal_projector: false\n", "projector", [PROJECTOR_NOTE], []),
        ("freeze_language_model: false\n", None, [], []),
        ("freeze_language_model: true\n", None, [], ["freeze_language_model"]),
        ("finetuning_type: full\nfreeze_vision_tower: false\n", None, [], ["freeze_vision_tower"]),
    ],
)
def test_frozen_parts_of_llamafactory(
    lines: str, vision: str | None, differs: list[str], unsupported: list[str], tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text(f"model_name_or_path: m\n{lines}", encoding="utf-8")
    draft = import_config("llamafactory", tmp_path / "a.yaml").draft
    assert draft.get("lora.vision") == vision
    assert [note.text for note in draft.differs if "projector" in note.text] == differs
    assert [note.key for note in draft.unsupported] == unsupported


def test_flags_and_the_collator_of_unsloth_for_images(tmp_path: Path) -> None:
    code = UNSLOTH_VISION.format(", finetune_mlp_modules=False")
    mask = "(model, processor, train_on_responses_only=True, instruction_part='a', response_part='b', resize=512)"
    code = code.replace("Collator(model, processor)", f"Collator{mask}")
    (tmp_path / "train.py").write_text(code, encoding="utf-8")
    draft = import_config("unsloth", tmp_path / "train.py").draft
    assert any("finetune_mlp_modules leave out layers of the encoder too" in note.text for note in draft.differs)
    assert [note.key for note in draft.unsupported] == ["UnslothVisionDataCollator.resize"]
    assert not any("trains on all tokens" in note.text for note in draft.differs)
