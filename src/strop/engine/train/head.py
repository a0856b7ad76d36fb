"""Output head and cross entropy of supervised rows, in chunks, with the gradient computed in the forward.

The logits of the whole batch never exist at once. A chunk's logits are replaced in place by their gradient, which is
added to the gradients of the hidden states and of the trained parts of the head while it is in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from strop.engine.kernels.protocols import FrozenMatmul, Ops
from strop.engine.train import lora
from strop.engine.train.dropout import DropoutOps, DropoutSpec
from strop.engine.train.lora import Adapters, Product

CHUNK_BYTES = 24 * 2**20  # of a chunk's logits: 256 rows of a vocabulary of 49,152 in bf16
GPU_CHUNK_BYTES = 256 * 2**20  # on a GPU, which needs more rows: each chunk reads the whole head twice
# Size of the pieces in which a trained head's gradient is summed, and in which CrossEntropy reads existing logits.
PIECE_BYTES, GPU_PIECE_BYTES = 4 * 2**20, 64 * 2**20


@dataclass(frozen=True)
class OutputHead:
    """The output head that turns x (N, h) into logits (N, V): x W^T + bias, with softcap as in eager.cross_entropy_.

    weight (V, h), bias (V,): in the dtype of x, or in the trained dtype if `weight_trained` or `bias_trained`.
    new_rows (n, h): trained rows that replace the rows `new_ids` (n,) of W. adapters: A_1, B_1, A_2, ... on all of W,
    with `scales`. dropped: the dropout of x before the adapters.
    """

    weight: Tensor
    softcap: float
    ops: Ops
    bias: Tensor | None = None
    new_rows: Tensor | None = None
    new_ids: Tensor | None = None
    adapters: tuple[Tensor, ...] = ()
    scales: tuple[float, ...] = ()
    dropped: DropoutSpec | None = None
    dropout_ops: DropoutOps | None = None
    weight_trained: bool = False
    bias_trained: bool = False
    matmul: FrozenMatmul = lora.frozen_matmul

    @property
    def trained(self) -> list[Tensor]:
        """The trained tensors, passed to `SupervisedLoss` and `LabelLogProbs` so that they get gradients."""
        dense = [self.weight] * self.weight_trained + ([self.bias] * self.bias_trained if self.bias is not None else [])
        return [*([] if self.new_rows is None else [self.new_rows]), *self.adapters, *dense]

    @property
    def has_linear_gradients(self) -> bool:
        """True if all gradients are linear in the gradient of a row's log-probability, without saved logits."""
        return not (self.adapters or self.weight_trained or self.bias_trained)


class SupervisedLoss(Function):
    """The sum over rows of weights * cross entropy of the logits of x against labels, as an fp32 scalar.

    x (N, h), labels (N,), weights (N,). trained: output.trained.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, weights: Tensor, output: OutputHead, *trained: Tensor) -> Tensor:
        grads = _HeadGradients(x, output) if ctx.needs_input_grad[0] or any(ctx.needs_input_grad[4:]) else None
        total = x.new_zeros((), dtype=_wide(x))
        for losses in _chunk_losses(x, labels, weights, output, grads):
            total += losses.sum()
        ctx.save_for_backward(*([] if grads is None else grads.finish()))
        ctx.weight_trained = output.weight_trained
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_x, *grads = ctx.saved_tensors
        # A large gradient is scaled in place, so this backward cannot run twice.
        scale = torch.Tensor.mul_ if ctx.weight_trained else torch.mul
        scaled = [scale(x, grad.to(x.dtype)) for x in grads]
        return grad_x * grad.to(grad_x.dtype), None, None, None, *scaled


class LabelLogProbs(Function):
    """The log-probability of each label (N,), fp32 (fp64 for fp64). Other arguments: as for SupervisedLoss.

    A row's gradient is linear in the gradient of its log-probability. The forward computes it for a gradient of 1, and
    the backward scales it. So any function of the log-probabilities can be differentiated without computing logits
    twice. The gradients of an adapter on the head, or of the head itself, are sums over rows: there the backward
    computes the logits again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, output: OutputHead, *trained: Tensor) -> Tensor:
        needs_grad = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[3:])
        grads = _HeadGradients(x, output, by_row=True) if needs_grad and output.has_linear_gradients else None
        ones = torch.ones(len(x), device=x.device)
        losses = [*_chunk_losses(x, labels, ones, output, grads)]
        ctx.output = output
        if grads is not None:
            ctx.save_for_backward(grads.x, grads.new_logits, None if grads.new_logits is None else x)
        elif needs_grad:
            ctx.save_for_backward(x, labels)
        return -torch.cat([x.new_empty(0, dtype=_wide(x)), *losses])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        output: OutputHead = ctx.output
        if output.has_linear_gradients:
            grad_x, new_logits, x = ctx.saved_tensors
            upstream = -grad[:, None]
            new_rows = []
            if new_logits is not None:  # the gradient of rows (n, h) of W from that of their logits (N, n)
                new_rows = [((new_logits * upstream.to(new_logits.dtype)).t() @ x).to(_wide(x))]
            return grad_x * upstream.to(grad_x.dtype), None, None, *new_rows
        x, labels = ctx.saved_tensors
        grads = _HeadGradients(x, output)
        for _ in _chunk_losses(x, labels, -grad.contiguous(), output, grads):
            pass
        grad_x, *trained_grads = grads.finish()
        return grad_x, None, None, *trained_grads


class CrossEntropy(Function):
    """Cross entropy (N,) of logits (N, V) that a model computed, against labels (N,): fp32 (fp64 for fp64).

    Processes some rows at a time, so that only the gradient has the size of the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        losses = logits.new_empty(len(logits), dtype=_wide(logits))
        for rows in _pieces(logits, len(logits)):
            losses[rows] = F.cross_entropy(logits[rows].to(losses.dtype), labels[rows], reduction="none")
        ctx.save_for_backward(logits, labels)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, labels = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for rows in _pieces(logits, len(logits)):
            slope = torch.softmax(logits[rows], -1, dtype=grad.dtype)
            slope.scatter_add_(1, labels[rows, None], slope.new_full((len(slope), 1), -1.0))
            grad_logits[rows] = slope.mul_(grad[rows, None])
        return grad_logits, None


class _HeadGradients:
    """The gradients of x and of the trained parts of the head, accumulated chunk by chunk.

    by_row: keep the gradient of the new rows' logits (N, n) instead of summing it. `finish` is not called then.
    """

    def __init__(self, x: Tensor, output: OutputHead, *, by_row: bool = False) -> None:
        wide, self.output = _wide(x), output
        new = output.new_rows
        self.x = torch.empty_like(x)
        self.new_logits = x.new_empty(len(x), len(new)) if new is not None and by_row else None
        self.new_rows = None if new is None or by_row else new.new_zeros(new.shape, dtype=wide)
        self.weight = x.new_zeros(output.weight.shape, dtype=wide) if output.weight_trained else None
        self.bias = x.new_zeros(len(output.weight), dtype=wide) if output.bias_trained else None
        self.adapters = _HeadAdapters(x, output) if output.adapters else None

    def add(self, rows: slice, x: Tensor, logits: Tensor, weight: Tensor, new_rows: Tensor | None) -> None:
        """Add a chunk: its rows, their x, and the gradient of their logits. weight, new_rows: in the dtype of x."""
        if self.bias is not None:
            self.bias += logits.sum(0, dtype=self.bias.dtype)
        if self.adapters is not None:
            self.adapters.add(rows, logits)
        if self.weight is not None:
            _add_product(self.weight, logits, x)
        if new_rows is None:
            self.output.matmul(logits, weight, False, self.x[rows])
            return
        ids = self.output.new_ids
        new_logits = logits[:, ids]
        logits[:, ids] = 0
        self.output.matmul(logits, weight, False, self.x[rows])
        self.x[rows].addmm_(new_logits, new_rows)
        if self.new_logits is not None:
            self.new_logits[rows] = new_logits
        if self.new_rows is not None:
            self.new_rows += new_logits.t() @ x

    def finish(self) -> list[Tensor]:
        """Return the gradients of x and of each of output.trained, in their order."""
        of_adapters = [] if self.adapters is None else self.adapters.finish(self.x)
        grads = [self.new_rows, *of_adapters, self.weight, self.bias]
        return [self.x, *(grad for grad in grads if grad is not None)]


class _HeadAdapters:
    """The adapters on the head: their inputs and down projections, for all rows at once, and their gradients."""

    def __init__(self, x: Tensor, output: OutputHead) -> None:
        columns, dropped, ops = ((0, len(output.weight)),) * len(output.scales), output.dropped, output.dropout_ops
        self.output = output
        self.adapters = Adapters(output.adapters, columns, output.scales, dropped is not None)
        self.x = x if dropped is None or ops is None else ops.apply_masks(x, dropped)
        self.a = torch.cat([(a * scale).to(x.dtype) for a, _, scale in self.adapters])
        self.b = torch.cat([b.to(x.dtype) for _, b, _ in self.adapters], 1)
        self.za = lora.project_down(self.x, self.a, self.adapters)
        self.grad_za = torch.empty_like(self.za)
        self.grad_b = x.new_zeros(self.b.t().shape, dtype=_wide(x))  # (sum of r, V): avoids a transposed copy of logits

    def add(self, rows: slice, logits: Tensor) -> None:
        torch.mm(logits, self.b, out=self.grad_za[rows])
        self.grad_b += self.za[rows].t() @ logits

    def finish(self, grad_x: Tensor) -> list[Tensor]:
        """Return the gradients of A_1, B_1, A_2, ... and add the gradient through the adapters to grad_x."""
        output, adapters, ranks = self.output, self.adapters, list(self.adapters.ranks)
        pairs = zip(torch.split(self.grad_za, ranks, 1), torch.split(self.a, ranks), strict=True)
        if output.dropped is None or output.dropout_ops is None:
            grad_x.addmm_(self.grad_za, self.a)
            inputs = [self.x] * len(ranks)
        else:
            by_adapter = torch.cat([part @ a for part, a in pairs], 1)
            grad_x += output.dropout_ops.apply_masks_backward(by_adapter, output.dropped)
            inputs = list(torch.split(self.x, adapters.width, 1))
        grads: list[Tensor] = []
        for part, x, scale, grad_b in zip(
            torch.split(self.grad_za, ranks, 1), inputs, adapters.scales, torch.split(self.grad_b, ranks), strict=True
        ):
            grads += [(part.to(grad_b.dtype).t() @ x.to(grad_b.dtype)) * scale, grad_b.t().contiguous()]
        return grads


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _pieces(like: Tensor, number: int) -> Iterator[slice]:
    """Yield slices over `number` rows of the width of `like` (n, k), each of at most PIECE_BYTES."""
    limit = GPU_PIECE_BYTES if like.device.type == "cuda" else PIECE_BYTES
    step = max(1, limit // (like.shape[1] * like.element_size()))
    return (slice(begin, begin + step) for begin in range(0, number, step))


def _add_product(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """Add grad^T x to total (V, k); grad (n, V), x (n, k). In pieces if the product's dtype is not that of total."""
    if total.dtype == x.dtype:
        total.addmm_(grad.t(), x)
        return
    for rows in _pieces(x, len(total)):
        total[rows] += grad[:, rows].t() @ x


def _chunk_losses(
    x: Tensor, labels: Tensor, weights: Tensor, output: OutputHead, grads: _HeadGradients | None
) -> Iterator[Tensor]:
    """Yield weights * cross entropy of each chunk of rows, and add the gradients to `grads`."""
    limit = GPU_CHUNK_BYTES if x.device.type == "cuda" else CHUNK_BYTES
    chunk = max(16, limit // (output.weight.shape[0] * x.element_size()))
    weight = output.weight.detach().to(x.dtype)
    new_rows = None if output.new_rows is None else output.new_rows.detach().to(x.dtype)
    adapters = grads.adapters if grads is not None else _HeadAdapters(x, output) if output.adapters else None
    for begin in range(0, len(x), chunk):
        rows = slice(begin, begin + chunk)
        added = None if adapters is None else Product(adapters.za[rows], adapters.b.t())
        logits = x.new_empty(len(x[rows]), len(weight))
        output.matmul(x[rows], weight, True, logits, added)
        if new_rows is not None:
            logits[:, output.new_ids] = x[rows] @ new_rows.t()
        if output.bias is not None:
            logits += output.bias.detach()
        yield output.ops.cross_entropy_(logits, labels[rows], weights[rows], output.softcap, grads is not None)
        if grads is not None:
            grads.add(rows, x[rows], logits, weight, new_rows)
        del logits  # before the next chunk is allocated
