"""Import scripts for TRL or Unsloth, and TRL's YAML. Names and defaults: TRL 1.10, Unsloth as of August 2026."""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import Any

from strop.errors import InputError, RecipeError
from strop.interop.draft import IGNORED_KEYS, NO_GRPO, Draft, Keys, as_int, as_number, format_value
from strop.interop.script_parser import UNREADABLE, Call, Script, readable_arguments, shorten_source

CONFIGS = {
    "SFTConfig": "sft", "TrainingArguments": "sft", "UnslothTrainingArguments": "sft", "DPOConfig": "dpo",
    "KTOConfig": "kto", "ORPOConfig": "orpo", "CPOConfig": "simpo", "RewardConfig": "reward",
}  # fmt: skip
TRAINERS = (
    "SFTTrainer", "DPOTrainer", "KTOTrainer", "ORPOTrainer", "CPOTrainer", "RewardTrainer", "Trainer", "UnslothTrainer",
)  # fmt: skip
UNSUPPORTED_CONFIGS = (
    "GRPOConfig", "PPOConfig", "RLOOConfig", "BCOConfig", "OnlineDPOConfig", "NashMDConfig", "XPOConfig", "GKDConfig",
    "PRMConfig",
)  # fmt: skip
RATES = {"sft": 2e-5, "reward": 1e-4}  # else 1e-6
LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "simpo": "simpo"}
DEFAULTS = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear", "optim": "adamw_torch", "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 42,
}  # fmt: skip
EARLY_STOPPING = "EarlyStoppingCallback"
_MESSAGES = ("dataset_text_field", "messages")
LOSS_ON_ALL_NOTE = (
    "without assistant_only_loss, TRL trains on all tokens of `messages` and `text` rows, and on the completion of "
    "prompt-completion rows; strop trains on assistant turns: set data.loss all to train on everything"
)


def read(draft: Draft) -> None:
    """Import a script for TRL or Unsloth, or a TRL YAML. Raises InputError for unsupported training."""
    path, peer = draft.file, draft.peer
    if peer == "trl" and path.suffix in (".yaml", ".yml"):
        _from_yaml(draft)
        return
    script = Script(path)
    refused = [call for call in script.calls if call.name in UNSUPPORTED_CONFIGS]
    if refused and refused[0].name == "GRPOConfig":
        raise InputError(f"{path}:{refused[0].line}: GRPOConfig: {NO_GRPO[0]}", fix=NO_GRPO[1])
    if refused:
        what = f"{path}:{refused[0].line}: {refused[0].name}: not an objective of strop"
        raise InputError(what, fix="use sft, dpo, ipo, kto, orpo, simpo or reward")
    configs = [call for call in script.calls if call.name in CONFIGS]
    if not configs:
        fix = "give the training script; if TrlParser or HfArgumentParser creates the config, put the options of your "
        fix += "command into a YAML file, which `strop import trl` reads too"
        raise InputError(f"{path}: none of {', '.join(CONFIGS)} is created in it", fix=fix)
    for call in configs[1:]:
        draft.add_unsupported(call.name, "a second config; only the first is imported", call.line)
    keys_of_trainer, trainer_line = _trainer(draft, script)
    read_model(draft, script, keys_of_trainer.pop("model", None), trainer_line)
    read_adapter(draft, script)
    config = configs[0]
    keys = readable_arguments(draft, script, config)
    objective = CONFIGS[config.name]
    _arguments(draft, keys, objective, peer)
    read_rows(draft, script, keys_of_trainer)
    _masks(draft, script, keys, objective)
    _callbacks(draft, script, keys_of_trainer.get("callbacks"), keys.peek("metric_for_best_model"))
    keys.report_rest(draft, IGNORED_KEYS)
    for call in script.calls:
        node = call.keywords.get("resume_from_checkpoint")
        if call.name == "train" and node is not None and script.value(node) not in (None, False):
            draft.add_unsupported("resume_from_checkpoint", "use `strop resume RUN`", call.line)
    for name, (value, line) in script.defaults.items():
        text = f"{value}: the default of the script's option; if you pass another value, set it here"
        draft.add_difference(name, text, line)


def _trainer(draft: Draft, script: Script) -> tuple[dict[str, ast.expr], float]:
    """Return the arguments of the trainer's constructor, and its line."""
    custom_trainers = {name: (base, line) for name, base, line in script.subclasses_of(TRAINERS)}
    for name, (base, line) in custom_trainers.items():
        draft.add_unsupported(name, f"derived from {base}; its code is not executed", line)
    trainers = [call for call in script.calls if call.name in TRAINERS or call.name in custom_trainers]
    if not trainers:
        text = f"no {', '.join(TRAINERS)} is called; data and model are read from the rest of the script"
        draft.add_unsupported("trainer", text)
        return {}, float("inf")
    call = trainers[0]
    keywords = {**dict(zip(("model",), call.arguments, strict=False)), **call.keywords}
    for node in call.unpacked:
        text = f"{shorten_source(node)}: not a literal map, and nothing is run"
        draft.add_unsupported(f"{call.name}(**...)", text, node.lineno)
    for key in ("args", "peft_config", "tokenizer", "processing_class"):
        keywords.pop(key, None)
    for key, node in keywords.items():
        if key in ("model", "train_dataset", "eval_dataset", "dataset_num_proc", "callbacks"):
            continue
        value = script.value(node)
        if key == "data_collator" and _trains_on_answers_only(script):
            draft.add_ignored(key, "loss on assistant turns only, the default here", node.lineno)
        elif key == "formatting_func":
            text = f"{shorten_source(node)}: rows are formatted by code, which is not executed: {SAVE_ROWS_FIX}"
            draft.add_unsupported(key, text, node.lineno)
        elif key in ("max_seq_length", "max_length") and isinstance(value, int):
            draft.put("data.max_length", value, key)
        elif key == "dataset_text_field" and isinstance(value, str) and value not in ("text", "messages"):
            draft.put("data.columns", {"text": value}, key)
        elif key == "packing" and value is True:
            draft.note_packing(key)
        elif value is not None and (key, value) not in (("packing", False), ("dataset_text_field", "text"), _MESSAGES):
            draft.add_unsupported(f"{call.name}.{key}", shorten_source(node), node.lineno)
    return keywords, call.line


def _callbacks(draft: Draft, script: Script, node: ast.expr | None, best_by: Any) -> None:
    """Import transformers' EarlyStoppingCallback, and report other callbacks. best_by: metric_for_best_model."""
    given = script.list_items(node) if node is not None and script.value(node) is not None else []
    given += [argument for call in script.calls if call.name == "add_callback" for argument in call.arguments]
    for callback in map(script.resolve_name, given):
        name = ast.unparse(callback.func if isinstance(callback, ast.Call) else callback)
        if name.rpartition(".")[2] != EARLY_STOPPING:
            draft.add_unsupported("callbacks", f"{shorten_source(callback)}: its code is not executed", callback.lineno)
        elif not isinstance(callback, ast.Call):
            draft.put("train.early_stopping", 1, EARLY_STOPPING)
    for call in script.calls:
        if call.name == EARLY_STOPPING:
            keys = readable_arguments(draft, script, call, ("early_stopping_patience", "early_stopping_threshold"))
            patience = as_int("early_stopping_patience", keys.take("early_stopping_patience", 1))
            draft.put("train.early_stopping", patience, keys.default("early_stopping_patience", EARLY_STOPPING))
            if threshold := keys.take("early_stopping_threshold"):
                text = f"{format_value(threshold)}: any lower loss counts as better here"
                draft.add_unsupported("early_stopping_threshold", text, call.line)
            if best_by not in (None, "loss", "eval_loss"):
                text = f"{format_value(best_by)} is monitored in TRL, the loss in strop"
                draft.add_difference(EARLY_STOPPING, text, call.line)


def _trains_on_answers_only(script: Script) -> bool:
    names = ("DataCollatorForCompletionOnlyLM", "train_on_responses_only")
    return any(call.name in names for call in script.calls)


def _arguments(draft: Draft, keys: Keys, objective: str, peer: str) -> None:
    loss = keys.take("loss_type")
    loss = loss[0] if isinstance(loss, list) and len(loss) == 1 else loss
    what = f"{draft.file}: loss_type {format_value(loss)}: not an objective of strop"
    if objective in ("dpo", "simpo") and loss is not None:
        if not isinstance(loss, str) or loss not in LOSSES:
            raise RecipeError(what, fix="sigmoid, ipo or simpo")
        objective = LOSSES[loss]
    elif objective == "simpo":
        what = f"{draft.file}: CPO: not an objective of strop"
        raise RecipeError(what, fix="use SimPO: loss_type simpo, cpo_alpha 0")
    elif loss not in (None, "nll", "chunked_nll", "kto"):
        raise RecipeError(what, fix="remove it from the config")
    if objective != "sft":
        draft.put("train.objective", objective, "the config's class")
    rate = 5e-5 if objective == "sft" and peer == "unsloth" else RATES.get(objective, 1e-6)
    tool = "trl" if peer == "trl" else "transformers"
    draft.put_training_arguments(keys, {**DEFAULTS, "learning_rate": rate}, tool=tool)
    for key, used in (
        ("beta", ("dpo", "ipo", "kto", "orpo", "simpo")), ("label_smoothing", ("dpo", "simpo")),
        ("desirable_weight", ("kto",)), ("undesirable_weight", ("kto",)),
    ):  # fmt: skip
        if (value := keys.take(key)) is not None and objective in used:
            draft.put(f"train.{key}", as_number(value), key)
        elif value:
            draft.add_unsupported(key, f"{format_value(value)}: not used by {objective}")
    if objective == "simpo":
        draft.put_simpo(keys)
    elif gamma := keys.take("simpo_gamma"):
        draft.add_unsupported("simpo_gamma", f"{gamma}: not used by {objective}")
    if isinstance(init_kwargs := keys.take("model_init_kwargs"), dict):
        more = Keys(init_kwargs)
        put_dtype(draft, more.take("dtype") or more.take("torch_dtype"))
        if (revision := more.take("revision")) is not None:
            draft.put("model.revision", str(revision), "model_init_kwargs.revision")
        more.report_rest(draft, IGNORED_MODEL_KEYS)
    length = keys.take("max_length", keys.take("max_seq_length"))
    if length is not None:
        draft.put("data.max_length", as_int("max_length", length), "max_length")
    elif draft.get("data.max_length") is None and "max_length" not in keys.none:
        draft.put("data.max_length", 1024, "trl's default")
    draft.note_max_length("max_length")
    keys.take("truncation_mode")
    if keys.take("disable_dropout", True):
        draft.disable_dropout_for_preferences("lora_dropout")
    if keys.take("packing"):
        draft.note_packing("packing")
    column = keys.take("dataset_text_field", "text")
    if column not in ("text", "messages"):
        draft.put("data.columns", {"text": str(column)}, "dataset_text_field")
    if str(keys.peek("chat_template_path", "")).endswith((".jinja", ".j2")):
        draft.put("data.template", str(keys.take("chat_template_path")), "chat_template_path")


def _masks(draft: Draft, script: Script, keys: Keys, objective: str) -> None:
    """Import the loss mask."""
    only, completion = keys.take("assistant_only_loss"), keys.take("completion_only_loss")
    masked = _trains_on_answers_only(script)
    if objective != "sft" or only or completion or masked:
        return
    if completion is False:
        draft.put("data.loss", "all", "completion_only_loss")
    else:
        draft.add_difference("assistant_only_loss", LOSS_ON_ALL_NOTE)


def _from_yaml(draft: Draft) -> None:
    """Import a YAML file for `trl sft --config FILE`: script, training and model arguments in one mapping."""
    keys = Keys(draft.read_yaml())
    if not keys.take("use_peft"):
        raise InputError(f"{draft.file}: use_peft is not on: strop trains LoRA adapters only", fix="set use_peft: true")
    for key, name in (
        ("model_name_or_path", "model.name"), ("dataset_name", "data.train"), ("model_revision", "model.revision"),
    ):  # fmt: skip
        if (value := keys.take(key)) is not None and value != "main":
            draft.put(name, str(value), key)
    put_dtype(draft, keys.take("dtype") or keys.take("torch_dtype"))
    named = "lora_target_modules" in keys
    draft.put_lora(keys, rank="lora_r", alpha="lora_alpha", dropout="lora_dropout", modules="lora_target_modules",
         defaults={"lora.r": 16, "lora.alpha": 32, "lora.dropout": 0.05})  # fmt: skip
    if not named:
        draft.add_difference("lora_target_modules", DEFAULT_TARGETS_NOTE)
    if keys.take("load_in_4bit"):
        draft.put("model.quantization", keys.take("bnb_4bit_quant_type", "nf4"), "load_in_4bit")
        draft.put("model.double_quantization", bool(keys.take("use_bnb_nested_quant", False)), "use_bnb_nested_quant")
    else:
        draft.put("model.quantization", "int8" if keys.take("load_in_8bit") else "none", "load_in_8bit")
    if saved := keys.take("lora_modules_to_save"):
        draft.put("lora.modules_to_save", saved, "lora_modules_to_save")
    if (split := keys.take("dataset_train_split", "train")) != "train":
        draft.add_unsupported("dataset_train_split", f"{split}: strop reads the train split; give the files of {split}")
    if str(keys.peek("eval_strategy", "no")) not in ("no", "False"):
        split = keys.take("dataset_test_split", "test")
        text = f"evaluated on {split} in TRL: set data.eval to its file, or to a share such as 5%"
        draft.add_unsupported("dataset_test_split", text)
    loss = str(keys.peek("loss_type", ""))
    objective = "dpo" if "beta" in keys or loss in ("sigmoid", "ipo") else "sft"
    draft.add_difference("the command", f"the config is for `trl sft` or `trl dpo`; read as {objective}")
    _arguments(draft, keys, objective, "trl")
    only, completion = keys.take("assistant_only_loss"), keys.take("completion_only_loss")
    if objective == "sft" and not only and not completion:
        draft.add_difference("assistant_only_loss", LOSS_ON_ALL_NOTE)
    keys.report_rest(draft, (*IGNORED_KEYS, *IGNORED_MODEL_KEYS, "dataset_test_split", "lora_task_type"))


IGNORED_MODEL_KEYS = (
    "attn_implementation", "device_map", "low_cpu_mem_usage", "token", "trust_remote_code", "use_cache",
    "fast_inference", "gpu_memory_utilization", "max_lora_rank", "use_exact_model_name", "random_state",
)  # fmt: skip
DEFAULT_TARGETS_NOTE = (
    "not given: PEFT uses a default by model family (q_proj and v_proj for Llama, Qwen and others); "
    "strop uses all linear layers"
)
_MAKERS = (
    "from_pretrained", "get_peft_model", "SFTTrainer", "DPOTrainer", "KTOTrainer", "ORPOTrainer", "RewardTrainer",
)  # fmt: skip
# attributes and calls that do not change what is learned
_HARMLESS_ATTRIBUTES = (
    "pad_token", "pad_token_id", "padding_side", "use_cache", "pretraining_tp", "model_max_length", "_name_or_path",
)  # fmt: skip
_HARMLESS_CALLS = ("gradient_checkpointing_enable", "enable_input_require_grads", "prepare_model_for_kbit_training")
_NEW_TOKENS = "adds tokens to the vocabulary: set lora.new_tokens"
_MODEL_CHANGES = {
    "setup_chat_format": "ChatML template with new tokens: set data.template chatml and lora.new_tokens",
    "add_tokens": _NEW_TOKENS,
    "add_special_tokens": f"{_NEW_TOKENS} (not needed for a pad token alone)",
    "resize_token_embeddings": _NEW_TOKENS,
}


def read_model(draft: Draft, script: Script, given: ast.expr | None, trainer_line: float) -> None:
    """Import the model loaded before the trainer is created, or `given`, the trainer's model argument."""
    loads = [call for call in script.calls if call.name == "from_pretrained" and "Model" in call.owner]
    starts = [call for call in loads if "Peft" in call.owner and call.line < trainer_line]
    loads = [call for call in loads if "Peft" not in call.owner]
    fast = draft.peer == "unsloth"
    if loads:
        _load(draft, script, loads[0], fast)
    bits = [call for call in script.calls if call.name == "BitsAndBytesConfig"]
    if bits:
        _bits(draft, readable_arguments(draft, script, bits[0]))
        for call in bits[1:]:
            draft.add_unsupported(call.name, "another one; only the first is imported", call.line)
    elif draft.get("model.quantization") is None:
        draft.put("model.quantization", "none", "no BitsAndBytesConfig")
    name = script.value(given) if given is not None else None
    if isinstance(name, str) and draft.get("model.name") is None:
        draft.put("model.name", name, "the trainer's model")
    if draft.get("model.name") is None and (loads or given is not None):
        draft.model_unreadable = True
        if not loads and given is not None:
            text = f"{shorten_source(given)}: not a literal value: set model.name"
            draft.add_unsupported("model", text, given.lineno)
    for call in starts:
        at = call.arguments[1:] if call.owner.endswith("PeftModel") else call.arguments
        folder = script.value(at[0]) if at else UNREADABLE
        if isinstance(folder, str):
            draft.put("model.adapter", folder, f"{call.owner}.from_pretrained, line {call.line}")
        else:
            draft.add_unsupported(call.owner, "an adapter to start from: set model.adapter", call.line)
    _note_later_changes(draft, script, trainer_line)


def _load(draft: Draft, script: Script, call: Call, fast: bool) -> None:
    nodes = {key: node for key, node in call.keywords.items() if key != "quantization_config"}
    positional = ("model_name" if fast else "pretrained_model_name_or_path",)
    keys = readable_arguments(draft, script, replace(call, keywords=nodes, into=""), positional)
    names = {"model_name": "model.name", "pretrained_model_name_or_path": "model.name", "revision": "model.revision"}
    draft.put_fields(keys, names, str)
    put_dtype(draft, keys.take("dtype") or keys.take("torch_dtype"))
    keys.take("torch_dtype")
    if (length := keys.take("max_seq_length")) is not None:
        draft.put("data.max_length", as_int("max_seq_length", length), "max_seq_length")
    if fast:
        four, eight = keys.take("load_in_4bit"), keys.take("load_in_8bit")
        if keys.take("full_finetuning"):
            raise InputError(f"{draft.file}:{call.line}: full_finetuning: strop trains LoRA adapters only", fix="")
        half = keys.take("load_in_16bit")
        source = "load_in_4bit" if four is not None else "unsloth's default"
        four = not (eight or half) if four is None else four
        draft.put("model.quantization", "nf4" if four else "int8" if eight else "none", source)
    elif keys.peek("load_in_4bit") or keys.peek("load_in_8bit"):
        _bits(draft, Keys({key: keys.take(key) for key in ("load_in_4bit", "load_in_8bit")}))
    keys.report_rest(draft, (*IGNORED_MODEL_KEYS, "load_in_4bit", "load_in_8bit"))


def _note_later_changes(draft: Draft, script: Script, trainer_line: float) -> None:
    """Report changes that the script makes to its model, tokenizer or trainer."""
    created = [call for call in script.calls if call.into and call.line <= trainer_line and call.name in _MAKERS]
    for name in dict.fromkeys(call.into for call in created):
        for key, node, line, _ in script.attribute_assignments(name):
            if key.rpartition(".")[2] in _HARMLESS_ATTRIBUTES:
                draft.add_ignored(f"{name}.{key}", "", line)
            else:
                text = f"{shorten_source(node)}: set by code, which is not executed"
                draft.add_unsupported(f"{name}.{key}", text, line)
    for call in script.calls:
        if call.name in _HARMLESS_CALLS:
            draft.add_ignored(call.name, "", call.line)
        elif call.name in _MODEL_CHANGES:
            draft.add_unsupported(call.name, _MODEL_CHANGES[call.name], call.line)


def put_dtype(draft: Draft, name: Any) -> None:
    known = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}
    if name in known:
        draft.put("model.dtype", known[str(name)], "dtype")
    elif name not in (None, "auto"):
        draft.add_unsupported("dtype", str(name))


def _bits(draft: Draft, keys: Keys) -> None:
    four, eight = keys.take("load_in_4bit"), keys.take("load_in_8bit")
    kind = keys.take("bnb_4bit_quant_type", "fp4")
    double = keys.take("bnb_4bit_use_double_quant", False)
    if four:
        draft.put("model.quantization", str(kind), "bnb_4bit_quant_type")
        draft.put("model.double_quantization", bool(double), "bnb_4bit_use_double_quant")
    elif eight:
        draft.put_int8("load_in_8bit")
    keys.report_rest(draft, ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "llm_int8_threshold"))


def read_adapter(draft: Draft, script: Script) -> None:
    fast = draft.peer == "unsloth"
    adapters = [call for call in script.calls if call.name == ("get_peft_model" if fast else "LoraConfig")]
    if not adapters:
        name = "FastLanguageModel.get_peft_model" if fast else "LoraConfig"
        what = f"{draft.file}: no {name} is called in it: strop trains LoRA adapters only"
        raise InputError(what, fix="give a script that trains an adapter")
    for call in adapters[1:]:
        if not fast:
            draft.add_unsupported(call.name, "another one; only the first is imported", call.line)
    call = adapters[0]
    arguments = call.arguments[1:] if fast else call.arguments
    keys = readable_arguments(draft, script, replace(call, arguments=arguments, into="" if fast else call.into), ("r",))
    rank = {"lora.r": 16 if fast else 8, "lora.alpha": 16 if fast else 8, "lora.dropout": 0.0}
    modules = keys.peek("target_modules")
    draft.put_lora(keys, rank="r", alpha="lora_alpha", dropout="lora_dropout", modules="target_modules", defaults=rank)
    if modules is None and fast:
        named = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        draft.put("lora.target_modules", named, "unsloth's default")
    elif modules is None:
        draft.add_difference("target_modules", DEFAULT_TARGETS_NOTE)
    if (bias := keys.take("bias")) is not None:
        draft.put("lora.bias", bias, "bias")
    if saved := keys.take("modules_to_save"):
        draft.put("lora.modules_to_save", saved, "modules_to_save")
    for key in ("rank_pattern", "alpha_pattern"):
        if value := keys.take(key):
            draft.put(f"lora.{key}", value, key)
    draft.put_lora_init(keys, "init_lora_weights")
    if loftq := keys.take("loftq_config"):
        draft.add_unsupported("loftq_config", f"{format_value(loftq)}: lora.init loftq is similar")
    keys.take("task_type"), keys.take("inference_mode")
    keys.report_rest(draft, ("use_gradient_checkpointing", "random_state", "max_seq_length", "temporary_location"))


_FILES = ("json", "csv", "parquet", "text")
DATASET_TRANSFORMS = (
    "map", "filter", "select", "shuffle", "remove_columns", "rename_column", "train_test_split", "concatenate_datasets",
    "standardize_sharegpt", "standardize_data_formats", "to_sharegpt", "cast_column",
)  # fmt: skip
SAVE_ROWS_FIX = "save the rows with dataset.to_json and pass that file with --data"


def read_rows(draft: Draft, script: Script, keywords: dict[str, ast.expr]) -> None:
    loads = [call for call in script.calls if call.name in ("load_dataset", "from_json", "from_csv", "from_parquet")]
    eval_name = script.root_name(keywords["eval_dataset"]) if "eval_dataset" in keywords else ""
    share = [call for call in script.calls if call.name == "train_test_split"]
    by_name = {call.into: call for call in loads if call.into}
    if "eval_dataset" in keywords and (part := _split_files(script, by_name, keywords["eval_dataset"])):
        draft.put("data.eval", *part)
    trained, asked = (_loading_calls(script, loads, keywords.get(key)) for key in ("train_dataset", "eval_dataset"))
    for call in sorted(loads, key=lambda call: call not in trained):
        source = _source(draft, script, call)
        if source and call in asked and call not in trained and len(loads) > 1:
            draft.put("data.eval", source, f"load_dataset, line {call.line}")
        elif source and draft.get("data.train") is None:
            draft.put("data.train", source, f"load_dataset, line {call.line}")
        elif source:
            draft.add_unsupported("load_dataset", f"{format_value(source)}: another data set", call.line)
    if eval_name and share and draft.get("data.eval") is None:
        given = share[0].keywords.get("test_size", next(iter(share[0].arguments), None))
        size = 0.25 if given is None else script.value(given)
        if isinstance(size, float) and 0 < size < 1:
            draft.put("data.eval", f"{100 * size:g}%", "train_test_split")
            text = "which rows are held out is decided by their content here, not by a seed"
            draft.add_difference("train_test_split", text)
        else:
            draft.add_unsupported("train_test_split", "a row count; set data.eval to a file or a share", share[0].line)
    elif eval_name and draft.get("data.eval") is None:
        node = keywords["eval_dataset"]
        draft.add_unsupported("eval_dataset", f"{shorten_source(node)}: set data.eval", node.lineno)
    for call in script.calls:
        if call.name == "get_chat_template":
            text = "a template name of Unsloth; strop uses the model's chat template (or data.template)"
            draft.add_difference(call.name, text)
        if call.name == "shuffle":
            draft.add_ignored(call.name, "strop shuffles rows with the seed", call.line)
        elif call.name in DATASET_TRANSFORMS and call.name != "train_test_split":
            text = f"rows are changed by code, which is not executed: {SAVE_ROWS_FIX}"
            draft.add_unsupported(call.name, text, call.line)


def _split_files(script: Script, by_name: dict[str, Call], node: ast.expr) -> tuple[Any, str] | None:
    """Return the files of `data["test"]`, if `data` is loaded from a dict of files by split, and their source."""
    if not (isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in by_name):
        return None
    call = by_name[node.value.id]
    files, split = script.value(call.keywords.get("data_files", node)), script.value(node.slice)
    if not isinstance(files, dict) or split not in files or script.value(call.arguments[0]) not in _FILES:
        return None
    return files[split], f"load_dataset, line {call.line}, {split}"


def _loading_calls(script: Script, loads: list[Call], node: ast.expr | None) -> list[Call]:
    """Return the loading calls behind a trainer argument: inside the expression, or behind its name."""
    names = [call.into for call in loads if call.into]
    for _ in range(8):
        inside = [getattr(part, "args", None) for part in ast.walk(node)] if node is not None else []
        matching = [call for call in loads if any(call.arguments is given for given in inside)]
        name = ast.Name(script.root_name(node) if node is not None else "")
        if matching or name.id in names:
            return matching or [call for call in loads if call.into == name.id]
        node = script.resolve_name(name)
    return []


def _source(draft: Draft, script: Script, call: Call) -> Any:
    path = script.value(call.arguments[0]) if call.arguments else script.value(call.keywords.get("path", ast.Name("")))
    files = script.value(call.keywords["data_files"]) if "data_files" in call.keywords else None
    if call.name != "load_dataset":
        return path if path is not UNREADABLE else None
    if path is UNREADABLE or files is UNREADABLE:
        draft.add_unsupported("load_dataset", "not a literal value: pass --data", call.line)
        return None
    split = script.value(call.keywords["split"]) if "split" in call.keywords else "train"
    if not isinstance(split, str) or not split.startswith(("train", "test", "valid")) or "[" in split:
        text = "not literal" if split is UNREADABLE else format_value(split)
        draft.add_unsupported("load_dataset.split", f"{text}: all rows are used", call.line)
    elif split != "train" and files is None:
        draft.add_difference("load_dataset.split", f"{split}: give the file of the split: {path}/...")
    if len(call.arguments) > 1 or "name" in call.keywords:
        text = f"a configuration of the data set: give its path: {path}/..."
        draft.add_unsupported("load_dataset.name", text, call.line)
    if files is None:
        return path
    if isinstance(files, dict):
        files = files.get(str(split), next(iter(files.values())))
    listed = [files] if isinstance(files, str) else list(files)
    paths = [str(file) if path in _FILES else f"{path}/{file}" for file in listed]
    return paths[0] if len(paths) == 1 else paths
