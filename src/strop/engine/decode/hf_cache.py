"""Keys and values: of the requests that are being answered, a row each, and of texts while they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from strop.engine.train.transfer import sent

GROWTH = 64  # positions added at once, at least; a quarter of what is there, as each time all of it is copied

Kv = list[tuple[Tensor, Tensor]]  # a layer each: keys and values (1, heads, positions, size)


class Reading(Cache):  # type: ignore[misc]
    """Receives the keys and values of one forward pass, behind those of a past."""

    def __init__(self, past: Kv) -> None:
        super().__init__(layers=[])
        self.past = past
        self.read: Kv = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        assert layer_idx == len(self.read), "a layer that shares the keys of another"
        self.read.append((key_states, value_states))
        if not self.past:
            return key_states, value_states
        keys, values = self.past[layer_idx]
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)


class Slots(Cache):  # type: ignore[misc]
    """Row i holds `lengths[i]` positions, from the left. Rows in use come first; buffers grow as they must.

    A forward pass between two calls of `advance` writes one position a row.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._rows = self._at = torch.empty(0)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def width(self) -> int:
        """Positions that attention sees in the next pass, the new one included."""
        return max(self.lengths, default=0) + 1

    def add(self, kv: Kv) -> None:
        """One row more, at the end."""
        length = kv[0][0].shape[2]
        if not self._keys:
            self._keys = [keys.new_zeros(0, keys.shape[1], 0, keys.shape[3]) for keys, _ in kv]
            self._values = [values.new_zeros(0, values.shape[1], 0, values.shape[3]) for _, values in kv]
        row = len(self.lengths)
        self._fit(row + 1, max(length + 1, self.width))
        for into, (keys, _) in zip(self._keys, kv, strict=True):
            into[row, :, :length] = keys[0]
        for into, (_, values) in zip(self._values, kv, strict=True):
            into[row, :, :length] = values[0]
        self.lengths.append(length)

    def take(self, row: int) -> Kv:
        """A copy of what a row holds."""
        length = self.lengths[row]
        pairs = zip(self._keys, self._values, strict=True)
        return [
            (keys[row : row + 1, :, :length].clone(), values[row : row + 1, :, :length].clone())
            for keys, values in pairs
        ]

    def wipe(self, row: int) -> None:
        for buffer in (*self._keys, *self._values):
            buffer[row].zero_()

    def remove(self, row: int) -> None:
        """The last row takes its place. With the last request the buffers go too."""
        last = len(self.lengths) - 1
        if last == 0:
            self.lengths, self._keys, self._values = [], [], []
            return
        if row != last:
            length = self.lengths[last]
            for buffer in (*self._keys, *self._values):
                buffer[row, :, :length] = buffer[last, :, :length]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def begin(self, device: torch.device) -> Tensor:
        """Makes room for one position a row; gives where they go, (rows, 1)."""
        self._fit(len(self.lengths), self.width)
        self._rows = torch.arange(len(self.lengths), device=device)
        (self._at,) = sent([np.array(self.lengths, dtype=np.int64)], device)
        return self._at[:, None]

    def advance(self) -> None:
        self.lengths = [length + 1 for length in self.lengths]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[self._rows, :, self._at] = key_states[:, :, 0]
        values[self._rows, :, self._at] = value_states[:, :, 0]
        rows, width = len(self.lengths), self.width
        return keys[:rows, :, :width], values[:rows, :, :width]

    def _fit(self, rows: int, width: int) -> None:
        had_rows, _, had_width, _ = self._keys[0].shape
        if rows <= had_rows and width <= had_width:
            return
        new_rows = max(rows, had_rows)
        wanted = max(width, had_width + had_width // 4) if width > had_width else had_width
        new_width = max(-(-wanted // GROWTH) * GROWTH, had_width)
        self._keys = [_grown(buffer, new_rows, new_width) for buffer in self._keys]
        self._values = [_grown(buffer, new_rows, new_width) for buffer in self._values]


def _grown(buffer: Tensor, rows: int, width: int) -> Tensor:
    grown = buffer.new_zeros(rows, buffer.shape[1], width, buffer.shape[3])
    grown[: buffer.shape[0], :, : buffer.shape[2]] = buffer
    return grown


def side_by_side(parts: Sequence[Kv]) -> Kv:
    """Several texts' keys and values as one text's; [] where there are none."""
    parts = [part for part in parts if part]
    if len(parts) < 2:
        return parts[0] if parts else []
    return [
        (torch.cat([part[layer][0] for part in parts], 2), torch.cat([part[layer][1] for part in parts], 2))
        for layer in range(len(parts[0]))
    ]


def cut(kv: Kv, start: int, end: int) -> Kv:
    """Positions start to end, as views."""
    return [(keys[:, :, start:end], values[:, :, start:end]) for keys, values in kv]
