"""Inner products of weight rows with a few rows of numbers, for numba's loops: what answering computes with.

Answering reads each weight once for a handful of rows, so that the memory sets the pace: rows of weights are taken as
they lie, and asked for ahead of their use. Each result is summed in an order that does not depend on what is computed
beside it: an answer has the same bits alone and among others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from strop.engine.kernels.cpu.compiled import HAS_BF16, BFloat, inline
from strop.machine.probe import vector_extensions

LANES = 16 if "avx512f" in vector_extensions() else 8  # partial sums of a result, and results of a block
AHEAD = 2 * LANES  # rows of weights that are asked for before they are needed
LINE = 64  # bytes that memory gives at once
DEEP = 1024  # numbers of a row up to which LANES of them stay in the first cache

_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
_SUMS = ir.VectorType(_F32, LANES)


class Kind:
    """How numbers are taken in: `step` of them at a time, as what `load` gives."""

    def __init__(self, a: Any, x: Any) -> None:
        self.pairs = a == types.uint16 and x == types.uint16
        if self.pairs and not HAS_BF16:
            raise TypeError("two rows in bf16 need a CPU that multiplies them")
        self.step = 2 * LANES if self.pairs else LANES

    def load(self, b: Any, place: Any, bf16: bool, left: Any) -> Any:
        """left: None for a whole vector, else how many numbers there are of it; the others are 0."""
        element = _I16 if bf16 else _F32
        kind, align = ir.VectorType(element, self.step), 2 if bf16 else 4
        at = b.bitcast(place, kind.as_pointer())
        if left is None:
            found = b.load(at, align=align)
        else:
            counted = ir.Constant(ir.VectorType(_I64, self.step), list(range(self.step)))
            mask = b.icmp_signed("<", counted, spread(b, left, self.step))
            found = _masked(b, at, kind, mask, align)
        if self.pairs:
            return b.bitcast(found, ir.VectorType(BFloat(), self.step))
        return widened(b, found) if bf16 else found

    def multiply(self, b: Any, a: Any, x: Any, onto: Any) -> Any:
        if self.pairs:
            return call(b, "llvm.x86.avx512bf16.dpbf16ps.512", _SUMS, onto, a, x)
        return _fma(b, a, x, onto)


def call(b: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [each.type for each in args])
    return b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), args)


def _fma(b: Any, a: Any, x: Any, onto: Any) -> Any:
    return call(b, f"llvm.fma.v{LANES}f32", _SUMS, a, x, onto)


def spread(b: Any, x: Any, count: int) -> Any:
    """A vector of `count` times x."""
    kind = ir.VectorType(x.type, count)
    one = b.insert_element(ir.Constant(kind, ir.Undefined), x, _I32(0))
    return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(_I32, count), [0] * count))


def _masked(b: Any, at: Any, kind: Any, mask: Any, align: int) -> Any:
    element = "i16" if kind.element == _I16 else "f32"
    name = f"llvm.masked.load.v{kind.count}{element}.p0v{kind.count}{element}"
    return call(b, name, kind, at, _I32(align), mask, ir.Constant(kind, None))


def widened(b: Any, found: Any) -> Any:
    """fp32 of bf16's bits."""
    wide = ir.VectorType(_I32, found.type.count)
    return b.bitcast(b.shl(b.zext(found, wide), ir.Constant(wide, [16] * wide.count)), _SUMS)


def repeat(b: Any, count: Any, step: int, carried: list[Any], body: Any) -> list[Any]:
    """body(at, carried) for at = 0, step, ... below count, a multiple of it and not 0; gives what it gave last."""
    before, loop, done = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    at, held = b.phi(_I64), [b.phi(one.type) for one in carried]
    found = body(at, held)
    after, end = b.add(at, _I64(step)), b.block
    for each, first, later in zip([at, *held], [_I64(0), *carried], [after, *found], strict=True):
        each.add_incoming(first, before)
        each.add_incoming(later, end)
    b.cbranch(b.icmp_signed("<", after, count), loop, done)
    b.position_at_end(done)
    return list(found)


def prefetch(b: Any, place: Any) -> None:
    place = b.bitcast(place, _I8.as_pointer())
    call(b, "llvm.prefetch.p0i8", ir.VoidType(), place, _I32(0), _I32(2), _I32(1))  # to read, into the second cache


@intrinsic  # type: ignore[untyped-decorator]
def ask_for(context: Any, array: Any, at: Any, count: Any) -> Any:
    """Asks memory for `count` numbers of an array from `at` on, line by line: they will be needed soon."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        size = context.get_abi_sizeof(context.get_data_type(signature.args[0].dtype))
        start = location(context, b, signature.args[0], args[0], args[1])
        before, loop, done = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
        b.cbranch(b.icmp_signed(">", args[2], _I64(0)), loop, done)
        b.position_at_end(loop)
        i = b.phi(_I64)
        i.add_incoming(_I64(0), before)
        prefetch(b, b.gep(start, [i]))
        after = b.add(i, _I64(64 // size))
        i.add_incoming(after, loop)
        b.cbranch(b.icmp_signed("<", after, args[2]), loop, done)
        b.position_at_end(done)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), generate


def plus(b: Any, x: Any, y: Any) -> Any:
    """x + y where it stands: without a flag of its own, numba would let LLVM add in another order."""
    return b.fadd(x, y, flags=("contract",))


def sums_of(b: Any, vectors: list[Any]) -> Any:
    """The sums of LANES vectors, as one vector."""
    numbers, distance = ir.VectorType(_I32, LANES), LANES // 2
    while distance:
        half, found = len(vectors) // 2, []
        for u, v in zip(vectors[:half], vectors[half:], strict=True):
            own = [LANES + i if i & distance else i for i in range(LANES)]
            other = [LANES + (i ^ distance) if i & distance else i ^ distance for i in range(LANES)]
            found.append(plus(b, *(b.shuffle_vector(u, v, ir.Constant(numbers, places)) for places in (own, other))))
        vectors, distance = found, distance // 2
    return vectors[0]


def store_sums(b: Any, vectors: list[Any], rows: int, others: int, to: Any, ldc: Any) -> None:
    """The sums of LANES vectors, of `others` times `rows`, as rows of c."""
    store_rows(b, sums_of(b, vectors), rows, others, to, ldc)


def store_rows(b: Any, found: Any, rows: int, others: int, to: Any, ldc: Any) -> None:
    """`others` rows of c, of `rows` numbers each, that stand one behind the other in a vector."""
    own = ir.VectorType(_I32, rows)
    for j in range(others):
        part = b.shuffle_vector(found, found, ir.Constant(own, [j * rows + i for i in range(rows)]))
        b.store(part, b.bitcast(b.gep(to, [b.mul(ldc, _I64(j))]), ir.VectorType(_F32, rows).as_pointer()), align=4)


def location(context: Any, b: Any, kind: Any, array: Any, at: Any) -> Any:
    return b.gep(context.make_array(kind)(context, b, array).data, [at])


def _dots(rows: int, others: int, lines: int = 0) -> Any:
    def typing(
        context: Any, a: Any, a_at: Any, lda: Any, x: Any, x_at: Any, ldx: Any, c: Any, c_at: Any, ldc: Any,
        count: Any, there: Any, ask: Any, ask_at: Any,
    ) -> Any:  # fmt: skip
        long = types.int64
        signature = types.void(a, long, long, x, long, long, c, long, long, long, long, ask, long)

        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kinds, kind = signature.args, Kind(a.dtype, x.dtype)
            starts = [location(context, b, kinds[i], args[i], args[i + 1]) for i in (0, 3, 6)]
            lda, ldx, ldc, count, there = (args[i] for i in (2, 5, 8, 9, 10))
            last = b.sub(there, _I64(1))
            nearest = [b.select(b.icmp_signed("<", _I64(i), last), _I64(i), last) for i in range(rows)]
            a_rows = [b.gep(starts[0], [b.mul(lda, i)]) for i in nearest]
            x_rows = [b.gep(starts[1], [b.mul(ldx, _I64(j))]) for j in range(others)]
            wanted = b.bitcast(location(context, b, kinds[11], args[11], args[12]), _I8.as_pointer())
            whole = b.mul(b.sdiv(count, _I64(kind.step)), _I64(kind.step))

            def multiplied(at: Any, sums: list[Any], left: Any) -> list[Any]:
                found: list[Any] = [None] * (rows * others)
                xs = [kind.load(b, b.gep(row, [at]), x.dtype == types.uint16, left) for row in x_rows]
                for line in range(lines if left is None else 0):
                    begin = b.mul(b.lshr(at, _I64(kind.step.bit_length() - 1)), _I64(lines * LINE))
                    prefetch(b, b.gep(wanted, [b.add(begin, _I64(line * LINE))]))
                for i, row in enumerate(a_rows):
                    one = kind.load(b, b.gep(row, [at]), a.dtype == types.uint16, left)
                    for j, other in enumerate(xs):
                        found[j * rows + i] = kind.multiply(b, one, other, sums[j * rows + i])
                return found

            zeros = [ir.Constant(_SUMS, [0.0] * LANES)] * (rows * others)
            before = b.block
            loop, between, rest, done = (b.append_basic_block(name) for name in ("loop", "between", "rest", "done"))
            b.cbranch(b.icmp_signed(">", whole, _I64(0)), loop, between)
            b.position_at_end(loop)
            at, sums = b.phi(_I64), [b.phi(_SUMS) for _ in zeros]
            added = multiplied(at, sums, None)
            after = b.add(at, _I64(kind.step))
            for each, first, next_one in zip([at, *sums], [_I64(0), *zeros], [after, *added], strict=True):
                each.add_incoming(first, before)
                each.add_incoming(next_one, loop)
            b.cbranch(b.icmp_signed("<", after, whole), loop, between)

            b.position_at_end(between)
            merged = [b.phi(_SUMS) for _ in zeros]
            for each, first, next_one in zip(merged, zeros, added, strict=True):
                each.add_incoming(first, before)
                each.add_incoming(next_one, loop)
            b.cbranch(b.icmp_signed("<", whole, count), rest, done)
            b.position_at_end(rest)
            last_ones = multiplied(whole, merged, b.sub(count, whole))
            b.branch(done)
            b.position_at_end(done)
            total = [b.phi(_SUMS) for _ in zeros]
            for each, first, next_one in zip(total, merged, last_ones, strict=True):
                each.add_incoming(first, between)
                each.add_incoming(next_one, rest)
            store_sums(b, total, rows, others, starts[2], ldc)
            return context.get_dummy_value()

        return signature, generate

    typing.__doc__ = f"""c[j * ldc + i] = a_i x_j for {rows} rows of a and {others} of x, all of `count` numbers.

    a, x: fp32, or uint16 with the bits of bf16 (x in bf16 where a is, on a CPU that multiplies them; else fp32); c:
    fp32. a_at, x_at, c_at: where they begin; lda, ldx, ldc: row to row. there: rows that a really has; in the place of
    those behind stands the last one. With each step {lines} lines of memory are asked for, of `ask` from `ask_at` on.
    """
    return intrinsic(typing)


_one, _two, _four = (_dots(LANES // n, n) for n in (1, 2, 4))
_one_asks, _two_asks = (_dots(LANES // n, n, LANES // n) for n in (1, 2))
_four_asks, _four_asks_two, _four_asks_four = (_dots(LANES // 4, 4, lines) for lines in (1, 2, 4))


@inline
def block(
    a: Any, a_at: Any, lda: Any, x: Any, x_at: Any, ldx: Any, c: Any, c_at: Any, ldc: Any, others: Any, count: Any,
    ask: Any, ask_at: Any, until: Any,
) -> None:  # fmt: skip
    """c[j, i] = a_i x_j for LANES rows of a and `others` of x; each as in _dots. Meanwhile memory is asked for the
    numbers of `ask` from `ask_at` to `until`, a few with each step: it is slow, and would be idle else."""
    steps = count // (2 * LANES if a.itemsize + x.itemsize == 4 else LANES)
    unit = LINE // ask.itemsize
    fours, deep = others // 4, LANES if count <= DEEP else LANES // 2
    much = (until - ask_at) / unit / max(1, 4 * fours * steps)  # lines a step
    lines = 1 if much <= 1 else 2 if much <= 2 else 4
    for begin in range(0, LANES, deep):
        for j in range(0, 4 * fours, 4):
            for q in range(begin, begin + deep, LANES // 4):
                row, to, at = a_at + q * lda, c_at + j * ldc + q, x_at + j * ldx
                if ask_at >= until:
                    _four(a, row, lda, x, at, ldx, c, to, ldc, count, LANES, ask, ask_at)
                elif lines == 1:
                    _four_asks(a, row, lda, x, at, ldx, c, to, ldc, count, LANES, ask, ask_at)
                elif lines == 2:
                    _four_asks_two(a, row, lda, x, at, ldx, c, to, ldc, count, LANES, ask, ask_at)
                else:
                    _four_asks_four(a, row, lda, x, at, ldx, c, to, ldc, count, LANES, ask, ask_at)
                ask_at += lines * steps * unit
    j = 4 * fours
    if j + 2 <= others:
        for q in range(0, LANES, LANES // 2):
            row, to, at = a_at + q * lda, c_at + j * ldc + q, x_at + j * ldx
            if ask_at >= until:
                _two(a, row, lda, x, at, ldx, c, to, ldc, count, LANES, ask, ask_at)
            else:
                _two_asks(a, row, lda, x, at, ldx, c, to, ldc, count, LANES, ask, ask_at)
            ask_at += LANES // 2 * steps * unit
        j += 2
    if j < others:
        to, at = c_at + j * ldc, x_at + j * ldx
        if ask_at >= until:
            _one(a, a_at, lda, x, at, ldx, c, to, ldc, count, LANES, ask, ask_at)
        else:
            _one_asks(a, a_at, lda, x, at, ldx, c, to, ldc, count, LANES, ask, ask_at)


@inline
def edge(
    a: Any, a_at: Any, lda: Any, there: Any, x: Any, x_at: Any, ldx: Any, c: Any, c_at: Any, ldc: Any, others: Any,
    count: Any,
) -> None:  # fmt: skip
    """The same of `there` rows of a, fewer than LANES."""
    found = np.empty(LANES, np.float32)
    for j in range(others):
        _one(a, a_at, lda, x, x_at + j * ldx, ldx, found, 0, LANES, count, there, a, 0)
        for i in range(there):
            c[c_at + j * ldc + i] = found[i]


def _mix(queries: int, vectors: int) -> Any:
    def typing(
        context: Any, p: Any, p_at: Any, ldp: Any, v: Any, v_at: Any, ldv: Any, c: Any, c_at: Any, ldc: Any, keys: Any
    ) -> Any:  # fmt: skip
        long = types.int64
        signature = types.void(p, long, long, v, long, long, c, long, long, long)

        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kinds, bf16 = signature.args, v.dtype == types.uint16
            starts = [location(context, b, kinds[i], args[i], args[i + 1]) for i in (0, 3, 6)]
            ldp, ldv, ldc, keys = args[2], args[5], args[8], args[9]
            element = ir.VectorType(_I16 if bf16 else _F32, LANES)
            places = [
                b.bitcast(b.gep(starts[2], [b.add(b.mul(ldc, _I64(i)), _I64(j * LANES))]), _SUMS.as_pointer())
                for i in range(queries)
                for j in range(vectors)
            ]
            held = [b.load(place, align=4) for place in places]
            before = b.block
            loop, done = b.append_basic_block("loop"), b.append_basic_block("done")
            b.branch(loop)
            b.position_at_end(loop)
            at, sums = b.phi(_I64), [b.phi(_SUMS) for _ in held]
            row = b.gep(starts[1], [b.mul(ldv, at)])
            columns = []
            for j in range(vectors):
                place = b.bitcast(b.gep(row, [_I64(j * LANES)]), element.as_pointer())
                one = b.load(place, align=2 if bf16 else 4)
                columns.append(widened(b, one) if bf16 else one)
            added = []
            for i in range(queries):
                share = spread(b, b.load(b.gep(starts[0], [b.add(b.mul(ldp, _I64(i)), at)])), LANES)
                added += [_fma(b, share, column, sums[i * vectors + j]) for j, column in enumerate(columns)]
            after = b.add(at, _I64(1))
            for each, first, next_one in zip([at, *sums], [_I64(0), *held], [after, *added], strict=True):
                each.add_incoming(first, before)
                each.add_incoming(next_one, loop)
            b.cbranch(b.icmp_signed("<", after, keys), loop, done)
            b.position_at_end(done)
            for value, place in zip(added, places, strict=True):
                b.store(value, place, align=4)
            return context.get_dummy_value()

        return signature, generate

    typing.__doc__ = f"""c += p v for {queries} rows of p, of `keys` numbers each, and {vectors} vectors of v's columns.

    p, c: fp32; v: fp32 or bf16's bits; p_at, v_at, c_at: where they begin; ldp, ldv, ldc: row to row.
    """
    return intrinsic(typing)


_ONE, _TWO, _THREE, _FOUR = (_mix(queries, 4) for queries in (1, 2, 3, 4))
_NARROW = _mix(1, 1)


@inline
def mix(
    p: Any, p_at: Any, ldp: Any, v: Any, v_at: Any, ldv: Any, c: Any, c_at: Any, ldc: Any, queries: Any, keys: Any,
    width: Any,
) -> None:  # fmt: skip
    """c (queries, width) += p (queries, keys) v (keys, width), key by key; width: a multiple of LANES."""
    whole = width // (4 * LANES) * (4 * LANES)
    for i in range(0, queries, 4):
        share, to, there = p_at + i * ldp, c_at + i * ldc, queries - i
        for d in range(0, whole, 4 * LANES):
            if there >= 4:
                _FOUR(p, share, ldp, v, v_at + d, ldv, c, to + d, ldc, keys)
            elif there == 3:
                _THREE(p, share, ldp, v, v_at + d, ldv, c, to + d, ldc, keys)
            elif there == 2:
                _TWO(p, share, ldp, v, v_at + d, ldv, c, to + d, ldc, keys)
            else:
                _ONE(p, share, ldp, v, v_at + d, ldv, c, to + d, ldc, keys)
        for n in range(min(4, there)):
            for d in range(whole, width, LANES):
                _NARROW(p, share + n * ldp, ldp, v, v_at + d, ldv, c, to + n * ldc + d, ldc, keys)
