"""The learning rate that a recipe leaves open, by model, adapter and batch; and how sure the rule is of it."""

from __future__ import annotations

from collections.abc import Iterator

from strop.config.load import Resolved
from strop.config.schema import Recipe
from strop.errors import RecipeError
from strop.models.families.shape import ModelShape
from strop.objectives.table import objective_of

PUBLISHED = 7e9  # parameters, and more: 2e-4 (QLoRA, arXiv:2305.14314, table 9)
REACH, BATCH = 32, 8  # of an adapter (r 16, alpha 32), and rows a step, that the rule is made for
SHORTEST, BATCHES = 8, (2, 32)  # that were measured: beyond them the rate stays as it is there; it falls on with alpha
DECIDING = {
    "lora.alpha": ("lora.r",),
    "train.learning_rate": (
        *("model.name", "lora.r", "lora.alpha", "lora.use_rslora"),
        *("train.objective", "train.batch_size", "train.lora_plus_ratio", "train.optimizer"),
    ),
}  # what the rules of both read
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
    reach = reach_of(recipe)
    if (times := factor(reach, train.batch_size, train.lora_plus_ratio)) != 1:
        rate, why = float(f"{rate * times:.2g}"), f"{why}; times {times:.2g} for {_unlike(recipe, reach)}"
    if objective is not None:
        rate = float(f"{objective.rate_share * whole(size):.2g}")
        why = f"2e-4 (7e9 / parameters)^0.41, {objective.rate_share:g} of it for {objective.name}"
    if train.optimizer == "lion":
        return float(f"{rate / 5:.2g}"), f"{why}; a fifth of it for lion (arXiv:2302.06675: 3 to 10 times smaller)"
    return rate, why


def kept(resolved: Resolved, shape: ModelShape) -> Iterator[str]:
    """That a recipe's alpha and learning rate stay as they are, where an option changes what they would be chosen by:
    the recipe.yaml of a run names all values."""
    recipe, choices = resolved.recipe, resolved.choices
    ruled = {"lora.alpha": alpha_of(recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"alpha": None})}))}
    if recipe.train.optimizer != "sgd":
        ruled["train.learning_rate"] = open_rate(recipe, shape)[0]
    for field, value in ruled.items():
        given = [f"--{name} {choices[name].value}" for name in DECIDING[field] if choices[name].origin == "option"]
        found = choices[field]
        if given and found.origin == "recipe" and found.value is not None and found.value != value:
            said = f"{field} {found.value:g}: as the recipe has it; with {', '.join(given)} it would be {value:g}"
            yield f"{said} (--{field} none)"


def reach_of(recipe: Recipe) -> float:
    """Rank times the scale of the adapter's product: alpha, of rsLoRA alpha sqrt(r)."""
    return alpha_of(recipe) * (recipe.lora.r**0.5 if recipe.lora.use_rslora else 1)


def alpha_of(recipe: Recipe) -> float:
    """Twice the rank, where the recipe leaves it open."""
    return recipe.lora.alpha or 2.0 * recipe.lora.r


def factor(reach: float, batch: int, ratio: float = 1.0) -> float:
    """What the rate is multiplied by where the adapter or the batch are not those that the rule was made with.

    reach: as of `reach_of`; batch: rows a step; ratio: LoRA+'s. Best rates were found at ranks 4 to 128, scales 1 to 8,
    2 to 32 rows, and a ratio of 16 (docs/learning_rate.md). With one alpha for all ranks the rate is the same, as "LoRA
    Without Regret" (Schulman and Thinking Machines, 2025) found for larger models.
    """
    rows = min(max(batch, BATCHES[0]), BATCHES[1])
    return float((REACH / max(reach, SHORTEST)) ** 0.5 * (rows / BATCH) ** 0.2 / ratio**0.5)


def _unlike(recipe: Recipe, reach: float) -> str:
    batch = recipe.train.batch_size
    parts = {
        f"alpha {alpha_of(recipe):g}{' and rsLoRA' * recipe.lora.use_rslora}": reach != REACH,
        f"batches of {batch}": batch != BATCH,
        "LoRA+": recipe.train.lora_plus_ratio != 1,
    }
    return ", ".join(name for name, there in parts.items() if there)


def how_sure(parameters: int) -> str:
    """Whether anybody has measured the rule at a model of this size."""
    least, most = MEASURED
    if parameters >= PUBLISHED:
        return "as published for 7B and more"
    if parameters > most * 1.05:
        return "between 135M and 7B, not measured: try half and twice it"
    return "measured" if parameters >= least * 0.95 else "smaller than what was measured: try half and twice it"
