"""Compute the logits and the cross entropy of supervised rows in chunks, together with the gradients.

The logits of the whole batch never exist at once. The forward replaces the logits of a chunk by their gradient, and
computes the gradients of the hidden states and of the trained parts of the head from it.
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
from strop.engine.train.packing import SoftTargets

CHUNK_BYTES = 24 * 2**20  # size of the logits of a chunk: 256 rows of a vocabulary of 49,152 in bf16
GPU_CHUNK_BYTES = 256 * 2**20  # larger on a GPU, because each chunk reads the whole head twice
PIECE_BYTES, GPU_PIECE_BYTES = 4 * 2**20, 64 * 2**20  # maximum size of temporary fp32 copies


@dataclass(frozen=True)
class OutputHead:
    """The output head, which computes the logits x W^T + bias (N, V) of x (N, h).

    Attributes:
        weight, bias: W (V, h) and the bias (V,), in the dtype of x, or in another dtype if they are trained.
        softcap: as in eager.cross_entropy_.
        new_rows: trained rows (n, h) that replace the rows `new_ids` (n,) of W.
        adapters: the LoRA factors A_1, B_1, A_2, ..., with `scales`.
        dropped: the dropout of x before the adapters.
        soft: the labels that are distributions.
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
    soft: SoftTargets | None = None

    @property
    def trained(self) -> list[Tensor]:
        """The trained tensors, in the order in which SupervisedLoss and LabelLogProbs take them."""
        dense = [self.weight] * self.weight_trained + ([self.bias] * self.bias_trained if self.bias is not None else [])
        return [*([] if self.new_rows is None else [self.new_rows]), *self.adapters, *dense]

    @property
    def has_linear_gradients(self) -> bool:
        """True if the backward can scale gradients from the forward instead of computing the logits again."""
        return not (self.adapters or self.weight_trained or self.bias_trained)


class SupervisedLoss(Function):
    """Compute the sum over rows of weights * cross entropy, an fp32 scalar (fp64 for fp64).

    x (N, h), labels (N,), weights (N,). trained: output.trained. If the weight is trained, the backward can
    run only once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, weights: Tensor, output: OutputHead, *trained: Tensor) -> Tensor:
        grads = _HeadGradients(x, output) if ctx.needs_input_grad[0] or any(ctx.needs_input_grad[4:]) else None
        total = x.new_zeros((), dtype=_wide_dtype(x))
        for losses in _compute_chunk_losses(x, labels, weights, output, grads):
            total += losses.sum()
        ctx.save_for_backward(*([] if grads is None else grads.finish()))
        ctx.weight_trained = output.weight_trained
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_x, *grads = ctx.saved_tensors
        scale = torch.Tensor.mul_ if ctx.weight_trained else torch.mul  # the gradient of the weight is large
        scaled = [scale(x, grad.to(x.dtype)) for x in grads]
        return grad_x * grad.to(grad_x.dtype), None, None, None, *scaled


class LabelLogProbs(Function):
    """Compute the log-probability of each label (N,), fp32 (fp64 for fp64). Arguments: as for SupervisedLoss.

    The forward computes the gradient of each row's log-probability, and the backward scales it. This avoids computing
    the logits twice. The gradients of an adapter on the head, or of the head itself, are sums over rows that cannot be
    scaled by row, so in these cases the backward computes the logits again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, output: OutputHead, *trained: Tensor) -> Tensor:
        needs_grad = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[3:])
        grads = _HeadGradients(x, output, by_row=True) if needs_grad and output.has_linear_gradients else None
        ones = torch.ones(len(x), device=x.device)
        losses = [*_compute_chunk_losses(x, labels, ones, output, grads)]
        ctx.output = output
        if grads is not None:
            ctx.save_for_backward(grads.x, grads.new_logits, None if grads.new_logits is None else x)
        elif needs_grad:
            ctx.save_for_backward(x, labels)
        return -torch.cat([x.new_empty(0, dtype=_wide_dtype(x)), *losses])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        output: OutputHead = ctx.output
        if output.has_linear_gradients:
            grad_x, new_logits, x = ctx.saved_tensors
            upstream = -grad[:, None]
            grads_new_rows = []
            if new_logits is not None:
                grads_new_rows = [((new_logits * upstream.to(new_logits.dtype)).t() @ x).to(_wide_dtype(x))]
            return grad_x * upstream.to(grad_x.dtype), None, None, *grads_new_rows
        x, labels = ctx.saved_tensors
        grads = _HeadGradients(x, output)
        for _ in _compute_chunk_losses(x, labels, -grad.contiguous(), output, grads):
            pass
        grad_x, *trained_grads = grads.finish()
        return grad_x, None, None, *trained_grads


class CrossEntropy(Function):
    """Compute the cross entropy (N,) of logits (N, V) and labels (N,), in fp32 (fp64 for fp64).

    Some rows are processed at a time, so that no fp32 copy of all logits exists.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        losses = logits.new_empty(len(logits), dtype=_wide_dtype(logits))
        for rows in _split_rows(logits, len(logits)):
            losses[rows] = F.cross_entropy(logits[rows].to(losses.dtype), labels[rows], reduction="none")
        ctx.save_for_backward(logits, labels)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, labels = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for rows in _split_rows(logits, len(logits)):
            slope = torch.softmax(logits[rows], -1, dtype=grad.dtype)
            slope.scatter_add_(1, labels[rows, None], slope.new_full((len(slope), 1), -1.0))
            grad_logits[rows] = slope.mul_(grad[rows, None])
        return grad_logits, None


class _HeadGradients:
    """The gradients of x and of the trained parts of the head, accumulated chunk by chunk.

    by_row: keep the gradients of the logits of the new rows (N, n) instead of computing the gradient of the new rows.
    """

    def __init__(self, x: Tensor, output: OutputHead, *, by_row: bool = False) -> None:
        wide, self.output = _wide_dtype(x), output
        new = output.new_rows
        self.x = torch.empty_like(x)
        self.new_logits = x.new_empty(len(x), len(new)) if new is not None and by_row else None
        self.new_rows = None if new is None or by_row else new.new_zeros(new.shape, dtype=wide)
        self.weight = x.new_zeros(output.weight.shape, dtype=wide) if output.weight_trained else None
        self.bias = x.new_zeros(len(output.weight), dtype=wide) if output.bias_trained else None
        self.adapters = _HeadAdapters(x, output) if output.adapters else None

    def add(self, rows: slice, x: Tensor, logits: Tensor, weight: Tensor, new_rows: Tensor | None) -> None:
        """Add a chunk, given the gradient of its logits. weight, new_rows: in the dtype of x."""
        if self.bias is not None:
            self.bias += logits.sum(0, dtype=self.bias.dtype)
        if self.adapters is not None:
            self.adapters.add(rows, logits)
        if self.weight is not None:
            _add_matmul(self.weight, logits, x)
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
        """Return the gradients of x and of output.trained."""
        adapter_grads = [] if self.adapters is None else self.adapters.finish(self.x)
        grads = [self.new_rows, *adapter_grads, self.weight, self.bias]
        return [self.x, *(grad for grad in grads if grad is not None)]


class _HeadAdapters:
    """The adapters on the head: their inputs and down projections for all rows, and their gradients."""

    def __init__(self, x: Tensor, output: OutputHead) -> None:
        columns, dropped, ops = ((0, len(output.weight)),) * len(output.scales), output.dropped, output.dropout_ops
        self.output = output
        self.adapters = Adapters(output.adapters, columns, output.scales, dropped is not None)
        self.x = x if dropped is None or ops is None else ops.apply_masks(x, dropped)
        _, (self.za, self.a, self.b) = lora.forward(self.x, len(output.weight), self.adapters)
        self.grad_za = torch.empty_like(self.za)
        self.grad_b = x.new_zeros(self.b.t().shape, dtype=_wide_dtype(x))  # of B^T, to not transpose the logits

    def add(self, rows: slice, logits: Tensor) -> None:
        torch.mm(logits, self.b, out=self.grad_za[rows])
        self.grad_b += self.za[rows].t() @ logits

    def finish(self, grad_x: Tensor) -> list[Tensor]:
        """Add the gradient through the adapters to grad_x. Return the gradients of A_1, B_1, A_2, ..."""
        output, adapters, ranks = self.output, self.adapters, list(self.adapters.ranks)
        grads_za = torch.split(self.grad_za, ranks, 1)
        if output.dropped is None or output.dropout_ops is None:
            grad_x.addmm_(self.grad_za, self.a)
            inputs = [self.x] * len(ranks)
        else:
            pairs = zip(grads_za, torch.split(self.a, ranks), strict=True)
            grad_inputs = torch.cat([grad_za @ a for grad_za, a in pairs], 1)
            grad_x += output.dropout_ops.apply_masks_backward(grad_inputs, output.dropped)
            inputs = list(torch.split(self.x, adapters.width, 1))
        grads: list[Tensor] = []
        grads_b = torch.split(self.grad_b, ranks)
        for grad_za, x, scale, grad_b in zip(grads_za, inputs, adapters.scales, grads_b, strict=True):
            grads += [(grad_za.to(grad_b.dtype).t() @ x.to(grad_b.dtype)) * scale, grad_b.t().contiguous()]
        return grads


class _SoftRows:
    """The rows of a chunk with soft labels, and their logits before the cross entropy overwrites them."""

    def __init__(self, soft: SoftTargets, chosen: slice, begin: int, logits: Tensor, softcap: float) -> None:
        """chosen: the soft labels of the chunk, whose first label is `begin`."""
        self.soft, self.softcap = soft, softcap
        self.rows = (soft.rows[chosen] - begin).to(logits.device)
        self.ids, self.probs = soft.ids[chosen], soft.probs[chosen]
        self.capped = self._cap(logits[self.rows[:, None], self.ids])
        self.logits = None if soft.temperature == 1 else logits[self.rows]  # for the softmax at the temperature

    @staticmethod
    def of(soft: SoftTargets, begin: int, end: int, logits: Tensor, softcap: float) -> _SoftRows | None:
        first, last = torch.searchsorted(soft.rows, torch.tensor([begin, end])).tolist()
        return None if first == last else _SoftRows(soft, slice(first, last), begin, logits, softcap)

    def correct_(self, losses: Tensor, grad: Tensor | None, labels: Tensor, weights: Tensor) -> None:
        """Replace the losses and gradients of labels by those of SoftLabels."""
        share, temperature = self.soft.weight, self.soft.temperature
        weight = weights[self.rows].to(losses.dtype)
        is_label, is_given = self.ids == labels[self.rows, None], self.probs >= 0
        hard = losses[self.rows] / weight
        log_probs = self.capped - (hard + (self.capped * is_label).sum(1))[:, None]
        log_sums = None if self.logits is None else self._log_sums(self.logits)
        tempered = log_probs if log_sums is None else self.capped / temperature - log_sums[:, None]
        divergences = temperature**2 * divergence(self.probs, tempered)
        losses[self.rows] = weight * (share * divergences + (1 - share) * hard)
        if grad is None:
            return
        # the gradient of an id without a probability of its own is its model probability times `others`
        others = share * (1 - _rest(self.probs) / rest_prob(self.probs, tempered))
        slope = share * temperature * (tempered.exp() - self.probs) + (1 - share) * (log_probs.exp() - is_label.float())
        if self.softcap:
            slope *= 1 - (self.capped / self.softcap).square()
        if self.logits is None or log_sums is None:
            grad[self.rows] *= (1 - share + others)[:, None].to(grad.dtype)
        else:
            for part in _split_rows(self.logits, len(self.rows)):
                capped = self._cap(self.logits[part])
                added = torch.exp(capped / temperature - log_sums[part, None])
                added *= (weight * temperature * others)[part, None]
                if self.softcap:
                    added *= 1 - (capped / self.softcap).square()
                rows = self.rows[part]
                grad[rows] = (added + (1 - share) * grad[rows]).to(grad.dtype)
        places = self.rows[:, None], self.ids
        grad[places] = torch.where(is_given, (weight[:, None] * slope).to(grad.dtype), grad[places])

    def _cap(self, logits: Tensor) -> Tensor:
        wide = logits.to(_wide_dtype(logits))
        return self.softcap * torch.tanh(wide / self.softcap) if self.softcap else wide

    def _log_sums(self, logits: Tensor) -> Tensor:
        """Return the logarithm of the sum of the exponentials of logits at the temperature, (N,)."""
        parts = (self._cap(logits[part]) / self.soft.temperature for part in _split_rows(logits, len(logits)))
        return torch.cat([part.logsumexp(1) for part in parts])


def divergence(probs: Tensor, log_probs: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence (N,) of probabilities p from those of the model, both (N, k).

    All ids but those with a probability count as one, with the rest of the probability: see SoftLabels.
    """
    rest, given = _rest(probs), probs.clamp(min=0)
    crossed: Tensor = (given * log_probs).sum(1) + rest * rest_prob(probs, log_probs).log()
    entropy: Tensor = torch.special.entr(given).sum(1) + torch.special.entr(rest)
    return -crossed - entropy


def _rest(probs: Tensor) -> Tensor:
    """Return the probability (N,) of the ids without one of their own: see SoftLabels."""
    return (1 - probs.clamp(min=0).sum(1)).clamp(min=0)


def rest_prob(probs: Tensor, log_probs: Tensor) -> Tensor:
    """Return the model's probability (N,) of all ids but those with a probability. log_probs: the model's, (N, k)."""
    total: Tensor = (torch.exp(log_probs) * (probs >= 0)).sum(1)
    return (1 - total).clamp(min=1e-6)


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _split_rows(like: Tensor, number: int) -> Iterator[slice]:
    """Yield slices over `number` rows. A slice of rows with the width and dtype of `like` has at most PIECE_BYTES."""
    limit = GPU_PIECE_BYTES if like.device.type == "cuda" else PIECE_BYTES
    step = max(1, limit // (like.shape[1] * like.element_size()))
    return (slice(begin, begin + step) for begin in range(0, number, step))


def _add_matmul(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """Add grad^T x to total (V, k). grad: (n, V). x: (n, k)."""
    if total.dtype == x.dtype:
        total.addmm_(grad.t(), x)
        return
    for rows in _split_rows(x, len(total)):
        total[rows] += grad[:, rows].t() @ x


@torch.no_grad()
def find_top_probs(x: Tensor, labels: Tensor, output: OutputHead, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return probabilities of k tokens for each row of x (N, h): see `select_top_probs`."""
    weight, adapters = output.weight.to(x.dtype), _HeadAdapters(x, output) if output.adapters else None
    new_rows = None if output.new_rows is None else output.new_rows.to(x.dtype)
    ids, probs = list[Tensor](), list[Tensor]()
    for rows in _split_rows(weight.t(), len(x)):
        empty = x.new_empty(len(x[rows]), len(weight))
        logits = _compute_logits(x, output, weight, new_rows, adapters, rows, empty).float()
        if output.softcap:
            logits = output.softcap * torch.tanh(logits / output.softcap)
        selected = select_top_probs(logits, labels[rows], k, temperature)
        ids.append(selected[0])
        probs.append(selected[1])
    return torch.cat(ids), torch.cat(probs)


def select_top_probs(logits: Tensor, labels: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return token ids (N, k) and their probabilities: the k largest, or the k - 1 largest and that of the label.

    logits: (N, V), fp32. labels: (N,).
    """
    ids = logits.topk(min(k, logits.shape[1])).indices
    ids[:, -1] = torch.where((ids == labels[:, None]).any(1), ids[:, -1], labels)
    scaled = logits / temperature
    return ids, torch.exp(scaled.gather(1, ids) - scaled.logsumexp(-1, keepdim=True))


def _compute_logits(
    x: Tensor, output: OutputHead, weight: Tensor, new_rows: Tensor | None, adapters: _HeadAdapters | None,
    rows: slice, logits: Tensor,
) -> Tensor:  # fmt: skip
    """Write the logits of some rows of x, before the soft cap, to the first rows of `logits` (n, V), and return these.

    weight, new_rows: those of the head in x's dtype.
    """
    added = None if adapters is None else Product(adapters.za[rows], adapters.b.t())
    logits = logits[: len(x[rows])]
    output.matmul(x[rows], weight, True, logits, added)
    if new_rows is not None:
        logits[:, output.new_ids] = x[rows] @ new_rows.t()
    if output.bias is not None:
        logits += output.bias.detach()
    return logits


def _compute_chunk_losses(
    x: Tensor, labels: Tensor, weights: Tensor, output: OutputHead, grads: _HeadGradients | None
) -> Iterator[Tensor]:
    """Yield weights * cross entropy of each chunk of rows, and add the gradients of the chunk to `grads`."""
    limit = GPU_CHUNK_BYTES if x.device.type == "cuda" else CHUNK_BYTES
    chunk = max(16, limit // (output.weight.shape[0] * x.element_size()))
    weight = output.weight.detach().to(x.dtype)
    new_rows = None if output.new_rows is None else output.new_rows.detach().to(x.dtype)
    adapters = grads.adapters if grads is not None else _HeadAdapters(x, output) if output.adapters else None
    buffer = x.new_empty(min(chunk, len(x)), len(weight))  # blocks of several sizes would fragment the heap
    for begin in range(0, len(x), chunk):
        rows = slice(begin, begin + chunk)
        logits = _compute_logits(x, output, weight, new_rows, adapters, rows, buffer)
        soft = None
        if output.soft is not None:
            soft = _SoftRows.of(output.soft, begin, begin + len(logits), logits, output.softcap)
        losses = output.ops.cross_entropy_(logits, labels[rows], weights[rows], output.softcap, grads is not None)
        if soft is not None and output.soft is not None:
            soft.correct_(losses, logits if grads is not None else None, labels[rows], weights[rows])
            output.soft.losses.append(losses[soft.rows].sum())
        yield losses
        if grads is not None:
            grads.add(rows, x[rows], logits, weight, new_rows)
