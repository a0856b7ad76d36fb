"""Products of bf16 weights, as they lie, with rows laid out for AMX's tiles: how answering multiplies where AMX is.

A tile takes 16 rows of a weight; the rows of numbers stand on its right, pair by pair. What comes out stands on its
side, and is turned as it is written. The order in which a result is summed does not depend on how many rows there are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from strop.engine.kernels.cpu.amx import claim_whole, generate_wide, release
from strop.engine.kernels.cpu.compiled import inline, loop
from strop.engine.kernels.cpu.dots import location
from strop.engine.kernels.cpu.transpose import turn

LANES = 16
COLUMNS = 4 * LANES  # rows of numbers that are multiplied together
AHEAD = 2 * LANES  # rows of weights that are asked for before they are needed
DEEP = 4 * LANES  # rows of weights whose results are written together
_I64 = ir.IntType(64)


def _tiles(vectors: int) -> Any:
    def typing(
        context: Any, a: Any, a_at: Any, lda: Any, b: Any, b_at: Any, c: Any, c_at: Any, ldc: Any, pairs: Any
    ) -> Any:  # fmt: skip
        long = types.int64

        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            a, rows, c = (location(context, b, kinds[i], args[i], args[i + 1]) for i in (0, 3, 5))
            generate_wide(vectors, b, a, args[2], rows, _I64(COLUMNS), c, args[7], args[8], _I64(AHEAD))
            return context.get_dummy_value()

        return types.void(a, long, long, b, long, c, long, long, long), generate

    typing.__doc__ = f"c[16, {16 * vectors}] = a[16, pairs] b[pairs, {16 * vectors}]; the rest as in tile.tile."
    return intrinsic(typing)


_one, _two, _three, _four = (_tiles(vectors) for vectors in (1, 2, 3, 4))


@inline
def room_for(z: Any) -> Any:
    """For `lay_out`."""
    return np.empty((len(z) + COLUMNS - 1) // COLUMNS * COLUMNS * (z.shape[1] // 2), np.uint32)


@loop
def lay_out(z: Any, out: Any, lanes: Any) -> None:
    """z (T, k) in bf16, in blocks of COLUMNS rows, whose first pairs stand beside each other, then their second."""
    rows, half = z.shape[0], z.shape[1] // 2
    pairs = z.reshape(-1).view(np.uint32)
    for lane in prange(lanes):
        low, high = lane * half // lanes, (lane + 1) * half // lanes
        for i in range(rows):
            begin = i // COLUMNS * COLUMNS * half + i % COLUMNS
            for j in range(low, high):
                out[begin + j * COLUMNS] = pairs[i * half + j]


@loop
def tiled(part: Any, laid: Any, y: Any, column: Any, lanes: Any) -> None:
    """y[:, column:] = z w^T of laid-out z, for n in whole blocks of LANES; y (T, ..) fp32, k a multiple of 32."""
    n, k = part.w.shape
    rows, width = y.shape
    half, w, out, blocks = k // 2, part.w.reshape(-1).view(np.uint32), y.reshape(-1), n // LANES
    for lane in prange(lanes):
        claim_whole()
        held = np.empty(DEEP * COLUMNS, np.float32)
        end = (lane + 1) * blocks // lanes * LANES
        for begin in range(lane * blocks // lanes * LANES, end, DEEP):
            deep = min(DEEP, end - begin)
            for first in range(0, rows, COLUMNS):
                there, source = min(COLUMNS, rows - first), first * half
                for c in range(0, deep, LANES):
                    at, to = (begin + c) * half, c * COLUMNS
                    if there > 3 * LANES:
                        _four(w, at, half, laid, source, held, to, COLUMNS, half)
                    elif there > 2 * LANES:
                        _three(w, at, half, laid, source, held, to, COLUMNS, half)
                    elif there > LANES:
                        _two(w, at, half, laid, source, held, to, COLUMNS, half)
                    else:
                        _one(w, at, half, laid, source, held, to, COLUMNS, half)
                for i in range(0, there, LANES):
                    for c in range(0, deep, LANES):
                        to = (first + i) * width + column + begin + c
                        if i + LANES <= there:
                            turn(held, c * COLUMNS + i, COLUMNS, out, to, width)
                        else:
                            for row in range(there - i):
                                for j in range(LANES):
                                    out[to + row * width + j] = held[(c + j) * COLUMNS + i + row]
        release()
