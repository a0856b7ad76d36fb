"""Who computes what: rows dealt out to ranks by their cost. Pure functions, so that every rank knows all of it."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices by rank: the dearest first, each to the rank that has least so far (ties: the lowest rank).

    At most 4/3 of the best possible longest share (Graham 1969). A rank may get none; each share is in order of index.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    least = [(0.0, rank) for rank in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = least[0]
        shares[rank].append(index)
        heapq.heapreplace(least, (load + costs[index], rank))
    return [sorted(share) for share in shares]


def in_a_row(costs: Sequence[float], ranks: int) -> list[range]:
    """Indices by rank, neighbours together: an index goes where its middle lies in the sum of all costs."""
    total, before, owners = sum(costs), 0.0, []
    for cost in costs:
        owners.append(min(ranks - 1, int(ranks * (before + cost / 2) / total)))
        before += cost
    return [range(owners.index(rank), owners.index(rank) + owners.count(rank)) if rank in owners else range(0)
            for rank in range(ranks)]  # fmt: skip


# ---- from strop.distributed.deterministic_sum ----
"""A sum whose bits do not depend on who computed what: parts are added in pairs, in a tree that only their number
decides.

Node (level, i) is the sum of parts i 2^level to (i + 1) 2^level - 1, as far as there are such; a node without a right
sibling is its parent. A rank that has neighbouring parts sends the few nodes that lie wholly in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Added(Protocol):
    def __add__(self: T, other: T, /) -> T: ...


T = TypeVar("T", bound=Added)


@dataclass
class Tree(Generic[T]):
    """The nodes of `parts` parts that are known so far, from left to right: (level, i, value)."""

    parts: int
    nodes: list[tuple[int, int, T]] = field(default_factory=list)

    def add(self, level: int, i: int, value: T) -> None:
        """Takes up the node to the right of those that were taken up before, and adds up what can be."""
        height = max(0, (self.parts - 1).bit_length())
        while True:
            below = self.nodes[-1] if self.nodes else None
            if i % 2 and below is not None and below[:2] == (level, i - 1):
                self.nodes.pop()
                value = below[2] + value
            elif i % 2 or level == height or (i + 1) << level < self.parts:
                break  # its left sibling is elsewhere, it is the whole, or its right sibling is to come
            level, i = level + 1, i // 2
        self.nodes.append((level, i, value))

    @property
    def whole(self) -> T:
        """The sum of all parts."""
        (node,) = self.nodes
        return node[2]


def nodes_of(parts: int, own: Sequence[int]) -> list[tuple[int, int]]:
    """(level, i) of the nodes that a rank with these neighbouring parts has to send."""
    tree: Tree[int] = Tree(parts)
    for i in own:
        tree.add(0, i, 0)
    return [(level, i) for level, i, _ in tree.nodes]
