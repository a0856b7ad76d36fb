"""Output embedding and cross entropy on supervised rows, a few rows at a time, the gradient made in the forward.

No logits of the whole batch exist: a chunk's logits become their own gradient in place and are folded into the
gradients of the hidden states, and of what is trained of the head, while they are in the cache.
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
from strop.engine.train.dropout import Dropped, Drops
from strop.engine.train.lora import Adapters, Product

CHUNK_BYTES = 24 * 2**20  # logits at once: 256 rows of a vocabulary of 49,152 in bf16
CARD_CHUNK_BYTES = 256 * 2**20  # on a card, whose products want more rows: each chunk reads the whole head twice
# Of a trained head's gradient (of the type of x, then summed), and of logits that are there already.
PIECE_BYTES, CARD_PIECE_BYTES = 4 * 2**20, 64 * 2**20


@dataclass(frozen=True)
class Output:
    """x (N, h) to logits (N, V): x W^T + bias. softcap: see eager.cross_entropy_.

    weight (V, h), bias (V,): where they are trained (`whole`, `biased`), in the type that is trained; else in that of
    x. own (n, h): rows of W that are trained, in the place of those at `at` (n,). adapters: on all of W, A_1, B_1, A_2,
    ..., with scales; dropped: of x, in front of them.
    """

    weight: Tensor
    softcap: float
    ops: Ops
    bias: Tensor | None = None
    own: Tensor | None = None
    at: Tensor | None = None
    adapters: tuple[Tensor, ...] = ()
    scales: tuple[float, ...] = ()
    dropped: Dropped | None = None
    drops: Drops | None = None
    whole: bool = False
    biased: bool = False
    product: FrozenMatmul = lora.product

    @property
    def trained(self) -> list[Tensor]:
        """What `SupervisedLoss` and `LabelLogProbs` take as well, for its gradient."""
        rest = [self.weight] * self.whole + ([self.bias] * self.biased if self.bias is not None else [])
        return [*([] if self.own is None else [self.own]), *self.adapters, *rest]

    @property
    def linear(self) -> bool:
        """Whether all gradients are linear in what comes back for a row's log-probability, with no logits kept."""
        return not (self.adapters or self.whole or self.biased)


class SupervisedLoss(Function):
    """Sum over rows of weights * cross entropy of the logits of x against labels, an fp32 scalar.

    x (N, h), labels (N,), weights (N,), trained: output.trained.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, weights: Tensor, output: Output, *trained: Tensor) -> Tensor:
        sums = _Sums(x, output) if ctx.needs_input_grad[0] or any(ctx.needs_input_grad[4:]) else None
        total = x.new_zeros((), dtype=_wide(x))
        for losses in _losses(x, labels, weights, output, sums):
            total += losses.sum()
        ctx.save_for_backward(*([] if sums is None else sums.gradients()))
        ctx.whole = output.whole
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        of_x, *others = ctx.saved_tensors
        # In place where it is large, which makes this backward one that cannot be had twice.
        times = torch.Tensor.mul_ if ctx.whole else torch.mul
        return of_x * grad.to(of_x.dtype), None, None, None, *(times(one, grad.to(one.dtype)) for one in others)


class LabelLogProbs(Function):
    """The log-probability of each label (N,), fp32 (of fp64 fp64); other arguments as for SupervisedLoss.

    A row's gradient is linear in what comes back for its label: made in the forward for 1, it is multiplied then. So
    that any function of the log-probabilities can be differentiated, and no logits are made twice. The gradients of an
    adapter or of the head itself are sums over rows: there the backward makes the logits again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, output: Output, *trained: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[3:])
        sums = _Sums(x, output, apart=True) if wanted and output.linear else None
        ones = torch.ones(len(x), device=x.device)
        losses = [*_losses(x, labels, ones, output, sums)]
        ctx.output = output
        if sums is not None:
            ctx.save_for_backward(sums.of_x, sums.slopes, None if sums.slopes is None else x)
        elif wanted:
            ctx.save_for_backward(x, labels)
        return -torch.cat([x.new_empty(0, dtype=_wide(x)), *losses])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        output: Output = ctx.output
        if output.linear:
            of_x, slopes, x = ctx.saved_tensors
            upstream = -grad[:, None]
            own = [] if slopes is None else [_of_rows(slopes * upstream.to(slopes.dtype), x)]
            return of_x * upstream.to(of_x.dtype), None, None, *own
        x, labels = ctx.saved_tensors
        sums = _Sums(x, output)
        for _ in _losses(x, labels, -grad.contiguous(), output, sums):
            pass
        of_x, *others = sums.gradients()
        return of_x, None, None, *others


class CrossEntropy(Function):
    """Cross entropy of each row of logits (N, V), which a model has made itself, against labels (N,): (N,), fp32 (of
    fp64 fp64). Some rows at a time, so that no copy of all logits is made but their gradient."""

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
        of_logits = torch.empty_like(logits)
        for rows in _pieces(logits, len(logits)):
            slope = torch.softmax(logits[rows], -1, dtype=grad.dtype)
            slope.scatter_add_(1, labels[rows, None], slope.new_full((len(slope), 1), -1.0))
            of_logits[rows] = slope.mul_(grad[rows, None])
        return of_logits, None


class _Sums:
    """The gradients of x and of what is trained of the head, chunk by chunk. apart: that of the logits of `own` (N, n)
    is kept row by row, which `gradients` does not ask for then."""

    def __init__(self, x: Tensor, output: Output, *, apart: bool = False) -> None:
        wide, self.output = _wide(x), output
        self.of_x = torch.empty_like(x)
        self.slopes = x.new_empty(len(x), len(output.own)) if output.own is not None and apart else None
        self.of_own = None if output.own is None or apart else output.own.new_zeros(output.own.shape, dtype=wide)
        self.of_weight = x.new_zeros(output.weight.shape, dtype=wide) if output.whole else None
        self.of_bias = x.new_zeros(len(output.weight), dtype=wide) if output.biased else None
        self.entering = _Entering(x, output) if output.adapters else None

    def add(self, rows: slice, x: Tensor, logits: Tensor, weight: Tensor, low: Tensor | None) -> None:
        """A chunk: its rows, x of them, the gradient of their logits; weight, low: W and `own` in the type of x."""
        if self.of_bias is not None:
            self.of_bias += logits.sum(0, dtype=self.of_bias.dtype)
        if self.entering is not None:
            self.entering.add(rows, logits)
        if self.of_weight is not None:
            _add_product(self.of_weight, logits, x)
        if low is None:
            self.output.product(logits, weight, False, self.of_x[rows])
            return
        at = self.output.at
        mine = logits[:, at]
        logits[:, at] = 0
        self.output.product(logits, weight, False, self.of_x[rows])
        self.of_x[rows].addmm_(mine, low)
        if self.slopes is not None:
            self.slopes[rows] = mine
        if self.of_own is not None:
            self.of_own += mine.t() @ x

    def gradients(self) -> list[Tensor]:
        """Of x, and of each of output.trained, in their order."""
        of_adapters = [] if self.entering is None else self.entering.gradients(self.of_x)
        found = [self.of_own, *of_adapters, self.of_weight, self.of_bias]
        return [self.of_x, *(one for one in found if one is not None)]


class _Entering:
    """The adapters on the head: what enters them, of all rows at once, and their gradients."""

    def __init__(self, x: Tensor, output: Output) -> None:
        scales, columns = output.scales, ((0, len(output.weight)),) * len(output.scales)
        self.output = output
        self.adapters = Adapters(output.adapters, columns, scales, output.dropped is not None)
        self.x = x if output.dropped is None or output.drops is None else output.drops.spread(x, output.dropped)
        self.a = torch.cat([(a * scale).to(x.dtype) for a, _, scale in self.adapters])
        self.b = torch.cat([b.to(x.dtype) for _, b, _ in self.adapters], 1)
        self.za = lora.entering(self.x, self.a, self.adapters)
        self.of_za = torch.empty_like(self.za)
        self.of_b = x.new_zeros(self.b.t().shape, dtype=_wide(x))  # (sum of r, V): no copy of the logits is turned

    def add(self, rows: slice, logits: Tensor) -> None:
        torch.mm(logits, self.b, out=self.of_za[rows])
        self.of_b += self.za[rows].t() @ logits

    def gradients(self, of_x: Tensor) -> list[Tensor]:
        """Of A_1, B_1, A_2, ...; to the gradient of x is added what goes through them."""
        output, adapters, ranks = self.output, self.adapters, list(self.adapters.ranks)
        apart = zip(torch.split(self.of_za, ranks, 1), torch.split(self.a, ranks), strict=True)
        if output.dropped is None or output.drops is None:
            of_x.addmm_(self.of_za, self.a)
            inputs = [self.x] * len(ranks)
        else:
            of_x += output.drops.fold(torch.cat([part @ a for part, a in apart], 1), output.dropped)
            inputs = list(torch.split(self.x, adapters.width, 1))
        found: list[Tensor] = []
        for part, x, scale, of_b in zip(
            torch.split(self.of_za, ranks, 1), inputs, adapters.scales, torch.split(self.of_b, ranks), strict=True
        ):
            found += [(part.to(of_b.dtype).t() @ x.to(of_b.dtype)) * scale, of_b.t().contiguous()]
        return found


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _pieces(like: Tensor, number: int) -> Iterator[slice]:
    """So many rows as long as those of `like` (n, k), some at a time."""
    room = CARD_PIECE_BYTES if like.device.type == "cuda" else PIECE_BYTES
    step = max(1, room // (like.shape[1] * like.element_size()))
    return (slice(begin, begin + step) for begin in range(0, number, step))


def _add_product(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """total (V, k), wide, and grad^T x, of grad (n, V) and x (n, k); in pieces where the product is rounded first."""
    if total.dtype == x.dtype:
        total.addmm_(grad.t(), x)
        return
    for rows in _pieces(x, len(total)):
        total[rows] += grad[:, rows].t() @ x


def _of_rows(slopes: Tensor, x: Tensor) -> Tensor:
    """The gradient of rows (n, h) of W from that of their logits."""
    return (slopes.t() @ x).to(_wide(x))


def _losses(x: Tensor, labels: Tensor, weights: Tensor, output: Output, sums: _Sums | None) -> Iterator[Tensor]:
    """weights * cross entropy of a few rows after the other; `sums` takes the gradients."""
    room = CARD_CHUNK_BYTES if x.device.type == "cuda" else CHUNK_BYTES
    chunk = max(16, room // (output.weight.shape[0] * x.element_size()))
    weight = output.weight.detach().to(x.dtype)
    low = None if output.own is None else output.own.detach().to(x.dtype)
    entering = _Entering(x, output) if output.adapters and sums is None else None if sums is None else sums.entering
    for begin in range(0, len(x), chunk):
        rows = slice(begin, begin + chunk)
        added = None if entering is None else Product(entering.za[rows], entering.b.t())
        logits = x.new_empty(len(x[rows]), len(weight))
        output.product(x[rows], weight, True, logits, added)
        if low is not None:
            logits[:, output.at] = x[rows] @ low.t()
        if output.bias is not None:
            logits += output.bias.detach()
        yield output.ops.cross_entropy_(logits, labels[rows], weights[rows], output.softcap, sums is not None)
        if sums is not None:
            sums.add(rows, x[rows], logits, weight, low)
        del logits  # before the next are made
