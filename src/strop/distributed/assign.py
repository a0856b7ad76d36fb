"""Assign work to ranks, and add up results in an order that does not depend on the ranks.

Every rank can compute the assignment of all ranks. This module does not import torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


def assign_balanced(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Return the indices of `costs` for each rank, ascending, so that the ranks' total costs are balanced.

    Assigns the most expensive index first, each to the rank with the lowest cost so far, or the first such rank. The
    highest cost of a rank is at most 4/3 of the optimum (Graham, 1969). A rank may get no index.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = loads[0]
        shares[rank].append(index)
        heapq.heapreplace(loads, (load + costs[index], rank))
    return [sorted(share) for share in shares]


def assign_contiguous(costs: Sequence[float], ranks: int) -> list[range]:
    """Return a contiguous range of indices of `costs` for each rank, so that total costs are about equal."""
    total, before, owners = sum(costs), 0.0, []  # before: the cost of all previous indices
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
    """A pairwise sum of `parts` values, whose order of additions depends only on the number of parts.

    Node (level, i) of a binary tree is the sum of the parts from i * 2^level to (i + 1) * 2^level - 1. A node without a
    right sibling has the same value as its parent. A rank that has contiguous parts sends the fewest nodes that cover
    them.

    nodes: (level, i, value) of the largest complete nodes, from left to right.
    """

    parts: int
    nodes: list[tuple[int, int, T]] = field(default_factory=list)

    def add(self, level: int, i: int, value: T) -> None:
        """Add the next node to the right, and replace pairs of siblings with their parent."""
        height = max(0, (self.parts - 1).bit_length())
        while True:
            last = self.nodes[-1] if self.nodes else None
            if i % 2 and last is not None and last[:2] == (level, i - 1):
                self.nodes.pop()
                value = last[2] + value
            elif i % 2 or level == height or (i + 1) << level < self.parts:
                break  # the left sibling is on another rank, this is the root, or the right sibling is not added yet
            level, i = level + 1, i // 2
        self.nodes.append((level, i, value))

    @property
    def total(self) -> T:
        """The sum. All parts must have been added."""
        (root,) = self.nodes
        return root[2]


def nodes_to_send(parts: int, own: Sequence[int]) -> list[tuple[int, int]]:
    """Return (level, i) of the nodes that a rank sends to the others. own: the indices of its contiguous parts."""
    tree: SumTree[int] = SumTree(parts)
    for i in own:
        tree.add(0, i, 0)
    return [(level, i) for level, i, _ in tree.nodes]
