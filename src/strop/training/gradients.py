"""Compute the gradient of an effective batch: this device's part, and the sum over all devices.

On one device, micro-batches accumulate into the weights' gradients. On several, each device is assigned rows by token
count, and puts its gradients and loss into one flat buffer that is all-reduced. With `train.exact` the micro-batches do
not depend on the number of devices, each has its own buffer, and the buffers are added in a fixed order
(distributed/assign.py), so that the sum is equal to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from strop.data.types import Item
from strop.distributed.assign import SumTree, assign_balanced, assign_contiguous, nodes_to_send
from strop.runs.lock import sha256_text
from strop.training.criteria import Figures
from strop.training.oom import micro_batches
from strop.training.state import Job


@dataclass(frozen=True)
class LocalGradient:
    """The result of one device's rows.

    loss: their share of the mean loss. figures: of each micro-batch, by its index in the effective batch.
    buffers: flat sums of gradients and loss, if they are not in the weights' gradients.
    """

    loss: Tensor
    figures: list[tuple[int, Figures]]
    buffers: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class TotalGradient:
    """The result of the effective batch, equal on all devices. bad_ranks: whose part is not finite. seconds: of each
    rank's computation."""

    loss: Tensor
    figures: dict[str, Tensor]
    bad_ranks: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()


def rows_of_rank(job: Job, items: Sequence[Item], rank: int) -> list[int]:
    """Return the rows that a rank computes, as indices into the effective batch."""
    if job.devices.world_size == 1:
        return list(range(len(items)))
    if job.recipe.train.exact:
        groups = micro_batches(job, items)
        return [row for index in _assign_groups(job, items, groups)[rank] for row in groups[index]]
    return assign_balanced(_costs(job, items), job.devices.world_size)[rank]


def compute_gradients(job: Job, items: Sequence[Item]) -> LocalGradient:
    """Compute the gradient of this device's rows of the effective batch.

    Only this function divides the loss: by the supervised weight (or the rows) of the whole effective batch, so that
    micro-batches of any size, on any number of devices, give the same gradient.
    """
    started, exact, weights = time.perf_counter(), job.recipe.train.exact, list(job.state.weights.values())
    divisor = job.criterion.divisor(items)
    assert divisor > 0
    statistic = job.criterion.statistic(job.step, items, partial(micro_batches, job))
    tree: SumTree[Tensor] = SumTree(len(micro_batches(job, items)) if exact else 1)

    def compute(indexed: tuple[int, list[int]]) -> tuple[Tensor, tuple[int, Figures]]:
        index, group = indexed
        if exact or job.devices.world_size > 1:  # for the model's own dropout, which is not seeded per row
            torch.manual_seed(_group_seed(job, index))
        total, figures = job.criterion.loss(job.step, [items[row] for row in group], statistic)
        loss = total / divisor
        loss.backward()  # type: ignore[no-untyped-call]
        if exact:
            tree.add(0, index, _take_gradients(weights, loss.detach()))
        return loss.detach(), (index, figures)

    results = job.devices.run_passes(lambda rank: _groups_of_rank(job, items, rank), compute, backward=True)
    losses, figures = [loss for loss, _ in results], [indexed for _, indexed in results]
    mean = torch.stack(losses or [torch.zeros((), device=weights[0].device)]).sum()
    buffers = [value for _, _, value in tree.nodes]
    if job.devices.world_size > 1 and not exact:
        buffers = [_take_gradients(weights, mean)]
    if buffers:
        float(buffers[-1][-1])  # wait for the device, so that `seconds` does not include sending
    return LocalGradient(mean, figures, buffers, time.perf_counter() - started)


def sum_gradients(job: Job, items: Sequence[Item], local: LocalGradient) -> TotalGradient:
    """Put the gradient of the whole effective batch into the weights, and return its loss and figures."""
    devices, world_size = job.devices, job.devices.world_size
    weights = list(job.state.weights.values())
    if not job.recipe.train.exact and world_size == 1:
        for weight in weights:  # experts without tokens: a zero gradient, as in a sum over devices
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return TotalGradient(local.loss, _mean_figures(local.figures))
    size = 1 + sum(weight.numel() for weight in weights)
    status = torch.zeros(2 * world_size, device=weights[0].device)  # by rank: not finite, then seconds
    status[devices.rank] = sum(float(not torch.isfinite(buffer.sum())) for buffer in local.buffers)
    status[world_size + devices.rank] = local.seconds
    if job.recipe.train.exact:
        total = _sum_in_order(job, items, local.buffers, size)
        devices.all_reduce(status)
    else:
        total = torch.cat([local.buffers[0], status])
        devices.all_reduce(total)
        status = total[size:]
    offset = 0
    for weight in weights:
        weight.grad = total[offset : offset + weight.numel()].view_as(weight).to(weight.dtype)
        offset += weight.numel()
    not_finite, seconds = status[:world_size].tolist(), status[world_size:].tolist()
    figures = local.figures
    if job.criterion.has_figures and world_size > 1:
        own = [(index, {name: x.tolist() for name, x in columns.items()}) for index, columns in local.figures]
        figures = [
            (index, {name: torch.tensor(x, dtype=torch.float64) for name, x in columns.items()})
            for by_index in devices.gather(own)
            for index, columns in by_index
        ]
    bad_ranks = tuple(rank for rank, count in enumerate(not_finite) if count)
    return TotalGradient(total[size - 1].to(local.loss), _mean_figures(figures), bad_ranks, tuple(seconds))


def _groups_of_rank(job: Job, items: Sequence[Item], rank: int) -> list[tuple[int, list[int]]]:
    """Return a rank's micro-batches: (index in the effective batch, rows)."""
    if job.devices.world_size == 1 or job.recipe.train.exact:
        groups = micro_batches(job, items)
        indices = _assign_groups(job, items, groups)[rank] if job.recipe.train.exact else range(len(groups))
        return [(index, groups[index]) for index in indices]
    own = rows_of_rank(job, items, rank)
    groups = [[own[row] for row in group] for group in micro_batches(job, [items[row] for row in own])] if own else []
    return [(group[0], group) for group in groups]


def _group_seed(job: Job, index: int) -> int:
    return int(sha256_text(f"{job.recipe.seed} {job.state.progress.step} {index}")[:15], 16)


def _assign_groups(job: Job, items: Sequence[Item], groups: Sequence[Sequence[int]]) -> list[range]:
    costs = _costs(job, items)
    return assign_contiguous([sum(costs[row] for row in group) for group in groups], job.devices.world_size)


def _costs(job: Job, items: Sequence[Item]) -> list[float]:
    return [float(item.computed_tokens(job.step.packed, job.step.prefix_sharing)) for item in items]


def _take_gradients(weights: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Return gradients and loss in one flat fp32 buffer, and clear the weights' gradients."""
    parts = [torch.zeros_like(w, dtype=torch.float32) if w.grad is None else w.grad.float() for w in weights]
    for weight in weights:
        weight.grad = None
    return torch.cat([*(part.flatten() for part in parts), loss.float().reshape(1)])


def _sum_in_order(job: Job, items: Sequence[Item], buffers: Sequence[Tensor], size: int) -> Tensor:
    groups, own, devices = micro_batches(job, items), iter(buffers), job.devices
    tree: SumTree[Tensor] = SumTree(len(groups))
    device = job.state.device
    for rank, indices in enumerate(_assign_groups(job, items, groups)):
        for level, i in nodes_to_send(len(groups), indices):
            buffer = next(own) if rank == devices.rank else torch.empty(size, device=device)
            devices.broadcast(buffer, rank)
            tree.add(level, i, buffer)
    return tree.total


def _mean_figures(figures: Sequence[tuple[int, Figures]]) -> dict[str, Tensor]:
    """Return each figure's mean over the rows that have it."""
    parts = [columns for _, columns in sorted(figures, key=lambda indexed: indexed[0])]
    return {name: torch.cat([part[name] for part in parts]).mean() for name in (parts[0] if parts else ())}
