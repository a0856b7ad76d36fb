"""Products of frozen weights in 8-bit integers, for CPUs that have such products (VNNI) and none in bf16.

x and the weight are rounded to multiples of their rows' largest number / 16,256 (15 bits and a sign), and each multiple
is two numbers of 8 bit: 128 high + low. The products of integers are exact (oneDNN's, which sums in 32 bit), whatever
rows stand beside a row; of two low ones the product is left out, 2^-15 of the whole at most. A weight that is held in 8
bit already has a high part alone, and nothing of it is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from numba import prange
from torch import Tensor

from strop.engine import lora
from strop.engine.cpu.compiled import array, greater, loop
from strop.engine.lora import Added
from strop.engine.operations import FrozenProduct

HIGH = 128  # what the high part counts
MOST = 127 * HIGH
SUMS_BYTES = 72 << 20  # in 32 bit, at once


@dataclass(frozen=True)
class Integers:
    """A weight (n, k) as scale (n,) * (128 high + low), or scale * high without a low part; high, low: int8."""

    high: Tensor
    low: Tensor | None
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.high.shape

    def __len__(self) -> int:
        return len(self.high)

    @staticmethod
    def of(weight: Tensor) -> Integers:
        """Of fp32 (n, k)."""
        planes, scale = _in_two(weight, None)
        return Integers(planes[: len(weight)], planes[len(weight) :], scale)


@cache
def exact() -> bool:
    """Whether this CPU's products of 8-bit integers are: some saturate at 16 bit where two products meet."""
    x = torch.full((8, 64), -128, dtype=torch.int8)
    x[::2] = 127
    return bool((torch._int_mm(x, x.t()) == (x.long() @ x.long().t())).all())


@loop
def split(x: Any, columns: Any, there: Any, planes: Any, scale: Any) -> None:
    """planes (2 T, k) int8, the high parts and behind them the low ones, and scale (T,), of x (T, k), whose columns are
    multiplied by `columns` (k,) first where `there`."""
    rows, k = x.shape
    for i in prange(rows):
        one, high, low, most = x[i], planes[i], planes[rows + i], np.float32(0)
        if there:
            for j in range(k):
                most = greater(most, abs(one[j] * columns[j]))
        else:
            for j in range(k):
                most = greater(most, abs(one[j]))
        scale[i] = most / np.float32(MOST)
        times = np.float32(MOST) / most if most > 0 else np.float32(0)
        if there:
            for j in range(k):
                whole = np.int32(np.rint(one[j] * columns[j] * times))
                part = (whole + 64) >> 7
                high[j], low[j] = part, whole - (part << 7)
        else:
            for j in range(k):
                whole = np.int32(np.rint(one[j] * times))
                part = (whole + 64) >> 7
                high[j], low[j] = part, whole - (part << 7)


@loop
def join(
    sums: Any, crossed: Any, scale: Any, columns: Any, bias: Any, extra: Any, held: Any, y: Any
) -> None:  # fmt: skip
    """y (T, n) = scale (T, 1) columns (n,) (sums of integers), + y where `held`, + bias (n,) and extra (T, n) where
    they are not empty. sums (2 T, n): of x's high and low parts with the weight's high part; crossed (T, n), or
    (0, n): of x's high with its low."""
    rows, n = y.shape
    for i in prange(rows):
        out, high, low, own = y[i], sums[i], sums[rows + i], scale[i]
        if not held:
            out[:] = 0
        if len(crossed):
            other = crossed[i]
            for j in range(n):
                out[j] += own * columns[j] * HIGH * (np.float32(HIGH) * high[j] + np.float32(low[j] + other[j]))
        else:
            for j in range(n):
                out[j] += own * columns[j] * (np.float32(HIGH) * high[j] + np.float32(low[j]))
        if len(bias):
            for j in range(n):
                out[j] += bias[j]
        if len(extra):
            more = extra[i]
            for j in range(n):
                out[j] += more[j]


def product(
    x: Tensor, weight: Integers, along: bool, y: Tensor, added: Added | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """lora.product, of fp32, y without gaps."""
    if added is not None:
        added.into(y)
    rows = max(16, SUMS_BYTES // (12 * y.shape[1]))
    for at in range(0, len(x), rows):
        part = slice(at, at + rows)
        _some(x[part], weight, along, y[part], added is not None, bias, None if residual is None else residual[part])
    return y


def head_product(weight: Tensor) -> FrozenProduct:
    """lora.product of a head's frozen weight (V, h): its logits in integers. Not the gradient of what enters: beside a
    token that is far off, probabilities of many others round away."""
    whole = cache(lambda: Integers.of(weight.detach()))

    def logits_or_gradient(
        x: Tensor, w: Tensor, along: bool, y: Tensor, added: Added | None = None, bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if along and not weight.requires_grad and w.data_ptr() == weight.data_ptr():
            return product(x, whole(), along, y, added, bias, residual)
        return lora.product(x, w, along, y, added, bias, residual)

    return cast(FrozenProduct, logits_or_gradient)


def _some(
    x: Tensor, weight: Integers, along: bool, y: Tensor, held: bool, bias: Tensor | None, residual: Tensor | None
) -> None:
    planes, scale = _in_two(x, None if along else weight.scale)
    sums = torch._int_mm(planes, weight.high.t() if along else weight.high)
    crossed = sums[:0]
    if weight.low is not None:
        crossed = torch._int_mm(planes[: len(x)], weight.low.t() if along else weight.low)
    join(
        array(sums), array(crossed), array(scale), array(weight.scale if along else _ones(y.shape[1])),
        array(_NONE if bias is None else bias), array(y[:0] if residual is None else residual.contiguous()), held,
        array(y),
    )  # fmt: skip


def _in_two(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """(planes, scale) as split gives them."""
    planes = torch.empty(2 * len(x), x.shape[1], dtype=torch.int8)
    scale = torch.empty(len(x))
    times = array(_NONE if columns is None else columns)
    split(array(x.contiguous()), times, columns is not None, array(planes), array(scale))
    scale.masked_fill_(~torch.isfinite(x.sum(1)), torch.nan)  # integers have neither NaN nor infinity
    return planes, scale


@cache
def _ones(n: int) -> Tensor:
    return torch.ones(n)


_NONE = torch.empty(0)
