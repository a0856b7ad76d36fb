"""Memory of a micro-batch: buffers are reused, and nothing is saved twice."""

from __future__ import annotations

from itertools import pairwise
from mmap import mmap

import pytest
import torch

from strop.data.types import Example
from strop.engine.train.buffers import Arena
from strop.engine.train.fast import FastLoss
from tests.support.random_models import adapted, example

LIKE = torch.empty(0, dtype=torch.bfloat16)


def examples_of(lengths: list[int]) -> list[Example]:
    return [example(length, number) for number, length in enumerate(lengths)]


def lies(x: torch.Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()


def test_tensors_of_a_micro_batch_are_contiguous_in_one_buffer() -> None:
    arena = Arena()
    for rows in (7, 9, 5):
        arena.begin(active=True)
        parts = [arena(rows, width, like) for width, like in ((3, LIKE), (5, LIKE.float()), (1, LIKE))]
        versions = [part._version for part in parts]
        for number, part in enumerate(parts):
            part.fill_(number)
        assert [part.unique().tolist() for part in parts] == [[0], [1], [2]]
        assert all(part.data_ptr() % 64 == 0 for part in parts)
        assert [part._version for part in parts] == [one + 1 for one in versions]  # autograd counts each separately
    spans = sorted(map(lies, parts))
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    memory = {part.untyped_storage().data_ptr() for part in parts}
    assert len(memory) == 1


def test_full_arena_adds_a_buffer_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strop.engine.train.buffers.BUFFER_SIZES", (128,))
    arena = Arena()
    places: list[list[int]] = []
    for number in (2, 5, 3):  # of 64 bytes: a buffer holds two
        arena.begin(active=True)
        parts = [arena(1, 16, LIKE.float()) for _ in range(number)]
        assert all(end <= begin for (_, end), (begin, _) in pairwise(sorted(map(lies, parts))))
        assert len({part.untyped_storage().data_ptr() for part in parts}) == -(-number // 2)
        places.append([part.data_ptr() for part in parts])
    assert places[0] == places[1][:2] and places[2] == places[1][:3]
    arena.begin(active=False)
    assert not arena._buffers


def test_arena_falls_back_to_smaller_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def pages(size: int) -> mmap:
        tried.append(size)
        if size > 1 << 20:
            raise OSError("Cannot allocate memory")
        return mmap(-1, size)

    monkeypatch.setattr("strop.engine.train.buffers.map_pages", pages)
    arena = Arena()
    arena.begin(active=True)
    assert arena(5, 3, LIKE).fill_(1).sum() == 15 and tried == [1 << 30, 64 << 20, 64]
    with pytest.raises(MemoryError, match="2 MiB"):
        arena(1 << 20, 1, LIKE)


@pytest.mark.parametrize("again", [0, 1, 9])
def test_backward_after_the_next_micro_batch_raises(again: int) -> None:
    loss = FastLoss(adapted("llama"), checkpoint_layers=again)
    one, other = examples_of([5, 9]), examples_of([7])
    loss.token_loss(one).backward()
    late = loss.token_loss(one)
    loss.token_loss(other).backward()
    with pytest.raises(RuntimeError, match="before the next one begins"):
        late.backward()


@pytest.mark.parametrize("again", [0, 1, 9])
def test_gradients_are_equal_with_arena_and_heap(again: int) -> None:
    model = adapted("llama")
    loss = FastLoss(model, checkpoint_layers=again)
    rows = [examples_of(lengths) for lengths in ([5, 9, 3], [2], [30, 4], [7, 7])]
    trained = [weight for weight in model.parameters() if weight.requires_grad]

    def gradients() -> list[torch.Tensor]:
        results = []
        for batch in rows:
            loss.token_loss(batch).backward()
            results += [weight.grad.clone() for weight in trained if weight.grad is not None]
            model.zero_grad()
        return results

    first = gradients()
    with torch.no_grad():
        loss.token_loss(rows[0])  # releases it
    for old, new in zip(first, gradients(), strict=True):
        assert torch.equal(old, new)
