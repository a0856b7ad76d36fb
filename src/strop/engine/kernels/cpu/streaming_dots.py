"""Inner products of a weight's rows with a row of numbers or two, for numba's loops: the weight is read in order.

There its way from memory is what takes the time, and memory that is read in order comes sooner: rows of a weight are
taken one after the other, not side by side. Sums are in the order of dots.py.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from strop.engine.kernels.cpu.dots import LANES, Kind, location, prefetch, repeat, store_sums

AHEAD_BYTES = 4096  # of memory that is read in order, from where it is read to where it is asked for

_F32, _I8, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(64)
_SUMS = ir.VectorType(_F32, LANES)


def in_order(b: Any, start: Any, rows: int, lda: Any, count: Any, step: int, zeros: list[Any], multiplied: Any) -> Any:
    """The sums of `rows` times len(zeros) as dots._dots has them, of `count` numbers each, in whole steps.
    multiplied(place, at, sums): those of the next step, of the row's numbers at `place`."""
    others = len(zeros)
    with b.goto_entry_block():
        places = b.alloca(zeros[0].type, rows * others)

    def whole(row: Any, _: list[Any]) -> list[Any]:
        here = b.gep(start, [b.mul(lda, row)])

        def body(at: Any, sums: list[Any]) -> list[Any]:
            place = b.gep(here, [at])
            prefetch(b, b.gep(b.bitcast(place, _I8.as_pointer()), [_I64(AHEAD_BYTES)]))
            found: list[Any] = multiplied(place, at, sums)
            return found

        for j, one in enumerate(repeat(b, count, step, zeros, body)):
            b.store(one, b.gep(places, [b.add(row, _I64(j * rows))]))
        return []

    repeat(b, _I64(rows), 1, [], whole)
    return [b.load(b.gep(places, [_I64(place)])) for place in range(rows * others)]


@intrinsic  # type: ignore[untyped-decorator]
def one_in_order(context: Any, a: Any, a_at: Any, lda: Any, x: Any, x_at: Any, c: Any, c_at: Any, count: Any) -> Any:
    """c[i] = a_i x for LANES rows of a; each as in dots._dots. count: in whole steps of Kind."""
    long = types.int64
    signature = types.void(a, long, long, x, long, c, long, long)

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kinds, kind = signature.args, Kind(a.dtype, x.dtype)
        start, source, to = (location(context, b, kinds[i], args[i], args[i + 1]) for i in (0, 3, 5))

        def multiplied(place: Any, at: Any, sums: list[Any]) -> list[Any]:
            other = kind.load(b, b.gep(source, [at]), x.dtype == types.uint16, None)
            return [kind.multiply(b, kind.load(b, place, a.dtype == types.uint16, None), other, sums[0])]

        zeros = [ir.Constant(_SUMS, [0.0] * LANES)]
        sums = in_order(b, start, LANES, args[2], args[7], kind.step, zeros, multiplied)
        store_sums(b, sums, LANES, 1, to, _I64(0))
        return context.get_dummy_value()

    return signature, generate
