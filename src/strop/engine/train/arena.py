"""Memory for what a micro-batch keeps for its backward pass, on a CPU: taken from the front to the end of a buffer.

What is kept lives from its layer's forward to its layer's backward, and micro-batches are of all lengths. In the C
library's heap that leaves holes which nothing fits (docs/log has what they took).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from strop.machine.memory import map_pages, trim_heap

ALIGNED = 64  # bytes: a cache line, and a vector of the widest instructions
ROOMS = 1 << 30, 64 << 20, 0  # bytes of a buffer at least, the first that can be had
New = Callable[[int, int, Tensor], Tensor]  # (rows, width, like) -> a tensor of any numbers


def in_heap(rows: int, width: int, like: Tensor) -> Tensor:
    """(rows, width) of the type and on the device of `like`, of any numbers."""
    return like.new_empty(rows, width)


class Arena:
    """Gives tensors that hold until the next micro-batch begins, or the next layer that is computed again. Its buffers'
    pages count from their first use, and stay: a micro-batch that is larger than all before takes only what it needs
    more (to get and clear the pages of all anew took a seventh of such a step)."""

    def __init__(self) -> None:
        self.round = 0
        self._buffers: list[Tensor] = []
        self._open, self._buffer, self._at = False, 0, 0

    def begin(self, *, used: bool) -> None:
        """A micro-batch begins. used: what it keeps, it keeps until its backward, and what the one before has kept is
        gone; else the heap is the better place."""
        self.round += used
        self._open, self._buffer, self._at = used, 0, 0
        if not used:
            self._buffers = []

    def __enter__(self) -> None:
        """From here on a layer of this micro-batch is computed again: what it keeps, it keeps until its backward, and
        what the one before has kept is gone. A graph that is gone through twice enters it twice."""
        self._open, self._buffer, self._at = True, 0, 0

    def __exit__(self, *error: object) -> None:
        self._open = False

    def drop(self) -> None:
        """Gives the buffers back to the system; they come again as they are needed."""
        if self._buffers:
            self._buffers = []
            trim_heap()

    def __call__(self, rows: int, width: int, like: Tensor) -> Tensor:
        """(rows, width) of the type of `like`, of any numbers."""
        if not self._open:
            return in_heap(rows, width, like)
        size = -(-rows * width * like.element_size() // ALIGNED) * ALIGNED
        while self._buffer < len(self._buffers) and self._at + size > len(self._buffers[self._buffer]):
            self._buffer, self._at = self._buffer + 1, 0
        if self._buffer == len(self._buffers):
            self._buffers.append(_buffer(size))
        at, self._at = self._at, self._at + size
        memory = self._buffers[self._buffer].untyped_storage()  # a tensor of its own on it: views would share a version
        return like.new_empty(0).set_(memory, at // like.element_size(), (rows, width), (width, 1))

    def check(self, round: int) -> None:
        """For a backward: raises RuntimeError where the micro-batch of this round is no longer the newest."""
        if round != self.round:
            raise RuntimeError("the backward of a micro-batch must come before the next one begins")


def _buffer(size: int) -> Tensor:
    """Bytes, at least so many. Raises MemoryError."""
    for room in ROOMS:
        try:
            return torch.frombuffer(map_pages(max(size, room)), dtype=torch.uint8)
        except OSError:
            continue
    raise MemoryError(f"no {size >> 20} MiB for what a micro-batch keeps")
