"""Import Axolotl's YAML. Names and defaults are those of 0.18 (src/axolotl/utils/schemas/)."""

from __future__ import annotations

from typing import Any

from strop.errors import RecipeError
from strop.interop import distillation
from strop.interop.draft import IGNORED_KEYS, WARMUP_NOTE, Draft, Keys, as_float, format_value, join_files

OBJECTIVES = {name: name for name in ("dpo", "ipo", "kto", "orpo", "simpo", "reward")}
MORE_IGNORED_KEYS = (
    "attn_implementation", "auto_resume_from_checkpoints", "batch_flattening", "chunked_cross_entropy",
    "cut_cross_entropy", "dataset_keep_in_memory", "dataset_prepared_path", "dataset_processes", "ddp", "device_map",
    "do_bench_eval", "do_causal_lm_eval", "dpo_generate_during_eval", "dpo_padding_free", "dpo_use_liger_kernel",
    "dpo_use_logits_to_keep", "eager_attention", "eval_batch_size", "eval_causal_lm_metrics", "eval_max_new_tokens",
    "eval_sample_packing", "eval_table_size", "flash_attention", "flash_attn_cross_entropy", "flash_attn_fuse_mlp",
    "flash_attn_rms_norm", "flash_optimum", "flex_attention", "gc_collect_steps", "gc_steps", "gpu_memory_limit",
    "include_tkps", "is_falcon_derived_model", "is_llama_derived_model", "is_mistral_derived_model",
    "is_qwen_derived_model", "lora_embedding_kernel", "lora_fan_in_fan_out", "lora_mlp_kernel", "lora_o_kernel",
    "lora_on_cpu", "lora_qkv_kernel", "low_cpu_mem_usage",
    "max_memory", "mean_resizing_embeddings", "model_type", "pad_to_sequence_len", "profiler_steps",
    "profiler_steps_start", "sage_attention", "sample_packing_bin_size", "sample_packing_group_size", "save_first_step",
    "sdp_attention", "strict", "tokenizer_type", "tokenizer_use_fast", "use_kernels", "use_wandb", "wandb_log_model",
    "wandb_watch", "xformers_attention",
)  # fmt: skip
_SPEED_PLUGINS = ("liger", "cut_cross_entropy", "integrations.kd")  # that change speed, or are read by their keys
_KD_ROWS = "axolotl.integrations.kd"  # type of rows with the probabilities of a teacher
_TEXT_TYPES = ("completion", "pretrain")
_ALPACA_COLUMNS = {name: name for name in ("instruction", "input", "output")}
_DETECTED_COLUMNS = ("messages", "conversation", "conversations")
# strop's column names by the keys of a custom prompt format (`type` as a mapping)
_CUSTOM_COLUMNS = {
    f"field_{column}": column
    for column in ("instruction", "input", "output", "prompt", "chosen", "rejected", "completion", "label", "system")
}
# names in `roles` and `message_property_mappings` that strop detects
_DETECTED_NAMES = {
    "role": {"role", "from"}, "content": {"content", "value"}, "user": {"user", "human"}, "system": {"system"},
    "assistant": {"assistant", "gpt", "ai"}, "tool": {"tool"},
}  # fmt: skip
# values of data set keys that equal strop's behavior
_DEFAULT_VALUES = {"roles_to_train": (["assistant"], ["gpt"]), "train_on_eos": ("turn",), "train_on_eot": ("turn",)}
_ALPACA_NOTE = (
    'axolotl adds its own prompt ("Below is an instruction ..."); strop uses the model\'s chat template '
    "(for a base model without one, set data.template chatml)"
)


def read(draft: Draft) -> None:
    """Import a config. Raises InputError if it is not a LoRA config, or has an unsupported objective."""
    keys = Keys(draft.read_yaml())
    _read_model(draft, keys)
    objective = keys.take("rl")
    if keys.take("reward_model"):
        objective = "reward"
    if objective is not None:
        draft.put_objective("rl", objective, OBJECTIVES)
    _read_data(draft, keys)
    _read_training(draft, keys)
    _read_objective(draft, keys)
    if keys.take("kd_trainer"):
        draft.has_teacher = True
        distillation.read_axolotl(draft, keys)
    keys.report_rest(draft, (*IGNORED_KEYS, *MORE_IGNORED_KEYS))


def _read_model(draft: Draft, keys: Keys) -> None:
    adapter = keys.take("adapter")
    if adapter in (None, ""):
        draft.put_full("no adapter")
    elif adapter not in ("lora", "qlora"):
        raise draft.not_supported_error(f"adapter: {adapter}", "set adapter: lora or qlora in the file")
    base = keys.peek("base_model")
    names = {"base_model": "model.name", "revision_of_model": "model.revision", "lora_model_dir": "model.adapter"}
    draft.put_fields(keys, names, str)
    for key in ("base_model_config", "tokenizer_config"):
        if keys.peek(key) == base:
            keys.take(key)
    in_4_bit, in_8_bit = keys.take("load_in_4bit"), keys.take("load_in_8bit")
    if in_4_bit:
        draft.put("model.quantization", "nf4", "load_in_4bit")
        more = dict(keys.peek("bnb_config_kwargs") or {})
        if set(more) <= {"bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"}:
            keys.take("bnb_config_kwargs")
            draft.put("model.quantization", more.get("bnb_4bit_quant_type", "nf4"), "bnb_config_kwargs")
            draft.put(
                "model.double_quantization", bool(more.get("bnb_4bit_use_double_quant", True)), "bnb_config_kwargs"
            )
    elif in_8_bit:
        draft.put_int8("load_in_8bit")
    else:
        draft.put("model.quantization", "none", "neither load_in_4bit nor load_in_8bit")
    has_targets = "lora_target_modules" in keys
    draft.put_lora(keys, "lora_r", "lora_target_modules", {"lora.dropout": 0.0})
    if keys.take("lora_target_linear"):
        draft.put("lora.target_modules", "all-linear", "lora_target_linear")
    elif not has_targets:
        draft.add_difference("lora_target_modules", "not given: strop uses all linear layers")
    draft.put_lora_init(keys, "peft_init_lora_weights")
    draft.put_fields(keys, {
        "peft_use_dora": "lora.use_dora", "peft_use_rslora": "lora.use_rslora", "tokens": "lora.new_tokens",
        "lora_modules_to_save": "lora.modules_to_save", "lora_rank_pattern": "lora.rank_pattern",
        "lora_alpha_pattern": "lora.alpha_pattern", "loraplus_lr_ratio": "train.lora_plus_ratio",
    })  # fmt: skip
    saved = draft.get("lora.modules_to_save") or []
    if "lora.new_tokens" in draft.fields and (embeddings := [x for x in saved if x in ("embed_tokens", "lm_head")]):
        draft.put("lora.modules_to_save", [x for x in saved if x not in embeddings], "lora_modules_to_save")
        text = f"{', '.join(embeddings)}: all rows are trained in axolotl; strop trains the rows of the new tokens"
        draft.add_difference("lora_modules_to_save", text)
    peft = keys.peek("peft")
    if isinstance(peft, dict) and set(peft) == {"loftq_config"}:
        keys.take("peft")
        draft.put("lora.init", "loftq", "peft.loftq_config")
        draft.add_difference("peft.loftq_config", "strop does one iteration, starting from the quantized base")
    special_tokens = keys.take("special_tokens") or {}
    if not isinstance(special_tokens, dict):
        what = f"{draft.file}: special_tokens: {format_value(special_tokens)}: not a mapping"
        raise RecipeError(what, fix='write it as {pad_token: "<pad>"}')
    for key, token in special_tokens.items():
        if key == "pad_token":
            draft.add_ignored("special_tokens.pad_token", "no trained token is padded")
        else:
            draft.add_unsupported(f"special_tokens.{key}", f"{token}: strop uses the tokens of the tokenizer")


def _read_data(draft: Draft, keys: Keys) -> None:
    sources: dict[str, list[str]] = {"data.train": [], "data.eval": []}
    column_maps: list[dict[str, str]] = []
    are_texts: list[bool] = []
    has_untyped = False
    train_keys = [key for key in ("datasets", "pretraining_dataset") if key in keys]
    for key in (*train_keys, "test_datasets"):
        entries = keys.take(key, [])
        for i, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            entry = {"path": entry} if isinstance(entry, str) else dict(entry)
            if key == "pretraining_dataset":
                entry.setdefault("type", "pretrain")
            if key != "test_datasets":
                are_texts.append(entry.get("type") in _TEXT_TYPES)
                has_untyped = has_untyped or not entry.get("type")
            field = "data.eval" if key == "test_datasets" else "data.train"
            files = _read_sources(draft, f"{key}[{i}]", entry)
            sources[field] += files
            column_maps.append(_read_columns(draft, f"{key}[{i}]", entry, files))
    if train_keys:
        draft.put_sources("data.train", sources["data.train"], train_keys[0])
    if has_untyped and draft.get("train.objective") not in (None, "reward"):  # axolotl leaves these rows to TRL
        draft.note_string_rows("datasets")
    if are_texts and all(are_texts):  # in a mix of formats, strop detects text rows by their only column
        draft.put("data.format", "text", f"{train_keys[0]}[0].type")
        draft.put("data.loss", "all", f"{train_keys[0]}[0].type")
    draft.put_sources("data.eval", sources["data.eval"], "test_datasets")
    draft.put_columns(column_maps, "datasets")
    draft.put("data.max_length", 512, "axolotl's default")
    draft.put_int(keys, "sequence_len", "data.max_length")
    strategy = keys.take("excess_length_strategy", "drop")
    if strategy == "truncate" and not (are_texts and all(are_texts)):
        draft.add_unsupported("excess_length_strategy", "truncate: strop drops longer rows instead")
    draft.put("data.overlong", "refuse" if strategy == "raise" else "drop", f"excess_length_strategy {strategy}")
    if are_texts and all(are_texts):
        draft.put("data.overlong", "split", f"{train_keys[0]}[0].type")
        text = "axolotl cuts long texts into pieces, as strop does; with pretraining_dataset it also joins short ones"
        draft.add_difference("sequence_len", text)
    elif any(are_texts):
        text = "axolotl cuts long texts of type completion into pieces; strop {} them: split them in the file"
        draft.add_unsupported("sequence_len", text.format("refuses" if strategy == "raise" else "drops"))
    trains_on_inputs = keys.take("train_on_inputs")
    if trains_on_inputs and draft.get("train.objective") not in (None, "reward"):
        draft.add_ignored("train_on_inputs", "axolotl does not use it with rl")
    elif trains_on_inputs:
        draft.put("data.loss", "all", "train_on_inputs")
        text = "axolotl trains on the contents and stop tokens of all turns of type chat_template; strop also on the "
        draft.add_difference("train_on_inputs", f"{text}template's tokens between them")
    draft.put_eval_share("val_set_size", keys.take("val_set_size"))
    template = keys.take("chat_template")
    if template == "chatml":
        draft.put("data.template", "chatml", "chat_template")
    elif template not in (None, "jinja") and not str(template).startswith("tokenizer_default"):
        file = f"src/axolotl/utils/chat_templates/templates/{template}.jinja"
        text = f"{template}: strop uses the model's template; to use axolotl's, set data.template to a copy of {file}"
        draft.add_difference("chat_template", text)
    if (text := keys.take("chat_template_jinja")) is not None:
        if str(text).endswith((".jinja", ".j2")):
            draft.put("data.template", str(text), "chat_template_jinja")
        else:
            draft.add_unsupported("chat_template_jinja", "an inline template: save it to a file and set data.template")
    if keys.take("sample_packing"):
        draft.note_packing("sample_packing", "; axolotl drops the last, smaller batch of an epoch")
    if keys.take("shuffle_merged_datasets") is False:
        draft.add_unsupported("shuffle_merged_datasets", "false: strop shuffles rows with the seed")


def _read_sources(draft: Draft, key: str, entry: dict[str, Any]) -> list[str]:
    """Return the files or the Hub id of a data set, and remove the keys that were read from the entry."""
    path, files = entry.pop("path", None), entry.pop("data_files", None)
    entry.pop("ds_type", None)
    split, revision, name = entry.pop("split", "train"), entry.pop("revision", None), entry.pop("name", None)
    if split != "train":
        draft.add_unsupported(f"{key}.split", f"{split}: strop reads the train split, or a path within the data set")
    if name is not None:
        draft.add_unsupported(f"{key}.name", f"{name}: give its path within the data set: {path}/...")
    if files is not None:
        return join_files(path, files)
    return [f"{path}@{revision}" if revision else str(path)] if path is not None else []


def _read_columns(draft: Draft, key: str, entry: dict[str, Any], files: list[str]) -> dict[str, str]:
    """Return the columns of a data set unless strop detects them, and report the rest of its entry."""
    row_type = entry.pop("type", None)
    columns: dict[str, str] = {}
    has_pairs = draft.get("train.objective") in ("dpo", "ipo", "orpo", "simpo", "reward")
    messages = "messages" if draft.get("train.objective") is None else "conversations"
    names = {"field_messages": messages, "field_chosen": "chosen", "field_rejected": "rejected", "field": "text"}
    given = {name: str(entry.pop(field)) for field, name in names.items() if entry.get(field) is not None}
    detected = {messages: _DETECTED_COLUMNS}
    if any(column not in (name, *detected.get(name, ())) for name, column in given.items()):
        columns = {**({"chosen": "chosen", "rejected": "rejected"} if has_pairs else {}), **given}
    if isinstance(row_type, dict):
        text = "axolotl uses the text as its format says; strop a chat template, with a blank line before the input"
        draft.add_difference(f"{key}.type", text)
        for field, column in row_type.items():
            if field in _CUSTOM_COLUMNS:
                columns[_CUSTOM_COLUMNS[field]] = str(column)
            elif column:
                draft.add_unsupported(f"{key}.type.{field}", f"{format_value(column)}: strop uses the chat template")
    elif row_type and str(row_type).startswith("alpaca"):
        draft.add_difference(f"{key}.type", f"{row_type}: {_ALPACA_NOTE}")
        columns = draft.columns_to_read(f"{key}.type", files, _ALPACA_COLUMNS)
    elif row_type and row_type not in _TEXT_TYPES and not str(row_type).startswith(("chat_template", _KD_ROWS)):
        draft.add_difference(f"{key}.type", f"{row_type}: strop detects the format and uses the chat template")
    if str(row_type).startswith(_KD_ROWS):
        for field in ("logprobs_field", "temperature"):
            if entry.pop(field, None) is not None:
                draft.add_ignored(f"{key}.{field}", "strop computes the teacher's probabilities")
    for field, value in entry.items():
        if field in ("roles", "message_property_mappings"):
            is_default = value is None or all(
                set(aliases if isinstance(aliases, list) else [aliases]) <= _DETECTED_NAMES.get(role, set())
                for role, aliases in value.items()
            )
        else:
            is_default = value is None or value in _DEFAULT_VALUES.get(field, ())
        if not is_default:
            draft.add_unsupported(f"{key}.{field}", format_value(value))
    return columns


def _read_training(draft: Draft, keys: Keys) -> None:
    micro_batch, accumulation_steps = keys.take("micro_batch_size", 1), keys.take("gradient_accumulation_steps", 1)
    draft.put_batch_size(micro_batch, accumulation_steps, "micro_batch_size x gradient_accumulation_steps")
    draft.put_int(keys, "batch_size", "train.batch_size")
    draft.put("train.epochs", 1.0, "axolotl's default")
    draft.put_fields(keys, {"num_epochs": "train.epochs", "learning_rate": "train.learning_rate"})
    for name, value in {"train.weight_decay": 0.0, "train.max_grad_norm": 1.0, "seed": 42}.items():
        draft.put(name, value, "axolotl's default")
        draft.put_fields(keys, {name.removeprefix("train."): name})
    draft.note_seed("data_seed", keys.take("data_seed"))
    draft.note_batches(keys)
    if (threshold := keys.take("loss_watchdog_threshold")) is not None:
        text = f"{threshold}: axolotl ends the run above this loss; strop skips bad steps, or returns to a checkpoint"
        draft.add_difference("loss_watchdog_threshold", text)
        keys.take("loss_watchdog_patience")
    _read_schedule(draft, keys)
    draft.put_optimizer("optimizer", keys.take("optimizer", "adamw_torch_fused"))
    draft.check_adam_betas(keys)
    draft.read_kept_weights(keys)
    if keys.peek("bf16") in ("auto", "full"):
        draft.add_ignored("bf16", f"{keys.take('bf16')}: strop chooses model.dtype for the machine")
    draft.put_dtype_flags(keys)
    draft.put_checkpointing("gradient_checkpointing", keys.take("gradient_checkpointing"))
    for key, field in (("evals_per_epoch", "train.eval_steps"), ("saves_per_epoch", "train.save_steps")):
        count = keys.take(key)
        if count and count != 1:
            draft.add_unsupported(key, f"{count}: strop's default is once per epoch; set {field} to a number of steps")
    draft.put_int(keys, "early_stopping_patience", "train.early_stopping")
    if draft.get("train.objective") not in (None, "reward"):  # the trainers for `rl` run to their end
        draft.loads_best = False
        if draft.fields.pop("train.early_stopping", None) is not None:
            draft.add_ignored("early_stopping_patience", "axolotl does not use it with rl")
    _read_tracking(draft, keys)
    _read_plugins(draft, keys)
    draft.put_intervals_and_output(keys)
    if draft.get("out") is None:
        draft.add_difference("output_dir", "./model-out in axolotl; runs/DATA-N in strop")


def _read_schedule(draft: Draft, keys: Keys) -> None:
    steps, ratio, name = keys.take("warmup_steps"), keys.take("warmup_ratio"), keys.take("lr_scheduler", "cosine")
    value, key = (steps, "warmup_steps") if steps is not None else (ratio, "warmup_ratio")
    warmup = as_float(key, 0.03 if value is None else value)
    if not draft.is_whole_warmup(key, warmup):
        draft.put("train.warmup", warmup, "axolotl's default" if value is None else key)
    draft.put_schedule("lr_scheduler", name)
    if name == "constant":
        if value:
            draft.add_ignored(key, f"{value}: ignored by axolotl too: lr_scheduler constant has no warmup")
    elif value is None:
        draft.add_difference("warmup", f"not given: 3 % of the steps, at most 100 in axolotl; {WARMUP_NOTE}")
    elif warmup:
        draft.add_difference("warmup", WARMUP_NOTE + "; strop rounds a share up, axolotl down" * (0 < warmup < 1))


def _read_tracking(draft: Draft, keys: Keys) -> None:
    if "wandb_project" in keys:
        draft.put_tracker("wandb_project", "wandb")
    for key in ("wandb_project", "wandb_entity", "wandb_name", "wandb_run_id", "wandb_mode"):
        if (value := keys.take(key)) is not None:
            draft.add_unsupported(key, f"{value}: set {key.upper()}={value} in the environment")
    for key in ("use_tensorboard", "use_trackio", "use_mlflow", "use_comet"):
        if keys.take(key):
            draft.put_tracker(key, key.removeprefix("use_"))


def _read_plugins(draft: Draft, keys: Keys) -> None:
    for plugin in keys.take("plugins") or []:
        if any(name in str(plugin).lower().replace("cutcross", "cut_cross") for name in _SPEED_PLUGINS):
            draft.add_ignored("plugins", str(plugin))
        else:
            draft.add_unsupported("plugins", f"{plugin}: not supported")
    for key in keys:
        if key.startswith("liger_"):
            keys.take(key)
            draft.add_ignored(key)


def _read_objective(draft: Draft, keys: Keys) -> None:
    """Import the settings of preference objectives."""
    draft.disable_dropout_for_preferences()
    if draft.get("train.objective") == "dpo":
        loss = draft.put_sft_loss(keys, "dpo_loss_type", keys.peek("dpo_loss_type"), "dpo_loss_weights")
        if loss in ("ipo", "sigmoid"):
            keys.take("dpo_loss_type")
            draft.put("train.objective", "ipo" if loss == "ipo" else "dpo", "dpo_loss_type")
    if keys.peek("dpo_loss_type") is None:  # other losses are reported, and use label smoothing
        draft.read_trl_loss(keys, "dpo_label_smoothing", "rl")
    draft.put_options(keys, {  # of several betas the last counts, and then trl.beta
        "orpo_alpha": "beta", "dpo_beta": "beta", "rl_beta": "beta", "kto_desirable_weight": "desirable_weight",
        "kto_undesirable_weight": "undesirable_weight",
    })  # fmt: skip
    trl = keys.peek("trl")
    if isinstance(trl, dict) and set(trl) == {"beta"}:
        draft.put_options(Keys({"trl.beta": keys.take("trl")["beta"]}), {"trl.beta": "beta"})
    if draft.get("train.objective") == "simpo":
        draft.put_simpo(keys)
    if draft.get("train.objective") == "ipo" and draft.get("train.beta") is not None:
        draft.add_difference("rl_beta", "strop's beta is tau in the IPO paper")
