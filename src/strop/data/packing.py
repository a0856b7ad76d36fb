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
