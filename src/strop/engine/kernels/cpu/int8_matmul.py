"""Matrix multiplication by frozen weights in 8-bit integers, for CPUs with VNNI and without bf16 instructions.

The input and the weight are rounded to multiples of their rows' largest value / 16,256 (15 bits and a sign), and each
multiple is split into two int8: 128 high + low. The matmuls of integers are exact (oneDNN's, which sums in 32 bits),
whatever other rows there are; the term low x low is left out, at most 2^-15 of the whole. A weight that is already
stored in 8 bits has only a high part, and is not rounded.
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

HIGH = 128  # value of a unit of the high part
LARGEST = 127 * HIGH
SMALLEST = 1e-34  # rows of smaller values are treated as zeros
OUTLIER, BLOCK = 2**-10, 64  # share of a row's largest value above which a gradient of the head is an outlier
SUMS_BYTES = 72 << 20  # of sums in 32 bits that are computed at once


@dataclass(frozen=True)
class Int8Weight:
    """A weight (n, k): scale (n,) * (128 high + low), or scale * high without a low part; high, low: int8."""

    high: Tensor
    low: Tensor | None
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.high.shape

    def __len__(self) -> int:
        return len(self.high)

    @staticmethod
    def of(weight: Tensor) -> Int8Weight:
        """Quantize a weight in fp32, (n, k)."""
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
    """Split x (T, k) times `columns` (k,) into planes (2 T, k) int8, all high parts before all low ones, and scale.

    limits (T,) or (0,): greater absolute values count as 0. scale: (T,).
    """
    rows = len(x)
    for i in prange(rows):
        limit = limits[i] if len(limits) else np.float32(np.inf)
        scale[i] = _split_row(x[i], columns, limit, planes[i], planes[rows + i])


@kernel
def multiply_outliers(x: Any, columns: Any, w: Any, limits: Any, y: Any) -> None:
    """Multiply the outliers of each row of x (T, k) times columns (k,) in fp32.

    limits (T,): written, OUTLIER times the row's largest value; y (T, n): written, the values above it times w (k, n).
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
    """Compute y (T, n) = scale (T, 1) * columns (n,) * sums, + y with `accumulate`, + bias (n,), + extra (T, n).

    sums (2 T, n): x's high and low parts times the weight's high part. cross (T, n), or (0, n): x's high part times the
    weight's low part. bias and extra may be empty.
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
    """Matrix multiplications by int8 weights, which share one buffer for their sums."""

    def __init__(self) -> None:
        self._sums = ReusedBuffer()  # allocations this large get new pages, which the system clears

    def layer(
        self, x: Tensor, weight: Int8Weight, along: bool, y: Tensor, added: Addend | None = None,
        bias: Tensor | None = None, residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute train.lora.frozen_matmul in fp32; y is contiguous."""
        if added is not None:
            added.into(y)
        return self._sum(x, weight, along, y, accumulate=added is not None, bias=bias, residual=residual)

    def head(self, weight: Tensor) -> FrozenMatmul:
        """Return train.lora.frozen_matmul for the output embedding's frozen weight (V, h).

        In a row of the logits' gradient a few values, first the label's, are far above the others, which would be
        rounded to 0: the outliers are multiplied in fp32.
        """
        quantized = cache(lambda: Int8Weight.of(weight.detach()))

        def head_matmul(
            x: Tensor, w: Tensor, along: bool, y: Tensor, added: Addend | None = None, bias: Tensor | None = None,
            residual: Tensor | None = None,
        ) -> Tensor:  # fmt: skip
            if weight.requires_grad or w.data_ptr() != weight.data_ptr():  # the head is trained in full
                return lora.frozen_matmul(x, w, along, y, added, bias, residual)
            if along:
                return self.layer(x, quantized(), along, y, added, bias, residual)
            assert added is None and bias is None and residual is None
            limits = torch.empty(len(x))
            multiply_outliers(array(x), array(quantized().scale), array(w), array(limits), array(y))
            return self._sum(x, quantized(), along, y, accumulate=True, limits=limits)

        return cast(FrozenMatmul, head_matmul)

    def _sum(
        self, x: Tensor, weight: Int8Weight, along: bool, y: Tensor, *, accumulate: bool, bias: Tensor | None = None,
        residual: Tensor | None = None, limits: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute the product; accumulate: add it to y."""
        n, empty = y.shape[1], x.new_empty(0)
        rows, columns = max(16, SUMS_BYTES // (12 * n)), _ones(x.shape[1]) if along else weight.scale
        high, low = (None if plane is None else plane.t() if along else plane for plane in (weight.high, weight.low))
        for at in range(0, len(x), rows):
            part_rows = slice(at, at + rows)
            planes, scale = _split_rows(x[part_rows], columns, empty if limits is None else limits[part_rows])
            sums, cross = torch.split(self._sums(3 * len(scale), n, _INT32), [2 * len(scale), len(scale)])
            torch._int_mm(planes, cast(Tensor, high), out=sums)
            if low is None:
                cross = cross[:0]
            else:
                torch._int_mm(planes[: len(scale)], low, out=cross)
            extra = y[:0] if residual is None else residual[part_rows].contiguous()
            by_column = weight.scale if along else _ones(n)
            operands = sums, cross, scale, by_column, empty if bias is None else bias, extra
            cast(Any, combine)(*map(array, operands), accumulate, array(y[part_rows]))
        return y


def _split_rows(x: Tensor, columns: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Return planes and scale as split_rows writes them; rows with NaN or infinity get the scale NaN."""
    planes, scale = torch.empty(2 * len(x), x.shape[1], dtype=torch.int8), torch.empty(len(x))
    split_rows(array(x.contiguous()), array(columns), array(limits), array(planes), array(scale))
    scale.masked_fill_(~torch.isfinite(x.sum(1)), torch.nan)
    return planes, scale


@cache
def _ones(n: int) -> Tensor:
    return torch.ones(n)


_INT32 = torch.empty(0, dtype=torch.int32)
