from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.data.batching import BatchStream


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
def test_every_row_once_an_epoch(rows: int, size: int, seed: int) -> None:
    batches = list(BatchStream(rows, batch_size=size, seed=seed, epochs=2))
    for epoch in (0, 1):
        own = [batch for batch in batches if batch.epoch == epoch]
        assert Counter(row for batch in own for row in batch.rows) == Counter(range(rows))
        assert all(len(batch.rows) == size for batch in own[:-1])
    assert [batch.index for batch in batches] == list(range(len(batches)))


def test_the_order_is_of_seed_and_epoch_alone() -> None:
    stream = BatchStream(100, batch_size=7, seed=1, epochs=3)
    assert stream.order(1) == BatchStream(100, batch_size=5, seed=1).order(1)
    assert len({tuple(stream.order(epoch)) for epoch in range(3)}) == 3
    assert stream.order(0) != BatchStream(100, batch_size=7, seed=2).order(0)
    # a run of last year must go on in the same order
    assert BatchStream(8, batch_size=1, seed=0).order(0) == [3, 2, 1, 6, 0, 7, 4, 5]


def test_steps() -> None:
    assert BatchStream(10, batch_size=4, seed=0, epochs=3).total_steps == 9
    assert BatchStream(10, batch_size=4, seed=0, epochs=0.5).total_steps == 2
    assert BatchStream(10, batch_size=4, seed=0, max_steps=5).total_steps == 5
    assert BatchStream(1, batch_size=8, seed=0).total_steps == 1
    assert len(list(BatchStream(10, batch_size=4, seed=0, max_steps=5))) == 5


def test_position_before_the_first_batch_and_of_another_stream() -> None:
    stream = BatchStream(10, batch_size=4, seed=0)
    start = stream.position
    next(iter(stream))
    assert stream.position["step"] == 1
    assert list(BatchStream(10, batch_size=4, seed=0, position=start)) == list(BatchStream(10, batch_size=4, seed=0))
    with pytest.raises(AssertionError, match="another stream"):
        BatchStream(11, batch_size=4, seed=0, position=start)
