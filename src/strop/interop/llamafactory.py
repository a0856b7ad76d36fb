"""LLaMA-Factory's YAML as a recipe. Names and defaults as of its 0.9.6 (src/llamafactory/hparams/)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from strop.errors import InputError
from strop.interop.draft import Draft, Keys, read_yaml, shown
from strop.interop.hf_arguments import (
    OWN_WAY,
    lora,
    must_be,
    no_dropout,
    number,
    packing,
    training_arguments,
    val_split,
    whole,
)

STAGES = {"sft": "sft", "pt": "sft", "dpo": "dpo", "kto": "kto", "rm": "reward"}
LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
DEFAULTS = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 5e-5, "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear", "optim": "adamw_torch", "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 42,
}  # fmt: skip
MORE_OF_OURS = (
    "cache_dir", "data_shared_file_system", "enable_liger_kernel", "flash_attn", "low_cpu_mem_usage", "media_dir",
    "overwrite_cache", "plot_loss", "preprocessing_batch_size", "preprocessing_num_workers", "print_param_status",
    "tokenized_path", "trust_remote_code", "use_fast_tokenizer", "use_reentrant_gc", "use_unsloth", "use_unsloth_gc",
    "upcast_layernorm", "quantization_device_map",
)  # fmt: skip
# their names of columns in dataset_info.json, and strop's, by the shape of the rows
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
_FOUND = {"conversations": ("conversations", "messages"), "kto_tag": ("kto_tag", "label")}  # found by themselves
_SHAREGPT = {"messages": "conversations", "system": "system", "tools": "tools"}


def read(path: Path) -> Draft:
    """Raises InputError where it is no LoRA config, or has a stage that strop does not."""
    draft, keys = Draft("llamafactory", path), Keys(read_yaml(path))
    kind = keys.take("finetuning_type", "lora")
    if kind != "lora":
        raise InputError(f"{path}: finetuning_type: {kind}: strop trains LoRA adapters alone", fix="set it to lora")
    stage = keys.take("stage", "sft")
    objective = must_be("stage", stage, STAGES)
    if stage == "dpo":
        objective = must_be("pref_loss", keys.take("pref_loss", "sigmoid"), LOSSES)
    if objective != "sft":
        draft.put("train.objective", objective, "stage")
    _model(draft, keys)
    _data(draft, keys, stage)
    training_arguments(draft, keys, DEFAULTS, said="llamafactory")
    if (patience := keys.take("early_stopping_steps")) is not None:
        draft.put("train.early_stopping", whole("early_stopping_steps", patience), "early_stopping_steps")
    _preferences(draft, keys, objective)
    keys.end(draft, (*OWN_WAY, *MORE_OF_OURS))
    return draft


def _model(draft: Draft, keys: Keys) -> None:
    for key, name in (
        ("model_name_or_path", "model.name"),
        ("adapter_name_or_path", "model.adapter"),
        ("loraplus_lr_ratio", "train.lora_plus_ratio"),
    ):
        if (value := keys.take(key)) is not None:
            draft.put(name, number(value) if "ratio" in key else str(value), key)
    if (revision := keys.take("model_revision", "main")) != "main":
        draft.put("model.revision", revision, "model_revision")
    bits, method, kind = keys.take("quantization_bit"), keys.take("quantization_method"), keys.take("quantization_type")
    double = keys.take("double_quantization")
    if bits is not None and method in (None, "bnb") and bits in (4, 8):
        draft.put("model.quantization", (kind or "nf4") if bits == 4 else "int8", "quantization_bit")
        if bits == 8:
            draft.differ("quantization_bit", "8: rows are quantized by their largest value here, without outliers")
        if double is not None:
            draft.put("model.double_quantization", bool(double), "double_quantization")
    else:
        draft.put("model.quantization", "none", "no quantization_bit")
        if bits is not None:
            draft.lack("quantization_bit", f"{bits} by {method}: strop has nf4, fp4 and int8")
    rank = whole("lora_rank", keys.peek("lora_rank", 8))
    lora(
        draft, keys, rank="lora_rank", alpha="lora_alpha", dropout="lora_dropout", modules="lora_target",
        defaults={"lora.r": 8, "lora.alpha": 2 * rank, "lora.dropout": 0.0},
    )  # fmt: skip
    for key, name in (("additional_target", "lora.modules_to_save"), ("add_tokens", "lora.new_tokens")):
        if (value := keys.take(key)) is not None:
            draft.put(name, [part.strip() for part in str(value).split(",")], key)


def _data(draft: Draft, keys: Keys, stage: str) -> None:
    folder = keys.take("dataset_dir", "data")
    known = _known(draft.file, folder)
    if known is None and ("dataset" in keys or "eval_dataset" in keys):
        draft.lack("dataset", f"{keys.peek('dataset')}: names out of {folder}/dataset_info.json, which is not there")
        keys.take("dataset"), keys.take("eval_dataset")
    for key, name in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        listed = keys.take(key)
        if listed is None or known is None:
            continue
        names = [part.strip() for part in listed.split(",")] if isinstance(listed, str) else listed
        found = [_source(draft, key, one, known, stage) for one in names]
        sources = [source for source, _ in found if source]
        if sources:
            draft.put(name, sources[0] if len(sources) == 1 else sources, key)
        columns = [one for _, one in found if one]
        if columns and all(one == columns[0] for _, one in found):
            draft.put("data.columns", columns[0], f"columns of {key}")
        elif columns:
            draft.lack(f"columns of {key}", "they differ by file: strop takes one --data.columns for all")
    length = keys.take("cutoff_len")
    draft.put(
        "data.max_length", whole("cutoff_len", length or 2048), "cutoff_len" if length else "llamafactory's default"
    )
    draft.differ(
        "cutoff_len",
        "longer rows are shortened there, prompt and answer each at its end, and dropped where packing is on; strop "
        "refuses such rows: raise data.max_length, or choose data.overlong",
    )
    if stage == "pt":
        draft.put("data.format", "text", "stage: pt")
    if keys.take("train_on_prompt") or stage == "pt":
        draft.put("data.loss", "all", "train_on_prompt" if stage != "pt" else "stage: pt")
    template = keys.take("template")
    if template is not None:
        draft.differ(
            "template",
            f"{template}: a name of llamafactory's own; strop takes the model's chat template (or data.template)",
        )
    if (thinking := keys.take("enable_thinking")) is not None:
        draft.put("data.template_options", {"enable_thinking": bool(thinking)}, "enable_thinking")
        draft.differ("enable_thinking", "given to the model's own template, which must read it")
    val_split(draft, "val_size", keys.take("val_size"))
    if keys.take("packing") or keys.take("neat_packing"):
        packing(draft, "packing")
        keys.take("neat_packing")


def _known(file: Path, folder: Any) -> tuple[Path, dict[str, Any]] | None:
    """Where dataset_info.json is, from here or from the config's folder, and what it holds."""
    for place in (Path(str(folder)), file.parent / str(folder), file.parent):
        info = place / "dataset_info.json"
        if info.is_file():
            try:
                return place, json.loads(info.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{info}: not JSON: {error}", fix="mend it") from None
    return None


def _source(
    draft: Draft, key: str, name: str, known: tuple[Path, dict[str, Any]], stage: str
) -> tuple[str, dict[str, str]]:
    """A data set by its name in dataset_info.json: where it is, and its columns where they are not the usual ones."""
    place, entries = known
    entry = dict(entries.get(name) or {})
    if not entry:
        draft.lack(key, f"{name}: not in {place / 'dataset_info.json'}")
        return "", {}
    file, hub = entry.pop("file_name", None), entry.pop("hf_hub_url", None)
    shape = entry.pop("formatting", "alpaca")
    ours = {
        **(_ALPACA if shape == "alpaca" else _SHAREGPT),
        "chosen": "chosen",
        "rejected": "rejected",
        "kto_tag": "kto_tag",
    }
    columns = {}
    for theirs, column in (entry.pop("columns", None) or {}).items():
        if theirs in ours and column:
            columns[ours[theirs]] = str(column)
        elif column:
            draft.lack(f"{name}.columns.{theirs}", str(column))
    if stage == "pt":
        columns = {"text": columns["instruction"]} if "instruction" in columns else {}
    if all(column in _FOUND.get(ours_, (ours_,)) for ours_, column in columns.items()):
        columns = {}
    tags = entry.pop("tags", None) or {}
    usual = {"from", "value", "role", "content", "user", "human", "assistant", "gpt", "system", "observation", "tool"}
    if not set(map(str, tags.values())) <= usual | {"function_call", "tool_call"}:
        draft.lack(f"{name}.tags", f"{shown(tags)}: strop knows the usual names of roles")
    entry.pop("ranking", None)
    for theirs, value in entry.items():
        if value is not None and not (theirs == "split" and value == "train"):
            draft.lack(f"{name}.{theirs}", shown(value))
    return (str(place / file) if file else str(hub)), columns


def _preferences(draft: Draft, keys: Keys, objective: str) -> None:
    beta = keys.take("pref_beta")
    if objective in ("dpo", "ipo", "kto", "orpo", "simpo"):
        no_dropout(draft, "lora_dropout")
        draft.put(
            "train.beta", number(0.1 if beta is None else beta), "pref_beta" if beta else "llamafactory's default"
        )
        if objective == "simpo":
            gamma = keys.take("simpo_gamma", 0.5)
            draft.put("train.gamma", number(gamma), "simpo_gamma")
    elif beta is not None:
        draft.skip("pref_beta", "of another stage")
    for key, name in (
        ("pref_ftx", "train.sft_weight"),
        ("dpo_label_smoothing", "train.label_smoothing"),
        ("kto_chosen_weight", "train.desirable_weight"),
        ("kto_rejected_weight", "train.undesirable_weight"),
    ):
        if value := keys.take(key):
            draft.put(name, number(value), key)
            if key == "pref_ftx":
                draft.differ(key, "a mean over the tokens of the chosen answer here")
