"""Choose the learning rate that a recipe leaves open, from its model, adapter and batch size."""

from __future__ import annotations

from collections.abc import Iterator

from strop.config.load import Resolved
from strop.config.schema import Recipe
from strop.errors import RecipeError
from strop.models.families.shape import ModelShape
from strop.objectives.table import objective_of

PUBLISHED_PARAMETERS = 7e9  # from this size on: 2e-4 (QLoRA, arXiv:2305.14314, table 9)
REFERENCE_SCALE, REFERENCE_ROWS = 32, 8  # adapter scale (r 16, alpha 32) and rows per step that the rule is made for
MIN_SCALE, ROWS_RANGE = 8, (2, 32)  # measured; below MIN_SCALE and outside of ROWS_RANGE the rate stays constant
DECIDING = {  # options that the rules for alpha and for the learning rate read
    "lora.alpha": ("lora.r",),
    "train.learning_rate": (
        *("model.name", "lora.r", "lora.alpha", "lora.use_rslora"),
        *("train.objective", "train.batch_size", "train.lora_plus_ratio", "train.optimizer"),
    ),
}
MEASURED_PARAMETERS = 71e6, 135e6  # smallest and largest model of benchmarks/learning_rates.py


def learning_rate(parameters: int) -> float:
    """Return the rate of supervised fine-tuning: 2e-4 (7e9 / P)^(2/3) below 7B parameters, at most 4e-3, else 2e-4.

    The exponent joins the published rate for 7B to the measured models (docs/learning_rate.md).
    """
    return float(f"{min(4e-3, 2e-4 * max(1.0, PUBLISHED_PARAMETERS / parameters) ** (2 / 3)):.2g}")


def objective_base_rate(parameters: int) -> float:
    """Return the rate that the other objectives take a share of: 2e-4 (7e9 / P)^0.41, at most 2e-3.

    It was the rule for supervised fine-tuning too when the shares were measured (docs/preferences.md).
    """
    return float(f"{min(2e-3, 2e-4 * max(1.0, PUBLISHED_PARAMETERS / parameters) ** 0.41):.2g}")


def open_rate(recipe: Recipe, shape: ModelShape) -> tuple[float, str]:
    """Return the learning rate of a recipe that leaves it open, and the reason.

    Raises:
        RecipeError: there is no rule for the optimizer.
    """
    train, objective, size = recipe.train, objective_of(recipe.train), shape.parameters
    if train.optimizer == "sgd":
        raise RecipeError("--train.optimizer sgd: no rule for its learning rate", fix="give --train.learning_rate")
    rate, why = learning_rate(size), f"rule for {size / 1e6:,.0f}M parameters, {rule_evidence(size)}"
    scale = adapter_scale(recipe)
    if (factor := rate_factor(scale, train.batch_size, train.lora_plus_ratio)) != 1:
        rate, why = float(f"{rate * factor:.2g}"), f"{why}; times {factor:.2g} for {_differences(recipe, scale)}"
    if objective is not None:
        rate = float(f"{objective.rate_share * objective_base_rate(size):.2g}")
        why = f"2e-4 (7e9 / parameters)^0.41, {objective.rate_share:g} of it for {objective.name}"
    if train.optimizer == "lion":
        return float(f"{rate / 5:.2g}"), f"{why}; a fifth of it for lion (arXiv:2302.06675: 3 to 10 times smaller)"
    return rate, why


def kept_values(resolved: Resolved, shape: ModelShape) -> Iterator[str]:
    """Yield a sentence for alpha and the learning rate where the recipe keeps them, but an option changes their rule.

    The recipe.yaml of a run gives all values, so they do not follow a changed rank or model.
    """
    recipe, choices = resolved.recipe, resolved.choices
    open_alpha = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"alpha": None})})
    rule_values = {"lora.alpha": alpha_of(open_alpha)}
    if recipe.train.optimizer != "sgd":
        rule_values["train.learning_rate"] = open_rate(recipe, shape)[0]
    for field, value in rule_values.items():
        options = [f"--{name} {choices[name].value}" for name in DECIDING[field] if choices[name].origin == "option"]
        choice = choices[field]
        if options and choice.origin == "recipe" and choice.value is not None and choice.value != value:
            kept = f"{field} {choice.value:g}: as the recipe has it"
            yield f"{kept}; with {', '.join(options)} it would be {value:g} (--{field} none)"


def adapter_scale(recipe: Recipe) -> float:
    """Return the rank times the scale of the adapter's update: alpha, or alpha sqrt(r) with rsLoRA."""
    return alpha_of(recipe) * (recipe.lora.r**0.5 if recipe.lora.use_rslora else 1)


def alpha_of(recipe: Recipe) -> float:
    """Return alpha, which is twice the rank if the recipe leaves it open."""
    return recipe.lora.alpha or 2.0 * recipe.lora.r


def rate_factor(scale: float, batch: int, ratio: float = 1.0) -> float:
    """Return the factor on the rate for another adapter or batch than the rule was made for.

    The best rates were measured at ranks 4 to 128, scales 1 to 8, 2 to 32 rows, and a ratio of 16
    (docs/learning_rate.md). With one alpha for all ranks the rate is the same, as "LoRA Without Regret" (Schulman and
    Thinking Machines, 2025) found for larger models.

    Args:
        scale: as `adapter_scale` returns it.
        batch: rows per step.
        ratio: LoRA+ ratio.
    """
    rows = min(max(batch, ROWS_RANGE[0]), ROWS_RANGE[1])
    return float((REFERENCE_SCALE / max(scale, MIN_SCALE)) ** 0.5 * (rows / REFERENCE_ROWS) ** 0.2 / ratio**0.5)


def _differences(recipe: Recipe, scale: float) -> str:
    batch = recipe.train.batch_size
    parts = {
        f"alpha {alpha_of(recipe):g}{' and rsLoRA' * recipe.lora.use_rslora}": scale != REFERENCE_SCALE,
        f"batches of {batch}": batch != REFERENCE_ROWS,
        "LoRA+": recipe.train.lora_plus_ratio != 1,
    }
    return ", ".join(name for name, differs in parts.items() if differs)


def rule_evidence(parameters: int) -> str:
    """Return whether the rule was measured at a model of this size."""
    smallest, largest = MEASURED_PARAMETERS
    if parameters >= PUBLISHED_PARAMETERS:
        return "as published for 7B and more"
    if parameters > largest * 1.05:
        return "between 135M and 7B, not measured: try half and twice it"
    return "measured" if parameters >= smallest * 0.95 else "smaller than what was measured: try half and twice it"
