"""Import torchtune's YAML. Names and defaults are those of 0.7 (recipes/configs/, torchtune/datasets/)."""

from __future__ import annotations

import re
from typing import Any

from strop.errors import InputError
from strop.interop.draft import WARMUP_NOTE, Draft, Keys, as_int, as_number, format_value

IGNORED_KEYS = (
    "activation_offloading", "compile", "custom_sharded_layers", "device", "enable_activation_offloading",
    "fsdp_cpu_offload", "log_every_n_steps", "log_level", "log_peak_memory_stats", "low_cpu_ram", "metric_logger",
    "optimizer_in_bwd", "output_dir", "profiler", "save_adapter_weights_only", "shuffle", "cudnn_deterministic_mode",
    "dataset_val_steps",
)  # fmt: skip
ATTENTION_MODULES = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
MLP_MODULES = ["gate_proj", "up_proj", "down_proj"]
OPTIMIZERS = {
    "torch.optim.AdamW": "adamw", "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw_8bit",
    "bitsandbytes.optim.AdamW8bit": "adamw_8bit", "bitsandbytes.optim.PagedAdamW": "adamw", "torch.optim.SGD": "sgd",
}  # fmt: skip
# Hub ids of torchtune's built-in data sets
BUILT_IN_SOURCES = {
    "alpaca_dataset": "tatsu-lab/alpaca", "alpaca_cleaned_dataset": "yahma/alpaca-cleaned",
    "slimorca_dataset": "Open-Orca/SlimOrca-Dedup", "samsum_dataset": "Samsung/samsum",
    "grammar_dataset": "liweili/c4_200m", "stack_exchange_paired_dataset": "lvwerra/stack-exchange-paired",
    "hh_rlhf_helpful_dataset": "RLHFlow/HH-RLHF-Helpful-standard",
}  # fmt: skip
# data sets that train on the prompt by default
TRAIN_ON_PROMPTS = ("alpaca_dataset", "alpaca_cleaned_dataset", "grammar_dataset", "samsum_dataset")


def read(draft: Draft) -> None:
    """Import a config. Raises InputError if it is not a LoRA config, or has an unsupported loss."""
    tree = draft.read_yaml()
    keys = Keys(_interpolate(tree, tree))
    _model(draft, keys)
    _loss(draft, keys)
    _data(draft, keys)
    _training(draft, keys)
    keys.report_rest(draft, IGNORED_KEYS)


def _interpolate(value: Any, tree: dict[str, Any]) -> Any:
    """Replace each ${name} with the value of that key."""
    if isinstance(value, dict):
        return {key: _interpolate(inner, tree) for key, inner in value.items()}
    if isinstance(value, list):
        return [_interpolate(inner, tree) for inner in value]
    if isinstance(value, str):
        return re.sub(r"\$\{([\w.]+)\}", lambda match: str(_lookup(tree, match[1])), value)
    return value


def _lookup(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree.get(part, f"${{{name}}}") if isinstance(tree, dict) else f"${{{name}}}"
    return tree


def _component(value: dict[str, Any]) -> str:
    return str(value.pop("_component_", "")).removeprefix("torchtune.")


def _report_rest(draft: Draft, section: str, entry: dict[str, Any]) -> None:
    for key, value in entry.items():
        if value is not None:
            draft.add_unsupported(f"{section}.{key}", format_value(value))


def _model(draft: Draft, keys: Keys) -> None:
    model = dict(keys.take("model") or {})
    builder = _component(model).rpartition(".")[2]
    if not builder.startswith(("lora_", "qlora_")):
        what = f"{draft.file}: model._component_: {builder or '(none)'}: strop trains LoRA adapters only"
        raise InputError(what, fix="give the config of a lora_ or qlora_ model")
    checkpointer = dict(keys.take("checkpointer") or {})
    if (folder := checkpointer.pop("checkpoint_dir", None)) is not None:
        draft.put("model.name", str(folder), "checkpointer.checkpoint_dir")
    if (out := checkpointer.pop("output_dir", None)) is not None:
        draft.put("out", str(out), "checkpointer.output_dir")
    for key in ("_component_", "checkpoint_files", "model_type", "safe_serialization", "keep_last_n_checkpoints"):
        checkpointer.pop(key, None)
    _report_rest(draft, "checkpointer", checkpointer)
    if keys.take("resume_from_checkpoint"):
        draft.add_unsupported("resume_from_checkpoint", "use `strop resume RUN`")
    is_4_bit = bool(model.pop("quantize_base", builder.startswith("qlora_")))
    draft.put("model.quantization", "nf4" if is_4_bit else "none", f"model._component_: {builder}")
    for key, name, default in (
        ("lora_rank", "lora.r", 8), ("lora_alpha", "lora.alpha", 16), ("lora_dropout", "lora.dropout", 0.0),
        ("use_dora", "lora.use_dora", False),
    ):  # fmt: skip
        value, source = model.pop(key, None), f"model.{key}"
        if value is None:
            value, source = default, "torchtune's default"
        draft.put(name, value, source)
    targets = [ATTENTION_MODULES.get(name, name) for name in model.pop("lora_attn_modules", [])]
    targets += MLP_MODULES if model.pop("apply_lora_to_mlp", False) else []
    targets += ["lm_head"] if model.pop("apply_lora_to_output", False) else []
    draft.put("lora.target_modules", targets, "model.lora_attn_modules, apply_lora_to_mlp, apply_lora_to_output")
    text = "strop uses the layer names of transformers; `strop modules MODEL` lists them"
    draft.add_difference("model.lora_attn_modules", text)
    for key, value in model.items():
        draft.add_unsupported(f"model.{key}", format_value(value))


def _loss(draft: Draft, keys: Keys) -> None:
    loss = dict(keys.take("loss") or {})
    name = _component(loss).rpartition(".")[2]
    if name == "DPOLoss":
        draft.put("train.objective", "dpo", "loss._component_")
        for key, field in (("beta", "train.beta"), ("label_smoothing", "train.label_smoothing")):
            if (value := loss.pop(key, None)) is not None:
                draft.put(field, value, f"loss.{key}")
    elif name and "CrossEntropy" not in name and not name.startswith("CEWith"):
        raise InputError(f"{draft.file}: loss: {name}: not an objective of strop", fix="use dpo or sft")
    for key, value in loss.items():
        draft.add_ignored(f"loss.{key}", format_value(value))


def _data(draft: Draft, keys: Keys) -> None:
    tokenizer = dict(keys.take("tokenizer") or {})
    for key in ("_component_", "path", "merges_file"):
        tokenizer.pop(key, None)
    length = tokenizer.pop("max_seq_len", None)
    if length is not None:
        draft.put("data.max_length", as_int("tokenizer.max_seq_len", length), "tokenizer.max_seq_len")
    draft.note_max_length("tokenizer.max_seq_len")
    for key, value in tokenizer.items():
        if value is not None:
            text = f"{format_value(value)}: strop uses the model's chat template (or data.template)"
            draft.add_unsupported(f"tokenizer.{key}", text)
    for key, name in (("dataset", "data.train"), ("dataset_val", "data.eval")):
        entry = keys.take(key)
        entries = entry if isinstance(entry, list) else [entry] if entry else []
        sources = [source for item in entries for source in _sources(draft, key, dict(item), name == "data.train")]
        if sources:
            draft.put(name, sources[0] if len(sources) == 1 else sources, key)


def _sources(draft: Draft, key: str, entry: dict[str, Any], is_train: bool) -> list[str]:
    kind = _component(entry).rpartition(".")[2]
    source, files = entry.pop("source", BUILT_IN_SOURCES.get(kind)), entry.pop("data_files", None)
    split = entry.pop("split", "train")
    if split != "train":
        draft.add_unsupported(f"{key}.split", f"{split}: strop reads the train split")
    if entry.pop("packed", False):
        draft.note_packing(f"{key}.packed")
    columns: dict[str, str] = {}
    if column := entry.pop("conversation_column", None):
        columns = {"conversations": column} if column not in ("conversations", "messages") else {}
    style = entry.pop("conversation_style", None)
    if style not in (None, "sharegpt", "openai"):
        draft.add_unsupported(f"{key}.conversation_style", str(style))
    columns |= entry.pop("column_map", None) or {}
    if (column := entry.pop("column", None)) is not None:
        columns = {"text": column} if column != "text" else {}
    if kind == "instruct_dataset" and set(columns) == {"input", "output"}:
        columns = {"prompt": columns["input"], "completion": columns["output"]}
    on_prompts = entry.pop("train_on_input", kind in TRAIN_ON_PROMPTS)
    if is_train and kind == "text_completion_dataset":
        draft.put("data.format", "text", f"{key}._component_")
    if is_train and (on_prompts or kind == "text_completion_dataset"):
        draft.put("data.loss", "all", f"{key}.train_on_input" if kind not in TRAIN_ON_PROMPTS else f"{kind}'s default")
    if kind.startswith("alpaca"):
        draft.add_difference(f"{key}._component_", f"{kind}: torchtune adds its own prompt instead of a chat template")
    if (system := entry.pop("new_system_prompt", None)) is not None:
        draft.add_unsupported(f"{key}.new_system_prompt", f"{format_value(system)}: add it to the rows")
    _report_rest(draft, key, entry)
    if is_train and columns:
        draft.put("data.columns", columns, f"columns of {key}")
    if files is not None:
        listed = [files] if isinstance(files, str) else list(files)
        return [file if source in (None, "json", "csv", "parquet", "text") else f"{source}/{file}" for file in listed]
    if source is None:
        draft.add_unsupported(f"{key}._component_", f"{kind}: no source is known for its rows")
    return [str(source)] if source is not None else []


def _training(draft: Draft, keys: Keys) -> None:
    rows, steps = keys.take("batch_size", 1), keys.take("gradient_accumulation_steps", 1)
    draft.put_batch_size(rows, steps, "batch_size x gradient_accumulation_steps")
    epochs, max_steps = keys.take("epochs", 1), keys.take("max_steps_per_epoch")
    draft.put("train.epochs", as_number(epochs), "epochs")
    if max_steps is not None:
        total = as_int("max_steps_per_epoch", max_steps) * as_int("epochs", epochs)
        draft.put("train.max_steps", total, "max_steps_per_epoch x epochs")
        text = "in torchtune each epoch restarts at the first rows; in strop the steps continue through the rows"
        draft.add_difference("max_steps_per_epoch", text)
    optimizer = dict(keys.take("optimizer") or {})
    name = str(optimizer.pop("_component_", "torch.optim.AdamW"))
    if name in OPTIMIZERS:
        draft.put("train.optimizer", OPTIMIZERS[name], "optimizer._component_")
    else:
        text = f"{name}: not supported; strop uses adamw unless train.optimizer is set"
        draft.add_unsupported("optimizer._component_", text)
    if (rate := optimizer.pop("lr", None)) is not None:
        draft.put("train.learning_rate", as_number(rate), "optimizer.lr")
    decay = optimizer.pop("weight_decay", 0.01 if "Adam" in name else 0.0)
    draft.put("train.weight_decay", as_number(decay), "optimizer.weight_decay")
    optimizer.pop("fused", None)
    for key, value in optimizer.items():
        draft.add_unsupported(f"optimizer.{key}", format_value(value))
    schedule = dict(keys.take("lr_scheduler") or {})
    kind = _component(schedule).rpartition(".")[2]
    if kind in ("get_cosine_schedule_with_warmup", ""):
        source = "lr_scheduler._component_" if kind else "no lr_scheduler"
        draft.put("train.lr_scheduler", "cosine" if kind else "constant", source)
        warmup = as_int("lr_scheduler.num_warmup_steps", schedule.pop("num_warmup_steps", 0))
        draft.put("train.warmup", warmup, "lr_scheduler.num_warmup_steps" if kind else "no lr_scheduler")
        draft.add_difference("lr_scheduler", WARMUP_NOTE)
    else:
        text = f"{kind}: strop has cosine, linear and constant; cosine is used"
        draft.add_unsupported("lr_scheduler._component_", text)
    for key, value in schedule.items():
        draft.add_unsupported(f"lr_scheduler.{key}", format_value(value))
    clip = keys.take("clip_grad_norm")
    draft.put("train.max_grad_norm", as_number(clip or 0), "clip_grad_norm" if clip else "clip_grad_norm: null")
    if (seed := keys.take("seed")) is not None:
        draft.put("seed", as_int("seed", seed), "seed")
    if (dtype := keys.take("dtype")) is not None:
        draft.put("model.dtype", str(dtype), "dtype")
    if (checkpointing := keys.take("enable_activation_checkpointing")) is not None:
        draft.put("train.gradient_checkpointing", "on" if checkpointing else "off", "enable_activation_checkpointing")
