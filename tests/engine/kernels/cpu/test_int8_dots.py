"""Dot products of int8 weights with inputs in int16, compared with fp64 and with bf16."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from strop.engine.kernels.cpu import decode_layer, decode_matmul, int8_dots

pytestmark = pytest.mark.skipif(not int8_dots.INT8_DOTS, reason="this CPU has no AVX512-VNNI")


def multiplied(
    weight: torch.Tensor, scale: torch.Tensor, z: torch.Tensor, column: int = 0, lanes: int = 2
) -> np.ndarray:
    """Return (T, column + n) with z (weight scale)^T from `column`; the rest is 0."""
    n, k = weight.shape
    w = decode_matmul.Quantized(weight.flatten().numpy(), scale.numpy(), np.empty(0, np.float32), k, n)
    none = np.empty((0, 0), np.float32)
    before = decode_matmul.Quantized(
        np.zeros(column * k, np.int8), np.zeros(column, np.float32), np.empty(0, np.float32), k, column
    )
    linear = decode_matmul.Linear(
        (before, w), none[0:0].reshape(-1), np.empty((0, k), np.uint16), np.zeros((0, 2), np.int64), none.reshape(-1),
        np.zeros((0, 6), np.int64), none,
    )  # fmt: skip
    bits, y = z.view(torch.uint16).numpy(), np.zeros((len(z), column + n), np.float32)
    # The type is strop's own: numba's cache names it, and processes that cannot import the tests read the cache too.
    room = decode_layer.Buffers(
        inputs=np.empty(0, np.uint16), queries=np.empty(0, np.uint16), outputs=np.empty(0, np.float32),
        lora_a_outputs=np.empty(0, np.float32), weight_like=np.empty(0, np.uint16),
        quantized_inputs=np.empty(z.numel(), np.int16), input_scales=np.empty(len(z), np.float32),
    )  # fmt: skip
    decode_matmul.linear_forward(linear, room, bits, np.zeros((0, 2), np.int64), y, lanes)
    return y


def make_case(n: int, k: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a weight, its scales, and rows with a few outliers, as those of a model."""
    torch.manual_seed(rows)
    weight, scale = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n) / 1000
    z = torch.randn(rows, k)
    z[:, :: k // 3] *= 30
    return weight, scale, z.bfloat16()


def exact(weight: torch.Tensor, scale: torch.Tensor, z: torch.Tensor) -> np.ndarray:
    result: np.ndarray = (z.double() @ (weight.double() * scale.double()[:, None]).t()).numpy()
    return result


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 13, 40])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (48, 96), (40, 576), (96, 1536), (32, 20_000)])  # 40: half a block left
def test_results_are_closer_than_those_of_the_weight_in_bf16(rows: int, n: int, k: int) -> None:
    weight, scale, z = make_case(n, k, rows)
    expected = exact(weight, scale, z)
    result = multiplied(weight, scale, z, 3)
    assert not result[:, :3].any()
    whole, rounded = n // 16 * 16, (weight * scale[:, None]).bfloat16()
    error = result[:, 3 : 3 + whole] - expected[:, :whole]
    error_bf16 = (z.double() @ rounded.double().t()).numpy() - expected
    assert np.square(error).mean() < 0.25 * np.square(error_bf16[:, :whole]).mean()
    # the rest of a block is multiplied in bf16
    rest = result[:, 3 + whole :] - (z.double() @ rounded[whole:].double().t()).numpy()
    assert np.abs(rest).max(initial=0) <= 1e-5 * np.abs(expected).max()


def test_only_the_rounding_of_the_row_loses_precision() -> None:
    """Rows of integers up to 127 times a power of two lose only the last bits of fp32 sums."""
    torch.manual_seed(0)
    weight, z = torch.randint(-127, 128, (32, 640), dtype=torch.int8), torch.randint(-127, 128, (9, 640)).float()
    z[:, 5] = 127.99609375 / 2  # a row's step is its largest value / 32,767, which is not a multiple of 127
    z[:, 7] = 128
    scale = torch.full((32,), 0.5)
    step = 128 / 32767
    whole = torch.round(z.bfloat16().double() / step)
    result = multiplied(weight, scale, z.bfloat16())
    assert np.allclose(result, exact(weight, scale, whole * step), rtol=2e-6, atol=1e-2)


@pytest.mark.parametrize("k", [int8_dots.STRETCH, 2 * int8_dots.STRETCH])
def test_largest_sums_do_not_overflow(k: int) -> None:
    weight, z = torch.full((16, k), 127, dtype=torch.int8), torch.full((5, k), 3.0).bfloat16()
    weight[8:] = -127
    scale = torch.ones(16)
    assert np.allclose(multiplied(weight, scale, z), exact(weight, scale, z), rtol=1e-5)


def test_rows_of_odd_length_are_multiplied_in_bf16() -> None:
    weight, scale, z = make_case(16, 48, 3)
    rounded = (weight * scale[:, None]).bfloat16()
    assert np.allclose(multiplied(weight, scale, z), (z.double() @ rounded.double().t()).numpy(), rtol=1e-5, atol=1e-5)


def test_a_row_has_the_same_bits_in_any_batch_with_any_threads() -> None:
    weight, scale, z = make_case(80, 576, 41)
    whole = multiplied(weight, scale, z)
    for begin, end in ((0, 1), (7, 9), (3, 10), (20, 41)):
        for lanes in (1, 2, 5):
            assert np.array_equal(multiplied(weight, scale, z[begin:end], lanes=lanes), whole[begin:end])


def test_nonfinite_rows_become_nan_and_zeros_stay_zeros() -> None:
    weight, scale, z = make_case(32, 64, 6)
    z[1, 5], z[3, 60], z[4, 0] = float("nan"), float("inf"), float("-inf")
    z[5] = 0
    result = multiplied(weight, scale, z)
    assert np.isnan(result[[1, 3, 4]]).all() and not result[5].any()
    assert np.array_equal(result[[0, 2]], multiplied(weight, scale, z[[0, 2]]))
