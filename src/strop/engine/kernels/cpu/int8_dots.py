"""Inner products of weight rows in 8 bit, as they are held, with rows of whole numbers of 16 bit, for numba's loops.

What enters a product, in bf16, is rounded to multiples of a row's largest number / 32,767; the weight's scale and the
row's come behind the sum. Sums of whole numbers are exact in any order, and a weight is taken apart nowhere. On real
rows that is nearer to the exact product than the dequantized weight in bf16, whose numbers are rounded to 8 bits; and
it is as fast as a product in bf16, from half of its bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from strop.engine.kernels.cpu.compiled import HAS_BF16, greater, inline, loop, wide
from strop.engine.kernels.cpu.dots import LANES, LINE, call, location, prefetch, repeat, store_rows, sums_of
from strop.engine.kernels.cpu.streaming_dots import in_order
from strop.machine.probe import vector_extensions

AS_HELD = HAS_BF16 and "avx512_vnni" in vector_extensions()
STEP = 2 * LANES  # numbers that an instruction multiplies
MOST = 32_767
STRETCH = 8192  # numbers of a row whose sum, of 127 MOST each, stays within 32 bit in each of LANES
FEW = 8192  # numbers that are rounded sooner than other threads are woken
LEAST = 1e-34  # a row of smaller numbers is one of zeros
NO_NUMBER = 0x7F80  # bits that infinity and NaN have in bf16, and no number has all of

_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
_SUMS, _WHOLE = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_EIGHT, _SIXTEEN = ir.VectorType(_I8, STEP), ir.VectorType(_I16, STEP)


@inline
def fits(k: Any) -> Any:
    """Whether rows of k numbers are multiplied so."""
    return k % STEP == 0


@inline
def _round_row(z: Any, x: Any) -> Any:
    """A row of `in_whole`; gives its scale."""
    largest, strange = np.float32(0), np.int32(0)
    for j in range(len(z)):
        largest = greater(largest, abs(wide(z[j])))
        strange |= np.int32((z[j] & NO_NUMBER) == NO_NUMBER)
    times = np.float32(MOST) / largest if largest > LEAST else np.float32(0)
    for j in range(len(z)):
        x[j] = np.int32(np.rint(wide(z[j]) * times))
    return np.float32(np.nan) if strange else largest / np.float32(MOST)


@loop
def _round_rows(z: Any, x: Any, scales: Any) -> None:
    for i in prange(len(z)):
        scales[i] = _round_row(z[i], x[i])


@inline
def in_whole(z: Any, x: Any, scales: Any) -> None:
    """z (T, k) in bf16 as scales (T,) x (T, k), of int16. A row with infinity or NaN has the scale NaN."""
    if z.size > FEW:
        _round_rows(z, x, scales)
    else:
        for i in range(len(z)):
            scales[i] = _round_row(z[i], x[i])


def _dots(rows: int, others: int, lines: int | None = 0) -> Any:
    def typing(
        context: Any, w: Any, w_at: Any, k: Any, w_scales: Any, ws_at: Any, x: Any, x_at: Any, x_scales: Any,
        xs_at: Any, c: Any, c_at: Any, ldc: Any, count: Any, ask_at: Any,
    ) -> Any:  # fmt: skip
        long = types.int64
        signature = types.void(w, long, long, w_scales, long, x, long, x_scales, long, c, long, long, long, long)

        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            if not AS_HELD:  # compiled, and never called
                return context.get_dummy_value()
            kinds, k = signature.args, args[2]
            w_start, wanted = (location(context, b, kinds[0], args[0], args[i]) for i in (1, 13))
            ws_start, x_start, xs_start, to = (location(context, b, kinds[i], *args[i : i + 2]) for i in (3, 5, 7, 9))
            x_rows = [b.gep(x_start, [b.mul(k, _I64(j))]) for j in range(others)]

            def loaded(start: Any, at: Any, kind: Any, align: int) -> Any:
                return b.load(b.bitcast(b.gep(start, [at]), kind.as_pointer()), align=align)

            def multiplied(place: Any, xs: list[Any], sums: list[Any]) -> list[Any]:
                """A row's numbers at `place` with those of each x."""
                one = b.bitcast(b.sext(loaded(place, _I64(0), _EIGHT, 1), _SIXTEEN), _WHOLE)
                name = "llvm.x86.avx512.vpdpwssd.512"
                return [call(b, name, _WHOLE, onto, one, other) for other, onto in zip(xs, sums, strict=True)]

            def those(at: Any) -> list[Any]:
                return [b.bitcast(loaded(row, at, _SIXTEEN, 2), _WHOLE) for row in x_rows]

            w_rows = [b.gep(w_start, [b.mul(k, _I64(i))]) for i in range(rows)]

            def side_by_side(at: Any, sums: list[Any]) -> list[Any]:
                xs, found = those(at), list(sums)
                begin = b.mul(at, _I64((lines or 0) * LINE // STEP))
                for line in range(lines or 0):
                    prefetch(b, b.gep(wanted, [b.add(begin, _I64(line * LINE))]))
                for i, row in enumerate(w_rows):
                    found[i::rows] = multiplied(b.gep(row, [at]), xs, found[i::rows])
                return found

            zero = ir.Constant(_WHOLE, [0] * LANES)
            if lines is None:
                total = in_order(
                    b, w_start, rows, k, args[12], STEP, [zero] * others,
                    lambda place, at, sums: multiplied(place, those(at), sums),
                )  # fmt: skip
            else:
                total = repeat(b, args[12], STEP, [zero] * (rows * others), side_by_side)
            found = sums_of(b, [b.sitofp(one, _SUMS) for one in total])
            for start, count, places in (
                (ws_start, rows, [i % rows for i in range(LANES)]),
                (xs_start, others, [i // rows for i in range(LANES)]),
            ):
                scales = loaded(start, _I64(0), ir.VectorType(_F32, count), 4)
                scales = b.shuffle_vector(scales, scales, ir.Constant(_WHOLE, places))
                found = b.fmul(found, scales, flags=("contract",))
            store_rows(b, found, rows, others, to, args[11])
            return context.get_dummy_value()

        return signature, generate

    typing.__doc__ = f"""c[j * ldc + i] = w_i x_j, times the scale of either, for {rows} rows of w and {others} of x.

    w: int8; x: int16; both k numbers from row to row, of which `count` are multiplied, STRETCH at most; scales, c:
    fp32. w_at, ws_at, x_at, xs_at, c_at: where they begin. With each step {lines} lines of memory are asked for, of w
    from `ask_at` on; None: w is read in order, and what follows is asked for.
    """
    return intrinsic(typing)


_one, _two = (_dots(LANES // n, n, LANES // n // 2) for n in (1, 2))
_one_in_order, _two_in_order = (_dots(LANES // n, n, None) for n in (1, 2))
_four, _four_asks, _four_asks_two = (_dots(LANES // 4, 4, lines) for lines in (0, 1, 2))


@inline
def whole_block(
    w: Any, row: Any, k: Any, w_scales: Any, x: Any, x_scales: Any, c: Any, c_at: Any, ldc: Any, others: Any,
    first: Any, count: Any, ask_at: Any, until: Any,
) -> None:  # fmt: skip
    """c[j, i] = w_i x_j for LANES rows of w, from `row` on, and `others` of x, of their numbers from `first` on; each
    as in _dots. Meanwhile memory is asked for the numbers of w from `ask_at` to `until`."""
    fours = others // 4
    for j in range(0, 4 * fours, 4):
        for q in range(0, LANES, LANES // 4):
            at, source, to = (row + q) * k + first, j * k + first, c_at + j * ldc + q
            if ask_at >= until:
                _four(w, at, k, w_scales, row + q, x, source, x_scales, j, c, to, ldc, count, 0)
            elif fours > 1:
                _four_asks(w, at, k, w_scales, row + q, x, source, x_scales, j, c, to, ldc, count, ask_at)
                ask_at += 2 * count
            else:
                _four_asks_two(w, at, k, w_scales, row + q, x, source, x_scales, j, c, to, ldc, count, ask_at)
                ask_at += 4 * count
    j = 4 * fours
    if j + 2 <= others:
        for q in range(0, LANES, LANES // 2):
            at, to = (row + q) * k + first, c_at + j * ldc + q
            _two(w, at, k, w_scales, row + q, x, j * k + first, x_scales, j, c, to, ldc, count, ask_at)
            ask_at += LANES // 2 * count
        j += 2
    if j < others:
        to = c_at + j * ldc
        _one(w, row * k + first, k, w_scales, row, x, j * k + first, x_scales, j, c, to, ldc, count, ask_at)


@inline
def whole_block_in_order(
    w: Any, row: Any, k: Any, w_scales: Any, x: Any, x_scales: Any, c: Any, c_at: Any, ldc: Any, others: Any,
    first: Any, count: Any,
) -> None:  # fmt: skip
    """The same of one or two others, which takes less time than w's way from memory."""
    if others == 1:
        _one_in_order(w, row * k + first, k, w_scales, row, x, first, x_scales, 0, c, c_at, ldc, count, 0)
    elif others == 2:
        for q in range(0, LANES, LANES // 2):
            at, to = (row + q) * k + first, c_at + q
            _two_in_order(w, at, k, w_scales, row + q, x, first, x_scales, 0, c, to, ldc, count, 0)
