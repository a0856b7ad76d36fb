"""Weights in 8 and 4 bit, for numba's loops: made whole a stretch at a time, or multiplied as they are taken apart.

The numbers are those of the whole weight (model.quantize), to the bit, and sums are in the order of dots.py. Where the
CPU has AVX512 all is written in its vectors: a code of 16 numbers is one register, and looking 16 of them up one
instruction. Elsewhere stretches are made by plain loops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from strop.engine.cpu.compiled import HAS_BF16, BFloat, inline, narrow
from strop.engine.cpu.dots import AHEAD, LANES, Kind, call, location, prefetch, spread, store_sums

_F32, _I8, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_WIDE, _NUMBERS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
STRETCH = 2 * LANES  # numbers that are taken apart together
TURN = 2 * STRETCH  # and what a loop takes, so that a line of memory is asked for once or twice
VECTORS = LANES == 16
ROUNDS = VECTORS and HAS_BF16


class _Packed:
    """How a weight is taken apart; `code`: None in 8 bit."""

    def __init__(self, b: Any, code: Any, bf16: bool) -> None:
        self._b, self._code, self._bf16 = b, code, bf16

    def bytes_of(self, numbers: Any) -> Any:
        return numbers if self._code is None else self._b.lshr(numbers, _I64(1))

    def whole(self, here: Any, factor: Any) -> list[Any]:
        """STRETCH numbers as one vector in bf16, or as two in fp32."""
        b, small = self._b, ir.VectorType(_I8, LANES)

        def loaded(at: int) -> Any:
            return b.load(b.bitcast(b.gep(here, [_I64(at)]), small.as_pointer()), align=1)

        if self._code is None:
            halves = [b.sitofp(b.sext(loaded(at), _NUMBERS), _WIDE) for at in (0, LANES)]
            order = list(range(STRETCH))
        else:
            both = b.zext(loaded(0), _NUMBERS)
            upper = b.lshr(both, ir.Constant(_NUMBERS, [4] * LANES))
            lower = b.and_(both, ir.Constant(_NUMBERS, [15] * LANES))
            halves = [call(b, "llvm.x86.avx512.permvar.sf.512", _WIDE, self._code, at) for at in (upper, lower)]
            order = [i // 2 + LANES * (i % 2) for i in range(STRETCH)]
        first, second = (b.fmul(half, factor) for half in halves)

        def taken(x: Any, y: Any, places: list[int]) -> Any:
            return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(places)), places))

        if not self._bf16:
            return [taken(first, second, order[:LANES]), taken(first, second, order[LANES:])]
        rounded = b.fptrunc(taken(first, second, list(range(STRETCH))), ir.VectorType(BFloat(), STRETCH))
        return [taken(rounded, rounded, order)]


def _code_of(context: Any, b: Any, kind: Any, array: Any, four: bool) -> Any:
    return b.load(b.bitcast(location(context, b, kind, array, _I64(0)), _WIDE.as_pointer()), align=4) if four else None


def _loop(b: Any, count: Any, step: int, carried: list[Any], body: Any) -> list[Any]:
    """body(at, carried) for at = 0, step, ... below count, a multiple of it and not 0; gives what it gave last."""
    before, loop, done = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    at, held = b.phi(_I64), [b.phi(one.type) for one in carried]
    found = body(at, held)
    after = b.add(at, _I64(step))
    for each, first, later in zip([at, *held], [_I64(0), *carried], [after, *found], strict=True):
        each.add_incoming(first, before)
        each.add_incoming(later, loop)
    b.cbranch(b.icmp_signed("<", after, count), loop, done)
    b.position_at_end(done)
    return list(found)


@intrinsic  # type: ignore[untyped-decorator]
def _unpack(context: Any, w: Any, w_at: Any, scale: Any, code: Any, out: Any, out_at: Any, count: Any) -> Any:
    """out[..count] = the numbers of w times scale, of 8 bit (int8) or 4 (uint8); count: a multiple of STRETCH."""
    long = types.int64
    signature = types.void(w, long, types.float32, code, out, long, long)

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not VECTORS:  # compiled, and never called
            return context.get_dummy_value()
        kinds, bf16, four = signature.args, out.dtype == types.uint16, w.dtype == types.uint8
        source, to = location(context, b, kinds[0], *args[:2]), location(context, b, kinds[4], *args[4:6])
        packed = _Packed(b, _code_of(context, b, kinds[3], args[3], four), bf16)
        factor = spread(b, args[2], LANES)

        def body(at: Any, _: list[Any]) -> list[Any]:
            for number, one in enumerate(packed.whole(b.gep(source, [packed.bytes_of(at)]), factor)):
                target = b.bitcast(b.gep(to, [b.add(at, _I64(number * LANES))]), one.type.as_pointer())
                b.store(one, target, align=2 if bf16 else 4)
            return []

        _loop(b, args[6], STRETCH, [], body)
        return context.get_dummy_value()

    return signature, generate


def _packed_dots(rows: int, others: int) -> Any:
    def typing(
        context: Any, w: Any, row: Any, scale: Any, share: Any, code: Any, x: Any, x_at: Any, ldx: Any, c: Any,
        c_at: Any, ldc: Any, count: Any,
    ) -> Any:  # fmt: skip
        long = types.int64
        signature = types.void(w, long, scale, long, code, x, long, long, c, long, long, long)

        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            if not VECTORS:  # compiled, and never called
                return context.get_dummy_value()
            kinds, bf16, four = signature.args, x.dtype == types.uint16, w.dtype == types.uint8
            first, share, ldx, ldc, count = (args[i] for i in (1, 3, 7, 10, 11))
            packed = _Packed(b, _code_of(context, b, kinds[4], args[4], four), bf16)
            begins = [b.mul(b.add(first, _I64(i)), count) for i in range(rows)]
            w_rows = [location(context, b, kinds[0], args[0], packed.bytes_of(begin)) for begin in begins]
            scales = [location(context, b, kinds[2], args[2], b.sdiv(begin, share)) for begin in begins]
            x_row = location(context, b, kinds[5], *args[5:7])
            x_rows = [b.gep(x_row, [b.mul(ldx, _I64(j))]) for j in range(others)]
            kind = Kind(types.uint16 if bf16 else types.float32, types.uint16 if bf16 else types.float32)
            shift = call(b, "llvm.cttz.i64", _I64, share, ir.Constant(ir.IntType(1), 1))
            further = packed.bytes_of(b.mul(count, _I64(AHEAD)))

            def body(at: Any, sums: list[Any]) -> list[Any]:
                for one in w_rows:
                    prefetch(b, b.gep(one, [b.add(packed.bytes_of(at), further)]))
                for stretch in range(0, TURN, STRETCH):
                    sums = multiplied(b.add(at, _I64(stretch)), sums)
                return sums

            def multiplied(at: Any, sums: list[Any]) -> list[Any]:
                found, here = list(sums), packed.bytes_of(at)
                starts = [b.add(at, _I64(number * LANES)) for number in range(1 if bf16 else 2)]
                xs = [[kind.load(b, b.gep(one, [start]), bf16, None) for start in starts] for one in x_rows]
                number = b.lshr(at, shift) if four else _I64(0)
                for i, one in enumerate(w_rows):
                    factor = spread(b, b.load(b.gep(scales[i], [number])), LANES)
                    for part, value in enumerate(packed.whole(b.gep(one, [here]), factor)):
                        for j, other in enumerate(xs):
                            place = j * rows + i
                            found[place] = kind.multiply(b, value, other[part], found[place])
                return found

            zeros = [ir.Constant(_WIDE, [0.0] * LANES)] * (rows * others)
            total = _loop(b, count, TURN, zeros, body)
            store_sums(b, total, rows, others, location(context, b, kinds[8], args[8], args[9]), ldc)
            return context.get_dummy_value()

        return signature, generate

    typing.__doc__ = f"""c[j * ldc + i] = w_i x_j for {rows} rows of a weight (n, count), from `row` on, {others} of x.

    w: int8, a row of it times one of `scale`; or uint8 with two places in `code` a byte, each `share` of them times one
    of `scale`. x: fp32, or bf16's bits. count: a multiple of TURN; share, in 4 bit: a power of 2, of STRETCH at least.
    """
    return intrinsic(typing)


_one, _two, _four = (_packed_dots(LANES // n, n) for n in (1, 2, 4))


@inline
def packed_block(
    w: Any, row: Any, scale: Any, share: Any, code: Any, x: Any, c: Any, c_at: Any, ldc: Any, others: Any, count: Any
) -> None:  # fmt: skip
    """c[j, i] = w_i x_j for LANES rows of w, and `others` of x (.., count), 4 at most; each as in _packed_dots."""
    if others == 1:
        _one(w, row, scale, share, code, x, 0, count, c, c_at, ldc, count)
    elif others == 2:
        for q in range(0, LANES, LANES // 2):
            _two(w, row + q, scale, share, code, x, 0, count, c, c_at + q, ldc, count)
    elif others == 4:
        for q in range(0, LANES, LANES // 4):
            _four(w, row + q, scale, share, code, x, 0, count, c, c_at + q, ldc, count)
    else:
        for q in range(0, LANES, LANES // 2):
            _two(w, row + q, scale, share, code, x, 0, count, c, c_at + q, ldc, count)
        _one(w, row, scale, share, code, x, 2 * count, count, c, c_at + 2 * ldc, ldc, count)


@inline
def from_eight(w: Any, w_at: Any, scale: Any, code: Any, out: Any, out_at: Any, count: Any) -> None:
    """out[out_at + j] = w[w_at + j] * scale of `count` numbers; out: fp32, or bf16's bits; code: not looked at."""
    whole = count // STRETCH * STRETCH if ROUNDS or (out.itemsize == 4 and VECTORS) else 0
    if whole:
        _unpack(w, w_at, scale, code, out, out_at, whole)
    for j in range(whole, count):
        out[out_at + j] = narrow(np.float32(w[w_at + j]) * scale, out)


@inline
def from_four(w: Any, w_at: Any, scale: Any, code: Any, out: Any, out_at: Any, count: Any) -> None:
    """The same of w with two numbers a byte, the first in its upper half, as places in `code`; w_at: in bytes."""
    whole = count // STRETCH * STRETCH if ROUNDS or (out.itemsize == 4 and VECTORS) else 0
    if whole:
        _unpack(w, w_at, scale, code, out, out_at, whole)
    for j in range(whole // 2, count // 2):
        byte = w[w_at + j]
        out[out_at + 2 * j] = narrow(code[byte >> 4] * scale, out)
        out[out_at + 2 * j + 1] = narrow(code[byte & 15] * scale, out)
