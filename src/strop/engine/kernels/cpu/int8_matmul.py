"""Matrix multiplication by frozen weights with int8 instructions, for CPUs with VNNI and without bf16 instructions.

Each row of the input and of the weight is rounded to multiples of its largest absolute value / 16,256. Each multiple is
split into two int8 values: 128 high + low. The int8 matmuls are exact, with sums in 32 bits. The product of both low
parts, at most 2^-15 of the result, is left out. An int8 weight has only a high part and is not rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from numba import prange
from torch import Tensor

from strop.engine.kernels.cpu.compiled import array, kernel, maximum, subroutine
from strop.engine.kernels.protocols import FrozenMatmul, ReusedBuffer
from strop.engine.train import lora
from strop.engine.train.lora import Addend

HIGH = 128  # factor of the high part
LARGEST = 127 * HIGH
SMALLEST = 1e-34  # rows with only smaller values are treated as zeros
OUTLIER = 2**-10  # a logit gradient above this share of the row's largest value is an outlier
BLOCK = 64  # elements that are searched for outliers together
SUMS_BYTES = 72 << 20  # maximum size of the buffer of 32-bit sums


@dataclass(frozen=True)
class Int8Weight:
    """A weight (n, k) with the value scale (n,) * (128 high + low), or scale * high if low is None. high, low: int8."""

    high: Tensor
    low: Tensor | None
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.high.shape

    def __len__(self) -> int:
        return len(self.high)

    @staticmethod
    def quantize(weight: Tensor) -> Int8Weight:
        """Quantize an fp32 weight (n, k)."""
        planes, scale = _split_rows(weight, _ones(weight.shape[1]), weight[:0, 0])
        return Int8Weight(planes[: len(weight)], planes[len(weight) :], scale)


@subroutine
def _split_row(x: Any, columns: Any, limit: Any, high: Any, low: Any) -> Any:
    """Split one row and return its scale."""
    largest = np.float32(0)
    for j in range(len(x)):
        value_abs = abs(x[j] * columns[j])
        largest = maximum(largest, value_abs if value_abs <= limit else np.float32(0))
    factor = np.float32(LARGEST) / largest if largest > SMALLEST else np.float32(0)
    for j in range(len(x)):
        value = x[j] * columns[j]
        multiple = np.int32(np.rint(value * factor if abs(value) <= limit else np.float32(0)))
        upper = (multiple + 64) >> 7
        high[j], low[j] = upper, multiple - (upper << 7)
    return largest / np.float32(LARGEST)


@kernel
def split_rows(x: Any, columns: Any, limits: Any, planes: Any, scale: Any) -> None:
    """Quantize x (T, k) * columns (k,) to planes (2 T, k), int8 high parts followed by low parts, and scale (T,).

    limits: (T,), greater absolute values are treated as 0; or empty.
    """
    rows = len(x)
    for i in prange(rows):
        limit = limits[i] if len(limits) else np.float32(np.inf)
        scale[i] = _split_row(x[i], columns, limit, planes[i], planes[rows + i])


@kernel
def multiply_outliers(x: Any, columns: Any, w: Any, limits: Any, y: Any) -> None:
    """Multiply the outliers of x (T, k) * columns (k,) by w (k, n) in fp32, and write the result to y (T, n).

    limits: output, (T,), the value above which an element of the row is an outlier.
    """
    rows, k = x.shape
    for i in prange(rows):
        row_x, out, largest = x[i], y[i], np.float32(0)
        for j in range(k):
            largest = maximum(largest, abs(row_x[j] * columns[j]))
        limits[i], out[:] = largest * np.float32(OUTLIER), 0
        for begin in range(0, k, BLOCK):
            end, block_largest = min(k, begin + BLOCK), np.float32(0)
            for j in range(begin, end):
                block_largest = maximum(block_largest, abs(row_x[j] * columns[j]))
            if block_largest > limits[i]:
                for j in range(begin, end):
                    if abs(row_x[j] * columns[j]) > limits[i]:
                        row = w[j]
                        for c in range(len(row)):
                            out[c] += row_x[j] * row[c]


@kernel
def combine(
    sums: Any, cross: Any, scale: Any, columns: Any, bias: Any, extra: Any, accumulate: Any, y: Any
) -> None:  # fmt: skip
    """Compute y (T, n) = scale (T, 1) * columns (n,) * the sums, + bias (n,), + extra (T, n), + y if `accumulate`.

    sums (2 T, n): the high and low parts of x times the high part of the weight. cross (T, n): the high part of x times
    the low part of the weight. cross, bias and extra may be empty.
    """
    rows, n = y.shape
    for i in prange(rows):
        out, high, low, row_scale = y[i], sums[i], sums[rows + i], scale[i]
        if not accumulate:
            out[:] = 0
        if len(cross):
            cross_row = cross[i]
            for j in range(n):
                out[j] += (
                    row_scale * columns[j] * HIGH * (np.float32(HIGH) * high[j] + np.float32(low[j] + cross_row[j]))
                )
        else:
            for j in range(n):
                out[j] += row_scale * columns[j] * (np.float32(HIGH) * high[j] + np.float32(low[j]))
        if len(bias):
            for j in range(n):
                out[j] += bias[j]
        if len(extra):
            extra_row = extra[i]
            for j in range(n):
                out[j] += extra_row[j]


class Int8Matmul:
    """Matrix multiplications by int8 weights, with a shared buffer for the sums."""

    def __init__(self) -> None:
        self._sums = ReusedBuffer()  # a new allocation of this size would be zeroed by the operating system

    def layer(
        self, x: Tensor, weight: Int8Weight, transposed: bool, y: Tensor, added: Addend | None = None,
        bias: Tensor | None = None, residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute the same as train.lora.frozen_matmul in fp32. y must be contiguous."""
        if added is not None:
            added.into(y)
        return self._sum(x, weight, transposed, y, accumulate=added is not None, bias=bias, residual=residual)

    def head(self, weight: Tensor) -> FrozenMatmul:
        """Return train.lora.frozen_matmul for the frozen weight of the output head, (V, h).

        In each row of the logits' gradient, a few values are so large, above all the label's, that the others would be
        rounded to 0. These outliers are multiplied in fp32.
        """
        quantized = cache(lambda: Int8Weight.quantize(weight.detach()))

        def head_matmul(
            x: Tensor, w: Tensor, transposed: bool, y: Tensor, added: Addend | None = None, bias: Tensor | None = None,
            residual: Tensor | None = None,
        ) -> Tensor:  # fmt: skip
            if weight.requires_grad or w.data_ptr() != weight.data_ptr():  # the head is fully trained
                return lora.frozen_matmul(x, w, transposed, y, added, bias, residual)
            if transposed:
                return self.layer(x, quantized(), transposed, y, added, bias, residual)
            assert added is None and bias is None and residual is None
            limits = torch.empty(len(x))
            multiply_outliers(array(x), array(quantized().scale), array(w), array(limits), array(y))
            return self._sum(x, quantized(), transposed, y, accumulate=True, limits=limits)

        return cast(FrozenMatmul, head_matmul)

    def _sum(
        self, x: Tensor, weight: Int8Weight, transposed: bool, y: Tensor, *, accumulate: bool,
        bias: Tensor | None = None, residual: Tensor | None = None, limits: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute the matmul, and add it to y if `accumulate`."""
        n, empty = y.shape[1], x.new_empty(0)
        rows, columns = max(16, SUMS_BYTES // (12 * n)), _ones(x.shape[1]) if transposed else weight.scale
        high, low = weight.high, weight.low
        if transposed:
            high, low = high.t(), None if low is None else low.t()
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            planes, scale = _split_rows(x[part], columns, empty if limits is None else limits[part])
            sums, cross = torch.split(self._sums(3 * len(scale), n, _INT32), [2 * len(scale), len(scale)])
            torch._int_mm(planes, high, out=sums)
            if low is None:
                cross = cross[:0]
            else:
                torch._int_mm(planes[: len(scale)], low, out=cross)
            extra = y[:0] if residual is None else residual[part].contiguous()
            by_column = weight.scale if transposed else _ones(n)
            operands = sums, cross, scale, by_column, empty if bias is None else bias, extra
            cast(Any, combine)(*map(array, operands), accumulate, array(y[part]))
        return y


def _split_rows(x: Tensor, columns: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the planes and scales of split_rows. Rows with NaN or infinity get the scale NaN."""
    planes, scale = torch.empty(2 * len(x), x.shape[1], dtype=torch.int8), torch.empty(len(x))
    split_rows(array(x.contiguous()), array(columns), array(limits), array(planes), array(scale))
    scale.masked_fill_(~torch.isfinite(x.sum(1)), torch.nan)
    return planes, scale


@cache
def _ones(n: int) -> Tensor:
    return torch.ones(n)


_INT32 = torch.empty(0, dtype=torch.int32)
