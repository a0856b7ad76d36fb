"""Allocate the blocks of the paged KV cache, and share the blocks of common prefixes. Does not import torch.

A block holds the keys and values of BLOCK_SIZE consecutive positions of one sequence, in all layers (PagedAttention,
arXiv:2309.06180). A full block has a hash of the adapter and of all tokens up to the end of the block.
Sequences with the same adapter and prefix share full blocks. Blocks of finished sequences stay in the cache until their
space is needed. If a common prefix ends inside a block, the caller may copy the block and reuse its first positions.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

import numpy as np

from strop.data.types import Ids

BLOCK_SIZE = 32  # positions; engine.kernels.cpu.cached_attention is compiled for the same number
MAX_SEQUENCES = 64  # decoded together; with more, the time per token does not decrease (docs/performance.md)
MAX_CANDIDATES = 64  # blocks after the same prefix that are compared for a partial match; the newest are kept
MIN_ANSWER_TOKENS = 80  # a right answer may be longer than its reference
ANSWER_MARGIN = 1.25
PREFILL_ROWS = 256  # prompt tokens per pass; more would delay sequences that are already decoding


def answer_limit(longest: int) -> int:
    """Return the default of `strop eval --max-new-tokens`, for right answers of at most `longest` tokens."""
    return max(MIN_ANSWER_TOKENS, math.ceil(ANSWER_MARGIN * longest))


class CacheFull(Exception):
    """Raised when the cache has fewer free blocks than a sequence needs."""


def blocks_for(positions: int) -> int:
    """Return the number of blocks for this many positions."""
    return -(-positions // BLOCK_SIZE)


class BlockPool:
    """Reference-counted blocks, numbered from 0. Cached blocks without users are evicted in LRU order."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._num_users: dict[int, int] = {}
        self._by_hash: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._successors: dict[bytes, dict[int, Ids]] = {}  # previous block's hash -> block -> its tokens
        self._previous_hash: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # cached blocks without users

    @property
    def free(self) -> int:
        """Number of blocks that can be allocated."""
        return len(self._free) + len(self._unused)

    def allocate(self, count: int) -> list[int]:
        """Allocate `count` blocks with one user each. Raises CacheFull if there are fewer."""
        if count > self.free:
            raise CacheFull
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._unused.popitem(last=False)
                del self._by_hash[self._hash_of.pop(block)]
                self._drop_candidate(block)
            self._num_users[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Remove one user of each block."""
        for block in reversed(blocks):  # the end of a sequence is evicted before its beginning
            self._num_users[block] -= 1
            if self._num_users[block] == 0:
                del self._num_users[block]
                if block in self._hash_of:
                    self._unused[block] = None
                else:
                    self._free.append(block)

    def share_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the cached blocks of the longest prefix of `hashes`, and add a user to each."""
        blocks = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            self._add_user(block)
            blocks.append(block)
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Add one user to each of these blocks, which have users."""
        for block in blocks:
            self._num_users[block] += 1

    def register(self, block_hash: bytes, block: int, previous_hash: bytes, ids: Ids) -> None:
        """Make a full block available to other sequences, unless a block with this hash already is.

        ids: the tokens of the block, shape (BLOCK_SIZE,).
        """
        if block_hash in self._by_hash or block in self._hash_of:
            return
        self._by_hash[block_hash], self._hash_of[block] = block, block_hash
        successors = self._successors.setdefault(previous_hash, {})
        successors[block], self._previous_hash[block] = ids, previous_hash
        if len(successors) > MAX_CANDIDATES:
            self._drop_candidate(next(iter(successors)))

    def match_partial(self, previous_hash: bytes, ids: Ids) -> tuple[int, int]:
        """Return the block after `previous_hash` with the longest match, and the number of matching tokens.

        Adds a user to the block, which the caller must release. Returns (0, 0) if no block matches.
        """
        successors = self._successors.get(previous_hash)
        if not successors or not len(ids):
            return 0, 0
        matches = np.stack(list(successors.values()))[:, : len(ids)] == ids[:BLOCK_SIZE]
        counts = np.where(matches.all(1), matches.shape[1], matches.argmin(1))
        best = int(counts.argmax())
        if not counts[best]:
            return 0, 0
        block = list(successors)[best]
        self._add_user(block)
        successors[block] = successors.pop(block)  # now the newest candidate
        return block, int(counts[best])

    def _add_user(self, block: int) -> None:
        self._unused.pop(block, None)
        self._num_users[block] = self._num_users.get(block, 0) + 1

    def _drop_candidate(self, block: int) -> None:
        previous_hash = self._previous_hash.pop(block, None)
        if previous_hash is not None:
            del self._successors[previous_hash][block]
            if not self._successors[previous_hash]:
                del self._successors[previous_hash]


def root_hash(adapter: str | None) -> bytes:
    """Return the value that replaces the `previous_hash` of the first block of a sequence with this adapter."""
    return repr(adapter).encode()


def block_hashes(previous_hash: bytes, ids: Ids, start: int = 0) -> Iterator[bytes]:
    """Yield the hashes of the full blocks of `ids` from position `start`, after the block with `previous_hash`."""
    for begin in range(start, len(ids) - BLOCK_SIZE + 1, BLOCK_SIZE):
        previous_hash = blake2b(previous_hash + ids[begin : begin + BLOCK_SIZE].tobytes(), digest_size=16).digest()
        yield previous_hash
