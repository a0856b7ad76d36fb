"""Import LLaMA-Factory's YAML. Names and defaults are those of 0.9.6.dev0 (src/llamafactory/hparams/)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from strop.errors import InputError
from strop.interop.draft import (
    IGNORED_KEYS,
    IN_FULL_NOTE,
    LINE_BREAK_NOTE,
    PROJECTOR_NOTE,
    Columns,
    Draft,
    Keys,
    as_int,
    as_number,
    format_value,
)

STAGES = {"sft": "sft", "pt": "sft", "dpo": "dpo", "kto": "kto", "rm": "reward"}
LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
DEFAULTS = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 5e-5, "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear", "optim": "adamw_torch", "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 42,
}  # fmt: skip
MORE_IGNORED_KEYS = (
    "cache_dir", "data_shared_file_system", "enable_liger_kernel", "flash_attn", "low_cpu_mem_usage",
    "overwrite_cache", "plot_loss", "preprocessing_batch_size", "preprocessing_num_workers", "print_param_status",
    "quantization_device_map", "upcast_layernorm", "use_fast_tokenizer", "use_reentrant_gc",
    "use_unsloth", "use_unsloth_gc",
)  # fmt: skip
# strop's column names by the names in dataset_info.json
_ALPACA_COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history",
}  # fmt: skip
_SHAREGPT_COLUMNS = {"messages": "conversations", "system": "system", "tools": "tools"}
_PREFERENCE_COLUMNS = {"chosen": "chosen", "rejected": "rejected", "kto_tag": "kto_tag"}
_DETECTED_COLUMNS = {"conversations": ("conversations", "messages"), "kto_tag": ("kto_tag", "label")}
_USUAL_TAGS = {
    "role_tag": ("from", "role"), "content_tag": ("value", "content"), "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"), "system_tag": ("system",), "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "tool_call"),
}  # fmt: skip


def read(draft: Draft) -> None:
    """Import a config. Raises InputError for another method than LoRA or full, or an unsupported stage."""
    keys = Keys(draft.read_yaml())
    finetuning_type = keys.take("finetuning_type", "lora")
    if finetuning_type == "full":
        draft.put_full("finetuning_type")
    elif finetuning_type != "lora":
        raise draft.not_supported_error(f"finetuning_type: {finetuning_type}", "set it to lora or full")
    stage = keys.take("stage", "sft")
    if stage == "dpo":
        objective = draft.put_objective("pref_loss", keys.take("pref_loss", "sigmoid"), LOSSES)
    else:
        objective = draft.put_objective("stage", stage, STAGES)
    _read_model(draft, keys)
    _read_data(draft, keys, stage)
    draft.put_training_arguments(keys, DEFAULTS)
    draft.put_int(keys, "early_stopping_steps", "train.early_stopping")
    _read_objective(draft, keys, objective)
    keys.report_rest(draft, (*IGNORED_KEYS, *MORE_IGNORED_KEYS))


def _read_model(draft: Draft, keys: Keys) -> None:
    draft.put_fields(keys, {"model_name_or_path": "model.name", "adapter_name_or_path": "model.adapter"}, str)
    adapters = str(draft.get("model.adapter") or "").split(",")
    merged = adapters if keys.take("create_new_adapter") and any(adapters) else adapters[:-1]
    if merged:
        draft.fields.pop("model.adapter")
        if len(merged) < len(adapters):
            draft.put("model.adapter", adapters[-1].strip(), "adapter_name_or_path")
        text = f"{', '.join(merged)}: merged into the base first: use `strop merge`, and set model.name"
        draft.add_unsupported("adapter_name_or_path", text)
    draft.put_fields(keys, {"loraplus_lr_ratio": "train.lora_plus_ratio"})
    if (revision := keys.take("model_revision", "main")) != "main":
        draft.put("model.revision", revision, "model_revision")
    bits, method = keys.take("quantization_bit"), keys.take("quantization_method")
    four_bit_type, double_quantization = keys.take("quantization_type", "nf4"), keys.take("double_quantization")
    if method in (None, "bnb", "bitsandbytes") and bits in (4, 8):  # bitsandbytes: its name up to 0.9.2
        if bits == 4:
            draft.put("model.quantization", four_bit_type, "quantization_bit")
        else:
            draft.put_int8("quantization_bit")
        if double_quantization is not None:
            draft.put("model.double_quantization", bool(double_quantization), "double_quantization")
    else:
        draft.put("model.quantization", "none", "no quantization_bit")
        if bits is not None:
            draft.add_unsupported("quantization_bit", f"{bits} by {method}: strop has nf4, fp4 and int8")
    rank = as_int("lora_rank", keys.peek("lora_rank", 8))
    draft.put_lora(keys, "lora_rank", "lora_target", {"lora.r": 8, "lora.alpha": 2 * rank, "lora.dropout": 0.0})
    _read_vision(draft, keys)
    lists = {"additional_target": "lora.modules_to_save", "add_tokens": "lora.new_tokens"}
    draft.put_fields(keys, lists, lambda value: [part.strip() for part in str(value).split(",")])
    if "lora.new_tokens" in draft.fields:
        text = "the embeddings and the head are trained in full there; strop trains the rows of the new tokens"
        draft.add_difference("add_tokens", text)


def _read_vision(draft: Draft, keys: Keys) -> None:
    """Import which parts of a model with images are trained."""
    if keys.take("freeze_language_model"):
        draft.add_unsupported("freeze_language_model", "true: strop always trains the text model")
    frozen = {key: keys.take(key, True) for key in ("freeze_vision_tower", "freeze_multi_modal_projector")}
    trained = [key for key, is_frozen in frozen.items() if not is_frozen]
    if not trained:
        return
    if draft.get("train.method") == "full":
        draft.add_unsupported(trained[0], "false: with train.method full, strop trains only the text model")
        return
    draft.put("lora.vision", "projector" if frozen["freeze_vision_tower"] else "all", trained[0])
    draft.add_difference(trained[0], PROJECTOR_NOTE if frozen["freeze_vision_tower"] else IN_FULL_NOTE)


def _read_data(draft: Draft, keys: Keys, stage: str) -> None:
    folder = keys.take("dataset_dir", "data")
    draft.put_fields(keys, {"media_dir": "data.image_folder"}, str)
    info_file = _find_dataset_info(draft.file, str(folder))
    column_maps: list[Columns] = []
    for key, field in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        names = keys.take(key, [])
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        if info_file is not None:
            column_maps += _read_data_sets(draft, key, field, info_file, names, stage)
        elif names:
            draft.add_unsupported(key, f"{', '.join(names)}: {folder}/dataset_info.json does not exist")
    draft.put_columns(column_maps, "dataset")
    draft.put("data.max_length", 2048, "llamafactory's default")
    draft.put_int(keys, "cutoff_len", "data.max_length")
    is_neat, packing = bool(keys.take("neat_packing")), bool(keys.take("packing", stage == "pt"))
    packing = packing or is_neat
    if packing and not is_neat and stage != "pt":
        draft.add_unsupported(
            "packing", "packed rows attend to each other there; strop keeps them apart (neat_packing)"
        )
    if packing:
        draft.note_packing("packing", "; stage pt packs by default" * (stage == "pt"))
    if stage == "pt" and packing:
        draft.put("data.overlong", "split", "packing, the default of stage pt")
        text = "the other tool joins all texts, and cuts them into pieces of cutoff_len; strop cuts the longer texts"
        draft.add_difference("cutoff_len", text)
    else:
        draft.note_max_length("cutoff_len")
    if stage == "pt":
        draft.put("data.format", "text", "stage: pt")
    if keys.take("train_on_prompt") or stage == "pt":
        draft.put("data.loss", "all", "train_on_prompt" if stage != "pt" else "stage: pt")
    if (template := keys.take("template")) is not None:
        draft.add_difference("template", f"{template}: strop uses the model's chat template, or data.template")
    if (thinking := keys.take("enable_thinking")) is not None:
        draft.put("data.template_options", {"enable_thinking": bool(thinking)}, "enable_thinking")
        draft.add_difference(
            "enable_thinking", "passed to the model's template; remove data.template_options if that has no such option"
        )
        if not thinking:
            draft.put("data.reasoning", "drop", "enable_thinking: false removes the reasoning of rows")
    draft.put_eval_share("val_size", keys.take("val_size"))
    if stage != "pt":
        draft.add_difference("stop token", LINE_BREAK_NOTE)


def _find_dataset_info(config: Path, folder: str) -> Path | None:
    """Return the path of dataset_info.json; `folder` is relative to the working folder or to the config."""
    files = [path / "dataset_info.json" for path in (Path(folder), config.parent / folder, config.parent)]
    return next((file for file in files if file.is_file()), None)


def _read_data_sets(draft: Draft, key: str, field: str, info_file: Path, names: list[str], stage: str) -> list[Columns]:
    """Import the data sets with these names, and return their columns. Raises InputError."""
    try:
        entries = json.loads(info_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{info_file}: not JSON: {error}", fix="fix the syntax") from None
    sources: list[str] = []
    column_maps: list[Columns] = []
    for name in names:
        entry = dict(entries.get(name) or {})
        if not entry:
            draft.add_unsupported(key, f"{name}: not in {info_file}")
        else:
            file, hub_id = entry.pop("file_name", None), entry.pop("hf_hub_url", None)
            sources.append(str(info_file.parent / file) if file else str(hub_id))
        column_maps.append(_read_columns(draft, name, entry, stage, sources[-1:] if name in entries else []))
    draft.put_sources(field, sources, key)
    return column_maps


def _read_columns(draft: Draft, name: str, entry: dict[str, Any], stage: str, files: list[str]) -> dict[str, str]:
    """Return the columns of a data set unless strop detects them, and report the rest of its entry."""
    formatting = entry.pop("formatting", "alpaca")
    is_alpaca = formatting == "alpaca"
    known_columns = {**(_ALPACA_COLUMNS if is_alpaca else _SHAREGPT_COLUMNS), **_PREFERENCE_COLUMNS}
    given, columns = entry.pop("columns", None) or {}, {}
    if not is_alpaca:
        added = "; a system text, detailed thinking off, is added to rows without tools" * (formatting == "openai")
        text = "rows are skipped there if the roles in `tags` do not alternate or the last turn is not an answer"
        draft.add_difference(f"{name}.formatting", f"{formatting}: {text}{added}")
    elif stage != "pt" and (given.get("query") or not given):
        draft.add_difference(
            f"{name}.columns.query", "follows the prompt after a line break; in strop after a blank line"
        )
    defaults = {"prompt": "instruction", "query": "input", "response": "output"}
    for key, column in (given or (defaults if is_alpaca else {"messages": "conversations"})).items():
        if key in known_columns and column:
            columns[known_columns[key]] = str(column)
        elif column and (key, column) != ("images", "images"):  # which strop reads by itself
            draft.add_unsupported(f"{name}.columns.{key}", str(column))
    if stage == "pt":
        columns = {"text": columns["instruction"]} if given and "instruction" in columns else {}
    elif all(column in _DETECTED_COLUMNS.get(field, (field,)) for field, column in columns.items()):
        columns = draft.columns_to_read(f"{name}.columns", files, columns, is_given=bool(given))
    tags = entry.pop("tags", None) or {}
    if any(str(value) not in _USUAL_TAGS.get(key, ()) for key, value in tags.items()):
        draft.add_unsupported(f"{name}.tags", f"{format_value(tags)}: strop recognises the usual role names only")
    entry.pop("ranking", None)
    for key, value in entry.items():
        if value is not None and (key, value) != ("split", "train"):
            draft.add_unsupported(f"{name}.{key}", format_value(value))
    return columns


def _read_objective(draft: Draft, keys: Keys, objective: str) -> None:
    """Import the settings of preference objectives."""
    if objective in ("dpo", "ipo", "kto", "orpo", "simpo"):
        draft.disable_dropout_for_preferences()
        draft.put("train.beta", 0.1, "llamafactory's default")
        draft.put_fields(keys, {"pref_beta": "train.beta"})
        if objective == "simpo":
            gamma = keys.take("simpo_gamma", 0.5)
            draft.put("train.gamma", as_number(gamma), "simpo_gamma")
    elif keys.take("pref_beta") is not None:
        draft.add_ignored("pref_beta", "not used in this stage")
    draft.put_options(keys, {
        "pref_ftx": "sft_weight", "dpo_label_smoothing": "label_smoothing", "kto_chosen_weight": "desirable_weight",
        "kto_rejected_weight": "undesirable_weight",
    })  # fmt: skip
