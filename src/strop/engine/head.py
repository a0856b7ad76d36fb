"""Output embedding and cross entropy on supervised rows, a few rows at a time, the gradient made in the forward.

No logits of the whole batch exist: a chunk's logits become their own gradient in place and are folded into the
gradient of the hidden states while they are in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from strop.engine.functions import Ops

CHUNK_BYTES = 24 * 2**20  # logits at once: 256 rows of a vocabulary of 49,152 in bf16


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
        gradient = ctx.needs_input_grad[0]
        grad = torch.empty_like(x) if gradient else None
        total = x.new_zeros((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        chunk = max(16, CHUNK_BYTES // (weight.shape[0] * x.element_size()))
        for begin in range(0, len(x), chunk):
            rows = slice(begin, begin + chunk)
            logits = x[rows] @ weight.t()
            if bias is not None:
                logits += bias
            total += ops.cross_entropy_(logits, labels[rows], weights[rows], softcap, gradient)
            if grad is not None:
                torch.mm(logits, weight, out=grad[rows])
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (grad_x,) = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), None, None, None, None, None, None
