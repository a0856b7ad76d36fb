"""A frozen base in host memory, of which a GPU holds two layers at a time.

Decoder layers are copied to the GPU in turn, into two buffers: one is computed while the next is copied into the other.
Copies run on a stream of their own, and the GPU waits for them, not the host. Nothing is copied back, because the
weights do not change. Embedding and output head stay on the GPU.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from strop.models import pinned
from strop.models.sharding import (
    EMBEDDING,
    HEAD,
    ModuleKey,
    ShardedTensor,
    assign_views,
    in_layer_order,
    load_by_layer,
)
from strop.models.source import Source
from strop.models.tensor_files import check_finite

LOG = logging.getLogger(__name__)

NUM_BUFFERS = 2


class CopyAhead:
    """Copies each layer before it is computed, and the next one meanwhile. The interface of plain.WeightGatherer.

    Layer i is always computed in buffer i % 2, so tensors that autograd saved are valid again after the next copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.modules: dict[ModuleKey, nn.Module] = {}
        self._device, self._cuda = device, device.type == "cuda"
        self._stream: Any = cast(Any, torch.cuda.Stream)(device) if self._cuda else None
        self._pieces: list[Tensor] = []  # of host memory; each layer follows the one before it
        self._layers: list[tuple[int, int, list[ShardedTensor]]] = []  # begin and end in host memory
        self._buffers = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(NUM_BUFFERS)]
        self._held: list[int | None] = [None] * NUM_BUFFERS  # the layer in each buffer, or on its way there
        self._copied: list[Any] = [None] * NUM_BUFFERS  # marks the end of a copy that nothing has waited for
        self._last: int | None = None
        self._waits: deque[tuple[Any, Any]] = deque()  # events before and after a wait
        self._waited_s = 0.0

    def add(self, tensors: Sequence[ShardedTensor]) -> None:
        """Read the next layer into host memory, and set its tensors to views of a buffer.

        Raises ModelError for NaN or infinity, and MemoryError if the host has no room.
        """
        begin = end = self._layers[-1][1] if self._layers else 0
        tensors = in_layer_order(tensors)
        for tensor in tensors:
            data = tensor.read(0, tensor.size)
            check_finite(data.view(tensor.dtype), f"weight {tensor.name}")
            while len(self._pieces) * pinned.PIECE < end + len(data):
                self._pieces.append(pinned.allocate_piece(self._cuda, "the layers of the base"))
            self._copy(data, end, to_host=True)
            end += len(data)
        slot = len(self._layers) % NUM_BUFFERS
        self._layers.append((begin, end, tensors))
        if end - begin > len(self._buffers[slot]):
            self._buffers[slot] = torch.empty(end - begin, dtype=torch.uint8, device=self._device)
            for _, _, others in self._layers[slot::NUM_BUFFERS]:
                assign_views(others, self._buffers[slot])
        else:
            assign_views(tensors, self._buffers[slot])

    def __call__(self, key: ModuleKey) -> None:
        """Have the GPU wait for a layer, and begin to copy the one that is needed next."""
        if not isinstance(key, int):
            return
        if key == 0:
            self._add_waits()
        self._begin_copy(key)
        self._wait_for(key % NUM_BUFFERS)
        is_forward = key == 0 or self._last is None or key > self._last
        if key != self._last:
            self._last, following = key, key + (1 if is_forward else -1)
            if following == len(self._layers) and not torch.is_grad_enabled():  # the next pass is a forward again
                following = 0
            if 0 <= following < len(self._layers) and following % NUM_BUFFERS != key % NUM_BUFFERS:
                self._begin_copy(following)

    @property
    def waited_s(self) -> float:
        """Seconds in which the GPU waited for a copy."""
        if self._waits:
            torch.cuda.synchronize(self._device)
            self._add_waits()
        return self._waited_s

    def describe(self) -> str:
        return f"the GPU waited {self.waited_s:.1f} s for weights from host memory"

    def report(self) -> dict[str, float]:
        """Return the fields of report.json."""
        return {"copy_wait_s": self.waited_s}

    def _begin_copy(self, number: int) -> None:
        slot = number % NUM_BUFFERS
        if self._held[slot] == number:
            return
        self._held[slot], (begin, end, _) = number, self._layers[number]
        if self._cuda:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # which may still compute in this buffer
        with torch.cuda.stream(self._stream) if self._cuda else nullcontext():
            self._copy(self._buffers[slot][: end - begin], begin, to_host=False)
        if self._cuda:
            self._copied[slot] = self._stream.record_event()

    def _copy(self, data: Tensor, begin: int, *, to_host: bool) -> None:
        """Copy bytes to or from host memory, at this offset."""
        done = 0
        while done < len(data):
            number, start = divmod(begin + done, pinned.PIECE)
            count = min(len(data) - done, pinned.PIECE - start)
            part, stored = data[done : done + count], self._pieces[number][start : start + count]
            if to_host:
                stored.copy_(part)
            else:
                part.copy_(stored, non_blocking=True)
            done += count

    def _wait_for(self, slot: int) -> None:
        event, self._copied[slot] = self._copied[slot], None
        if event is not None:
            stream = torch.cuda.current_stream(self._device)
            before, after = (cast(Any, torch.cuda.Event)(enable_timing=True) for _ in range(2))
            before.record(stream)
            stream.wait_event(event)
            after.record(stream)
            self._waits.append((before, after))

    def _add_waits(self) -> None:
        while self._waits and self._waits[0][1].query():
            before, after = self._waits.popleft()
            self._waited_s += before.elapsed_time(after) / 1e3


def load_from_host(
    source: Source, dtype: torch.dtype, device: str, *, quantization: str = "none", double: bool = True
) -> tuple[nn.Module, CopyAhead]:
    """Return the model in eval mode on a device, with its decoder layers in host memory, and what copies them.

    The model's own forward copies them too. Raises ModelError as `load_base`, and MemoryError if the host has no room.
    """
    LOG.info("reading the weights of %s into host memory", source.name)
    ahead = CopyAhead(torch.device(device))

    def place(name: str, tensors: Sequence[ShardedTensor]) -> None:
        if name.startswith("layer "):
            ahead.add(tensors)
            return
        for tensor in tensors:
            data = tensor.read(0, tensor.size).to(device)
            check_finite(data.view(tensor.dtype), f"weight {tensor.name}")
            tensor.assign(data.view(tensor.dtype).view(*tensor.shape))

    model, _, modules = load_by_layer(source, dtype, device, place, quantization=quantization, double=double)
    ahead.modules = modules
    for key, module in modules.items():
        if key not in (EMBEDDING, HEAD):
            module.register_forward_pre_hook(lambda *_, key=key: ahead(key))
    cast(Any, model).weight_gatherer = ahead  # for a step without the model's own forward
    return model, ahead
