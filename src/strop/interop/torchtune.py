"""Import torchtune's YAML. Names and defaults are those of 0.6.1 (recipes/configs/, torchtune/datasets/)."""

from __future__ import annotations

import re
from typing import Any

from strop.errors import InputError
from strop.interop.draft import LAST_BATCH_NOTE, WARMUP_NOTE, Draft, Keys, as_int, as_number, format_value, join_files

# sections whose keys are read as "section.key"
SECTIONS = ("model", "checkpointer", "loss", "tokenizer", "optimizer", "lr_scheduler")
IGNORED_KEYS = (
    "activation_offloading", "checkpointer._component_", "checkpointer.checkpoint_files",
    "checkpointer.keep_last_n_checkpoints", "checkpointer.model_type", "checkpointer.safe_serialization", "compile",
    "cudnn_deterministic_mode", "custom_sharded_layers", "dataset_val_steps", "device", "enable_activation_offloading",
    "fsdp_cpu_offload", "log_every_n_steps", "log_level", "log_peak_memory_stats", "loss.num_output_chunks",
    "low_cpu_ram", "metric_logger", "optimizer.fused", "optimizer_in_bwd", "profiler",
    "save_adapter_weights_only", "tokenizer._component_", "tokenizer.merges_file", "tokenizer.path",
)  # fmt: skip
ATTENTION_MODULES = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
MLP_MODULES = ["gate_proj", "up_proj", "down_proj"]
OPTIMIZERS = {
    "torch.optim.AdamW": "adamw", "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw_8bit",
    "bitsandbytes.optim.AdamW8bit": "adamw_8bit", "bitsandbytes.optim.PagedAdamW": "adamw", "torch.optim.SGD": "sgd",
}  # fmt: skip
# Hub ids of torchtune's built-in data sets
BUILT_IN_DATA_SETS = {
    "alpaca_dataset": "tatsu-lab/alpaca", "alpaca_cleaned_dataset": "yahma/alpaca-cleaned",
    "slimorca_dataset": "Open-Orca/SlimOrca-Dedup", "samsum_dataset": "Samsung/samsum",
    "grammar_dataset": "liweili/c4_200m", "stack_exchange_paired_dataset": "lvwerra/stack-exchange-paired",
    "hh_rlhf_helpful_dataset": "RLHFlow/HH-RLHF-Helpful-standard",
}  # fmt: skip
# data sets that have their own prompts, and train on them by default
TRAIN_ON_PROMPTS = ("alpaca_dataset", "alpaca_cleaned_dataset")


def read(draft: Draft) -> None:
    """Import a config. Raises InputError if it is not a LoRA config, or has an unsupported loss."""
    tree = draft.read_yaml()
    keys = Keys(_flatten_sections(_interpolate(tree, tree)))
    _read_model(draft, keys)
    _read_loss(draft, keys)
    _read_data(draft, keys)
    _read_training(draft, keys)
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


def _flatten_sections(tree: dict[str, Any]) -> dict[str, Any]:
    """Replace each section with its keys: {"loss": {"beta": 0.1}} becomes {"loss.beta": 0.1}."""
    flat = {key: value for key, value in tree.items() if key not in SECTIONS}
    for section in SECTIONS:
        flat |= {f"{section}.{key}": value for key, value in dict(tree.get(section) or {}).items()}
    return flat


def _take_component(keys: Keys, section: str) -> str:
    """Return the class or function that builds a section, without its module."""
    return str(keys.take(f"{section}._component_", "")).rpartition(".")[2]


def _read_model(draft: Draft, keys: Keys) -> None:
    builder = _take_component(keys, "model")
    is_full = bool(builder) and not builder.startswith(("lora_", "qlora_"))
    if is_full:
        draft.put_full(f"model._component_: {builder}")
    names = {"checkpointer.checkpoint_dir": "model.name", "output_dir": "out", "checkpointer.output_dir": "out"}
    draft.put_fields(keys, names, str)
    if keys.take("resume_from_checkpoint"):
        draft.add_unsupported("resume_from_checkpoint", "use `strop resume RUN`")
    is_4_bit = bool(keys.take("model.quantize_base", builder.startswith("qlora_")))
    draft.put("model.quantization", "nf4" if is_4_bit else "none", f"model._component_: {builder}")
    for name, default in {"lora.r": 8, "lora.alpha": 16, "lora.dropout": 0.0, "lora.use_dora": False}.items():
        draft.put(name, default, "torchtune's default")
    draft.put_fields(keys, {
        "model.lora_rank": "lora.r", "model.lora_alpha": "lora.alpha", "model.lora_dropout": "lora.dropout",
        "model.use_dora": "lora.use_dora",
    })  # fmt: skip
    targets = [ATTENTION_MODULES.get(name, name) for name in keys.take("model.lora_attn_modules", [])]
    targets += MLP_MODULES if keys.take("model.apply_lora_to_mlp") else []
    targets += ["lm_head"] if keys.take("model.apply_lora_to_output") else []
    draft.put("lora.target_modules", targets, "model.lora_attn_modules, apply_lora_to_mlp, apply_lora_to_output")
    if not is_full:
        draft.add_difference(
            "model.lora_attn_modules", "strop uses the layer names of transformers: see `strop modules`"
        )


def _read_loss(draft: Draft, keys: Keys) -> None:
    name = _take_component(keys, "loss")
    if name == "DPOLoss":
        draft.put("train.objective", "dpo", "loss._component_")
        draft.put_fields(keys, {"loss.beta": "train.beta", "loss.label_smoothing": "train.label_smoothing"})
    elif name and "CrossEntropy" not in name and not name.startswith("CEWith"):
        raise InputError(f"{draft.file}: loss: {name}: not an objective of strop", fix="use dpo or sft")


def _read_data(draft: Draft, keys: Keys) -> None:
    draft.put_int(keys, "tokenizer.max_seq_len", "data.max_length")
    draft.note_max_length("tokenizer.max_seq_len")
    if keys.take("shuffle", True) is False:
        draft.add_difference("shuffle", "false: strop shuffles rows with the seed")
    data_sets = keys.peek("dataset")
    if isinstance(data_sets, list) and len({_trains_on_prompts(entry) for entry in data_sets}) > 1:
        draft.add_unsupported("dataset.train_on_input", "differs between the data sets; data.loss applies to all files")
    column_maps: list[Any] = []
    for key, field in (("dataset", "data.train"), ("dataset_val", "data.eval")):
        entries = keys.take(key)
        entries = entries if isinstance(entries, list) else [entries] if entries else []
        sources = [source for entry in entries for source in _read_data_set(draft, key, dict(entry), column_maps)]
        draft.put_sources(field, sources, key)
    draft.put_columns(column_maps, "dataset")
    if draft.get("data.eval") is not None:
        draft.put_int(keys, "run_val_every_n_steps", "train.eval_steps")


def _trains_on_prompts(entry: dict[str, Any]) -> bool:
    builder = str(entry.get("_component_", "")).rpartition(".")[2]
    return bool(entry.get("train_on_input", builder in TRAIN_ON_PROMPTS))


def _read_data_set(draft: Draft, key: str, entry: dict[str, Any], column_maps: list[Any]) -> list[str]:
    """Return the files or the Hub id of a data set, append its columns, and import its other settings."""
    builder, is_train = str(entry.pop("_component_", "")).rpartition(".")[2], key == "dataset"
    source, files = entry.pop("source", BUILT_IN_DATA_SETS.get(builder)), entry.pop("data_files", None)
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
    if builder == "instruct_dataset" and set(columns) == {"input", "output"}:
        columns = {"prompt": columns["input"], "completion": columns["output"]}
    train_on_input = _trains_on_prompts({"_component_": builder, **entry})
    entry.pop("train_on_input", None)
    if is_train and builder == "text_completion_dataset":
        draft.put("data.format", "text", f"{key}._component_")
    if is_train and (train_on_input or builder == "text_completion_dataset"):
        source_key = f"{builder}'s default" if builder in TRAIN_ON_PROMPTS else f"{key}.train_on_input"
        draft.put("data.loss", "all", source_key)
    if builder in TRAIN_ON_PROMPTS:
        draft.add_difference(f"{key}._component_", f"{builder}: torchtune uses its own prompt, strop a chat template")
    if (
        is_train
        and not train_on_input
        and builder != "text_completion_dataset"
        and draft.get("train.objective") is None
    ):
        text = "torchtune also trains on the header of an answer, and on a line break after its stop token"
        draft.add_difference(f"{key}._component_", text)
    if (system := entry.pop("new_system_prompt", None)) is not None:
        draft.add_unsupported(f"{key}.new_system_prompt", f"{format_value(system)}: add it to the rows")
    for name, value in entry.items():
        if value is not None:
            draft.add_unsupported(f"{key}.{name}", format_value(value))
    column_maps.append(columns)
    if files is not None:
        return join_files(source, files)
    if source is None:
        draft.add_unsupported(f"{key}._component_", f"{builder}: strop does not know the source of its rows")
    return [str(source)] if source is not None else []


def _read_training(draft: Draft, keys: Keys) -> None:
    micro_batch, accumulation_steps = keys.take("batch_size", 1), keys.take("gradient_accumulation_steps", 1)
    draft.put_batch_size(micro_batch, accumulation_steps, "batch_size x gradient_accumulation_steps")
    draft.add_difference("batch_size", LAST_BATCH_NOTE)
    epochs, max_steps = keys.take("epochs", 1), keys.take("max_steps_per_epoch")
    draft.put("train.epochs", as_number(epochs), "epochs")
    if max_steps is not None:
        total = as_int("max_steps_per_epoch", max_steps) * as_int("epochs", epochs)
        draft.put("train.max_steps", total, "max_steps_per_epoch x epochs")
        text = "at most the steps of an epoch in torchtune, so lower train.max_steps if an epoch has fewer; "
        draft.add_difference("max_steps_per_epoch", f"{text}each epoch restarts at the first rows there, not in strop")
    optimizer = str(keys.take("optimizer._component_", "torch.optim.AdamW"))
    if optimizer in OPTIMIZERS:
        draft.put("train.optimizer", OPTIMIZERS[optimizer], "optimizer._component_")
    else:
        text = f"{optimizer}: not supported; set train.optimizer, or adamw is used"
        draft.add_unsupported("optimizer._component_", text)
    weight_decay = 0.01 if "Adam" in optimizer else 0.0
    draft.put("train.weight_decay", weight_decay, f"default of {optimizer}")
    draft.put_fields(keys, {"optimizer.lr": "train.learning_rate", "optimizer.weight_decay": "train.weight_decay"})
    scheduler = _take_component(keys, "lr_scheduler")
    if scheduler in ("get_cosine_schedule_with_warmup", ""):
        source = "lr_scheduler._component_" if scheduler else "no lr_scheduler"
        draft.put("train.lr_scheduler", "cosine" if scheduler else "constant", source)
        draft.put("train.warmup", 0, "no lr_scheduler.num_warmup_steps")
        draft.put_int(keys, "lr_scheduler.num_warmup_steps", "train.warmup")
        if draft.get("train.warmup"):
            draft.add_difference("lr_scheduler", WARMUP_NOTE)
    else:
        draft.add_unsupported("lr_scheduler._component_", f"{scheduler}: cosine is used; linear is supported too")
    max_norm = keys.take("clip_grad_norm")
    source = "clip_grad_norm" if max_norm else "clip_grad_norm: null"
    draft.put("train.max_grad_norm", as_number(max_norm or 0), source)
    draft.put_int(keys, "seed", "seed")
    draft.put_fields(keys, {"dtype": "model.dtype"}, str)
    draft.put_checkpointing("enable_activation_checkpointing", keys.take("enable_activation_checkpointing"))
