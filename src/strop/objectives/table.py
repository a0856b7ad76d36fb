"""The table of objectives, and functions of the objective that a recipe names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strop.config.schema import OBJECTIVE_OPTIONS, Recipe, TrainSection
from strop.data.types import DataKind
from strop.errors import RecipeError
from strop.models.adapter_config import EMBED_TASK, SCORE_TASK
from strop.objectives import Objective
from strop.objectives.classification import CLASSIFY
from strop.objectives.embedding import EMBED
from strop.objectives.policy import GRPO, PolicyLoss
from strop.objectives.preferences import DPO, IPO, KTO, ORPO, REWARD, SIMPO

if TYPE_CHECKING:
    from strop.data.answers import Answers
    from strop.data.prepare import Prepared

OBJECTIVES: dict[str, Objective] = {
    objective.name: objective for objective in (DPO, IPO, KTO, ORPO, SIMPO, REWARD, GRPO, CLASSIFY, EMBED)
}

# what `strop check` needs to know of a recipe besides its data, and its defaults
CHECK_DEFAULTS: dict[str, Any] = {
    "model.name": "demo", "model.revision": None, "model.adapter": None, "train.objective": "sft",
    "train.labels": None, "train.rewards": None, "train.environment": None, "train.teacher": None,
    "lora.new_tokens": [],
}  # fmt: skip


def objective_of(train: TrainSection) -> Objective | None:
    """Return the recipe's objective, or None for supervised fine-tuning."""
    return OBJECTIVES.get(train.objective)


def data_kind_of(train: TrainSection) -> DataKind:
    """Return the kind of data that the recipe's objective trains on."""
    objective = objective_of(train)
    return "turns" if objective is None else objective.data_kind


def prepare_rows(
    recipe: Recipe, tokenizer: Any, *, cache: Path | None = None, strict: bool = True, answers: Answers | None = None
) -> Prepared:
    """Prepare a recipe's rows as its objective needs them; see strop.data.prepare.prepare.

    answers: those of train.teacher, by default placeholders.
    """
    from strop.data.answers import PLACEHOLDERS
    from strop.data.prepare import prepare

    train, new_tokens = recipe.train, recipe.lora.new_tokens
    values = {name: attrgetter(name)(recipe) for name in CHECK_DEFAULTS}
    options = {name: value for name, value in values.items() if value != CHECK_DEFAULTS[name]}
    if train.teacher is not None and train.objective == "sft" and answers is None:
        answers = PLACEHOLDERS
    return prepare(
        recipe.data, tokenizer, cache=cache, strict=strict, data_kind=data_kind_of(train), new_tokens=new_tokens,
        labels=train.labels, answers=answers, options=options,
    )  # fmt: skip


def count_score_outputs(train: TrainSection) -> int:
    """Return the outputs of the score head, 0 without one. Classes that are not known yet count as one."""
    objective = objective_of(train)
    return 0 if objective is None or not objective.scored else len(train.labels or ()) or 1


def task_of(train: TrainSection) -> str:
    """Return PEFT's task type of the adapter that the objective trains."""
    if objective_of(train) is EMBED:
        return EMBED_TASK
    return SCORE_TASK if count_score_outputs(train) else "CAUSAL_LM"


def sequences_per_row(train: TrainSection) -> int:
    """Return the number of sequences per row of the effective batch."""
    objective = objective_of(train)
    if isinstance(objective, PolicyLoss):
        return int(train.group or objective.options["group"])
    return 2 if data_kind_of(train) in ("pairs", "triplets") else 1


def max_completion_tokens(train: TrainSection) -> int:
    """Return the maximum length of a sampled completion, or 0 if the objective does not sample."""
    objective = objective_of(train)
    if isinstance(objective, PolicyLoss):
        return int(train.answer_tokens or objective.options["answer_tokens"])
    return 0


def longest_sequence(recipe: Recipe) -> int:
    """Return the maximum number of tokens of a row with what is sampled after it.

    data.max_length is the longest prompt, or in an environment the longest trace.
    """
    has_environment = recipe.train.environment is not None
    return recipe.data.max_length + (0 if has_environment else max_completion_tokens(recipe.train))


def max_sampled_tokens(recipe: Recipe, prompt: int = 0) -> int:
    """Return the maximum number of sampled tokens after a prompt, in all turns, or 0 if nothing is sampled."""
    sampled = max_completion_tokens(recipe.train) * max_turns(recipe.train)
    return sampled if recipe.train.environment is None else max(1, min(sampled, recipe.data.max_length - prompt))


def max_turns(train: TrainSection) -> int:
    """Return the maximum number of the model's turns in a sampled trace, 1 without an environment."""
    objective = objective_of(train)
    if objective is None or train.environment is None:
        return 1
    return int(train.turns or objective.options["turns"])


def check_devices(train: TrainSection, devices: int) -> None:
    """Raise RecipeError if the objective does not support this number of devices."""
    if devices > 1 and data_kind_of(train) == "prompts":
        what = f"objective {train.objective} samples completions on one device, and {devices} were requested"
        raise RecipeError(what, fix="leave --devices and --nodes out")


def _refuse_unread(train: TrainSection, names: Sequence[str]) -> RecipeError:
    """Return the error of options that the objective does not read; the recipe of another run may set them."""
    options, it = ", ".join(f"--train.{name}" for name in names), "it" if len(names) == 1 else "them"
    readers = [known.name for known in OBJECTIVES.values() if {*names} <= {*known.options}]
    fix = f"leave {it} out, or set {it} to none if a recipe has {it}"
    fix += f", or choose --train.objective {', '.join(readers)}" if readers else ""
    return RecipeError(f"{options}: objective {train.objective} does not read {it}", fix=fix)


def default_options(train: TrainSection) -> Iterator[tuple[str, Any, str]]:
    """Yield (field, value, reason) for each option of the objective that the recipe does not set.

    Raises RecipeError for an option that the objective does not read, and for missing rewards.
    """
    objective = objective_of(train)
    defaults = {} if objective is None else objective.options
    if unread := [name for name in OBJECTIVE_OPTIONS if getattr(train, name) is not None and name not in defaults]:
        raise _refuse_unread(train, unread)
    for name in OBJECTIVE_OPTIONS:
        value = getattr(train, name)
        has_rewards = train.teacher is not None or train.environment is not None
        if value is None and name == "rewards" and name in defaults and not has_rewards:
            what = f"objective {train.objective} needs --train.rewards, --train.environment or --train.teacher"
            raise RecipeError(what, fix="give --train.rewards exact, exact_json, contains, regex or file.py:function")
        if name == "turns" and train.environment is None:
            continue
        if value is None and objective is not None and defaults.get(name) is not None:
            sources = objective.option_sources
            source = objective.source if sources is None else sources.get(name)
            yield f"train.{name}", defaults[name], f"usual for {objective.name}" + f" ({source})" * (source is not None)
