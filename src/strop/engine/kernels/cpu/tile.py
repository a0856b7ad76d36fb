"""bf16 matrix multiplication inside compiled kernels, with AVX512-BF16 or AMX instructions and fp32 accumulation.

Attention over short documents needs hundreds of small matmuls, and calling PyTorch for each would add tens of
microseconds. The functions here are called from compiled kernels, on blocks in the CPU cache.
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
    load,
    pointer,
    repeat,
    store,
    subroutine,
    update_if,
)

LANES = 16  # fp32 sums per register
ROWS = amx.ROWS if amx.AVAILABLE else 8  # 8 rows fill 16 registers with sums, enough to hide the instruction latency
COLUMNS = 2 * LANES
STEP = 8  # num_pairs (half the length of the summed dimension) must be a multiple of this
claim_tiles, release_tiles = amx.claim_tiles, amx.release_tiles  # called by each thread before and after its matmuls

_FP32_VECTOR, _INT32_VECTOR = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
_BF16_PAIRS_VECTOR = ir.VectorType(BFloat(), 2 * LANES)


def _tile(vectors: int, depth: int, formula: str) -> Any:
    def typing(
        context: Any, a: Any, a_at: Any, lda: Any, b: Any, b_at: Any, ldb: Any, c: Any, c_at: Any, ldc: Any,
        num_pairs: Any, accumulate: Any,
    ) -> Any:  # fmt: skip
        long = types.int64

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
            operands: list[Any] = []  # for a, b and c: a pointer to the tile, and the distance between rows
            for i in (0, 3, 6):
                operands += [pointer(context, builder, signature.args[i], args[i], args[i + 1]), args[i + 2]]
            if amx.AVAILABLE:
                amx.emit_tile(vectors, builder, *operands, *args[9:])
            else:
                _emit_tile(vectors, depth, builder, *operands, *args[9:])

        return types.void(a, long, long, b, long, long, c, long, long, long, types.boolean), generate

    typing.__doc__ = f"""Compute c{formula}, or add it to c if `accumulate`.

    a, b: one-dimensional uint32 arrays of pairs: two bf16 values that are adjacent along the summed dimension, the
    first in the lower bits. num_pairs: half the length of that dimension. c: fp32. a_at, b_at, c_at: index of the
    tile's first element; lda, ldb, ldc: distance between rows.
    """
    return intrinsic(typing)


def _emit_tile(
    vectors: int, depth: int, builder: Any, a_start: Any, lda: Any, b_start: Any, ldb: Any, c_start: Any, ldc: Any,
    num_pairs: Any, accumulate: Any,
) -> None:  # fmt: skip
    """Emit a tile with AVX512-BF16 instructions.

    vectors: registers of LANES columns in a tile. depth: number of partial sums of each element of c.
    """
    offsets = [builder.add(builder.mul(ldc, I64(i)), I64(j * LANES)) for i in range(ROWS) for j in range(vectors)]
    outputs = [builder.gep(c_start, [offset]) for offset in offsets]
    zeros = [ir.Constant(_FP32_VECTOR, [0.0] * LANES)] * len(outputs)

    def body(k: Any, sums: list[Any]) -> list[Any]:
        results: list[Any] = []
        for step in range(depth):
            index = builder.add(k, I64(step))
            row = builder.gep(b_start, [builder.mul(index, ldb)])
            loaded = [load(builder, row, I64(j * LANES), _INT32_VECTOR) for j in range(vectors)]
            columns = [builder.bitcast(x, _BF16_PAIRS_VECTOR) for x in loaded]
            for i in range(ROWS):
                address = builder.gep(a_start, [builder.add(builder.mul(lda, I64(i)), index)])
                pair = broadcast(builder, builder.load(address), LANES)
                for column in columns:
                    operands = sums[len(results)], builder.bitcast(pair, _BF16_PAIRS_VECTOR), column
                    results.append(call_llvm(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _FP32_VECTOR, *operands))
        return results

    initial = update_if(
        builder, accumulate, zeros, lambda: [load(builder, output, I64(0), _FP32_VECTOR) for output in outputs]
    )
    sums = repeat(builder, num_pairs, depth, initial + zeros * (depth - 1), body)
    for number, output in enumerate(outputs):
        total = sums[number]
        for step in range(1, depth):
            total = builder.fadd(total, sums[step * len(outputs) + number])
        store(builder, total, output, I64(0))


tile = _tile(2, 1, "[ROWS, 32] = a[ROWS, num_pairs] b[num_pairs, 32]")
# Half as wide, with two partial sums per element, so that as many registers are used. Twice as many rows would need 16
# address registers, all that an x86 CPU has.
narrow_tile = _tile(1, 2, "[ROWS, 16] = a[ROWS, num_pairs] b[num_pairs, 16]")

_HALF = np.uint32(16)  # bits per element of a pair
_BF16 = np.zeros(1, np.uint16)  # selects bf16 in from_fp32


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
    rows: Any, columns: Any, num_pairs: Any, accumulate: Any,
) -> None:  # fmt: skip
    """Compute c (rows, columns) = a b, or add it to c if `accumulate`; arguments as in `tile`.

    rows is rounded up to a multiple of ROWS. columns: a multiple of LANES. block: distance between blocks of COLUMNS
    columns of b.
    """
    whole = columns // COLUMNS * COLUMNS
    for j in range(0, whole, COLUMNS):
        for i in range(0, rows, ROWS):
            block_at, out_at = b_at + j // COLUMNS * block, c_at + i * ldc + j
            tile(a, a_at + i * lda, lda, b, block_at, ldb, c, out_at, ldc, num_pairs, accumulate)
    if whole < columns:
        block_at = b_at + whole // COLUMNS * block
        for i in range(0, rows, ROWS):
            narrow_tile(a, a_at + i * lda, lda, b, block_at, ldb, c, c_at + i * ldc + whole, ldc, num_pairs, accumulate)
