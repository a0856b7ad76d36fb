"""Blocks: who has which, what is shared, what is forgotten first."""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest

from strop.engine.decode.batch import guess
from strop.engine.decode.cache import BLOCK_SIZE, LOOKED_AT, Blocks, NoRoom, blocks_for, keys_of, root_of


def ids(n: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + n, dtype=np.int32)


def test_a_key_is_of_all_that_leads_to_it() -> None:
    long = ids(3 * BLOCK_SIZE + 5)
    keys = list(keys_of(root_of("a"), long))
    assert len(keys) == 3 and list(islice(keys_of(root_of("a"), long[: 2 * BLOCK_SIZE]), 9)) == keys[:2]
    assert list(keys_of(keys[0], long, BLOCK_SIZE)) == keys[1:]
    assert set(keys).isdisjoint(keys_of(root_of("b"), long)) and set(keys).isdisjoint(keys_of(root_of(None), long))
    other = long.copy()
    other[0] += 1
    assert set(keys).isdisjoint(keys_of(root_of("a"), other))
    assert list(keys_of(root_of("None"), long)) != list(keys_of(root_of(None), long))


def test_the_oldest_that_nobody_uses_is_forgotten_first() -> None:
    blocks, keys = Blocks(4), [bytes([n]) for n in range(4)]
    first = blocks.take(2)
    for key, block in zip(keys, first, strict=False):
        blocks.know(key, block, b"", ids(BLOCK_SIZE))
    blocks.leave(first)
    assert blocks.free == 4 and blocks.share(iter(keys)) == first and blocks.free == 2
    blocks.leave(first)
    taken = blocks.take(3)  # two that were never used, and the end of the text
    assert first[1] in taken and blocks.share(iter(keys)) == first[:1]
    with pytest.raises(NoRoom):
        blocks.take(1)
    blocks.leave([*taken, first[0]])
    assert blocks.free == 4


def test_no_block_is_lost_or_given_twice() -> None:
    blocks, chance, held = Blocks(30), random.Random(0), []
    for turn in range(3000):
        if held and chance.random() < 0.5:
            blocks.leave(held.pop(chance.randrange(len(held))))
        else:
            tokens = ids(BLOCK_SIZE * chance.randrange(1, 6), chance.randrange(3))
            text = list(keys_of(root_of(None), tokens))
            known = blocks.share(iter(text))
            try:
                mine = known + blocks.take(len(text) - len(known) + 1)
            except NoRoom:
                blocks.leave(known)
                continue
            for at, (key, block) in enumerate(zip(text, mine, strict=False)):
                before = text[at - 1] if at else root_of(None)
                blocks.know(key, block, before, tokens[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE])
            held.append(mine)
            looked = blocks.alike(root_of(None), tokens[:BLOCK_SIZE])
            assert looked[1] == BLOCK_SIZE and looked[0] == blocks.share(iter(text[:1]))[0]
            blocks.leave([looked[0], looked[0]])
        if turn % 500 == 250:
            blocks.forget()
        used = {block for mine in held for block in mine}
        assert blocks.free == 30 - len(used)
    for mine in held:
        blocks.leave(mine)
    assert blocks.free == 30


def test_the_block_that_goes_on_most_alike() -> None:
    blocks, before = Blocks(LOOKED_AT + 3), root_of("a")
    assert blocks.alike(before, ids(5)) == (0, 0)
    taken = blocks.take(LOOKED_AT + 3)
    for number, block in enumerate(taken[:3]):  # the same for 4, 9 and 14 tokens
        tokens = ids(BLOCK_SIZE)
        tokens[4 + 5 * number :] = 0
        blocks.know(bytes([number]), block, before, tokens)
    assert blocks.alike(before, ids(BLOCK_SIZE)) == (taken[2], 14) and blocks.alike(before, ids(3))[1] == 3
    assert blocks.alike(before, ids(12)) == (taken[2], 12) and blocks.alike(before, ids(0)) == (0, 0)
    assert blocks.alike(before, ids(9, 1))[1] == 0 and blocks.alike(root_of(None), ids(9))[1] == 0
    for number, block in enumerate(taken[3:], start=3):  # the oldest are not looked at any more
        blocks.know(bytes([number]), block, before, ids(BLOCK_SIZE, 7 * BLOCK_SIZE))
    assert blocks.alike(before, ids(BLOCK_SIZE))[1] == 0
    blocks.forget()
    assert blocks.alike(before, ids(BLOCK_SIZE, 7 * BLOCK_SIZE)) == (0, 0)


def test_what_is_guessed() -> None:
    text = np.array([1, 2, 3, 4, 5, 9, 2, 3, 4, 7, 8, 2, 3, 4], np.int32)
    assert guess(text, 2) == [7, 8] and guess(text, 9) == [7, 8, 2, 3, 4]
    assert guess(text, 0) == () and guess(text[:6], 4) == () and guess(text[:3], 4) == ()
    assert blocks_for(1) == 1 and blocks_for(BLOCK_SIZE) == 1 and blocks_for(BLOCK_SIZE + 1) == 2
