"""Import TRL and Unsloth scripts, and TRL YAML files. Names and defaults: TRL 1.10 and 1.16, Unsloth 2026.10.9."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from typing import Any

from strop.errors import InputError, RecipeError
from strop.interop import distillation, sentence_transformers, trl_grpo
from strop.interop.draft import (
    IGNORED_KEYS,
    IN_FULL_NOTE,
    LINE_BREAK_NOTE,
    Draft,
    Keys,
    as_int,
    format_value,
    grpo_error,
)
from strop.interop.script_parser import (
    UNREADABLE,
    Call,
    Script,
    find_passed,
    read_arguments,
    report_expression,
    report_unpacked,
)
from strop.interop.trl_data import LOADERS, SAVE_ROWS_FIX, read_rows

CONFIGS = {
    "SFTConfig": "sft", "TrainingArguments": "sft", "UnslothTrainingArguments": "sft", "DPOConfig": "dpo",
    "KTOConfig": "kto", "ORPOConfig": "orpo", "CPOConfig": "simpo", "RewardConfig": "reward",
    sentence_transformers.ARGUMENTS: "embed", trl_grpo.CONFIG: "grpo", **distillation.TRL_KINDS,
}  # fmt: skip
PLAIN_ARGUMENTS = ("TrainingArguments", sentence_transformers.ARGUMENTS)  # with the defaults of transformers
TRAINERS = (
    "SFTTrainer", "DPOTrainer", "KTOTrainer", "ORPOTrainer", "CPOTrainer", "RewardTrainer", "Trainer", "UnslothTrainer",
    sentence_transformers.TRAINER, trl_grpo.TRAINER, *distillation.TRL_TRAINERS,
)  # fmt: skip
UNSUPPORTED_CONFIGS = (
    "PPOConfig", "RLOOConfig", "BCOConfig", "OnlineDPOConfig", "NashMDConfig", "XPOConfig", "PRMConfig",
)  # fmt: skip
LEARNING_RATES = {"sft": 2e-5, "reward": 1e-4}  # defaults by objective; 1e-6 for the other objectives
LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "simpo": "simpo"}
DEFAULTS = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear", "optim": "adamw_torch", "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 42,
}  # fmt: skip
# Unsloth replaces these defaults of TRL's configs (unsloth/models/rl.py), but not those of TrainingArguments
UNSLOTH_DEFAULTS = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 5e-5, "warmup_steps": 0.1,
    "optim": "adamw_8bit", "weight_decay": 0.001, "seed": 3407,
}  # fmt: skip
CLASSIFIER = "ForSequenceClassification"  # in the name of a model's class
CLASSIFIER_NOTE = (
    "transformers keeps the start of a long text; strop refuses it, or keeps its end (data.overlong truncate-start). "
    "The columns with text and label are those that strop detects, or set data.columns"
)
EARLY_STOPPING = "EarlyStoppingCallback"
TRAINER_ARGUMENTS = (
    "model", "args", "peft_config", "tokenizer", "processing_class", "train_dataset", "eval_dataset", "callbacks",
    "quantization_config", "loss", "teacher_model",
)  # fmt: skip
# order of the trainers' arguments after `model`, and `ref_model` if they have one
TRAINER_POSITIONS = ("args", "data_collator", "train_dataset", "eval_dataset")
OTHER_POSITIONS: dict[str, tuple[str, ...]] = {
    sentence_transformers.TRAINER: ("args", "train_dataset", "eval_dataset", "loss", "evaluator", "data_collator"),
    trl_grpo.TRAINER: trl_grpo.POSITIONS, **distillation.POSITIONS,
}  # fmt: skip
# arguments of the trainer that are code; the rest are those of its config, where older versions of TRL had them here
_CODE_ARGUMENTS = (
    "compute_loss_func", "compute_metrics", "data_collator", "formatting_func", "model_init", "optimizers",
    "optimizer_cls_and_kwargs", "preprocess_logits_for_metrics", "ref_model", "evaluator",
)  # fmt: skip
_ANSWERS_ONLY = "assistant_only_loss"
LOSS_ON_ALL_NOTE = (
    "without assistant_only_loss, TRL trains on all tokens of `messages` and `text` rows, and on the completion of "
    "prompt-completion rows, with a line break that the template has after its stop token; strop trains on assistant "
    "turns up to their stop token: set data.loss all to train on everything"
)


def read(draft: Draft) -> None:
    """Import a script for TRL or Unsloth, or a TRL YAML. Raises InputError for unsupported training."""
    path = draft.file
    if draft.tool == "trl" and path.suffix in (".yaml", ".yml"):
        _read_yaml(draft)
        return
    script = Script(path)
    for call in script.calls:
        if call.name in (trl_grpo.CONFIG, trl_grpo.TRAINER) and not trl_grpo.has_environment(script):
            raise grpo_error(f"{path}:{call.line}: {call.name}")
        if call.name in UNSUPPORTED_CONFIGS:
            fix = "use sft, dpo, ipo, kto, orpo, simpo, reward or gkd"
            raise InputError(f"{path}:{call.line}: {call.name}: not an objective of strop", fix=fix)
    trainer_arguments, trainer, trainer_class = _read_trainer(draft, script)
    config, objective = _find_config(draft, script, trainer_arguments, trainer, trainer_class)
    _read_model(draft, script, trainer_arguments, config, trainer)
    start_seed = _read_adapter(draft, script, trainer_arguments, objective)
    known = (*TRAINER_ARGUMENTS, *_CODE_ARGUMENTS, *(trl_grpo.CODE_ARGUMENTS if objective == "grpo" else ()))
    moved = {key: node for key, node in trainer_arguments.items() if key not in known}
    given = {**moved, **config.keywords}
    for name in sentence_transformers.IGNORED_ARGUMENTS:
        if given.pop(name, None) is not None:
            draft.add_ignored(name)
    keys = read_arguments(draft, script, replace(config, keywords=given), ("output_dir",))
    loads_classifier = any(CLASSIFIER in call.owner for call in script.calls if call.name == "from_pretrained")
    if objective == "sft" and loads_classifier:
        objective = "classify"
    loss_type = keys.take("loss_type") if objective == "grpo" else None
    if objective in distillation.TOOLS:
        _read_distillation(draft, keys, objective)
    else:
        _read_config(draft, keys, objective, is_plain=config.name in PLAIN_ARGUMENTS)
    if objective == "grpo":
        trl_grpo.read_config(draft, keys, loss_type)
        trl_grpo.read_code(draft, script, trainer_arguments)
    if objective == "embed":
        sentence_transformers.read_loss(draft, script, trainer_arguments.get("loss"))
    draft.note_seed("random_state", start_seed)
    read_rows(draft, script, trainer_arguments)
    if objective not in distillation.TOOLS:
        _read_loss_mask(draft, keys, objective, masked_by_collator=_masks_prompts(script))
    _report_masks(draft, script)
    _report_tokenizer(draft, script)
    _read_callbacks(draft, script, trainer_arguments.get("callbacks"))
    keys.report_rest(draft, (*IGNORED_KEYS, *(distillation.IGNORED_KEYS if objective in distillation.TOOLS else ())))
    for call in script.calls:
        node = call.keywords.get("resume_from_checkpoint")
        if call.name == "train" and node is not None and script.value(node) not in (None, False):
            draft.add_unsupported("resume_from_checkpoint", "use `strop resume RUN`", call.line)
    _report_conditions(draft, script)
    for name, (value, line) in script.used_defaults.items():
        draft.add_difference(name, f"{value}: the default of a script option; if you pass another value, set it", line)


def _report_conditions(draft: Draft, script: Script) -> None:
    """Report calls that were read and run under a condition, where this was not said yet."""
    read = (*_MASKS, *LOADERS, *CONFIGS, *TRAINERS, "from_pretrained", "get_peft_model", "LoraConfig")
    said = {note.line for note in draft.differs if note.text.endswith("a condition")}
    for call in script.calls:
        if call.is_conditional and call.name in read and call.line not in said and "Tokenizer" not in call.owner:
            draft.add_difference(call.name, f"line {call.line} is read, but whether it runs depends on a condition")


def _report_tokenizer(draft: Draft, script: Script) -> None:
    """Report a tokenizer that is not the model's, or has options."""
    for call in script.calls:
        if call.name == "from_pretrained" and "Tokenizer" in call.owner:
            name = script.value(call.arguments[0]) if call.arguments else None
            if isinstance(name, str) and name != draft.get("model.name") and draft.get("model.name"):
                draft.add_unsupported(call.owner, f"{name}: strop uses the model's tokenizer and template", call.line)
            for key in ("add_eos_token", "add_bos_token", "chat_template"):
                if key in call.keywords:
                    report_expression(draft, f"{call.owner}.{key}", call.keywords[key], "not supported")


def _read_trainer(draft: Draft, script: Script) -> tuple[dict[str, ast.expr], Call | None, str]:
    """Return the arguments of the trainer's constructor, the call, and the name of TRL's class."""
    custom_trainers = script.find_subclasses(TRAINERS)
    for name, base, line in custom_trainers:
        draft.add_unsupported(name, f"derived from {base}; its code is not executed", line)
    names = (*TRAINERS, *(name for name, _, _ in custom_trainers))
    trainers = [call for call in script.calls if call.name in names]
    if not trainers:
        draft.add_unsupported("trainer", "no trainer is created; data and model are read from the rest of the script")
        return {}, None, ""
    call = trainers[0]
    for other in trainers[1:]:
        draft.add_unsupported(other.name, "another trainer; only the first is imported", other.line)
    runs = [other for other in script.calls if other.name == "train" and other.owner == call.assigned_to != ""]
    script.last_line = min([float("inf") if call.assigned_to else call.line, *(run.line for run in runs)])
    for run in runs[1:]:
        draft.add_unsupported("train", "called again; only what is set before the first call is imported", run.line)
    base = next((base for name, base, _ in custom_trainers if name == call.name), call.name)
    positions = OTHER_POSITIONS.get(base, TRAINER_POSITIONS)
    names = ("model", *(("ref_model",) if base in ("DPOTrainer", "KTOTrainer") else ()), *positions)
    arguments = {**dict(zip(names, call.arguments, strict=False)), **call.keywords}
    report_unpacked(draft, call)
    collator = _vision_collator(script)
    for name, value in () if collator is None else collator.keywords.items():
        if name not in _VISION_MASK:
            report_expression(draft, f"UnslothVisionDataCollator.{name}", value, "not supported")
    for key, node in arguments.items():
        if key == "data_collator" and _masks_prompts(script):
            draft.add_ignored(key, "loss on assistant turns only, as in strop by default", node.lineno)
        elif key == "data_collator" and collator is not None:
            draft.add_ignored(key, "strop reads images by itself", node.lineno)
        elif key == "formatting_func":
            report_expression(draft, key, node, f"rows are formatted by code, which is not executed: {SAVE_ROWS_FIX}")
        elif key in _CODE_ARGUMENTS and script.value(node) is not None:
            report_expression(draft, f"{call.name}.{key}", node, "not supported")
    return arguments, call, base


def _find_config(
    draft: Draft, script: Script, arguments: dict[str, ast.expr], trainer: Call | None, trainer_class: str
) -> tuple[Call, str]:
    """Return the config passed to the trainer, or one with TRL's defaults, and the objective. Raises InputError."""
    configs = [call for call in script.calls if call.name in CONFIGS]
    nodes = [arguments["args"]] if "args" in arguments else []
    config = find_passed(draft, script, "args", nodes, configs, elsewhere=trainer is None or bool(trainer.unpacked))
    name = trainer_class.replace("Trainer", "Config")
    name = sentence_transformers.ARGUMENTS if trainer_class == sentence_transformers.TRAINER else name
    if config is None and trainer is not None and not nodes and not trainer.unpacked:
        config = Call(name if name in CONFIGS else "TrainingArguments", "", trainer.line, [], {}, "", [])
    if config is None:
        fix = "give the training script, or the YAML file of its options if TrlParser or HfArgumentParser reads them"
        raise InputError(f"{draft.file}: none of {', '.join(CONFIGS)} is created in it", fix=fix)
    return config, CONFIGS.get(name, "sft") if config.name == "TrainingArguments" else CONFIGS[config.name]


def _read_callbacks(draft: Draft, script: Script, node: ast.expr | None) -> None:
    """Import transformers' EarlyStoppingCallback, and report other callbacks. node: the trainer's `callbacks`."""
    callbacks = script.read_list_items(node) if node is not None and script.value(node) is not None else []
    callbacks += [argument for call in script.calls if call.name == "add_callback" for argument in call.arguments]
    for callback in map(script.resolve_name, callbacks):
        name = ast.unparse(callback.func if isinstance(callback, ast.Call) else callback)
        if name.rpartition(".")[2] != EARLY_STOPPING:
            report_expression(draft, "callbacks", callback, "its code is not executed")
        elif not isinstance(callback, ast.Call):
            draft.put("train.early_stopping", 1, EARLY_STOPPING)
    for call in script.calls:
        if call.name == EARLY_STOPPING:
            keys = read_arguments(draft, script, call, ("early_stopping_patience", "early_stopping_threshold"))
            patience = as_int("early_stopping_patience", keys.take("early_stopping_patience", 1))
            draft.put("train.early_stopping", patience, keys.default_source("early_stopping_patience", EARLY_STOPPING))
            if threshold := keys.take("early_stopping_threshold"):
                draft.add_unsupported("early_stopping_threshold", f"{threshold}: strop has no threshold", call.line)


_VISION_MASK = ("train_on_responses_only", "instruction_part", "response_part")  # of Unsloth's collator
_MASKS = ("DataCollatorForCompletionOnlyLM", "train_on_responses_only")


def _masks_prompts(script: Script) -> bool:
    """Return whether the script limits the loss to assistant turns."""
    collator = _vision_collator(script)
    node = None if collator is None else collator.keywords.get(_VISION_MASK[0])
    is_masked = node is not None and script.value(node) is True
    return is_masked or any(call.name in _MASKS for call in script.calls)


def _vision_collator(script: Script) -> Call | None:
    return next((call for call in script.calls if call.name == "UnslothVisionDataCollator"), None)


def _report_masks(draft: Draft, script: Script) -> None:
    """Report where a mask of assistant turns differs from strop's."""
    for call in script.calls:
        if call.name == _MASKS[0] and "instruction_template" not in call.keywords and len(call.arguments) < 2:
            text = "without instruction_template only the last answer of a row is trained on; strop trains on all"
            draft.add_difference(call.name, text, call.line)
        for key in ("last_response_only", "mask_out_tokens") if call.name == _MASKS[1] else ():
            if key in call.keywords and script.value(call.keywords[key]) not in (False, None):
                report_expression(
                    draft, key, call.keywords[key], "strop trains on all answers, up to their stop tokens"
                )
        if call.name == _MASKS[1]:
            draft.add_difference("stop token", f"unless it is the tokenizer's eos_token: {LINE_BREAK_NOTE}", call.line)


def _read_config(
    draft: Draft, keys: Keys, objective: str, *, is_plain: bool = False, disables_dropout: bool = True
) -> None:
    """Import the keys of an SFTConfig, DPOConfig, ..., except the loss mask.

    is_plain: it is a TrainingArguments. disables_dropout: default of the key `disable_dropout`.
    """
    loss = draft.put_sft_loss(keys, "loss_type", keys.take("loss_type"), "loss_weights")
    what = f"{draft.file}: loss_type {format_value(loss)}: not an objective of strop"
    if objective in ("dpo", "simpo") and loss is not None:
        if not isinstance(loss, str) or loss not in LOSSES:
            raise RecipeError(what, fix="sigmoid, ipo or simpo")
        objective = LOSSES[loss]
    elif objective == "simpo":
        raise RecipeError(f"{draft.file}: CPO: not an objective of strop", fix="use loss_type simpo, cpo_alpha 0")
    elif loss not in (None, "nll", "chunked_nll", "kto"):
        raise RecipeError(what, fix="remove it from the config, which trains with the default loss instead")
    if objective == "classify":
        draft.put("train.objective", objective, CLASSIFIER)
        draft.add_difference("class of a text", CLASSIFIER_NOTE)
    elif objective == "embed":
        draft.put("train.objective", objective, sentence_transformers.TRAINER)
    elif objective != "sft":
        draft.put("train.objective", objective, "the config's class")
        draft.add_difference("stop token", LINE_BREAK_NOTE)
    learning_rate = 5e-5 if is_plain else LEARNING_RATES.get(objective, 1e-6)
    changed = UNSLOTH_DEFAULTS if draft.tool == "unsloth" and not is_plain else {}
    draft.put_training_arguments(keys, {**DEFAULTS, "learning_rate": learning_rate, **changed})
    draft.read_trl_loss(keys, "label_smoothing", "ORPOConfig")
    options = ("beta", "label_smoothing", "desirable_weight", "undesirable_weight")
    draft.put_options(keys, dict(zip(options, options, strict=True)))
    if objective == "simpo":
        draft.put_simpo(keys)
    elif gamma := keys.take("simpo_gamma"):
        draft.add_unsupported("simpo_gamma", f"{gamma}: not used by {objective}")
    if isinstance(init_kwargs := keys.take("model_init_kwargs"), dict):
        model_keys = Keys(init_kwargs)
        _put_dtype(draft, model_keys)
        if (revision := model_keys.take("revision")) is not None:
            draft.put("model.revision", str(revision), "model_init_kwargs.revision")
        model_keys.report_rest(draft, IGNORED_MODEL_KEYS)
    length, source = keys.take("max_length", keys.take("max_seq_length")), "max_length"
    model_length = draft.get("data.max_length")  # set by Unsloth's from_pretrained
    has_default = objective not in ("classify", "embed") and (model_length is None or objective != "sft")
    if length is None and "max_length" not in keys.null_keys and has_default:
        length, source = 1024, keys.default_source("max_length", "trl's default")
    if length is not None and (model_length is None or as_int("max_length", length) < model_length):
        draft.put("data.max_length", as_int("max_length", length), source)
    if keys.take("truncation_mode") == "keep_end" and draft.get("data.max_length") is not None:
        draft.put("data.overlong", "truncate-start", "truncation_mode keep_end")
    else:
        draft.note_max_length("max_length")
    if keys.take("disable_dropout", disables_dropout) and objective != "embed":
        draft.disable_dropout_for_preferences()
    strategy = keys.take("packing_strategy", "bfd")
    if keys.take("packing"):
        draft.note_packing("packing")
        if strategy != "bfd":
            cuts = "TRL cuts rows at the end of a sequence" + ", and they attend to others" * (strategy == "wrapped")
            draft.add_unsupported("packing_strategy", f"{strategy}: {cuts}; strop keeps rows whole and apart")
    if str(keys.peek("chat_template_path", "")).endswith((".jinja", ".j2")):
        draft.put("data.template", str(keys.take("chat_template_path")), "chat_template_path")


def _read_distillation(draft: Draft, keys: Keys, kind: str) -> None:
    """Import the keys of GKDConfig or DistillationConfig."""
    draft.has_teacher = True
    objective, has_rate = distillation.read_gkd(draft, keys, kind), keys.peek("learning_rate") is not None
    is_disabled = bool(keys.take("disable_dropout", kind == "gkd"))
    _read_config(draft, keys, objective, disables_dropout=False)
    if is_disabled:
        draft.put("lora.dropout", 0.0, "disable_dropout")
    distillation.finish_trl(draft, kind, objective, keys, has_rate=has_rate)


def _read_loss_mask(draft: Draft, keys: Keys, objective: str, *, masked_by_collator: bool = False) -> None:
    _read_text_column(draft, keys, objective)
    assistant_only, completion_only = keys.take(_ANSWERS_ONLY), keys.take("completion_only_loss")
    if objective != "embed" and not assistant_only and not masked_by_collator and draft.get("data.columns") is None:
        draft.note_string_rows("prompt")
    if objective != "sft" or assistant_only or completion_only or masked_by_collator:
        return
    if completion_only is False:
        draft.put("data.loss", "all", "completion_only_loss")
    else:
        draft.add_difference(_ANSWERS_ONLY, LOSS_ON_ALL_NOTE)


def _read_text_column(draft: Draft, keys: Keys, objective: str) -> None:
    """Import the column of raw texts, which TRL trains on if rows have no messages and no prompt."""
    column, rows = str(keys.take("dataset_text_field", "text")), draft.read_first_rows()
    if objective != "sft":
        return
    row = {column: ""} if rows is None else dict(*rows[:1])
    turns = row.get("conversations")
    is_chat = "messages" in row or "prompt" in row or (isinstance(turns, list) and "from" in (*turns, {})[0])
    if draft.tool == "unsloth":
        is_chat = {"prompt", "completion"} <= set(row) or ("messages" in row and bool(keys.peek(_ANSWERS_ONLY)))
    if column not in row or is_chat:
        return
    if draft.tool == "unsloth":
        draft.add_difference("dataset_text_field", "texts get no stop token there; in strop each row ends with one")
    if set(row) not in ({"text"}, {"messages"}):  # strop detects these
        draft.put("data.columns", {"text": column}, "dataset_text_field")


def _read_yaml(draft: Draft) -> None:
    """Import a YAML file for `trl sft --config FILE`: script, training and model arguments in one mapping."""
    keys = Keys(draft.read_yaml())
    if not keys.take("use_peft"):
        draft.put_full("use_peft is not set")
    if keys.peek("model_revision") == "main":
        keys.take("model_revision")
    names = {"model_name_or_path": "model.name", "dataset_name": "data.train", "model_revision": "model.revision"}
    draft.put_fields(keys, names, str)
    _put_dtype(draft, keys)
    if "lora_target_modules" not in keys:
        draft.put_default_targets("lora_target_modules")
    defaults = {"lora.r": 16, "lora.alpha": 32, "lora.dropout": 0.05}
    draft.put_lora(keys, "lora_r", "lora_target_modules", defaults)
    if keys.take("load_in_4bit"):
        draft.put("model.quantization", keys.take("bnb_4bit_quant_type", "nf4"), "load_in_4bit")
        draft.put("model.double_quantization", bool(keys.take("use_bnb_nested_quant", False)), "use_bnb_nested_quant")
    elif keys.take("load_in_8bit"):
        draft.put_int8("load_in_8bit")
    else:
        draft.put("model.quantization", "none", "load_in_8bit")
    if saved := keys.take("lora_modules_to_save"):
        draft.put("lora.modules_to_save", saved, "lora_modules_to_save")
    if (split := keys.take("dataset_train_split", "train")) != "train":
        draft.add_unsupported("dataset_train_split", f"{split}: strop reads the train split; give the files of {split}")
    if str(keys.peek("eval_strategy", "no")) not in ("no", "False"):
        split = keys.take("dataset_test_split", "test")
        draft.add_unsupported("dataset_test_split", f"{split}: set data.eval to its file, or to a share such as 5%")
    loss = str(keys.peek("loss_type", ""))
    objective = "dpo" if "beta" in keys or loss in ("sigmoid", "ipo") else "sft"
    if loss == "kto" or "desirable_weight" in keys or "undesirable_weight" in keys:
        objective = "kto"
    elif "center_rewards_coefficient" in keys or keys.peek("lora_task_type") == "SEQ_CLS":
        objective = "reward"
    objective = next(
        (kind for kind, own in distillation.TRL_KEYS.items() if any(key in keys for key in own)), objective
    )
    commands = "`trl sft`, `dpo`, `kto`, `reward`, `distillation` or `gkd`"
    draft.add_difference("the command", f"the config is for {commands}; read as {objective}")
    ignored: tuple[str, ...] = (*IGNORED_KEYS, *IGNORED_MODEL_KEYS, "dataset_test_split", "lora_task_type")
    if objective in distillation.TOOLS:
        if keys.peek("teacher_model_revision") == "main":
            keys.take("teacher_model_revision")
        _read_distillation(draft, keys, objective)
        ignored += distillation.IGNORED_KEYS
    else:
        _read_config(draft, keys, objective)
        _read_loss_mask(draft, keys, objective)
    keys.report_rest(draft, ignored)


IGNORED_MODEL_KEYS = (
    "attn_implementation", "device_map", "low_cpu_mem_usage", "token", "trust_remote_code", "use_cache",
    "fast_inference", "gpu_memory_utilization", "max_lora_rank", "use_exact_model_name", "random_state",
)  # fmt: skip
# calls that create a model, tokenizer or trainer, whose attributes a script may set later
_CREATING_CALLS = ("from_pretrained", "get_peft_model", sentence_transformers.MODEL, *TRAINERS)
_NOT_A_MODEL = re.compile("Tokenizer|Processor|Extractor|Config")  # other classes with a method `from_pretrained`
# attributes and calls that do not change the result of training
_HARMLESS_ATTRIBUTES = (
    "pad_token", "pad_token_id", "padding_side", "use_cache", "pretraining_tp", "model_max_length", "_name_or_path",
)  # fmt: skip
_HARMLESS_CALLS = (
    "activation_checkpointing_enable", "gradient_checkpointing_enable", "enable_input_require_grads",
    "prepare_model_for_kbit_training",
)  # fmt: skip
_CONFIG_METHODS = (  # of TrainingArguments
    "set_dataloader", "set_optimizer", "set_lr_scheduler", "set_training", "set_evaluate", "set_save", "set_testing",
)  # fmt: skip
_TRAINED_PARAMETERS = "code decides what is trained: see lora.target_modules and lora.modules_to_save"
_NEW_TOKENS = "adds tokens to the vocabulary: set lora.new_tokens"
_MODEL_CHANGES = {
    "setup_chat_format": "ChatML template with new tokens: set data.template chatml and lora.new_tokens",
    "add_tokens": _NEW_TOKENS,
    "add_special_tokens": f"{_NEW_TOKENS} (not needed for a pad token alone)",
    "resize_token_embeddings": _NEW_TOKENS,
    "add_new_tokens": _NEW_TOKENS,
    "merge_and_unload": "merges an adapter into the base first: use `strop merge`, and set model.name",
    **dict.fromkeys(("add_adapter", "load_adapter"), "an adapter is added by code: set model.adapter"),
    **dict.fromkeys(("setattr", *_CONFIG_METHODS), "what it sets is not read: set it in the recipe"),
}


def _read_model(
    draft: Draft, script: Script, trainer_arguments: dict[str, ast.expr], config: Call, trainer: Call | None
) -> None:
    """Import the model that the script loads, or the trainer's `model` argument, which may be a name."""
    model_argument = trainer_arguments.get("model")
    loads = [call for call in script.calls if call.name == "from_pretrained" and not _NOT_A_MODEL.search(call.owner)]
    loads += [call for call in script.calls if call.name == sentence_transformers.MODEL]
    trainer_line = float("inf") if trainer is None else trainer.line
    adapter_loads = [call for call in loads if "Peft" in call.owner and call.line < trainer_line]
    loads = [call for call in loads if "Peft" not in call.owner and call.line <= script.last_line]
    teacher = distillation.read_teacher(draft, script, trainer_arguments, loads)
    loads = [call for call in loads if call is not teacher]
    nodes = [model_argument] if model_argument is not None else []
    load = find_passed(draft, script, "model", nodes, loads, elsewhere=not nodes)
    if load is not None:
        _read_from_pretrained(draft, script, load)
    init_kwargs = config.keywords.get("model_init_kwargs")
    items = script.read_dict_items(init_kwargs) if init_kwargs is not None else {}
    givers = [trainer_arguments, items or {}, load.keywords if load is not None else {}]
    nodes = [giver["quantization_config"] for giver in givers if "quantization_config" in giver]
    quantizations = [call for call in script.calls if call.name == "BitsAndBytesConfig"]
    is_open = items is None or load is None or bool(load.unpacked)
    quantization = find_passed(draft, script, "quantization_config", nodes, quantizations, elsewhere=is_open)
    if quantization is not None:
        _read_bitsandbytes(draft, read_arguments(draft, script, quantization))
    elif draft.get("model.quantization") is None:
        draft.put("model.quantization", "none", "no quantization_config")
    name = script.value(model_argument) if model_argument is not None else None
    if isinstance(name, str) and draft.get("model.name") is None:
        draft.put("model.name", name, "the trainer's model")
    if draft.get("model.name") is None and (loads or model_argument is not None):
        draft.model_unreadable = True
        if not loads and model_argument is not None:
            report_expression(draft, "model", model_argument, "not a literal value: set model.name")
    for call in adapter_loads:
        arguments = call.arguments[1:] if call.owner.endswith("PeftModel") else call.arguments
        folder = script.value(arguments[0]) if arguments else UNREADABLE
        if isinstance(folder, str):
            draft.put("model.adapter", folder, f"{call.owner}.from_pretrained, line {call.line}")
        else:
            draft.add_unsupported(call.owner, "an adapter to start from: set model.adapter", call.line)
    _report_later_changes(draft, script, trainer_line)


def _read_from_pretrained(draft: Draft, script: Script, call: Call) -> None:
    if call.name == sentence_transformers.MODEL:
        model_keys = sentence_transformers.read_embedding_model(draft, script, replace(call, assigned_to=""))
        if model_keys is not None:
            _put_dtype(draft, model_keys)
            model_keys.report_rest(draft, (*IGNORED_MODEL_KEYS, "quantization_config"))
        return
    is_unsloth = draft.tool == "unsloth"
    nodes = {key: node for key, node in call.keywords.items() if key != "quantization_config"}
    unsloth_positions = ("model_name", "max_seq_length", "dtype", "load_in_4bit")
    positional = unsloth_positions if is_unsloth else ("pretrained_model_name_or_path",)
    keys = read_arguments(draft, script, replace(call, keywords=nodes, assigned_to=""), positional)
    names = {"model_name": "model.name", "pretrained_model_name_or_path": "model.name", "revision": "model.revision"}
    draft.put_fields(keys, names, str)
    _put_dtype(draft, keys)
    if CLASSIFIER in call.owner:
        _read_labels(draft, keys)
    if is_unsloth:
        draft.put("data.max_length", 2048, keys.default_source("max_seq_length", "unsloth's default"))
        draft.put_int(keys, "max_seq_length", "data.max_length")
        in_4_bit, in_8_bit, in_16_bit = (keys.take(f"load_in_{bits}bit") for bits in (4, 8, 16))
        if full := keys.take("full_finetuning"):
            draft.put_full("full_finetuning")
        source = "load_in_4bit" if in_4_bit is not None else "unsloth's default"
        in_4_bit = not (in_8_bit or in_16_bit or full) if in_4_bit is None else in_4_bit
        if in_8_bit and not in_4_bit:
            draft.put_int8("load_in_8bit")
        else:
            draft.put("model.quantization", "nf4" if in_4_bit else "none", source)
    elif keys.peek("load_in_4bit") or keys.peek("load_in_8bit"):
        _read_bitsandbytes(draft, Keys({key: keys.take(key) for key in ("load_in_4bit", "load_in_8bit")}))
    keys.report_rest(draft, (*IGNORED_MODEL_KEYS, "load_in_4bit", "load_in_8bit", "use_gradient_checkpointing"))


def _read_labels(draft: Draft, keys: Keys) -> None:
    """Import the names of the classes of AutoModelForSequenceClassification.from_pretrained."""
    number, by_index, by_name = (keys.take(key) for key in ("num_labels", "id2label", "label2id"))
    if not isinstance(by_index, dict) and isinstance(by_name, dict):
        by_index = {index: name for name, index in by_name.items()}
    if isinstance(by_index, dict) and number != 1:
        labels = [str(name) for _, name in sorted(by_index.items(), key=lambda pair: int(pair[0]))]
        draft.put("train.labels", labels, "id2label")
        text = "rows must name the label; if theirs are numbers, remove train.labels"
        draft.add_difference("id2label", text)
    if keys.take("problem_type") == "regression":
        draft.add_unsupported("problem_type", "regression: strop trains classes")


def _report_later_changes(draft: Draft, script: Script, trainer_line: float) -> None:
    """Report changes that the script makes to its model, tokenizer or trainer after it is created."""
    created = [call.assigned_to for call in script.calls if call.line <= trainer_line and call.name in _CREATING_CALLS]
    adapter_line = min([trainer_line, *(call.line for call in script.calls if call.name == "get_peft_model")])
    for name in dict.fromkeys(filter(None, created)):
        for key, node, line, _ in script.find_attribute_assignments(name):
            length = script.value(node) if key.rpartition(".")[2] == "max_seq_length" else None
            if isinstance(length, int):
                draft.put("data.max_length", length, key)
            elif key.rpartition(".")[2] in _HARMLESS_ATTRIBUTES:
                draft.add_ignored(f"{name}.{key}", "", line)
            else:
                report_expression(draft, f"{name}.{key}", node, "set by code, which is not executed")
    for call in script.calls:
        if call.name in _HARMLESS_CALLS:
            draft.add_ignored(call.name, "", call.line)
        elif call.name == "add_adapter" and any(x.name == sentence_transformers.MODEL for x in script.calls):
            pass  # its LoraConfig is read
        elif call.name in _MODEL_CHANGES and call.line < trainer_line:
            draft.add_unsupported(call.name, _MODEL_CHANGES[call.name], call.line)
        elif call.name == "requires_grad_" and (
            [script.value(node) for node in call.arguments] != [False] or call.line > adapter_line
        ):
            draft.add_unsupported(call.name, _TRAINED_PARAMETERS, call.line)
    for assignment in script.find_assigned_attributes("requires_grad"):
        if script.value(assignment.value) is not False or assignment.lineno > adapter_line:
            draft.add_unsupported("requires_grad", _TRAINED_PARAMETERS, assignment.lineno)


def _put_dtype(draft: Draft, keys: Keys) -> None:
    dtypes = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}
    new_name, old_name = keys.take("dtype"), keys.take("torch_dtype")
    dtype = new_name or old_name
    if dtype in dtypes:
        draft.put_dtype(dtypes[dtype], "dtype")
    elif dtype not in (None, "auto"):
        draft.add_unsupported("dtype", str(dtype))


def _read_bitsandbytes(draft: Draft, keys: Keys) -> None:
    in_4_bit, in_8_bit = keys.take("load_in_4bit"), keys.take("load_in_8bit")
    quantization = keys.take("bnb_4bit_quant_type", "fp4")
    double_quantization = keys.take("bnb_4bit_use_double_quant", False)
    if in_4_bit:
        draft.put("model.quantization", str(quantization), "bnb_4bit_quant_type")
        draft.put("model.double_quantization", bool(double_quantization), "bnb_4bit_use_double_quant")
    elif in_8_bit:
        draft.put_int8("load_in_8bit")
    keys.report_rest(draft, ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "llm_int8_threshold"))


def _read_adapter(draft: Draft, script: Script, trainer_arguments: dict[str, ast.expr], objective: str) -> Any:
    """Import the LoraConfig or the arguments of Unsloth's get_peft_model. Return the seed of LoRA's start, if given."""
    is_unsloth = draft.tool == "unsloth"
    function = "get_peft_model" if is_unsloth else "LoraConfig"
    adapters = [call for call in script.calls if call.name == function]
    if not adapters and draft.get("model.adapter") is not None:
        return None  # the adapter has its own settings
    if adapters and any(call.name == "merge_and_unload" for call in script.calls):
        draft.fields.pop("model.adapter", None)  # it is merged into the base, and a new one is trained
    if draft.get("train.method") == "full":
        return None
    if not adapters and objective == "embed":
        draft.add_difference("weights", "all are trained there; strop trains adapters on all linear layers")
        return None
    loaders = [call.owner for call in script.calls if call.name == "from_pretrained"]
    only_models = all(any(part in owner for part in ("Auto", "ForCausalLM", "Tokenizer")) for owner in loaders)
    if not adapters and not is_unsloth and only_models and draft.get("model.quantization") in (None, "none"):
        draft.put_full("no LoraConfig")
        return None
    if not adapters:
        fix = "give a script that trains an adapter, or all weights of a base that is not quantized"
        raise draft.not_supported_error(f"{function} is not called", fix)
    if is_unsloth:
        call = replace(adapters[0], arguments=adapters[0].arguments[1:], assigned_to="")
    else:
        nodes = [trainer_arguments["peft_config"]] if "peft_config" in trainer_arguments else []
        for other in script.calls:
            if other.name in ("get_peft_model", "add_adapter"):
                nodes += [*other.arguments[other.name == "get_peft_model" :], *other.keywords.values()]
        for part in (part for node in nodes for part in script.trace(node, adapters) if isinstance(part, ast.Call)):
            name = ast.unparse(part.func).rpartition(".")[2]
            if name.endswith("Config") and name != function:
                raise draft.not_supported_error(f"peft_config: {name}", "give a script that passes a LoraConfig")
        call = find_passed(draft, script, "peft_config", nodes, adapters, elsewhere=True) or adapters[0]
    default_rank = 16 if is_unsloth else 8
    positional = ("r", "target_modules", "lora_alpha", "lora_dropout", "bias") if is_unsloth else ()
    # often a member of an enum, which cannot be read
    call = replace(call, keywords={key: node for key, node in call.keywords.items() if key != "task_type"})
    keys = read_arguments(draft, script, call, positional)
    if "target_modules" not in keys and is_unsloth:
        modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        draft.put("lora.target_modules", modules, "unsloth's default")
    elif "target_modules" not in keys:
        draft.put_default_targets("target_modules")
    defaults = {"lora.r": default_rank, "lora.alpha": default_rank, "lora.dropout": 0.0}
    draft.put_lora(keys, "r", "target_modules", defaults)
    names = ("bias", "modules_to_save", "rank_pattern", "alpha_pattern")
    draft.put_fields(keys, {name: f"lora.{name}" for name in names})
    if is_unsloth:
        left_out = [flag for flag in _UNSLOTH_FLAGS if keys.peek(flag) is False]
        _read_unsloth_targets(draft, keys)
        _read_unsloth_vision(draft, keys, left_out, is_default="FastVisionModel" in call.owner)
    draft.put_lora_init(keys, "init_lora_weights")
    if loftq := keys.take("loftq_config"):
        draft.add_unsupported("loftq_config", f"{format_value(loftq)}: lora.init loftq is similar")
    keys.take("inference_mode")
    start_seed = keys.take("random_state")
    keys.report_rest(draft, ("use_gradient_checkpointing", "max_seq_length", "temporary_location"))
    return start_seed


def _read_unsloth_targets(draft: Draft, keys: Keys) -> None:
    """Import what Unsloth does with target_modules: embeddings are trained in full, and flags leave out layers."""
    modules = list(draft.get("lora.target_modules") or [])
    if isinstance(draft.get("lora.target_modules"), list):
        left_out = [name for flag, names in _UNSLOTH_FLAGS.items() if keys.take(flag) is False for name in names]
        whole = [name for name in modules if name in ("embed_tokens", "lm_head")]
        kept = [name for name in modules if name not in (*left_out, *whole)]
        if kept != modules:
            draft.put("lora.target_modules", kept, "target_modules, without what unsloth leaves out")
        if whole:
            saved = draft.get("lora.modules_to_save") or []
            text = "target_modules: unsloth trains these in full"
            draft.put("lora.modules_to_save", list(dict.fromkeys([*saved, *whole])), text)


def _read_unsloth_vision(draft: Draft, keys: Keys, left_out: list[str], *, is_default: bool) -> None:
    """Import the parts of a model with images that are trained.

    left_out: flags that leave out kinds of layers. is_default: whether the encoder is trained by default.
    """
    if keys.take("finetune_language_layers") is False:
        draft.add_unsupported("finetune_language_layers", "false: strop always trains adapters in the text model")
    if keys.take("finetune_vision_layers", is_default):
        draft.put("lora.vision", "all", "finetune_vision_layers")
        draft.add_difference("finetune_vision_layers", IN_FULL_NOTE)
        if left_out:
            text = f"{', '.join(left_out)} leave out layers of the encoder too; strop adapts all of its linear layers"
            draft.add_difference("finetune_vision_layers", text)


_UNSLOTH_FLAGS = {
    "finetune_attention_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "finetune_mlp_modules": ("gate_proj", "up_proj", "down_proj"),
}
