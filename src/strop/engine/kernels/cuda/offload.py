"""Offload the inputs of checkpointed layers to host memory until they are recomputed in the backward.

Copies run on a separate stream, in parallel with the computation: an input is copied out while its layer is computed,
and back while the following layer is recomputed. The device holds two inputs at a time, and the host never waits.

Device memory is released once the device's stream has waited for the copy. With record_stream it would be released only
when the host sees that the copy has finished, and the host runs ahead of the device by a whole micro-batch.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from strop.models import pinned


class OffloadedInput:
    """The input of one layer.

    previous: the input of the preceding layer, which is fetched while this one is used. keep_on_device: do not offload
    the input. This is for the last layer, whose input the backward needs first.
    """

    def __init__(self, x: Tensor, host: HostMemory, previous: OffloadedInput | None, keep_on_device: bool) -> None:
        self.shape, self.dtype = x.shape, x.dtype
        self.pieces: list[Tensor] = []
        self._host, self._previous = host, previous
        self._on_device: Tensor | None = x if keep_on_device else None
        self._ready: Any = None
        if not keep_on_device:
            self.pieces = host.copy_out(x)

    def fetch(self) -> None:
        if self._on_device is None:
            self._on_device, self._ready = self._host.copy_back(self)

    def get(self) -> Tensor:
        """Return the input on the device, and start to fetch the previous one."""
        self.fetch()
        x = self._on_device
        assert x is not None
        if self._ready is not None:
            self._host.wait_for(self._ready)
        if self._previous is not None:
            self._previous.fetch()
        if self.pieces:
            self._on_device = None
        self._ready = self._previous = None
        return x

    def __del__(self) -> None:
        if self._ready is not None:  # fetched and not used: the memory must not be freed during the copy
            self._host.wait_for(self._ready)
        self._host.free += self.pieces


class HostMemory:
    """Pinned memory for the inputs of layers. Its pieces are reused from one micro-batch to the next."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._copy_stream: Any = cast(Any, torch.cuda.Stream)(device) if self._cuda else None
        self.free: list[Tensor] = []
        self._newest: OffloadedInput | None = None
        self._copying: tuple[Tensor, Any] | None = None

    def begin(self) -> None:
        """Begin a micro-batch. Discards the state of a micro-batch that failed."""
        self._newest = self._copying = None

    def offload_inputs(self, *, last: bool) -> saved_tensors_hooks:
        """Return a context in which the input of a checkpointed layer is offloaded. last: it is the last layer."""

        def pack(x: Tensor) -> Any:
            if not x.is_floating_point():  # row indices
                return x
            offloaded = self._newest = OffloadedInput(x.detach(), self, self._newest, last)
            if last:
                self._newest = None
                self._finish_copy()
            return offloaded

        return saved_tensors_hooks(pack, lambda saved: saved.get() if isinstance(saved, OffloadedInput) else saved)

    def copy_out(self, x: Tensor) -> list[Tensor]:
        """Start the copy to the host, and return the pieces that will hold x."""
        source, pieces = _as_bytes(x.contiguous()), []
        self._finish_copy()
        if self._cuda:
            self._copy_stream.wait_stream(self._current_stream())
        with self._on_copy_stream():
            for begin in range(0, len(source), pinned.PIECE):
                part = source[begin : begin + pinned.PIECE]
                pieces.append(self._take_piece())
                pieces[-1][: len(part)].copy_(part, non_blocking=True)
        if self._cuda:
            self._copying = source, self._copy_stream.record_event()
        return pieces

    def copy_back(self, offloaded: OffloadedInput) -> tuple[Tensor, Any]:
        """Start the copy to the device, and return the tensor and the event that marks the end of the copy."""
        x = torch.empty(offloaded.shape, dtype=offloaded.dtype, device=self._device)
        target = _as_bytes(x)
        if self._cuda:
            self._copy_stream.wait_stream(self._current_stream())  # earlier work may still use this memory
        with self._on_copy_stream():
            for i, piece in enumerate(offloaded.pieces):
                part = target[i * pinned.PIECE : (i + 1) * pinned.PIECE]
                part.copy_(piece[: len(part)], non_blocking=True)
        return x, self._copy_stream.record_event() if self._cuda else None

    def wait_for(self, event: Any) -> None:
        """Make the device's current stream, not the host, wait for the event."""
        self._current_stream().wait_event(event)

    def _finish_copy(self) -> None:
        """Free the device memory of the last input that was copied out, after the stream has waited for the copy."""
        if self._copying is not None:
            self.wait_for(self._copying[1])
            self._copying = None

    def _take_piece(self) -> Tensor:
        """Return a free piece. Raises MemoryError as allocate_piece."""
        return self.free.pop() if self.free else pinned.allocate_piece(self._cuda, "the inputs of checkpointed layers")

    def _current_stream(self) -> Any:
        return torch.cuda.current_stream(self._device)

    def _on_copy_stream(self) -> Any:
        return torch.cuda.stream(self._copy_stream) if self._cuda else nullcontext()


def _as_bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)
