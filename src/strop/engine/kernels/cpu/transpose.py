"""Sixteen rows of sixteen 32-bit numbers, turned in registers: what stood below each other stands side by side."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from strop.engine.kernels.cpu.dots import location

SIDE = 16
_I64, _ROW = ir.IntType(64), ir.VectorType(ir.IntType(32), SIDE)


@intrinsic  # type: ignore[untyped-decorator]
def turn(context: Any, a: Any, a_at: Any, lda: Any, c: Any, c_at: Any, ldc: Any) -> Any:
    """c[j * ldc + i] = a[i * lda + j] for SIDE rows and columns of arrays of one dimension."""
    long = types.int64

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, into = (location(context, b, signature.args[i], args[i], args[i + 1]) for i in (0, 3))

        def place(start: Any, row: int, step: Any) -> Any:
            return b.bitcast(b.gep(start, [b.mul(step, _I64(row))]), _ROW.as_pointer())

        rows, distance = [b.load(place(source, i, args[2]), align=4) for i in range(SIDE)], 1
        while distance < SIDE:  # blocks of `distance` squared change sides
            low = [SIDE + j - distance if j & distance else j for j in range(SIDE)]
            high = [SIDE + j if j & distance else j + distance for j in range(SIDE)]
            for i in (i for i in range(SIDE) if not i & distance):
                pair = rows[i], rows[i + distance]
                rows[i], rows[i + distance] = (
                    b.shuffle_vector(*pair, ir.Constant(_ROW, places)) for places in (low, high)
                )
            distance *= 2
        for j, row in enumerate(rows):
            b.store(row, place(into, j, args[5]), align=4)
        return context.get_dummy_value()

    return types.void(a, long, long, c, long, long), generate
