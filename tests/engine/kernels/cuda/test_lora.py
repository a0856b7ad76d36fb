"""The adapters' products as a card has them, against lora.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from strop.engine.kernels.cuda.lora import laid_out
from strop.engine.train import lora
from strop.engine.train.lora import Adapters, Addend
from tests.support.attention import rand


def adapters(columns: tuple[tuple[int, int], ...], ranks: tuple[int, ...], scales: tuple[float, ...]) -> Adapters:
    parts = []
    for (start, end), r in zip(columns, ranks, strict=True):
        parts += [rand(r, 6), rand(end - start, r)]
    return Adapters(parts, columns, scales)


KINDS = [
    (((0, 8), (8, 12)), (2, 3), (0.5, 0.5)),
    (((0, 8), (10, 12)), (2, 2), (0.5, 2.0)),  # a linear layer between them has none
    (((0, 12),), (3,), (1.5,)),
    (((2, 12),), (3,), (1.5,)),
]


def filled(added: Addend, like: Tensor) -> Tensor:
    added.into(y := torch.empty_like(like))
    return y


@pytest.mark.parametrize("separate_inputs", [False, True])
def test_as_in_pytorch(separate_inputs: bool) -> None:
    torch.manual_seed(0)
    layers = [replace(adapters(*kind), separate_inputs=separate_inputs) for kind in (*KINDS, KINDS[0])]
    made = laid_out([(one, 12) for one in layers], torch.float64)
    for one, operands in zip(layers, made, strict=True):
        z, grad = rand(5, one.input_columns), rand(5, 12)
        added, kept = operands.forward(z, 12, one)
        expected, own = lora.forward(z, 12, one)
        torch.testing.assert_close((filled(added, grad), *kept), (filled(expected, grad), *own), rtol=0, atol=0)
        added, grad_za = operands.backward(grad, kept, one)
        expected, of_za = lora.backward(grad, own, one)
        torch.testing.assert_close((filled(added, z), grad_za), (filled(expected, z), of_za), rtol=0, atol=0)
        gradients = operands.gradients(grad, z, grad_za, kept, one)
        torch.testing.assert_close(gradients, lora.gradients(grad, z, grad_za, own, one))
        assert all(found.is_contiguous() for found in gradients), "autograd copies what is not laid out as the weight"


def test_operands_are_rounded_once() -> None:
    torch.manual_seed(0)
    one = adapters(*KINDS[0])
    wide = replace(one, parts=[part.float() for part in one.parts], scales=(1.7, 1.7))
    (made,) = laid_out([(wide, 12)], torch.bfloat16)
    _, (_, a, b) = lora.forward(rand(5, 6).bfloat16(), 12, wide)
    assert torch.equal(made.a, a) and torch.equal(made.b, b)


def test_operands_of_two_micro_batches_lie_apart() -> None:
    """What one computed with may wait for its backward while the next is laid out."""
    one = [(adapters(*KINDS[2]), 12)]
    first, second = laid_out(one, torch.float64), laid_out(one, torch.float64)
    assert first[0].a.data_ptr() != second[0].a.data_ptr()
