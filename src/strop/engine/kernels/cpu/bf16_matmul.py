"""Products of many rows with frozen weights, for CPUs with AVX512-BF16 and without AMX, and what is added to them.

oneDNN makes code for each number of rows, and passes over the output again for what is added. Here some columns of the
weight are laid out for all rows, in the second cache, and rows pass by, six at a time: 24 registers of sums. What the
adapters give, the bias and the residual join the sums in their registers, which are rounded once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import get_num_threads, prange, types
from numba.extending import intrinsic
from torch import Tensor

from strop.engine.kernels.cpu.compiled import GAP, BFloat, array, inline, loop, turn
from strop.engine.kernels.cpu.dots import call, location, plus, spread, widened
from strop.engine.kernels.cpu.lora import Added
from strop.engine.kernels.cpu.tile import LANES, pair

ROWS, WIDE = 6, 4 * LANES  # of a tile
UNIT = 2 * LANES  # columns are a multiple of
TILES = [(rows, columns) for rows in (ROWS, 3, 1) for columns in (WIDE, UNIT)]
DEEP = 2048  # pairs along the summed dimension that are laid out at once: half a megabyte

_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_SUMS, _PAIRS, _HALVES = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES), ir.VectorType(_I16, LANES)
_NUMBERS, _NARROW = ir.VectorType(BFloat(), 2 * LANES), ir.VectorType(BFloat(), LANES)


def _generate(rows: int, vectors: int, context: Any, b: Any, signature: Any, args: Any) -> None:
    """_tile of one size."""

    def start(array: int, at: Any) -> Any:
        return location(context, b, signature.args[array], args[array], at)

    def at(place: Any, kind: Any) -> Any:
        return b.bitcast(place, kind.as_pointer())

    def step(given: tuple[Any, Any, Any, Any], k: Any, sums: list[Any]) -> list[Any]:
        """One pair of each column, for each row."""
        rows_at, row_step, columns_at, column_step = given
        line = b.gep(columns_at, [b.mul(k, column_step)])
        columns = [
            b.bitcast(b.load(at(b.gep(line, [_I64(j * LANES)]), _PAIRS), align=4), _NUMBERS) for j in range(vectors)
        ]
        found: list[Any] = []
        for i in range(rows):
            one = b.load(b.gep(rows_at, [b.add(b.mul(row_step, _I64(i)), k)]))
            same = spread(b, one, LANES)
            for column in columns:
                sum_of = sums[len(found)]
                found.append(
                    call(b, "llvm.x86.avx512bf16.dpbf16ps.512", _SUMS, sum_of, b.bitcast(same, _NUMBERS), column)
                )
        return found

    def along(given: tuple[Any, Any, Any, Any], count: Any, first: list[tuple[list[Any], Any]], done: Any) -> Any:
        """A loop over pairs, from where each of `first` comes from; goes on to `done`."""
        k, sums = b.phi(_I64), [b.phi(_SUMS) for _ in range(rows * vectors)]
        for values, origin in first:
            k.add_incoming(_I64(0), origin)
            for each, value in zip(sums, values, strict=True):
                each.add_incoming(value, origin)
        here, found = b.block, step(given, k, sums)
        after = b.add(k, _I64(1))
        for each, value in zip([k, *sums], [after, *found], strict=True):
            each.add_incoming(value, here)
        b.cbranch(b.icmp_signed("<", after, count), here, done)
        return found

    pairs, begun, ends, more, there = (args[i] for i in (4, 5, 6, 15, 20))
    held = start(7, args[8])
    places = [at(b.gep(held, [_I64(i * LANES)]), _SUMS) for i in range(rows * vectors)]
    zeros = [ir.Constant(_SUMS, [0.0] * LANES)] * len(places)
    names = ("load", "loop", "between", "keep", "last", "again", "leave", "add", "write", "done")
    load, first, between, keep, last, again, leave, add, write, done = map(b.append_basic_block, names)

    given = start(0, args[1]), args[2], start(3, _I64(0)), _I64(vectors * LANES)
    before = b.block
    b.cbranch(begun, load, first)
    b.position_at_end(load)
    loaded = [b.load(place, align=4) for place in places]
    b.branch(first)
    b.position_at_end(first)
    sums = along(given, pairs, [(zeros, before), (loaded, load)], between)

    b.position_at_end(between)
    b.cbranch(ends, last, keep)
    b.position_at_end(keep)
    for value, place in zip(sums, places, strict=True):
        b.store(value, place, align=4)
    b.branch(done)

    b.position_at_end(last)
    given = start(9, args[10]), args[11], start(12, args[13]), args[14]
    b.cbranch(b.icmp_signed(">", more, _I64(0)), again, leave)
    b.position_at_end(again)
    whole = along(given, more, [(sums, last)], leave)

    b.position_at_end(leave)
    totals = []
    for one, other in zip(sums, whole, strict=True):
        total = b.phi(_SUMS)
        total.add_incoming(one, last)
        total.add_incoming(other, again)
        totals.append(total)

    def wide(place: Any, j: int) -> Any:
        return widened(b, b.load(at(b.gep(place, [_I64(j * LANES)]), _HALVES), align=2))

    biases = [wide(start(16, args[17]), j) for j in range(vectors)]
    totals = [plus(b, total, biases[i % vectors]) for i, total in enumerate(totals)]
    b.cbranch(there, add, write)
    b.position_at_end(add)
    beside = start(18, args[19])
    added = [
        plus(b, totals[i * vectors + j], wide(b.gep(beside, [b.mul(args[23], _I64(i))]), j))
        for i in range(rows)
        for j in range(vectors)
    ]
    b.branch(write)
    b.position_at_end(write)
    for i, (one, other) in enumerate(zip(totals, added, strict=True)):
        total = b.phi(_SUMS)
        total.add_incoming(one, leave)
        total.add_incoming(other, add)
        totals[i] = total
    into, ldy = start(21, args[22]), args[23]
    for i, total in enumerate(totals):
        place = b.gep(into, [b.add(b.mul(ldy, _I64(i // vectors)), _I64(i % vectors * LANES))])
        b.store(b.bitcast(b.fptrunc(total, _NARROW), _HALVES), at(place, _HALVES), align=2)
    b.branch(done)
    b.position_at_end(done)


@intrinsic  # type: ignore[untyped-decorator]
def _tile(
    context: Any, x: Any, x_at: Any, ldx: Any, laid: Any, pairs: Any, begun: Any, ends: Any, sums: Any, sums_at: Any,
    thin: Any, thin_at: Any, ldt: Any, second: Any, second_at: Any, lds: Any, more: Any, bias: Any, bias_at: Any,
    extra: Any, extra_at: Any, there: Any, y: Any, y_at: Any, ldy: Any, rows: Any, columns: Any,
) -> Any:  # fmt: skip
    """y[rows, columns] = x laid + thin second + bias + extra, in bf16; rows and columns as in TILES.

    x (.., pairs), laid (pairs, columns), thin (.., more), second (more, ..): uint32 arrays of one dimension, pairs of
    bf16 as in `tile.tile`; bias, extra, y: bf16's bits. ..._at: where the tile begins; ld..: row to row, of extra as of
    y. begun: `sums` holds what is summed so far; ends: else it will, and y is not written.
    """
    long, yes = types.int64, types.boolean

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        for rows, columns in TILES:
            asked = [b.icmp_signed("==", x, _I64(n)) for x, n in ((args[24], rows), (args[25], columns))]
            with b.if_then(b.and_(*asked)):
                _generate(rows, columns // LANES, context, b, signature, args)
        return context.get_dummy_value()

    signature = types.void(
        x, long, long, laid, long, yes, yes, sums, long, thin, long, long, second, long, long, long,
        bias, long, extra, long, yes, y, long, long, long, long,
    )  # fmt: skip
    return signature, generate


@inline
def _lay(w: Any, at: Any, k: Any, along: Any, begin: Any, pairs: Any, columns: Any, laid: Any) -> None:
    """laid (pairs, columns): w's pairs from `begin` on, of w's rows from `at` on, or of its columns from `at` on where
    the sum goes along its rows. w: uint16, flat, in rows of k."""
    if along:
        whole = w.view(np.uint32)
        for j in range(0, columns, LANES):
            for p in range(0, pairs, LANES):
                turn(whole, (at + j) * (k // 2) + begin + p, k // 2, laid, p * columns + j, columns)
    else:
        for p in range(pairs):
            even, odd = 2 * (begin + p) * k + at, (2 * (begin + p) + 1) * k + at
            one, other, to = w[even : even + columns], w[odd : odd + columns], laid[p * columns : (p + 1) * columns]
            for j in range(columns):
                to[j] = pair(one[j], other[j])


@loop
def multiply(
    x: Any, w: Any, along: Any, thin: Any, second: Any, spans: Any, of: Any, bias: Any, extra: Any, there: Any,
    across: Any, lanes: Any, y: Any,
) -> None:  # fmt: skip
    """y (T, n) = x (T, k) w^T + thin second + bias + extra, all in bf16's bits; w (n, k) with `along`, else (k, n).

    thin (T, R); spans (N, ..): first of its columns of thin, how many, first column of y, columns, where in `second`,
    which holds pairs of thin's columns, row by row; of (n / UNIT,): which span, or -1. bias (n,); extra (T, n), may be
    y; there: whether it counts. across: in how many parts the columns go to threads; the rows in lanes / across.
    """
    (rows, k), n = x.shape, y.shape[1]
    half, units, down, line = k // 2, n // UNIT, lanes // across, w.shape[1]
    xs, thins, ws = x.reshape(-1).view(np.uint32), thin.reshape(-1).view(np.uint32), w.reshape(-1)
    ys, extras, ldt, blocks = y.reshape(-1), extra.reshape(-1), thin.shape[1] // 2, (rows + ROWS - 1) // ROWS
    for lane in prange(lanes):
        top, end = lane // across * blocks // down * ROWS, min(rows, (lane // across + 1) * blocks // down * ROWS)
        unit, high = lane % across * units // across, (lane % across + 1) * units // across
        laid = np.empty(min(half, DEEP) * WIDE + GAP, np.uint32)
        sums = np.empty((end - top) * WIDE + GAP if half > DEEP else 0, np.float32)
        while unit < high:
            span, column = of[unit], unit * UNIT
            two = unit + 1 < high and of[unit + 1] == span
            more, t_at, s_at, lds = 0, 0, 0, 0
            if span >= 0:
                first, slot, to, lds, at = spans[span, :5]
                more, t_at, s_at = slot // 2, first // 2, at + column - to
            width = WIDE if two else UNIT
            for begin in range(0, half, DEEP):
                deep = min(DEEP, half - begin)
                _lay(ws, column, line, along, begin, deep, width, laid)
                begun, ends, i = begin > 0, begin + deep == half, top
                while i < end:
                    x_at, held, t, to_y = i * half + begin, (i - top) * width, i * ldt + t_at, i * n + column
                    many = ROWS if end - i >= ROWS else 3 if end - i >= 3 else 1
                    _tile(
                        xs, x_at, half, laid, deep, begun, ends, sums, held, thins, t, ldt, second, s_at, lds, more,
                        bias, column, extras, to_y, there, ys, to_y, n, many, width,
                    )  # fmt: skip
                    i += many
            unit += 2 if two else 1


@lru_cache(maxsize=256)
def across(rows: int, units: int, lanes: int) -> int:
    """In how many parts columns go to threads, so that the one with the most is soonest ready: each lays out its own
    columns, which takes as long as some ten rows."""
    blocks = -(-rows // ROWS)
    parts = [count for count in range(1, lanes + 1) if lanes % count == 0]
    return min(parts, key=lambda count: -(-units // count) * (-(-blocks * count // lanes) * ROWS + 10))


def product(
    x: Tensor, weight: Tensor, along: bool, y: Tensor, added: Any = None, bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """lora.product, of bf16; both sides of the weight multiples of UNIT, y without gaps."""
    assert bias is None or bias.dtype == x.dtype
    n, lanes, held = y.shape[1], get_num_threads(), False
    columns: tuple[tuple[int, int], ...] = ()
    thin, second, spans = x[:, :0], _NO_PAIRS, _NO_SPANS
    if isinstance(added, Added) and added.columns is not None:
        added.alone()
        thin, second, spans, columns = added.thin, added.second, added.leave, added.columns
    elif added is not None:
        added.into(y)
        held = True
    extra = y if held or residual is None else residual.contiguous()
    multiply(
        array(x.contiguous()), array(weight.contiguous()), along, array(thin), second, spans, _spans_of(n, columns),
        _zeros(n) if bias is None else array(bias), array(extra), held or residual is not None,
        across(len(x), n // UNIT, lanes), lanes, array(y),
    )  # fmt: skip
    if held and residual is not None:
        y += residual
    return y


_NO_PAIRS, _NO_SPANS = np.empty(0, np.uint32), np.empty((0, 5), np.int64)


@lru_cache(maxsize=64)
def _zeros(n: int) -> Any:
    return np.zeros(n, np.uint16)


@lru_cache(maxsize=256)
def _spans_of(n: int, columns: tuple[tuple[int, int], ...]) -> Any:
    """Of each UNIT of n columns: which of these (from, to) it lies in, or -1."""
    found = np.full(n // UNIT, -1)
    for number, (start, end) in enumerate(columns):
        found[start // UNIT : end // UNIT] = number
    return found
