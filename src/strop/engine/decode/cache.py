"""Which blocks of the cache a text's keys and values are in, and which of them other texts may share. No torch in here.

A block holds BLOCK positions of one text, in all layers (PagedAttention, arXiv:2309.06180). A full block is known by
all that leads to it, so that texts with the same beginning, under the same adapter, share it: at the same time, and
later, until its room is needed. Where a beginning ends within a block, what is the same of that one can be copied.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

BLOCK_SIZE = 32  # positions; the loop of engine.cpu.cached_attention knows it too
MAX_SEQUENCES = 64  # texts together: a pass over more takes as much longer (docs/performance.md)
LOOKED_AT = 64  # blocks behind the same beginning, the newest: which of them goes on most alike
PREFILL_ROWS = 256  # prompt rows in a pass: more would hold up the answers that go on


class NoRoom(Exception):
    """The cache has fewer free blocks than a text needs."""


def blocks_for(positions: int) -> int:
    return -(-positions // BLOCK_SIZE)


class Blocks:
    """count: blocks there are. Those that nobody uses any more are forgotten when room is needed, the oldest first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._new = list(range(count - 1, -1, -1))
        self._users: dict[int, int] = {}
        self._known: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._behind: dict[bytes, dict[int, npt.NDArray[np.int32]]] = {}  # by the key before: blocks, their tokens
        self._key_before: dict[int, bytes] = {}
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
                self._leave_behind(block)
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
            self._hold(block)
            found.append(block)
        return found

    def use(self, blocks: Sequence[int]) -> None:
        """One more text uses blocks that another uses already."""
        for block in blocks:
            self._users[block] += 1

    def know(self, key: bytes, block: int, before: bytes, ids: npt.NDArray[np.int32]) -> None:
        """The block is full of these tokens, with what the keys stand for: its own, and the one before. The first of
        two equal ones is kept."""
        if key in self._known or block in self._key_of:
            return
        self._known[key], self._key_of[block] = block, key
        behind = self._behind.setdefault(before, {})
        behind[block], self._key_before[block] = ids, before
        if len(behind) > LOOKED_AT:
            self._leave_behind(next(iter(behind)))

    def alike(self, before: bytes, ids: npt.NDArray[np.int32]) -> tuple[int, int]:
        """Of the known blocks behind that key: the one that begins as `ids` do for longest, and for how many tokens; 0:
        there is none. The block is in use then, until it is left."""
        behind = self._behind.get(before)
        if not behind or not len(ids):
            return 0, 0
        same = np.stack(list(behind.values()))[:, : len(ids)] == ids[:BLOCK_SIZE]
        counts = np.where(same.all(1), same.shape[1], same.argmin(1))
        best = int(counts.argmax())
        if not counts[best]:
            return 0, 0
        block = list(behind)[best]
        self._hold(block)
        behind[block] = behind.pop(block)  # the newest of those that are looked at
        return block, int(counts[best])

    def _hold(self, block: int) -> None:
        """A known block has a user more."""
        self._idle.pop(block, None)
        self._users[block] = self._users.get(block, 0) + 1

    def _leave_behind(self, block: int) -> None:
        """It is not looked at any more."""
        before = self._key_before.pop(block, None)
        if before is not None:
            del self._behind[before][block]
            if not self._behind[before]:
                del self._behind[before]

    def forget(self) -> None:
        """Nothing is known any more: the weights have changed."""
        self._new += self._idle
        for table in (self._idle, self._known, self._key_of, self._behind, self._key_before):
            table.clear()


def root_of(adapter: str | None) -> bytes:
    """What stands for a key before the first."""
    return repr(adapter).encode()


def keys_of(before: bytes, ids: npt.NDArray[np.int32], begin: int = 0) -> Iterator[bytes]:
    """The keys of the full blocks of a text from position `begin` on, in order. before: the key in front of them."""
    for at in range(begin, len(ids) - BLOCK_SIZE + 1, BLOCK_SIZE):
        before = blake2b(before + ids[at : at + BLOCK_SIZE].tobytes(), digest_size=16).digest()
        yield before
