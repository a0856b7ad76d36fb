"""Measuring the dtype of frozen weights: quick, and the choice follows from the rates."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import pytest
import torch

from strop.engine.kernels.cpu import precision
from strop.engine.kernels.cpu.precision import MIN_SPEEDUP, measure


@pytest.mark.parametrize(
    ("bf16", "fp32", "expected"), [(4e11, 2e11, "bf16"), (2.1e11, 2e11, "fp32"), (1e9, 2e11, "fp32")]
)
def test_choice_follows_from_the_rates(
    bf16: float, fp32: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "rate", lambda dtype, device: bf16 if dtype == torch.bfloat16 else fp32)
    measured = measure("cpu")
    assert measured.dtype == expected
    assert measured.why.startswith("measured: matmuls in bf16 are ")


def test_measurement_takes_seconds() -> None:
    started = time.perf_counter()
    measured = measure("cpu")
    assert time.perf_counter() - started < 20  # about a second on an idle machine
    assert measured.bf16_flops > 1e6
    assert measured.fp32_flops > 1e6
    assert measured.dtype == ("bf16" if measured.bf16_flops >= MIN_SPEEDUP * measured.fp32_flops else "fp32")
    assert json.loads(json.dumps(asdict(measured)))["dtype"] == measured.dtype
