"""Exact argmax with an 8-bit head: the result of the full head, the first of equal ones, or no result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from strop.engine.decode.compiled_model import (
    PAUSE_PASSES,
    ExactArgmax,
    activation_dtype,
    exact_argmax_for,
    quantize_head,
)
from strop.engine.kernels.cpu import sampling
from strop.engine.kernels.cpu.compiled import array
from strop.engine.kernels.cpu.decode_matmul import Dense, dense_matmul

DTYPES = [torch.float32, torch.bfloat16]


def heads(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return rows of different lengths: some with outliers, one twice, one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator)
    weight[::7, 3] *= 30
    weight[n // 2] = weight[n // 3]
    weight[n // 5] = 0
    return weight.to(dtype)


def rows(count: int, weight: torch.Tensor, sharp: float, seed: int = 1) -> Any:
    """Return inputs that point to some row of the head, more so with a greater `sharp`."""
    generator = torch.Generator().manual_seed(seed)
    targets = weight[torch.randint(len(weight), (count,), generator=generator)].float()
    z = torch.randn(count, weight.shape[1], generator=generator) + sharp * targets
    return array(z.to(activation_dtype(weight.dtype)))


def exact_argmax(weight: torch.Tensor, z: Any, scale: float = 1.0) -> Any:
    logits = np.empty((len(z), len(weight)), np.float32)
    dense_matmul(Dense(array(weight)), z, logits, torch.get_num_threads())
    return (logits * np.float32(scale)).argmax(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, k, count, sharp", [(4096, 576, 1, 1), (4099, 64, 5, 2), (160, 2048, 17, 0), (1000, 96, 3, 9)]
)
@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_token_is_that_of_the_whole_head(
    dtype: torch.dtype, n: int, k: int, count: int, sharp: float, scale: float
) -> None:
    if sampling.USES_AMX and n % sampling.LANES:
        pytest.skip("not used: the last rows are not multiplied in tiles (exact_argmax_for)")
    results = 0
    for seed in range(20):
        weight = heads(n, k, dtype, seed)
        z = rows(count, weight, sharp, seed)
        places = ExactArgmax(weight, array(weight), scale).argmax(z)
        if places is not None:
            results += 1
            assert (places == exact_argmax(weight, z, scale)).all()
    assert results > 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_of_estimates_is_bounded(dtype: torch.dtype) -> None:
    """The error of the head in 8 bits, compared with fp64."""
    weight = heads(2000, 576, dtype)
    numbers, scales, reach = quantize_head(weight, sampling.LANES)
    z = torch.randn(64, 576, generator=torch.Generator().manual_seed(0)) + 3 * weight[:64].float()
    small = torch.from_numpy(numbers).view(-1, 576)[:2000].double() * torch.from_numpy(scales)[:2000, None].double()
    off = ((small - weight.double()) @ z.double().T).abs() / z.double().norm(dim=1)
    assert (off <= torch.from_numpy(reach)[:, None]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_give_the_first_token(dtype: torch.dtype) -> None:
    weight = heads(4096, 576, dtype)
    weight[4000] = weight[17] = weight[3999] = 3 * weight[9]
    z = array((weight[17] * 2)[None].to(activation_dtype(dtype)))
    assert ExactArgmax(weight, array(weight), 1.0).argmax(z).tolist() == [17] == exact_argmax(weight, z).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_too_many_candidates_return_none_and_pause(dtype: torch.dtype) -> None:
    weight = torch.ones(4096, 64, dtype=dtype)
    weight[9] = 2.0
    screen = ExactArgmax(weight, array(weight), 1.0)
    z = array(torch.zeros(1, 64, dtype=activation_dtype(dtype)))
    sharp = array(torch.ones(1, 64, dtype=activation_dtype(dtype)))
    assert screen.argmax(z) is None
    assert [screen.argmax(sharp) for _ in range(PAUSE_PASSES)] == [None] * PAUSE_PASSES
    assert screen.argmax(sharp).tolist() == [9]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_nonfinite_values_return_none(dtype: torch.dtype, value: float) -> None:
    weight = heads(2048, 64, dtype)
    z = torch.randn(3, 64).to(activation_dtype(dtype))
    z[1, 5] = value
    assert ExactArgmax(weight, array(weight), 1.0).argmax(array(z)) is None
    weight[7, 8] = value
    z[1, 5] = 1.0
    assert ExactArgmax(weight, array(weight), 1.0).argmax(array(z)) is None


def test_screen_is_used_only_where_it_saves_time_and_is_exact() -> None:
    head, z = torch.nn.Linear(64, 512, bias=False), np.empty(0, np.float32)

    def is_used(head: Any = head, *, scale: float = 1.0, softcap: float | None = None, read: int = 0) -> bool:
        return exact_argmax_for(head, None, z, scale, softcap, read) is not None

    assert is_used() and is_used(scale=0.1) and is_used(read=8 * 512 * 64 * 4)
    assert not is_used(read=10 * 512 * 64 * 4)
    assert not is_used(softcap=30.0) and not is_used(scale=-1.0)
    assert not is_used(torch.nn.Linear(64, 512))
