"""Operations as PyTorch compiles them for cards, compiled for the CPU here."""

from __future__ import annotations

import shutil

import pytest
import torch

from strop.engine import eager
from strop.engine.card import fused


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's compiler about its own parts
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles with g++ on a CPU")
def test_compiled_operations_equal_plain_ones() -> None:
    """As cards have them, compiled for the CPU here; other lengths are not compiled anew."""
    for tokens in (5, 9):
        x, weight, grad = torch.randn(tokens, 16), torch.randn(16), torch.randn(tokens, 16)
        arguments = (grad, x, weight, 1e-5, 1.0)
        torch.testing.assert_close(fused.rms_norm_backward(*arguments), eager.rms_norm_backward(*arguments))
        labels, weights, made = torch.arange(tokens), torch.rand(tokens), torch.randn(tokens, 40)
        expected = made.clone()
        loss = fused.cross_entropy_(made, labels, weights, 0.0, True)
        torch.testing.assert_close(loss, eager.cross_entropy_(expected, labels, weights, 0.0, True))
        torch.testing.assert_close(made, expected)
