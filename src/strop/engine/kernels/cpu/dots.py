"""Numba intrinsics for decoding: dot products of weight rows with a few input rows.

Decoding reads each weight once for a handful of rows, so memory bandwidth is the limit: weight rows are read in memory
order and prefetched. The order of summation does not depend on the other rows, so a completion is bit-identical alone
and in a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from strop.engine.kernels.cpu.compiled import (
    F32,
    HAS_BF16,
    I8,
    I16,
    I32,
    I64,
    BFloat,
    add_ordered,
    bf16_to_fp32,
    broadcast,
    call_llvm,
    fma,
    pointer,
    prefetch,
    repeat,
    subroutine,
    update_if,
)
from strop.machine.probe import vector_extensions

LANES = 16 if "avx512f" in vector_extensions() else 8  # fp32 values in a register; also weight rows of a block
PREFETCH_ROWS = 2 * LANES  # prefetch distance in weight rows
PREFETCH_BYTES = 4096  # prefetch distance where one row is read at a time
CACHE_LINE = 64  # bytes
MAX_CACHED_WIDTH = 1024  # LANES rows of up to this many elements fit into the L1 cache

_SUMS = ir.VectorType(F32, LANES)
_LONG = types.int64


class Operands:
    """Loads and multiplies `step` elements of both operands at a time, from fp32 or bf16."""

    def __init__(self, a: Any, x: Any) -> None:
        self.pairs = a == types.uint16 and x == types.uint16
        if self.pairs and not HAS_BF16:
            raise TypeError("two rows in bf16 need a CPU that multiplies bf16")
        self.step = 2 * LANES if self.pairs else LANES

    def load(self, b: Any, place: Any, bf16: bool, left: Any) -> Any:
        """Load a vector. left: load only the first `left` elements and set the others to zero; None: load all."""
        element = I16 if bf16 else F32
        kind, align = ir.VectorType(element, self.step), 2 if bf16 else 4
        at = b.bitcast(place, kind.as_pointer())
        if left is None:
            loaded = b.load(at, align=align)
        else:
            indices = ir.Constant(ir.VectorType(I64, self.step), list(range(self.step)))
            mask = b.icmp_signed("<", indices, broadcast(b, left, self.step))
            suffix = f"v{self.step}{'i16' if bf16 else 'f32'}"
            name = f"llvm.masked.load.{suffix}.p0{suffix}"
            loaded = call_llvm(b, name, kind, at, I32(align), mask, ir.Constant(kind, None))
        if self.pairs:
            return b.bitcast(loaded, ir.VectorType(BFloat(), self.step))
        return bf16_to_fp32(b, loaded) if bf16 else loaded

    def multiply_add(self, b: Any, a: Any, x: Any, sums: Any) -> Any:
        if self.pairs:
            return call_llvm(b, "llvm.x86.avx512bf16.dpbf16ps.512", _SUMS, sums, a, x)
        return fma(b, a, x, sums)


@intrinsic  # type: ignore[untyped-decorator]
def prefetch_array(context: Any, array: Any, at: Any, count: Any) -> Any:
    """Prefetch `count` elements of an array, from element `at`."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        size = context.get_abi_sizeof(context.get_data_type(signature.args[0].dtype))
        start = pointer(context, b, signature.args[0], args[0], args[1])

        def body(i: Any, _: list[Any]) -> list[Any]:
            prefetch(b, b.gep(start, [i]))
            return []

        repeat(b, args[2], CACHE_LINE // size, [], body, may_be_empty=True)
        return context.get_dummy_value()

    return types.void(array, _LONG, _LONG), generate


def reduce_vectors(b: Any, vectors: list[Any]) -> Any:
    """Reduce LANES vectors to one vector of their sums."""
    index_type, distance = ir.VectorType(I32, LANES), LANES // 2
    while distance:
        half, halves = len(vectors) // 2, []
        for u, v in zip(vectors[:half], vectors[half:], strict=True):
            here = [LANES + i if i & distance else i for i in range(LANES)]
            across = [LANES + (i ^ distance) if i & distance else i ^ distance for i in range(LANES)]
            shuffled = (b.shuffle_vector(u, v, ir.Constant(index_type, places)) for places in (here, across))
            halves.append(add_ordered(b, *shuffled))
        vectors, distance = halves, distance // 2
    return vectors[0]


def store_rows(b: Any, values: Any, rows: int, inputs: int, to: Any, ldc: Any) -> None:
    """Store a vector that holds `inputs` rows of c, of `rows` elements each."""
    kind = ir.VectorType(I32, rows)
    for j in range(inputs):
        part = b.shuffle_vector(values, values, ir.Constant(kind, [j * rows + i for i in range(rows)]))
        b.store(part, b.bitcast(b.gep(to, [b.mul(ldc, I64(j))]), ir.VectorType(F32, rows).as_pointer()), align=4)


def _dots(rows: int, inputs: int, lines: int = 0) -> Any:
    def typing(
        context: Any, a: Any, a_at: Any, lda: Any, x: Any, x_at: Any, ldx: Any, c: Any, c_at: Any, ldc: Any,
        count: Any, valid: Any, ahead: Any, ahead_at: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kinds, operands = signature.args, Operands(a.dtype, x.dtype)
            starts = [pointer(context, b, kinds[i], args[i], args[i + 1]) for i in (0, 3, 6)]
            lda, ldx, ldc, count, valid = (args[i] for i in (2, 5, 8, 9, 10))
            last = b.sub(valid, I64(1))
            nearest = [b.select(b.icmp_signed("<", I64(i), last), I64(i), last) for i in range(rows)]
            a_rows = [b.gep(starts[0], [b.mul(lda, i)]) for i in nearest]
            x_rows = [b.gep(starts[1], [b.mul(ldx, I64(j))]) for j in range(inputs)]
            ahead_start = b.bitcast(pointer(context, b, kinds[11], args[11], args[12]), I8.as_pointer())
            whole = b.mul(b.sdiv(count, I64(operands.step)), I64(operands.step))

            def multiply(at: Any, sums: list[Any], left: Any = None) -> list[Any]:
                results: list[Any] = [None] * (rows * inputs)
                xs = [operands.load(b, b.gep(row, [at]), x.dtype == types.uint16, left) for row in x_rows]
                for line in range(lines if left is None else 0):
                    begin = b.mul(b.lshr(at, I64(operands.step.bit_length() - 1)), I64(lines * CACHE_LINE))
                    prefetch(b, b.gep(ahead_start, [b.add(begin, I64(line * CACHE_LINE))]))
                for i, row in enumerate(a_rows):
                    weights = operands.load(b, b.gep(row, [at]), a.dtype == types.uint16, left)
                    for j, values in enumerate(xs):
                        results[j * rows + i] = operands.multiply_add(b, weights, values, sums[j * rows + i])
                return results

            zeros = [ir.Constant(_SUMS, [0.0] * LANES)] * (rows * inputs)
            sums = repeat(b, whole, operands.step, zeros, multiply, may_be_empty=True)
            partial = b.icmp_signed("<", whole, count)
            sums = update_if(b, partial, sums, lambda: multiply(whole, sums, b.sub(count, whole)))
            store_rows(b, reduce_vectors(b, sums), rows, inputs, starts[2], ldc)
            return context.get_dummy_value()

        signature = types.void(
            a, _LONG, _LONG, x, _LONG, _LONG, c, _LONG, _LONG, _LONG, _LONG, ahead, _LONG
        )  # fmt: skip
        return signature, generate

    typing.__doc__ = f"""Compute c[j * ldc + i] = a_i x_j for {rows} rows of a and {inputs} of x, of `count` elements.

    a, x: fp32, or uint16 with the bits of bf16. If both are bf16, the CPU must multiply bf16. c: fp32.
    a_at, x_at, c_at: where they begin; lda, ldx, ldc: distance between rows. valid: number of rows of a; beyond, the
    last row is read again. Each step prefetches {lines} cache lines of `ahead`, from element `ahead_at`.
    """
    return intrinsic(typing)


_dots_1, _dots_2, _dots_4 = (_dots(LANES // n, n) for n in (1, 2, 4))
_dots_1_prefetch, _dots_2_prefetch = (_dots(LANES // n, n, LANES // n) for n in (1, 2))
_dots_4_prefetch_1, _dots_4_prefetch_2, _dots_4_prefetch_4 = (_dots(LANES // 4, 4, lines) for lines in (1, 2, 4))


@subroutine
def block(
    a: Any, a_at: Any, lda: Any, x: Any, x_at: Any, ldx: Any, c: Any, c_at: Any, ldc: Any, inputs: Any, count: Any,
    ahead: Any, ahead_at: Any, ahead_end: Any,
) -> None:  # fmt: skip
    """Compute c[j, i] = a_i x_j for LANES rows of a and `inputs` rows of x; arguments as in _dots.

    Meanwhile, elements `ahead_at` to `ahead_end` of `ahead` are prefetched, because memory would otherwise be idle.
    """
    steps = count // (2 * LANES if a.itemsize + x.itemsize == 4 else LANES)
    unit = CACHE_LINE // ahead.itemsize
    groups_of_4, rows_a_pass = inputs // 4, LANES if count <= MAX_CACHED_WIDTH else LANES // 2
    lines_a_step = (ahead_end - ahead_at) / unit / max(1, 4 * groups_of_4 * steps)
    lines = 1 if lines_a_step <= 1 else 2 if lines_a_step <= 2 else 4
    for begin in range(0, LANES, rows_a_pass):
        for j in range(0, 4 * groups_of_4, 4):
            for q in range(begin, begin + rows_a_pass, LANES // 4):
                row, to, at = a_at + q * lda, c_at + j * ldc + q, x_at + j * ldx
                if ahead_at >= ahead_end:
                    _dots_4(a, row, lda, x, at, ldx, c, to, ldc, count, LANES, ahead, ahead_at)
                elif lines == 1:
                    _dots_4_prefetch_1(a, row, lda, x, at, ldx, c, to, ldc, count, LANES, ahead, ahead_at)
                elif lines == 2:
                    _dots_4_prefetch_2(a, row, lda, x, at, ldx, c, to, ldc, count, LANES, ahead, ahead_at)
                else:
                    _dots_4_prefetch_4(a, row, lda, x, at, ldx, c, to, ldc, count, LANES, ahead, ahead_at)
                ahead_at += lines * steps * unit
    j = 4 * groups_of_4
    if j + 2 <= inputs:
        for q in range(0, LANES, LANES // 2):
            row, to, at = a_at + q * lda, c_at + j * ldc + q, x_at + j * ldx
            if ahead_at >= ahead_end:
                _dots_2(a, row, lda, x, at, ldx, c, to, ldc, count, LANES, ahead, ahead_at)
            else:
                _dots_2_prefetch(a, row, lda, x, at, ldx, c, to, ldc, count, LANES, ahead, ahead_at)
            ahead_at += LANES // 2 * steps * unit
        j += 2
    if j < inputs:
        to, at = c_at + j * ldc, x_at + j * ldx
        if ahead_at >= ahead_end:
            _dots_1(a, a_at, lda, x, at, ldx, c, to, ldc, count, LANES, ahead, ahead_at)
        else:
            _dots_1_prefetch(a, a_at, lda, x, at, ldx, c, to, ldc, count, LANES, ahead, ahead_at)


@subroutine
def partial_block(
    a: Any, a_at: Any, lda: Any, rows: Any, x: Any, x_at: Any, ldx: Any, c: Any, c_at: Any, ldc: Any, inputs: Any,
    count: Any,
) -> None:  # fmt: skip
    """Compute the same as `block` for `rows` rows of a, fewer than LANES, without prefetching."""
    results = np.empty(LANES, np.float32)
    for j in range(inputs):
        _dots_1(a, a_at, lda, x, x_at + j * ldx, ldx, results, 0, LANES, count, rows, a, 0)
        for i in range(rows):
            c[c_at + j * ldc + i] = results[i]


def emit_row_by_row(
    b: Any, start: Any, rows: int, lda: Any, count: Any, step: int, zeros: list[Any],
    multiply: Callable[[Any, Any, list[Any]], list[Any]],
) -> list[Any]:  # fmt: skip
    """Emit `rows` times len(zeros) dot products that read one weight row after another.

    With one or two input rows, memory bandwidth is the limit, and sequential reads are faster. count: elements of a
    row, a multiple of `step`. multiply(place, at, sums): emit the multiplication of the row's elements at `place` and
    return the new sums. The order of summation is that of `_dots`.
    """
    inputs = len(zeros)
    with b.goto_entry_block():
        results = b.alloca(zeros[0].type, rows * inputs)

    def row_body(row: Any, _: list[Any]) -> list[Any]:
        here = b.gep(start, [b.mul(lda, row)])

        def body(at: Any, sums: list[Any]) -> list[Any]:
            place = b.gep(here, [at])
            prefetch(b, b.gep(b.bitcast(place, I8.as_pointer()), [I64(PREFETCH_BYTES)]))
            return multiply(place, at, sums)

        for j, total in enumerate(repeat(b, count, step, zeros, body)):
            b.store(total, b.gep(results, [b.add(row, I64(j * rows))]))
        return []

    repeat(b, I64(rows), 1, [], row_body)
    return [b.load(b.gep(results, [I64(place)])) for place in range(rows * inputs)]


@intrinsic  # type: ignore[untyped-decorator]
def single_row_block(
    context: Any, a: Any, a_at: Any, lda: Any, x: Any, x_at: Any, c: Any, c_at: Any, count: Any
) -> Any:  # fmt: skip
    """Compute c[i] = a_i x for LANES rows of a and one input row; count: a multiple of Operands.step."""
    signature = types.void(a, _LONG, _LONG, x, _LONG, c, _LONG, _LONG)

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kinds, operands = signature.args, Operands(a.dtype, x.dtype)
        start, source, to = (pointer(context, b, kinds[i], args[i], args[i + 1]) for i in (0, 3, 5))

        def multiply(place: Any, at: Any, sums: list[Any]) -> list[Any]:
            values = operands.load(b, b.gep(source, [at]), x.dtype == types.uint16, None)
            weights = operands.load(b, place, a.dtype == types.uint16, None)
            return [operands.multiply_add(b, weights, values, sums[0])]

        zeros = [ir.Constant(_SUMS, [0.0] * LANES)]
        sums = emit_row_by_row(b, start, LANES, args[2], args[7], operands.step, zeros, multiply)
        store_rows(b, reduce_vectors(b, sums), LANES, 1, to, I64(0))
        return context.get_dummy_value()

    return signature, generate


def _weighted_sum(queries: int, vectors: int) -> Any:
    def typing(
        context: Any, p: Any, p_at: Any, ldp: Any, v: Any, v_at: Any, ldv: Any, c: Any, c_at: Any, ldc: Any, keys: Any
    ) -> Any:  # fmt: skip
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kinds, bf16 = signature.args, v.dtype == types.uint16
            starts = [pointer(context, b, kinds[i], args[i], args[i + 1]) for i in (0, 3, 6)]
            ldp, ldv, ldc, keys = args[2], args[5], args[8], args[9]
            element = ir.VectorType(I16 if bf16 else F32, LANES)
            places = [
                b.bitcast(b.gep(starts[2], [b.add(b.mul(ldc, I64(i)), I64(j * LANES))]), _SUMS.as_pointer())
                for i in range(queries)
                for j in range(vectors)
            ]

            def body(at: Any, sums: list[Any]) -> list[Any]:
                row, columns, results = b.gep(starts[1], [b.mul(ldv, at)]), [], []
                for j in range(vectors):
                    place = b.bitcast(b.gep(row, [I64(j * LANES)]), element.as_pointer())
                    values = b.load(place, align=2 if bf16 else 4)
                    columns.append(bf16_to_fp32(b, values) if bf16 else values)
                for i in range(queries):
                    weight = broadcast(b, b.load(b.gep(starts[0], [b.add(b.mul(ldp, I64(i)), at)])), LANES)
                    results += [fma(b, weight, column, sums[i * vectors + j]) for j, column in enumerate(columns)]
                return results

            sums = repeat(b, keys, 1, [b.load(place, align=4) for place in places], body)
            for value, place in zip(sums, places, strict=True):
                b.store(value, place, align=4)
            return context.get_dummy_value()

        return types.void(p, _LONG, _LONG, v, _LONG, _LONG, c, _LONG, _LONG, _LONG), generate

    typing.__doc__ = f"""Compute c += p v for {queries} rows of p, of `keys` elements, and {vectors} vectors of columns.

    p, c: fp32; v: fp32 or bf16 bits; p_at, v_at, c_at: where they begin; ldp, ldv, ldc: distance between rows.
    """
    return intrinsic(typing)


_sum_1, _sum_2, _sum_3, _sum_4 = (_weighted_sum(queries, 4) for queries in (1, 2, 3, 4))
_sum_1_narrow = _weighted_sum(1, 1)


@subroutine
def add_weighted_rows(
    p: Any, p_at: Any, ldp: Any, v: Any, v_at: Any, ldv: Any, c: Any, c_at: Any, ldc: Any, queries: Any, keys: Any,
    width: Any,
) -> None:  # fmt: skip
    """Compute c (queries, width) += p (queries, keys) v (keys, width), key by key; width: a multiple of LANES."""
    whole = width // (4 * LANES) * (4 * LANES)
    for i in range(0, queries, 4):
        weights, to, left = p_at + i * ldp, c_at + i * ldc, queries - i
        for d in range(0, whole, 4 * LANES):
            if left >= 4:
                _sum_4(p, weights, ldp, v, v_at + d, ldv, c, to + d, ldc, keys)
            elif left == 3:
                _sum_3(p, weights, ldp, v, v_at + d, ldv, c, to + d, ldc, keys)
            elif left == 2:
                _sum_2(p, weights, ldp, v, v_at + d, ldv, c, to + d, ldc, keys)
            else:
                _sum_1(p, weights, ldp, v, v_at + d, ldv, c, to + d, ldc, keys)
        for n in range(min(4, left)):
            for d in range(whole, width, LANES):
                _sum_1_narrow(p, weights + n * ldp, ldp, v, v_at + d, ldv, c, to + n * ldc + d, ldc, keys)
