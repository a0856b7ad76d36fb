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

from strop.engine.kernels.cpu.compiled import array, greater, inline, loop
from strop.engine.kernels.protocols import FrozenProduct, ReusedBuffer
from strop.engine.train import lora
from strop.engine.train.lora import Addend

HIGH = 128  # what the high part counts
MOST = 127 * HIGH
LEAST = 1e-34  # a row of smaller numbers is one of zeros
FAR, BLOCK = 2**-10, 64  # share of a row's largest number from which on a gradient of the head is far from the others
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
        planes, scale = _in_two(weight, weight[:0, 0], weight[:0, 0])
        return Integers(planes[: len(weight)], planes[len(weight) :], scale)


@inline
def _in_parts(one: Any, columns: Any, there: Any, limit: Any, high: Any, low: Any) -> Any:
    """A row of `split`; gives its scale."""
    most = np.float32(0)
    if there:
        for j in range(len(one)):
            size = abs(one[j] * columns[j])
            most = greater(most, size if size <= limit else np.float32(0))
    else:
        for j in range(len(one)):
            most = greater(most, abs(one[j]))
    times = np.float32(MOST) / most if most > LEAST else np.float32(0)
    if there:
        for j in range(len(one)):
            number = one[j] * columns[j]
            whole = np.int32(np.rint(number * times if abs(number) <= limit else np.float32(0)))
            part = (whole + 64) >> 7
            high[j], low[j] = part, whole - (part << 7)
    else:
        for j in range(len(one)):
            whole = np.int32(np.rint(one[j] * times))
            part = (whole + 64) >> 7
            high[j], low[j] = part, whole - (part << 7)
    return most / np.float32(MOST)


@loop
def split(x: Any, columns: Any, there: Any, limits: Any, planes: Any, scale: Any) -> None:
    """planes (2 T, k) int8, the high parts and behind them the low ones, and scale (T,), of x (T, k), whose columns are
    multiplied by `columns` (k,) first where `there`; what is above `limits` (T,) then, where they are not empty, counts
    as 0."""
    rows = len(x)
    for i in prange(rows):
        limit = limits[i] if len(limits) else np.float32(np.inf)
        scale[i] = _in_parts(x[i], columns, there, limit, planes[i], planes[rows + i])


@loop
def lift(x: Any, columns: Any, w: Any, limits: Any, y: Any) -> None:
    """limits (T,): of each row of x (T, k) times columns (k,), a share of the largest; y (T, n): what is above it times
    w (k, n)."""
    rows, k = x.shape
    for i in prange(rows):
        one, out, most = x[i], y[i], np.float32(0)
        for j in range(k):
            most = greater(most, abs(one[j] * columns[j]))
        limits[i], out[:] = most * np.float32(FAR), 0
        for begin in range(0, k, BLOCK):
            end, here = min(k, begin + BLOCK), np.float32(0)
            for j in range(begin, end):
                here = greater(here, abs(one[j] * columns[j]))
            if here > limits[i]:
                for j in range(begin, end):
                    if abs(one[j] * columns[j]) > limits[i]:
                        row = w[j]
                        for c in range(len(row)):
                            out[c] += one[j] * row[c]


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


class Products:
    """Products with weights in integers, one after the other: their sums lie in one place."""

    def __init__(self) -> None:
        self._sums = ReusedBuffer()  # blocks so large have pages of their own, which would be cleared for each product

    def layer(
        self, x: Tensor, weight: Integers, along: bool, y: Tensor, added: Addend | None = None,
        bias: Tensor | None = None, residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """lora.frozen_matmul, of fp32, y without gaps."""
        if added is not None:
            added.into(y)
        return self._sum(x, weight, along, y, held=added is not None, bias=bias, residual=residual)

    def head(self, weight: Tensor) -> FrozenProduct:
        """lora.frozen_matmul of a head's frozen weight (V, h). In a row of the logits' gradient a few values,
        the label's first, are far above the others, which would round to 0: they are multiplied in fp32."""
        whole = cache(lambda: Integers.of(weight.detach()))

        def of_head(
            x: Tensor, w: Tensor, along: bool, y: Tensor, added: Addend | None = None, bias: Tensor | None = None,
            residual: Tensor | None = None,
        ) -> Tensor:  # fmt: skip
            if weight.requires_grad or w.data_ptr() != weight.data_ptr():  # it is trained in full
                return lora.frozen_matmul(x, w, along, y, added, bias, residual)
            if along:
                return self.layer(x, whole(), along, y, added, bias, residual)
            assert added is None and bias is None and residual is None
            limits = torch.empty(len(x))
            lift(array(x), array(whole().scale), array(w), array(limits), array(y))
            return self._sum(x, whole(), along, y, held=True, limits=limits)

        return cast(FrozenProduct, of_head)

    def _sum(
        self, x: Tensor, weight: Integers, along: bool, y: Tensor, *, held: bool, bias: Tensor | None = None,
        residual: Tensor | None = None, limits: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """held: added to what y holds."""
        n, none = y.shape[1], x.new_empty(0)
        rows, columns = max(16, SUMS_BYTES // (12 * n)), none if along else weight.scale
        high, low = (None if part is None else part.t() if along else part for part in (weight.high, weight.low))
        for at in range(0, len(x), rows):
            some = slice(at, at + rows)
            planes, scale = _in_two(x[some], columns, none if limits is None else limits[some])
            sums, crossed = torch.split(self._sums(3 * len(scale), n, _WHOLE), [2 * len(scale), len(scale)])
            torch._int_mm(planes, cast(Tensor, high), out=sums)
            if low is None:
                crossed = crossed[:0]
            else:
                torch._int_mm(planes[: len(scale)], low, out=crossed)
            more = y[:0] if residual is None else residual[some].contiguous()
            by_column = weight.scale if along else _ones(n)
            given = sums, crossed, scale, by_column, none if bias is None else bias, more
            cast(Any, join)(*map(array, given), held, array(y[some]))
        return y


def _in_two(x: Tensor, columns: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """(planes, scale) as split gives them."""
    planes, scale = torch.empty(2 * len(x), x.shape[1], dtype=torch.int8), torch.empty(len(x))
    split(array(x.contiguous()), array(columns), len(columns) > 0, array(limits), array(planes), array(scale))
    scale.masked_fill_(~torch.isfinite(x.sum(1)), torch.nan)  # integers have neither NaN nor infinity
    return planes, scale


@cache
def _ones(n: int) -> Tensor:
    return torch.ones(n)


_WHOLE = torch.empty(0, dtype=torch.int32)
