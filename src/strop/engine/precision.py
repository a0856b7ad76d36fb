"""Which type frozen weights train fastest in here: measured, never assumed.

On a CPU with AVX512-BF16 or AMX a bf16 product runs 2 to 4 times as fast as in fp32; without them it is emulated and
up to 100 times slower (pytorch#146508). fp16 is never a candidate on a CPU: its backward products are slower still.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

ROWS, INNER, OUTER = 512, 576, 1536  # tokens and sizes of a small model's feed-forward layer
ROUNDS, ROUND_S = 5, 0.04


@dataclass(frozen=True)
class Precision:
    """dtype: `bf16` or `fp32`, and why. Rates in floating-point operations per second."""

    dtype: str
    why: str
    bf16_flops: float
    fp32_flops: float


def measure(device: str) -> Precision:
    """Times x W^T and dY W in both types, alternating, for about half a second; bf16 must win by a tenth."""
    rates: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    pairs = {
        dtype: (
            torch.randn(ROWS, INNER, device=device).to(dtype),
            torch.randn(OUTER, INNER, device=device).to(dtype),
            torch.randn(ROWS, OUTER, device=device).to(dtype),
        )
        for dtype in rates
    }
    for _ in range(ROUNDS):
        for dtype, (x, weight, grad) in pairs.items():
            rates[dtype].append(_rate(x, weight, grad))
    fp32, bf16 = (statistics.median(found) for found in rates.values())
    said = f"bf16 {bf16 / 1e9:.0f}, fp32 {fp32 / 1e9:.0f} GFLOP/s measured here"
    return Precision("bf16" if bf16 > 1.1 * fp32 else "fp32", said, bf16, fp32)


def _rate(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> float:
    x @ weight.T  # a product the library has not seen before is planned first
    started = time.perf_counter()
    done = 0
    while time.perf_counter() - started < ROUND_S:
        x @ weight.T
        grad @ weight
        done += 1
    return done * 4.0 * ROWS * INNER * OUTER / (time.perf_counter() - started)
