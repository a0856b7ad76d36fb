"""Classification: the cross entropy of classes, and class weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from strop.errors import RecipeError, suggest
from strop.objectives import Objective

if TYPE_CHECKING:
    from torch import Tensor

CLASSIFY = Objective(
    name="classify", data_kind="classes", source="transformers' sequence classifiers", learning_rate_factor=0.5,
    reference=False, scored=True, options={"labels": None, "class_weights": "none"},
)  # fmt: skip


def class_losses(scores: Tensor, targets: Tensor, weights: Tensor, several: bool) -> tuple[Tensor, Tensor]:
    """Return the weighted loss of each text, and its weight, both of shape (N,).

    The loss of a batch is the sum of the first divided by the sum of the second.

    Args:
        scores: (N, C), the outputs of the score head.
        targets: (N, C), 1 for the classes of a text and 0 for the others.
        weights: (C,), the weights of the classes.
        several: whether a text may have several classes. The loss is then the binary cross entropy of each class,
            averaged over classes; otherwise it is the cross entropy, as torch's `cross_entropy(weight=weights)`.
    """
    from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax

    if several:
        losses = binary_cross_entropy_with_logits(scores, targets, weight=weights, reduction="none")
        return losses.sum(1), weights.sum().expand(len(scores))
    return -(targets * weights * log_softmax(scores, 1)).sum(1), (targets * weights).sum(1)


def class_weights(setting: str | Mapping[str, float] | None, counts: Mapping[str, int]) -> list[float]:
    """Return the weight of each class. counts: the number of training rows of each class.

    Balanced weights are rows / (classes * rows of the class), as in scikit-learn; 1 for a class without rows. Raises
    RecipeError for a label that is not a class, and if no class of the rows has a weight above 0.
    """
    if setting == "balanced":
        total = sum(counts.values())
        return [total / (len(counts) * count) if count else 1.0 for count in counts.values()]
    given = setting if isinstance(setting, Mapping) else {}
    if unknown := next((name for name in given if name not in counts), None):
        what = f"--train.class_weights {unknown}: no such label{suggest(unknown, counts)}"
        raise RecipeError(what, fix=f"use {', '.join(counts)}")
    weights = [float(given.get(name, 1.0)) for name in counts]
    if not any(weight for weight, count in zip(weights, counts.values(), strict=True) if count):
        raise RecipeError("--train.class_weights: all are 0, so nothing is learned", fix="give one above 0")
    return weights
