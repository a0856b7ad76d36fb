"""Keys and values of answered texts, kept for requests that begin alike: a next turn, a shared system prompt."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from strop.data.types import Ids
from strop.engine.decode.slots import Kv, cut

LEAST = 32  # tokens in common, below which reading anew is as quick


class Kept:
    """limit: tokens kept in all; the least recently used texts go first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._texts: OrderedDict[tuple[str | None, bytes], tuple[Ids, Kv]] = OrderedDict()

    def clear(self) -> None:
        self._texts.clear()

    def add(self, adapter: str | None, ids: Ids, kv: Kv) -> None:
        if len(ids) < LEAST or len(ids) > self._limit:
            return
        for key, (known, _) in list(self._texts.items()):  # beginnings of this text say nothing more
            if key[0] == adapter and len(known) <= len(ids) and np.array_equal(known, ids[: len(known)]):
                del self._texts[key]
        self._texts[adapter, ids.tobytes()] = (ids, kv)
        while sum(len(known) for known, _ in self._texts.values()) > self._limit:
            self._texts.popitem(last=False)

    def find(self, adapter: str | None, ids: Ids) -> Kv:
        """The longest beginning of `ids` that is kept, the last token left out; [] where it is not worth it."""
        best, longest = None, LEAST - 1
        for key, (known, _) in self._texts.items():
            if key[0] != adapter:
                continue
            width = min(len(known), len(ids) - 1)
            differ = np.nonzero(known[:width] != ids[:width])[0]
            common = int(differ[0]) if len(differ) else width
            if common > longest:
                best, longest = key, common
        if best is None:
            return []
        self._texts.move_to_end(best)
        return cut(self._texts[best][1], 0, longest)
