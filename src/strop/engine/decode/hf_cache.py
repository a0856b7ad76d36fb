"""KV caches for a model's own forward: for prompts, for decoding sequences, and for the prefixes of later sequences."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from strop.data.types import Ids
from strop.engine.train.buffers import copy_to_device

GROWTH = 64  # positions; buffers have multiples of this size
MIN_SHARED = 32  # tokens; processing a shorter prefix again is as fast as reusing it

Kv = list[tuple[Tensor, Tensor]]  # keys and values of each layer, (1, heads, positions, size)


class PrefillCache(Cache):  # type: ignore[misc]
    """Cache of one forward pass over prompts. past: earlier keys and values. new: those of this pass."""

    def __init__(self, past: Kv) -> None:
        super().__init__(layers=[])
        self.past = past
        self.new: Kv = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        assert layer_idx == len(self.new), "a layer that shares the keys of another"
        self.new.append((key_states, value_states))
        if not self.past:
            return key_states, value_states
        keys, values = self.past[layer_idx]
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)


class DecodeCache(Cache):  # type: ignore[misc]
    """Cache of decoding sequences. Row i has `lengths[i]` positions.

    Each forward pass adds one position to each row. Call `start_step` before and `finish_step` after it.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._rows = self._positions = torch.empty(0)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def width(self) -> int:
        """The number of positions in the next pass, with the new one."""
        return max(self.lengths, default=0) + 1

    def add(self, kv: Kv) -> None:
        """Add a row at the end."""
        length = kv[0][0].shape[2]
        keys, values = zip(*kv, strict=True)
        if not self._keys:
            self._keys, self._values = (
                [x.new_zeros(0, x.shape[1], 0, x.shape[3]) for x in part] for part in (keys, values)
            )
        row = len(self.lengths)
        self._grow(row + 1, max(length + 1, self.width))
        for buffer, x in zip((*self._keys, *self._values), (*keys, *values), strict=True):
            buffer[row, :, :length] = x[0]
        self.lengths.append(length)

    def copy_row(self, row: int) -> Kv:
        length = self.lengths[row]
        return [
            (keys[row : row + 1, :, :length].clone(), values[row : row + 1, :, :length].clone())
            for keys, values in zip(self._keys, self._values, strict=True)
        ]

    def clear_row(self, row: int) -> None:
        """Set a row to zero, because NaN in masked positions would affect the next sequence in this row."""
        for buffer in (*self._keys, *self._values):
            buffer[row].zero_()

    def remove(self, row: int) -> None:
        """Remove a row, and move the last row to its index. Without rows the buffers are freed."""
        last, length = len(self.lengths) - 1, self.lengths[-1]
        if row != last:
            for buffer in (*self._keys, *self._values):
                buffer[row, :, :length] = buffer[last, :, :length]
            self.lengths[row] = length
        self.lengths.pop()
        if not self.lengths:
            self._keys, self._values = [], []

    def start_step(self, device: torch.device) -> Tensor:
        """Reserve space for one position in each row, and return the new positions, (rows, 1)."""
        self._grow(len(self.lengths), self.width)
        self._rows = torch.arange(len(self.lengths), device=device)
        (self._positions,) = copy_to_device([np.array(self.lengths, dtype=np.int64)], device)
        return self._positions[:, None]

    def finish_step(self) -> None:
        self.lengths = [length + 1 for length in self.lengths]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[self._rows, :, self._positions] = key_states[:, :, 0]
        values[self._rows, :, self._positions] = value_states[:, :, 0]
        rows, width = len(self.lengths), self.width
        return keys[:rows, :, :width], values[:rows, :, :width]

    def _grow(self, rows: int, width: int) -> None:
        old_rows, _, old_width, _ = self._keys[0].shape
        if rows <= old_rows and width <= old_width:
            return
        new_rows, new_width = max(rows, old_rows), old_width
        if width > old_width:  # by at least a quarter, because all rows are copied
            new_width = -(-max(width, old_width + old_width // 4) // GROWTH) * GROWTH

        def enlarge(buffer: Tensor) -> Tensor:
            enlarged = buffer.new_zeros(new_rows, buffer.shape[1], new_width, buffer.shape[3])
            enlarged[: buffer.shape[0], :, : buffer.shape[2]] = buffer
            return enlarged

        self._keys, self._values = list(map(enlarge, self._keys)), list(map(enlarge, self._values))


class PrefixCache:
    """An LRU cache with the keys and values of finished sequences, for later sequences with the same prefix.

    max_tokens: capacity.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._entries: OrderedDict[tuple[str | None, bytes], tuple[Ids, Kv]] = OrderedDict()

    def add(self, adapter: str | None, ids: Ids, kv: Kv) -> None:
        if len(ids) < MIN_SHARED or len(ids) > self._max_tokens:
            return
        for key, (known, _) in list(self._entries.items()):  # prefixes of the new sequence are redundant
            if key[0] == adapter and len(known) <= len(ids) and np.array_equal(known, ids[: len(known)]):
                del self._entries[key]
        self._entries[adapter, ids.tobytes()] = (ids, kv)
        while sum(len(known) for known, _ in self._entries.values()) > self._max_tokens:
            self._entries.popitem(last=False)

    def find(self, adapter: str | None, ids: Ids) -> Kv:
        """Return the longest cached prefix of `ids` without the last token, or [] if it is shorter than MIN_SHARED."""
        best, longest = None, MIN_SHARED - 1
        for key, (known, _) in self._entries.items():
            if key[0] != adapter:
                continue
            width = min(len(known), len(ids) - 1)
            differing = np.nonzero(known[:width] != ids[:width])[0]
            num_shared = int(differing[0]) if len(differing) else width
            if num_shared > longest:
                best, longest = key, num_shared
        if best is None:
            return []
        self._entries.move_to_end(best)
        return slice_kv(self._entries[best][1], 0, longest)


def kv_length(kv: Kv) -> int:
    return int(kv[0][0].shape[2]) if kv else 0


def concat_kv(parts: Sequence[Kv]) -> Kv:
    """Concatenate keys and values along the positions. Returns [] if there are none."""
    parts = [part for part in parts if part]
    if len(parts) < 2:
        return parts[0] if parts else []
    return [
        (torch.cat([part[layer][0] for part in parts], 2), torch.cat([part[layer][1] for part in parts], 2))
        for layer in range(len(parts[0]))
    ]


def slice_kv(kv: Kv, start: int, end: int) -> Kv:
    return [(keys[:, :, start:end], values[:, :, start:end]) for keys, values in kv]
