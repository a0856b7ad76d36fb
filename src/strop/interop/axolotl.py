"""Import Axolotl's YAML. Names and defaults are those of 0.18 (src/axolotl/utils/schemas/)."""

from __future__ import annotations

from typing import Any

from strop.errors import InputError
from strop.interop.draft import IGNORED_KEYS, WARMUP_NOTE, Draft, Keys, as_float, as_int, format_value, objective_for

OBJECTIVES = {name: name for name in ("dpo", "ipo", "kto", "orpo", "simpo", "reward")}
MORE_IGNORED_KEYS = (
    "auto_find_batch_size", "auto_resume_from_checkpoints", "batch_flattening", "chunked_cross_entropy",
    "cut_cross_entropy", "dataset_keep_in_memory", "dataset_prepared_path", "dataset_processes",
    "ddp", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters", "debug", "device_map",
    "do_bench_eval", "do_causal_lm_eval", "dpo_generate_during_eval", "dpo_padding_free", "dpo_use_liger_kernel",
    "dpo_use_logits_to_keep", "eager_attention", "eval_batch_size", "eval_causal_lm_metrics", "eval_max_new_tokens",
    "eval_sample_packing", "eval_table_size", "flash_attention", "flash_attn_cross_entropy", "flash_attn_fuse_mlp",
    "flash_attn_rms_norm", "flash_optimum", "flex_attention", "gc_collect_steps", "gc_steps", "gpu_memory_limit",
    "include_tkps", "is_falcon_derived_model", "is_llama_derived_model", "is_mistral_derived_model",
    "is_qwen_derived_model", "local_rank", "lora_embedding_kernel", "lora_fan_in_fan_out", "lora_mlp_kernel",
    "lora_o_kernel", "lora_on_cpu", "lora_qkv_kernel", "loss_watchdog_patience", "loss_watchdog_threshold",
    "low_cpu_mem_usage", "max_memory", "mean_resizing_embeddings", "model_type", "pad_to_sequence_len",
    "profiler_steps", "profiler_steps_start", "sage_attention", "sample_packing_bin_size", "sample_packing_group_size",
    "save_first_step", "sdp_attention", "strict", "tokenizer_type", "tokenizer_use_fast", "torch_compile",
    "torch_compile_backend", "trust_remote_code", "use_kernels", "use_wandb", "wandb_log_model", "wandb_watch",
    "xformers_attention", "attn_implementation",
)  # fmt: skip
_SPEED_PLUGINS = ("liger", "cut_cross_entropy")  # plugins that change speed, not results
_WANDB = {
    "wandb_entity": "WANDB_ENTITY", "wandb_name": "WANDB_NAME", "wandb_run_id": "WANDB_RUN_ID",
    "wandb_mode": "WANDB_MODE",
}  # fmt: skip
_TEXT = ("completion", "pretrain")
_TURNS = ("messages", "conversation", "conversations")
_OWN_PROMPT_NOTE = (
    'axolotl adds its own prompt ("Below is an instruction ..."); strop uses the model\'s chat template '
    "(for a base model without one, set data.template chatml)"
)


def read(draft: Draft) -> None:
    """Import a config. Raises InputError if it is not a LoRA config, or has an unsupported objective."""
    keys = Keys(draft.read_yaml())
    _model(draft, keys)
    objective = keys.take("rl")
    if keys.take("reward_model"):
        objective = "reward"
    if objective is not None:
        draft.put("train.objective", objective_for("rl", objective, OBJECTIVES), "rl")
    _data(draft, keys)
    _training(draft, keys)
    _preferences(draft, keys)
    keys.report_rest(draft, (*IGNORED_KEYS, *MORE_IGNORED_KEYS))


def _model(draft: Draft, keys: Keys) -> None:
    adapter = keys.take("adapter")
    if adapter not in ("lora", "qlora"):
        what = f"{draft.file}: adapter: {adapter}: strop trains LoRA adapters only"
        raise InputError(what, fix="set adapter: lora or qlora in the file")
    base = keys.peek("base_model")
    names = {"base_model": "model.name", "revision_of_model": "model.revision", "lora_model_dir": "model.adapter"}
    draft.put_fields(keys, names, str)
    for key in ("base_model_config", "tokenizer_config"):
        if keys.peek(key) == base:
            keys.take(key)
    four, eight = keys.take("load_in_4bit"), keys.take("load_in_8bit")
    if four:
        draft.put("model.quantization", "nf4", "load_in_4bit")
    elif eight:
        draft.put_int8("load_in_8bit")
    else:
        draft.put("model.quantization", "none", "neither load_in_4bit nor load_in_8bit")
    named = "lora_target_modules" in keys
    draft.put_lora(keys, rank="lora_r", alpha="lora_alpha", dropout="lora_dropout", modules="lora_target_modules",
        defaults={"lora.dropout": 0.0},
    )  # fmt: skip
    if keys.take("lora_target_linear"):
        draft.put("lora.target_modules", "all-linear", "lora_target_linear")
    elif not named:
        draft.add_difference("lora_target_modules", "not given: strop uses all linear layers")
    draft.put_lora_init(keys, "peft_init_lora_weights")
    draft.put_fields(keys, {
        "peft_use_dora": "lora.use_dora", "peft_use_rslora": "lora.use_rslora", "tokens": "lora.new_tokens",
        "lora_modules_to_save": "lora.modules_to_save", "lora_rank_pattern": "lora.rank_pattern",
        "lora_alpha_pattern": "lora.alpha_pattern", "loraplus_lr_ratio": "train.lora_plus_ratio",
    })  # fmt: skip
    loftq = keys.peek("peft")
    if isinstance(loftq, dict) and set(loftq) == {"loftq_config"}:
        keys.take("peft")
        draft.put("lora.init", "loftq", "peft.loftq_config")
        draft.add_difference("peft.loftq_config", "one iteration here, starting from the quantized base")
    special = keys.take("special_tokens")
    for key, token in (special or {}).items():
        text = f"{token}: strop uses the tokens of the tokenizer and the chat template"
        if key == "pad_token":
            draft.add_ignored("special_tokens.pad_token", "no trained token is padded")
        else:
            draft.add_unsupported(f"special_tokens.{key}", text)


def _data(draft: Draft, keys: Keys) -> None:
    eval_sources, given = [], [name for name in ("datasets", "pretraining_dataset") if name in keys]
    sources: list[str] = []
    column_maps: list[dict[str, str]] = []
    texts: list[bool] = []
    for key in given:
        entries = keys.take(key)
        for place, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            entry = {"path": entry} if isinstance(entry, str) else dict(entry)
            entry = entry if "type" in entry or key == "datasets" else {**entry, "type": "pretrain"}
            texts.append(entry.get("type") in _TEXT)
            sources += _sources(draft, f"{key}[{place}]", entry)
            column_maps.append(_columns(draft, f"{key}[{place}]", entry))
    for place, entry in enumerate(keys.take("test_datasets") or []):
        entry = dict(entry)
        eval_sources += _sources(draft, f"test_datasets[{place}]", entry)
        column_maps.append(_columns(draft, f"test_datasets[{place}]", entry))
    if sources:
        draft.put("data.train", sources[0] if len(sources) == 1 else sources, given[0])
    if texts and all(texts):  # in a mix of formats, strop detects text rows by their only column
        draft.put("data.format", "text", f"{given[0]}[0].type")
        draft.put("data.loss", "all", f"{given[0]}[0].type")
    if eval_sources:
        draft.put("data.eval", eval_sources[0] if len(eval_sources) == 1 else eval_sources, "test_datasets")
    if any(column_maps) and all(columns == column_maps[0] for columns in column_maps):
        draft.put("data.columns", column_maps[0], "names of columns in datasets")
    elif any(column_maps):
        maps = dict.fromkeys(format_value(columns) if columns else "the usual names" for columns in column_maps)
        text = f"column names differ ({' and '.join(maps)}), and data.columns applies to all files: rename the columns"
        draft.add_unsupported("datasets", text)
    length = keys.take("sequence_len")
    source = "sequence_len" if length else "axolotl's default"
    draft.put("data.max_length", as_int("sequence_len", length or 512), source)
    strategy = keys.take("excess_length_strategy", "drop")
    if strategy == "truncate":
        text = "truncate: a truncated row loses its stop token; strop drops such rows"
        draft.add_unsupported("excess_length_strategy", text)
    draft.put("data.overlong", "refuse" if strategy == "raise" else "drop", f"excess_length_strategy {strategy}")
    if keys.take("train_on_inputs"):
        draft.put("data.loss", "all", "train_on_inputs")
    draft.put_eval_share("val_set_size", keys.take("val_set_size"))
    template = keys.take("chat_template")
    if template == "chatml":
        draft.put("data.template", "chatml", "chat_template")
    elif template not in (None, "jinja") and not str(template).startswith("tokenizer_default"):
        file = f"axolotl's is {template}.jinja in src/axolotl/utils/chat_templates/templates"
        text = f"{template}: strop uses the model's template; for another set data.template FILE ({file})"
        draft.add_difference("chat_template", text)
    if (text := keys.take("chat_template_jinja")) is not None:
        if str(text).endswith((".jinja", ".j2")):
            draft.put("data.template", str(text), "chat_template_jinja")
        else:
            draft.add_unsupported("chat_template_jinja", "an inline template: save it to a file and set data.template")
    if keys.take("sample_packing"):
        draft.note_packing("sample_packing")
    if keys.take("shuffle_merged_datasets") is False:
        text = "false: rows keep their order in axolotl; strop shuffles them with the seed"
        draft.add_unsupported("shuffle_merged_datasets", text)


def _sources(draft: Draft, key: str, entry: dict[str, Any]) -> list[str]:
    """Return the files or Hub data set of one entry, and report its other keys."""
    path, files = entry.pop("path", None), entry.pop("data_files", None)
    entry.pop("ds_type", None)
    split, revision, name = entry.pop("split", "train"), entry.pop("revision", None), entry.pop("name", None)
    if split != "train":
        draft.add_unsupported(f"{key}.split", f"{split}: strop reads the train split, or a path within the data set")
    if name is not None:
        draft.add_unsupported(f"{key}.name", f"{name}: give its path within the data set: {path}/...")
    if files is not None:
        listed = [files] if isinstance(files, str) else list(files)
        local = path in (None, "json", "csv", "parquet", "text")
        return [str(file) if local else f"{path}/{file}" for file in listed]
    return [f"{path}@{revision}" if revision else str(path)] if path is not None else []


def _columns(draft: Draft, key: str, entry: dict[str, Any]) -> dict[str, str]:
    """Return the column names that strop does not detect automatically."""
    kind = entry.pop("type", None)
    columns: dict[str, str] = {}
    compared = draft.get("train.objective") in ("dpo", "ipo", "orpo", "simpo", "reward")
    turns = "messages" if draft.get("train.objective") is None else "conversations"
    names = {"field_messages": turns, "field_chosen": "chosen", "field_rejected": "rejected", "field": "text"}
    given = {ours: str(entry.pop(theirs)) for theirs, ours in names.items() if entry.get(theirs) is not None}
    if any(column not in (ours, *(_TURNS if ours == turns else ())) for ours, column in given.items()):
        columns = {**({"chosen": "chosen", "rejected": "rejected"} if compared else {}), **given}
    if isinstance(kind, dict):
        columns_of = {"field_instruction": "instruction", "field_input": "input", "field_output": "output"}
        columns_of |= {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}
        columns_of |= {"field_completion": "completion", "field_label": "label", "field_system": "system"}
        for theirs, column in kind.items():
            if theirs in columns_of:
                columns[columns_of[theirs]] = str(column)
            elif column:
                text = f"{format_value(column)}: strop uses the chat template instead"
                draft.add_unsupported(f"{key}.type.{theirs}", text)
    elif kind and str(kind).startswith("alpaca"):
        draft.add_difference(f"{key}.type", f"{kind}: {_OWN_PROMPT_NOTE}")
    elif kind and kind not in _TEXT and not str(kind).startswith("chat_template"):
        text = f"{kind}: strop detects the format from the rows and uses the model's chat template"
        draft.add_difference(f"{key}.type", text)
    for theirs in ("roles", "message_property_mappings"):
        mapping = entry.pop(theirs, None)
        if mapping is not None and not _has_usual_names(mapping):
            draft.add_unsupported(f"{key}.{theirs}", format_value(mapping))
    for theirs, value in entry.items():
        usual = {"roles_to_train": (["assistant"], ["gpt"]), "train_on_eos": ("turn",), "train_on_eot": ("turn",)}
        if value is None or value in usual.get(theirs, ()):
            continue
        draft.add_unsupported(f"{key}.{theirs}", format_value(value))
    return columns


def _has_usual_names(mapping: dict[str, Any]) -> bool:
    """Return whether roles and properties have names that strop recognises."""
    known = {"role": {"role", "from"}, "content": {"content", "value"}, "user": {"user", "human"}}
    known |= {"assistant": {"assistant", "gpt", "ai"}, "system": {"system"}, "tool": {"tool"}}
    return all(
        set(value if isinstance(value, list) else [value]) <= known.get(name, set()) for name, value in mapping.items()
    )


def _training(draft: Draft, keys: Keys) -> None:
    rows, steps = keys.take("micro_batch_size", 1), keys.take("gradient_accumulation_steps", 1)
    draft.put_batch_size(rows, steps, "micro_batch_size x gradient_accumulation_steps")
    if (total := keys.take("batch_size")) is not None:
        draft.put("train.batch_size", as_int("batch_size", total), "batch_size")
    draft.put("train.epochs", 1.0, "axolotl's default")
    draft.put_fields(keys, {"num_epochs": "train.epochs", "learning_rate": "train.learning_rate"})
    for name, value in {"train.weight_decay": 0.0, "train.max_grad_norm": 1.0, "seed": 42}.items():
        draft.put(name, value, "axolotl's default")
        draft.put_fields(keys, {name.removeprefix("train."): name})
    _schedule(draft, keys)
    draft.put_optimizer("optimizer", keys.take("optimizer", "adamw_torch_fused"))
    draft.check_adam_betas(keys)
    if keys.peek("bf16") in ("auto", "full"):
        draft.add_ignored("bf16", f"{keys.take('bf16')}: strop chooses model.dtype for the machine")
    draft.put_dtype_flags(keys)
    draft.put_checkpointing("gradient_checkpointing", keys.take("gradient_checkpointing"))
    for key, ours in (("evals_per_epoch", "train.eval_steps"), ("saves_per_epoch", "train.save_steps")):
        often = keys.take(key)
        if often and often != 1:
            draft.add_unsupported(key, f"{often}: once an epoch here; otherwise set {ours} to a number of steps")
    if (patience := keys.take("early_stopping_patience")) is not None:
        draft.put("train.early_stopping", as_int("early_stopping_patience", patience), "early_stopping_patience")
    _tracking(draft, keys)
    _plugins(draft, keys)
    draft.put_intervals_and_output(keys)
    if draft.get("out") is None:
        draft.add_difference("output_dir", "./model-out in axolotl; runs/<data>-N in strop")


def _schedule(draft: Draft, keys: Keys) -> None:
    steps, ratio, name = keys.take("warmup_steps"), keys.take("warmup_ratio"), keys.take("lr_scheduler", "cosine")
    warm, source = (steps, "warmup_steps") if steps is not None else (ratio, "warmup_ratio")
    warmup = as_float(source, 0.03 if warm is None else warm)
    draft.put("train.warmup", warmup, "axolotl's default" if warm is None else source)
    draft.put_schedule("lr_scheduler", name)
    if name == "constant":
        if warm:
            draft.add_ignored(source, f"{warm}: ignored by axolotl too: lr_scheduler constant has no warmup")
    elif warm is None:
        draft.add_difference("warmup", f"not given: 3 % of the steps, at most 100 in axolotl; {WARMUP_NOTE}")
    elif warmup:
        draft.add_difference("warmup", f"{WARMUP_NOTE}" + "; strop rounds a share up, axolotl down" * (0 < warmup < 1))


def _tracking(draft: Draft, keys: Keys) -> None:
    if (project := keys.take("wandb_project")) is not None:
        draft.put_tracker("wandb_project", "wandb")
        draft.add_unsupported("wandb_project", f"{project}: set WANDB_PROJECT={project} in the environment")
    for key, name in _WANDB.items():
        if (value := keys.take(key)) is not None:
            draft.add_unsupported(key, f"{value}: set {name}={value} in the environment")
    for key in ("use_tensorboard", "use_trackio", "use_mlflow", "use_comet"):
        if keys.take(key):
            draft.put_tracker(key, key.removeprefix("use_"))


def _plugins(draft: Draft, keys: Keys) -> None:
    """Import plugins and their keys."""
    for plugin in keys.take("plugins") or []:
        if any(word in str(plugin).lower().replace("cutcross", "cut_cross") for word in _SPEED_PLUGINS):
            draft.add_ignored("plugins", str(plugin))
        else:
            draft.add_unsupported("plugins", f"{plugin}: not supported")
    for key in [key for key in keys.left() if key.startswith("liger_")]:
        keys.take(key)
        draft.add_ignored(key)


def _preferences(draft: Draft, keys: Keys) -> None:
    draft.disable_dropout_for_preferences("lora_dropout")
    kinds = keys.peek("dpo_loss_type")
    if kinds in (["ipo"], ["sigmoid"]) and draft.get("train.objective") == "dpo":
        keys.take("dpo_loss_type")
        draft.put("train.objective", "ipo" if kinds == ["ipo"] else "dpo", "dpo_loss_type")
    draft.put_fields(keys, {
        "rl_beta": "train.beta", "orpo_alpha": "train.beta", "dpo_label_smoothing": "train.label_smoothing",
        "kto_desirable_weight": "train.desirable_weight", "kto_undesirable_weight": "train.undesirable_weight",
    })  # fmt: skip
    if draft.get("train.objective") == "simpo":
        draft.put_simpo(keys)
    if draft.get("train.objective") == "ipo" and draft.get("train.beta") is not None:
        draft.add_difference("rl_beta", "the tau of the paper here")
