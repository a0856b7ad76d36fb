"""The options of a run. Command-line options, the JSON schema and tables in the docs are generated from them."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)


def _check_finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def _is_numeric(hint: Any) -> bool:
    """Return whether a type hint allows only numbers, None, or maps to numbers."""
    if get_origin(hint) is Annotated:
        return _is_numeric(get_args(hint)[0])
    parts = get_args(hint)[1:] if get_origin(hint) is dict else get_args(hint)
    return all(part is type(None) or _is_numeric(part) for part in parts) if parts else hint in (int, float)


def allows_type(hint: Any, kind: type) -> bool:
    """Return whether a type hint allows `kind`, such as str, list, dict or NoneType."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    members = (type(get_args(part)[0]) if get_origin(part) is Literal else part for part in parts)
    return any((get_origin(member) or member) is kind for member in members)


def is_bracketed(text: str, bracket: Literal["[", "{"]) -> bool:
    """Return whether a text is in a pair of brackets, as a list or a map in JSON."""
    return text.strip().startswith(bracket) and text.strip().endswith({"[": "]", "{": "}"}[bracket])


def _number_to_text(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be text: put it in quotes (YAML reads yes, no, on and off as true and false)")
    return str(value) if type(value) is int else value


TextOrNumber = Annotated[str, BeforeValidator(_number_to_text)]  # a whole number is converted to text


def _shorten_unit(value: Any) -> Any:
    """Return "30 min" or "30 minutes" as "30m"."""
    unit = r"(s|m|h|d|(?:sec|second|min|minute|hour|day)s?)"
    match = re.fullmatch(rf"([\d.]+) *{unit}", value.strip()) if isinstance(value, str) else None
    return f"{match[1]}{match[2][0]}" if match else value


def _none_to_off(value: Any) -> Any:
    """Return off for null and none (of recipes of earlier versions), and for false (as YAML reads off)."""
    return "off" if value in (None, "none") or value is False else value


def _bool_to_on_off(value: Any) -> Any:
    """Convert booleans back to on and off, which YAML reads as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Finite = Annotated[float, AfterValidator(_check_finite)]
Layers = Annotated[int, Field(ge=1)]
Share = Annotated[Finite, Field(gt=0, lt=1)]
MAX_RANK = 4096
Duration = Annotated[str, BeforeValidator(_shorten_unit), Field(pattern=r"^\d+(\.\d+)?[smhd]?$")]
DEVICE_PATTERN = r"^(auto|cpu|mps|cuda(:\d+)?)$"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse booleans in numeric fields: YAML reads yes as true, which pydantic would convert to 1."""
        values = value.values() if isinstance(value, dict) else (value,)
        hint = cls.model_fields[str(info.field_name)].annotation
        if any(isinstance(item, bool) for item in values) and _is_numeric(hint):
            raise ValueError("must be a number, not true or false")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_text_for_collection(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a list or a map that is in quotes, as which a recipe file or Python has them as text."""
        hint = cls.model_fields[str(info.field_name)].annotation
        kind: type = dict if allows_type(hint, dict) else list
        if not isinstance(value, str) or not allows_type(hint, kind):
            return value
        if is_bracketed(value, "[") or is_bracketed(value, "{") or not allows_type(hint, str):
            form = '["a", "b"]' if kind is list else '{"name": value}'
            raise ValueError(f"must be a {'list' if kind is list else 'map'}, not text: write {form}, without quotes")
        return value


class ModelSection(Section):
    name: str = Field(description="Hub id, local folder, .gguf file, run (to train it further), or the word demo")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    adapter: str | None = Field(None, description="adapter or run folder to start training from")
    quantization: Literal["none", "nf4", "fp4", "int8", "auto"] = Field(
        "none", description="storage format of the frozen base weights; auto quantizes if 16-bit weights do not fit"
    )
    double_quantization: bool = Field(True, description="also quantize the scales of 4-bit weights")
    resident_layers: int | None = Field(
        None,
        ge=0,
        description="number of layers whose weights are dequantized once and kept; the others are dequantized for "
        "each matmul",
    )
    placement: Literal["auto", "replicated", "sharded", "streamed"] = Field(
        "auto",
        description="base weights: replicated (on each device), sharded over several devices and gathered layer by "
        "layer, or streamed layer by layer from disk, or to a GPU from host memory; auto chooses what fits",
    )
    dtype: Literal["auto", "bf16", "fp32", "fp16"] = Field(
        "auto", description="data type of the frozen weights; auto measures bf16 against fp32 on a CPU"
    )
    device: str = Field(
        "auto", pattern=DEVICE_PATTERN, description="device to compute on: auto, cpu, mps, cuda or cuda:N"
    )


# auto, and strop.data.formats
RowFormat = Literal[
    "auto", "document", "preference", "ranking", "labelled", "messages", "sharegpt", "self-instruct", "alpaca",
    "prompt-completion", "question-answer", "prompt", "classification", "triplet", "text",
]  # fmt: skip


class DataSection(Section):
    train: str | list[str] = Field(description="training data: a file, a glob, a Hub data set, or a list of these")
    eval: str | list[str] | None = Field(
        None, description="evaluation data: a file, or a share of the training rows such as 5%"
    )
    format: RowFormat = Field(
        "auto", description="row format; auto finds it from the columns, document reads each text file as one row"
    )
    columns: dict[str, TextOrNumber] | None = Field(
        None, description="columns to read, such as prompt=question,completion=answer"
    )
    image_folder: str | None = Field(
        None, description="folder in which relative paths of images start; default: that of the data file"
    )
    max_length: int = Field(1024, ge=2, description="maximum length of a row in tokens")
    overlong: Literal["refuse", "drop", "truncate-start", "split"] = Field(
        "refuse", description="action for rows longer than max_length"
    )
    bad_rows: Literal["refuse", "drop"] = Field("refuse", description="action for invalid rows")
    loss: Literal["assistant", "all"] = Field(
        "assistant", description="tokens to train on: those of assistant turns, or all"
    )
    template: str | None = Field(None, description="chat template (name or file) to use instead of the model's")
    template_options: dict[str, Any] = Field(
        default_factory=dict, description="values passed to the chat template, such as enable_thinking=false"
    )
    reasoning: Literal["auto", "as-is", "empty", "drop", "refuse"] = Field(
        "auto",
        description="reasoning that a row lacks or the template does not show: as-is renders rows unchanged, empty "
        "adds the template's empty block to rows without reasoning, drop also leaves out the reasoning of other rows, "
        "refuse refuses rows that do not fit, auto is empty if the template needs it, else as-is",
    )
    encoding: str = Field("utf-8", description="text encoding of the data files")

    @field_validator("eval", mode="before")
    @classmethod
    def _refuse_share_without_percent(cls, value: Any) -> Any:
        is_number = isinstance(value, str) and re.fullmatch(r"\d*\.?\d+", value) and not os.path.exists(value)
        if isinstance(value, int | float) or is_number:
            raise ValueError("write a share with %, such as 5%")
        return value

    @field_validator("train", "eval")
    @classmethod
    def _refuse_empty_list(cls, files: str | list[str] | None) -> str | list[str] | None:
        if files == []:
            raise ValueError("the list of files is empty")
        return files


class LoraSection(Section):
    r: int = Field(16, ge=1, le=MAX_RANK, description="rank of the adapter")
    alpha: Finite | None = Field(None, gt=0, description="numerator of the LoRA scale; default: 2 * r")
    dropout: Finite = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="layers to adapt: all-linear (including experts), attention, gate (gate_proj of MLPs), experts, "
        "or a list of layer names",
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="biases to train")
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r) (arXiv:2312.03732)")
    use_dora: bool = Field(False, description="weight-decomposed LoRA (arXiv:2402.09353)")
    init: Literal["default", "gaussian", "loftq"] = Field(
        "default",
        description="initialization: B zero and A uniform (default) or Gaussian; loftq: both from the quantization "
        "error",
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=MAX_RANK)]] = Field(
        default_factory=dict,
        description="ranks by module name or regular expression; the first that matches counts",
    )
    alpha_pattern: dict[str, Annotated[Finite, Field(gt=0)]] = Field(
        default_factory=dict,
        description="alphas by module name or regular expression; the first that matches counts",
    )
    modules_to_save: list[str] = Field(
        default_factory=list, description="modules trained in full instead of with LoRA (matched by name suffix)"
    )
    vision: Literal["none", "projector", "all"] = Field(
        "none",
        description="parts trained for images: the projector (in full), or all, which adds adapters in the encoder",
    )
    new_tokens: list[str] = Field(
        default_factory=list,
        description="tokens to add to the vocabulary, wherever rows have them; their embedding rows are trained",
    )

    @field_validator("target_modules")
    @classmethod
    def _refuse_no_targets(cls, names: str | list[str]) -> str | list[str]:
        if not names:
            raise ValueError("the list of modules is empty: leave it out, or write all-linear")
        return names

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _check_expressions(cls, patterns: dict[str, Any]) -> dict[str, Any]:
        for pattern in patterns:
            try:
                re.compile(f"({pattern})")
            except re.error as error:
                raise ValueError(f"{pattern} is not a regular expression: {error}") from None
        return patterns

    @field_validator("new_tokens")
    @classmethod
    def _refuse_duplicates(cls, tokens: list[str]) -> list[str]:
        if "" in tokens:
            raise ValueError("a token is empty")
        if repeated := [token for token, count in Counter(tokens).items() if count > 1]:
            raise ValueError(f"duplicate tokens: {', '.join(repeated)}")
        return tokens


SAMPLE_TOKENS = 48  # at most, of each completion of train.samples
KEEP_SHARE = 0.15  # train.keep, where it is on by default
NOT_KEEPING = ("reward", "grpo", "classify", "embed")  # objectives without train.keep
FULL_OBJECTIVES = ("sft", "dpo", "ipo", "kto", "orpo", "simpo")  # objectives of train.method full
OBJECTIVE_OPTIONS = (
    *("beta", "gamma", "label_smoothing", "sft_weight", "length_normalized"),
    *("desirable_weight", "undesirable_weight"),
    *("rewards", "environment", "turns", "reward_timeout", "group", "answer_tokens", "group_loss"),
    *("clip_low", "clip_high", "updates"),
    *("labels", "class_weights", "pooling", "temperature"),
)  # fields of `train` that only some objectives read


class TrainSection(Section):
    objective: Literal["sft", "dpo", "ipo", "kto", "orpo", "simpo", "reward", "grpo", "classify", "embed"] = Field(
        "sft",
        description="what the rows teach: completions (sft), pairs (dpo, ipo, orpo, simpo), labelled answers (kto), a "
        "reward model (reward), rewards (grpo), classes (classify) or embeddings (embed)",
    )
    method: Literal["lora", "full"] = Field(
        "lora", description="what is trained: adapters (lora), or all weights of the text model (full)"
    )
    beta: Finite | None = Field(
        None,
        ge=0,
        description="KL penalty against the reference model (dpo, ipo, kto, grpo), odds-ratio weight (orpo) or reward"
        " scale (simpo); default: 0.1, simpo 2, grpo 0.04 (0 disables it)",
    )
    gamma: Finite | None = Field(None, ge=0, description="target reward margin (simpo); default: 1")
    label_smoothing: Finite | None = Field(
        None, ge=0, lt=0.5, description="assumed share of pairs with swapped labels (dpo, simpo); default: 0"
    )
    sft_weight: Finite | None = Field(
        None, ge=0, description="weight of the cross-entropy loss on chosen answers (dpo, ipo, simpo); default: 0"
    )
    length_normalized: bool | None = Field(
        None,
        description="average log-probabilities over tokens instead of adding them (dpo, ipo); default: true for ipo, "
        "false for dpo",
    )
    desirable_weight: Finite | None = Field(None, ge=0, description="weight of desirable answers (kto); default: 1")
    undesirable_weight: Finite | None = Field(None, ge=0, description="weight of undesirable answers (kto); default: 1")
    rewards: str | list[str] | None = Field(
        None,
        description="reward functions (grpo): exact, exact_json, contains, regex, file.py:function; several with "
        "weights: A,B=0.2",
    )
    environment: str | None = Field(
        None,
        description="tools that the model calls while it answers (grpo): FILE.py:Class, or FILE.py:function,function",
    )
    turns: int | None = Field(
        None, ge=1, description="maximum number of the model's turns in an environment (grpo); default: 4"
    )
    reward_timeout: Finite | None = Field(
        None, gt=0, description="maximum seconds of a call of a reward function or a tool (grpo); default: 60"
    )
    group: int | None = Field(None, ge=2, description="completions sampled per prompt (grpo); default: 8")
    answer_tokens: int | None = Field(
        None, ge=1, description="maximum length of a completion, or of a turn, in tokens (grpo); default: 256"
    )
    group_loss: Literal["dapo", "grpo", "dr_grpo"] | None = Field(
        None,
        description="averaging of token losses (grpo): every token weighs the same (dapo, dr_grpo), or every "
        "completion (grpo); default: dapo",
    )
    clip_low: Finite | None = Field(
        None, gt=0, lt=1, description="lower clip range of the probability ratio (grpo); default: 0.2"
    )
    clip_high: Finite | None = Field(
        None, gt=0, description="upper clip range of the probability ratio (grpo); default: 0.28"
    )
    updates: int | None = Field(
        None, ge=1, description="optimizer steps for each batch of completions (grpo); default: 1"
    )
    labels: list[TextOrNumber] | None = Field(
        None, min_length=2, description="names and order of the classes (classify); default: those of the training rows"
    )
    class_weights: dict[TextOrNumber, Annotated[Finite, Field(ge=0)]] | Literal["none", "balanced"] | None = Field(
        None,
        description="weight of each class in the loss (classify): none, balanced (rare classes count as much as "
        "frequent ones) or a map from label to weight; default: none",
    )
    pooling: Literal["last", "mean"] | None = Field(
        None, description="vector of a text (embed): hidden state of the last token, or mean of all; default: last"
    )
    temperature: Annotated[Finite, Field(gt=0)] | None = Field(
        None, description="divisor of the similarities in the loss (embed); default: 0.05"
    )
    vllm_python: str | None = Field(
        None, description="Python of an environment with vLLM, which then samples the completions (grpo)"
    )
    keep: Annotated[Share | Literal["auto", "off"], BeforeValidator(_none_to_off)] = Field(
        "auto",
        description="share of the tokens in rows with the model's own answers to general prompts, so that it keeps "
        "what it knows (not for reward, grpo, classify and embed); auto: "
        f"{KEEP_SHARE} for supervised rows with system prompts, in all but short runs",
    )
    keep_prompts: str | None = Field(
        None,
        description="file of prompts in place of the general ones (train.keep), in a format of training rows; their "
        "answers are not used",
    )
    teacher: str | None = Field(
        None,
        description="a model or run: it answers rows without an answer, and its probabilities are labels (sft); or it "
        "judges each token of sampled completions (grpo)",
    )
    teacher_weight: Annotated[Finite, Field(ge=0, le=1)] | None = Field(
        None,
        description="weight of the teacher's probabilities against the rows' own tokens (sft), or of its judgements "
        "against the rewards (grpo); default: 0.5, for a server 0; 1 for grpo",
    )
    teacher_temperature: Annotated[Finite, Field(gt=0)] | None = Field(
        None, description="temperature of teacher and model where their probabilities are compared (sft); default: 1"
    )
    teacher_model: str | None = Field(
        None, description="name of the model on the teacher's server; default: its only one"
    )
    epochs: Finite = Field(3.0, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(
        None, ge=1, description="number of steps, or in grpo of batches of completions; overrides epochs"
    )
    batch_size: int = Field(8, ge=1, description="effective batch size in rows")
    micro_batch: int | None = Field(
        None, ge=1, description="rows computed at once; default: as many as micro_batch_tokens allows"
    )
    micro_batch_tokens: int | None = Field(
        None, ge=1, description="tokens computed at once, including padding; default: chosen by the plan"
    )
    learning_rate: Finite | None = Field(
        None,
        gt=0,
        le=1,
        examples=[1e-4],
        description="peak learning rate; default: by model size, alpha and batch size",
    )
    lora_plus_ratio: Finite = Field(
        1.0, gt=0, description="learning rate of B divided by that of A (LoRA+, arXiv:2402.12354)"
    )
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="learning rate schedule after the warmup"
    )
    warmup: Finite = Field(0.03, ge=0, description="number of warmup steps; below 1: share of all steps")
    weight_decay: Finite = Field(0.0, ge=0, description="decoupled weight decay, of matrices only")
    max_grad_norm: Finite = Field(1.0, ge=0, description="maximum gradient norm, for clipping; 0 disables it")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "lion", "sgd"] = Field(
        "adamw", description="optimizer"
    )
    gradient_checkpointing: Annotated[
        Literal["auto", "off", "on", "offload"] | Layers, BeforeValidator(_bool_to_on_off)
    ] = Field(
        "auto",
        description="recompute layers in the backward pass to save memory: off, on, or a number of layers; "
        "offload: all layers, with their inputs in CPU memory (CUDA)",
    )
    eval_steps: int | None = Field(None, ge=1, description="evaluate every N steps; default: once per epoch")
    early_stopping: int | None = Field(None, ge=1, description="stop after N evaluations without a lower loss")
    samples: int = Field(
        4,
        ge=0,
        description="evaluation prompts whose completions are logged at each evaluation (sft, base not sharded); "
        "0 disables it",
    )
    save_steps: int | None = Field(
        None, ge=1, description="save every N steps; default: once per epoch and every 10 minutes"
    )
    keep_checkpoints: int = Field(2, ge=1, description="number of newest checkpoints to keep, in addition to the best")
    log_steps: int = Field(1, ge=1, description="log a step event every N steps")
    exact: bool = Field(False, description="bit-identical results on any number of devices; slower")
    deterministic: bool = Field(
        False, description="bit-identical results of repeated runs on a GPU; slower (a CPU is always deterministic)"
    )
    int8_matmul: bool = Field(
        False,
        description="multiply frozen weights in int8: faster on CPUs with VNNI and without bf16; checked against fp32"
        " before the first step",
    )
    timeout: Duration = Field(
        "30m",
        description="maximum time that a device waits for the others, such as 90s, 30m or 2h",
    )
    max_time: Duration | None = Field(None, description="save and stop after this time, such as 90s, 30m or 2h")

    @property
    def keep_share(self) -> float:
        """train.keep as a share of all tokens, 0 if it is off or not decided."""
        return 0.0 if isinstance(self.keep, str) else self.keep


Tracker = Literal["tensorboard", "wandb", "trackio"]


class Recipe(Section):
    model: ModelSection
    data: DataSection
    lora: LoraSection = Field(default_factory=LoraSection)
    train: TrainSection = Field(default_factory=TrainSection)
    track: list[Tracker] = Field(default_factory=list, description="experiment trackers: tensorboard, wandb, trackio")
    seed: int = Field(0, ge=0, lt=2**63, description="random seed")
    out: str | None = Field(None, description="run folder; default: runs/DATA-N, for a sweep runs/sweep-N")
    preset: Literal["auto", "low-memory", "balanced", "max-quality"] = Field(
        "auto", description="set of defaults; auto chooses what fits this machine"
    )

    @model_validator(mode="after")
    def _check_consistency(self) -> Recipe:
        train, data, lora = self.train, self.data, self.lora
        objective, is_grpo = f"objective {train.objective}", train.objective == "grpo"
        conflict = self.int8_matmul_conflict() if train.int8_matmul else None
        full_conflict = self._full_conflict() if train.method == "full" else None
        teacher_on_server = str(train.teacher).startswith(("http://", "https://"))
        problems = {
            f"train.method full: cannot be combined with {full_conflict}": full_conflict is not None,
            "train.micro_batch: larger than train.batch_size": (train.micro_batch or 0) > train.batch_size,
            "train.micro_batch: give it or train.micro_batch_tokens, not both": (
                train.micro_batch is not None and train.micro_batch_tokens is not None
            ),
            f"data.overlong split: {objective} cannot split rows; use drop or truncate-start": (
                train.objective != "sft" and data.overlong == "split"
            ),
            f"data.loss all: {objective} trains on answers only": train.objective != "sft" and data.loss == "all",
            f"train.beta 0: {objective} needs a value above 0": (
                train.beta == 0 and train.objective not in ("sft", "grpo")
            ),
            "train.undesirable_weight 0: train.desirable_weight is 0 too, so the loss would be 0": (
                train.desirable_weight == 0 == train.undesirable_weight
            ),
            "lora.dropout: objective grpo needs 0, so that training and sampling compute the same log-probabilities": (
                is_grpo and lora.dropout > 0
            ),
            "data.overlong truncate-start: objective grpo cannot truncate prompts; use drop or refuse": (
                is_grpo and data.overlong == "truncate-start"
            ),
            "lora.new_tokens: objective embed does not support them, because sentence-transformers cannot load them": (
                train.objective == "embed" and bool(lora.new_tokens)
            ),
            "train.labels: a label is given twice": len(set(train.labels or ())) < len(train.labels or ()),
            f"train.keep: {objective} does not support it": train.keep_share > 0 and train.objective in NOT_KEEPING,
            f"train.teacher: {objective} does not support it": (
                train.teacher is not None and train.objective not in ("sft", "grpo")
            ),
            "train.teacher: cannot be combined with train.keep": train.teacher is not None and train.keep_share > 0,
            "train.keep_prompts: needs a share as train.keep, such as 0.15": (
                train.keep_prompts is not None and not train.keep_share
            ),
            "train.turns: needs train.environment": train.turns is not None and train.environment is None,
            "train.teacher: cannot be combined with train.environment": (
                train.teacher is not None and train.environment is not None
            ),
            "train.teacher: needs data.loss assistant": train.teacher is not None and data.loss != "assistant",
            "train.teacher_weight: there is no train.teacher": (
                train.teacher_weight is not None and train.teacher is None
            ),
            "train.teacher_temperature: needs train.teacher and objective sft": (
                train.teacher_temperature is not None and (train.teacher is None or train.objective != "sft")
            ),
            "train.teacher_temperature: train.teacher_weight is 0": (
                train.teacher_temperature is not None and train.teacher_weight == 0
            ),
            "train.teacher_temperature: a server gives its probabilities at temperature 1": (
                train.teacher_temperature not in (None, 1) and teacher_on_server
            ),
            "train.teacher_model: the teacher is not on a server": (
                train.teacher_model is not None and not teacher_on_server
            ),
            "train.early_stopping: needs data.eval": train.early_stopping is not None and data.eval is None,
            "lora.init loftq: cannot be combined with lora.use_dora": lora.init == "loftq" and lora.use_dora,
            f"train.int8_matmul: cannot be combined with {conflict}": conflict is not None,
        }
        for problem, applies in problems.items():
            if applies:
                raise ValueError(problem)
        return self

    def _full_conflict(self) -> str | None:
        """Return a setting that train.method full cannot be combined with and the reason, or None."""
        model, train = self.model, self.train
        known = ", ".join(FULL_OBJECTIVES)
        reasons = {
            f"objective {train.objective}, only with {known}": train.objective not in FULL_OBJECTIVES,
            "model.adapter: merge it first (`strop merge`), and give the merged model as model.name": (
                model.adapter is not None
            ),
            f"model.placement {model.placement}: each device has all weights": (
                model.placement in ("sharded", "streamed")
            ),
            "model.dtype fp16: use bf16 or fp32": model.dtype == "fp16",
            "train.int8_matmul, which needs frozen weights": train.int8_matmul,
            "train.lora_plus_ratio: there are no adapters": train.lora_plus_ratio != 1,
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    def int8_matmul_conflict(self) -> str | None:
        """Return a setting that train.int8_matmul cannot be combined with and the reason, or None."""
        model = self.model
        reasons = {
            f"model.dtype {model.dtype}: all other operations run in fp32": (model.dtype not in ("auto", "fp32")),
            f"model.quantization {model.quantization}: use none or int8": (
                model.quantization not in ("none", "int8", "auto")
            ),
            "lora.use_dora, which needs the unquantized weights": self.lora.use_dora,
            f"model.placement {model.placement}, which does not keep all weights in memory": (
                model.placement in ("sharded", "streamed")
            ),
        }
        return next((reason for reason, applies in reasons.items() if applies), None)


def option_fields() -> list[tuple[str, Any]]:
    """Return every option as (dotted name, pydantic FieldInfo), in the order of the recipe."""
    fields: list[tuple[str, Any]] = []
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        # on Python 3.10, isinstance(list[str], type) is true
        if get_origin(section) is None and isinstance(section, type) and issubclass(section, Section):
            fields += [(f"{name}.{leaf}", leaf_field) for leaf, leaf_field in section.model_fields.items()]
        else:
            fields.append((name, field))
    return fields
