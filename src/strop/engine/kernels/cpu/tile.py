"""A matrix product of bf16 for numba's loops, in AVX512-BF16's own instruction or AMX's (amx.py), sums in fp32.

PyTorch's products cost tens of microseconds a call before they compute; attention over documents of chat length is
hundreds of products of that length. These are called from inside a compiled loop, on blocks that are in the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from strop.engine.kernels.cpu import amx
from strop.engine.kernels.cpu.compiled import BFloat, inline, narrow

LANES = 16  # fp32 sums in a register
ROWS = amx.ROWS if amx.THERE else 8  # 8: 16 registers of sums, enough to hide the instruction's latency
COLUMNS = 2 * LANES
STEP = 8  # pairs are a multiple of
claim, release = amx.claim, amx.release  # around the products of a thread

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_SUMS, _PAIRS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


_BF16S = ir.VectorType(BFloat(), 2 * LANES)
_DOT = "llvm.x86.avx512bf16.dpbf16ps.512"


def _tile(vectors: int, depth: int, meaning: str) -> Any:
    def typing(
        context: Any, a: Any, a_at: Any, lda: Any, b: Any, b_at: Any, ldb: Any, c: Any, c_at: Any, ldc: Any,
        pairs: Any, onto: Any,
    ) -> Any:  # fmt: skip
        long = types.int64
        signature = types.void(a, long, long, b, long, long, c, long, long, long, types.boolean)

        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            (a_start, lda, b_start, ldb, c_start, ldc), (pairs, onto) = _places(context, b, signature, args), args[9:]
            given = b, a_start, lda, b_start, ldb, c_start, ldc, pairs, onto
            if amx.THERE:
                amx.generate(vectors, *given)
            else:
                _generate(vectors, depth, *given)
            return context.get_dummy_value()

        return signature, generate

    typing.__doc__ = f"""c{meaning}, or += with `onto`.

    a, b: uint32 arrays of one dimension, each number a pair of bf16 that stand one behind the other along the summed
    dimension, the lower half first; c: float32. a_at, b_at, c_at: where the tile begins; lda, ldb, ldc: row to row.
    """
    return intrinsic(typing)


tile = _tile(2, 1, "[ROWS, 32] = a[ROWS, pairs] b[pairs, 32]")
# Half as wide, and two sums for each place: as many registers. 16 rows would need as many addresses, and a CPU has 16.
slim = _tile(1, 2, "[ROWS, 16] = a[ROWS, pairs] b[pairs, 16]")


def _places(context: Any, b: Any, signature: Any, args: Any) -> list[Any]:
    """For a, b and c: the address where the tile begins, and from row to row."""
    found = []
    for array, at, step, kind in zip(args[0:9:3], args[1:9:3], args[2:9:3], signature.args[0:9:3], strict=True):
        found += [b.gep(context.make_array(kind)(context, b, array).data, [at]), step]
    return found


def _generate(
    vectors: int, depth: int, b: Any, a_start: Any, lda: Any, b_start: Any, ldb: Any, c_start: Any, ldc: Any,
    pairs: Any, onto: Any,
) -> None:  # fmt: skip
    """depth: steps along the summed dimension that have sums of their own."""
    places = [
        b.bitcast(b.gep(c_start, [b.add(b.mul(ldc, _I64(i)), _I64(j * LANES))]), _SUMS.as_pointer())
        for i in range(ROWS)
        for j in range(vectors)
    ]
    dot = b.module.globals.get(_DOT) or ir.Function(b.module, ir.FunctionType(_SUMS, [_SUMS, _BF16S, _BF16S]), _DOT)
    zeros = ir.Constant(_SUMS, [0.0] * LANES)

    before = b.block
    load, loop, done = (b.append_basic_block(name) for name in ("load", "loop", "done"))
    b.cbranch(onto, load, loop)
    b.position_at_end(load)
    held = [b.load(place, align=4) for place in places]
    b.branch(loop)

    b.position_at_end(loop)
    k = b.phi(_I64)
    k.add_incoming(_I64(0), before)
    k.add_incoming(_I64(0), load)
    sums = [b.phi(_SUMS) for _ in range(depth) for _ in places]
    for number, each in enumerate(sums):
        each.add_incoming(zeros, before)
        each.add_incoming(held[number] if number < len(held) else zeros, load)
    added: list[Any] = []
    for step in range(depth):
        at = b.add(k, _I64(step))
        row = b.gep(b_start, [b.mul(at, ldb)])
        columns = []
        for j in range(vectors):
            place = b.bitcast(b.gep(row, [_I64(j * LANES)]), _PAIRS.as_pointer())
            columns.append(b.bitcast(b.load(place, align=4), _BF16S))
        for i in range(ROWS):
            pair = b.load(b.gep(a_start, [b.add(b.mul(lda, _I64(i)), at)]))
            one = b.insert_element(ir.Constant(_PAIRS, ir.Undefined), pair, _I32(0))
            same = b.shuffle_vector(one, ir.Constant(_PAIRS, ir.Undefined), ir.Constant(_PAIRS, [0] * LANES))
            for column in columns:
                added.append(b.call(dot, [sums[len(added)], b.bitcast(same, _BF16S), column]))
    after = b.add(k, _I64(depth))
    k.add_incoming(after, loop)
    for each, value in zip(sums, added, strict=True):
        each.add_incoming(value, loop)
    b.cbranch(b.icmp_signed("<", after, pairs), loop, done)

    b.position_at_end(done)
    for number, place in enumerate(places):
        total = added[number]
        for step in range(1, depth):
            total = b.fadd(total, added[step * len(places) + number])
        b.store(total, place, align=4)


_HALF = np.uint32(16)  # bits of a pair's first number
_BF16 = np.zeros(1, np.uint16)  # what `narrow` rounds to


@inline
def pair(first: Any, second: Any) -> Any:
    """Two numbers, as their bits in bf16, as one of the pairs that a product reads."""
    return np.uint32(first) | (np.uint32(second) << _HALF)


@inline
def narrow_pair(first: Any, second: Any) -> Any:
    """The same of two numbers in fp32."""
    return pair(narrow(first, _BF16), narrow(second, _BF16))


@inline
def product(
    a: Any, a_at: Any, lda: Any, b: Any, b_at: Any, ldb: Any, block: Any, c: Any, c_at: Any, ldc: Any,
    rows: Any, columns: Any, pairs: Any, onto: Any,
) -> None:  # fmt: skip
    """c (rows, columns) = a b, or += with `onto`, tile by tile; a, b, c and what follows each as in `tile`.

    columns: a multiple of LANES; rows are rounded up to one of ROWS. block: from COLUMNS columns of b to the next.
    """
    whole = columns // COLUMNS * COLUMNS
    for j in range(0, whole, COLUMNS):
        for i in range(0, rows, ROWS):
            tile(a, a_at + i * lda, lda, b, b_at + j // COLUMNS * block, ldb, c, c_at + i * ldc + j, ldc, pairs, onto)
    if whole < columns:
        at = b_at + whole // COLUMNS * block
        for i in range(0, rows, ROWS):
            slim(a, a_at + i * lda, lda, b, at, ldb, c, c_at + i * ldc + whole, ldc, pairs, onto)
