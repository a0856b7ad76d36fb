"""Memory for what a micro-batch keeps for its backward pass, on a CPU: one buffer, taken from its front to its end.

What is kept lives from its layer's forward to its layer's backward, and micro-batches are of all lengths. In the C
library's heap that leaves holes which nothing fits (docs/log has what they took).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from strop.machine.heap import give_back

ALIGNED = 64  # bytes: a cache line, and a vector of the widest instructions
MORE = 64 << 20  # bytes of a further buffer: pages of its own, which count from their first use
New = Callable[[int, int, Tensor], Tensor]  # (rows, width, like) -> a tensor of any numbers


def in_heap(rows: int, width: int, like: Tensor) -> Tensor:
    """(rows, width) of the type and on the device of `like`, of any numbers."""
    return like.new_empty(rows, width)


class Arena:
    """Gives tensors that hold until the next micro-batch begins, or the next layer that is computed again. How much a
    row of a micro-batch needs it learns from the ones before; what finds no place in the buffer lies in another one,
    until the next is large enough."""

    def __init__(self) -> None:
        self.round = 0
        self._buffers: list[Tensor] = []
        self._open, self._rows, self._at = False, 1, 0
        self._used, self._per_row = 0, 0.0

    def begin(self, rows: int, *, used: bool) -> None:
        """A micro-batch of that many rows begins. used: what it keeps, it keeps until its backward, and what the one
        before has kept is gone; else the heap is the better place."""
        self.round += used
        self._open = used
        self._learn(rows)
        if used:
            self._make_room()
        else:
            self._buffers = []

    def __enter__(self) -> None:
        """From here on a layer of this micro-batch is computed again: what it keeps, it keeps until its backward, and
        what the one before has kept is gone. A graph that is gone through twice enters it twice."""
        self._open = True
        self._learn(self._rows)
        self._make_room()

    def __exit__(self, *error: object) -> None:
        self._open = False

    def _learn(self, rows: int) -> None:
        """How much a row has needed, before so many rows come."""
        self._per_row = max(self._per_row, self._used / self._rows)
        self._rows, self._used, self._at = rows, 0, 0

    def _make_room(self) -> None:
        needed = math.ceil(self._per_row * self._rows)
        if len(self._buffers) > 1 or needed > sum(map(len, self._buffers)):
            self.drop()
            self._buffers = [torch.empty(needed, dtype=torch.uint8)]

    def drop(self) -> None:
        """Gives the buffer back to the system; it comes again, as large as is needed then."""
        if self._buffers:
            self._buffers = []
            give_back()

    def __call__(self, rows: int, width: int, like: Tensor) -> Tensor:
        """(rows, width) of the type of `like`, of any numbers."""
        if not self._open:
            return in_heap(rows, width, like)
        size = -(-rows * width * like.element_size() // ALIGNED) * ALIGNED
        self._used += size
        if not self._buffers or self._at + size > len(self._buffers[-1]):
            self._buffers.append(torch.empty(max(size, MORE), dtype=torch.uint8))
            self._at = 0
        at, self._at = self._at, self._at + size
        memory = self._buffers[-1].untyped_storage()  # a tensor of its own on it: views would share one version for all
        return like.new_empty(0).set_(memory, at // like.element_size(), (rows, width), (width, 1))

    def check(self, round: int) -> None:
        """For a backward: raises RuntimeError where the micro-batch of this round is no longer the newest."""
        if round != self.round:
            raise RuntimeError("the backward of a micro-batch must come before the next one begins")
