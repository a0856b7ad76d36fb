"""Softmax and cross entropy of rows of logits, as loops that numba compiles: for CPUs, in fp32 and bf16."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from strop.engine.kernels.cpu.compiled import GAP, TASKS, array, exp, greater, inline, loop, narrow, tanh, wide


@inline
def top(row: Any) -> Any:
    highest = np.float32(-3e38)
    for j in range(len(row)):
        highest = greater(highest, wide(row[j]))
    return highest


@inline
def exps(row: Any, highest: Any, out: Any) -> Any:
    """exp(row - highest) into `out`; returns their sum."""
    total = np.float32(0.0)
    for j in range(len(row)):
        e = exp(wide(row[j]) - highest)
        out[j] = e
        total += e
    return total


@inline
def scale_into(row: Any, values: Any, scale: Any) -> None:
    for j in range(len(row)):
        row[j] = narrow(values[j] * scale, row)


@inline
def _bent_exps(row: Any, highest: Any, softcap: Any, out: Any) -> Any:
    """exp(bent row - highest) into `out`; returns their sum."""
    total = np.float32(0.0)
    for j in range(len(row)):
        e = exp(softcap * tanh(wide(row[j]) / softcap) - highest)
        out[j] = e
        total += e
    return total


@inline
def _scale_bent(row: Any, values: Any, scale: Any, softcap: Any) -> None:
    """The gradient of the bent row, times how steep it is there."""
    for j in range(len(row)):
        t = tanh(wide(row[j]) / softcap)
        row[j] = narrow(values[j] * scale * (np.float32(1.0) - t * t), row)


@loop
def _cross_entropy(logits: Any, labels: Any, weights: Any, softcap: Any, gradient: Any, losses: Any) -> None:
    rows, n = logits.shape
    for task in prange(TASKS):
        held = np.empty(GAP + n, dtype=np.float32)[GAP:]
        for i in range(task * rows // TASKS, (task + 1) * rows // TASKS):
            row, label = logits[i], labels[i]
            highest, at, steep = top(row), wide(row[label]), np.float32(1.0)
            if softcap > 0:
                t = tanh(at / softcap)
                highest, at, steep = softcap * tanh(highest / softcap), softcap * t, np.float32(1.0) - t * t
                total = _bent_exps(row, highest, softcap, held)
            else:
                total = exps(row, highest, held)
            losses[i] = weights[i] * (np.log(total) + highest - at)
            if gradient:
                scale = weights[i] / total
                if softcap > 0:
                    _scale_bent(row, held, scale, softcap)
                else:
                    scale_into(row, held, scale)
                row[label] = narrow((held[label] * scale - weights[i]) * steep, logits)


def cross_entropy_(logits: Tensor, labels: Tensor, weights: Tensor, softcap: float, gradient: bool) -> Tensor:
    losses = torch.empty(len(logits))
    _cross_entropy(array(logits), array(labels), array(weights), np.float32(softcap), gradient, array(losses))
    return losses
