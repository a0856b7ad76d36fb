"""Import LLaMA-Factory's YAML. Names and defaults are those of 0.9.6 (src/llamafactory/hparams/)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from strop.errors import InputError
from strop.interop.draft import IGNORED_KEYS, Draft, Keys, as_int, as_number, format_value, objective_for

STAGES = {"sft": "sft", "pt": "sft", "dpo": "dpo", "kto": "kto", "rm": "reward"}
LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
DEFAULTS = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 5e-5, "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear", "optim": "adamw_torch", "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 42,
}  # fmt: skip
MORE_IGNORED_KEYS = (
    "cache_dir", "data_shared_file_system", "enable_liger_kernel", "flash_attn", "low_cpu_mem_usage", "media_dir",
    "overwrite_cache", "plot_loss", "preprocessing_batch_size", "preprocessing_num_workers", "print_param_status",
    "tokenized_path", "trust_remote_code", "use_fast_tokenizer", "use_reentrant_gc", "use_unsloth", "use_unsloth_gc",
    "upcast_layernorm", "quantization_device_map",
)  # fmt: skip
# column names in dataset_info.json and strop's, by row format
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
_DETECTED_COLUMNS = {"conversations": ("conversations", "messages"), "kto_tag": ("kto_tag", "label")}
_SHAREGPT = {"messages": "conversations", "system": "system", "tools": "tools"}


def read(draft: Draft) -> None:
    """Import a config. Raises InputError if it is not a LoRA config, or has an unsupported stage."""
    keys = Keys(draft.read_yaml())
    kind = keys.take("finetuning_type", "lora")
    if kind != "lora":
        what = f"{draft.file}: finetuning_type: {kind}: strop trains LoRA adapters only"
        raise InputError(what, fix="set it to lora")
    stage = keys.take("stage", "sft")
    objective = objective_for("stage", stage, STAGES)
    if stage == "dpo":
        objective = objective_for("pref_loss", keys.take("pref_loss", "sigmoid"), LOSSES)
    if objective != "sft":
        draft.put("train.objective", objective, "stage")
    _model(draft, keys)
    _data(draft, keys, stage)
    draft.put_training_arguments(keys, DEFAULTS, tool="llamafactory")
    if (patience := keys.take("early_stopping_steps")) is not None:
        draft.put("train.early_stopping", as_int("early_stopping_steps", patience), "early_stopping_steps")
    _preferences(draft, keys, objective)
    keys.report_rest(draft, (*IGNORED_KEYS, *MORE_IGNORED_KEYS))


def _model(draft: Draft, keys: Keys) -> None:
    draft.put_fields(keys, {"model_name_or_path": "model.name", "adapter_name_or_path": "model.adapter"}, str)
    draft.put_fields(keys, {"loraplus_lr_ratio": "train.lora_plus_ratio"})
    if (revision := keys.take("model_revision", "main")) != "main":
        draft.put("model.revision", revision, "model_revision")
    bits, method, kind = keys.take("quantization_bit"), keys.take("quantization_method"), keys.take("quantization_type")
    double = keys.take("double_quantization")
    if bits is not None and method in (None, "bnb") and bits in (4, 8):
        draft.put("model.quantization", (kind or "nf4") if bits == 4 else "int8", "quantization_bit")
        if bits == 8:
            text = "8: each weight row is scaled by its largest value here, without separate outliers"
            draft.add_difference("quantization_bit", text)
        if double is not None:
            draft.put("model.double_quantization", bool(double), "double_quantization")
    else:
        draft.put("model.quantization", "none", "no quantization_bit")
        if bits is not None:
            draft.add_unsupported("quantization_bit", f"{bits} by {method}: strop has nf4, fp4 and int8")
    rank = as_int("lora_rank", keys.peek("lora_rank", 8))
    draft.put_lora(keys, rank="lora_rank", alpha="lora_alpha", dropout="lora_dropout", modules="lora_target",
        defaults={"lora.r": 8, "lora.alpha": 2 * rank, "lora.dropout": 0.0},
    )  # fmt: skip
    lists = {"additional_target": "lora.modules_to_save", "add_tokens": "lora.new_tokens"}
    draft.put_fields(keys, lists, lambda value: [part.strip() for part in str(value).split(",")])


def _data(draft: Draft, keys: Keys, stage: str) -> None:
    folder = keys.take("dataset_dir", "data")
    known = _read_dataset_info(draft.file, folder)
    if known is None and ("dataset" in keys or "eval_dataset" in keys):
        text = f"{keys.peek('dataset')}: names in {folder}/dataset_info.json, which does not exist"
        draft.add_unsupported("dataset", text)
        keys.take("dataset"), keys.take("eval_dataset")
    for key, name in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        listed = keys.take(key)
        if listed is None or known is None:
            continue
        names = [part.strip() for part in listed.split(",")] if isinstance(listed, str) else listed
        located = [_source(draft, key, name_, known, stage) for name_ in names]
        sources = [source for source, _ in located if source]
        if sources:
            draft.put(name, sources[0] if len(sources) == 1 else sources, key)
        columns = [columns_ for _, columns_ in located if columns_]
        if columns and all(columns_ == columns[0] for _, columns_ in located):
            draft.put("data.columns", columns[0], f"columns of {key}")
        elif columns:
            draft.add_unsupported(f"columns of {key}", "they differ by file, and data.columns applies to all files")
    length = keys.take("cutoff_len")
    source = "cutoff_len" if length else "llamafactory's default"
    draft.put("data.max_length", as_int("cutoff_len", length or 2048), source)
    text = "LLaMA-Factory truncates longer rows (prompt and answer each at the end), or drops them with packing; strop "
    text += "refuses such rows: raise data.max_length, or choose data.overlong"
    draft.add_difference("cutoff_len", text)
    if stage == "pt":
        draft.put("data.format", "text", "stage: pt")
    if keys.take("train_on_prompt") or stage == "pt":
        draft.put("data.loss", "all", "train_on_prompt" if stage != "pt" else "stage: pt")
    if (template := keys.take("template")) is not None:
        text = "a template name of LLaMA-Factory; strop uses the model's chat template (or data.template)"
        draft.add_difference("template", f"{template}: {text}")
    if (thinking := keys.take("enable_thinking")) is not None:
        draft.put("data.template_options", {"enable_thinking": bool(thinking)}, "enable_thinking")
        draft.add_difference("enable_thinking", "passed to the model's template, which must support it")
    draft.put_eval_share("val_size", keys.take("val_size"))
    if keys.take("packing") or keys.take("neat_packing"):
        draft.note_packing("packing")
        keys.take("neat_packing")


def _read_dataset_info(file: Path, folder: Any) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder of dataset_info.json (relative to here or to the config) and its content."""
    for place in (Path(str(folder)), file.parent / str(folder), file.parent):
        info = place / "dataset_info.json"
        if info.is_file():
            try:
                return place, json.loads(info.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{info}: not JSON: {error}", fix="fix the syntax") from None
    return None


def _source(
    draft: Draft, key: str, name: str, known: tuple[Path, dict[str, Any]], stage: str
) -> tuple[str, dict[str, str]]:
    """Return the path of a data set in dataset_info.json, and its columns if strop does not detect them."""
    place, entries = known
    entry = dict(entries.get(name) or {})
    if not entry:
        draft.add_unsupported(key, f"{name}: not in {place / 'dataset_info.json'}")
        return "", {}
    file, hub = entry.pop("file_name", None), entry.pop("hf_hub_url", None)
    shape = entry.pop("formatting", "alpaca")
    ours = _ALPACA if shape == "alpaca" else _SHAREGPT
    ours = {**ours, "chosen": "chosen", "rejected": "rejected", "kto_tag": "kto_tag"}
    columns = {}
    for theirs, column in (entry.pop("columns", None) or {}).items():
        if theirs in ours and column:
            columns[ours[theirs]] = str(column)
        elif column:
            draft.add_unsupported(f"{name}.columns.{theirs}", str(column))
    if stage == "pt":
        columns = {"text": columns["instruction"]} if "instruction" in columns else {}
    if all(column in _DETECTED_COLUMNS.get(ours_, (ours_,)) for ours_, column in columns.items()):
        columns = {}
    tags = entry.pop("tags", None) or {}
    usual = {"from", "value", "role", "content", "user", "human", "assistant", "gpt", "system", "observation", "tool"}
    if not set(map(str, tags.values())) <= usual | {"function_call", "tool_call"}:
        draft.add_unsupported(f"{name}.tags", f"{format_value(tags)}: strop recognises the usual role names only")
    entry.pop("ranking", None)
    for theirs, value in entry.items():
        if value is not None and not (theirs == "split" and value == "train"):
            draft.add_unsupported(f"{name}.{theirs}", format_value(value))
    return (str(place / file) if file else str(hub)), columns


def _preferences(draft: Draft, keys: Keys, objective: str) -> None:
    beta = keys.take("pref_beta")
    if objective in ("dpo", "ipo", "kto", "orpo", "simpo"):
        draft.disable_dropout_for_preferences("lora_dropout")
        source = "pref_beta" if beta else "llamafactory's default"
        draft.put("train.beta", as_number(0.1 if beta is None else beta), source)
        if objective == "simpo":
            gamma = keys.take("simpo_gamma", 0.5)
            draft.put("train.gamma", as_number(gamma), "simpo_gamma")
    elif beta is not None:
        draft.add_ignored("pref_beta", "not used in this stage")
    for key, name in (
        ("pref_ftx", "train.sft_weight"), ("dpo_label_smoothing", "train.label_smoothing"),
        ("kto_chosen_weight", "train.desirable_weight"), ("kto_rejected_weight", "train.undesirable_weight"),
    ):  # fmt: skip
        if value := keys.take(key):
            draft.put(name, as_number(value), key)
            if key == "pref_ftx":
                draft.add_difference(key, "a mean over the tokens of the chosen answer here")
