"""Weights in 8 and 4 bits for compiled kernels: dequantized a few rows at a time, or multiplied while dequantized.

The values have the bits that models.quantize gives, and sums have the order of dots.py. With AVX512 the code is written
in vectors: the 16 values of a 4-bit code are one register, and looking up 16 elements one instruction. Elsewhere
weights are dequantized by plain loops.
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
    pointer,
    prefetch,
    repeat,
    subroutine,
)
from strop.engine.kernels.cpu.dots import LANES, PREFETCH_ROWS, Operands, reduce_vectors, store_rows

_FLOATS, _NUMBERS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
GROUP = 2 * LANES  # elements that are dequantized together
UNIT = 2 * GROUP  # elements of one iteration, so that a cache line is requested once or twice
VECTORS = LANES == 16
BF16_VECTORS = VECTORS and HAS_BF16


class _Dequantizer:
    """Emits the dequantization of a weight; code: the vector of a 4-bit code's values, or None for 8 bits."""

    def __init__(self, b: Any, code: Any, bf16: bool) -> None:
        self._b, self._code, self._bf16 = b, code, bf16

    def bytes_of(self, numbers: Any) -> Any:
        return numbers if self._code is None else self._b.lshr(numbers, I64(1))

    def unit(self, here: Any, factor: Any) -> list[Any]:
        """Return UNIT elements as vectors, in bf16 or in fp32."""
        if self._code is not None and self._bf16:
            return self._look_up(here, factor)
        b, parts = self._b, []
        for begin in (0, GROUP):
            first, second = self._group(b.gep(here, [self.bytes_of(I64(begin))]), factor)
            if self._bf16:  # one instruction, where LLVM would round each half and join them
                name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
                parts.append(call_llvm(b, name, ir.VectorType(BFloat(), GROUP), second, first))
            else:
                parts += [first, second]
        return parts

    def _group(self, here: Any, factor: Any) -> tuple[Any, Any]:
        """Return GROUP elements as two vectors in fp32."""
        b, small = self._b, ir.VectorType(I8, LANES)

        def loaded(at: int) -> Any:
            return b.load(b.bitcast(b.gep(here, [I64(at)]), small.as_pointer()), align=1)

        if self._code is None:
            first, second = (b.sitofp(b.sext(loaded(at), _NUMBERS), _FLOATS) for at in (0, LANES))
            return b.fmul(first, factor), b.fmul(second, factor)
        both = b.zext(loaded(0), _NUMBERS)
        upper = b.lshr(both, ir.Constant(_NUMBERS, [4] * LANES))
        lower = b.and_(both, ir.Constant(_NUMBERS, [15] * LANES))
        look = "llvm.x86.avx512.permvar.sf.512"
        first, second = (b.fmul(call_llvm(b, look, _FLOATS, self._code, at), factor) for at in (upper, lower))
        order = [i // 2 + LANES * (i % 2) for i in range(GROUP)]
        return self._shuffle(first, second, order[:LANES]), self._shuffle(first, second, order[LANES:])

    def _shuffle(self, x: Any, y: Any, places: list[int]) -> Any:
        return self._b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(places)), places))

    def _look_up(self, here: Any, factor: Any) -> list[Any]:
        """Return UNIT 4-bit elements as two vectors in bf16: the code is scaled and rounded once, then looked up."""
        b = self._b
        words, half, shuffle = ir.VectorType(I16, GROUP), ir.VectorType(I32, 8), self._shuffle
        rounded = b.fptrunc(b.fmul(self._code, factor), ir.VectorType(BFloat(), LANES))
        table = b.bitcast(rounded, ir.VectorType(I16, LANES))
        table = shuffle(table, table, list(range(LANES)) * 2)  # an index has 5 bits, the highest arbitrary
        packed = b.load(b.bitcast(here, half.as_pointer()), align=1)
        # four bytes of each vector in turn: words are interleaved within 16 bytes
        packed = b.bitcast(shuffle(packed, packed, [0, 4, 1, 5, 2, 6, 3, 7]), ir.VectorType(I8, GROUP))
        lower = b.zext(packed, words)
        upper = b.lshr(lower, ir.Constant(words, [4] * GROUP))
        first, second = (call_llvm(b, "llvm.x86.avx512.permvar.hi.512", words, table, at) for at in (upper, lower))
        parts = []
        for begin in (0, 4):
            places = [8 * (i // 8) + begin + (i % 8) // 2 + GROUP * (i % 2) for i in range(GROUP)]
            parts.append(b.bitcast(shuffle(first, second, places), ir.VectorType(BFloat(), GROUP)))
        return parts


def _code_of(context: Any, b: Any, kind: Any, array: Any, four: bool) -> Any:
    return b.load(b.bitcast(pointer(context, b, kind, array, I64(0)), _FLOATS.as_pointer()), align=4) if four else None


@intrinsic  # type: ignore[untyped-decorator]
def _dequantize(
    context: Any, w: Any, begin: Any, scale: Any, block: Any, code: Any, out: Any, out_at: Any, count: Any
) -> Any:
    """Dequantize `count` elements of w, from element `begin`, to out[out_at ..]; w, scale, block, code: as _dots.

    begin: where a block begins. count: a multiple of UNIT; for 8 bits, within a block.
    """
    long = types.int64
    signature = types.void(w, long, scale, long, code, out, long, long)

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not VECTORS:  # compiled, but never called
            return context.get_dummy_value()
        kinds, bf16, four = signature.args, out.dtype == types.uint16, w.dtype == types.uint8
        begin, block = args[1], args[3]
        dequantizer = _Dequantizer(b, _code_of(context, b, kinds[4], args[4], four), bf16)
        source = pointer(context, b, kinds[0], args[0], dequantizer.bytes_of(begin))
        scales = pointer(context, b, kinds[2], args[2], b.sdiv(begin, block))
        to = pointer(context, b, kinds[5], *args[5:7])
        shift = call_llvm(b, "llvm.cttz.i64", I64, block, ir.Constant(ir.IntType(1), 1))

        def body(at: Any, _: list[Any]) -> list[Any]:
            factor = broadcast(b, b.load(b.gep(scales, [b.lshr(at, shift) if four else I64(0)])), LANES)
            for number, values in enumerate(dequantizer.unit(b.gep(source, [dequantizer.bytes_of(at)]), factor)):
                target = b.bitcast(b.gep(to, [b.add(at, I64(number * values.type.count))]), values.type.as_pointer())
                b.store(values, target, align=2 if bf16 else 4)
            return []

        repeat(b, args[7], UNIT, [], body)
        return context.get_dummy_value()

    return signature, generate


def _dots(rows: int, inputs: int) -> Any:
    def typing(
        context: Any, w: Any, row: Any, scale: Any, block: Any, code: Any, x: Any, x_at: Any, ldx: Any, c: Any,
        c_at: Any, ldc: Any, count: Any,
    ) -> Any:  # fmt: skip
        long = types.int64
        signature = types.void(w, long, scale, long, code, x, long, long, c, long, long, long)

        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kinds, bf16, four = signature.args, x.dtype == types.uint16, w.dtype == types.uint8
            if not VECTORS or (bf16 and not four):  # compiled, but never called: int8 with bf16 is multiplied as int8
                return context.get_dummy_value()
            first, block, ldx, ldc, count = (args[i] for i in (1, 3, 7, 10, 11))
            dequantizer = _Dequantizer(b, _code_of(context, b, kinds[4], args[4], four), bf16)
            begins = [b.mul(b.add(first, I64(i)), count) for i in range(rows)]
            w_rows = [pointer(context, b, kinds[0], args[0], dequantizer.bytes_of(begin)) for begin in begins]
            scales = [pointer(context, b, kinds[2], args[2], b.sdiv(begin, block)) for begin in begins]
            x_row = pointer(context, b, kinds[5], *args[5:7])
            x_rows = [b.gep(x_row, [b.mul(ldx, I64(j))]) for j in range(inputs)]
            kind = types.uint16 if bf16 else types.float32
            operands = Operands(kind, kind)
            shift = call_llvm(b, "llvm.cttz.i64", I64, block, ir.Constant(ir.IntType(1), 1))
            further = dequantizer.bytes_of(b.mul(count, I64(PREFETCH_ROWS)))

            def body(at: Any, sums: list[Any]) -> list[Any]:
                for row in w_rows:
                    prefetch(b, b.gep(row, [b.add(dequantizer.bytes_of(at), further)]))
                results, here = list(sums), dequantizer.bytes_of(at)
                starts = [b.add(at, I64(begin)) for begin in range(0, UNIT, operands.step)]
                xs = [[operands.load(b, b.gep(row, [start]), bf16, None) for start in starts] for row in x_rows]
                number = b.lshr(at, shift) if four else I64(0)
                for i, row in enumerate(w_rows):
                    factor = broadcast(b, b.load(b.gep(scales[i], [number])), LANES)
                    for part, weights in enumerate(dequantizer.unit(b.gep(row, [here]), factor)):
                        for j, values in enumerate(xs):
                            place = j * rows + i
                            results[place] = operands.multiply_add(b, weights, values[part], results[place])
                return results

            zeros = [ir.Constant(_FLOATS, [0.0] * LANES)] * (rows * inputs)
            total = repeat(b, count, UNIT, zeros, body)
            to = pointer(context, b, kinds[8], args[8], args[9])
            store_rows(b, reduce_vectors(b, total), rows, inputs, to, ldc)
            return context.get_dummy_value()

        return signature, generate

    typing.__doc__ = f"""Compute c[j * ldc + i] = w_i x_j, {rows} rows of w (n, count) from `row`, and {inputs} of x.

    w: int8, each row times one element of `scale`; or uint8 with two indices into `code` a byte, each `block` of them
    times one element of `scale`. x: fp32, or bf16 bits with 4-bit weights. count: a multiple of UNIT; block, for 4
    bits: a power of 2, at least UNIT.
    """
    return intrinsic(typing)


_dots_1, _dots_2, _dots_4 = (_dots(LANES // n, n) for n in (1, 2, 4))


@subroutine
def quantized_block(
    w: Any, row: Any, scale: Any, block: Any, code: Any, x: Any, c: Any, c_at: Any, ldc: Any, inputs: Any, count: Any
) -> None:  # fmt: skip
    """Compute c[j, i] = w_i x_j for LANES rows of w, and 1, 2 or 4 (`inputs`) rows of x (.., count); as in _dots."""
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
    """Return whether the vectors of this CPU dequantize blocks of this size to the type of `like`."""
    return (BF16_VECTORS if like.itemsize == 2 else VECTORS) and block >= UNIT


@subroutine
def dequantize_row(w: Any, row: Any, scale: Any, block: Any, code: Any, out: Any, out_at: Any, count: Any) -> None:
    """Dequantize row `row` of w (n, count) to out[out_at ..], fp32 or bf16 bits; `code`: (0,) for 8 bits."""
    begin, four = row * count, len(code) > 0
    whole = 0
    if can_dequantize(block, out) and (not four or block & (block - 1) == 0):
        whole = count // UNIT * UNIT
        if whole:
            _dequantize(w, begin, scale, block, code, out, out_at, whole)
    for first in range(whole // block * block, count, block):
        factor = scale[(begin + first) // block]
        for j in range(max(first, whole), min(first + block, count)):
            if four:
                byte = np.int64(w[(begin + j) >> 1])
                out[out_at + j] = from_fp32(code[(byte >> (0 if j & 1 else 4)) & 15] * factor, out)
            else:
                out[out_at + j] = from_fp32(np.float32(w[begin + j]) * factor, out)
