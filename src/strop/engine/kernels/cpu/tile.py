"""A bf16 matrix multiplication for compiled kernels, with AVX512-BF16 or AMX instructions, accumulated in fp32.

A PyTorch matmul costs tens of microseconds before it computes; attention over documents of chat length needs hundreds
of small ones. These are called from inside a compiled kernel, on blocks that are in the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from strop.engine.kernels.cpu import amx
from strop.engine.kernels.cpu.compiled import (
    F32,
    I32,
    I64,
    BFloat,
    broadcast,
    call_llvm,
    from_fp32,
    pointer,
    repeat,
    subroutine,
    update_if,
)

LANES = 16  # fp32 sums in a register
ROWS = amx.ROWS if amx.AVAILABLE else 8  # 8: 16 registers of sums, enough to hide the instruction's latency
COLUMNS = 2 * LANES
STEP = 8  # `pairs` must be a multiple of this
claim, release = amx.claim, amx.release  # each thread calls these before and after its multiplications

_SUMS, _PAIRS, _BF16S = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(BFloat(), 2 * LANES)


def _tile(vectors: int, depth: int, formula: str) -> Any:
    def typing(
        context: Any, a: Any, a_at: Any, lda: Any, b: Any, b_at: Any, ldb: Any, c: Any, c_at: Any, ldc: Any,
        pairs: Any, accumulate: Any,
    ) -> Any:  # fmt: skip
        long = types.int64
        signature = types.void(a, long, long, b, long, long, c, long, long, long, types.boolean)

        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            operands: list[Any] = []  # for a, b and c: a pointer to the tile, and the distance between rows
            for i in (0, 3, 6):
                operands += [pointer(context, b, signature.args[i], args[i], args[i + 1]), args[i + 2]]
            if amx.AVAILABLE:
                amx.generate(vectors, b, *operands, *args[9:])
            else:
                _generate(vectors, depth, b, *operands, *args[9:])
            return context.get_dummy_value()

        return signature, generate

    typing.__doc__ = f"""Compute c{formula}, or add it to c with `accumulate`.

    a, b: one-dimensional uint32 arrays; each element holds two bf16 values that are adjacent along the summed
    dimension, the first in the lower half. c: float32. a_at, b_at, c_at: where the tile begins; lda, ldb, ldc:
    distance between rows.
    """
    return intrinsic(typing)


def _generate(
    vectors: int, depth: int, b: Any, a_start: Any, lda: Any, b_start: Any, ldb: Any, c_start: Any, ldc: Any,
    pairs: Any, accumulate: Any,
) -> None:  # fmt: skip
    """Emit the tile with AVX512-BF16 instructions. depth: number of separate sums of each element of c."""
    places = [
        b.bitcast(b.gep(c_start, [b.add(b.mul(ldc, I64(i)), I64(j * LANES))]), _SUMS.as_pointer())
        for i in range(ROWS)
        for j in range(vectors)
    ]
    zeros = [ir.Constant(_SUMS, [0.0] * LANES)] * len(places)

    def body(k: Any, sums: list[Any]) -> list[Any]:
        results: list[Any] = []
        for step in range(depth):
            at = b.add(k, I64(step))
            row = b.gep(b_start, [b.mul(at, ldb)])
            columns = []
            for j in range(vectors):
                place = b.bitcast(b.gep(row, [I64(j * LANES)]), _PAIRS.as_pointer())
                columns.append(b.bitcast(b.load(place, align=4), _BF16S))
            for i in range(ROWS):
                pair = broadcast(b, b.load(b.gep(a_start, [b.add(b.mul(lda, I64(i)), at)])), LANES)
                for column in columns:
                    operands = sums[len(results)], b.bitcast(pair, _BF16S), column
                    results.append(call_llvm(b, "llvm.x86.avx512bf16.dpbf16ps.512", _SUMS, *operands))
        return results

    initial = update_if(b, accumulate, zeros, lambda: [b.load(place, align=4) for place in places])
    sums = repeat(b, pairs, depth, initial + zeros * (depth - 1), body)
    for number, place in enumerate(places):
        total = sums[number]
        for step in range(1, depth):
            total = b.fadd(total, sums[step * len(places) + number])
        b.store(total, place, align=4)


tile = _tile(2, 1, "[ROWS, 32] = a[ROWS, pairs] b[pairs, 32]")
# Half as wide, with two sums for each element, so that it uses as many registers. Twice as many rows instead would need
# 16 address registers, which is all that an x86 CPU has.
narrow_tile = _tile(1, 2, "[ROWS, 16] = a[ROWS, pairs] b[pairs, 16]")

_HALF = np.uint32(16)  # bits of one element of a pair
_BF16 = np.zeros(1, np.uint16)  # makes from_fp32 round to bf16


@subroutine
def pair(first: Any, second: Any) -> Any:
    """Pack the bits of two bf16 values into a pair."""
    return np.uint32(first) | (np.uint32(second) << _HALF)


@subroutine
def round_pair(first: Any, second: Any) -> Any:
    """Round two fp32 values to bf16 and pack them into a pair."""
    return pair(from_fp32(first, _BF16), from_fp32(second, _BF16))


@subroutine
def matmul(
    a: Any, a_at: Any, lda: Any, b: Any, b_at: Any, ldb: Any, block: Any, c: Any, c_at: Any, ldc: Any,
    rows: Any, columns: Any, pairs: Any, accumulate: Any,
) -> None:  # fmt: skip
    """Compute c (rows, columns) = a b, or add it to c with `accumulate`, tile by tile; arguments as in `tile`.

    columns: a multiple of LANES; rows are rounded up to a multiple of ROWS. block: distance in b between
    blocks of COLUMNS columns.
    """
    whole = columns // COLUMNS * COLUMNS
    for j in range(0, whole, COLUMNS):
        for i in range(0, rows, ROWS):
            at, to = b_at + j // COLUMNS * block, c_at + i * ldc + j
            tile(a, a_at + i * lda, lda, b, at, ldb, c, to, ldc, pairs, accumulate)
    if whole < columns:
        at = b_at + whole // COLUMNS * block
        for i in range(0, rows, ROWS):
            narrow_tile(a, a_at + i * lda, lda, b, at, ldb, c, c_at + i * ldc + whole, ldc, pairs, accumulate)
