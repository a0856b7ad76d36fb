"""Numba intrinsics for decoding: dot products of int8 weight rows with bf16 input rows quantized to int16.

The scale of an input row is its largest absolute value / 32,767. Sums of integers are exact in any order, and are
multiplied by the scales of both rows. On real inputs this is more accurate than bf16 with a dequantized weight, because
bf16 has 8 significant bits, and it reads half as many bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from strop.engine.kernels.cpu.compiled import (
    F32,
    HAS_BF16,
    I8,
    I16,
    I32,
    I64,
    call_llvm,
    kernel,
    load,
    maximum,
    pointer,
    prefetch,
    repeat,
    subroutine,
    to_fp32,
)
from strop.engine.kernels.cpu.dots import CACHE_LINE, LANES, emit_row_by_row, reduce_vectors, store_rows
from strop.machine.probe import vector_extensions

INT8_DOTS = HAS_BF16 and "avx512_vnni" in vector_extensions()
STEP = 2 * LANES  # elements per instruction
LARGEST = 32_767
STRETCH = 8192  # elements of a row that are summed in 32 bits without overflow: 127 * LARGEST * STRETCH / LANES < 2^31
MAX_SERIAL_SIZE = 8192  # elements that one thread quantizes faster than other threads wake up
SMALLEST = 1e-34  # rows with only smaller values are treated as zeros
EXPONENT = 0x7F80  # bf16 exponent bits; all of them are set only in infinity and NaN

_FP32_VECTOR, _INT32_VECTOR = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
_INT8S, _INT16S = ir.VectorType(I8, STEP), ir.VectorType(I16, STEP)


@subroutine
def supports_width(k: Any) -> Any:
    """Return whether rows of k elements can be multiplied as integers."""
    return k % STEP == 0


@subroutine
def _quantize_row(z: Any, x: Any) -> Any:
    """Quantize one row and return its scale."""
    largest, nonfinite = np.float32(0), np.int32(0)
    for j in range(len(z)):
        largest = maximum(largest, abs(to_fp32(z[j])))
        nonfinite |= np.int32((z[j] & EXPONENT) == EXPONENT)
    factor = np.float32(LARGEST) / largest if largest > SMALLEST else np.float32(0)
    for j in range(len(z)):
        x[j] = np.int32(np.rint(to_fp32(z[j]) * factor))
    return np.float32(np.nan) if nonfinite else largest / np.float32(LARGEST)


@kernel
def _quantize_many(z: Any, x: Any, scales: Any) -> None:
    for i in prange(len(z)):
        scales[i] = _quantize_row(z[i], x[i])


@subroutine
def quantize_rows(z: Any, x: Any, scales: Any) -> None:
    """Quantize bf16 bits z (T, k) to int16 x (T, k) and scales (T,). Rows with infinity or NaN get the scale NaN."""
    if z.size > MAX_SERIAL_SIZE:
        _quantize_many(z, x, scales)
    else:
        for i in range(len(z)):
            scales[i] = _quantize_row(z[i], x[i])


def _dots(rows: int, inputs: int, lines: int | None = 0) -> Any:
    def typing(
        context: Any, w: Any, w_at: Any, k: Any, w_scales: Any, ws_at: Any, x: Any, x_at: Any, x_scales: Any,
        xs_at: Any, c: Any, c_at: Any, ldc: Any, count: Any, ahead_at: Any,
    ) -> Any:  # fmt: skip
        long = types.int64

        def generate(context: Any, b: Any, signature: Any, args: Any) -> None:
            if not INT8_DOTS:  # compiled, but not called
                return
            kinds, k = signature.args, args[2]
            w_start, ahead_start = (pointer(context, b, kinds[0], args[0], args[i]) for i in (1, 13))
            ws_start, x_start, xs_start, out = (pointer(context, b, kinds[i], *args[i : i + 2]) for i in (3, 5, 7, 9))
            w_rows = [b.gep(w_start, [b.mul(k, I64(i))]) for i in range(rows)]
            x_rows = [b.gep(x_start, [b.mul(k, I64(j))]) for j in range(inputs)]

            def multiply(address: Any, xs: list[Any], sums: list[Any]) -> list[Any]:
                """Multiply STEP elements of a weight row by those of each input row."""
                weights = b.bitcast(b.sext(load(b, address, I64(0), _INT8S), _INT16S), _INT32_VECTOR)
                name = "llvm.x86.avx512.vpdpwssd.512"
                return [call_llvm(b, name, _INT32_VECTOR, total, weights, x) for x, total in zip(xs, sums, strict=True)]

            def load_inputs(offset: Any) -> list[Any]:
                return [b.bitcast(load(b, row, offset, _INT16S), _INT32_VECTOR) for row in x_rows]

            def multiply_all(offset: Any, sums: list[Any]) -> list[Any]:
                xs, results = load_inputs(offset), list(sums)
                begin = b.mul(offset, I64((lines or 0) * CACHE_LINE // STEP))
                for line in range(lines or 0):
                    prefetch(b, b.gep(ahead_start, [b.add(begin, I64(line * CACHE_LINE))]))
                for i, row in enumerate(w_rows):
                    results[i::rows] = multiply(b.gep(row, [offset]), xs, results[i::rows])
                return results

            zero = ir.Constant(_INT32_VECTOR, [0] * LANES)
            if lines is None:
                totals = emit_row_by_row(
                    b, w_start, rows, k, args[12], STEP, [zero] * inputs,
                    lambda address, offset, sums: multiply(address, load_inputs(offset), sums),
                )  # fmt: skip
            else:
                totals = repeat(b, args[12], STEP, [zero] * (rows * inputs), multiply_all)
            results = reduce_vectors(b, [b.sitofp(total, _FP32_VECTOR) for total in totals])
            for start, count, indices in (
                (ws_start, rows, [i % rows for i in range(LANES)]),
                (xs_start, inputs, [i // rows for i in range(LANES)]),
            ):
                scales = load(b, start, I64(0), ir.VectorType(F32, count))
                scales = b.shuffle_vector(scales, scales, ir.Constant(_INT32_VECTOR, indices))
                results = b.fmul(results, scales, flags=("contract",))
            store_rows(b, results, rows, inputs, out, args[11])

        return types.void(w, long, long, w_scales, long, x, long, x_scales, long, c, *[long] * 4), generate

    typing.__doc__ = f"""Compute c[j * ldc + i] = dot(w_i, x_j) * scales for {rows} rows of w and {inputs} rows of x.

    w: int8, x: int16, both with rows of k elements, of which `count` are multiplied, at most STRETCH. w_scales,
    x_scales, c: fp32. w_at, ws_at, x_at, xs_at, c_at: index of the first element. Each step prefetches {lines} cache
    lines of w, from element `ahead_at`. (None: rows of w are read one after another, with the following elements.)
    """
    return intrinsic(typing)


_dots_1, _dots_2 = (_dots(LANES // n, n, LANES // n // 2) for n in (1, 2))
_dots_1_by_row, _dots_2_by_row = (_dots(LANES // n, n, None) for n in (1, 2))
_dots_4, _dots_4_prefetch_1, _dots_4_prefetch_2 = (_dots(LANES // 4, 4, lines) for lines in (0, 1, 2))


@subroutine
def int8_block(
    w: Any, row: Any, k: Any, w_scales: Any, x: Any, x_scales: Any, c: Any, c_at: Any, ldc: Any, inputs: Any,
    first: Any, count: Any, ahead_at: Any, ahead_end: Any,
) -> None:  # fmt: skip
    """Compute c[j, i] = dot(w_i, x_j) * scales for LANES rows of w from `row`, and `inputs` rows of x.

    Multiplies `count` elements of each row, from element `first`, and prefetches the elements of w from `ahead_at` to
    `ahead_end`. The other arguments are those of _dots.
    """
    fours = inputs // 4
    for j in range(0, 4 * fours, 4):
        for q in range(0, LANES, LANES // 4):
            w_at, x_at, out = (row + q) * k + first, j * k + first, c_at + j * ldc + q
            if ahead_at >= ahead_end:
                _dots_4(w, w_at, k, w_scales, row + q, x, x_at, x_scales, j, c, out, ldc, count, 0)
            elif fours > 1:
                _dots_4_prefetch_1(w, w_at, k, w_scales, row + q, x, x_at, x_scales, j, c, out, ldc, count, ahead_at)
                ahead_at += 2 * count
            else:
                _dots_4_prefetch_2(w, w_at, k, w_scales, row + q, x, x_at, x_scales, j, c, out, ldc, count, ahead_at)
                ahead_at += 4 * count
    j = 4 * fours
    if j + 2 <= inputs:
        for q in range(0, LANES, LANES // 2):
            w_at, out = (row + q) * k + first, c_at + j * ldc + q
            _dots_2(w, w_at, k, w_scales, row + q, x, j * k + first, x_scales, j, c, out, ldc, count, ahead_at)
            ahead_at += LANES // 2 * count
        j += 2
    if j < inputs:
        out = c_at + j * ldc
        _dots_1(w, row * k + first, k, w_scales, row, x, j * k + first, x_scales, j, c, out, ldc, count, ahead_at)


@subroutine
def int8_block_by_row(
    w: Any, row: Any, k: Any, w_scales: Any, x: Any, x_scales: Any, c: Any, c_at: Any, ldc: Any, inputs: Any,
    first: Any, count: Any,
) -> None:  # fmt: skip
    """Compute the same as int8_block for one or two input rows, reading one row of w after another."""
    if inputs == 1:
        _dots_1_by_row(w, row * k + first, k, w_scales, row, x, first, x_scales, 0, c, c_at, ldc, count, 0)
    elif inputs == 2:
        for q in range(0, LANES, LANES // 2):
            w_at, out = (row + q) * k + first, c_at + q
            _dots_2_by_row(w, w_at, k, w_scales, row + q, x, first, x_scales, 0, c, out, ldc, count, 0)
