from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.data.packing import group_by_length, pack

LENGTHS = st.lists(st.integers(1, 50), max_size=60)


@given(LENGTHS, st.integers(50, 120))
def test_packs_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    packs = pack(lengths, budget)
    assert sorted(i for group in packs for i in group) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in group) <= budget for group in packs)
    assert packs == pack(lengths, budget)
    # at most one pack of a best fit is half empty: two such would have been one
    assert sum(2 * sum(lengths[i] for i in group) <= budget for group in packs) <= 1


def test_best_fit_takes_the_fullest_pack_that_has_room() -> None:
    assert pack([6, 5, 4, 4, 1], 10) == [[0, 2], [1, 3, 4]]
    assert pack([], 10) == []


def test_a_row_above_the_budget_is_a_fault_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        pack([11], 10)


@given(LENGTHS, st.one_of(st.none(), st.integers(1, 200)), st.one_of(st.none(), st.integers(1, 9)))
def test_micro_batches_hold_every_row_once_within_their_bounds(
    lengths: list[int], tokens: int | None, rows: int | None
) -> None:
    groups = group_by_length(lengths, tokens=tokens, rows=rows)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(lengths[i] for i in group)
        assert tokens is None or padded <= tokens or len(group) == 1
        assert rows is None or len(group) <= rows
    order = [lengths[i] for group in groups for i in group]
    assert order == sorted(lengths, reverse=True)


def padded(lengths: list[int], groups: list[list[int]]) -> int:
    return sum(len(group) * max(lengths[i] for i in group) for group in groups)


@given(LENGTHS, st.integers(1, 9))
def test_like_lengths_together_pad_no_more_than_the_order_of_the_file(lengths: list[int], rows: int) -> None:
    lengths = lengths[: len(lengths) // rows * rows]
    as_they_come = [list(range(i, min(i + rows, len(lengths)))) for i in range(0, len(lengths), rows)]
    assert padded(lengths, group_by_length(lengths, rows=rows)) <= padded(lengths, as_they_come)
