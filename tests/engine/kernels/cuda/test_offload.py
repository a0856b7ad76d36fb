"""Offloading inputs of layers to host memory, tested on a CPU, where the copies are plain copies: the same values."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from strop.engine.kernels.cuda.offload import HostMemory
from strop.engine.train.fast import FastLoss
from strop.machine.memory import is_out_of_memory
from strop.models import pinned
from tests.support.random_models import adapted, example

CPU = torch.device("cpu")
LAYERS = 4


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> tuple[FastLoss, FastLoss, Any]:
    """Return a step that keeps the inputs, one that offloads them in pieces of 48 bytes, and the model."""
    monkeypatch.setattr(pinned, "PIECE", 48)
    model = adapted("llama", num_hidden_layers=LAYERS).train()
    resident, offloaded = (FastLoss(model, checkpoint_layers=LAYERS) for _ in range(2))
    offloaded.host_memory = HostMemory(CPU)
    return resident, offloaded, model


def gradients(model: Any, loss: torch.Tensor, **how: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward(**how)  # type: ignore[no-untyped-call]
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def test_gradients_are_identical_and_pieces_are_reused(both: tuple[FastLoss, FastLoss, Any]) -> None:
    resident, offloaded, model = both
    pieces = 0
    for lengths in ((4, 1), (9, 3), (2, 2)):
        rows = [example(length, n) for n, length in enumerate(lengths)]
        expected, result = resident.token_loss(rows), offloaded.token_loss(rows)
        assert torch.equal(expected, result)
        of_kept, of_offloaded = gradients(model, expected), gradients(model, result)
        assert of_kept.keys() == of_offloaded.keys() and of_kept
        assert all(torch.equal(grad, of_offloaded[name]) for name, grad in of_kept.items())
        del expected, result
        assert offloaded.host_memory is not None
        free = len(offloaded.host_memory.free)
        size = sum(map(len, rows)) * 4 * model.config.hidden_size
        pieces = max(pieces, (LAYERS - 1) * -(-size // 48))
        assert free == pieces, "all inputs but that of the last layer were offloaded, and their pieces are free again"


def test_backward_twice_and_a_dropped_graph(both: tuple[FastLoss, FastLoss, Any]) -> None:
    resident, offloaded, model = both
    rows, others = [example(5, 0)], [example(3, 1)]
    expected = gradients(model, resident.token_loss(rows))
    first = offloaded.token_loss(rows)
    second = offloaded.token_loss(others)  # another micro-batch before the backward of the first
    result = [gradients(model, first, retain_graph=True), gradients(model, first)]
    for one in result:
        assert all(torch.equal(grad, one[name]) for name, grad in expected.items())
    waiting = len(offloaded.host_memory.free)  # type: ignore[union-attr]
    del second
    gc.collect()
    assert len(offloaded.host_memory.free) > waiting  # type: ignore[union-attr]


def test_failed_forward_leaves_no_pieces(both: tuple[FastLoss, FastLoss, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    resident, offloaded, model = both
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
            offloaded.token_loss(rows)
    offloaded.release_buffers()
    gc.collect()
    free = len(offloaded.host_memory.free)  # type: ignore[union-attr]
    assert free > 0
    expected, result = gradients(model, resident.token_loss(rows)), gradients(model, offloaded.token_loss(rows))
    assert all(torch.equal(grad, result[name]) for name, grad in expected.items())
    with torch.no_grad():
        assert torch.equal(offloaded.token_loss(rows), resident.token_loss(rows))


def test_full_host_memory_raises(both: tuple[FastLoss, FastLoss, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, offloaded, _ = both
    monkeypatch.setattr(pinned, "free_bytes", lambda: pinned.RESERVE)
    with pytest.raises(MemoryError) as raised:
        offloaded.token_loss([example(5, 0)])
    assert is_out_of_memory(raised.value)


class Stream:
    """Records the order of operations on a stream."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.log.append(f"{self.name} marks")
        return "a mark"


def test_copies_and_computation_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """No input is copied before it is computed, freed before it is copied, or used before it has been fetched."""
    log: list[str] = []
    main_stream, copy_stream = Stream(log, "main"), Stream(log, "copy")
    host = HostMemory(CPU)
    host._cuda, host._copy_stream = True, copy_stream
    monkeypatch.setattr(host, "_current_stream", lambda: main_stream)
    monkeypatch.setattr(host, "_on_copy_stream", lambda: torch.no_grad())
    monkeypatch.setattr(host, "_take_piece", lambda: torch.empty(pinned.PIECE, dtype=torch.uint8))
    inputs = [torch.randn(3, 4, requires_grad=True) for _ in range(3)]
    tensors = []
    for n, x in enumerate(inputs):
        hooks: Any = host.offload_inputs(last=n == 2)
        tensors.append(hooks.pack_hook(x))
    copies_out = ["copy waits for main", "copy marks"]
    assert log == [*copies_out, "main waits for a mark", *copies_out, "main waits for a mark"]
    log.clear()
    copies_back = ["copy waits for main", "copy marks"]
    assert torch.equal(tensors[2].get(), inputs[2])
    assert log == copies_back, "the input of the preceding layer is being fetched"
    log.clear()
    assert torch.equal(tensors[1].get(), inputs[1])
    assert log == ["main waits for a mark", *copies_back]
    log.clear()
    tensors.clear()
    assert log == ["main waits for a mark"], "an input that was fetched but not used is not freed during its copy"
