"""Blocks of the KV cache: allocation, sharing and eviction. Drafts of speculative decoding."""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest

from strop.engine.decode.batch import propose_draft
from strop.engine.decode.cache import (
    BLOCK_SIZE,
    MAX_CANDIDATES,
    BlockPool,
    CacheFull,
    block_hashes,
    blocks_for,
    root_hash,
)


def ids(n: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + n, dtype=np.int32)


def test_block_key_depends_on_adapter_and_all_tokens_before() -> None:
    long = ids(3 * BLOCK_SIZE + 5)
    keys = list(block_hashes(root_hash("a"), long))
    assert len(keys) == 3 and list(islice(block_hashes(root_hash("a"), long[: 2 * BLOCK_SIZE]), 9)) == keys[:2]
    assert list(block_hashes(keys[0], long, BLOCK_SIZE)) == keys[1:]
    assert set(keys).isdisjoint(block_hashes(root_hash("b"), long)) and set(keys).isdisjoint(
        block_hashes(root_hash(None), long)
    )
    changed = long.copy()
    changed[0] += 1
    assert set(keys).isdisjoint(block_hashes(root_hash("a"), changed))
    assert list(block_hashes(root_hash("None"), long)) != list(block_hashes(root_hash(None), long))


def test_oldest_unused_block_is_evicted_first() -> None:
    blocks, keys = BlockPool(4), [bytes([n]) for n in range(4)]
    first = blocks.allocate(2)
    for key, block in zip(keys, first, strict=False):
        blocks.register(key, block, b"", ids(BLOCK_SIZE))
    blocks.release(first)
    assert blocks.free == 4 and blocks.share_prefix(iter(keys)) == first and blocks.free == 2
    blocks.release(first)
    taken = blocks.allocate(3)  # two blank ones, and the end of the sequence
    assert first[1] in taken and blocks.share_prefix(iter(keys)) == first[:1]
    with pytest.raises(CacheFull):
        blocks.allocate(1)
    blocks.release([*taken, first[0]])
    assert blocks.free == 4


def test_no_block_is_lost_or_allocated_twice() -> None:
    blocks, generator, allocated = BlockPool(30), random.Random(0), []
    for _ in range(3000):
        if allocated and generator.random() < 0.5:
            blocks.release(allocated.pop(generator.randrange(len(allocated))))
        else:
            tokens = ids(BLOCK_SIZE * generator.randrange(1, 6), generator.randrange(3))
            keys = list(block_hashes(root_hash(None), tokens))
            known = blocks.share_prefix(iter(keys))
            try:
                sequence_blocks = known + blocks.allocate(len(keys) - len(known) + 1)
            except CacheFull:
                blocks.release(known)
                continue
            for at, (key, block) in enumerate(zip(keys, sequence_blocks, strict=False)):
                before = keys[at - 1] if at else root_hash(None)
                blocks.register(key, block, before, tokens[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE])
            allocated.append(sequence_blocks)
            match = blocks.match_partial(root_hash(None), tokens[:BLOCK_SIZE])
            assert match[1] == BLOCK_SIZE and match[0] == blocks.share_prefix(iter(keys[:1]))[0]
            blocks.release([match[0], match[0]])
        used = {block for sequence_blocks in allocated for block in sequence_blocks}
        assert blocks.free == 30 - len(used)
    for sequence_blocks in allocated:
        blocks.release(sequence_blocks)
    assert blocks.free == 30


def test_partial_match_returns_the_longest_match() -> None:
    blocks, before = BlockPool(MAX_CANDIDATES + 3), root_hash("a")
    assert blocks.match_partial(before, ids(5)) == (0, 0)
    taken = blocks.allocate(MAX_CANDIDATES + 3)
    for number, block in enumerate(taken[:3]):  # the same for 4, 9 and 14 tokens
        tokens = ids(BLOCK_SIZE)
        tokens[4 + 5 * number :] = 0
        blocks.register(bytes([number]), block, before, tokens)
    assert (
        blocks.match_partial(before, ids(BLOCK_SIZE)) == (taken[2], 14) and blocks.match_partial(before, ids(3))[1] == 3
    )
    assert blocks.match_partial(before, ids(12)) == (taken[2], 12) and blocks.match_partial(before, ids(0)) == (0, 0)
    assert blocks.match_partial(before, ids(9, 1))[1] == 0 and blocks.match_partial(root_hash(None), ids(9))[1] == 0
    for number, block in enumerate(taken[3:], start=3):  # the oldest are no longer candidates
        blocks.register(bytes([number]), block, before, ids(BLOCK_SIZE, 7 * BLOCK_SIZE))
    assert blocks.match_partial(before, ids(BLOCK_SIZE))[1] == 0


def test_draft_is_what_followed_the_same_ngram() -> None:
    tokens = np.array([1, 2, 3, 4, 5, 9, 2, 3, 4, 7, 8, 2, 3, 4], np.int32)
    assert propose_draft(tokens, 2) == [7, 8] and propose_draft(tokens, 9) == [7, 8, 2, 3, 4]
    assert propose_draft(tokens, 0) == () and propose_draft(tokens[:6], 4) == () and propose_draft(tokens[:3], 4) == ()
    assert blocks_for(1) == 1 and blocks_for(BLOCK_SIZE) == 1 and blocks_for(BLOCK_SIZE + 1) == 2
