"""Split an effective batch into micro-batches, compute this device's gradients, and sum them over the devices.

On one device, micro-batches accumulate into the weights' gradients. On several, each device is assigned rows by token
count, and puts its gradients and loss into one flat buffer that is all-reduced. With `train.exact` the micro-batches do
not depend on the number of devices, each has its own buffer, and the buffers are added in a fixed order
(distributed/assign.py), so that the sum is bitwise the same on any number of devices.

A step that ran out of memory is retried in smaller pieces (`within_memory`), with the same rows, state and random
numbers. Each reduction is logged, stored in Progress, and remembered for the next run of this shape on this machine.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from strop.data.batching import group_by_length, pack
from strop.data.types import Item
from strop.distributed.assign import SumTree, assign_balanced, assign_contiguous, nodes_to_send
from strop.errors import MemoryLimitError
from strop.machine.memory import is_out_of_memory, save_measured, trim_heap
from strop.runs.lock import sha256_text
from strop.training.criteria import Figures
from strop.training.state import Job, random_states, set_random_states

T = TypeVar("T")
MIN_MICRO_BATCHES = 8  # minimum per step with train.exact; more devices than that are idle


@dataclass(frozen=True)
class LocalGradient:
    """The result of one device's rows.

    loss: their share of the mean loss. figures: metrics of each micro-batch, with its index in the effective batch.
    buffers: flat sums of gradients and loss; empty if the gradients are in `weight.grad`. seconds: of computation.
    """

    loss: Tensor
    figures: list[tuple[int, Figures]]
    buffers: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class TotalGradient:
    """The result of the effective batch, equal on all devices.

    bad_ranks: ranks whose gradients are not finite. seconds: computation time of each rank.
    """

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

    The loss is divided only here, by the supervised weight (or the number of rows) of the whole effective batch.
    Micro-batches of any size, on any number of devices, therefore give the same gradient.
    """
    started, exact, weights = time.perf_counter(), job.recipe.train.exact, list(job.state.weights.values())
    divisor = job.criterion.divisor(items)
    assert divisor > 0
    statistic = job.criterion.statistic(job.step, items, partial(micro_batches, job))
    tree: SumTree[Tensor] = SumTree(len(micro_batches(job, items)) if exact else 1)

    def compute(indexed: tuple[int, list[int]]) -> tuple[Tensor, tuple[int, Figures]]:
        index, group = indexed
        if exact or job.devices.world_size > 1:  # for dropout in the model's code, which is not seeded per row
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
        float(buffers[-1][-1])  # wait for the device, so that `seconds` does not include communication
    return LocalGradient(mean, figures, buffers, time.perf_counter() - started)


def sum_gradients(job: Job, items: Sequence[Item], local: LocalGradient) -> TotalGradient:
    """Put the gradient of the whole effective batch into the weights, and return its loss and figures."""
    devices, world_size = job.devices, job.devices.world_size
    weights = list(job.state.weights.values())
    if not job.recipe.train.exact and world_size == 1:
        for weight in weights:  # experts without tokens have no gradient; summing over devices would give zeros
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return TotalGradient(local.loss, _mean_figures(local.figures))
    size = 1 + sum(weight.numel() for weight in weights)
    status = torch.zeros(
        2 * world_size, device=weights[0].device
    )  # [not finite] of each rank, then [seconds] of each rank
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


def micro_batches(job: Job, items: Sequence[Item]) -> list[list[int]]:
    """Return the rows of each micro-batch: packed to a token budget, or grouped by length if the step pads.

    With train.exact there are at least MIN_MICRO_BATCHES (if there are as many rows), whatever the number of devices.
    """
    lengths = [item.computed_tokens(job.step.packed, job.step.prefix_sharing) for item in items]
    train, (size, unit) = job.recipe.train, _micro_batch_size(job)
    if train.exact:
        size = min(size, -(-(len(items) if unit == "rows" else sum(lengths)) // MIN_MICRO_BATCHES))
    if unit == "rows":
        return group_by_length(
            lengths, tokens=None, rows=size if train.micro_batch is not None or train.exact else None
        )
    return pack(lengths, max(size, *lengths)) if job.step.packed else group_by_length(lengths, tokens=size, rows=None)


def apply_memory_settings(job: Job) -> None:
    """Set the step's memory options to those of the recipe and of earlier out-of-memory retries."""
    layers = job.recipe.train.gradient_checkpointing
    if isinstance(layers, int):
        job.step.checkpoint(layers)
    if job.state.progress.recompute:
        job.step.checkpoint()
    if job.state.progress.offload:
        job.step.offload()
    if job.state.progress.streamed and job.stream is not None:
        job.step.replace_weights(job.stream)


def within_memory(job: Job, items: Sequence[Item], compute: Callable[[], T]) -> T:
    """Return `compute()`, retried with less memory each time that any device runs out.

    On a GPU the first retry changes nothing, because freeing the cache may end fragmentation.
    Raises MemoryLimitError if memory cannot be reduced further.
    """
    device = job.state.device
    random, retry_unchanged = random_states(device), device.type == "cuda"
    while True:
        try:
            with job.devices.all_or_none():
                return compute()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        # outside the handler, because the traceback keeps the failed step's tensors alive
        job.state.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        job.step.release_buffers()
        trim_heap()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        set_random_states(random, device)
        if retry_unchanged:
            job.log.emit("note", text=f"retrying step {job.state.progress.step + 1} at the same size: {reason}")
        else:
            _reduce_memory(job, items, reason)
        retry_unchanged = False


def _reduce_memory(job: Job, items: Sequence[Item], reason: str) -> None:
    progress = job.state.progress
    before, halvings = micro_batches(job, items), progress.halvings
    while micro_batches(job, items) == before and _micro_batch_size(job)[0] > 1:
        progress.halvings += 1
    after = micro_batches(job, items)
    if after != before:
        size, unit = _micro_batch_size(job)
        to = f"micro-batches of {size} {unit}, {len(after)} instead of {len(before)}"
    elif not progress.recompute:
        progress.halvings, progress.recompute = halvings, True
        job.step.checkpoint()
        to = "gradient checkpointing"
    elif job.step.can_offload and not progress.offload:
        progress.halvings, progress.offload = halvings, True
        job.step.offload()
        to = "gradient checkpointing with the inputs of layers in host memory"
    elif job.stream is not None and not progress.streamed:
        progress.halvings, progress.streamed = halvings, True
        job.step.replace_weights(job.stream)
        trim_heap()
        to = "dequantizing weights when they are needed"
    else:
        fix = "shorten --data.max_length, train fewer --lora.target_modules, or use a smaller model"
        raise MemoryLimitError(f"out of memory with the smallest micro-batches and checkpointing: {reason}", fix=fix)
    job.log.emit("shrink", step=progress.step, why=reason, to=to)
    if job.memory_key and job.devices.local_rank == 0:
        tokens = job.recipe.train.micro_batch_tokens
        budget = None if tokens is None else tokens >> progress.halvings
        options = {"recompute": progress.recompute, "offload": progress.offload, "streamed": progress.streamed}
        usable = {"usable_bytes": job.usable_bytes} if job.usable_bytes else {}
        save_measured(job.memory_key, {"micro_batch_tokens": budget, **options, **usable})


def _micro_batch_size(job: Job) -> tuple[int, str]:
    """Return the current size of a micro-batch, and its unit: tokens or rows."""
    train, halvings = job.recipe.train, job.state.progress.halvings
    if train.micro_batch_tokens is not None:
        return max(1, train.micro_batch_tokens >> halvings), "tokens"
    return max(1, (train.micro_batch or 1) >> halvings), "rows"
