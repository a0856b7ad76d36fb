"""Linear layers for decoding: a few rows times dense, 8-bit or 4-bit weights, plus LoRA adapters.

Quantized weights are dequantized a few rows at a time, in the CPU cache. The result is the same bit for bit as with a
dequantized weight, with a half or a quarter of the memory traffic. int8 weights with bf16 inputs are multiplied as
integers instead (int8_dots.py).
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
from numba import prange, types

from strop.engine.kernels.cpu.amx import AVAILABLE, pack_rows, packed_buffer
from strop.engine.kernels.cpu.compiled import kernel, kernel_sequence, specialization_of, subroutine
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

# A dense weight w (n, k), fp32 or bf16 bits.
Dense = namedtuple("Dense", "w")

# An 8-bit or 4-bit weight of n rows. w: int8 values, or bytes with two indices into `code`, the first one in the upper
# bits. code: (16,), or empty for int8. scale: one factor for each `block` elements. block: the row length for int8, at
# most that for 4 bits.
Quantized = namedtuple("Quantized", "w scale code block n")

# Linear layers with the same input, fused along their outputs, and the LoRA adapters on them. weights: a tuple of Dense
# or of Quantized, which may have no rows. bias: (n,) or empty. a (R, k): the matrices A of all adapters. rows
# (adapters, 2): first row and number of rows of each adapter in `a`. b: the matrices B^T of all adapters, times their
# scales, one after another. spans (N, 6): one row per B^T, as (adapter, first row among the adapter's rows of `a`,
# rank, first output column, number of columns, start in `b`). gains: DoRA's factors, (adapters, n) or empty.
Linear = namedtuple("Linear", "weights bias a rows b spans gains")


@subroutine
def columns_of(thread: Any, threads: Any, n: Any) -> Any:
    """Return the range [begin, end) of the n columns that a thread computes."""
    blocks = (n + LANES - 1) // LANES
    return thread * blocks // threads * LANES, min(n, (thread + 1) * blocks // threads * LANES)


USES_AMX = AVAILABLE  # AMX results do not depend on the number of rows, but differ from those of `block`
if USES_AMX:
    from strop.engine.kernels.cpu.amx import tiled_matmul
else:

    @kernel_sequence
    def tiled_matmul(weight: Any, packed: Any, y: Any, column: Any, threads: Any) -> None:
        """Do nothing; only compiled, never called."""


@subroutine
def uses_amx(w: Any, z: Any) -> Any:
    """Return whether w (n, k) and z (T, k) are multiplied with AMX."""
    return USES_AMX and w.itemsize == 2 and z.itemsize == 2 and z.shape[1] % 32 == 0


@kernel_sequence
def dense_matmul_packed(weight: Any, z: Any, packed: Any, y: Any, column: Any, threads: Any) -> None:
    """Compute y[:, column:] = z w^T; z (T, k), y (T, ..) fp32. packed: the output of `pack_rows`, used with AMX."""
    n, done = len(weight.w), 0
    if uses_amx(weight.w, z):
        tiled_matmul(weight, packed, y, column, threads)
        done = n // LANES * LANES
    if done < n and len(z) == 1 and z.shape[1] % (2 * LANES) == 0:
        _single_row_dots(Dense(weight.w[done:]), z, y, column + done, threads)
    elif done < n:
        _dots(Dense(weight.w[done:]), z, y, column + done, threads)


@kernel_sequence
def dense_matmul(weight: Any, z: Any, y: Any, threads: Any) -> None:
    """Compute y = z w^T; z (T, k), y (T, n) fp32."""
    packed = packed_buffer(z if uses_amx(weight.w, z) else z[:0])
    if uses_amx(weight.w, z):
        pack_rows(z, packed, threads)
    dense_matmul_packed(weight, z, packed, y, 0, threads)


@kernel
def _dots(weight: Any, z: Any, y: Any, column: Any, threads: Any) -> None:
    """Compute y[:, column:] = z w^T; z (T, k), y (T, ..) fp32."""
    n, k = weight.w.shape
    rows, width = y.shape
    w, x, out = weight.w.reshape(-1), z.reshape(-1), y.reshape(-1)
    for thread in prange(threads):
        low, high = columns_of(thread, threads, n)
        for row in range(low, high, LANES):
            if row + LANES <= n:
                ahead, ahead_end = (row + PREFETCH_ROWS) * k, min(row + PREFETCH_ROWS + LANES, high) * k
                block(w, row * k, k, x, 0, k, out, column + row, width, rows, k, w, ahead, ahead_end)
            else:
                partial_block(w, row * k, k, n - row, x, 0, k, out, column + row, width, rows, k)


@kernel
def _single_row_dots(weight: Any, z: Any, y: Any, column: Any, threads: Any) -> None:
    """Compute the same as _dots for a single row, whose length is a multiple of dots.Operands.step."""
    n, k = weight.w.shape
    w, x, out = weight.w.reshape(-1), z.reshape(-1), y.reshape(-1)
    for thread in prange(threads):
        low, high = columns_of(thread, threads, n)
        for row in range(low, high, LANES):
            if row + LANES <= n:
                single_row_block(w, row * k, k, x, 0, out, column + row, k)
            else:
                partial_block(w, row * k, k, n - row, x, 0, k, out, column + row, y.shape[1], 1, k)


@kernel
def quantized_matmul(weight: Any, like: Any, z: Any, y: Any, column: Any, threads: Any) -> None:
    """Compute the same as _dots for a Quantized weight. like: an array with the dtype to dequantize to."""
    n, k = weight.n, z.shape[1]
    rows, width = y.shape
    x, out = z.reshape(-1), y.reshape(-1)
    w, scale, code, block_size = weight.w, weight.scale, weight.code, weight.block
    row_bytes = k // 2 if len(code) else k
    direct = _multiplies_directly(rows, k, block_size, code, like, z)
    for thread in prange(threads):
        weights = np.empty(LANES * k, like.dtype)
        low, high = columns_of(thread, threads, n)
        for row in range(low, high, LANES):
            valid = min(LANES, n - row)
            if direct and valid == LANES:
                quantized_block(w, row, scale, block_size, code, x, out, column + row, width, rows, k)
                continue
            for i in range(valid):
                dequantize_row(w, row + i, scale, block_size, code, weights, i * k, k)
            if valid == LANES:
                ahead = (row + PREFETCH_ROWS) * row_bytes
                ahead_end = min(row + PREFETCH_ROWS + LANES, high) * row_bytes
                block(weights, 0, k, x, 0, k, out, column + row, width, rows, k, w, ahead, ahead_end)
            else:
                partial_block(weights, 0, k, valid, x, 0, k, out, column + row, width, rows, k)


@kernel
def int8_matmul(weight: Any, x: Any, scales: Any, y: Any, column: Any, threads: Any) -> None:
    """Compute the same as _dots for an int8 weight, except for the last n % LANES columns.

    x, scales: z as quantized by quantize_rows.
    """
    rows, width = y.shape
    k = x.shape[1]
    n = weight.n // LANES * LANES
    inputs, out, w, w_scales = x.reshape(-1), y.reshape(-1), weight.w, weight.scale
    for thread in prange(threads):
        low, high = columns_of(thread, threads, n)
        partial = np.empty(rows * LANES if k > STRETCH else 0, np.float32)
        for row in range(low, high, LANES):
            ahead, ahead_end = (row + PREFETCH_ROWS) * k, min(row + PREFETCH_ROWS + LANES, high) * k
            out_at, count = column + row, min(k, STRETCH)
            if rows <= 2:
                int8_block_by_row(w, row, k, w_scales, inputs, scales, out, out_at, width, rows, 0, count)
            else:
                int8_block(w, row, k, w_scales, inputs, scales, out, out_at, width, rows, 0, count, ahead, ahead_end)
            for first in range(STRETCH, k, STRETCH):
                ahead, count = ahead + LANES * STRETCH, min(STRETCH, k - first)
                int8_block(w, row, k, w_scales, inputs, scales, partial, 0, LANES, rows, first, count, ahead, ahead_end)
                for i in range(rows):
                    for j in range(LANES):
                        out[i * width + out_at + j] += partial[i * LANES + j]


@subroutine
def _multiplies_directly(rows: Any, k: Any, block_size: Any, code: Any, like: Any, z: Any) -> Any:
    """Return whether to multiply each element as it is dequantized, which is faster for few rows.

    3 rows would be computed as 2 and 1, which is slower than dequantizing once. int8 weights with bf16 inputs are
    multiplied as integers instead.
    """
    whole_units = k % UNIT == 0 and (block_size == k or block_size & (block_size - 1) == 0)
    same_type = like.itemsize == z.itemsize and (len(code) > 0 or z.itemsize == 4)
    return can_dequantize(block_size, like) and whole_units and same_type and rows <= 4 and rows != 3


@kernel
def _add_adapters(
    b: Any, spans: Any, all_gains: Any, bias: Any, u: Any, adapter_rows: Any, y: Any, threads: Any
) -> None:  # fmt: skip
    """Add the adapters' outputs to y (T, n), multiply by DoRA's gains, and add the bias.

    b, spans, all_gains, bias: fields of a Linear. u (T, ..): z A^T with each row's adapter. adapter_rows: as in
    decode_layer.Rows.
    """
    n = y.shape[1]
    ys, us = y.reshape(-1), u.reshape(-1)
    for thread in prange(threads):
        low, high = columns_of(thread, threads, n)
        for index in range(len(spans)):
            adapter, first, rank, column, num_columns, b_at = spans[index]
            begin, end = adapter_rows[adapter]
            left, right = max(low, column), min(high, column + num_columns)
            if begin < end and left < right:
                vectorized = (right - left) // LANES * LANES
                add_weighted_rows(
                    us, begin * u.shape[1] + first, u.shape[1], b, b_at + left - column, num_columns,
                    ys, begin * n + left, n, end - begin, rank, vectorized,
                )  # fmt: skip
                for i in range(begin, end):
                    for c in range(left + vectorized, right):
                        total = y[i, c]
                        for j in range(rank):
                            total += u[i, first + j] * b[b_at + j * num_columns + c - column]
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


def _matmul(weight: Any, buffers: Any, z: Any, packed: Any, y: Any, column: Any, threads: Any) -> Any:
    """Multiply z by one weight, Dense or Quantized, and return the number of output columns."""


@specialization_of(_matmul)
def _matmul_by_type(weight: Any, buffers: Any, z: Any, packed: Any, y: Any, column: Any, threads: Any) -> Any:
    def dense(weight: Any, buffers: Any, z: Any, packed: Any, y: Any, column: Any, threads: Any) -> Any:
        if len(weight.w):
            dense_matmul_packed(weight, z, packed, y, column, threads)
        return len(weight.w)

    def dequantized(weight: Any, buffers: Any, z: Any, packed: Any, y: Any, column: Any, threads: Any) -> Any:
        if weight.n:
            quantized_matmul(weight, buffers.weight_like, z, y, column, threads)
        return weight.n

    def as_integers(weight: Any, buffers: Any, z: Any, packed: Any, y: Any, column: Any, threads: Any) -> Any:
        n, k = weight.n // LANES * LANES if supports_width(z.shape[1]) else 0, z.shape[1]
        if n:
            int8_matmul(
                weight, buffers.quantized_inputs[: z.size].reshape(z.shape), buffers.input_scales, y, column, threads
            )
        if n < weight.n:
            rest = Quantized(weight.w[n * k :], weight.scale[n:], weight.code, weight.block, weight.n - n)
            quantized_matmul(rest, buffers.weight_like, z, y, column + n, threads)
        return weight.n

    if weight.instance_class is Quantized and _uses_integers(weight, z):
        return as_integers
    return {Dense: dense, Quantized: dequantized}[weight.instance_class]


def _uses_integers(weight: Any, z: Any) -> bool:
    """Return whether operands of these numba types are multiplied as integers."""
    return INT8_DOTS and weight.types[weight.fields.index("w")].dtype == types.int8 and z.dtype == types.uint16


def _quantize_input(weights: Any, buffers: Any, z: Any) -> None:
    """Quantize z if the first weight is multiplied as integers."""


@specialization_of(_quantize_input)
def _quantize_input_by_type(weights: Any, buffers: Any, z: Any) -> Any:
    def quantize(weights: Any, buffers: Any, z: Any) -> None:
        if supports_width(z.shape[1]):
            quantize_rows(z, buffers.quantized_inputs[: z.size].reshape(z.shape), buffers.input_scales)

    def nothing(weights: Any, buffers: Any, z: Any) -> None:
        pass

    first = weights.types[0]
    return quantize if first.instance_class is Quantized and _uses_integers(first, z) else nothing


@kernel_sequence
def linear_forward(linear: Any, buffers: Any, z: Any, adapter_rows: Any, y: Any, threads: Any) -> None:
    """Compute the output y (T, n) of a Linear from z (T, k), with adapters and bias. buffers: decode_layer.Buffers."""
    column, packed = 0, packed_buffer(z if uses_amx(z, z) else z[:0])
    if uses_amx(z, z):
        pack_rows(z, packed, threads)
    _quantize_input(linear.weights, buffers, z)
    for weight in linear.weights:
        column += _matmul(weight, buffers, z, packed, y, column, threads)
    max_rank = 0
    for adapter in range(len(linear.rows)):
        max_rank = max(max_rank, linear.rows[adapter, 1])
    za = buffers.lora_a_outputs[: len(z) * max_rank].reshape(len(z), max_rank)
    for adapter in range(len(linear.rows)):
        (begin, end), (first, count) = adapter_rows[adapter], linear.rows[adapter]
        if begin < end and count:
            z_rows = z[begin:end]
            if end - begin < len(z) and uses_amx(z, z):
                pack_rows(z_rows, packed, threads)
            dense_matmul_packed(Dense(linear.a[first : first + count]), z_rows, packed, za[begin:end], 0, threads)
    if len(linear.spans) or len(linear.bias):
        _add_adapters(linear.b, linear.spans, linear.gains, linear.bias, za, adapter_rows, y, threads)
