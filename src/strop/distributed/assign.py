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
