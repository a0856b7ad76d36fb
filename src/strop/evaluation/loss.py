"""Loss over supervised tokens: summed over all rows and divided once, never a mean of means."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from strop.data.conversation import Example

TokenLoss = Callable[[Sequence[Example]], Tensor]
"""Examples of a micro-batch -> sum over supervised tokens of weight * cross entropy, fp32 scalar."""


def mean_loss(
    token_loss: TokenLoss,
    examples: Sequence[Example],
    cut: Callable[[Sequence[Example]], list[list[int]]],
    rows: int = 64,
) -> float:
    """Mean cross entropy over all supervised tokens (by weight). `cut` makes micro-batches out of `rows` examples."""
    total, weight = summed_loss(token_loss, examples, cut, rows)
    assert weight > 0
    return total / weight


def summed_loss(
    token_loss: TokenLoss,
    examples: Sequence[Example],
    cut: Callable[[Sequence[Example]], list[list[int]]],
    rows: int = 64,
) -> tuple[float, float]:
    """The sum of weight * cross entropy over all supervised tokens, and the sum of their weights; see mean_loss."""
    total = weight = 0.0
    with torch.no_grad():
        for start in range(0, len(examples), rows):
            block = [examples[row] for row in range(start, min(start + rows, len(examples)))]
            for group in cut(block):
                total += float(token_loss([block[row] for row in group]))
            weight += sum(float(example.weights.sum()) for example in block)
    return total, weight
