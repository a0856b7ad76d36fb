"""Groups of rows that begin with the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from strop.data.prefixes import MIN_PREFIX, group_by_prefix


def groups_of(rows: Sequence[Any], share: float = 1.0) -> list[tuple[tuple[int, ...], int]]:
    groups = group_by_prefix([np.array(row, np.int32) for row in rows], [len(row) - 1 for row in rows], share)
    return [(group.rows, group.prefix) for group in groups]


def row(*parts: tuple[int, int], end: int) -> list[int]:
    """Return a row of parts (token, number of times), and a token that no other row has."""
    return [token for token, number in parts for _ in range(number)] + [end]


A, B = (1, 12), (2, 20)


def test_rows_of_two_prompts_are_two_groups() -> None:
    rows = [row(A, end=10), row(B, end=11), row((3, 30), end=12), row(B, end=13), row(A, end=14), row((4, 9), end=15)]
    assert groups_of(rows) == [((0, 4), 12), ((1, 3), 20), ((2, 5), 0)]
    for some in permutations(rows[:4]):
        assert sum((len(members) - 1) * prefix for members, prefix in groups_of(some)) == 20


def test_a_longer_prefix_is_a_group_of_its_own_where_it_saves_more() -> None:
    short, long = [row(A, end=10 + i) for i in range(4)], [row(A, B, end=20 + i) for i in range(4)]
    assert groups_of(short + long) == [((0, 1, 2, 3), 12), ((4, 5, 6, 7), 32)]
    assert groups_of([*short, long[0]]) == [((0, 1, 2, 3, 4), 12)]
    assert groups_of(short + long[:2]) == [((0, 1, 2, 3, 4, 5), 12)], "the two would save 32 - 8, and lose 24"


def test_rows_without_a_shared_prefix_are_one_group() -> None:
    assert groups_of([row((i, 9), end=99) for i in range(50)]) == [(tuple(range(50)), 0)]
    assert groups_of([row(A, end=10)]) == [((0,), 0)] and groups_of([]) == []
    assert groups_of([row((1, MIN_PREFIX - 1), end=10 + i) for i in range(5)]) == [((0, 1, 2, 3, 4), 0)]


def test_the_last_token_of_a_row_is_not_shared() -> None:
    assert groups_of([[1] * 12] * 3) == [((0, 1, 2), 11)]
    assert groups_of([[1] * 12, [1] * 30, [1] * 30, [1] * 30]) == [((1, 2, 3), 29), ((0,), 0)]


def test_of_many_rows_those_that_meet_in_a_batch_count() -> None:
    """Three rows of 100 with a long document do not meet in batches of 8; 50 with a prompt do."""
    rows = [row(A, end=100 + i) for i in range(50)] + [row((i, 20), end=200) for i in range(10, 57)]
    rows += [row((3, 90), end=300 + i) for i in range(3)]
    assert [size for members, size in groups_of(rows) if size == 90]
    assert [(len(members), size) for members, size in groups_of(rows, share=8 / 100)] == [(50, 12), (50, 0)]


def test_each_row_may_add_one_token_to_the_one_before() -> None:
    rows = [[1] * n + [n + 1] for n in range(1, 3000)]
    assert sorted(i for members, _ in groups_of(rows) for i in members) == list(range(2999))


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=12))
def test_a_group_has_its_prefix_and_no_row_is_lost(seeds: list[list[int]]) -> None:
    rows = [[token for token in seed for _ in range(7)] for seed in seeds]
    groups = groups_of(rows)
    assert sorted(i for members, _ in groups for i in members) == list(range(len(rows)))
    for members, prefix in groups:
        assert prefix == 0 or prefix >= MIN_PREFIX
        assert len({tuple(rows[i][:prefix]) for i in members}) == 1 and prefix < min(len(rows[i]) for i in members)
