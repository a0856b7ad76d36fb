"""Order of batches, packing, and grouping by length."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.data.batching import BatchStream, group_by_length, pack


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 2**63 - 1), st.floats(0.1, 3.5), st.integers(0, 40))
def test_a_stream_resumes_exactly_from_any_position(rows: int, size: int, seed: int, epochs: float, stop: int) -> None:
    def stream(**more: object) -> BatchStream:
        return BatchStream(rows, batch_size=size, seed=seed, epochs=epochs, **more)  # type: ignore[arg-type]

    batches = list(stream())
    assert len(batches) == stream().total_steps
    position = batches[stop].position if stop < len(batches) else batches[-1].position
    again = stream(position=json.loads(json.dumps(position)))
    assert len(again) == len(batches[stop + 1 :])
    assert list(again) == batches[stop + 1 :]


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 5))
def test_each_epoch_has_every_row_once(rows: int, size: int, seed: int) -> None:
    batches = list(BatchStream(rows, batch_size=size, seed=seed, epochs=2))
    for epoch in (0, 1):
        epoch_batches = [batch for batch in batches if batch.epoch == epoch]
        assert Counter(row for batch in epoch_batches for row in batch.rows) == Counter(range(rows))
        assert all(len(batch.rows) == size for batch in epoch_batches[:-1])
    assert [batch.index for batch in batches] == list(range(len(batches)))


def test_order_depends_only_on_seed_and_epoch() -> None:
    stream = BatchStream(100, batch_size=7, seed=1, epochs=3)
    assert stream.order(1) == BatchStream(100, batch_size=5, seed=1).order(1)
    assert len({tuple(stream.order(epoch)) for epoch in range(3)}) == 3
    assert stream.order(0) != BatchStream(100, batch_size=7, seed=2).order(0)
    # old runs must resume in the same order
    assert BatchStream(8, batch_size=1, seed=0).order(0) == [3, 2, 1, 6, 0, 7, 4, 5]


def test_total_steps() -> None:
    assert BatchStream(10, batch_size=4, seed=0, epochs=3).total_steps == 9
    assert BatchStream(10, batch_size=4, seed=0, epochs=0.5).total_steps == 2
    assert BatchStream(10, batch_size=4, seed=0, max_steps=5).total_steps == 5
    assert BatchStream(1, batch_size=8, seed=0).total_steps == 1
    assert len(list(BatchStream(10, batch_size=4, seed=0, max_steps=5))) == 5


def test_position_before_the_first_batch_restarts_and_another_streams_is_refused() -> None:
    stream = BatchStream(10, batch_size=4, seed=0)
    start = stream.position
    next(iter(stream))
    assert stream.position["step"] == 1
    assert list(BatchStream(10, batch_size=4, seed=0, position=start)) == list(BatchStream(10, batch_size=4, seed=0))
    with pytest.raises(AssertionError, match="another stream"):
        BatchStream(11, batch_size=4, seed=0, position=start)


LENGTHS = st.lists(st.integers(1, 50), max_size=60)


@given(LENGTHS, st.integers(50, 120))
def test_packs_have_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    packs = pack(lengths, budget)
    assert sorted(i for group in packs for i in group) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in group) <= budget for group in packs)
    assert packs == pack(lengths, budget)
    # best fit leaves at most one pack half empty: two such packs would have been one
    assert sum(2 * sum(lengths[i] for i in group) <= budget for group in packs) <= 1


def test_best_fit_chooses_the_fullest_pack_with_room() -> None:
    assert pack([6, 5, 4, 4, 1], 10) == [[0, 2], [1, 3, 4]]
    assert pack([], 10) == []


def test_row_above_the_budget_raises() -> None:
    with pytest.raises(AssertionError):
        pack([11], 10)


@given(LENGTHS, st.one_of(st.none(), st.integers(1, 200)), st.one_of(st.none(), st.integers(1, 9)))
def test_micro_batches_have_every_row_once_within_their_bounds(
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
def test_grouping_by_length_pads_no_more_than_file_order(lengths: list[int], rows: int) -> None:
    lengths = lengths[: len(lengths) // rows * rows]
    file_order = [list(range(i, min(i + rows, len(lengths)))) for i in range(0, len(lengths), rows)]
    assert padded(lengths, group_by_length(lengths, rows=rows)) <= padded(lengths, file_order)
