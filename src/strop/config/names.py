"""Names that users type: short forms of fields, other tools' names of fields, and files of data."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

# `strop train --model X` means `strop train --model.name X`
SHORT_FORMS = {
    "model": "model.name", "data": "data.train", "eval": "data.eval",
    "quantization": "model.quantization", "max-length": "data.max_length", "objective": "train.objective",
    "rank": "lora.r", "alpha": "lora.alpha", "epochs": "train.epochs", "max-steps": "train.max_steps",
    "lr": "train.learning_rate", "batch-size": "train.batch_size", "adapter": "model.adapter",
    "device": "model.device", "max-time": "train.max_time",
}  # fmt: skip
# that data.reading can read
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
# names in other tools, which errors translate to a field, or to a field and a value
OTHER_NAMES = {
    "base_model": "model.name", "model_name_or_path": "model.name", "model_id": "model.name",
    "load_in_4bit": "model.quantization nf4", "qlora": "model.quantization nf4",
    "load_in_8bit": "model.quantization int8", "bf16": "model.dtype bf16", "fp16": "model.dtype fp16",
    "fp32": "model.dtype fp32", "torch_dtype": "model.dtype", "dataset": "data.train", "datasets": "data.train",
    "dataset_name": "data.train", "train_file": "data.train", "eval_dataset": "data.eval", "val": "data.eval",
    "validation_file": "data.eval", "val_set_size": "data.eval", "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length", "sequence_len": "data.max_length", "cutoff_len": "data.max_length",
    "model_max_length": "data.max_length", "context_length": "data.max_length", "context_size": "data.max_length",
    "chat_template": "data.template", "train_on_inputs": "data.loss",
    "lora_r": "lora.r", "lora_rank": "lora.r", "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout",
    "lora_target": "lora.target_modules", "lora_target_modules": "lora.target_modules",
    "num_epochs": "train.epochs", "num_train_epochs": "train.epochs", "steps": "train.max_steps",
    "iters": "train.max_steps", "learningrate": "train.learning_rate",
    "per_device_train_batch_size": "train.micro_batch", "micro_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.batch_size", "gradient_accumulation": "train.batch_size",
    "lr_scheduler_type": "train.lr_scheduler",
    "warmup_ratio": "train.warmup", "warmup_steps": "train.warmup", "optim": "train.optimizer",
    "logging_steps": "train.log_steps", "save_total_limit": "train.keep_checkpoints", "dpo_beta": "train.beta",
    "num_generations": "train.group", "max_completion_length": "train.answer_tokens", "report_to": "track",
    "output": "out", "output_dir": "out", "train_dataset": "data.train", "wandb": "track wandb",
    "tensorboard": "track tensorboard", "dpo": "train.objective dpo", "kto": "train.objective kto",
    "orpo": "train.objective orpo", "grpo": "train.objective grpo", "gpu": "model.device cuda",
    "task": "train.objective", "task_type": "train.objective", "precision": "model.dtype",
    "use_cpu": "model.device cpu", "no_cuda": "model.device cpu",
}  # fmt: skip
# values in other tools -> our values, of any field that allows these
OTHER_VALUES = {
    **dict.fromkeys(("4bit", "4-bit", "4", "int4", "qlora"), "nf4"), **dict.fromkeys(("8bit", "8-bit", "8"), "int8"),
    **dict.fromkeys(("16bit", "16-bit", "16", "false", "no"), "none"), **dict.fromkeys(("gpu", "nvidia"), "cuda"),
    "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32",
}  # fmt: skip
# what a field of ours means, where the value for the other tool's name would be wrong
MEANINGS = {
    **dict.fromkeys(
        ("gradient_accumulation_steps", "gradient_accumulation"),
        "It is the effective batch size, in rows per update; {prefix}train.micro_batch is the number of rows computed "
        "at once",
    ),
    **dict.fromkeys(
        ("per_device_train_batch_size", "micro_batch_size"),
        "It is the number of rows computed at once; {prefix}train.batch_size is the effective batch size, in rows per "
        "update",
    ),
}
# options of other tools that strop has no option for -> the reason
WITHOUT_OPTION = {
    **dict.fromkeys(("packing", "sample_packing", "packed"), "rows are always packed, so leave it out"),
    **dict.fromkeys(
        ("group_by_length", "length_grouped"), "rows are packed, so their lengths need no groups; leave it out"
    ),
    **dict.fromkeys(
        ("flash_attention", "flash_attn", "flash_attention_2", "use_flash_attention_2", "attn_implementation"),
        "strop chooses the attention for the machine, so leave it out",
    ),
    **dict.fromkeys(
        ("torch_compile", "compile"), "strop has kernels of its own and does not use torch.compile, so leave it out"
    ),
    "system_prompt": "the system prompt is the first message of a row, with the role system",
    **dict.fromkeys(("neftune", "neftune_noise_alpha"), "NEFTune, noise on the embeddings, is not available"),
    **dict.fromkeys(
        ("resume", "resume_from_checkpoint"), "a stopped run is resumed from its page, or with `strop resume`"
    ),
}


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Return the words with which values of fields are given in a terminal; a list is given as repeated options."""
    short_forms = {field: short for short, field in SHORT_FORMS.items()}
    pairs = [
        (name, item) for name, value in options.items() for item in (value if isinstance(value, list) else [value])
    ]
    return [word for name, item in pairs for word in (f"--{short_forms.get(name, name)}", _option_value(item))]


def _option_value(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    is_plain = not any(set(f"{key}{item}") & set(',={}"') for key, item in value.items())
    return ",".join(f"{key}={item}" for key, item in value.items()) if is_plain else json.dumps(value)


def full_name(name: str) -> str:
    """Return the dotted name of a field from its short form, such as train.batch_size from batch-size or batch_size."""
    return SHORT_FORMS.get(name.replace("_", "-"), name)


def python_name(field: str) -> str:
    """Return the argument of `train` that sets a field: rank for lora.r, loss for data.loss."""
    short = next((name for name, full in SHORT_FORMS.items() if full == field), field.rpartition(".")[2])
    return short.replace("-", "_")


def is_data_file(name: str) -> bool:
    """Return whether a file's name has a suffix of data, possibly compressed."""
    return name.lower().removesuffix(".gz").removesuffix(".zst").endswith(DATA_SUFFIXES)


def use_short_forms(text: str) -> str:
    """Replace options by their short forms (--train.learning_rate by --lr), except those that were typed in full."""
    typed = {word.partition("=")[0] for word in sys.argv}
    for short, field in SHORT_FORMS.items():
        if f"--{field}" not in typed:
            text = re.sub(rf"(?<![\w-])--{re.escape(field)}(?![\w-]|\.\w)", f"--{short}", text)
    return text
