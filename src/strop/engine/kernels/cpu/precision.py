"""Choose the dtype of frozen weights on a device by measurement.

With AVX512-BF16 or AMX, a bf16 matmul takes a quarter to a half of the time of an fp32 matmul. Without them, it can
take a hundred times as long. fp16 is never chosen on a CPU: its backward reached 1 to 3 GFLOP/s, and bf16 reached 900.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from strop.engine.kernels.protocols import FrozenMatmul
from strop.engine.train.lora import frozen_matmul

SHAPES = ((960, 576), (3072, 576), (576, 1536))  # (n, k) of SmolLM2-135M's linear layers
ROWS = 512
MIN_SPEEDUP = 1.2  # bf16 is less precise, so it is chosen only if it is this much faster
BUDGET_S = 0.4  # per dtype; a single slow matmul may exceed it


@dataclass(frozen=True)
class Precision:
    """The chosen dtype of frozen weights, the reason, and the measured rates of matmuls in FLOP/s.

    bf16_s, bf16_cpu_s: elapsed and CPU time of the measurement in bf16. Without instructions for it, PyTorch uses one
    thread.
    """

    dtype: Literal["bf16", "fp32"]
    why: str
    bf16_flops: float
    fp32_flops: float
    bf16_s: float = 0.0
    bf16_cpu_s: float = 0.0


def measure(device: str | torch.device) -> Precision:
    """Measure both dtypes on the device, in about a second."""
    started, cpu_started = time.perf_counter(), time.process_time()
    bf16 = rate(torch.bfloat16, device)
    seconds = time.perf_counter() - started, time.process_time() - cpu_started
    fp32 = rate(torch.float32, device)
    # A ratio: `strop doctor` measures the rates anew, maybe under another load, and this text is stored.
    why = f"measured: matmuls in bf16 are {bf16 / fp32:.2g} times as fast as in fp32"
    if bf16 >= MIN_SPEEDUP * fp32:
        return Precision("bf16", why, bf16, fp32, *seconds)
    return Precision("fp32", f"{why}, below {MIN_SPEEDUP}", bf16, fp32, *seconds)


def rate(
    dtype: torch.dtype, device: str | torch.device, matmul: FrozenMatmul = frozen_matmul,
    prepare: Callable[[Tensor], Any] = lambda weight: weight,
) -> float:  # fmt: skip
    """Return the FLOP/s of x W^T and dY W over SHAPES, from the fastest round within BUDGET_S.

    prepare: converts W to the weight that `matmul` takes.
    """
    operands: list[tuple[Any, ...]] = []
    for n, k in SHAPES:
        shapes = (ROWS, k), (n, k), (ROWS, n), (ROWS, k)
        x, weight, y, grad = (torch.ones(shape, dtype=dtype, device=device) for shape in shapes)
        operands.append((x, prepare(weight), y, grad))
    flops = sum(2 * 2 * ROWS * n * k for n, k in SHAPES)
    cuda = torch.device(device).type == "cuda"
    fastest, begin, rounds = float("inf"), time.perf_counter(), 0
    # The first round includes the initialization of libraries, so it counts only if it exceeds the budget.
    while rounds < 2 or time.perf_counter() - begin < BUDGET_S:
        started = time.perf_counter()
        for x, weight, y, grad in operands:
            matmul(x, weight, True, y)
            matmul(y, weight, False, grad)
        if cuda:
            torch.cuda.synchronize(device)
        if rounds or time.perf_counter() - started > BUDGET_S:
            fastest = min(fastest, time.perf_counter() - started)
        if time.perf_counter() - begin > 4 * BUDGET_S:
            break
        rounds += 1
    return flops / fastest
