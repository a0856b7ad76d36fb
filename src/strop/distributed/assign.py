"""Assign work to ranks, and add up results in an order that does not depend on the ranks.

All functions are pure, so that every rank can compute the assignment of all ranks. No torch here.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


def assign_balanced(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Return the indices of each rank, ascending: the most expensive first, each to the rank with the least work.

    Ties go to the lowest rank, and a rank may get none. The largest share is at most 4/3 of the optimum (Graham, 1969).
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = loads[0]
        shares[rank].append(index)
        heapq.heapreplace(loads, (load + costs[index], rank))
    return [sorted(share) for share in shares]


def assign_contiguous(costs: Sequence[float], ranks: int) -> list[range]:
    """Return a contiguous range of indices for each rank: an index's midpoint in the total cost decides its rank."""
    total, before, owners = sum(costs), 0.0, []
    for cost in costs:
        owners.append(min(ranks - 1, int(ranks * (before + cost / 2) / total)))
        before += cost
    return [range(owners.index(rank), owners.index(rank) + owners.count(rank)) if rank in owners else range(0)
            for rank in range(ranks)]  # fmt: skip


class Addable(Protocol):
    def __add__(self: T, other: T, /) -> T: ...


T = TypeVar("T", bound=Addable)


@dataclass
class SumTree(Generic[T]):
    """A sum of `parts` values in pairs, whose order depends on the number of parts only.

    Node (level, i) is the sum of parts i 2^level to (i + 1) 2^level - 1, as far as these exist. A node without a right
    sibling is its own parent. A rank with contiguous parts sends only the largest nodes that cover them.

    nodes: the nodes that are known so far, from left to right: (level, i, value).
    """

    parts: int
    nodes: list[tuple[int, int, T]] = field(default_factory=list)

    def add(self, level: int, i: int, value: T) -> None:
        """Add the next node to the right, and combine nodes where both children are known."""
        height = max(0, (self.parts - 1).bit_length())
        while True:
            last = self.nodes[-1] if self.nodes else None
            if i % 2 and last is not None and last[:2] == (level, i - 1):
                self.nodes.pop()
                value = last[2] + value
            elif i % 2 or level == height or (i + 1) << level < self.parts:
                break  # the left sibling is on another rank, this is the root, or the right sibling is still missing
            level, i = level + 1, i // 2
        self.nodes.append((level, i, value))

    @property
    def total(self) -> T:
        """The sum of all parts, which must all have been added."""
        (root,) = self.nodes
        return root[2]


def nodes_to_send(parts: int, own: Sequence[int]) -> list[tuple[int, int]]:
    """Return (level, i) of the nodes that a rank with these contiguous parts sends to the others."""
    tree: SumTree[int] = SumTree(parts)
    for i in own:
        tree.add(0, i, 0)
    return [(level, i) for level, i, _ in tree.nodes]
