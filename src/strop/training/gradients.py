"""Split an effective batch into micro-batches, compute their gradients, and sum them over the devices.

On one device, gradients accumulate in the weights. On several, rows are assigned to devices by token count, and a flat
buffer of gradients and loss is all-reduced. With `train.exact`, micro-batches do not depend on the number of devices,
and the buffer of each is added in a fixed order (distributed/assign.py), so that the sum is bitwise reproducible.

When memory runs out, `retry_with_less_memory` repeats the computation with smaller micro-batches or more recomputation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from strop.data.batching import group_by_length, pack
from strop.data.types import Example, Item
from strop.distributed.assign import SumTree, assign_balanced, assign_contiguous, nodes_to_send
from strop.errors import MemoryLimitError, first_line
from strop.machine.memory import free_memory, is_out_of_memory, save_measured, trim_heap
from strop.planning.multi_device import MIN_MICRO_BATCHES
from strop.runs.lock import sha256_text
from strop.training.criteria import Metrics
from strop.training.state import Job, random_states, set_random_states

LARGE_MATRIX = 1 << 20  # elements from which torch's norm in fp32 on a CPU is inexact: 1e-5 too low, and 1 % for 10^8

T = TypeVar("T")


@dataclass(frozen=True)
class LocalGradient:
    """The gradient of one device's rows."""

    loss: Tensor  # the rows' share of the mean loss
    metrics: list[tuple[int, Metrics]]  # (sort key, metrics) of each micro-batch; see _groups_of_rank
    buffers: list[Tensor] = field(default_factory=list)  # flat gradients and loss; empty if they are in `weight.grad`
    seconds: float = 0.0  # of computation


@dataclass(frozen=True)
class TotalGradient:
    """The gradient of the effective batch, equal on all devices."""

    loss: Tensor
    metrics: dict[str, Tensor]
    bad_ranks: tuple[int, ...] = ()  # ranks whose gradients are not finite
    seconds: tuple[float, ...] = ()  # computation time of each rank


def rows_of_rank(job: Job, items: Sequence[Item], rank: int) -> list[int]:
    """Return the rows that a rank computes, as indices into the effective batch."""
    if job.devices.world_size == 1:
        return list(range(len(items)))
    if job.recipe.train.exact:
        groups = micro_batches(job, items)
        return [row for index in _assign_groups(job, items, groups)[rank] for row in groups[index]]
    return assign_balanced(_compute_costs(job, items), job.devices.world_size)[rank]


def compute_gradients(job: Job, items: Sequence[Item]) -> LocalGradient:
    """Compute the gradient of this device's rows of the effective batch, times Progress.loss_scale."""
    # The divisor is that of the whole effective batch, so the gradient does not depend on the micro-batches.
    started, exact, weights = time.perf_counter(), job.recipe.train.exact, list(job.state.weights.values())
    divisor = job.criterion.divisor(items)
    assert divisor > 0
    statistic = job.criterion.batch_statistic(job.step, items, partial(micro_batches, job))
    tree: SumTree[Tensor] = SumTree(len(micro_batches(job, items)) if exact else 1)

    def compute(indexed: tuple[int, list[int]]) -> tuple[Tensor, tuple[int, Metrics]]:
        index, group = indexed
        if exact or job.devices.world_size > 1:  # for the model's own dropout, which is not seeded per row
            seed = f"{job.recipe.seed} {job.state.progress.step} {index}"
            torch.manual_seed(int(sha256_text(seed)[:15], 16))
        total, metrics = job.criterion.loss(job.step, [items[row] for row in group], statistic)
        loss = total / divisor
        (loss * job.state.progress.loss_scale).backward()  # type: ignore[no-untyped-call]
        if exact:
            tree.add(0, index, _take_gradients(weights, loss.detach()))
        return loss.detach(), (index, metrics)

    results = job.devices.run_passes(lambda rank: _groups_of_rank(job, items, rank), compute, backward=True)
    losses, metrics = [loss for loss, _ in results], [indexed for _, indexed in results]
    mean = torch.stack(losses or [torch.zeros((), device=weights[0].device)]).sum()
    buffers = [value for _, _, value in tree.nodes]
    if job.devices.world_size > 1 and not exact:
        buffers = [_take_gradients(weights, mean)]
    if buffers:
        float(buffers[-1][-1])  # wait for the device, so that `seconds` does not include communication
    return LocalGradient(mean, metrics, buffers, time.perf_counter() - started)


def sum_gradients(job: Job, items: Sequence[Item], local: LocalGradient) -> TotalGradient:
    """Put the gradient of the whole effective batch into the weights, and return its loss and metrics.

    The gradient is multiplied by Progress.loss_scale, the loss is not.
    """
    devices, world_size = job.devices, job.devices.world_size
    weights = list(job.state.weights.values())
    if not job.recipe.train.exact and world_size == 1:
        for weight in weights:  # zeros for experts without tokens, as on several devices
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return TotalGradient(local.loss, _mean_metrics(local.metrics))
    size = 1 + sum(weight.numel() for weight in weights)
    # for each rank the number of buffers that are not finite, then for each rank its seconds
    status = torch.zeros(2 * world_size, device=weights[0].device)
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
    metrics = local.metrics
    if job.criterion.has_metrics and world_size > 1:
        lists = [(index, {name: x.tolist() for name, x in columns.items()}) for index, columns in local.metrics]
        metrics = [
            (index, {name: torch.tensor(x, dtype=torch.float64) for name, x in columns.items()})
            for rank_lists in devices.gather(lists)
            for index, columns in rank_lists
        ]
    bad_ranks = tuple(rank for rank, count in enumerate(not_finite) if count)
    return TotalGradient(total[size - 1].to(local.loss), _mean_metrics(metrics), bad_ranks, tuple(seconds))


def _groups_of_rank(job: Job, items: Sequence[Item], rank: int) -> list[tuple[int, list[int]]]:
    """Return (sort key, rows) of a rank's micro-batches. The key is the number of the micro-batch, or its first row."""
    if job.devices.world_size == 1 or job.recipe.train.exact:
        groups = micro_batches(job, items)
        indices = _assign_groups(job, items, groups)[rank] if job.recipe.train.exact else range(len(groups))
        return [(index, groups[index]) for index in indices]
    rows = rows_of_rank(job, items, rank)
    batches = micro_batches(job, [items[row] for row in rows]) if rows else []
    groups = [[rows[i] for i in batch] for batch in batches]
    return [(group[0], group) for group in groups]


def _assign_groups(job: Job, items: Sequence[Item], groups: Sequence[Sequence[int]]) -> list[range]:
    costs = _compute_costs(job, items)
    return assign_contiguous([sum(costs[row] for row in group) for group in groups], job.devices.world_size)


def _compute_costs(job: Job, items: Sequence[Item]) -> list[float]:
    return [float(item.computed_tokens(job.step.packed, job.step.prefix_sharing)) for item in items]


def _take_gradients(weights: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Return gradients and loss in one flat fp32 buffer, and clear the weights' gradients."""
    parts = [torch.zeros_like(w, dtype=torch.float32) if w.grad is None else w.grad.float() for w in weights]
    for weight in weights:
        weight.grad = None
    return torch.cat([*(part.flatten() for part in parts), loss.float().reshape(1)])


def _sum_in_order(job: Job, items: Sequence[Item], buffers: Sequence[Tensor], size: int) -> Tensor:
    """Return the sum of all ranks' buffers, which is bitwise the same for any number of ranks."""
    groups, rank_buffers, devices = micro_batches(job, items), iter(buffers), job.devices
    tree: SumTree[Tensor] = SumTree(len(groups))
    for rank, indices in enumerate(_assign_groups(job, items, groups)):
        for level, i in nodes_to_send(len(groups), indices):
            buffer = next(rank_buffers) if rank == devices.rank else torch.empty(size, device=job.state.device)
            devices.broadcast(buffer, rank)
            tree.add(level, i, buffer)
    return tree.total


def _mean_metrics(metrics: Sequence[tuple[int, Metrics]]) -> dict[str, Tensor]:
    parts = [columns for _, columns in sorted(metrics, key=lambda indexed: indexed[0])]
    names = dict.fromkeys(name for part in parts for name in part)  # a micro-batch may lack some
    return {name: torch.cat([part[name] for part in parts if name in part]).mean() for name in names}


def micro_batches(job: Job, items: Sequence[Item]) -> list[list[int]]:
    """Return the rows of each micro-batch: packed up to a number of tokens, or grouped by length if the step pads.

    Preferences and rows of train.keep are computed differently, and are in different micro-batches.
    """
    parts = [[row for row, item in enumerate(items) if isinstance(item, Example) is kept] for kept in (False, True)]
    batches = ((part, _split_batch(job, [items[row] for row in part])) for part in parts if part)
    return [[part[i] for i in batch] for part, part_batches in batches for batch in part_batches]


def _split_batch(job: Job, items: Sequence[Item]) -> list[list[int]]:
    lengths = [item.computed_tokens(job.step.packed, job.step.prefix_sharing) for item in items]
    train, (size, unit) = job.recipe.train, _micro_batch_size(job)
    if train.exact:
        size = min(size, -(-(len(items) if unit == "rows" else sum(lengths)) // MIN_MICRO_BATCHES))
    if unit == "rows":
        return group_by_length(lengths, rows=size if train.micro_batch is not None or train.exact else None)
    return pack(lengths, max(size, *lengths)) if job.step.packed else group_by_length(lengths, tokens=size)


def apply_memory_settings(job: Job, *, repacks: bool = True) -> None:
    """Apply the memory options of the recipe and of earlier retries to the step. repacks: quantize layers again."""
    layers = job.recipe.train.gradient_checkpointing
    if isinstance(layers, int):
        job.step.checkpoint(layers)
    if job.state.progress.recompute:
        job.step.checkpoint()
    if job.state.progress.offload:
        job.step.offload()
    if repacks and job.state.progress.streamed and job.repack_weights is not None:  # dequantized only when needed
        job.step.replace_weights(job.repack_weights)


def retry_with_less_memory(job: Job, items: Sequence[Item], compute: Callable[[], T]) -> T:
    """Return `compute()`, and retry it with less memory when a device runs out of memory.

    The rows, the state and the random numbers stay the same. On a GPU, the first retry only empties the cache, which
    may be fragmented. Raises MemoryLimitError if memory cannot be reduced further.
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
            reason = first_line(error)
        # outside of the handler, whose traceback keeps the tensors of the failed step alive
        job.state.optimizer.zero_grad(set_to_none=True)
        free_step_memory(job)
        set_random_states(random, device)
        if retry_unchanged:
            job.log.emit("note", text=f"retrying step {job.state.progress.step + 1} at the same size: {reason}")
        else:
            _reduce_memory(job, items, reason)
        retry_unchanged = False


def free_step_memory(job: Job) -> None:
    """Free the buffers and cached memory of the steps. After an out-of-memory error, call it outside of its handler."""
    job.step.release_buffers()
    free_memory()
    if job.state.device.type == "cuda":
        torch.cuda.empty_cache()


def _reduce_memory(job: Job, items: Sequence[Item], reason: str) -> None:
    """Reduce memory by one measure, log it, and store it for the next run with the same memory key."""
    progress = job.state.progress
    before, was_streamed = micro_batches(job, items), progress.streamed
    change = _choose_measure(job, items)
    if change is None:
        fix = "shorten --data.max_length, train fewer --lora.target_modules, or use a smaller model"
        raise MemoryLimitError(f"out of memory with the smallest micro-batches and checkpointing: {reason}", fix=fix)
    if micro_batches(job, items) == before:
        apply_memory_settings(job, repacks=not was_streamed)
        trim_heap()
    job.log.emit("shrink", step=progress.step, why=reason, to=change)
    if job.memory_key and job.devices.local_rank == 0:
        tokens = job.recipe.train.micro_batch_tokens
        limits = {"micro_batch_tokens": None if tokens is None else tokens >> progress.halvings}
        limits |= {name: getattr(progress, name) for name in ("recompute", "offload", "streamed")}
        limits |= {"usable_bytes": job.usable_bytes} if job.usable_bytes else {}
        save_measured(job.memory_key, limits)


def _choose_measure(job: Job, items: Sequence[Item]) -> str | None:
    """Set the next measure that saves memory in the progress, and describe it. None: no other is left."""
    progress, streamed = job.state.progress, "dequantizing weights when they are needed"
    can_stream = job.repack_weights is not None and not progress.streamed
    if can_stream and job.state.device.type == "cuda":  # on a GPU this costs least
        progress.streamed = True
        return streamed
    before, halvings = micro_batches(job, items), progress.halvings
    while micro_batches(job, items) == before and _micro_batch_size(job)[0] > 1:
        progress.halvings += 1
    after = micro_batches(job, items)
    if after != before:
        size, unit = _micro_batch_size(job)
        return f"micro-batches of {size} {unit}, {len(after)} instead of {len(before)}"
    progress.halvings = halvings
    if not progress.recompute:
        progress.recompute = True
        return "gradient checkpointing"
    if job.step.can_offload and not progress.offload:
        progress.offload = True
        return "gradient checkpointing with the inputs of layers in host memory"
    if can_stream:
        progress.streamed = True
        return streamed
    return None


def _micro_batch_size(job: Job) -> tuple[int, str]:
    """Return the maximum size of a micro-batch, and its unit: tokens or rows."""
    train, halvings = job.recipe.train, job.state.progress.halvings
    if train.micro_batch_tokens is not None:
        return max(1, train.micro_batch_tokens >> halvings), "tokens"
    return max(1, (train.micro_batch or 1) >> halvings), "rows"


def clip_gradients(weights: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients down to a norm of `max_norm`, and return the norm before, shape ().

    As torch.nn.utils.clip_grad_norm_, except that large matrices on a CPU are summed by row, which is exact to 1e-6.
    """
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    parts = [torch.linalg.vector_norm(x, dim=-1) if _sums_by_row(x) else x for x in gradients]
    total = torch.nn.utils.get_total_norm(parts)
    torch.nn.utils.clip_grads_with_norm_(weights, max_norm, total)
    return total


def _sums_by_row(gradient: Tensor) -> bool:
    return gradient.device.type == "cpu" and gradient.numel() >= LARGE_MATRIX
