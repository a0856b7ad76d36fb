"""Find groups of rows that begin with the same tokens, which are computed only once for each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from strop.data.types import Ids

MIN_PREFIX = 8  # tokens; sharing a shorter prefix saves less than its additional attention call costs


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Indices of rows, ascending, and the number of tokens that they share, 0 for rows without a shared prefix."""

    rows: tuple[int, ...]
    prefix: int


def group_by_prefix(rows: Sequence[Ids], limits: Sequence[int], share: float = 1.0) -> list[PrefixGroup]:
    """Split rows into groups so that many tokens are saved; the last one may be of rows that share nothing.

    limits: the number of tokens of each row that may be shared. share: of the rows, those that are computed at once.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i].tobytes())  # rows that begin alike are neighbours
    common = [shared_length(rows[i], rows[j]) for i, j in pairwise(order)]

    def close(prefix: int, members: range, inner: list[PrefixGroup]) -> list[PrefixGroup]:
        """Return the groups of `members`, which all share a prefix: those within, or one of rows that stay."""
        prefix = min(prefix, *(limits[order[i]] for i in members))
        if prefix < MIN_PREFIX:
            return inner
        groups = [group for group in inner if saved(len(group.rows), group.prefix) > share * len(group.rows) * prefix]
        taken = {i for group in groups for i in group.rows}
        others = tuple(i for i in members if i not in taken)
        return [*groups, PrefixGroup(others, prefix)] if saved(len(others), prefix) > 0 else inner

    def saved(number: int, prefix: int) -> float:
        return (share * number - 1) * prefix - MIN_PREFIX

    # each entry has rows that share a longer prefix than those of the entry below: its length, their begin, and groups
    stack: list[tuple[int, int, list[PrefixGroup]]] = [(0, 0, [])]
    for end, length in enumerate([*common, 0], 1):
        length = length if length >= MIN_PREFIX else 0
        begin, groups = end - 1, list[PrefixGroup]()
        while stack[-1][0] > length:
            prefix, begin, inner = stack.pop()
            groups = close(prefix, range(begin, end), inner + groups)
        if stack[-1][0] == length:
            stack[-1][2].extend(groups)
        else:
            stack.append((length, begin, groups))
    found = [PrefixGroup(tuple(sorted(order[i] for i in group.rows)), group.prefix) for group in stack[0][2]]
    rest = set(range(len(rows))).difference(*(group.rows for group in found))
    return sorted(found, key=lambda group: group.rows) + ([PrefixGroup(tuple(sorted(rest)), 0)] if rest else [])


def shared_length(left: Any, right: Any) -> int:
    """Return the length of the common prefix of two arrays."""
    size = min(len(left), len(right))
    differs = np.flatnonzero(left[:size] != right[:size])
    return int(differs[0]) if len(differs) else size
