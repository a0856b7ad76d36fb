"""Numba intrinsics for decoding: dot products of weight rows with a few input rows.

Memory bandwidth limits decoding, because each weight is read once for a few input rows. Weight rows are therefore read
in memory order and prefetched. The order of summation does not depend on the number of input rows, so a completion is
the same bit for bit, alone and in a batch.
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
    load,
    pair_dots,
    pointer,
    prefetch,
    repeat,
    store,
    subroutine,
    update_if,
)
from strop.machine.probe import vector_extensions

LANES = 16 if "avx512f" in vector_extensions() else 8  # fp32 values per register, and weight rows per block
PREFETCH_ROWS = 2 * LANES  # prefetch distance in weight rows
PREFETCH_BYTES = 4096  # prefetch distance in emit_row_by_row
CACHE_LINE = 64  # bytes
MAX_CACHED_WIDTH = 1024  # LANES rows of up to this many elements fit into the L1 cache

_FP32_VECTOR = ir.VectorType(F32, LANES)
_LONG = types.int64


class Operands:
    """Emits loads and multiplications of `step` elements of a and x, whose types are fp32 or bf16."""

    def __init__(self, a: Any, x: Any) -> None:
        self.pairs = a == types.uint16 and x == types.uint16
        if self.pairs and not HAS_BF16:
            raise TypeError("this CPU cannot multiply bf16 by bf16")
        self.step = 2 * LANES if self.pairs else LANES

    def load(self, b: Any, address: Any, bf16: bool, count: Any = None) -> Any:
        """Emit the load of a vector. With `count`, elements from `count` on are zero and not read."""
        kind = ir.VectorType(I16 if bf16 else F32, self.step)
        if count is None:
            loaded = load(b, address, I64(0), kind)
        else:
            indices = ir.Constant(ir.VectorType(I64, self.step), list(range(self.step)))
            mask = b.icmp_signed("<", indices, broadcast(b, count, self.step))
            suffix = f"v{self.step}{'i16' if bf16 else 'f32'}"
            name = f"llvm.masked.load.{suffix}.p0{suffix}"
            source, align = b.bitcast(address, kind.as_pointer()), I32(2 if bf16 else 4)
            loaded = call_llvm(b, name, kind, source, align, mask, ir.Constant(kind, None))
        if self.pairs:
            return b.bitcast(loaded, ir.VectorType(BFloat(), self.step))
        return bf16_to_fp32(b, loaded) if bf16 else loaded

    def multiply_add(self, b: Any, a: Any, x: Any, sums: Any) -> Any:
        if self.pairs:
            return pair_dots(b, sums, a, x)
        return fma(b, a, x, sums)


@intrinsic  # type: ignore[untyped-decorator]
def prefetch_array(context: Any, array: Any, start: Any, count: Any) -> Any:
    """Prefetch `count` elements of an array, from element `start`."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> None:
        size = context.get_abi_sizeof(context.get_data_type(signature.args[0].dtype))
        start = pointer(context, b, signature.args[0], args[0], args[1])

        def body(i: Any, _: list[Any]) -> None:
            prefetch(b, b.gep(start, [i]))

        repeat(b, args[2], CACHE_LINE // size, [], body, may_be_empty=True)

    return types.void(array, _LONG, _LONG), generate


def reduce_vectors(b: Any, vectors: list[Any]) -> Any:
    """Emit the reduction of LANES vectors to one vector of their sums."""
    index_type, distance = ir.VectorType(I32, LANES), LANES // 2
    while distance:
        half, reduced = len(vectors) // 2, []
        for u, v in zip(vectors[:half], vectors[half:], strict=True):
            kept = [LANES + i if i & distance else i for i in range(LANES)]
            swapped = [LANES + (i ^ distance) if i & distance else i ^ distance for i in range(LANES)]
            shuffled = (b.shuffle_vector(u, v, ir.Constant(index_type, indices)) for indices in (kept, swapped))
            reduced.append(add_ordered(b, *shuffled))
        vectors, distance = reduced, distance // 2
    return vectors[0]


def store_rows(b: Any, values: Any, rows: int, inputs: int, start: Any, ldc: Any) -> None:
    """Emit the store of a vector that holds `inputs` rows of c with `rows` elements each."""
    kind = ir.VectorType(I32, rows)
    for j in range(inputs):
        part = b.shuffle_vector(values, values, ir.Constant(kind, [j * rows + i for i in range(rows)]))
        store(b, part, start, b.mul(ldc, I64(j)))


def _dots(rows: int, inputs: int, lines: int = 0) -> Any:
    def typing(
        context: Any, a: Any, a_at: Any, lda: Any, x: Any, x_at: Any, ldx: Any, c: Any, c_at: Any, ldc: Any,
        count: Any, valid: Any, ahead: Any, ahead_at: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, b: Any, signature: Any, args: Any) -> None:
            kinds, operands = signature.args, Operands(a.dtype, x.dtype)
            starts = [pointer(context, b, kinds[i], args[i], args[i + 1]) for i in (0, 3, 6)]
            lda, ldx, ldc, count, valid = (args[i] for i in (2, 5, 8, 9, 10))
            last = b.sub(valid, I64(1))
            row_indices = [b.select(b.icmp_signed("<", I64(i), last), I64(i), last) for i in range(rows)]
            a_rows = [b.gep(starts[0], [b.mul(lda, i)]) for i in row_indices]
            x_rows = [b.gep(starts[1], [b.mul(ldx, I64(j))]) for j in range(inputs)]
            ahead_start = b.bitcast(pointer(context, b, kinds[11], args[11], args[12]), I8.as_pointer())
            whole_steps = b.mul(b.sdiv(count, I64(operands.step)), I64(operands.step))

            def multiply(offset: Any, sums: list[Any], remaining: Any = None) -> list[Any]:
                results: list[Any] = [None] * (rows * inputs)
                xs = [operands.load(b, b.gep(row, [offset]), x.dtype == types.uint16, remaining) for row in x_rows]
                for line in range(lines if remaining is None else 0):
                    begin = b.mul(b.lshr(offset, I64(operands.step.bit_length() - 1)), I64(lines * CACHE_LINE))
                    prefetch(b, b.gep(ahead_start, [b.add(begin, I64(line * CACHE_LINE))]))
                for i, row in enumerate(a_rows):
                    weights = operands.load(b, b.gep(row, [offset]), a.dtype == types.uint16, remaining)
                    for j, values in enumerate(xs):
                        results[j * rows + i] = operands.multiply_add(b, weights, values, sums[j * rows + i])
                return results

            zeros = [ir.Constant(_FP32_VECTOR, [0.0] * LANES)] * (rows * inputs)
            sums = repeat(b, whole_steps, operands.step, zeros, multiply, may_be_empty=True)
            has_rest = b.icmp_signed("<", whole_steps, count)
            sums = update_if(b, has_rest, sums, lambda: multiply(whole_steps, sums, b.sub(count, whole_steps)))
            store_rows(b, reduce_vectors(b, sums), rows, inputs, starts[2], ldc)

        return types.void(a, _LONG, _LONG, x, _LONG, _LONG, c, *[_LONG] * 4, ahead, _LONG), generate

    typing.__doc__ = f"""Compute c[j * ldc + i] = dot(a_i, x_j) for {rows} rows of a and {inputs} rows of x.

    a, x: fp32 or bf16 bits; both bf16 only on a CPU that multiplies bf16. c: fp32. a_at, x_at, c_at: index of the first
    element. lda, ldx, ldc: distance between rows. count: length of a row. valid: number of rows of a; the last one is
    read again in place of missing rows. Each step prefetches {lines} cache lines of `ahead`, from element `ahead_at`.
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
    """Compute c[j, i] = dot(a_i, x_j) for LANES rows of a and `inputs` rows of x; arguments as in _dots.

    Also prefetch elements `ahead_at` to `ahead_end` of `ahead`, so that memory is not idle.
    """
    steps = count // (2 * LANES if a.itemsize + x.itemsize == 4 else LANES)
    line_elements = CACHE_LINE // ahead.itemsize
    fours, rows_per_pass = inputs // 4, LANES if count <= MAX_CACHED_WIDTH else LANES // 2
    lines_per_step = (ahead_end - ahead_at) / line_elements / max(1, 4 * fours * steps)
    lines = 1 if lines_per_step <= 1 else 2 if lines_per_step <= 2 else 4
    for begin in range(0, LANES, rows_per_pass):
        for first in range(0, 4 * fours, 4):
            for q in range(begin, begin + rows_per_pass, LANES // 4):
                a_row, out, x_row = a_at + q * lda, c_at + first * ldc + q, x_at + first * ldx
                if ahead_at >= ahead_end:
                    _dots_4(a, a_row, lda, x, x_row, ldx, c, out, ldc, count, LANES, ahead, ahead_at)
                elif lines == 1:
                    _dots_4_prefetch_1(a, a_row, lda, x, x_row, ldx, c, out, ldc, count, LANES, ahead, ahead_at)
                elif lines == 2:
                    _dots_4_prefetch_2(a, a_row, lda, x, x_row, ldx, c, out, ldc, count, LANES, ahead, ahead_at)
                else:
                    _dots_4_prefetch_4(a, a_row, lda, x, x_row, ldx, c, out, ldc, count, LANES, ahead, ahead_at)
                ahead_at += lines * steps * line_elements
    first = 4 * fours
    if first + 2 <= inputs:
        for q in range(0, LANES, LANES // 2):
            a_row, out, x_row = a_at + q * lda, c_at + first * ldc + q, x_at + first * ldx
            if ahead_at >= ahead_end:
                _dots_2(a, a_row, lda, x, x_row, ldx, c, out, ldc, count, LANES, ahead, ahead_at)
            else:
                _dots_2_prefetch(a, a_row, lda, x, x_row, ldx, c, out, ldc, count, LANES, ahead, ahead_at)
            ahead_at += LANES // 2 * steps * line_elements
        first += 2
    if first < inputs:
        out, x_row = c_at + first * ldc, x_at + first * ldx
        if ahead_at >= ahead_end:
            _dots_1(a, a_at, lda, x, x_row, ldx, c, out, ldc, count, LANES, ahead, ahead_at)
        else:
            _dots_1_prefetch(a, a_at, lda, x, x_row, ldx, c, out, ldc, count, LANES, ahead, ahead_at)


@subroutine
def partial_block(
    a: Any, a_at: Any, lda: Any, rows: Any, x: Any, x_at: Any, ldx: Any, c: Any, c_at: Any, ldc: Any, inputs: Any,
    count: Any,
) -> None:  # fmt: skip
    """Compute the same as `block` for fewer than LANES rows of a, without prefetching."""
    results = np.empty(LANES, np.float32)
    for j in range(inputs):
        _dots_1(a, a_at, lda, x, x_at + j * ldx, ldx, results, 0, LANES, count, rows, a, 0)
        for i in range(rows):
            c[c_at + j * ldc + i] = results[i]


def emit_row_by_row(
    b: Any, start: Any, rows: int, lda: Any, count: Any, step: int, zeros: list[Any],
    multiply: Callable[[Any, Any, list[Any]], list[Any]],
) -> list[Any]:  # fmt: skip
    """Emit the dot products of `rows` weight rows with len(zeros) input rows, one weight row after another.

    Memory bandwidth is the limit with one or two input rows, and sequential reads are faster. The order of summation is
    that of `_dots`.

    count: length of a row, a multiple of `step`. multiply: called with the address of the weight elements, their offset
    in the row, and the sums; emits the multiplication of `step` elements and returns the new sums.
    """
    inputs = len(zeros)
    with b.goto_entry_block():
        results = b.alloca(zeros[0].type, rows * inputs)

    def row_body(row: Any, _: list[Any]) -> None:
        row_start = b.gep(start, [b.mul(lda, row)])

        def body(offset: Any, sums: list[Any]) -> list[Any]:
            address = b.gep(row_start, [offset])
            prefetch(b, b.gep(b.bitcast(address, I8.as_pointer()), [I64(PREFETCH_BYTES)]))
            return multiply(address, offset, sums)

        for j, total in enumerate(repeat(b, count, step, zeros, body)):
            b.store(total, b.gep(results, [b.add(row, I64(j * rows))]))

    repeat(b, I64(rows), 1, [], row_body)
    return [b.load(b.gep(results, [I64(i)])) for i in range(rows * inputs)]


@intrinsic  # type: ignore[untyped-decorator]
def single_row_block(
    context: Any, a: Any, a_at: Any, lda: Any, x: Any, x_at: Any, c: Any, c_at: Any, count: Any
) -> Any:  # fmt: skip
    """Compute c[i] = dot(a_i, x) for LANES rows of a and one input row; count: a multiple of Operands.step."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> None:
        kinds, operands = signature.args, Operands(a.dtype, x.dtype)
        a_start, x_start, c_start = (pointer(context, b, kinds[i], args[i], args[i + 1]) for i in (0, 3, 5))

        def multiply(address: Any, offset: Any, sums: list[Any]) -> list[Any]:
            values = operands.load(b, b.gep(x_start, [offset]), x.dtype == types.uint16)
            weights = operands.load(b, address, a.dtype == types.uint16)
            return [operands.multiply_add(b, weights, values, sums[0])]

        zeros = [ir.Constant(_FP32_VECTOR, [0.0] * LANES)]
        sums = emit_row_by_row(b, a_start, LANES, args[2], args[7], operands.step, zeros, multiply)
        store_rows(b, reduce_vectors(b, sums), LANES, 1, c_start, I64(0))

    return types.void(a, _LONG, _LONG, x, _LONG, c, _LONG, _LONG), generate


def _weighted_sum(queries: int, vectors: int) -> Any:
    def typing(
        context: Any, p: Any, p_at: Any, ldp: Any, v: Any, v_at: Any, ldv: Any, c: Any, c_at: Any, ldc: Any, keys: Any
    ) -> Any:  # fmt: skip
        def generate(context: Any, b: Any, signature: Any, args: Any) -> None:
            kinds, bf16 = signature.args, v.dtype == types.uint16
            starts = [pointer(context, b, kinds[i], args[i], args[i + 1]) for i in (0, 3, 6)]
            ldp, ldv, ldc, keys = args[2], args[5], args[8], args[9]
            kind = ir.VectorType(I16 if bf16 else F32, LANES)
            offsets = [b.add(b.mul(ldc, I64(i)), I64(j * LANES)) for i in range(queries) for j in range(vectors)]
            outputs = [b.gep(starts[2], [offset]) for offset in offsets]

            def body(key: Any, sums: list[Any]) -> list[Any]:
                row, columns, results = b.gep(starts[1], [b.mul(ldv, key)]), [], []
                for j in range(vectors):
                    values = load(b, row, I64(j * LANES), kind)
                    columns.append(bf16_to_fp32(b, values) if bf16 else values)
                for i in range(queries):
                    weight = broadcast(b, b.load(b.gep(starts[0], [b.add(b.mul(ldp, I64(i)), key)])), LANES)
                    results += [fma(b, weight, column, sums[i * vectors + j]) for j, column in enumerate(columns)]
                return results

            sums = repeat(b, keys, 1, [load(b, output, I64(0), _FP32_VECTOR) for output in outputs], body)
            for value, output in zip(sums, outputs, strict=True):
                store(b, value, output, I64(0))

        return types.void(p, _LONG, _LONG, v, _LONG, _LONG, c, _LONG, _LONG, _LONG), generate

    typing.__doc__ = f"""Add p ({queries}, keys) times v (keys, {vectors} * LANES) to c.

    p, c: fp32; v: fp32 or bf16 bits. p_at, v_at, c_at: first element. ldp, ldv, ldc: distance between rows.
    """
    return intrinsic(typing)


_sum_1, _sum_2, _sum_3, _sum_4 = (_weighted_sum(queries, 4) for queries in (1, 2, 3, 4))
_sum_1_narrow = _weighted_sum(1, 1)


@subroutine
def add_weighted_rows(
    p: Any, p_at: Any, ldp: Any, v: Any, v_at: Any, ldv: Any, c: Any, c_at: Any, ldc: Any, queries: Any, keys: Any,
    width: Any,
) -> None:  # fmt: skip
    """Add p (queries, keys) times v (keys, width) to c, key by key. width: a multiple of LANES."""
    wide_end = width // (4 * LANES) * (4 * LANES)
    for i in range(0, queries, 4):
        weights, out, remaining = p_at + i * ldp, c_at + i * ldc, queries - i
        for d in range(0, wide_end, 4 * LANES):
            if remaining >= 4:
                _sum_4(p, weights, ldp, v, v_at + d, ldv, c, out + d, ldc, keys)
            elif remaining == 3:
                _sum_3(p, weights, ldp, v, v_at + d, ldv, c, out + d, ldc, keys)
            elif remaining == 2:
                _sum_2(p, weights, ldp, v, v_at + d, ldv, c, out + d, ldc, keys)
            else:
                _sum_1(p, weights, ldp, v, v_at + d, ldv, c, out + d, ldc, keys)
        for n in range(min(4, remaining)):
            for d in range(wide_end, width, LANES):
                _sum_1_narrow(p, weights + n * ldp, ldp, v, v_at + d, ldv, c, out + n * ldc + d, ldc, keys)
