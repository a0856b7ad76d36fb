"""Matrix multiplication in AMX tiles: the values of fp64, and no row changes another's bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from strop.engine.kernels.cpu import amx, decode_matmul

pytestmark = pytest.mark.skipif(not amx.AVAILABLE, reason="this CPU has no AMX")


def multiplied(weight: torch.Tensor, z: torch.Tensor, column: int, width: int) -> np.ndarray:
    """Return (T, width) with z w^T from `column`."""
    y = np.zeros((len(z), width), np.float32)
    bits = z.view(torch.uint16).numpy()
    packed = decode_matmul.packed_buffer(bits)
    decode_matmul.pack_rows(bits, packed, 2)
    decode_matmul.dense_matmul_packed(
        decode_matmul.Dense(weight.view(torch.uint16).numpy()), bits, packed, y, column, 2
    )
    return y


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 49, 100])
@pytest.mark.parametrize(("n", "k"), [(16, 16), (48, 80), (40, 576), (96, 1536)])  # 40: half a block remains
def test_results_match_fp64(rows: int, n: int, k: int) -> None:
    torch.manual_seed(rows)
    weight, z = torch.randn(n, k).bfloat16(), torch.randn(rows, k).bfloat16()
    y = multiplied(weight, z, 3, n + 5)
    exact = z.double() @ weight.double().t()
    assert np.abs(y[:, 3 : 3 + n] - exact.numpy()).max() <= 1e-5 * k
    assert not y[:, :3].any() and not y[:, 3 + n :].any()


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    torch.manual_seed(0)
    weight, z = torch.randn(64, 576).bfloat16(), torch.randn(70, 576).bfloat16()
    all_rows = multiplied(weight, z, 0, 64)
    for rows in (1, 3, 16, 40):
        assert np.array_equal(multiplied(weight, z[:rows], 0, 64), all_rows[:rows])
    dense = decode_matmul.Dense(weight.view(torch.uint16).numpy())
    y = np.zeros((1, 64), np.float32)
    decode_matmul.dense_matmul(dense, z[5:6].view(torch.uint16).numpy(), y, 1)
    assert np.array_equal(y, all_rows[5:6])
