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

    x (N, h), labels (N,), weights (N,), weight (V, h) and bias (V,) frozen. softcap: see eager.cross_entropy_.
    own (n, h): rows of W that are trained, in the place of those at `at` (n,).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, labels: Tensor, weights: Tensor, weight: Tensor, softcap: float, ops: Ops,
        bias: Tensor | None = None, own: Tensor | None = None, at: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        grad, slopes = _room(ctx.needs_input_grad[0], ctx.needs_input_grad[-2], x, own)
        total = x.new_zeros((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        for losses in _losses(x, labels, weights, weight, softcap, ops, bias, grad, own, at, slopes):
            total += losses.sum()
        ctx.save_for_backward(grad, None if slopes is None else _of_rows(slopes, x))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_x, grad_own = ctx.saved_tensors
        grad_own = None if grad_own is None else grad_own * grad
        return grad_x * grad.to(grad_x.dtype), None, None, None, None, None, None, grad_own, None


class LabelLogProbs(Function):
    """The log-probability of each label (N,), fp32 (of fp64 fp64); other arguments as for SupervisedLoss.

    A row's gradient is linear in what comes back for its label: made in the forward for 1, it is multiplied then. So
    that any function of the log-probabilities can be differentiated, and no logits are made twice.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, labels: Tensor, weight: Tensor, softcap: float, ops: Ops, bias: Tensor | None = None,
        own: Tensor | None = None, at: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        grad, slopes = _room(ctx.needs_input_grad[0], ctx.needs_input_grad[-2], x, own)
        ones = torch.ones(len(x), device=x.device)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        losses = [*_losses(x, labels, ones, weight, softcap, ops, bias, grad, own, at, slopes)]
        ctx.save_for_backward(grad, slopes, None if slopes is None else x)
        return -torch.cat([x.new_empty(0, dtype=wide), *losses])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_x, slopes, x = ctx.saved_tensors
        upstream = -grad[:, None]
        grad_own = None if slopes is None else _of_rows(slopes * upstream.to(slopes.dtype), x)
        return grad_x * upstream.to(grad_x.dtype), None, None, None, None, None, grad_own, None


def _room(of_x: bool, of_own: bool, x: Tensor, own: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """For the gradients of x and, where they are wanted, of the logits (N, n) of the rows that are trained."""
    slopes = x.new_empty(len(x), len(own)) if own is not None and of_own else None
    return torch.empty_like(x) if of_x or of_own else None, slopes


def _of_rows(slopes: Tensor, x: Tensor) -> Tensor:
    """The gradient of rows (n, h) of W from that of their logits."""
    return (slopes.t() @ x).to(torch.promote_types(x.dtype, torch.float32))


def _losses(
    x: Tensor, labels: Tensor, weights: Tensor, weight: Tensor, softcap: float, ops: Ops, bias: Tensor | None,
    grad: Tensor | None, own: Tensor | None, at: Tensor | None, slopes: Tensor | None,
) -> Iterator[Tensor]:  # fmt: skip
    """weights * cross entropy of a few rows after the other; writes the gradients of x, and of the logits of the rows
    that are trained, where there is room for them."""
    room = CARD_CHUNK_BYTES if x.device.type == "cuda" else CHUNK_BYTES
    chunk = max(16, room // (weight.shape[0] * x.element_size()))
    low = None if own is None else own.detach().to(x.dtype)
    for begin in range(0, len(x), chunk):
        rows = slice(begin, begin + chunk)
        logits = x[rows] @ weight.t()
        if low is not None:
            logits[:, at] = x[rows] @ low.t()
        if bias is not None:
            logits += bias
        yield ops.cross_entropy_(logits, labels[rows], weights[rows], softcap, grad is not None)
        if grad is not None:
            if low is None:
                torch.mm(logits, weight, out=grad[rows])
            else:
                mine = logits[:, at]
                logits[:, at] = 0
                torch.mm(logits, weight, out=grad[rows])
                grad[rows].addmm_(mine, low)
                if slopes is not None:
                    slopes[rows] = mine
        del logits  # before the next are made
