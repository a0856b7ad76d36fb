"""The recipe: every option of a run, stated once, with its unit, bounds and help.

Command-line flags, the JSON schema and the table in the docs are made from these classes.
A recipe is frozen and complete; where a value came from is kept beside it (config/load.py).
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Any, Literal, get_args, get_origin

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


def _finite(value: float) -> float:
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("must be a finite number")
    return value


def _is_number(hint: Any) -> bool:
    """Whether a field takes numbers, or maps to numbers, and at most None besides."""
    if get_origin(hint) is Annotated:
        return _is_number(get_args(hint)[0])
    parts = get_args(hint)[get_origin(hint) is dict :]
    return all(part is type(None) or _is_number(part) for part in parts) if parts else hint in (int, float)


def _yes_or_no(value: Any) -> Any:
    """YAML reads a bare on or off as true or false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Finite = Annotated[float, AfterValidator(_finite)]
Layers = Annotated[int, Field(ge=1)]
MAX_RANK = 4096
TIME = r"^\d+(\.\d+)?[smhd]?$"
DEVICES = r"^(auto|cpu|mps|cuda(:\d+)?)$"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads a bare yes or true as true, which pydantic takes for 1."""
        held = value.values() if isinstance(value, dict) else (value,)
        if any(isinstance(one, bool) for one in held) and _is_number(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("must be a number, not true or false")
        return value


class ModelSection(Section):
    name: str = Field(description="Hub id, local folder, .gguf file, run folder, or `demo`")
    revision: str | None = Field(None, description="Hub revision: branch, tag or commit")
    adapter: str | None = Field(None, description="adapter or run folder to start from")
    quantization: Literal["none", "nf4", "fp4", "int8", "auto"] = Field(
        "none", description="how the frozen base is stored; `auto` quantizes where 16 bit would not fit"
    )
    double_quantization: bool = Field(True, description="quantize the constants of 4-bit weights too")
    resident_layers: int | None = Field(
        None, ge=0, description="layers whose quantized weights are dequantized once; the others at each product"
    )
    placement: Literal["auto", "replicated", "sharded"] = Field(
        "auto",
        description="of the base on several devices: whole on each, or a share on each, gathered layer by layer; "
        "`auto` shards what would not fit",
    )
    dtype: Literal["auto", "bf16", "fp32", "fp16"] = Field(
        "auto", description="type of the frozen weights; `auto` measures bf16 against fp32 on a CPU"
    )
    device: str = Field("auto", pattern=DEVICES, description="auto, cpu, mps, cuda or cuda:N")


class DataSection(Section):
    train: str | list[str] = Field(description="file, glob, Hub data set, or a list of them")
    eval: str | list[str] | None = Field(
        None, description="file to evaluate on, or a share of the train rows such as `5%` (split by content hash)"
    )
    format: str = Field("auto", description="shape of the rows; `auto` looks at all rows")
    columns: dict[str, str] | None = Field(None, description="names of columns: prompt=question,completion=answer")
    max_length: int = Field(1024, ge=2, description="longest row in tokens")
    overlong: Literal["refuse", "drop", "truncate-start", "split"] = Field(
        "refuse", description="what happens to rows above max_length"
    )
    bad_rows: Literal["refuse", "drop"] = Field("refuse", description="what happens to rows that are wrong")
    loss: Literal["assistant", "all"] = Field("assistant", description="which tokens are trained on")
    template: str | None = Field(None, description="chat template (name or file) in place of the model's own")
    template_options: dict[str, Any] = Field(
        default_factory=dict,
        description="values for the chat template, by names that it reads: enable_thinking=false",
    )
    reasoning: Literal["auto", "as-is", "empty", "drop", "refuse"] = Field(
        "auto", description="rows without reasoning on a template that thinks, and reasoning that it does not show"
    )
    encoding: str = Field("utf-8", description="text encoding of the data files")

    @field_validator("eval", mode="before")
    @classmethod
    def _share(cls, given: Any) -> Any:
        if isinstance(given, int | float) or (isinstance(given, str) and re.fullmatch(r"0?\.\d+", given)):
            raise ValueError("a share is written with %, such as 5%")
        return given

    @field_validator("train", "eval")
    @classmethod
    def _some(cls, files: str | list[str] | None) -> str | list[str] | None:
        if files == []:
            raise ValueError("names no file")
        return files


class LoraSection(Section):
    r: int = Field(16, ge=1, le=MAX_RANK, description="rank")
    alpha: Finite | None = Field(None, gt=0, description="scale numerator; default 2 r")
    dropout: Finite = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="all-linear (a mixture's experts too), attention, gate, experts, or names of linear layers",
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which biases are trained")
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r) (arXiv:2312.03732)")
    use_dora: bool = Field(False, description="weight-decomposed LoRA (arXiv:2402.09353)")
    init: Literal["default", "gaussian", "loftq"] = Field(
        "default", description="A uniform (Kaiming) or normal and B zero; loftq: what quantization lost"
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=MAX_RANK)]] = Field(
        default_factory=dict, description="rank by module name or regular expression"
    )
    alpha_pattern: dict[str, Annotated[Finite, Field(gt=0)]] = Field(
        default_factory=dict, description="alpha by module name or expression"
    )
    modules_to_save: list[str] = Field(
        default_factory=list, description="modules trained in full, not through LoRA: all whose names end so"
    )
    new_tokens: list[str] = Field(
        default_factory=list, description="tokens added to the vocabulary; their embedding rows are trained and saved"
    )

    @field_validator("target_modules")
    @classmethod
    def _some(cls, names: str | list[str]) -> str | list[str]:
        if not names:
            raise ValueError("names no module: leave it out, or write all-linear")
        return names

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _expressions(cls, patterns: dict[str, Any]) -> dict[str, Any]:
        for pattern in patterns:
            try:
                re.compile(f"({pattern})")
            except re.error as error:
                raise ValueError(f"{pattern} is no regular expression: {error}") from None
        return patterns

    @field_validator("new_tokens")
    @classmethod
    def _each_once(cls, tokens: list[str]) -> list[str]:
        if "" in tokens:
            raise ValueError("a token is empty")
        if twice := [token for token, count in Counter(tokens).items() if count > 1]:
            raise ValueError(f"{', '.join(twice)} stands twice")
        return tokens


OBJECTIVE_OPTIONS = (
    *("beta", "gamma", "label_smoothing", "sft_weight", "length_normalized"),
    *("desirable_weight", "undesirable_weight"),
    *("rewards", "group", "answer_tokens", "group_loss", "clip_low", "clip_high", "updates"),
)  # fields of `train` that some objectives read


class TrainSection(Section):
    objective: Literal["sft", "dpo", "ipo", "kto", "orpo", "simpo", "reward", "grpo"] = Field(
        "sft",
        description="what is learned from: answers, pairs of answers, judged answers (kto), rewards for the model's "
        "own answers (grpo); reward scores pairs",
    )
    beta: Finite | None = Field(
        None,
        ge=0,
        description="how close an objective keeps to its start: dpo, ipo, kto, orpo 0.1; simpo 2; grpo 0.04 (0: not)",
    )
    gamma: Finite | None = Field(None, ge=0, description="margin that simpo asks for; 1")
    label_smoothing: Finite | None = Field(
        None, ge=0, lt=0.5, description="share of pairs taken to be the wrong way round: dpo, simpo; 0"
    )
    sft_weight: Finite | None = Field(
        None, ge=0, description="weight of the chosen answer's own cross entropy: dpo, ipo, simpo; 0"
    )
    length_normalized: bool | None = Field(
        None, description="compare log-probabilities a token, not their sums: ipo true, dpo false"
    )
    desirable_weight: Finite | None = Field(None, ge=0, description="weight of good answers: kto; 1")
    undesirable_weight: Finite | None = Field(None, ge=0, description="weight of bad answers: kto; 1")
    rewards: str | list[str] | None = Field(
        None, description="what grpo rewards: exact, exact_json, contains, regex, file.py:function; several: A,B=0.2"
    )
    group: int | None = Field(None, ge=2, description="answers drawn to each prompt: grpo; 8")
    answer_tokens: int | None = Field(None, ge=1, description="longest answer that is drawn, in tokens: grpo; 256")
    group_loss: Literal["dapo", "grpo", "dr_grpo"] | None = Field(
        None, description="what weighs the same in grpo's mean: each token (dapo), each answer (grpo); dr_grpo; dapo"
    )
    clip_low: Finite | None = Field(
        None, gt=0, lt=1, description="how far a token's probability may fall before it is left alone: grpo; 0.2"
    )
    clip_high: Finite | None = Field(None, gt=0, description="the same for one that rises: grpo; 0.28")
    updates: int | None = Field(None, ge=1, description="optimizer steps on the same drawn answers: grpo; 1")
    vllm_python: str | None = Field(
        None, description="the Python of an environment with vLLM, which then draws the answers: grpo"
    )
    epochs: Finite = Field(3.0, gt=0, description="passes over the train rows")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    batch_size: int = Field(8, ge=1, description="effective batch in rows")
    micro_batch: int | None = Field(None, ge=1, description="rows computed at once; default by tokens")
    micro_batch_tokens: int | None = Field(None, ge=1, description="tokens computed at once, any padding included")
    learning_rate: Finite | None = Field(
        None, gt=0, le=1, description="peak learning rate; default by model size, alpha and batch"
    )
    lora_plus_ratio: Finite = Field(1.0, gt=0, description="learning rate of B over that of A (arXiv:2402.12354)")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field("cosine", description="schedule after the warmup")
    warmup: Finite = Field(0.03, ge=0, description="below 1: share of all steps; else steps")
    weight_decay: Finite = Field(0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: Finite = Field(1.0, ge=0, description="clip the gradient norm to this; 0: never")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "lion", "sgd"] = Field(
        "adamw", description="optimizer"
    )
    gradient_checkpointing: Annotated[Literal["auto", "off", "on", "offload"] | Layers, BeforeValidator(_yes_or_no)] = (
        Field(
            "auto",
            description="recompute layers in the backward pass to save memory: auto, off, on, or how many; "
            "offload: all, and on a card their inputs wait in the host's memory",
        )
    )
    eval_steps: int | None = Field(None, ge=1, description="evaluate every N steps; default once an epoch")
    early_stopping: int | None = Field(None, ge=1, description="stop after N evaluations without a better loss")
    save_steps: int | None = Field(None, ge=1, description="save every N steps; default once an epoch and 10 minutes")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept (the best is kept besides)")
    log_steps: int = Field(1, ge=1, description="write a step event every N steps")
    exact: bool = Field(False, description="the same bits on any number of devices; slower")
    deterministic: bool = Field(False, description="the same bits on a card each time; slower. A CPU does so anyway")
    int8_matmul: bool = Field(
        False,
        description="multiply frozen weights in 8-bit integers: faster on a CPU that has them and no bf16 (VNNI); "
        "checked against fp32 before the first step",
    )
    timeout: str = Field("30m", pattern=TIME, description="how long a device may keep the others waiting: 90s, 30m, 2h")
    max_time: str | None = Field(None, pattern=TIME, description="stop and save after 90s, 30m, 2h")


Tracker = Literal["tensorboard", "wandb", "trackio"]


class Recipe(Section):
    model: ModelSection
    data: DataSection
    lora: LoraSection = Field(default_factory=LoraSection)
    train: TrainSection = Field(default_factory=TrainSection)
    track: list[Tracker] = Field(default_factory=list, description="experiment trackers; none by default")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything that is random")
    out: str | None = Field(None, description="run folder; default runs/<data>-N")
    preset: Literal["auto", "low-memory", "balanced", "max-quality"] = Field("auto", description="bundle of defaults")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.train.micro_batch is not None and self.train.micro_batch > self.train.batch_size:
            raise ValueError("train.micro_batch: larger than train.batch_size")
        if self.train.micro_batch is not None and self.train.micro_batch_tokens is not None:
            raise ValueError("train.micro_batch: give it or train.micro_batch_tokens, not both")
        if self.train.objective != "sft" and self.data.overlong == "split":
            raise ValueError("data.overlong split: answers that are compared cannot be split; drop or truncate-start")
        if self.train.objective != "sft" and self.data.loss == "all":
            raise ValueError(f"data.loss all: objective {self.train.objective} compares answers alone")
        if self.train.beta == 0 and self.train.objective not in ("sft", "grpo"):
            raise ValueError(f"train.beta 0: objective {self.train.objective} needs a number above 0")
        if self.train.desirable_weight == 0 == self.train.undesirable_weight:
            raise ValueError("train.undesirable_weight 0: with train.desirable_weight 0 nothing is left to learn from")
        if self.train.objective == "grpo":
            self._check_drawing()
        if self.train.early_stopping is not None and self.data.eval is None:
            raise ValueError("train.early_stopping: needs data.eval")
        if self.lora.init == "loftq" and self.lora.use_dora:
            raise ValueError("lora.init loftq: not with lora.use_dora, whose magnitudes are of the quantized weights")
        if self.train.int8_matmul and (what := self.int8_matmul_conflict()) is not None:
            raise ValueError(f"train.int8_matmul: not with {what}")
        return self

    def int8_matmul_conflict(self) -> str | None:
        """What does not go with train.int8_matmul."""
        model = self.model
        reasons = {
            f"model.dtype {model.dtype}: what is not multiplied is computed in fp32": (
                model.dtype not in ("auto", "fp32")
            ),
            f"model.quantization {model.quantization}: none or int8": (
                model.quantization not in ("none", "int8", "auto")
            ),
            "lora.use_dora, which needs the weights themselves": self.lora.use_dora,
            "model.placement sharded, whose weights are not there all the time": model.placement == "sharded",
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _check_drawing(self) -> None:
        if self.lora.dropout:
            raise ValueError("lora.dropout: objective grpo compares the step's log-probabilities with the drawing's")
        if self.data.overlong == "truncate-start":
            raise ValueError("data.overlong truncate-start: a prompt that is cut asks something else; drop, or refuse")


def option_fields() -> list[tuple[str, Any]]:
    """Every option as (dotted name, pydantic FieldInfo), in the order of the recipe."""
    rows: list[tuple[str, Any]] = []
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        # Python 3.10 takes list[str] for a class, until it is asked whose
        if get_origin(section) is None and isinstance(section, type) and issubclass(section, Section):
            rows += [(f"{name}.{inner}", info) for inner, info in section.model_fields.items()]
        else:
            rows.append((name, field))
    return rows


def options_table() -> str:
    """The options as a Markdown table, for docs/recipe.md."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for name, info in option_fields():
        default = "required" if info.is_required() else f"`{info.get_default(call_default_factory=True)}`"
        choices = [str(choice) for choice in _choices(info.annotation)]
        meaning = f"{info.description}{': ' if choices else ''}{', '.join(choices)}"
        lines.append(f"| `{name}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()
