"""The recipe's fields as keyword arguments of the Python functions, for completion and type checkers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from typing_extensions import TypedDict

Numbers: TypeAlias = Mapping[str, float]
Names: TypeAlias = str | Sequence[str]


class Options(TypedDict, total=False):
    """Fields by their last name or their short name, and sections. Meanings and defaults: docs/recipe.md."""

    # sections, each also as a dictionary of its fields; `model` and `data` are also short names
    model: Any
    data: Any
    lora: Mapping[str, Any]
    train: Any
    # short names
    eval: Any
    rank: int
    lr: float | None
    # model
    name: Any
    revision: str | None
    adapter: Any
    quantization: Literal["none", "nf4", "fp4", "int8", "auto"]
    double_quantization: bool
    resident_layers: int | None
    placement: Literal["auto", "replicated", "sharded", "streamed"]
    dtype: Literal["auto", "bf16", "fp32", "fp16"]
    device: str
    # data
    format: Literal[
        "auto",
        "document",
        "preference",
        "ranking",
        "labelled",
        "messages",
        "sharegpt",
        "self-instruct",
        "alpaca",
        "prompt-completion",
        "question-answer",
        "prompt",
        "classification",
        "triplet",
        "text",
    ]
    columns: Mapping[str, str] | None
    image_folder: str | None
    max_length: int
    overlong: Literal["refuse", "drop", "truncate-start", "split"]
    bad_rows: Literal["refuse", "drop"]
    loss: Literal["assistant", "all"]
    template: Any
    template_options: Mapping[str, Any]
    reasoning: Literal["auto", "as-is", "empty", "drop", "refuse"]
    encoding: str
    # lora
    r: int
    alpha: float | None
    dropout: float
    target_modules: Names
    bias: Literal["none", "all", "lora_only"]
    use_rslora: bool
    use_dora: bool
    init: Literal["default", "gaussian", "loftq"]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Numbers
    modules_to_save: Sequence[str]
    vision: Literal["none", "projector", "all"]
    new_tokens: Sequence[str]
    # train
    objective: Literal["sft", "dpo", "ipo", "kto", "orpo", "simpo", "reward", "grpo", "classify", "embed"]
    method: Literal["lora", "full"]
    beta: float | None
    gamma: float | None
    label_smoothing: float | None
    sft_weight: float | None
    length_normalized: bool | None
    desirable_weight: float | None
    undesirable_weight: float | None
    rewards: Names | None
    environment: Any
    turns: int | None
    reward_timeout: float | None
    group: int | None
    answer_tokens: int | None
    group_loss: Literal["dapo", "grpo", "dr_grpo"] | None
    clip_low: float | None
    clip_high: float | None
    updates: int | None
    labels: Sequence[str] | None
    class_weights: Mapping[str, float] | Literal["none", "balanced"] | None
    pooling: Literal["last", "mean"] | None
    temperature: float | None
    vllm_python: Any
    keep: float | Literal["auto", "off"]
    keep_prompts: str | None
    teacher: str | None
    teacher_weight: float | None
    teacher_temperature: float | None
    teacher_model: str | None
    epochs: float
    max_steps: int | None
    batch_size: int
    micro_batch: int | None
    micro_batch_tokens: int | None
    learning_rate: float | None
    lora_plus_ratio: float
    lr_scheduler: Literal["cosine", "linear", "constant"]
    warmup: float
    weight_decay: float
    max_grad_norm: float
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "lion", "sgd"]
    gradient_checkpointing: int | Literal["auto", "off", "on", "offload"]
    eval_steps: int | None
    early_stopping: int | None
    samples: int
    save_steps: int | None
    keep_checkpoints: int
    log_steps: int
    exact: bool
    deterministic: bool
    int8_matmul: bool
    timeout: str
    max_time: str | None
    # the rest
    track: Names
    seed: int
    out: Any
    preset: Literal["auto", "low-memory", "balanced", "max-quality"]


# those that an interactive shell completes
COMMON: dict[str, Any] = {  # and their defaults
    "model": None, "data": None, "eval": None, "out": None, "epochs": 3.0, "max_steps": None, "lr": None,
    "batch_size": 8, "rank": 16, "alpha": None, "quantization": "none", "max_length": 1024, "objective": "sft",
    "adapter": None, "device": "auto", "max_time": None, "seed": 0, "lora": None, "train": None,
}  # fmt: skip
# types of the fields that Options leaves open, so that type checkers accept each form of a table
SHOWN_TYPES = {
    "model": "PathLike", "data": "Rows", "eval": "Rows | None", "out": "PathLike | None", "adapter": "PathLike | None",
    "train": "Mapping[str, Any]",
}  # fmt: skip
