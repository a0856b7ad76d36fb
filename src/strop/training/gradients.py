"""Compute the gradient of an effective batch: this device's part, and the sum over all devices.

On one device, micro-batches accumulate into the weights' gradients. On several, each device is assigned rows by token
count and puts its gradients and loss into one flat buffer that is all-reduced. With `train.exact` the micro-batches do
not depend on the number of devices, each has its own buffer, and the buffers are added in a fixed order
(distributed/deterministic_sum.py), so that the sum is equal to the bit. With a sharded base, all devices run the same
number of forward passes (distributed/sharded.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from strop.data.types import Item
from strop.distributed.assign import deal, in_a_row
from strop.distributed.deterministic_sum import Tree, nodes_of
from strop.runs.lock import sha256_text
from strop.training.criteria import Figures
from strop.training.job import Job
from strop.training.oom import micro_batches


@dataclass(frozen=True)
class Part:
    """What one device made of its rows. loss: their share of the mean loss. figures: of each micro-batch, by its place
    in the effective batch. nodes: flat sums of gradients and loss, where they are not in the weights' own gradients."""

    loss: Tensor
    figures: list[tuple[int, Figures]]
    nodes: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Whole:
    """Of the effective batch, the same on every device. bad: ranks whose own part was not finite. seconds: of each
    rank's computing."""

    loss: Tensor
    figures: dict[str, Tensor]
    bad: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()


def own_rows(job: Job, items: Sequence[Item], rank: int) -> list[int]:
    """The rows of an effective batch that a rank computes, as places in it."""
    if job.devices.world == 1:
        return list(range(len(items)))
    if job.recipe.train.exact:
        groups = micro_batches(job, items)
        return [row for place in _dealt(job, items, groups)[rank] for row in groups[place]]
    return deal(_costs(job, items), job.devices.world)[rank]


def gradients(job: Job, items: Sequence[Item]) -> Part:
    """The gradient of this device's rows of the effective batch, and their share of its mean loss (on the device).

    This is the one place that divides the loss: by the supervised weight (or the units) of the whole effective batch,
    so that micro-batches of any size, on any number of devices, give the same gradient.
    """
    started, exact, weights = time.perf_counter(), job.recipe.train.exact, list(job.state.weights.values())
    divisor = job.criterion.divisor(items)
    assert divisor > 0
    level = job.criterion.level(job.step, items, partial(micro_batches, job))
    tree: Tree[Tensor] = Tree(len(micro_batches(job, items)) if exact else 1)

    def compute(part: tuple[int, list[int]]) -> tuple[Tensor, tuple[int, Figures]]:
        place, group = part
        if exact or job.devices.world > 1:  # for dropout that no row decides: the model's own
            torch.manual_seed(_seed_of(job, place))
        total, found = job.criterion.loss(job.step, [items[row] for row in group], level)
        loss = total / divisor
        loss.backward()  # type: ignore[no-untyped-call]
        if exact:
            tree.add(0, place, _flat(weights, loss.detach()))
        return loss.detach(), (place, found)

    made = job.devices.turns(lambda rank: _groups_of(job, items, rank), compute, backward=True)
    losses, figures = [loss for loss, _ in made], [found for _, found in made]
    mean = torch.stack(losses or [torch.zeros((), device=weights[0].device)]).sum()
    nodes = [value for _, _, value in tree.nodes]
    if job.devices.world > 1 and not exact:
        nodes = [_flat(weights, mean)]
    if nodes:
        float(nodes[-1][-1])  # the device has done its work: what follows is sending
    return Part(mean, figures, nodes, time.perf_counter() - started)


def summed(job: Job, items: Sequence[Item], part: Part) -> Whole:
    """Puts the gradient of the whole effective batch into the weights."""
    devices, world = job.devices, job.devices.world
    weights = list(job.state.weights.values())
    if not job.recipe.train.exact and world == 1:
        for weight in weights:  # of experts that no token went to: a gradient of zero, as in a sum over devices
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return Whole(part.loss, _means([part.figures]))
    size = 1 + sum(weight.numel() for weight in weights)
    told = torch.zeros(2 * world, device=weights[0].device)
    told[devices.rank] = sum(float(not torch.isfinite(node.sum())) for node in part.nodes)
    told[world + devices.rank] = part.seconds
    if job.recipe.train.exact:
        total = _in_order(job, items, part.nodes, size)
        devices.add_up(told)
    else:
        total = torch.cat([part.nodes[0], told])
        devices.add_up(total)
        told = total[size:]
    at = 0
    for weight in weights:
        weight.grad = total[at : at + weight.numel()].view_as(weight).to(weight.dtype)
        at += weight.numel()
    bad, seconds = told[:world].tolist(), told[world:].tolist()
    figures = part.figures
    if job.criterion.tells and world > 1:
        own = [(place, {name: x.tolist() for name, x in found.items()}) for place, found in part.figures]
        figures = [
            (place, {name: torch.tensor(x, dtype=torch.float64) for name, x in found.items()})
            for one in devices.gather(own)
            for place, found in one
        ]
    bad_ranks = tuple(rank for rank, one in enumerate(bad) if one)
    return Whole(total[size - 1].to(part.loss), _means([figures]), bad_ranks, tuple(seconds))


def _groups_of(job: Job, items: Sequence[Item], rank: int) -> list[tuple[int, list[int]]]:
    """The micro-batches of a rank: where each stands in the effective batch, and its rows of it."""
    if job.devices.world == 1 or job.recipe.train.exact:
        groups = micro_batches(job, items)
        places = _dealt(job, items, groups)[rank] if job.recipe.train.exact else range(len(groups))
        return [(place, groups[place]) for place in places]
    own = own_rows(job, items, rank)
    groups = [[own[row] for row in group] for group in micro_batches(job, [items[row] for row in own])] if own else []
    return [(group[0], group) for group in groups]


def _seed_of(job: Job, place: int) -> int:
    """Of a micro-batch, whichever device computes it."""
    return int(sha256_text(f"{job.recipe.seed} {job.state.progress.step} {place}")[:15], 16)


def _dealt(job: Job, items: Sequence[Item], groups: Sequence[Sequence[int]]) -> list[range]:
    costs = _costs(job, items)
    return in_a_row([sum(costs[row] for row in group) for group in groups], job.devices.world)


def _costs(job: Job, items: Sequence[Item]) -> list[float]:
    return [float(item.computed_tokens(job.step.packed, job.step.prefix_sharing)) for item in items]


def _flat(weights: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Gradients and loss in one fp32 buffer; the gradients are taken from the weights."""
    parts = [torch.zeros_like(w, dtype=torch.float32) if w.grad is None else w.grad.float() for w in weights]
    for weight in weights:
        weight.grad = None
    return torch.cat([*(part.flatten() for part in parts), loss.float().reshape(1)])


def _in_order(job: Job, items: Sequence[Item], nodes: Sequence[Tensor], size: int) -> Tensor:
    """The sum of the buffers of all micro-batches, in the order of the tree."""
    groups, own, devices = micro_batches(job, items), iter(nodes), job.devices
    tree: Tree[Tensor] = Tree(len(groups))
    device = job.state.device
    for rank, places in enumerate(_dealt(job, items, groups)):
        for level, i in nodes_of(len(groups), places):
            buffer = next(own) if rank == devices.rank else torch.empty(size, device=device)
            devices.send(buffer, rank)
            tree.add(level, i, buffer)
    return tree.whole


def _means(found: Sequence[Sequence[tuple[int, Figures]]]) -> dict[str, Tensor]:
    """Of each figure the mean over the units that have it."""
    parts = [figures for _, figures in sorted((one for many in found for one in many), key=lambda one: one[0])]
    return {name: torch.cat([part[name] for part in parts]).mean() for name in (parts[0] if parts else ())}
