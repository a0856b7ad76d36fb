"""Which rows make which step: a stream of batches that can stop anywhere and go on exactly there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one optimizer step.

    rows: indices of rows. epoch: from 0. index: the step, from 0, over all epochs.
    position: where a stream goes on after this batch (BatchStream's `position`).
    """

    rows: tuple[int, ...]
    epoch: int
    index: int
    position: dict[str, int]


class BatchStream:
    """Batches of `batch_size` row indices out of `num_rows`, each row once an epoch, in an order of (seed, epoch).

    Ends after `max_steps`, or else after `epochs` (a part of an epoch, such as 0.5, counts in whole batches,
    rounded up). The last batch of an epoch may be smaller; it is never dropped.
    position: the `position` of a batch of a stream with the same arguments; the stream goes on after it.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        batch_size: int,
        seed: int,
        epochs: float = 1.0,
        max_steps: int | None = None,
        position: Mapping[str, int] | None = None,
    ) -> None:
        assert num_rows > 0 and batch_size > 0, "a stream needs rows"
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = math.ceil(num_rows / batch_size)
        # 1e-9: a third of 3 epochs is not 1 step more for the last bit of a float
        self.total_steps = max_steps or max(1, math.ceil(epochs * self.steps_per_epoch - 1e-9))
        self._next = 0
        if position is not None:
            here = self.position_of(position["step"])
            assert dict(position) == here, f"a position of another stream: {dict(position)}, here {here}"
            self._next = position["step"]

    @property
    def position(self) -> dict[str, int]:
        """A small JSON-able state of what comes next."""
        return self.position_of(self._next)

    def order(self, epoch: int) -> list[int]:
        """The rows of an epoch in order: a pure function of (seed, epoch)."""
        # sorted by raw random bits: numpy promises the same bits for ever, not the same permutation()
        keys = np.random.PCG64([self.seed, epoch]).random_raw(self.num_rows)
        order: list[int] = np.argsort(keys, kind="stable").tolist()
        return order

    def __len__(self) -> int:
        """Batches still to come."""
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
        """The rows of any step."""
        return self._rows(self.order(step // self.steps_per_epoch), step)

    def position_of(self, step: int) -> dict[str, int]:
        """The position of a stream like this one of which `step` batches have been used."""
        return {"step": step, "rows": self.num_rows, "batch_size": self.batch_size, "seed": self.seed}

    def _rows(self, order: list[int], step: int) -> tuple[int, ...]:
        start = (step % self.steps_per_epoch) * self.batch_size
        return tuple(order[start : start + self.batch_size])


# ---- from strop.data.packing ----
"""Which rows share a row of tokens or a micro-batch. Pure functions of lengths."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: indices of rows by pack, no pack above `budget` tokens.

    Deterministic: longest first, ties by index, each row into the fullest pack that still has room
    (at most 11/9 of the best number of packs: Johnson 1973). A row above the budget is a fault of the caller.
    """
    assert all(0 < length <= budget for length in lengths), "a row longer than the budget"
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens free, pack), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[i], -1))
        free, k = room.pop(at) if at < len(room) else (budget, len(packs))
        if k == len(packs):
            packs.append([])
        packs[k].append(i)
        if free > lengths[i]:
            insort(room, (free - lengths[i], k))
    return packs


def group_by_length(lengths: Sequence[int], *, tokens: int | None = None, rows: int | None = None) -> list[list[int]]:
    """Cut a batch into micro-batches of like length: indices by micro-batch, longest rows first.

    A micro-batch has at most `rows` rows, and at most `tokens` tokens with padding (a single row longer than
    that stands alone). Every row is in exactly one micro-batch.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        group = groups[-1] if groups else []
        full = rows is not None and len(group) >= rows
        full = full or (tokens is not None and bool(group) and (len(group) + 1) * lengths[group[0]] > tokens)
        if group and not full:
            group.append(i)
        else:
            groups.append([i])
    return groups
