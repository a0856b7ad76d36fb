"""Allocate the activations of a micro-batch from reused buffers, and copy arrays to a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strop.machine.memory import map_pages, trim_heap

CACHE_LINE = 64  # bytes; also the width of the widest vector instructions
BUFFER_SIZES = 1 << 30, 64 << 20, 0  # minimum size of a new buffer in bytes, tried in this order
COPY_ALIGNMENT = 16  # bytes; alignment of arrays that are copied together
Allocate = Callable[[int, int, Tensor], Tensor]  # (rows, columns, like) -> an uninitialized tensor


def allocate_from_heap(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return an uninitialized tensor (rows, columns) with the dtype and device of `like`."""
    return like.new_empty(rows, columns)


class Arena:
    """Allocates the activations of one micro-batch from large buffers on the CPU.

    Saved activations live from the forward to the backward of their layer, and the sizes change with each micro-batch.
    This fragments the heap (measured in docs/log). An arena allocates sequentially and reuses all of its memory when
    the next micro-batch, or the next recomputed layer, begins. The buffers are kept between micro-batches, because
    mapping new pages took a seventh of a step.
    """

    def __init__(self) -> None:
        self.generation = 0  # number of micro-batches that used the buffers
        self._buffers: list[Tensor] = []
        self._active, self._buffer, self._offset = False, 0, 0

    def begin(self, *, active: bool) -> None:
        """Begin a micro-batch and invalidate the tensors of the previous one.

        active: allocate from the buffers. Otherwise allocate from the heap and free the buffers.
        """
        self.generation += active
        self._active, self._buffer, self._offset = active, 0, 0
        if not active:
            self._buffers = []

    def __enter__(self) -> None:
        """Begin to recompute a layer, and invalidate the tensors of the layer recomputed before."""
        self._active, self._buffer, self._offset = True, 0, 0

    def __exit__(self, *error: object) -> None:
        self._active = False

    def free(self) -> None:
        """Return the buffers to the operating system. New ones are allocated when needed."""
        if self._buffers:
            self._buffers = []
            trim_heap()

    def __call__(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Return an uninitialized tensor (rows, columns) with the dtype of `like`."""
        if not self._active:
            return allocate_from_heap(rows, columns, like)
        size = -(-rows * columns * like.element_size() // CACHE_LINE) * CACHE_LINE
        while self._buffer < len(self._buffers) and self._offset + size > len(self._buffers[self._buffer]):
            self._buffer, self._offset = self._buffer + 1, 0
        if self._buffer == len(self._buffers):
            self._buffers.append(_new_buffer(size))
        offset, self._offset = self._offset, self._offset + size
        memory = self._buffers[self._buffer].untyped_storage()  # not a view: views share one version counter
        return like.new_empty(0).set_(memory, offset // like.element_size(), (rows, columns), (columns, 1))

    def check_generation(self, generation: int) -> None:
        """Raise RuntimeError if another micro-batch began since `self.generation` had this value."""
        if generation != self.generation:
            raise RuntimeError("the backward of a micro-batch must come before the next one begins")


def _new_buffer(size: int) -> Tensor:
    """Return a buffer of at least `size` bytes. Raises MemoryError."""
    for min_size in BUFFER_SIZES:
        try:
            return torch.frombuffer(map_pages(max(size, min_size)), dtype=torch.uint8)
        except OSError:
            continue
    raise MemoryError(f"cannot allocate {size >> 20} MiB for the activations of a micro-batch")


def copy_to_device(arrays: Sequence[Any], device: torch.device) -> list[Tensor]:
    """Copy NumPy arrays of any shapes and dtypes to the device without blocking the host.

    For a GPU they are copied together from one buffer of pinned memory. PyTorch keeps it until the copy has finished.
    """
    arrays = [np.ascontiguousarray(array) for array in arrays]
    if device.type != "cuda":
        return [torch.from_numpy(array).to(device) for array in arrays]
    sizes = [-(-array.nbytes // COPY_ALIGNMENT) * COPY_ALIGNMENT for array in arrays]
    *offsets, end = accumulate(sizes, initial=0)
    host = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    host_bytes = host.numpy()
    for array, offset in zip(arrays, offsets, strict=True):
        host_bytes[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
    copied = host.to(device, non_blocking=True)
    return [
        copied[offset : offset + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, offset in zip(arrays, offsets, strict=True)
    ]


def copy_like(arrays: Sequence[Any], like: Tensor) -> list[Tensor]:
    """Copy arrays to the device of a tensor, like copy_to_device; floating-point ones in its dtype, fp32 or fp64."""
    dtype = np.float64 if like.dtype == torch.float64 else np.float32
    arrays = [np.asarray(array) for array in arrays]
    return copy_to_device([x.astype(dtype) if x.dtype.kind == "f" else x for x in arrays], like.device)
