"""Dequantization of 8-bit and 4-bit weights in compiled kernels, alone or fused with a matrix multiplication.

Values are the same bit for bit as those of models.quantize, and sums have the same order as in dots.py. With AVX512, a
register holds the 16 values of a 4-bit code, and one instruction looks up 16 elements. Other CPUs use plain loops.
"""

from __future__ import annotations

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
    broadcast,
    call_llvm,
    from_fp32,
    load,
    pointer,
    prefetch,
    repeat,
    store,
    subroutine,
)
from strop.engine.kernels.cpu.dots import LANES, PREFETCH_ROWS, Operands, reduce_vectors, store_rows

_FP32_VECTOR, _INT32_VECTOR = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
GROUP = 2 * LANES  # elements that are dequantized together
UNIT = 2 * GROUP  # elements per iteration, so that a cache line is prefetched only once or twice
VECTORS = LANES == 16
BF16_VECTORS = VECTORS and HAS_BF16


class _Dequantizer:
    """Emits the dequantization of weights. code: a vector with the values of the 4-bit code, or None for int8."""

    def __init__(self, b: Any, code: Any, bf16: bool) -> None:
        self._b, self._code, self._bf16 = b, code, bf16

    def count_bytes(self, elements: Any) -> Any:
        """Emit the number of bytes that hold this number of elements."""
        return elements if self._code is None else self._b.lshr(elements, I64(1))

    def dequantize(self, address: Any, factor: Any) -> list[Any]:
        """Emit the dequantization of UNIT elements, and return them as vectors in bf16 or fp32."""
        if self._code is not None and self._bf16:
            return self._look_up(address, factor)
        b, parts = self._b, []
        for begin in (0, GROUP):
            first, second = self._dequantize_group(b.gep(address, [self.count_bytes(I64(begin))]), factor)
            if self._bf16:  # one instruction; LLVM would round both halves and concatenate them
                name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
                parts.append(call_llvm(b, name, ir.VectorType(BFloat(), GROUP), second, first))
            else:
                parts += [first, second]
        return parts

    def _dequantize_group(self, address: Any, factor: Any) -> tuple[Any, Any]:
        """Emit the dequantization of GROUP elements to two vectors in fp32."""
        b, kind = self._b, ir.VectorType(I8, LANES)
        if self._code is None:
            loaded = (load(b, address, I64(offset), kind) for offset in (0, LANES))
            first, second = (b.sitofp(b.sext(x, _INT32_VECTOR), _FP32_VECTOR) for x in loaded)
            return b.fmul(first, factor), b.fmul(second, factor)
        both = b.zext(load(b, address, I64(0), kind), _INT32_VECTOR)
        upper = b.lshr(both, ir.Constant(_INT32_VECTOR, [4] * LANES))
        lower = b.and_(both, ir.Constant(_INT32_VECTOR, [15] * LANES))
        name = "llvm.x86.avx512.permvar.sf.512"
        first, second = (b.fmul(call_llvm(b, name, _FP32_VECTOR, self._code, i), factor) for i in (upper, lower))
        order = [i // 2 + LANES * (i % 2) for i in range(GROUP)]
        return self._shuffle(first, second, order[:LANES]), self._shuffle(first, second, order[LANES:])

    def _shuffle(self, x: Any, y: Any, indices: list[int]) -> Any:
        return self._b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(indices)), indices))

    def _look_up(self, address: Any, factor: Any) -> list[Any]:
        """Emit the dequantization of UNIT 4-bit elements to two vectors in bf16, by scaling and rounding the code."""
        b = self._b
        words, half, shuffle = ir.VectorType(I16, GROUP), ir.VectorType(I32, 8), self._shuffle
        rounded = b.fptrunc(b.fmul(self._code, factor), ir.VectorType(BFloat(), LANES))
        table = b.bitcast(rounded, ir.VectorType(I16, LANES))
        table = shuffle(table, table, list(range(LANES)) * 2)  # the highest of an index's 5 bits is arbitrary
        packed = b.load(b.bitcast(address, half.as_pointer()), align=1)
        # Take four bytes of each vector in turn, because words are interleaved within 16 bytes.
        packed = b.bitcast(shuffle(packed, packed, [0, 4, 1, 5, 2, 6, 3, 7]), ir.VectorType(I8, GROUP))
        lower = b.zext(packed, words)
        upper = b.lshr(lower, ir.Constant(words, [4] * GROUP))
        first, second = (call_llvm(b, "llvm.x86.avx512.permvar.hi.512", words, table, i) for i in (upper, lower))
        parts = []
        for begin in (0, 4):
            order = [8 * (i // 8) + begin + (i % 8) // 2 + GROUP * (i % 2) for i in range(GROUP)]
            parts.append(b.bitcast(shuffle(first, second, order), ir.VectorType(BFloat(), GROUP)))
        return parts


def _make_dequantizer(context: Any, b: Any, kind: Any, array: Any, *, bf16: bool, four_bit: bool) -> _Dequantizer:
    if not four_bit:
        return _Dequantizer(b, None, bf16)
    return _Dequantizer(b, load(b, pointer(context, b, kind, array, I64(0)), I64(0), _FP32_VECTOR), bf16)


@intrinsic  # type: ignore[untyped-decorator]
def _dequantize(
    context: Any, w: Any, begin: Any, scale: Any, block: Any, code: Any, out: Any, out_at: Any, count: Any
) -> Any:
    """Dequantize `count` elements of w from element `begin` to out[out_at:]. w, scale, block, code: as in _dots.

    begin: the first element of a block. count: a multiple of UNIT; for int8, at most a block.
    """
    long = types.int64

    def generate(context: Any, b: Any, signature: Any, args: Any) -> None:
        if not VECTORS:  # compiled, but not called
            return
        kinds, bf16, four_bit = signature.args, out.dtype == types.uint16, w.dtype == types.uint8
        begin, block = args[1], args[3]
        dequantizer = _make_dequantizer(context, b, kinds[4], args[4], bf16=bf16, four_bit=four_bit)
        source = pointer(context, b, kinds[0], args[0], dequantizer.count_bytes(begin))
        scales = pointer(context, b, kinds[2], args[2], b.sdiv(begin, block))
        out_start = pointer(context, b, kinds[5], *args[5:7])
        shift = call_llvm(b, "llvm.cttz.i64", I64, block, ir.Constant(ir.IntType(1), 1))

        def body(offset: Any, _: list[Any]) -> None:
            factor = broadcast(b, b.load(b.gep(scales, [b.lshr(offset, shift) if four_bit else I64(0)])), LANES)
            address = b.gep(source, [dequantizer.count_bytes(offset)])
            for i, values in enumerate(dequantizer.dequantize(address, factor)):
                store(b, values, out_start, b.add(offset, I64(i * values.type.count)))

        repeat(b, args[7], UNIT, [], body)

    return types.void(w, long, scale, long, code, out, long, long), generate


def _dots(rows: int, inputs: int) -> Any:
    def typing(
        context: Any, w: Any, row: Any, scale: Any, block: Any, code: Any, x: Any, x_at: Any, ldx: Any, c: Any,
        c_at: Any, ldc: Any, count: Any,
    ) -> Any:  # fmt: skip
        long = types.int64

        def generate(context: Any, b: Any, signature: Any, args: Any) -> None:
            kinds, bf16, four_bit = signature.args, x.dtype == types.uint16, w.dtype == types.uint8
            if not VECTORS or (bf16 and not four_bit):  # compiled, but not called: int8_dots.py multiplies int8 by bf16
                return
            first, block, ldx, ldc, count = (args[i] for i in (1, 3, 7, 10, 11))
            dequantizer = _make_dequantizer(context, b, kinds[4], args[4], bf16=bf16, four_bit=four_bit)
            row_begins = [b.mul(b.add(first, I64(i)), count) for i in range(rows)]
            w_rows = [pointer(context, b, kinds[0], args[0], dequantizer.count_bytes(begin)) for begin in row_begins]
            scales = [pointer(context, b, kinds[2], args[2], b.sdiv(begin, block)) for begin in row_begins]
            x_row = pointer(context, b, kinds[5], *args[5:7])
            x_rows = [b.gep(x_row, [b.mul(ldx, I64(j))]) for j in range(inputs)]
            kind = types.uint16 if bf16 else types.float32
            operands = Operands(kind, kind)
            shift = call_llvm(b, "llvm.cttz.i64", I64, block, ir.Constant(ir.IntType(1), 1))
            prefetch_bytes = dequantizer.count_bytes(b.mul(count, I64(PREFETCH_ROWS)))

            def body(offset: Any, sums: list[Any]) -> list[Any]:
                for row in w_rows:
                    prefetch(b, b.gep(row, [b.add(dequantizer.count_bytes(offset), prefetch_bytes)]))
                results, byte_offset = list(sums), dequantizer.count_bytes(offset)
                starts = [b.add(offset, I64(begin)) for begin in range(0, UNIT, operands.step)]
                xs = [[operands.load(b, b.gep(row, [start]), bf16) for start in starts] for row in x_rows]
                block_index = b.lshr(offset, shift) if four_bit else I64(0)
                for i, row in enumerate(w_rows):
                    factor = broadcast(b, b.load(b.gep(scales[i], [block_index])), LANES)
                    for part, weights in enumerate(dequantizer.dequantize(b.gep(row, [byte_offset]), factor)):
                        for j, values in enumerate(xs):
                            index = j * rows + i
                            results[index] = operands.multiply_add(b, weights, values[part], results[index])
                return results

            zeros = [ir.Constant(_FP32_VECTOR, [0.0] * LANES)] * (rows * inputs)
            total = repeat(b, count, UNIT, zeros, body)
            c_start = pointer(context, b, kinds[8], args[8], args[9])
            store_rows(b, reduce_vectors(b, total), rows, inputs, c_start, ldc)

        return types.void(w, long, scale, long, code, x, long, long, c, long, long, long), generate

    typing.__doc__ = f"""Compute c[j * ldc + i] = dot(w_i, x_j) for {rows} rows of w from `row`, and {inputs} rows of x.

    w: (n, count), int8, or uint8 with two indices into `code` per byte. scale: one factor for each `block` elements of
    w. block: the row length for int8; for 4 bits a power of 2, at least UNIT. x: fp32, or bf16 bits with 4-bit weights.
    count: a multiple of UNIT.
    """
    return intrinsic(typing)


_dots_1, _dots_2, _dots_4 = (_dots(LANES // n, n) for n in (1, 2, 4))


@subroutine
def quantized_block(
    w: Any, row: Any, scale: Any, block: Any, code: Any, x: Any, c: Any, c_at: Any, ldc: Any, inputs: Any, count: Any
) -> None:  # fmt: skip
    """Compute c[j, i] = dot(w_i, x_j) for LANES rows of w and 1, 2 or 4 rows of x; arguments as in _dots."""
    if inputs == 1:
        _dots_1(w, row, scale, block, code, x, 0, count, c, c_at, ldc, count)
    elif inputs == 2:
        for q in range(0, LANES, LANES // 2):
            _dots_2(w, row + q, scale, block, code, x, 0, count, c, c_at + q, ldc, count)
    else:
        for q in range(0, LANES, LANES // 4):
            _dots_4(w, row + q, scale, block, code, x, 0, count, c, c_at + q, ldc, count)


@subroutine
def can_dequantize(block: Any, like: Any) -> Any:
    """Return whether `_dequantize` works on this CPU for this block size and the dtype of `like`."""
    return (BF16_VECTORS if like.itemsize == 2 else VECTORS) and block >= UNIT


@subroutine
def dequantize_row(w: Any, row: Any, scale: Any, block: Any, code: Any, out: Any, out_at: Any, count: Any) -> None:
    """Dequantize a row of w (n, count) to out[out_at:], fp32 or bf16 bits. `code` is empty for int8."""
    begin, four_bit = row * count, len(code) > 0
    done = 0
    if can_dequantize(block, out) and (not four_bit or block & (block - 1) == 0):
        done = count // UNIT * UNIT
        if done:
            _dequantize(w, begin, scale, block, code, out, out_at, done)
    for first in range(done // block * block, count, block):
        factor = scale[(begin + first) // block]
        for j in range(max(first, done), min(first + block, count)):
            if four_bit:
                byte = np.int64(w[(begin + j) >> 1])
                out[out_at + j] = from_fp32(code[(byte >> (0 if j & 1 else 4)) & 15] * factor, out)
            else:
                out[out_at + j] = from_fp32(np.float32(w[begin + j]) * factor, out)
