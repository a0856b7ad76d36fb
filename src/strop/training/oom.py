"""Split effective batches into micro-batches, and retry a step that ran out of memory in smaller pieces.

A retry uses the same rows, state and random numbers, and the effective batch does not change. Each reduction is logged,
stored in Progress, and remembered for the next run of this shape on this machine.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from strop.data.batching import group_by_length, pack
from strop.data.types import Item
from strop.errors import MemoryLimitError
from strop.machine.memory import is_out_of_memory, save_measured, trim_heap
from strop.training.state import Job, random_states, set_random_states

T = TypeVar("T")
SLOTS = 8  # micro-batches per step with train.exact; further devices have nothing to do


def micro_batches(job: Job, items: Sequence[Item]) -> list[list[int]]:
    """Return the rows of each micro-batch: packed to a token budget, or of similar length if the step pads.

    With train.exact there are at least SLOTS (if there are as many rows), whatever the number of devices.
    """
    lengths = [item.computed_tokens(job.step.packed, job.step.prefix_sharing) for item in items]
    train, (size, unit) = job.recipe.train, _micro_batch_size(job)
    if train.exact:
        size = min(size, -(-(len(items) if unit == "rows" else sum(lengths)) // SLOTS))
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
    Raises MemoryLimitError if no reduction is left.
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
    """Return the present size of a micro-batch, and its unit: tokens or rows."""
    train, halvings = job.recipe.train, job.state.progress.halvings
    if train.micro_batch_tokens is not None:
        return max(1, train.micro_batch_tokens >> halvings), "tokens"
    return max(1, (train.micro_batch or 1) >> halvings), "rows"
