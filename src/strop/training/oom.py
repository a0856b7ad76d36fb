"""How an effective batch is cut up, and what becomes of a step that finds no memory: it is done again in smaller
pieces, with the same rows, state and random numbers.

The effective batch, the order of the data and the step stay what they were; what changes is said, recorded in the
events and in Progress, and remembered for the next run of this shape on this machine.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from strop.data.packing import group_by_length, pack
from strop.data.types import Item
from strop.errors import MemoryLimitError
from strop.machine.memory import is_out_of_memory, save_measured, trim_heap
from strop.training.job import Job
from strop.training.state import random_states, set_random_states

T = TypeVar("T")
SLOTS = 8  # micro-batches of a step of an exact run; more devices than that have nothing to do


def micro_batches(job: Job, items: Sequence[Item]) -> list[list[int]]:
    """Which rows are computed together: packed into the budget of tokens, or like lengths where padding counts.

    With train.exact there are SLOTS of them at least, where there are as many rows: they are dealt out to devices, and
    must not depend on the number of these."""
    lengths = [item.computed(job.step.packed, job.step.shares) for item in items]
    train, (size, unit) = job.recipe.train, _cut(job)
    if train.exact:
        size = min(size, -(-(len(items) if unit == "rows" else sum(lengths)) // SLOTS))
    if unit == "rows":
        return group_by_length(
            lengths, tokens=None, rows=size if train.micro_batch is not None or train.exact else None
        )
    return pack(lengths, max(size, *lengths)) if job.step.packed else group_by_length(lengths, tokens=size, rows=None)


def go_on_shrunk(job: Job) -> None:
    """Puts the step into the shape that the recipe asks for, and that running out of memory left it in."""
    layers = job.recipe.train.gradient_checkpointing
    if isinstance(layers, int):
        job.step.checkpoint(layers)
    if job.state.progress.recompute:
        job.step.recompute()
    if job.state.progress.offload:
        assert job.step.offload is not None
        job.step.offload()
    if job.state.progress.streamed and job.stream is not None:
        job.step.exchange(job.stream)


def within_memory(job: Job, items: Sequence[Item], compute: Callable[[], T]) -> T:
    """What `compute` gives, called again with less memory each time that there is not enough, on any device.

    On a card at first with the same: what lies in pieces there may be enough in one. Raises MemoryLimitError when
    nothing is left to save.
    """
    device = job.state.device
    random, in_pieces = random_states(device), device.type == "cuda"
    while True:
        try:
            with job.devices.together():
                return compute()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        # not inside the handler: its traceback holds on to the tensors of the step that failed
        job.state.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        job.step.release()
        trim_heap()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        set_random_states(random, device)
        if in_pieces:
            job.log.emit("note", text=f"step {job.state.progress.step + 1} is tried again at the same size: {said}")
        else:
            _shrink(job, items, said)
        in_pieces = False


def _shrink(job: Job, items: Sequence[Item], said: str) -> None:
    progress = job.state.progress
    before, halvings = micro_batches(job, items), progress.halvings
    while micro_batches(job, items) == before and _cut(job)[0] > 1:
        progress.halvings += 1
    after = micro_batches(job, items)
    if after != before:
        number, unit = _cut(job)
        to = f"micro-batches of {number} {unit}, {len(after)} in place of {len(before)}"
    elif not progress.recompute:
        progress.halvings, progress.recompute = halvings, True
        job.step.recompute()
        to = "gradient checkpointing"
    elif job.step.offload is not None and not progress.offload:
        progress.halvings, progress.offload = halvings, True
        job.step.offload()
        to = "gradient checkpointing with the inputs of layers in the host's memory"
    elif job.stream is not None and not progress.streamed:
        progress.halvings, progress.streamed = halvings, True
        job.step.exchange(job.stream)
        trim_heap()
        to = "weights that are dequantized when they are needed"
    else:
        fix = "shorten --data.max_length, train fewer --lora.target_modules, or take a smaller model"
        raise MemoryLimitError(f"out of memory with the smallest micro-batches and checkpointing: {said}", fix=fix)
    job.log.emit("shrink", step=progress.step, why=said, to=to)
    if job.memory_key and job.devices.local == 0:
        tokens = job.recipe.train.micro_batch_tokens
        kept = None if tokens is None else tokens >> progress.halvings
        shape = {"recompute": progress.recompute, "offload": progress.offload, "streamed": progress.streamed}
        usable = {"usable_bytes": job.usable_bytes} if job.usable_bytes else {}
        save_measured(job.memory_key, {"micro_batch_tokens": kept, **shape, **usable})


def _cut(job: Job) -> tuple[int, str]:
    """(size, unit) of a micro-batch, as it is now: tokens or rows."""
    train, halvings = job.recipe.train, job.state.progress.halvings
    if train.micro_batch_tokens is not None:
        return max(1, train.micro_batch_tokens >> halvings), "tokens"
    return max(1, (train.micro_batch or 1) >> halvings), "rows"
