"""Training scripts for TRL or Unsloth, and TRL's YAML, as a recipe. Names and defaults as of TRL 1.10 and Unsloth of
August 2026."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from strop.errors import InputError, RecipeError
from strop.interop.draft import Draft, Keys, read_yaml, shown
from strop.interop.hf_arguments import (
    CUTS_THE_END,
    NO_GRPO,
    NO_LIMIT,
    OWN_WAY,
    lora,
    no_dropout,
    number,
    packing,
    simpo,
    training_arguments,
    whole,
)
from strop.interop.script_parser import Script, keys_of, text_of
from strop.interop.trl_data import WRITE_ROWS, read_rows
from strop.interop.trl_model import MODEL_WAYS, NO_TARGETS, read_adapter, read_model, types

CONFIGS = {
    "SFTConfig": "sft", "TrainingArguments": "sft", "UnslothTrainingArguments": "sft", "DPOConfig": "dpo",
    "KTOConfig": "kto", "ORPOConfig": "orpo", "CPOConfig": "simpo", "RewardConfig": "reward",
}  # fmt: skip
TRAINERS = (
    "SFTTrainer",
    "DPOTrainer",
    "KTOTrainer",
    "ORPOTrainer",
    "CPOTrainer",
    "RewardTrainer",
    "Trainer",
    "UnslothTrainer",
)
NOT_HERE = (
    "GRPOConfig", "PPOConfig", "RLOOConfig", "BCOConfig", "OnlineDPOConfig", "NashMDConfig", "XPOConfig", "GKDConfig",
    "PRMConfig",
)  # fmt: skip
RATES = {"sft": 2e-5, "reward": 1e-4}  # else 1e-6
LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "simpo": "simpo"}
DEFAULTS = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear", "optim": "adamw_torch", "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 42,
}  # fmt: skip
STOPS_EARLY = "EarlyStoppingCallback"
_MESSAGES = ("dataset_text_field", "messages")
ON_ALL = (
    "rows of `messages` and of `text` are trained on in full there unless assistant_only_loss is on, prompt and "
    "completion on the completion; strop trains on answers: data.loss all trains on everything"
)


def read(path: Path, peer: str) -> Draft:
    """peer: trl or unsloth. Raises InputError where no training is found, or one that strop does not have."""
    draft = Draft(peer, path)
    if peer == "trl" and path.suffix in (".yaml", ".yml"):
        return _from_yaml(draft)
    script = Script(path)
    refused = [call for call in script.calls if call.name in NOT_HERE]
    if refused and refused[0].name == "GRPOConfig":
        raise InputError(f"{path}:{refused[0].line}: GRPOConfig: {NO_GRPO[0]}", fix=NO_GRPO[1])
    if refused:
        what = f"{path}:{refused[0].line}: {refused[0].name}: strop has no such objective"
        raise InputError(what, fix="it has sft, dpo, ipo, kto, orpo, simpo and reward")
    configs = [call for call in script.calls if call.name in CONFIGS]
    if not configs:
        raise InputError(
            f"{path}: no {', '.join(CONFIGS)} is made in it",
            fix="give the script that trains; where TrlParser or HfArgumentParser makes them, put the options of your "
            "command into a YAML file, which `strop import trl` reads too",
        )
    for call in configs[1:]:
        draft.lack(call.name, "a second one; the first was read", call.line)
    keys_of_trainer, trainer_line = _trainer(draft, script)
    read_model(draft, script, keys_of_trainer.pop("model", None), trainer_line)
    read_adapter(draft, script)
    config = configs[0]
    keys = keys_of(draft, script, config)
    objective = CONFIGS[config.name]
    _arguments(draft, keys, objective, peer)
    read_rows(draft, script, keys_of_trainer)
    _masks(draft, script, keys, objective)
    _callbacks(draft, script, keys_of_trainer.get("callbacks"), keys.peek("metric_for_best_model"))
    keys.end(draft, OWN_WAY)
    for call in script.calls:
        node = call.keywords.get("resume_from_checkpoint")
        if call.name == "train" and node is not None and script.value(node) not in (None, False):
            draft.lack("resume_from_checkpoint", "a run of strop goes on with `strop resume RUN`", call.line)
    for name, (value, line) in script.defaults.items():
        draft.differ(name, f"{value}: the default of the script's own option; if you give another, set it here", line)
    return draft


def _trainer(draft: Draft, script: Script) -> tuple[dict[str, ast.expr], float]:
    """The arguments of the trainer's call, and its line."""
    own = {name: (base, line) for name, base, line in script.derived(TRAINERS)}
    for name, (base, line) in own.items():
        draft.lack(name, f"a class made from {base}: what its own code does is not here", line)
    made = [call for call in script.calls if call.name in TRAINERS or call.name in own]
    if not made:
        draft.lack(
            "trainer", f"no {', '.join(TRAINERS)} is called: rows and model are taken from the rest of the script"
        )
        return {}, float("inf")
    call = made[0]
    keywords = {**dict(zip(("model",), call.arguments, strict=False)), **call.keywords}
    for node in call.unpacked:
        draft.lack(f"{call.name}(**...)", f"{text_of(node)}: not a literal map, and nothing is run", node.lineno)
    for key in ("args", "peft_config", "tokenizer", "processing_class"):
        keywords.pop(key, None)
    for key, node in keywords.items():
        if key in ("model", "train_dataset", "eval_dataset", "dataset_num_proc", "callbacks"):
            continue
        value = script.value(node)
        if key == "data_collator" and _answers_alone(script):
            draft.skip(key, "loss on the answers alone, as here", node.lineno)
        elif key == "formatting_func":
            draft.lack(
                key, f"{text_of(node)}: rows are written as text by code, which is not run: {WRITE_ROWS}", node.lineno
            )
        elif key in ("max_seq_length", "max_length") and isinstance(value, int):
            draft.put("data.max_length", value, key)
        elif key == "dataset_text_field" and isinstance(value, str) and value not in ("text", "messages"):
            draft.put("data.columns", {"text": value}, key)
        elif key == "packing" and value is True:
            packing(draft, key)
        elif value is not None and (key, value) not in (("packing", False), ("dataset_text_field", "text"), _MESSAGES):
            draft.lack(f"{call.name}.{key}", text_of(node), node.lineno)
    return keywords, call.line


def _callbacks(draft: Draft, script: Script, node: ast.expr | None, best_by: Any) -> None:
    """transformers' early stopping is a field here; what another callback does is code. best_by: what is watched."""
    given = script.listed(node) if node is not None and script.value(node) is not None else []
    given += [one for call in script.calls if call.name == "add_callback" for one in call.arguments]
    for one in map(script.stands_for, given):
        if ast.unparse(one.func if isinstance(one, ast.Call) else one).rpartition(".")[2] != STOPS_EARLY:
            draft.lack("callbacks", f"{text_of(one)}: its code is not run", one.lineno)
        elif not isinstance(one, ast.Call):
            draft.put("train.early_stopping", 1, STOPS_EARLY)
    for call in script.calls:
        if call.name == STOPS_EARLY:
            keys = keys_of(draft, script, call, ("early_stopping_patience", "early_stopping_threshold"))
            patience = whole("early_stopping_patience", keys.take("early_stopping_patience", 1))
            draft.put("train.early_stopping", patience, keys.default("early_stopping_patience", STOPS_EARLY))
            if threshold := keys.take("early_stopping_threshold"):
                draft.lack("early_stopping_threshold", f"{shown(threshold)}: any better loss counts here", call.line)
            if best_by not in (None, "loss", "eval_loss"):
                draft.differ(STOPS_EARLY, f"{shown(best_by)} is watched there, the loss here", call.line)


def _answers_alone(script: Script) -> bool:
    names = ("DataCollatorForCompletionOnlyLM", "train_on_responses_only")
    return any(call.name in names for call in script.calls)


def _arguments(draft: Draft, keys: Keys, objective: str, peer: str) -> None:
    loss = keys.take("loss_type")
    loss = loss[0] if isinstance(loss, list) and len(loss) == 1 else loss
    if objective in ("dpo", "simpo") and loss is not None:
        if not isinstance(loss, str) or loss not in LOSSES:
            raise RecipeError(
                f"{draft.file}: loss_type {shown(loss)}: strop has no such objective", fix="sigmoid, ipo or simpo"
            )
        objective = LOSSES[loss]
    elif objective == "simpo":
        raise RecipeError(
            f"{draft.file}: CPO: strop has no such objective", fix="it has simpo: loss_type simpo, cpo_alpha 0"
        )
    elif loss not in (None, "nll", "chunked_nll", "kto"):
        raise RecipeError(
            f"{draft.file}: loss_type {shown(loss)}: strop has no such objective", fix="leave it out there"
        )
    if objective != "sft":
        draft.put("train.objective", objective, "the config's class")
    rate = 5e-5 if objective == "sft" and peer == "unsloth" else RATES.get(objective, 1e-6)
    training_arguments(
        draft, keys, {**DEFAULTS, "learning_rate": rate}, said="trl" if peer == "trl" else "transformers"
    )
    for key, name, used in (
        ("beta", "train.beta", ("dpo", "ipo", "kto", "orpo", "simpo")),
        ("label_smoothing", "train.label_smoothing", ("dpo", "simpo")),
        ("desirable_weight", "train.desirable_weight", ("kto",)),
        ("undesirable_weight", "train.undesirable_weight", ("kto",)),
    ):
        if (value := keys.take(key)) is not None and objective in used:
            draft.put(name, number(value), key)
        elif value:
            draft.lack(key, f"{shown(value)}: not read by {objective}")
    if objective == "simpo":
        simpo(draft, keys)
    elif gamma := keys.take("simpo_gamma"):
        draft.lack("simpo_gamma", f"{gamma}: not read by {objective}")
    if isinstance(made := keys.take("model_init_kwargs"), dict):
        more = Keys(made)
        types(draft, more.take("dtype") or more.take("torch_dtype"))
        if (revision := more.take("revision")) is not None:
            draft.put("model.revision", str(revision), "model_init_kwargs.revision")
        more.end(draft, MODEL_WAYS)
    length = keys.take("max_length", keys.take("max_seq_length"))
    if length is not None:
        draft.put("data.max_length", whole("max_length", length), "max_length")
    elif draft.get("data.max_length") is None and "max_length" not in keys.none:
        draft.put("data.max_length", 1024, "trl's default")
    draft.differ("max_length", CUTS_THE_END if draft.get("data.max_length") is not None else NO_LIMIT)
    keys.take("truncation_mode")
    if keys.take("disable_dropout", True):
        no_dropout(draft, "lora_dropout")
    if keys.take("packing"):
        packing(draft, "packing")
    column = keys.take("dataset_text_field", "text")
    if column not in ("text", "messages"):
        draft.put("data.columns", {"text": str(column)}, "dataset_text_field")
    if str(keys.peek("chat_template_path", "")).endswith((".jinja", ".j2")):
        draft.put("data.template", str(keys.take("chat_template_path")), "chat_template_path")


def _masks(draft: Draft, script: Script, keys: Keys, objective: str) -> None:
    """Which tokens are trained on."""
    only, completion = keys.take("assistant_only_loss"), keys.take("completion_only_loss")
    masked = _answers_alone(script)
    if objective != "sft" or only or completion or masked:
        return
    if completion is False:
        draft.put("data.loss", "all", "completion_only_loss")
    else:
        draft.differ("assistant_only_loss", ON_ALL)


def _from_yaml(draft: Draft) -> Draft:
    """What `trl sft --config FILE` reads: the arguments of script, training and model in one map."""
    keys = Keys(read_yaml(draft.file))
    if not keys.take("use_peft"):
        raise InputError(
            f"{draft.file}: use_peft is not on: strop trains LoRA adapters alone", fix="set use_peft: true"
        )
    for key, name in (
        ("model_name_or_path", "model.name"),
        ("dataset_name", "data.train"),
        ("model_revision", "model.revision"),
    ):
        if (value := keys.take(key)) is not None and value != "main":
            draft.put(name, str(value), key)
    types(draft, keys.take("dtype") or keys.take("torch_dtype"))
    named = "lora_target_modules" in keys
    lora(draft, keys, rank="lora_r", alpha="lora_alpha", dropout="lora_dropout", modules="lora_target_modules",
         defaults={"lora.r": 16, "lora.alpha": 32, "lora.dropout": 0.05})  # fmt: skip
    if not named:
        draft.differ("lora_target_modules", NO_TARGETS)
    if keys.take("load_in_4bit"):
        draft.put("model.quantization", keys.take("bnb_4bit_quant_type", "nf4"), "load_in_4bit")
        draft.put("model.double_quantization", bool(keys.take("use_bnb_nested_quant", False)), "use_bnb_nested_quant")
    else:
        draft.put("model.quantization", "int8" if keys.take("load_in_8bit") else "none", "load_in_8bit")
    if saved := keys.take("lora_modules_to_save"):
        draft.put("lora.modules_to_save", saved, "lora_modules_to_save")
    if (split := keys.take("dataset_train_split", "train")) != "train":
        draft.lack("dataset_train_split", f"{split}: strop takes the files of the train split: name those of {split}")
    if str(keys.peek("eval_strategy", "no")) not in ("no", "False"):
        split = keys.take("dataset_test_split", "test")
        draft.lack("dataset_test_split", f"evaluated on {split} there: give data.eval its file, or a share such as 5%")
    loss = str(keys.peek("loss_type", ""))
    objective = "dpo" if "beta" in keys or loss in ("sigmoid", "ipo") else "sft"
    draft.differ(
        "the command", f"a config does not say whether it is for `trl sft` or `trl dpo`: taken for {objective}"
    )
    _arguments(draft, keys, objective, "trl")
    only, completion = keys.take("assistant_only_loss"), keys.take("completion_only_loss")
    if objective == "sft" and not only and not completion:
        draft.differ("assistant_only_loss", ON_ALL)
    keys.end(draft, (*OWN_WAY, *MODEL_WAYS, "dataset_test_split", "lora_task_type"))
    return draft
