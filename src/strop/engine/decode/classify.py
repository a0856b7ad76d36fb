"""Compute the probabilities of classes with a classifier's score head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from strop.data.batching import in_row_order, pack
from strop.data.types import Example
from strop.engine.step import compute_scores, step_for
from strop.models.lora import find_score_head

if TYPE_CHECKING:
    from torch import Tensor, nn

MICRO_BATCH_TOKENS = 2048

Compute = Callable[[list[int]], list[list[float]]]  # examples of a batch, as indices -> probabilities
RunBatches = Callable[[list[list[int]], Compute, Callable[[list[int]], float]], list[list[list[float]]]]


def to_probabilities(scores: Tensor, several: bool) -> Tensor:
    """Return the probabilities (N, C) of scores (N, C). several: whether a text may have several classes."""
    return scores.sigmoid() if several else scores.softmax(1)


class Classifier:
    """A model with a score head. several: whether a text may have several classes."""

    def __init__(self, module: nn.Module, several: bool) -> None:
        head = find_score_head(module)
        assert head is not None, "a classifier has a score head"
        self._step, self._head, self._several = step_for(module), head, several

    def probabilities(self, examples: Sequence[Example], run: RunBatches | None = None) -> npt.NDArray[np.float64]:
        """Return the probability of each class of each example, (N, C). run: runs batches, on several devices."""
        lengths = [len(example) for example in examples]

        def compute(batch: list[int]) -> list[list[float]]:
            scores = compute_scores(self._step, self._head, [examples[row] for row in batch])
            values: list[list[float]] = to_probabilities(scores, self._several).tolist()
            return values

        batches: Any = pack(lengths, max(MICRO_BATCH_TOKENS, *lengths, 0)) if lengths else []
        with torch.no_grad():
            if run is None:
                parts = [compute(batch) for batch in batches]
            else:
                parts = run(batches, compute, lambda batch: float(sum(lengths[row] for row in batch)))
        return np.array(in_row_order(batches, parts))
