"""Which blocks of the cache a text's keys and values are in, and which of them other texts may share. No torch in here.

A block holds BLOCK positions of one text, in all layers (PagedAttention, arXiv:2309.06180). A full block is known by
all that leads to it, so that texts with the same beginning, under the same adapter, share it: at the same time, and
later, until its room is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

BLOCK = 32  # positions; the loop of engine.cpu.cached_attention knows it too
ROWS = 64  # texts together: a pass over more takes as much longer (docs/performance.md)
READ_AT_ONCE = 256  # prompt rows in a pass: more would hold up the answers that go on


class NoRoom(Exception):
    """The cache has fewer free blocks than a text needs."""


def blocks_for(positions: int) -> int:
    return -(-positions // BLOCK)


class Blocks:
    """count: blocks there are. Those that nobody uses any more are forgotten when room is needed, the oldest first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._new = list(range(count - 1, -1, -1))
        self._users: dict[int, int] = {}
        self._known: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        return len(self._new) + len(self._idle)

    def take(self, many: int) -> list[int]:
        """Raises NoRoom, and takes none then."""
        if many > self.free:
            raise NoRoom
        found = []
        for _ in range(many):
            if self._new:
                block = self._new.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._known[self._key_of.pop(block)]
            self._users[block] = 1
            found.append(block)
        return found

    def leave(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):  # the end of a text is forgotten before its beginning
            self._users[block] -= 1
            if self._users[block] == 0:
                del self._users[block]
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._new.append(block)

    def share(self, keys: Iterable[bytes]) -> list[int]:
        """The known blocks of a text's beginning, which it uses from now on."""
        found = []
        for key in keys:
            block = self._known.get(key)
            if block is None:
                break
            self._idle.pop(block, None)
            self._users[block] = self._users.get(block, 0) + 1
            found.append(block)
        return found

    def use(self, blocks: Sequence[int]) -> None:
        """One more text uses blocks that another uses already."""
        for block in blocks:
            self._users[block] += 1

    def know(self, key: bytes, block: int) -> None:
        """The block is full, with what the key stands for. The first of two equal ones is kept."""
        if key not in self._known and block not in self._key_of:
            self._known[key], self._key_of[block] = block, key

    def forget(self) -> None:
        """Nothing is known any more: the weights have changed."""
        self._new += self._idle
        self._idle.clear()
        self._known.clear()
        self._key_of.clear()


def keys_of(adapter: str | None, ids: npt.NDArray[np.int32], last: bytes = b"", begin: int = 0) -> Iterator[bytes]:
    """The keys of the full blocks of a text, in order; with `last`, the key before, from position `begin` on."""
    for at in range(begin, len(ids) - BLOCK + 1, BLOCK):
        before = last or repr(adapter).encode()
        last = blake2b(before + ids[at : at + BLOCK].tobytes(), digest_size=16).digest()
        yield last
