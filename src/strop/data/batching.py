"""Shuffle rows into batches, and split a batch into micro-batches, packed or grouped by length."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one optimizer step."""

    rows: tuple[int, ...]  # row indices
    epoch: int
    index: int  # the step, from 0, over all epochs
    position: dict[str, int]  # BatchStream.position after this batch


class BatchStream:
    """Iterate over batches of row indices: each row once per epoch, shuffled by (seed, epoch).

    The stream ends after `max_steps` if given, otherwise after `epochs`. A fraction of an epoch is rounded up to whole
    batches. The last batch of an epoch may be smaller. To resume after a batch, pass its `position` and the same other
    arguments.
    """

    def __init__(
        self, num_rows: int, *, batch_size: int, seed: int, epochs: float = 1.0, max_steps: int | None = None,
        position: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        assert num_rows > 0 and batch_size > 0, "a stream needs rows"
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = math.ceil(num_rows / batch_size)
        # 1e-9: the product may be rounded up (1.1 * 10 = 11.000000000000002), which must not add a step
        self.total_steps = max_steps or max(1, math.ceil(epochs * self.steps_per_epoch - 1e-9))
        self._next = 0
        if position is not None:
            expected = self.position_of(position["step"])
            assert dict(position) == expected, f"the position {dict(position)} is of another stream, not {expected}"
            self._next = position["step"]

    def count_evaluations(self, eval_steps: int | None) -> int:
        """Return how often held-out rows are evaluated: every `eval_steps` (None: after each epoch), and at the end."""
        return math.ceil(self.total_steps / (eval_steps or self.steps_per_epoch))

    @property
    def position(self) -> dict[str, int]:
        return self.position_of(self._next)

    def order(self, epoch: int) -> list[int]:
        """Return the row indices of an epoch in order. They depend only on (seed, epoch)."""
        # numpy guarantees the same random bits in every version, but not the same result of permutation()
        keys = np.random.PCG64([self.seed, epoch]).random_raw(self.num_rows)
        order: list[int] = np.argsort(keys, kind="stable").tolist()
        return order

    def __len__(self) -> int:
        """Number of remaining batches."""
        return self.total_steps - self._next

    def __iter__(self) -> Iterator[Batch]:
        epoch, order = -1, []
        while self._next < self.total_steps:
            step = self._next
            if epoch != step // self.steps_per_epoch:
                epoch = step // self.steps_per_epoch
                order = self.order(epoch)
            self._next += 1
            yield Batch(self._rows(order, step), epoch, step, self.position)

    def rows(self, step: int) -> tuple[int, ...]:
        return self._rows(self.order(self.epoch_of(step)), step)

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def position_of(self, step: int) -> dict[str, int]:
        """Return the position of this stream after `step` batches."""
        return {"step": step, "rows": self.num_rows, "batch_size": self.batch_size, "seed": self.seed}

    def _rows(self, order: list[int], step: int) -> tuple[int, ...]:
        start = (step % self.steps_per_epoch) * self.batch_size
        return tuple(order[start : start + self.batch_size])


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Pack rows with best-fit decreasing: return the row indices of each pack of at most `budget` tokens.

    The result is deterministic: longest row first, ties by index, each row into the fullest pack with enough room.
    It has at most 11/9 of the optimal number of packs, plus a constant (Johnson 1973). No row may be longer than
    `budget`.
    """
    assert all(0 < length <= budget for length in lengths), "a row longer than the budget"
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        position = bisect_left(room, (lengths[i], -1))
        free, k = room.pop(position) if position < len(room) else (budget, len(packs))
        if k == len(packs):
            packs.append([])
        packs[k].append(i)
        if free > lengths[i]:
            insort(room, (free - lengths[i], k))
    return packs


def in_row_order(batches: Sequence[Sequence[int]], parts: Sequence[Sequence[T]]) -> list[T]:
    """Return the values of rows 0, 1, ... from those of batches. batches: the rows of each value in `parts`."""
    pairs = zip(batches, parts, strict=True)
    by_row = {row: value for batch, part in pairs for row, value in zip(batch, part, strict=True)}
    return [by_row[row] for row in range(len(by_row))]


def group_by_length(lengths: Sequence[int], *, tokens: int | None = None, rows: int | None = None) -> list[list[int]]:
    """Split a batch into micro-batches of similar length: return the row indices of each, longest rows first.

    tokens: maximum number of tokens in a micro-batch, padding included; a longer row gets a separate micro-batch.
    rows: maximum number of rows in a micro-batch.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        group = groups[-1] if groups else []
        has_room = bool(group) and (rows is None or len(group) < rows)
        if has_room and (tokens is None or (len(group) + 1) * lengths[group[0]] <= tokens):
            group.append(i)
        else:
            groups.append([i])
    return groups
