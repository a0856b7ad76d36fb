"""Inputs of layers that are computed again, in the host's memory until their layer's turn in the backward.

Copies go over the bus beside the computing, on a stream of their own: an input leaves while its layer is computed, and
comes back while the layer behind it is computed again. The device holds two at a time. The host waits for nothing.

Memory of the device is only given back once its own stream has waited for the copy: the allocator's other way
(record_stream) asks the host whether the copy is done, which is a whole micro-batch ahead of it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from strop.machine.probe import free_bytes

LEFT = 1 << 30  # bytes of the host's memory that stay free
PIECE = 32 << 20  # bytes: PyTorch gives pinned memory in powers of two, and keeps it


class Waiting:
    """One layer's input. before: that of the layer in front, which comes while this one is used. stays: it is not
    copied, as it is wanted first."""

    def __init__(self, x: Tensor, host: HostMemory, before: Waiting | None, stays: bool) -> None:
        self.shape, self.dtype = x.shape, x.dtype
        self.pieces: list[Tensor] = []
        self._host, self._before = host, before
        self._here: Tensor | None = x if stays else None
        self._ready: Any = None
        if not stays:
            self.pieces = host.take(x)

    def come(self) -> None:
        """Starts the way back."""
        if self._here is None:
            self._here, self._ready = self._host.bring(self)

    def back(self) -> Tensor:
        self.come()
        found = self._here
        assert found is not None
        if self._ready is not None:
            self._host.wait_for(self._ready)
        if self._before is not None:
            self._before.come()
        if self.pieces:
            self._here = None
        self._ready = self._before = None
        return found

    def __del__(self) -> None:
        if self._ready is not None:  # it came, and nobody took it: its memory is not given back under the copy
            self._host.wait_for(self._ready)
        self._host.free += self.pieces


class HostMemory:
    """Where inputs wait: pieces of pinned memory, which serve one micro-batch after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._card = device, device.type == "cuda"
        self._side: Any = cast(Any, torch.cuda.Stream)(device) if self._card else None
        self.free: list[Tensor] = []
        self._newest: Waiting | None = None
        self._leaving: tuple[Tensor, Any] | None = None

    def begin(self) -> None:
        """A micro-batch begins; or has failed."""
        self._newest = self._leaving = None

    def keeping(self, *, last: bool) -> saved_tensors_hooks:
        """Inside it a layer's input waits here in place of being kept; last: no layer behind it is computed again."""

        def pack(x: Tensor) -> Any:
            if not x.is_floating_point():  # which rows go on
                return x
            self._newest = Waiting(x.detach(), self, self._newest, last)
            found = self._newest
            if last:
                self._newest = None
                self._settle()
            return found

        return saved_tensors_hooks(pack, lambda found: found.back() if isinstance(found, Waiting) else found)

    def take(self, x: Tensor) -> list[Tensor]:
        """Pieces that hold x once its copy is done."""
        source, pieces = _bytes(x.contiguous()), []
        self._settle()
        if self._card:
            self._side.wait_stream(self._now())
        with self._beside():
            for begin in range(0, len(source), PIECE):
                part = source[begin : begin + PIECE]
                pieces.append(self._piece())
                pieces[-1][: len(part)].copy_(part, non_blocking=True)
        if self._card:
            self._leaving = source, self._side.record_event()
        return pieces

    def bring(self, waiting: Waiting) -> tuple[Tensor, Any]:
        """What has left, on the device again once the event that comes with it has passed."""
        x = torch.empty(waiting.shape, dtype=waiting.dtype, device=self._device)
        place = _bytes(x)
        if self._card:
            self._side.wait_stream(self._now())  # who had this memory before may not be done
        with self._beside():
            for number, piece in enumerate(waiting.pieces):
                part = place[number * PIECE : (number + 1) * PIECE]
                part.copy_(piece[: len(part)], non_blocking=True)
        return x, self._side.record_event() if self._card else None

    def wait_for(self, event: Any) -> None:
        """What is computed from here on, not the host, waits for the event."""
        self._now().wait_event(event)

    def _settle(self) -> None:
        """Gives back the memory of the input that was leaving: what comes next waits until it has left."""
        if self._leaving is not None:
            self.wait_for(self._leaving[1])
            self._leaving = None

    def _piece(self) -> Tensor:
        """Raises MemoryError before the host runs full: the system would end the process without a word."""
        if self.free:
            return self.free.pop()
        if (left := free_bytes()) < LEFT + PIECE:
            raise MemoryError(f"out of memory on the host: {left / 2**20:,.0f} MiB left, for inputs of layers")
        return torch.empty(PIECE, dtype=torch.uint8, pin_memory=self._card)

    def _now(self) -> Any:
        return torch.cuda.current_stream(self._device)

    def _beside(self) -> Any:
        return torch.cuda.stream(self._side) if self._card else nullcontext()


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)
