"""A matrix product of bf16 for numba's loops: 8 rows by 32 columns in AVX512-BF16's own instruction, sums in fp32.

PyTorch's products cost tens of microseconds a call before they compute; attention over documents of chat length is
hundreds of products of that length. This one is called from inside a compiled loop, on blocks that are in the cache.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

ROWS, COLUMNS = 8, 32  # of a tile: 16 registers of sums, enough to hide the instruction's latency
LANES = 16

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_SUMS, _PAIRS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_BF16S = ir.VectorType(_BFloat(), 2 * LANES)
_DOT = "llvm.x86.avx512bf16.dpbf16ps.512"


@intrinsic  # type: ignore[untyped-decorator]
def tile(
    context: Any, a: Any, a_at: Any, lda: Any, b: Any, b_at: Any, ldb: Any, c: Any, c_at: Any, ldc: Any, pairs: Any,
    onto: Any,
) -> Any:  # fmt: skip
    """c[8, 32] = a[8, pairs] b[pairs, 32], or += with `onto`.

    a, b: uint32 arrays of one dimension, each number a pair of bf16 that stand one behind the other along the summed
    dimension, the lower half first; c: float32. a_at, b_at, c_at: where the tile begins; lda, ldb, ldc: row to row.
    """
    long = types.int64
    signature = types.void(a, long, long, b, long, long, c, long, long, long, types.boolean)
    return signature, _generate


def _generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
    a_array, a_at, lda, b_array, b_at, ldb, c_array, c_at, ldc, pairs, onto = args

    def pointer(kind: Any, value: Any, at: Any) -> Any:
        return b.gep(context.make_array(kind)(context, b, value).data, [at])

    a_start = pointer(signature.args[0], a_array, a_at)
    b_start = pointer(signature.args[3], b_array, b_at)
    c_start = pointer(signature.args[6], c_array, c_at)
    vectors = COLUMNS // LANES
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
    sums = [b.phi(_SUMS) for _ in places]
    for each, value in zip(sums, held, strict=True):
        each.add_incoming(zeros, before)
        each.add_incoming(value, load)
    row = b.gep(b_start, [b.mul(k, ldb)])
    columns = []
    for j in range(vectors):
        place = b.bitcast(b.gep(row, [_I64(j * LANES)]), _PAIRS.as_pointer())
        columns.append(b.bitcast(b.load(place, align=4), _BF16S))
    added = []
    for i in range(ROWS):
        pair = b.load(b.gep(a_start, [b.add(b.mul(lda, _I64(i)), k)]))
        one = b.insert_element(ir.Constant(_PAIRS, ir.Undefined), pair, _I32(0))
        same = b.shuffle_vector(one, ir.Constant(_PAIRS, ir.Undefined), ir.Constant(_PAIRS, [0] * LANES))
        for j in range(vectors):
            added.append(b.call(dot, [sums[i * vectors + j], b.bitcast(same, _BF16S), columns[j]]))
    after = b.add(k, _I64(1))
    k.add_incoming(after, loop)
    for each, value in zip(sums, added, strict=True):
        each.add_incoming(value, loop)
    b.cbranch(b.icmp_signed("<", after, pairs), loop, done)

    b.position_at_end(done)
    for place, value in zip(places, added, strict=True):
        b.store(value, place, align=4)
    return context.get_dummy_value()
