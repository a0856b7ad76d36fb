"""Output embedding and cross entropy on supervised rows, a few rows at a time, the gradient made in the forward.

No logits of the whole batch exist: a chunk's logits become their own gradient in place and are folded into the
gradient of the hidden states while they are in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from strop.engine.functions import Ops

CHUNK_BYTES = 24 * 2**20  # logits at once: 256 rows of a vocabulary of 49,152 in bf16
CARD_CHUNK_BYTES = 256 * 2**20  # on a card, whose products want more rows: each chunk reads the whole head twice


class SupervisedLoss(Function):
    """Sum over rows of weights * cross entropy of (x W^T + bias) against labels, an fp32 scalar.

    x (N, h), labels (N,), weights (N,), weight (V, h) and bias (V,) frozen. softcap: see
    eager.cross_entropy_.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, labels: Tensor, weights: Tensor, weight: Tensor, softcap: float, ops: Ops,
        bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        total = x.new_zeros((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        for losses in _losses(x, labels, weights, weight, softcap, ops, bias, grad):
            total += losses.sum()
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (grad_x,) = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), None, None, None, None, None, None


class LabelLogProbs(Function):
    """The log-probability of each label (N,), fp32 (of fp64 fp64); other arguments as for SupervisedLoss.

    A row's gradient is linear in what comes back for its label: made in the forward for 1, it is multiplied then. So
    that any function of the log-probabilities can be differentiated, and no logits are made twice.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, labels: Tensor, weight: Tensor, softcap: float, ops: Ops, bias: Tensor | None = None
    ) -> Tensor:
        grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        ones = torch.ones(len(x), device=x.device)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        losses = [*_losses(x, labels, ones, weight, softcap, ops, bias, grad)]
        ctx.save_for_backward(grad)
        return -torch.cat([x.new_empty(0, dtype=wide), *losses])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (grad_x,) = ctx.saved_tensors
        return grad_x * -grad.to(grad_x.dtype)[:, None], None, None, None, None, None


def _losses(
    x: Tensor, labels: Tensor, weights: Tensor, weight: Tensor, softcap: float, ops: Ops, bias: Tensor | None,
    grad: Tensor | None,
) -> Iterator[Tensor]:  # fmt: skip
    """weights * cross entropy of a few rows after the other; writes the gradient of x where there is room for it."""
    room = CARD_CHUNK_BYTES if x.device.type == "cuda" else CHUNK_BYTES
    chunk = max(16, room // (weight.shape[0] * x.element_size()))
    for begin in range(0, len(x), chunk):
        rows = slice(begin, begin + chunk)
        logits = x[rows] @ weight.t()
        if bias is not None:
            logits += bias
        yield ops.cross_entropy_(logits, labels[rows], weights[rows], softcap, grad is not None)
        if grad is not None:
            torch.mm(logits, weight, out=grad[rows])
        del logits  # before the next are made
