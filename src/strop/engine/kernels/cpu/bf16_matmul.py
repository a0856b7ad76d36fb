"""Matrix multiplication of many rows by frozen bf16 weights, for CPUs with AVX512-BF16 and without AMX.

A few columns of the weight at a time are packed in the L2 cache and multiplied with all rows, six rows at a time, which
takes 24 registers of sums. The adapters' term, the bias and the residual are added in registers, so the result is
rounded once. oneDNN would compile code for each number of rows, and read and write the output again for each addition.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import get_num_threads, prange, types
from numba.extending import intrinsic
from torch import Tensor

from strop.engine.kernels.cpu.compiled import (
    F32,
    GAP,
    I16,
    I32,
    I64,
    BFloat,
    add_ordered,
    array,
    bf16_to_fp32,
    broadcast,
    call_llvm,
    kernel,
    load,
    pointer,
    repeat,
    store,
    subroutine,
    transpose,
    update_if,
)
from strop.engine.kernels.cpu.lora import LoraTerm
from strop.engine.kernels.cpu.tile import LANES, pair

ROWS, WIDE = 6, 4 * LANES  # rows and columns of the largest tile
UNIT = 2 * LANES  # the number of columns must be a multiple of this
TILES = [(rows, columns) for rows in (ROWS, 3, 1) for columns in (WIDE, UNIT)]
DEEP = 2048  # pairs along the summed dimension that are packed at a time; with WIDE columns, 512 KiB

_FP32_VECTOR, _INT32_VECTOR = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
_INT16_VECTOR, _BF16_VECTOR = ir.VectorType(I16, LANES), ir.VectorType(BFloat(), LANES)
_BF16_PAIRS_VECTOR = ir.VectorType(BFloat(), 2 * LANES)


def _emit_tile(rows: int, vectors: int, context: Any, b: Any, signature: Any, args: Any) -> None:
    """Emit _tile for one tile size. vectors: columns / LANES."""

    def start(array: int, index: Any) -> Any:
        return pointer(context, b, signature.args[array], args[array], index)

    def load_bf16(start: Any, j: int) -> Any:
        return bf16_to_fp32(b, load(b, start, I64(j * LANES), _INT16_VECTOR))

    def multiply(rows_at: Any, row_step: Any, columns_at: Any, column_step: Any) -> Any:
        """Return a loop body that multiplies pair k of all rows and columns."""

        def body(k: Any, sums: list[Any]) -> list[Any]:
            row = b.gep(columns_at, [b.mul(k, column_step)])
            loaded = [load(b, row, I64(j * LANES), _INT32_VECTOR) for j in range(vectors)]
            columns = [b.bitcast(x, _BF16_PAIRS_VECTOR) for x in loaded]
            results: list[Any] = []
            for i in range(rows):
                element = b.load(b.gep(rows_at, [b.add(b.mul(row_step, I64(i)), k)]))
                element = b.bitcast(broadcast(b, element, LANES), _BF16_PAIRS_VECTOR)
                for column in columns:
                    operands = sums[len(results)], element, column
                    results.append(call_llvm(b, "llvm.x86.avx512bf16.dpbf16ps.512", _FP32_VECTOR, *operands))
            return results

        return body

    pairs, resumes, completes, rank_pairs, has_extra, ldy = (args[i] for i in (4, 5, 6, 15, 20, 23))
    buffer = start(7, args[8])
    offsets = [I64(i * LANES) for i in range(rows * vectors)]
    zeros = [ir.Constant(_FP32_VECTOR, [0.0] * LANES)] * len(offsets)
    initial = update_if(b, resumes, zeros, lambda: [load(b, buffer, offset, _FP32_VECTOR) for offset in offsets])
    body = multiply(start(0, args[1]), args[2], start(3, I64(0)), I64(vectors * LANES))
    sums = repeat(b, pairs, 1, initial, body)
    with b.if_else(completes) as (last, not_last):
        with not_last:
            for value, offset in zip(sums, offsets, strict=True):
                store(b, value, buffer, offset)
        with last:
            body = multiply(start(9, args[10]), args[11], start(12, args[13]), args[14])
            totals = repeat(b, rank_pairs, 1, sums, body, may_be_empty=True)
            biases = [load_bf16(start(16, args[17]), j) for j in range(vectors)]
            totals = [add_ordered(b, total, biases[i % vectors]) for i, total in enumerate(totals)]

            def add_extra() -> list[Any]:
                extra = start(18, args[19])
                return [
                    add_ordered(b, totals[i * vectors + j], load_bf16(b.gep(extra, [b.mul(ldy, I64(i))]), j))
                    for i in range(rows)
                    for j in range(vectors)
                ]

            y = start(21, args[22])
            for i, total in enumerate(update_if(b, has_extra, totals, add_extra)):
                offset = b.add(b.mul(ldy, I64(i // vectors)), I64(i % vectors * LANES))
                store(b, b.bitcast(b.fptrunc(total, _BF16_VECTOR), _INT16_VECTOR), y, offset)


@intrinsic  # type: ignore[untyped-decorator]
def _tile(
    context: Any, x: Any, x_at: Any, ldx: Any, packed: Any, pairs: Any, resumes: Any, completes: Any, sums: Any,
    sums_at: Any, za: Any, za_at: Any, ldza: Any, b: Any, b_at: Any, ldb: Any, rank_pairs: Any, bias: Any, bias_at: Any,
    extra: Any, extra_at: Any, has_extra: Any, y: Any, y_at: Any, ldy: Any, rows: Any, columns: Any,
) -> Any:  # fmt: skip
    """Compute y[rows, columns] = x packed + za b + bias + extra in bf16, for the sizes in TILES.

    x, packed, za, b: one-dimensional arrays of pairs as in tile.tile. bias, extra, y: bf16 bits. x_at, za_at, ...: the
    first element. ldx, ldza, ...: distance between rows; extra has ldy. pairs, rank_pairs: number of pairs along the
    summed dimensions of x packed and za b. resumes: start from the partial sums in `sums`. completes: write y instead
    of partial sums.
    """
    long, bit = types.int64, types.boolean

    def generate(context: Any, b: Any, signature: Any, args: Any) -> None:
        for rows, columns in TILES:
            same = [b.icmp_signed("==", x, I64(n)) for x, n in ((args[24], rows), (args[25], columns))]
            with b.if_then(b.and_(*same)):
                _emit_tile(rows, columns // LANES, context, b, signature, args)

    signature = types.void(
        x, long, long, packed, long, bit, bit, sums, long, za, long, long, b, long, long, long,
        bias, long, extra, long, bit, y, long, long, long, long,
    )  # fmt: skip
    return signature, generate


@subroutine
def _pack(w: Any, first: Any, k: Any, transposed: Any, begin: Any, pairs: Any, columns: Any, packed: Any) -> None:
    """Write pairs of w along the summed dimension, from pair `begin` on, to packed (pairs, columns).

    w: one-dimensional bf16 bits in rows of k elements. The columns of `packed` are rows of w if `transposed`, else
    columns of w, from `first` on.
    """
    if transposed:
        all_pairs = w.view(np.uint32)
        for j in range(0, columns, LANES):
            for p in range(0, pairs, LANES):
                transpose(all_pairs, (first + j) * (k // 2) + begin + p, k // 2, packed, p * columns + j, columns)
    else:
        for p in range(pairs):
            even, odd = 2 * (begin + p) * k + first, (2 * (begin + p) + 1) * k + first
            even_row, odd_row = w[even : even + columns], w[odd : odd + columns]
            target = packed[p * columns : (p + 1) * columns]
            for j in range(columns):
                target[j] = pair(even_row[j], odd_row[j])


@kernel
def multiply(
    x: Any, w: Any, transposed: Any, za: Any, b: Any, spans: Any, unit_spans: Any, bias: Any, extra: Any,
    has_extra: Any, column_parts: Any, threads: Any, y: Any,
) -> None:  # fmt: skip
    """Compute y (T, n) = x w^T + za b + bias + extra in bf16. w is (n, k) if `transposed`, else (k, n).

    za: (T, R), the inputs times the adapters' matrices A. b: pairs of rows of B^T, one adapter after another. spans:
    (N, 5), for each adapter its first column of za, number of these columns, first column of y, number of these
    columns, and start in `b`. unit_spans: (n / UNIT,), the index in `spans` for each UNIT columns of y, or -1. extra:
    (T, n), may be y; added if has_extra. column_parts: the columns are divided among this many threads.
    """
    (rows, k), n = x.shape, y.shape[1]
    half, num_units, row_parts, row_length = k // 2, n // UNIT, threads // column_parts, w.shape[1]
    xs, zas, ws = x.reshape(-1).view(np.uint32), za.reshape(-1).view(np.uint32), w.reshape(-1)
    ys, extras, ldza, blocks = y.reshape(-1), extra.reshape(-1), za.shape[1] // 2, (rows + ROWS - 1) // ROWS
    for thread in prange(threads):
        row_part, column_part = thread // column_parts, thread % column_parts
        begin_row = row_part * blocks // row_parts * ROWS
        end_row = min(rows, (row_part + 1) * blocks // row_parts * ROWS)
        unit, end_unit = column_part * num_units // column_parts, (column_part + 1) * num_units // column_parts
        packed = np.empty(min(half, DEEP) * WIDE + GAP, np.uint32)  # GAP: see compiled.py
        sums = np.empty((end_row - begin_row) * WIDE + GAP if half > DEEP else 0, np.float32)
        while unit < end_unit:
            span, column = unit_spans[unit], unit * UNIT
            is_wide = unit + 1 < end_unit and unit_spans[unit + 1] == span
            rank_pairs, za_column, b_at, ldb = 0, 0, 0, 0
            if span >= 0:
                first, rank, first_column, ldb, start = spans[span, :5]
                rank_pairs, za_column, b_at = rank // 2, first // 2, start + column - first_column
            width = WIDE if is_wide else UNIT
            for begin in range(0, half, DEEP):
                pairs = min(DEEP, half - begin)
                _pack(ws, column, row_length, transposed, begin, pairs, width, packed)
                resumes, completes, i = begin > 0, begin + pairs == half, begin_row
                while i < end_row:
                    x_at, sums_at = i * half + begin, (i - begin_row) * width
                    za_at, y_at = i * ldza + za_column, i * n + column
                    count = ROWS if end_row - i >= ROWS else 3 if end_row - i >= 3 else 1
                    _tile(
                        xs, x_at, half, packed, pairs, resumes, completes, sums, sums_at, zas, za_at, ldza, b, b_at,
                        ldb, rank_pairs, bias, column, extras, y_at, has_extra, ys, y_at, n, count, width,
                    )  # fmt: skip
                    i += count
            unit += 2 if is_wide else 1


@lru_cache(maxsize=256)
def choose_column_parts(rows: int, num_units: int, threads: int) -> int:
    """Return the number of parts of the columns that minimizes the time of the slowest thread.

    Each thread packs its columns, which takes as long as about ten rows.
    """
    blocks = -(-rows // ROWS)
    choices = [count for count in range(1, threads + 1) if threads % count == 0]
    return min(choices, key=lambda count: -(-num_units // count) * (-(-blocks * count // threads) * ROWS + 10))


def matmul(
    x: Tensor, weight: Tensor, transposed: bool, y: Tensor, added: Any = None, bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute the same as train.lora.frozen_matmul in bf16.

    The dimensions of the weight must be multiples of UNIT, and y must be contiguous.
    """
    assert bias is None or bias.dtype == x.dtype
    n, threads, y_holds_term = y.shape[1], get_num_threads(), False
    columns: tuple[tuple[int, int], ...] = ()
    za, b, spans = x[:, :0], _NO_PAIRS, _NO_SPANS
    if isinstance(added, LoraTerm) and added.columns is not None:
        added.finish_projection()
        za, b, spans, columns = added.projected, added.second, added.second_spans, added.columns
    elif added is not None:
        added.into(y)
        y_holds_term = True
    extra = y if y_holds_term or residual is None else residual.contiguous()
    multiply(
        array(x.contiguous()), array(weight.contiguous()), transposed, array(za), b, spans,
        _spans_by_unit(n, columns), _zero_bias(n) if bias is None else array(bias), array(extra),
        y_holds_term or residual is not None, choose_column_parts(len(x), n // UNIT, threads), threads, array(y),
    )  # fmt: skip
    if y_holds_term and residual is not None:
        y += residual
    return y


_NO_PAIRS, _NO_SPANS = np.empty(0, np.uint32), np.empty((0, 5), np.int64)


@lru_cache(maxsize=64)
def _zero_bias(n: int) -> Any:
    return np.zeros(n, np.uint16)


@lru_cache(maxsize=256)
def _spans_by_unit(n: int, columns: tuple[tuple[int, int], ...]) -> Any:
    """Return for each UNIT columns of n the index of their range in `columns`, or -1."""
    indices = np.full(n // UNIT, -1)
    for index, (start, end) in enumerate(columns):
        indices[start // UNIT : end // UNIT] = index
    return indices
