"""Loss over supervised tokens: summed over all rows and divided once, never a mean of means."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from strop.data.types import Example
from strop.distributed.devices import ALONE, Devices

TokenLoss = Callable[[Sequence[Example]], Tensor]
"""Examples of a micro-batch -> sum over supervised tokens of weight * cross entropy, fp32 scalar."""


def mean_loss(
    token_loss: TokenLoss,
    examples: Sequence[Example],
    cut: Callable[[Sequence[Example]], list[list[int]]],
    rows: int = 64,
    devices: Devices = ALONE,
) -> float:
    """Mean cross entropy over all supervised tokens (by weight). `cut` makes micro-batches out of `rows` examples,
    which are dealt out to the devices."""
    total, weight = summed_loss(token_loss, examples, cut, rows, devices)
    assert weight > 0
    return total / weight


def summed_loss(
    token_loss: TokenLoss,
    examples: Sequence[Example],
    cut: Callable[[Sequence[Example]], list[list[int]]],
    rows: int = 64,
    devices: Devices = ALONE,
) -> tuple[float, float]:
    """The sum of weight * cross entropy over all supervised tokens, and the sum of their weights; see mean_loss."""
    groups: list[list[int]] = []
    total = weight = 0.0
    for start in range(0, len(examples), rows):
        block = [examples[row] for row in range(start, min(start + rows, len(examples)))]
        groups += [[start + row for row in group] for group in cut(block)]
        weight += sum(float(example.weights.sum()) for example in block)

    def loss(group: list[int]) -> float:
        return float(token_loss([examples[row] for row in group]))

    with torch.no_grad():
        for part in devices.map(groups, loss, lambda group: sum(len(examples[row]) for row in group)):
            total += part
    return total, weight
