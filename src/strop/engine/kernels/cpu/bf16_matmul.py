"""Matrix multiplication of many rows by frozen bf16 weights, for CPUs with AVX512-BF16 and without AMX.

oneDNN generates code for each number of rows, and passes over the output again for whatever is added. Here some columns
of the weight are packed for all rows in the second-level cache, and rows pass by, six at a time: 24 registers of
sums. The adapters' terms, the bias and the residual are added to the sums in registers, which are rounded once.
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
    pointer,
    repeat,
    subroutine,
    transpose,
    update_if,
)
from strop.engine.kernels.cpu.lora import LoraTerm
from strop.engine.kernels.cpu.tile import LANES, pair

ROWS, WIDE = 6, 4 * LANES  # rows and columns of a tile
UNIT = 2 * LANES  # the number of columns is a multiple of this
TILES = [(rows, columns) for rows in (ROWS, 3, 1) for columns in (WIDE, UNIT)]
DEEP = 2048  # pairs along the summed dimension that are packed at once: half a megabyte

_SUMS, _PAIRS, _HALVES = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(I16, LANES)
_BF16S, _NARROW = ir.VectorType(BFloat(), 2 * LANES), ir.VectorType(BFloat(), LANES)


def _generate(rows: int, vectors: int, context: Any, b: Any, signature: Any, args: Any) -> None:
    """Emit _tile for one size."""

    def start(array: int, at: Any) -> Any:
        return pointer(context, b, signature.args[array], args[array], at)

    def cast(place: Any, kind: Any) -> Any:
        return b.bitcast(place, kind.as_pointer())

    def load(place: Any, j: int) -> Any:
        return bf16_to_fp32(b, b.load(cast(b.gep(place, [I64(j * LANES)]), _HALVES), align=2))

    def multiply(rows_at: Any, row_step: Any, columns_at: Any, column_step: Any) -> Any:
        """Return the loop body for one pair of each column and each row."""

        def body(k: Any, sums: list[Any]) -> list[Any]:
            line = b.gep(columns_at, [b.mul(k, column_step)])
            places = [cast(b.gep(line, [I64(j * LANES)]), _PAIRS) for j in range(vectors)]
            columns = [b.bitcast(b.load(place, align=4), _BF16S) for place in places]
            results: list[Any] = []
            for i in range(rows):
                element = b.load(b.gep(rows_at, [b.add(b.mul(row_step, I64(i)), k)]))
                element = b.bitcast(broadcast(b, element, LANES), _BF16S)
                for column in columns:
                    operands = sums[len(results)], element, column
                    results.append(call_llvm(b, "llvm.x86.avx512bf16.dpbf16ps.512", _SUMS, *operands))
            return results

        return body

    pairs, begun, ends, more, has_extra, ldy = (args[i] for i in (4, 5, 6, 15, 20, 23))
    buffer = start(7, args[8])
    places = [cast(b.gep(buffer, [I64(i * LANES)]), _SUMS) for i in range(rows * vectors)]
    zeros = [ir.Constant(_SUMS, [0.0] * LANES)] * len(places)
    initial = update_if(b, begun, zeros, lambda: [b.load(place, align=4) for place in places])
    body = multiply(start(0, args[1]), args[2], start(3, I64(0)), I64(vectors * LANES))
    sums = repeat(b, pairs, 1, initial, body)
    with b.if_else(ends) as (last, not_last):
        with not_last:
            for value, place in zip(sums, places, strict=True):
                b.store(value, place, align=4)
        with last:
            body = multiply(start(9, args[10]), args[11], start(12, args[13]), args[14])
            totals = repeat(b, more, 1, sums, body, may_be_empty=True)
            biases = [load(start(16, args[17]), j) for j in range(vectors)]
            totals = [add_ordered(b, total, biases[i % vectors]) for i, total in enumerate(totals)]

            def add_extra() -> list[Any]:
                extra = start(18, args[19])
                return [
                    add_ordered(b, totals[i * vectors + j], load(b.gep(extra, [b.mul(ldy, I64(i))]), j))
                    for i in range(rows)
                    for j in range(vectors)
                ]

            y = start(21, args[22])
            for i, total in enumerate(update_if(b, has_extra, totals, add_extra)):
                place = b.gep(y, [b.add(b.mul(ldy, I64(i // vectors)), I64(i % vectors * LANES))])
                b.store(b.bitcast(b.fptrunc(total, _NARROW), _HALVES), cast(place, _HALVES), align=2)


@intrinsic  # type: ignore[untyped-decorator]
def _tile(
    context: Any, x: Any, x_at: Any, ldx: Any, packed: Any, pairs: Any, begun: Any, ends: Any, sums: Any, sums_at: Any,
    thin: Any, thin_at: Any, ldt: Any, second: Any, second_at: Any, lds: Any, more: Any, bias: Any, bias_at: Any,
    extra: Any, extra_at: Any, has_extra: Any, y: Any, y_at: Any, ldy: Any, rows: Any, columns: Any,
) -> Any:  # fmt: skip
    """Compute y[rows, columns] = x packed + thin second + bias + extra, in bf16; rows and columns as in TILES.

    x (.., pairs), packed (pairs, columns), thin (.., more), second (more, ..): one-dimensional uint32 arrays of bf16
    pairs as in tile.tile; bias, extra, y: bf16 bits. ..._at: where the tile begins; ld..: distance between rows, for
    extra that of y. has_extra: whether extra is added. begun: `sums` holds the sum so far; ends: the sum is complete
    and y is written, else the sum is stored in `sums`.
    """
    long, yes = types.int64, types.boolean

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        for rows, columns in TILES:
            same = [b.icmp_signed("==", x, I64(n)) for x, n in ((args[24], rows), (args[25], columns))]
            with b.if_then(b.and_(*same)):
                _generate(rows, columns // LANES, context, b, signature, args)
        return context.get_dummy_value()

    signature = types.void(
        x, long, long, packed, long, yes, yes, sums, long, thin, long, long, second, long, long, long,
        bias, long, extra, long, yes, y, long, long, long, long,
    )  # fmt: skip
    return signature, generate


@subroutine
def _pack(w: Any, at: Any, k: Any, along: Any, begin: Any, pairs: Any, columns: Any, packed: Any) -> None:
    """Write pairs of w, from pair `begin`, to packed (pairs, columns).

    w: uint16, one-dimensional, in rows of k. The columns are w's rows from `at` with `along`, else its columns from
    `at`.
    """
    if along:
        all_pairs = w.view(np.uint32)
        for j in range(0, columns, LANES):
            for p in range(0, pairs, LANES):
                transpose(all_pairs, (at + j) * (k // 2) + begin + p, k // 2, packed, p * columns + j, columns)
    else:
        for p in range(pairs):
            even, odd = 2 * (begin + p) * k + at, (2 * (begin + p) + 1) * k + at
            first, second = w[even : even + columns], w[odd : odd + columns]
            to = packed[p * columns : (p + 1) * columns]
            for j in range(columns):
                to[j] = pair(first[j], second[j])


@kernel
def multiply(
    x: Any, w: Any, along: Any, thin: Any, second: Any, spans: Any, span_of: Any, bias: Any, extra: Any, has_extra: Any,
    across: Any, lanes: Any, y: Any,
) -> None:  # fmt: skip
    """Compute y (T, n) = x (T, k) w^T + thin second + bias + extra, all bf16 bits; w (n, k) with `along`, else (k, n).

    thin (T, R): the inputs times A; `second`: pairs of rows of B^T. spans (N, ..), one row an adapter: its first column
    of thin, how many, its first column of y, how many, and where it begins in `second`. span_of (n / UNIT,): the span
    that a unit of columns belongs to, or -1. bias (n,); extra (T, n), which may be y; has_extra: whether it is added.
    across: number of parts in which the columns go to threads; the rows go in lanes / across parts.
    """
    (rows, k), n = x.shape, y.shape[1]
    half, num_units, down, row_length = k // 2, n // UNIT, lanes // across, w.shape[1]
    xs, thins, ws = x.reshape(-1).view(np.uint32), thin.reshape(-1).view(np.uint32), w.reshape(-1)
    ys, extras, ldt, blocks = y.reshape(-1), extra.reshape(-1), thin.shape[1] // 2, (rows + ROWS - 1) // ROWS
    for lane in prange(lanes):
        top, end = lane // across * blocks // down * ROWS, min(rows, (lane // across + 1) * blocks // down * ROWS)
        unit, high = lane % across * num_units // across, (lane % across + 1) * num_units // across
        packed = np.empty(min(half, DEEP) * WIDE + GAP, np.uint32)
        sums = np.empty((end - top) * WIDE + GAP if half > DEEP else 0, np.float32)
        while unit < high:
            span, column = span_of[unit], unit * UNIT
            two = unit + 1 < high and span_of[unit + 1] == span
            thin_pairs, t_at, s_at, lds = 0, 0, 0, 0
            if span >= 0:
                first, slot, to, lds, at = spans[span, :5]
                thin_pairs, t_at, s_at = slot // 2, first // 2, at + column - to
            width = WIDE if two else UNIT
            for begin in range(0, half, DEEP):
                deep = min(DEEP, half - begin)
                _pack(ws, column, row_length, along, begin, deep, width, packed)
                begun, ends, i = begin > 0, begin + deep == half, top
                while i < end:
                    x_at, sums_at, t, to_y = i * half + begin, (i - top) * width, i * ldt + t_at, i * n + column
                    count = ROWS if end - i >= ROWS else 3 if end - i >= 3 else 1
                    _tile(
                        xs, x_at, half, packed, deep, begun, ends, sums, sums_at, thins, t, ldt, second, s_at, lds,
                        thin_pairs, bias, column, extras, to_y, has_extra, ys, to_y, n, count, width,
                    )  # fmt: skip
                    i += count
            unit += 2 if two else 1


@lru_cache(maxsize=256)
def across(rows: int, num_units: int, lanes: int) -> int:
    """Return the number of parts of the columns that minimizes the time of the slowest thread.

    Each thread packs its columns, which takes as long as about ten rows.
    """
    blocks = -(-rows // ROWS)
    parts = [count for count in range(1, lanes + 1) if lanes % count == 0]
    return min(parts, key=lambda count: -(-num_units // count) * (-(-blocks * count // lanes) * ROWS + 10))


def matmul(
    x: Tensor, weight: Tensor, along: bool, y: Tensor, added: Any = None, bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute train.lora.frozen_matmul in bf16; the weight's dimensions are multiples of UNIT, y is contiguous."""
    assert bias is None or bias.dtype == x.dtype
    n, lanes, in_y = y.shape[1], get_num_threads(), False
    columns: tuple[tuple[int, int], ...] = ()
    thin, second, spans = x[:, :0], _NO_PAIRS, _NO_SPANS
    if isinstance(added, LoraTerm) and added.columns is not None:
        added.finish_projection()
        thin, second, spans, columns = added.thin, added.second, added.leave, added.columns
    elif added is not None:
        added.into(y)
        in_y = True
    extra = y if in_y or residual is None else residual.contiguous()
    multiply(
        array(x.contiguous()), array(weight.contiguous()), along, array(thin), second, spans,
        _spans_by_unit(n, columns), _zero_bias(n) if bias is None else array(bias), array(extra),
        in_y or residual is not None, across(len(x), n // UNIT, lanes), lanes, array(y),
    )  # fmt: skip
    if in_y and residual is not None:
        y += residual
    return y


_NO_PAIRS, _NO_SPANS = np.empty(0, np.uint32), np.empty((0, 5), np.int64)


@lru_cache(maxsize=64)
def _zero_bias(n: int) -> Any:
    return np.zeros(n, np.uint16)


@lru_cache(maxsize=256)
def _spans_by_unit(n: int, columns: tuple[tuple[int, int], ...]) -> Any:
    """Return for each UNIT of n columns the range (from, to) it belongs to, or -1."""
    numbers = np.full(n // UNIT, -1)
    for number, (start, end) in enumerate(columns):
        numbers[start // UNIT : end // UNIT] = number
    return numbers
