"""The learning rate that a recipe leaves open: by the model's size and the number of steps; and how sure it is."""

from __future__ import annotations

from strop.config.load import Choice, Resolved
from strop.config.schema import Recipe
from strop.data.batches import BatchStream
from strop.errors import RecipeError
from strop.model.shape import ModelShape
from strop.objectives.table import objective_of

MEASURED = 71e6, 135e6  # parameters of the models of benchmarks/learning_rates.py, from the smallest to the largest
PUBLISHED = 7e9  # and more: QLoRA, arXiv:2305.14314, table 9
LONG = 256  # steps; a run of fewer takes a larger rate
MOST = 4.0  # times the rate of a long run


def learning_rate(parameters: int, steps: int | None = None) -> float:
    """2e-4 for 7B parameters and more, larger for small models: 2e-4 (7e9 / P)^0.41, at most 2e-3. For fewer than 256
    steps more: times (256 / steps)^0.5, at most 4 times. steps: None for a long run.

    See docs/learning_rate.md for what was measured.
    """
    long = min(2e-3, 2e-4 * max(1.0, PUBLISHED / parameters) ** 0.41)
    return float(f"{long * _shorter(steps):.2g}")


def _shorter(steps: int | None) -> float:
    return 1.0 if steps is None else min(MOST, max(1.0, LONG / steps) ** 0.5)


def open_rate(recipe: Recipe, shape: ModelShape, rows: int | None = None) -> Choice:
    """rows: that are trained on, where they are known."""
    train, objective = recipe.train, objective_of(recipe.train)
    if train.optimizer == "sgd":
        raise RecipeError("--train.optimizer sgd: has no rule for its learning rate", fix="give --train.learning_rate")
    steps = None
    if objective is None and (rows or train.max_steps):
        stream = BatchStream(rows or 1, batch_size=train.batch_size, seed=0, epochs=train.epochs,
                             max_steps=train.max_steps)  # fmt: skip
        steps = stream.total_steps
    rate, why = learning_rate(shape.parameters, steps), f"rule for {shape.parameters / 1e6:,.0f}M parameters"
    if _shorter(steps) > 1:
        why = f"{why} and {steps} steps"
    if objective is not None:
        rate = float(f"{rate * objective.rate_share:.2g}")
        why = f"{why}, {objective.rate_share:g} of it for {objective.name}"
    if train.optimizer == "lion":
        rate = float(f"{rate / 5:.2g}")
        why = f"{why}, a fifth of it for lion (arXiv:2302.06675: 3 to 10 times smaller)"
    return Choice("train.learning_rate", rate, "plan", f"{why}; {how_sure(shape.parameters)}")


def for_rows(resolved: Resolved, shape: ModelShape, rows: int) -> Resolved:
    """With the rate that the steps over so many rows call for, where the plan chose it. rows: 0 where unknown."""
    if not rows or resolved.choices["train.learning_rate"].origin != "plan":
        return resolved
    return resolved.decide([open_rate(resolved.recipe, shape, rows)])


def how_sure(parameters: int) -> str:
    """Whether anybody has measured the rule at a model of this size."""
    least, most = MEASURED
    if least <= parameters <= most:
        return "measured at this size"
    if parameters >= PUBLISHED:
        return "published for this size (arXiv:2305.14314)"
    where = "smaller than what was measured" if parameters < least else "between 135M and 7B, not measured"
    return f"{where}: try half and twice it"
