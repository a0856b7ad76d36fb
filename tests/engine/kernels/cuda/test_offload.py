"""Inputs of layers in the host's memory, played on a CPU, where their copies are only copies: the same numbers."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from strop.engine.kernels.cuda import offload
from strop.engine.kernels.cuda.offload import HostMemory
from strop.engine.train.fast import FastLoss
from strop.machine.memory import is_out_of_memory
from tests.support.random_models import adapted, example

CPU = torch.device("cpu")
LAYERS = 4


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> tuple[FastLoss, FastLoss, Any]:
    """With the inputs kept and with them in the host's memory, in pieces of 48 bytes; and the model."""
    monkeypatch.setattr(offload, "PIECE", 48)
    model = adapted("llama", num_hidden_layers=LAYERS).train()
    kept, away = (FastLoss(model, checkpoint_layers=LAYERS) for _ in range(2))
    away.host_memory = HostMemory(CPU)
    return kept, away, model


def gradients(model: Any, loss: torch.Tensor, **how: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward(**how)  # type: ignore[no-untyped-call]
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def test_the_same_bits_and_pieces_that_serve_again(both: tuple[FastLoss, FastLoss, Any]) -> None:
    kept, away, model = both
    pieces = 0
    for lengths in ((4, 1), (9, 3), (2, 2)):
        rows = [example(length, n) for n, length in enumerate(lengths)]
        expected, found = kept.token_loss(rows), away.token_loss(rows)
        assert torch.equal(expected, found)
        of_kept, of_away = gradients(model, expected), gradients(model, found)
        assert of_kept.keys() == of_away.keys() and of_kept
        assert all(torch.equal(grad, of_away[name]) for name, grad in of_kept.items())
        del expected, found
        assert away.host_memory is not None
        free = len(away.host_memory.free)
        size = sum(map(len, rows)) * 4 * model.config.hidden_size
        pieces = max(pieces, (LAYERS - 1) * -(-size // 48))
        assert free == pieces, "all but the last layer's input was there, and its pieces are free again"


def test_a_graph_that_is_gone_through_twice_and_one_that_is_dropped(both: tuple[FastLoss, FastLoss, Any]) -> None:
    kept, away, model = both
    rows, others = [example(5, 0)], [example(3, 1)]
    expected = gradients(model, kept.token_loss(rows))
    first = away.token_loss(rows)
    second = away.token_loss(others)  # a further micro-batch in front of the first one's backward
    found = [gradients(model, first, retain_graph=True), gradients(model, first)]
    for one in found:
        assert all(torch.equal(grad, one[name]) for name, grad in expected.items())
    waiting = len(away.host_memory.free)  # type: ignore[union-attr]
    del second
    gc.collect()
    assert len(away.host_memory.free) > waiting  # type: ignore[union-attr]


def test_a_forward_that_fails_leaves_nothing_behind(
    both: tuple[FastLoss, FastLoss, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, away, model = both
    rows = [example(5, 0)]
    through, calls = FastLoss._compute_layer, []

    def failing(self: FastLoss, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return through(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FastLoss, "_compute_layer", failing)
        with pytest.raises(MemoryError):
            away.token_loss(rows)
    away.release_buffers()
    gc.collect()
    free = len(away.host_memory.free)  # type: ignore[union-attr]
    assert free > 0
    expected, found = gradients(model, kept.token_loss(rows)), gradients(model, away.token_loss(rows))
    assert all(torch.equal(grad, found[name]) for name, grad in expected.items())
    with torch.no_grad():
        assert torch.equal(away.token_loss(rows), kept.token_loss(rows))


def test_the_host_is_not_filled_up(both: tuple[FastLoss, FastLoss, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, away, _ = both
    monkeypatch.setattr(offload, "free_bytes", lambda: offload.LEFT)
    with pytest.raises(MemoryError) as raised:
        away.token_loss([example(5, 0)])
    assert is_out_of_memory(raised.value)


class Stream:
    """Puts down in which order the card is asked."""

    def __init__(self, told: list[str], name: str) -> None:
        self.told, self.name = told, name

    def wait_stream(self, other: Stream) -> None:
        self.told.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.told.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.told.append(f"{self.name} marks")
        return "a mark"


def test_copies_run_beside_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order: nothing leaves before it is made, its memory is not given back before it has left, and nothing is used
    before it has come."""
    told: list[str] = []
    here, beside = Stream(told, "here"), Stream(told, "beside")
    host = HostMemory(CPU)
    host._card, host._side = True, beside
    monkeypatch.setattr(host, "_now", lambda: here)
    monkeypatch.setattr(host, "_beside", lambda: torch.no_grad())
    monkeypatch.setattr(host, "_piece", lambda: torch.empty(offload.PIECE, dtype=torch.uint8))
    inputs = [torch.randn(3, 4, requires_grad=True) for _ in range(3)]
    kept = []
    for n, x in enumerate(inputs):
        hooks: Any = host.keeping(last=n == 2)
        kept.append(hooks.pack_hook(x))
    leaves = ["beside waits for here", "beside marks"]
    assert told == [*leaves, "here waits for a mark", *leaves, "here waits for a mark"]
    told.clear()
    comes = ["beside waits for here", "beside marks"]
    assert torch.equal(kept[2].back(), inputs[2])
    assert told == comes, "the input of the layer in front is on its way"
    told.clear()
    assert torch.equal(kept[1].back(), inputs[1])
    assert told == ["here waits for a mark", *comes]
    told.clear()
    kept.clear()
    assert told == ["here waits for a mark"], "what has come for nothing is not given back under its copy"
