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

from strop.engine.kernels.cpu.compiled import HAS_BF16, BFloat, inline, narrow
from strop.engine.kernels.cpu.dots import AHEAD, LANES, Kind, call, location, prefetch, repeat, spread, store_sums

_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
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

    def turn(self, here: Any, factor: Any) -> list[Any]:
        """TURN numbers as vectors, in bf16 or in fp32."""
        if self._code is not None and self._bf16:
            return self._looked_up(here, factor)
        b, found = self._b, []
        for begin in (0, STRETCH):
            first, second = self._stretch(b.gep(here, [self.bytes_of(_I64(begin))]), factor)
            if self._bf16:  # LLVM itself would round either half and put them together
                name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
                found.append(call(b, name, ir.VectorType(BFloat(), STRETCH), second, first))
            else:
                found += [first, second]
        return found

    def _stretch(self, here: Any, factor: Any) -> tuple[Any, Any]:
        """STRETCH numbers as two vectors in fp32."""
        b, small = self._b, ir.VectorType(_I8, LANES)

        def loaded(at: int) -> Any:
            return b.load(b.bitcast(b.gep(here, [_I64(at)]), small.as_pointer()), align=1)

        if self._code is None:
            first, second = (b.sitofp(b.sext(loaded(at), _NUMBERS), _WIDE) for at in (0, LANES))
            return b.fmul(first, factor), b.fmul(second, factor)
        both = b.zext(loaded(0), _NUMBERS)
        upper = b.lshr(both, ir.Constant(_NUMBERS, [4] * LANES))
        lower = b.and_(both, ir.Constant(_NUMBERS, [15] * LANES))
        look = "llvm.x86.avx512.permvar.sf.512"
        first, second = (b.fmul(call(b, look, _WIDE, self._code, at), factor) for at in (upper, lower))
        order = [i // 2 + LANES * (i % 2) for i in range(STRETCH)]
        return self._taken(first, second, order[:LANES]), self._taken(first, second, order[LANES:])

    def _taken(self, x: Any, y: Any, places: list[int]) -> Any:
        return self._b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(places)), places))

    def _looked_up(self, here: Any, factor: Any) -> list[Any]:
        """TURN numbers in 4 bit as two vectors in bf16: the code is multiplied and rounded, and its words looked up."""
        b = self._b
        words, half, taken = ir.VectorType(_I16, STRETCH), ir.VectorType(_I32, 8), self._taken
        rounded = b.fptrunc(b.fmul(self._code, factor), ir.VectorType(BFloat(), LANES))
        table = b.bitcast(rounded, ir.VectorType(_I16, LANES))
        table = taken(table, table, list(range(LANES)) * 2)  # twice: a place has 5 bits, and the upper one may be any
        packed = b.load(b.bitcast(here, half.as_pointer()), align=1)
        # four bytes of either vector in turn, since words are put side by side within 16 bytes
        packed = b.bitcast(taken(packed, packed, [0, 4, 1, 5, 2, 6, 3, 7]), ir.VectorType(_I8, STRETCH))
        lower = b.zext(packed, words)
        upper = b.lshr(lower, ir.Constant(words, [4] * STRETCH))
        first, second = (call(b, "llvm.x86.avx512.permvar.hi.512", words, table, at) for at in (upper, lower))
        found = []
        for begin in (0, 4):
            places = [8 * (i // 8) + begin + (i % 8) // 2 + STRETCH * (i % 2) for i in range(STRETCH)]
            found.append(b.bitcast(taken(first, second, places), ir.VectorType(BFloat(), STRETCH)))
        return found


def _code_of(context: Any, b: Any, kind: Any, array: Any, four: bool) -> Any:
    return b.load(b.bitcast(location(context, b, kind, array, _I64(0)), _WIDE.as_pointer()), align=4) if four else None


@intrinsic  # type: ignore[untyped-decorator]
def _unpack(
    context: Any, w: Any, begin: Any, scale: Any, share: Any, code: Any, out: Any, out_at: Any, count: Any
) -> Any:
    """out[out_at ..] = `count` numbers of w from number `begin` on, as _packed_dots takes them; begin: where a share
    begins. count: a multiple of TURN, in 8 bit within a share."""
    long = types.int64
    signature = types.void(w, long, scale, long, code, out, long, long)

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not VECTORS:  # compiled, and never called
            return context.get_dummy_value()
        kinds, bf16, four = signature.args, out.dtype == types.uint16, w.dtype == types.uint8
        begin, share = args[1], args[3]
        packed = _Packed(b, _code_of(context, b, kinds[4], args[4], four), bf16)
        source = location(context, b, kinds[0], args[0], packed.bytes_of(begin))
        scales = location(context, b, kinds[2], args[2], b.sdiv(begin, share))
        to = location(context, b, kinds[5], *args[5:7])
        shift = call(b, "llvm.cttz.i64", _I64, share, ir.Constant(ir.IntType(1), 1))

        def body(at: Any, _: list[Any]) -> list[Any]:
            factor = spread(b, b.load(b.gep(scales, [b.lshr(at, shift) if four else _I64(0)])), LANES)
            for number, one in enumerate(packed.turn(b.gep(source, [packed.bytes_of(at)]), factor)):
                target = b.bitcast(b.gep(to, [b.add(at, _I64(number * one.type.count))]), one.type.as_pointer())
                b.store(one, target, align=2 if bf16 else 4)
            return []

        repeat(b, args[7], TURN, [], body)
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
                found, here = list(sums), packed.bytes_of(at)
                starts = [b.add(at, _I64(begin)) for begin in range(0, TURN, kind.step)]
                xs = [[kind.load(b, b.gep(one, [start]), bf16, None) for start in starts] for one in x_rows]
                number = b.lshr(at, shift) if four else _I64(0)
                for i, one in enumerate(w_rows):
                    factor = spread(b, b.load(b.gep(scales[i], [number])), LANES)
                    for part, value in enumerate(packed.turn(b.gep(one, [here]), factor)):
                        for j, other in enumerate(xs):
                            place = j * rows + i
                            found[place] = kind.multiply(b, value, other[part], found[place])
                return found

            zeros = [ir.Constant(_WIDE, [0.0] * LANES)] * (rows * others)
            total = repeat(b, count, TURN, zeros, body)
            store_sums(b, total, rows, others, location(context, b, kinds[8], args[8], args[9]), ldc)
            return context.get_dummy_value()

        return signature, generate

    typing.__doc__ = f"""c[j * ldc + i] = w_i x_j for {rows} rows of a weight (n, count), from `row` on, {others} of x.

    w: int8, a row of it times one of `scale`; or uint8 with two places in `code` a byte, each `share` of them times one
    of `scale`. x: fp32, or bf16's bits. count: a multiple of TURN; share, in 4 bit: a power of 2, of TURN at least.
    """
    return intrinsic(typing)


_one, _two, _four = (_packed_dots(LANES // n, n) for n in (1, 2, 4))


@inline
def packed_block(
    w: Any, row: Any, scale: Any, share: Any, code: Any, x: Any, c: Any, c_at: Any, ldc: Any, others: Any, count: Any
) -> None:  # fmt: skip
    """c[j, i] = w_i x_j for LANES rows of w, and 1, 2 or 4 (`others`) of x (.., count); each as in _packed_dots."""
    if others == 1:
        _one(w, row, scale, share, code, x, 0, count, c, c_at, ldc, count)
    elif others == 2:
        for q in range(0, LANES, LANES // 2):
            _two(w, row + q, scale, share, code, x, 0, count, c, c_at + q, ldc, count)
    else:
        for q in range(0, LANES, LANES // 4):
            _four(w, row + q, scale, share, code, x, 0, count, c, c_at + q, ldc, count)


@inline
def able(share: Any, like: Any) -> Any:
    """Whether the CPU's vectors take such shares apart, into numbers of the type of `like`."""
    return (ROUNDS if like.itemsize == 2 else VECTORS) and share >= TURN


@inline
def make_whole(w: Any, row: Any, scale: Any, share: Any, code: Any, out: Any, out_at: Any, count: Any) -> None:
    """out[out_at ..] = row `row` of w (n, count), as _packed_dots takes it, with `code` (0,) in 8 bit; out: fp32, or
    bf16's bits."""
    begin, four = row * count, len(code) > 0
    whole = 0
    if able(share, out) and (not four or share & (share - 1) == 0):
        whole = count // TURN * TURN
        if whole:
            _unpack(w, begin, scale, share, code, out, out_at, whole)
    for first in range(whole // share * share, count, share):
        factor = scale[(begin + first) // share]
        for j in range(max(first, whole), min(first + share, count)):
            if four:
                byte = np.int64(w[(begin + j) >> 1])
                out[out_at + j] = narrow(code[(byte >> (0 if j & 1 else 4)) & 15] * factor, out)
            else:
                out[out_at + j] = narrow(np.float32(w[begin + j]) * factor, out)
