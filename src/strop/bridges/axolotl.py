"""Axolotl's YAML as a recipe. Names and defaults as of its 0.18 (src/axolotl/utils/schemas/)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from strop.bridges.draft import Draft, Keys, read_yaml, shown
from strop.bridges.terms import (
    SCHEDULE_STARTS,
    batch,
    checkpointing,
    dtype,
    lora,
    must_be,
    number,
    optimizer,
    packing,
    schedule,
    steps_and_places,
    track,
    val_split,
)
from strop.errors import InputError

OBJECTIVES = {
    "dpo": "dpo", "ipo": "ipo", "kto": "kto", "orpo": "orpo", "simpo": "simpo",
}  # fmt: skip
OWN_WAY = (
    "attn_implementation", "auto_resume_from_checkpoints", "bfloat16", "chunked_cross_entropy", "dataset_num_proc",
    "dataset_prepared_path", "dataset_processes", "ddp_timeout", "device_map", "do_bench_eval",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "eager_attention",
    "eval_batch_size", "eval_sample_packing", "eval_table_size", "flash_attention", "flash_attn_cross_entropy",
    "flash_attn_fuse_mlp", "flex_attention", "gc_steps", "gradient_checkpointing_kwargs", "group_by_length",
    "is_falcon_derived_model", "is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model",
    "local_rank", "lora_mlp_kernel", "lora_o_kernel", "lora_on_cpu", "lora_qkv_kernel", "lora_fan_in_fan_out",
    "loss_watchdog_patience", "loss_watchdog_threshold", "mean_resizing_embeddings", "model_type",
    "pad_to_multiple_of", "pad_to_sequence_len", "plugins", "remove_unused_columns", "sample_packing_bin_size",
    "sample_packing_group_size", "save_first_step", "save_safetensors", "sdp_attention", "shuffle_merged_datasets",
    "strict", "tf32", "tokenizer_type", "tokenizer_use_fast", "torch_compile", "trust_remote_code",
    "use_tensorboard", "wandb_log_model", "wandb_watch", "xformers_attention",
)  # fmt: skip
_TEXT = ("completion", "pretrain")
_OTHER_PROMPT = (
    'its own words around instruction and input there ("Below is an instruction ..."); here the model\'s chat template'
)


def read(path: Path) -> Draft:
    """Raises InputError where it is no LoRA config, or has an objective that strop does not."""
    draft, keys = Draft("axolotl", path), Keys(read_yaml(path))
    _model(draft, keys)
    objective = keys.take("rl")
    if keys.take("reward_model"):
        objective = "reward"
    if objective is not None:
        draft.put("train.objective", must_be("rl", objective, {**OBJECTIVES, "reward": "reward"}), "rl")
    _data(draft, keys)
    _training(draft, keys)
    _preferences(draft, keys)
    keys.end(draft, OWN_WAY)
    return draft


def _model(draft: Draft, keys: Keys) -> None:
    adapter = keys.take("adapter")
    if adapter not in ("lora", "qlora"):
        raise InputError(
            f"{draft.file}: adapter: {adapter}: strop trains LoRA adapters alone",
            fix="set adapter: lora or qlora there",
        )
    if (base := keys.take("base_model")) is not None:
        draft.put("model.name", str(base), "base_model")
    for key, name in (("revision_of_model", "model.revision"), ("lora_model_dir", "model.adapter")):
        if (value := keys.take(key)) is not None:
            draft.put(name, str(value), key)
    for key in ("base_model_config", "tokenizer_config"):
        if keys.peek(key) == base:
            keys.take(key)
    four, eight = keys.take("load_in_4bit"), keys.take("load_in_8bit")
    quantization(draft, four, eight)
    lora(
        draft, keys, rank="lora_r", alpha="lora_alpha", dropout="lora_dropout", modules="lora_target_modules",
        defaults={"lora.dropout": 0.0},
    )  # fmt: skip
    if keys.take("lora_target_linear"):
        draft.put("lora.target_modules", "all-linear", "lora_target_linear")
    for key, name in (
        ("peft_use_dora", "lora.use_dora"),
        ("peft_use_rslora", "lora.use_rslora"),
        ("lora_modules_to_save", "lora.modules_to_save"),
        ("lora_rank_pattern", "lora.rank_pattern"),
        ("lora_alpha_pattern", "lora.alpha_pattern"),
        ("loraplus_lr_ratio", "train.lora_plus_ratio"),
        ("tokens", "lora.new_tokens"),
    ):
        if (value := keys.take(key)) is not None:
            draft.put(name, number(value), key)
    loftq = keys.peek("peft")
    if isinstance(loftq, dict) and set(loftq) == {"loftq_config"}:
        keys.take("peft")
        draft.put("lora.init", "loftq", "peft.loftq_config")
        draft.differ("peft.loftq_config", "one round here, beginning at the quantized base as it is")
    special = keys.take("special_tokens")
    for key, token in (special or {}).items():
        if key == "pad_token":
            draft.skip(f"special_tokens.{key}", "nothing is padded that is learned from")
        else:
            draft.lack(f"special_tokens.{key}", f"{token}: strop takes the tokenizer's and the chat template's own")


def quantization(draft: Draft, four: Any, eight: Any) -> None:
    if four:
        draft.put("model.quantization", "nf4", "load_in_4bit")
    elif eight:
        draft.put("model.quantization", "int8", "load_in_8bit")
        draft.differ("load_in_8bit", "rows are quantized by their largest value here; there outliers stay in 16 bit")
    else:
        draft.put("model.quantization", "none", "neither load_in_4bit nor load_in_8bit")


def _data(draft: Draft, keys: Keys) -> None:
    held_out, kept = [], [name for name in ("datasets", "pretraining_dataset") if name in keys]
    sources: list[str] = []
    every: list[dict[str, str]] = []
    for key in kept:
        entries = keys.take(key)
        for place, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            entry = {"path": entry} if isinstance(entry, str) else dict(entry)
            entry = entry if "type" in entry or key == "datasets" else {**entry, "type": "pretrain"}
            sources += _sources(draft, f"{key}[{place}]", entry)
            every.append(_columns(draft, f"{key}[{place}]", entry))
    for place, entry in enumerate(keys.take("test_datasets") or []):
        held_out += _sources(draft, f"test_datasets[{place}]", dict(entry))
    if sources:
        draft.put("data.train", sources[0] if len(sources) == 1 else sources, kept[0])
    if held_out:
        draft.put("data.eval", held_out[0] if len(held_out) == 1 else held_out, "test_datasets")
    columns = [one for one in every if one]
    if columns and all(one == columns[0] for one in every):
        draft.put("data.columns", columns[0], "names of columns in datasets")
    elif columns:
        draft.lack("datasets", "columns of other names in some of the files: strop takes one --data.columns for all")
    length = keys.take("sequence_len")
    draft.put("data.max_length", int(length or 512), "sequence_len" if length else "axolotl's default")
    strategy = keys.take("excess_length_strategy", "drop")
    if strategy == "truncate":
        draft.lack("excess_length_strategy", "truncate: a row cut at its end loses its stop token; strop drops it")
    draft.put("data.overlong", "refuse" if strategy == "raise" else "drop", f"excess_length_strategy {strategy}")
    if keys.take("train_on_inputs"):
        draft.put("data.loss", "all", "train_on_inputs")
    val_split(draft, "val_set_size", keys.take("val_set_size"))
    template = keys.take("chat_template")
    if template is not None and template != "tokenizer_default":
        draft.differ(
            "chat_template", f"{template}: a name of axolotl's; strop takes the model's own (or data.template)"
        )
    if (text := keys.take("chat_template_jinja")) is not None:
        if str(text).endswith((".jinja", ".j2")):
            draft.put("data.template", str(text), "chat_template_jinja")
        else:
            draft.lack("chat_template_jinja", "a template within the config: put it into a file for data.template")
    if keys.take("sample_packing"):
        packing(draft, "sample_packing")


def _sources(draft: Draft, key: str, entry: dict[str, Any]) -> list[str]:
    """The files or the Hub data set of one entry; what else it says is told."""
    path, files = entry.pop("path", None), entry.pop("data_files", None)
    entry.pop("ds_type", None)
    split, revision, name = entry.pop("split", "train"), entry.pop("revision", None), entry.pop("name", None)
    if split != "train":
        draft.lack(f"{key}.split", f"{split}: strop takes the files of the train split, or a path within the data set")
    if name is not None:
        draft.lack(f"{key}.name", f"{name}: give the path within the data set instead: {path}/...")
    if files is not None:
        listed = [files] if isinstance(files, str) else list(files)
        local = path in (None, "json", "csv", "parquet", "text")
        return [str(file) if local else f"{path}/{file}" for file in listed]
    return [f"{path}@{revision}" if revision else str(path)] if path is not None else []


def _columns(draft: Draft, key: str, entry: dict[str, Any]) -> dict[str, str]:
    """Names of columns where they are not the usual ones."""
    kind = entry.pop("type", None)
    columns: dict[str, str] = {}
    turns = "messages" if draft.get("train.objective") is None else "conversations"
    names = {"field_messages": turns, "field_chosen": "chosen", "field_rejected": "rejected", "field": "text"}
    for theirs, ours in names.items():
        if (column := entry.pop(theirs, None)) is not None:
            columns[ours] = str(column)
    if all(ours == column for ours, column in columns.items()):
        columns = {}
    if isinstance(kind, dict):
        told = {"field_instruction": "instruction", "field_input": "input", "field_output": "output"}
        told |= {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}
        told |= {"field_completion": "completion", "field_label": "label", "field_system": "system"}
        for theirs, column in kind.items():
            if theirs in told:
                columns[told[theirs]] = str(column)
            elif column:
                draft.lack(
                    f"{key}.type.{theirs}", f"{shown(column)}: the chat template writes what stands around texts"
                )
    elif kind in _TEXT:
        draft.put("data.format", "text", f"{key}.type")
        draft.put("data.loss", "all", f"{key}.type")
    elif kind and str(kind).startswith("alpaca"):
        draft.differ(f"{key}.type", f"{kind}: {_OTHER_PROMPT}")
    elif kind and not str(kind).startswith("chat_template"):
        draft.differ(f"{key}.type", f"{kind}: strop finds the shape from the rows, and takes the model's chat template")
    for theirs in ("roles", "message_property_mappings"):
        mapping = entry.pop(theirs, None)
        if mapping is not None and not _plain(mapping):
            draft.lack(f"{key}.{theirs}", shown(mapping))
    for theirs, value in entry.items():
        usual = {"roles_to_train": ["assistant"], "train_on_eos": "turn", "train_on_eot": "turn"}
        if value is None or usual.get(theirs) == value:
            continue
        draft.lack(f"{key}.{theirs}", shown(value))
    return columns


def _plain(mapping: dict[str, Any]) -> bool:
    """Whether roles and properties have the names that strop knows anyhow."""
    known = {"role": {"role", "from"}, "content": {"content", "value"}, "user": {"user", "human"}}
    known |= {"assistant": {"assistant", "gpt", "ai"}, "system": {"system"}, "tool": {"tool"}}
    return all(
        set(value if isinstance(value, list) else [value]) <= known.get(name, set()) for name, value in mapping.items()
    )


def _training(draft: Draft, keys: Keys) -> None:
    rows, steps = keys.take("micro_batch_size", 1), keys.take("gradient_accumulation_steps", 1)
    batch(draft, rows, steps, "micro_batch_size x gradient_accumulation_steps")
    if (total := keys.take("batch_size")) is not None:
        draft.put("train.batch_size", int(total), "batch_size")
    for key, name, default in (
        ("num_epochs", "train.epochs", 1.0),
        ("learning_rate", "train.learning_rate", None),
        ("weight_decay", "train.weight_decay", 0.0),
        ("max_grad_norm", "train.max_grad_norm", 1.0),
        ("seed", "seed", 42),
    ):
        given = keys.take(key)
        value, source = (given, key) if given is not None else (default, "axolotl's default")
        if value is not None:
            draft.put(name, number(value), source)
    steps_, ratio = keys.take("warmup_steps"), keys.take("warmup_ratio")
    warm, source = (steps_, "warmup_steps") if steps_ else (ratio, "warmup_ratio")
    draft.put("train.warmup", number(0.03 if warm is None else warm), source if warm else "axolotl's default")
    draft.differ("warmup", SCHEDULE_STARTS)
    schedule(draft, "lr_scheduler", keys.take("lr_scheduler", "cosine"))
    optimizer(draft, "optimizer", keys.take("optimizer", "adamw_torch_fused"))
    if keys.peek("bf16") in ("auto", "full"):
        keys.take("bf16")
    dtype(draft, keys)
    keys.take("bf16"), keys.take("fp16")
    checkpointing(draft, "gradient_checkpointing", keys.take("gradient_checkpointing"))
    for key in ("evals_per_epoch", "saves_per_epoch"):
        often = keys.take(key)
        if often and often != 1:
            ours = key.partition("s_")[0].replace("eval", "train.eval_steps").replace("save", "train.save_steps")
            draft.lack(key, f"{often}: strop does it once an epoch, or every {ours} steps")
    if (patience := keys.take("early_stopping_patience")) is not None:
        draft.put("train.early_stopping", int(patience), "early_stopping_patience")
    if (project := keys.take("wandb_project")) is not None:
        track(draft, "wandb_project", "wandb")
        draft.lack("wandb_project", f"{project}: set WANDB_PROJECT")
    for key in ("hub_model_id", "hub_strategy"):
        if (name_ := keys.take(key)) is not None:
            draft.lack(key, f"{name_}: a command of its own, after training: `strop push RUN OWNER/NAME`")
    steps_and_places(draft, keys)
    if draft.get("out") is None:
        draft.differ("output_dir", "./model-out there; runs/<data>-N here")


def _preferences(draft: Draft, keys: Keys) -> None:
    for key, name in (
        ("rl_beta", "train.beta"),
        ("orpo_alpha", "train.beta"),
        ("dpo_label_smoothing", "train.label_smoothing"),
        ("simpo_gamma", "train.gamma"),
        ("kto_desirable_weight", "train.desirable_weight"),
        ("kto_undesirable_weight", "train.undesirable_weight"),
    ):
        if (value := keys.take(key)) is not None:
            draft.put(name, number(value), key)
    if draft.get("train.objective") == "ipo" and draft.get("train.beta") is not None:
        draft.differ("rl_beta", "the paper's tau here")
