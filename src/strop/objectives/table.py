"""The objectives by name, and what a recipe may say of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from strop.config.schema import OBJECTIVE_OPTIONS, TrainSection
from strop.data.types import DataKind
from strop.errors import RecipeError
from strop.objectives.base_loss import Objective
from strop.objectives.dpo import DPO
from strop.objectives.grpo import GRPO
from strop.objectives.ipo import IPO
from strop.objectives.kto import KTO
from strop.objectives.orpo import ORPO
from strop.objectives.reward import REWARD
from strop.objectives.simpo import SIMPO

OBJECTIVES: dict[str, Objective] = {one.name: one for one in (DPO, IPO, KTO, ORPO, SIMPO, REWARD, GRPO)}


def objective_of(train: TrainSection) -> Objective | None:
    """The objective of a recipe; None for supervised fine-tuning."""
    return OBJECTIVES.get(train.objective)


def data_kind_of(train: TrainSection) -> DataKind:
    """What a recipe's objective learns from."""
    objective = objective_of(train)
    return "turns" if objective is None else objective.data_kind


def answers_of(train: TrainSection) -> int:
    """Answers that a unit of the effective batch trains on."""
    data_kind = data_kind_of(train)
    if data_kind == "prompts":
        return train.group or GRPO.options["group"]
    return 2 if data_kind == "pairs" else 1


def drawn_tokens(train: TrainSection) -> int:
    """Longest answer that is drawn behind a row; 0 where rows hold their answers."""
    return (train.answer_tokens or GRPO.options["answer_tokens"]) if data_kind_of(train) == "prompts" else 0


def check_devices(train: TrainSection, devices: int) -> None:
    """Raises RecipeError for an objective that does not learn on so many devices."""
    if devices > 1 and data_kind_of(train) == "prompts":
        what = f"objective {train.objective}: answers are drawn on one device, and there are {devices}"
        raise RecipeError(what, fix="leave --devices and --nodes out")


def open_options(train: TrainSection) -> Iterator[tuple[str, Any, str]]:
    """(field, value, why) of the options that the recipe leaves open.

    Raises RecipeError for an option that the objective does not read: no setting is without effect.
    """
    objective = objective_of(train)
    known = {} if objective is None else objective.options
    for name in OBJECTIVE_OPTIONS:
        value = getattr(train, name)
        if value is not None and name not in known:
            readers = [one.name for one in OBJECTIVES.values() if name in one.options]
            what = f"--train.{name}: objective {train.objective} does not read it"
            raise RecipeError(what, fix=f"leave it out, or choose --train.objective {', '.join(readers)}")
        if value is None and name == "rewards" and name in known:
            what = f"objective {train.objective} needs something to reward"
            raise RecipeError(what, fix="give --train.rewards exact, exact_json, contains, regex or file.py:function")
        if value is None and name in known and objective is not None:
            yield f"train.{name}", known[name], f"usual for {objective.name} ({objective.source})"
