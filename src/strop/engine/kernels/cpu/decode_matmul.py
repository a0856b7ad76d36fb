"""Linear layers of decoding: a few rows times dense, 8-bit or 4-bit weights, and the adapters on them.

A quantized weight is dequantized a few rows at a time, in the cache, and multiplied there: the same bits as with the
dequantized weight, and a half or a quarter of the memory traffic. A weight in 8 bits with inputs in bf16 is multiplied
in integers (int8_dots.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange, types

from strop.engine.kernels.cpu.amx import AVAILABLE, pack_rows, packed_buffer
from strop.engine.kernels.cpu.compiled import kernel, sequence, specialization_of, subroutine
from strop.engine.kernels.cpu.dequantize import UNIT, can_dequantize, dequantize_row, quantized_block
from strop.engine.kernels.cpu.dots import (
    LANES,
    PREFETCH_ROWS,
    add_weighted_rows,
    block,
    partial_block,
    single_row_block,
)
from strop.engine.kernels.cpu.int8_dots import (
    INT8_DOTS,
    STRETCH,
    int8_block,
    int8_block_by_row,
    quantize_rows,
    supports_width,
)


class Dense(NamedTuple):
    """A weight w (n, k): fp32, or bf16 bits."""

    w: Any


class Quantized(NamedTuple):
    """A weight of n rows in 8 or 4 bits.

    w: int8, with `code` (0,); or bytes of two indices into `code` (16,), the first in the upper half. Each `block` of
    elements is multiplied by one element of `scale`: in 8 bits a row, in 4 bits at most a row.
    """

    w: Any
    scale: Any
    code: Any
    block: Any
    n: Any


class Linear(NamedTuple):
    """Linear layers that share their input, joined along their outputs, with all adapters on them.

    weights: a tuple of Dense or Quantized. bias (n,) or (0,). a (R, k): the matrices A of all adapters; rows (adapters,
    2): the first row of each adapter in `a`, and how many. b: all B^T times the scale, one after another; spans (N, 6):
    adapter, its first row of A, rank, first column, columns, where it begins in b. gains (adapters, n) or (0, 0): of
    DoRA.
    """

    weights: Any
    bias: Any
    a: Any
    rows: Any
    b: Any
    spans: Any
    gains: Any


@subroutine
def columns_of(lane: Any, lanes: Any, n: Any) -> Any:
    """Return the range of columns that a thread computes."""
    blocks = (n + LANES - 1) // LANES
    return lane * blocks // lanes * LANES, min(n, (lane + 1) * blocks // lanes * LANES)


USES_AMX = AVAILABLE  # the results of AMX do not depend on the number of rows, but differ from those of `block`
if USES_AMX:
    from strop.engine.kernels.cpu.amx import tiled_matmul
else:

    @sequence
    def tiled_matmul(part: Any, packed: Any, y: Any, column: Any, lanes: Any) -> None:
        """Never called."""


@subroutine
def uses_amx(w: Any, z: Any) -> Any:
    """Return whether a weight (n, k) is multiplied by z (T, k) in AMX tiles."""
    return USES_AMX and w.itemsize == 2 and z.itemsize == 2 and z.shape[1] % 32 == 0


@sequence
def dense_matmul_packed(part: Any, z: Any, packed: Any, y: Any, column: Any, lanes: Any) -> None:
    """Compute y[:, column:] = z w^T; z (T, k), y (T, ..) fp32. packed: z as `pack_rows` packed it if AMX is used."""
    n = len(part.w)
    whole = 0
    if uses_amx(part.w, z):
        tiled_matmul(part, packed, y, column, lanes)
        whole = n // LANES * LANES
    if whole < n and len(z) == 1 and z.shape[1] % (2 * LANES) == 0:
        _single_row_dots(Dense(part.w[whole:]), z, y, column + whole, lanes)
    elif whole < n:
        _dots(Dense(part.w[whole:]), z, y, column + whole, lanes)


@sequence
def dense_matmul(part: Any, z: Any, y: Any, lanes: Any) -> None:
    """Compute y = z w^T; z (T, k), y (T, n) fp32."""
    packed = packed_buffer(z if uses_amx(part.w, z) else z[:0])
    if uses_amx(part.w, z):
        pack_rows(z, packed, lanes)
    dense_matmul_packed(part, z, packed, y, 0, lanes)


@kernel
def _dots(part: Any, z: Any, y: Any, column: Any, lanes: Any) -> None:
    """Compute y[:, column:] = z w^T; z (T, k), y (T, ..) fp32."""
    n, k = part.w.shape
    rows, width = y.shape
    w, x, out = part.w.reshape(-1), z.reshape(-1), y.reshape(-1)
    for lane in prange(lanes):
        low, high = columns_of(lane, lanes, n)
        for at in range(low, high, LANES):
            if at + LANES <= n:
                until = min(at + PREFETCH_ROWS + LANES, high) * k
                block(w, at * k, k, x, 0, k, out, column + at, width, rows, k, w, (at + PREFETCH_ROWS) * k, until)
            else:
                partial_block(w, at * k, k, n - at, x, 0, k, out, column + at, width, rows, k)


@kernel
def _single_row_dots(part: Any, z: Any, y: Any, column: Any, lanes: Any) -> None:
    """Compute the same for a single row, whose length is a multiple of dots.Operands.step."""
    n, k = part.w.shape
    w, x, out = part.w.reshape(-1), z.reshape(-1), y.reshape(-1)
    for lane in prange(lanes):
        low, high = columns_of(lane, lanes, n)
        for at in range(low, high, LANES):
            if at + LANES <= n:
                single_row_block(w, at * k, k, x, 0, out, column + at, k)
            else:
                partial_block(w, at * k, k, n - at, x, 0, k, out, column + at, y.shape[1], 1, k)


@kernel
def quantized_matmul(part: Any, like: Any, z: Any, y: Any, column: Any, lanes: Any) -> None:
    """Compute the same for a Quantized weight; like: an array of the type that it is dequantized to."""
    n, k = part.n, z.shape[1]
    rows, width = y.shape
    x, out = z.reshape(-1), y.reshape(-1)
    w, scale, code, block_size = part.w, part.scale, part.code, part.block
    row_bytes = k // 2 if len(code) else k
    direct = _multiplies_directly(rows, k, block_size, code, like, z)
    for lane in prange(lanes):
        weights = np.empty(LANES * k, like.dtype)
        low, high = columns_of(lane, lanes, n)
        for at in range(low, high, LANES):
            valid = min(LANES, n - at)
            if direct and valid == LANES:
                quantized_block(w, at, scale, block_size, code, x, out, column + at, width, rows, k)
                continue
            for i in range(valid):
                dequantize_row(w, at + i, scale, block_size, code, weights, i * k, k)
            if valid == LANES:
                until = min(at + PREFETCH_ROWS + LANES, high) * row_bytes
                block(
                    weights, 0, k, x, 0, k, out, column + at, width, rows, k, w, (at + PREFETCH_ROWS) * row_bytes, until
                )
            else:
                partial_block(weights, 0, k, valid, x, 0, k, out, column + at, width, rows, k)


@kernel
def int8_matmul(part: Any, x: Any, scales: Any, y: Any, column: Any, lanes: Any) -> None:
    """Compute y[:, column:] = z w^T of an 8-bit weight, for whole blocks of LANES rows.

    x, scales: z as quantize_rows writes it.
    """
    rows, width = y.shape
    k = x.shape[1]
    n = part.n // LANES * LANES
    inputs, out, w, w_scales = x.reshape(-1), y.reshape(-1), part.w, part.scale
    for lane in prange(lanes):
        low, high = columns_of(lane, lanes, n)
        more = np.empty(rows * LANES if k > STRETCH else 0, np.float32)
        for at in range(low, high, LANES):
            ask, until = (at + PREFETCH_ROWS) * k, min(at + PREFETCH_ROWS + LANES, high) * k
            to, count = column + at, min(k, STRETCH)
            if rows <= 2:
                int8_block_by_row(w, at, k, w_scales, inputs, scales, out, to, width, rows, 0, count)
            else:
                int8_block(w, at, k, w_scales, inputs, scales, out, to, width, rows, 0, count, ask, until)
            for first in range(STRETCH, k, STRETCH):
                ask, count = ask + LANES * STRETCH, min(STRETCH, k - first)
                int8_block(w, at, k, w_scales, inputs, scales, more, 0, LANES, rows, first, count, ask, until)
                for i in range(rows):
                    for j in range(LANES):
                        out[i * width + to + j] += more[i * LANES + j]


@subroutine
def _multiplies_directly(rows: Any, k: Any, block_size: Any, code: Any, like: Any, z: Any) -> Any:
    """Return whether the weight is multiplied while it is dequantized: pays for few rows.

    3 rows would be computed as 2 and 1, which is slower than dequantizing once. Weights in 8 bits with inputs in bf16
    are multiplied in integers instead.
    """
    even = k % UNIT == 0 and (block_size == k or block_size & (block_size - 1) == 0)
    same_type = like.itemsize == z.itemsize and (len(code) > 0 or z.itemsize == 4)
    return can_dequantize(block_size, like) and even and same_type and rows <= 4 and rows != 3


@kernel
def _add_adapters(
    b: Any, spans: Any, all_gains: Any, bias: Any, u: Any, adapter_rows: Any, y: Any, lanes: Any
) -> None:  # fmt: skip
    """Add the adapters and the bias to y (T, n), and multiply by DoRA's gains.

    b, spans, all_gains, bias: of a Linear. u (T, ..): z A^T, for each row of its adapter. adapter_rows (adapters, 2):
    the range of rows of each adapter.
    """
    n = y.shape[1]
    ys, us = y.reshape(-1), u.reshape(-1)
    for lane in prange(lanes):
        low, high = columns_of(lane, lanes, n)
        for part in range(len(spans)):
            adapter, first, rank, column, columns, at = spans[part]
            begin, end = adapter_rows[adapter]
            left, right = max(low, column), min(high, column + columns)
            if begin < end and left < right:
                whole = (right - left) // LANES * LANES
                add_weighted_rows(
                    us, begin * u.shape[1] + first, u.shape[1], b, at + left - column, columns,
                    ys, begin * n + left, n, end - begin, rank, whole,
                )  # fmt: skip
                for i in range(begin, end):
                    for c in range(left + whole, right):
                        total = y[i, c]
                        for j in range(rank):
                            total += u[i, first + j] * b[at + j * columns + c - column]
                        y[i, c] = total
        for adapter in range(len(all_gains)):
            gains = all_gains[adapter]
            for i in range(adapter_rows[adapter, 0], adapter_rows[adapter, 1]):
                for c in range(low, high):
                    y[i, c] *= gains[c]
        if len(bias):
            for i in range(len(y)):
                for c in range(low, high):
                    y[i, c] += bias[c]


def _matmul(part: Any, buffers: Any, z: Any, packed: Any, y: Any, column: Any, lanes: Any) -> Any:
    """Compute the matmul of one weight, by its type, and return its number of rows."""


@specialization_of(_matmul)
def _matmul_by_type(part: Any, buffers: Any, z: Any, packed: Any, y: Any, column: Any, lanes: Any) -> Any:
    def dense(part: Any, buffers: Any, z: Any, packed: Any, y: Any, column: Any, lanes: Any) -> Any:
        dense_matmul_packed(part, z, packed, y, column, lanes)
        return len(part.w)

    def dequantized(part: Any, buffers: Any, z: Any, packed: Any, y: Any, column: Any, lanes: Any) -> Any:
        quantized_matmul(part, buffers.like, z, y, column, lanes)
        return part.n

    def in_integers(part: Any, buffers: Any, z: Any, packed: Any, y: Any, column: Any, lanes: Any) -> Any:
        n, k = part.n // LANES * LANES if supports_width(z.shape[1]) else 0, z.shape[1]
        if n:
            int8_matmul(part, buffers.x[: z.size].reshape(z.shape), buffers.scales, y, column, lanes)
        if n < part.n:
            rest = Quantized(part.w[n * k :], part.scale[n:], part.code, part.block, part.n - n)
            quantized_matmul(rest, buffers.like, z, y, column + n, lanes)
        return part.n

    if part.instance_class is Quantized and _uses_integers(part, z):
        return in_integers
    return {Dense: dense, Quantized: dequantized}[part.instance_class]


def _uses_integers(part: Any, z: Any) -> bool:
    """Return whether operands of these numba types are multiplied in integers."""
    return INT8_DOTS and part.types[part.fields.index("w")].dtype == types.int8 and z.dtype == types.uint16


def _quantize_input(weights: Any, buffers: Any, z: Any) -> None:
    """Quantize z where the first of the weights is multiplied in integers."""


@specialization_of(_quantize_input)
def _quantize_input_by_type(weights: Any, buffers: Any, z: Any) -> Any:
    def quantize(weights: Any, buffers: Any, z: Any) -> None:
        if supports_width(z.shape[1]):
            quantize_rows(z, buffers.x[: z.size].reshape(z.shape), buffers.scales)

    def nothing(weights: Any, buffers: Any, z: Any) -> None:
        pass

    first = weights.types[0]
    return quantize if first.instance_class is Quantized and _uses_integers(first, z) else nothing


@sequence
def linear_forward(linear: Any, buffers: Any, z: Any, adapter_rows: Any, y: Any, lanes: Any) -> None:
    """Compute y (T, n) of z (T, k): the weights' matmuls, the adapters, and the bias. buffers: decode_layer.Buffers."""
    column, packed = 0, packed_buffer(z if uses_amx(z, z) else z[:0])
    if uses_amx(z, z):
        pack_rows(z, packed, lanes)
    _quantize_input(linear.weights, buffers, z)
    for part in linear.weights:
        column += _matmul(part, buffers, z, packed, y, column, lanes)
    most = 0
    for adapter in range(len(linear.rows)):
        most = max(most, linear.rows[adapter, 1])
    thin = buffers.u[: len(z) * most].reshape(len(z), most)
    for adapter in range(len(linear.rows)):
        (begin, end), (first, count) = adapter_rows[adapter], linear.rows[adapter]
        if begin < end and count:
            z_rows = z[begin:end]
            if end - begin < len(z) and uses_amx(z, z):
                pack_rows(z_rows, packed, lanes)
            dense_matmul_packed(Dense(linear.a[first : first + count]), z_rows, packed, thin[begin:end], 0, lanes)
    if len(linear.spans) or len(linear.bias):
        _add_adapters(linear.b, linear.spans, linear.gains, linear.bias, thin, adapter_rows, y, lanes)
