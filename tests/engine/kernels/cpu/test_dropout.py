"""The compiled dropout kernels have the same bits as train/dropout.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from strop.engine.train import dropout
from strop.engine.train.dropout import LEVELS, DropoutSpec, token_keys


@pytest.fixture
def kernels() -> Iterator[Any]:
    from strop.engine.kernels.cpu import dropout as cpu_dropout

    threads = torch.get_num_threads()
    yield cpu_dropout
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 16, 20, 24, 96, 576])
@pytest.mark.parametrize("seed", [0, 0xFFFFFFFF])
def test_spread_and_fold_match_the_specification(kernels: Any, width: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(0)
    tokens = torch.from_numpy(token_keys(np.arange(67)))
    assert (tokens < 0).any() and (tokens > 0).any()
    for numbers, levels in (((3, 900, 70000), (3277, 0, 60000)), ((0,), (LEVELS - 1,))):
        dropped = DropoutSpec(seed, 7, tokens, numbers, levels)
        z, grad = torch.randn(67, width).to(dtype), torch.randn(67, len(numbers) * width).to(dtype)
        assert torch.equal(kernels.apply_masks(z, dropped), dropout.apply_masks(z, dropped))
        expected = dropout.apply_masks_backward(grad.double(), dropped)
        result = kernels.apply_masks_backward(grad, dropped)
        rounded = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(result.double(), expected, rtol=rounded, atol=1e-6)
        if len(numbers) == 1:  # there is no sum
            assert torch.equal(result, dropout.apply_masks_backward(grad, dropped))


def test_input_may_be_strided(kernels: Any) -> None:
    tokens = torch.from_numpy(token_keys(np.arange(9)))
    dropped = DropoutSpec(0, 0, tokens, (1, 2), (30000, 30000))
    wide = torch.randn(9, 64)
    assert torch.equal(
        kernels.apply_masks(wide[:, ::2], dropped), dropout.apply_masks(wide[:, ::2].contiguous(), dropped)
    )
