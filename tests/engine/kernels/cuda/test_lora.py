"""LoRA's matrix multiplications for a GPU, compared with train/lora.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from strop.engine.kernels.cuda.lora import make_operands
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
    (((0, 8), (10, 12)), (2, 2), (0.5, 2.0)),  # a linear layer between them has no adapter
    (((0, 12),), (3,), (1.5,)),
    (((2, 12),), (3,), (1.5,)),
]


def filled(added: Addend, like: Tensor) -> Tensor:
    added.into(y := torch.empty_like(like))
    return y


@pytest.mark.parametrize("apart", [False, True])
def test_results_match_the_specification(apart: bool) -> None:
    torch.manual_seed(0)
    layers = [replace(adapters(*kind), separate_inputs=apart) for kind in (*KINDS, KINDS[0])]
    operands_of_layers = make_operands([(layer, 12) for layer in layers], torch.float64)
    for layer, operands in zip(layers, operands_of_layers, strict=True):
        z, grad = rand(5, layer.input_columns), rand(5, 12)
        added, context = operands.forward(z, 12, layer)
        expected, saved = lora.forward(z, 12, layer)
        torch.testing.assert_close((filled(added, grad), *context), (filled(expected, grad), *saved), rtol=0, atol=0)
        added, grad_za = operands.backward(grad, context, layer)
        expected, of_za = lora.backward(grad, saved, layer)
        torch.testing.assert_close((filled(added, z), grad_za), (filled(expected, z), of_za), rtol=0, atol=0)
        gradients = operands.gradients(grad, z, grad_za, context, layer)
        torch.testing.assert_close(gradients, lora.gradients(grad, z, grad_za, saved, layer))
        assert all(gradient.is_contiguous() for gradient in gradients), (
            "autograd copies gradients with other strides than the weight"
        )


def test_operands_are_rounded_once() -> None:
    torch.manual_seed(0)
    layer = adapters(*KINDS[0])
    wide = replace(layer, parts=[part.float() for part in layer.parts], scales=(1.7, 1.7))
    (operands_of_layers,) = make_operands([(wide, 12)], torch.bfloat16)
    _, (_, a, b) = lora.forward(rand(5, 6).bfloat16(), 12, wide)
    assert torch.equal(operands_of_layers.a, a) and torch.equal(operands_of_layers.b, b)


def test_operands_of_two_micro_batches_are_separate() -> None:
    """The operands of layer may wait for its backward while the next ones are operands_of_layers."""
    layer = [(adapters(*KINDS[2]), 12)]
    first, second = make_operands(layer, torch.float64), make_operands(layer, torch.float64)
    assert first[0].a.data_ptr() != second[0].a.data_ptr()
