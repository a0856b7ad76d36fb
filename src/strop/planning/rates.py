"""The learning rate that a recipe leaves open, by the model's size; and how sure the rule is of it."""

from __future__ import annotations

from strop.config.schema import Recipe
from strop.errors import RecipeError
from strop.model.shape import ModelShape
from strop.objectives.table import objective_of

PUBLISHED = 7e9  # parameters, and more: 2e-4 (QLoRA, arXiv:2305.14314, table 9)
MEASURED = 71e6, 135e6  # of the smallest and the largest model of benchmarks/learning_rates.py


def learning_rate(parameters: int) -> float:
    """Of supervised fine-tuning: 2e-4 for 7B parameters and more, larger for smaller models: 2e-4 (7e9 / P)^(2/3), at
    most 4e-3. The exponent is what joins 7B to the models that were measured (docs/learning_rate.md)."""
    return float(f"{min(4e-3, 2e-4 * max(1.0, PUBLISHED / parameters) ** (2 / 3)):.2g}")


def whole(parameters: int) -> float:
    """What the rates of objectives are shares of: 2e-4 (7e9 / P)^0.41, at most 2e-3.

    It was the rule for supervised fine-tuning too when the shares were measured (docs/preferences.md).
    """
    return float(f"{min(2e-3, 2e-4 * max(1.0, PUBLISHED / parameters) ** 0.41):.2g}")


def open_rate(recipe: Recipe, shape: ModelShape) -> tuple[float, str]:
    """The rate, and why. Raises RecipeError for an optimizer that has no rule."""
    train, objective, size = recipe.train, objective_of(recipe.train), shape.parameters
    if train.optimizer == "sgd":
        raise RecipeError("--train.optimizer sgd: has no rule for its learning rate", fix="give --train.learning_rate")
    rate, why = learning_rate(size), f"rule for {size / 1e6:,.0f}M parameters, {how_sure(size)}"
    if (less := held_back(recipe.lora.r, recipe.lora.use_rslora, train.lora_plus_ratio)) != 1:
        rate, why = float(f"{rate / less:.2g}"), f"{why}; over {less:.2g} for rsLoRA or LoRA+"
    if objective is not None:
        rate = float(f"{objective.rate_share * whole(size):.2g}")
        why = f"2e-4 (7e9 / parameters)^0.41, {objective.rate_share:g} of it for {objective.name}"
    if train.optimizer == "lion":
        return float(f"{rate / 5:.2g}"), f"{why}; a fifth of it for lion (arXiv:2302.06675: 3 to 10 times smaller)"
    return rate, why


def held_back(rank: int, rslora: bool, ratio: float) -> float:
    """What the rate is divided by where a method itself takes larger steps: r^(1/4) for rsLoRA, the root of LoRA+'s
    ratio. Measured at rank 16 and a ratio of 16, where 2 and 4 times as much diverged (docs/learning_rate.md)."""
    return float((rank**0.25 if rslora else 1) * ratio**0.5)


def how_sure(parameters: int) -> str:
    """Whether anybody has measured the rule at a model of this size."""
    least, most = MEASURED
    if parameters >= PUBLISHED:
        return "as published for 7B and more"
    if parameters > most * 1.05:
        return "between 135M and 7B, not measured: try half and twice it"
    return "measured" if parameters >= least * 0.95 else "smaller than what was measured: try half and twice it"
