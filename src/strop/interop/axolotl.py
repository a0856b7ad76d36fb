"""Axolotl's YAML as a recipe. Names and defaults as of its 0.18 (src/axolotl/utils/schemas/)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from strop.errors import InputError
from strop.interop.draft import Draft, Keys, read_yaml, shown
from strop.interop.hf_arguments import OWN_WAY as _OWN_WAY
from strop.interop.hf_arguments import (
    SCHEDULE_STARTS,
    adam,
    batch,
    checkpointing,
    dtype,
    first_weights,
    lora,
    must_be,
    no_dropout,
    number,
    optimizer,
    packing,
    real,
    schedule,
    simpo,
    steps_and_places,
    track,
    val_split,
    whole,
)

OBJECTIVES = {
    "dpo": "dpo", "ipo": "ipo", "kto": "kto", "orpo": "orpo", "simpo": "simpo",
}  # fmt: skip
OWN_WAY = (
    *_OWN_WAY, "auto_find_batch_size", "auto_resume_from_checkpoints", "batch_flattening", "chunked_cross_entropy",
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
_FASTER = ("liger", "cut_cross_entropy")  # plugins and keys that change how it is computed, not what
_WANDB = {
    "wandb_entity": "WANDB_ENTITY", "wandb_name": "WANDB_NAME", "wandb_run_id": "WANDB_RUN_ID",
    "wandb_mode": "WANDB_MODE",
}  # fmt: skip
_TEXT = ("completion", "pretrain")
_TURNS = ("messages", "conversation", "conversations")
_OTHER_PROMPT = (
    'its own words around instruction and input there ("Below is an instruction ..."); here the model\'s chat template '
    "(a base model that has none: data.template chatml)"
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
    named = "lora_target_modules" in keys
    lora(
        draft, keys, rank="lora_r", alpha="lora_alpha", dropout="lora_dropout", modules="lora_target_modules",
        defaults={"lora.dropout": 0.0},
    )  # fmt: skip
    if keys.take("lora_target_linear"):
        draft.put("lora.target_modules", "all-linear", "lora_target_linear")
    elif not named:
        draft.differ("lora_target_modules", "not given: strop takes all linear layers")
    first_weights(draft, keys, "peft_init_lora_weights")
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
    texts: list[bool] = []
    for key in kept:
        entries = keys.take(key)
        for place, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            entry = {"path": entry} if isinstance(entry, str) else dict(entry)
            entry = entry if "type" in entry or key == "datasets" else {**entry, "type": "pretrain"}
            texts.append(entry.get("type") in _TEXT)
            sources += _sources(draft, f"{key}[{place}]", entry)
            every.append(_columns(draft, f"{key}[{place}]", entry))
    for place, entry in enumerate(keys.take("test_datasets") or []):
        entry = dict(entry)
        held_out += _sources(draft, f"test_datasets[{place}]", entry)
        every.append(_columns(draft, f"test_datasets[{place}]", entry))
    if sources:
        draft.put("data.train", sources[0] if len(sources) == 1 else sources, kept[0])
    if texts and all(texts):  # among others strop knows rows of text by their one column
        draft.put("data.format", "text", f"{kept[0]}[0].type")
        draft.put("data.loss", "all", f"{kept[0]}[0].type")
    if held_out:
        draft.put("data.eval", held_out[0] if len(held_out) == 1 else held_out, "test_datasets")
    if any(every) and all(one == every[0] for one in every):
        draft.put("data.columns", every[0], "names of columns in datasets")
    elif any(every):
        named = " and ".join(dict.fromkeys(shown(one) if one else "the usual names" for one in every))
        draft.lack("datasets", f"columns of several names, {named}: data.columns is one for all files; rename them")
    length = keys.take("sequence_len")
    draft.put(
        "data.max_length", whole("sequence_len", length or 512), "sequence_len" if length else "axolotl's default"
    )
    strategy = keys.take("excess_length_strategy", "drop")
    if strategy == "truncate":
        draft.lack("excess_length_strategy", "truncate: a row cut at its end loses its stop token; strop drops it")
    draft.put("data.overlong", "refuse" if strategy == "raise" else "drop", f"excess_length_strategy {strategy}")
    if keys.take("train_on_inputs"):
        draft.put("data.loss", "all", "train_on_inputs")
    val_split(draft, "val_set_size", keys.take("val_set_size"))
    template = keys.take("chat_template")
    if template == "chatml":
        draft.put("data.template", "chatml", "chat_template")
    elif template == "jinja" or str(template).startswith("tokenizer_default"):
        pass
    elif template is not None:
        file = f"axolotl's own is the file {template}.jinja in src/axolotl/utils/chat_templates/templates"
        draft.differ("chat_template", f"{template}: the model's own here; another: data.template FILE ({file})")
    if (text := keys.take("chat_template_jinja")) is not None:
        if str(text).endswith((".jinja", ".j2")):
            draft.put("data.template", str(text), "chat_template_jinja")
        else:
            draft.lack("chat_template_jinja", "a template within the config: put it into a file for data.template")
    if keys.take("sample_packing"):
        packing(draft, "sample_packing")
    if keys.take("shuffle_merged_datasets") is False:
        draft.lack("shuffle_merged_datasets", "false: rows keep their order there; strop shuffles them by the seed")


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
    """Names of columns where they are not those that strop finds by itself."""
    kind = entry.pop("type", None)
    columns: dict[str, str] = {}
    compared = draft.get("train.objective") in ("dpo", "ipo", "orpo", "simpo", "reward")
    turns = "messages" if draft.get("train.objective") is None else "conversations"
    names = {"field_messages": turns, "field_chosen": "chosen", "field_rejected": "rejected", "field": "text"}
    given = {ours: str(entry.pop(theirs)) for theirs, ours in names.items() if entry.get(theirs) is not None}
    if any(column not in (ours, *(_TURNS if ours == turns else ())) for ours, column in given.items()):
        columns = {**({"chosen": "chosen", "rejected": "rejected"} if compared else {}), **given}
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
        pass
    elif kind and str(kind).startswith("alpaca"):
        draft.differ(f"{key}.type", f"{kind}: {_OTHER_PROMPT}")
    elif kind and not str(kind).startswith("chat_template"):
        draft.differ(f"{key}.type", f"{kind}: strop finds the shape from the rows, and takes the model's chat template")
    for theirs in ("roles", "message_property_mappings"):
        mapping = entry.pop(theirs, None)
        if mapping is not None and not _plain(mapping):
            draft.lack(f"{key}.{theirs}", shown(mapping))
    for theirs, value in entry.items():
        usual = {"roles_to_train": (["assistant"], ["gpt"]), "train_on_eos": ("turn",), "train_on_eot": ("turn",)}
        if value is None or value in usual.get(theirs, ()):
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
        draft.put("train.batch_size", whole("batch_size", total), "batch_size")
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
    _schedule(draft, keys)
    optimizer(draft, "optimizer", keys.take("optimizer", "adamw_torch_fused"))
    adam(draft, keys)
    if keys.peek("bf16") in ("auto", "full"):
        draft.skip("bf16", f"{keys.take('bf16')}: model.dtype, by what the machine computes well")
    dtype(draft, keys)
    checkpointing(draft, "gradient_checkpointing", keys.take("gradient_checkpointing"))
    for key, ours in (("evals_per_epoch", "train.eval_steps"), ("saves_per_epoch", "train.save_steps")):
        often = keys.take(key)
        if often and often != 1:
            draft.lack(key, f"{often}: once an epoch here; for more give {ours}, a number of steps")
    if (patience := keys.take("early_stopping_patience")) is not None:
        draft.put("train.early_stopping", whole("early_stopping_patience", patience), "early_stopping_patience")
    _tracking(draft, keys)
    _how(draft, keys)
    steps_and_places(draft, keys)
    if draft.get("out") is None:
        draft.differ("output_dir", "./model-out there; runs/<data>-N here")


def _schedule(draft: Draft, keys: Keys) -> None:
    steps, ratio, name = keys.take("warmup_steps"), keys.take("warmup_ratio"), keys.take("lr_scheduler", "cosine")
    warm, source = (steps, "warmup_steps") if steps is not None else (ratio, "warmup_ratio")
    warmup = real(source, 0.03 if warm is None else warm)
    draft.put("train.warmup", warmup, "axolotl's default" if warm is None else source)
    schedule(draft, "lr_scheduler", name)
    if name == "constant":
        if warm:
            draft.skip(source, f"{warm}: lr_scheduler constant has no warmup there either")
    elif warm is None:
        draft.differ("warmup", f"not given: 3 % of the steps, there at most 100; {SCHEDULE_STARTS}")
    elif warmup:
        draft.differ("warmup", f"{SCHEDULE_STARTS}" + "; a share is rounded up, there down" * (0 < warmup < 1))


def _tracking(draft: Draft, keys: Keys) -> None:
    if (project := keys.take("wandb_project")) is not None:
        track(draft, "wandb_project", "wandb")
        draft.lack("wandb_project", f"{project}: set WANDB_PROJECT={project} in the environment")
    for key, name in _WANDB.items():
        if (value := keys.take(key)) is not None:
            draft.lack(key, f"{value}: set {name}={value} in the environment")
    for key, tracker in (("use_tensorboard", "tensorboard"), ("use_trackio", "trackio")):
        if keys.take(key):
            track(draft, key, tracker)
    for key in ("use_mlflow", "use_comet"):
        if keys.take(key):
            track(draft, key, key.removeprefix("use_"))


def _how(draft: Draft, keys: Keys) -> None:
    """Plugins, and keys of those that strop has no need of."""
    for plugin in keys.take("plugins") or []:
        if any(word in str(plugin).lower().replace("cutcross", "cut_cross") for word in _FASTER):
            draft.skip("plugins", str(plugin))
        else:
            draft.lack("plugins", f"{plugin}: what it adds is not here")
    for key in [key for key in keys.left() if key.startswith("liger_")]:
        keys.take(key)
        draft.skip(key)


def _preferences(draft: Draft, keys: Keys) -> None:
    no_dropout(draft, "lora_dropout")
    kinds = keys.peek("dpo_loss_type")
    if kinds in (["ipo"], ["sigmoid"]) and draft.get("train.objective") == "dpo":
        keys.take("dpo_loss_type")
        draft.put("train.objective", "ipo" if kinds == ["ipo"] else "dpo", "dpo_loss_type")
    for key, name in (
        ("rl_beta", "train.beta"),
        ("orpo_alpha", "train.beta"),
        ("dpo_label_smoothing", "train.label_smoothing"),
        ("kto_desirable_weight", "train.desirable_weight"),
        ("kto_undesirable_weight", "train.undesirable_weight"),
    ):
        if (value := keys.take(key)) is not None:
            draft.put(name, number(value), key)
    if draft.get("train.objective") == "simpo":
        simpo(draft, keys)
    if draft.get("train.objective") == "ipo" and draft.get("train.beta") is not None:
        draft.differ("rl_beta", "the paper's tau here")
