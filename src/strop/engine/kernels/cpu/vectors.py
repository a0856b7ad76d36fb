"""Parts of attention's loops in registers of 16 numbers, for CPUs with AVX512-BF16.

LLVM vectorises a loop for 64 numbers and more at once, and does the rest one by one: a row of a head has 64, and half
of them turn with the other half. Arrays are taken as one dimension, without gaps; counts are multiples of LANES.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from strop.engine.kernels.cpu.compiled import BFloat
from strop.engine.kernels.cpu.dots import call, location, plus, repeat, spread, widened

LANES = 16
_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_HALVES, _NARROW = ir.VectorType(_I16, LANES), ir.VectorType(BFloat(), LANES)
_LOWEST = -3e38


def _same(x: float) -> Any:
    return ir.Constant(_FLOATS, [x] * LANES)


# numba gives what has no flag all of them, by which NaN could be taken for a number.
_FLAGS = ("contract",)


def _compared(b: Any, how: str, x: Any, y: Any) -> Any:
    return b.fcmp_ordered(how, x, y, flags=_FLAGS)


def _times(b: Any, x: Any, y: Any) -> Any:
    return b.fmul(x, y, flags=_FLAGS)


def _less(b: Any, x: Any, y: Any) -> Any:
    return b.fsub(x, y, flags=_FLAGS)


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    return call(b, "llvm.fma.v16f32", _FLOATS, x, y, z)


def _load(b: Any, start: Any, at: Any, bf16: bool) -> Any:
    """Sixteen numbers as fp32."""
    kind = _HALVES if bf16 else _FLOATS
    found = b.load(b.bitcast(b.gep(start, [at]), kind.as_pointer()), align=2 if bf16 else 4)
    return widened(b, found) if bf16 else found


def _narrow(b: Any, x: Any) -> Any:
    return b.bitcast(b.fptrunc(x, _NARROW), _HALVES)


def _store(b: Any, x: Any, start: Any, at: Any) -> None:
    b.store(x, b.bitcast(b.gep(start, [at]), x.type.as_pointer()), align=2 if x.type == _HALVES else 4)


def _exp(b: Any, x: Any) -> Any:
    """As compiled.exp: of x <= 0; of NaN NaN."""
    x = b.select(_compared(b, "<", x, _same(-87.0)), _same(-87.0), x)
    n = b.fptosi(_fma(b, x, _same(1.44269504), _same(-0.5)), _INTS)
    whole = b.sitofp(n, _FLOATS)
    r = _fma(b, whole, _same(2.12194440e-4), _fma(b, whole, _same(-0.693359375), x))
    p = _same(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        p = _fma(b, p, r, _same(factor))
    bias, bits = ir.Constant(_INTS, [127] * LANES), ir.Constant(_INTS, [23] * LANES)
    return _times(b, p, b.bitcast(b.shl(b.add(n, bias), bits), _FLOATS))


def _inside(b: Any, at: Any, begin: Any, end: Any) -> Any:
    """Which of 16 places from `at` on are from `begin` on and in front of `end`."""
    places = b.add(spread(b, b.trunc(at, _I32), LANES), ir.Constant(_INTS, list(range(LANES))))
    first, last = (spread(b, b.trunc(x, _I32), LANES) for x in (begin, end))
    return b.and_(b.icmp_signed(">=", places, first), b.icmp_signed("<", places, last))


def _starts(context: Any, b: Any, signature: Any, args: Any, *places: int) -> list[Any]:
    """Where arrays begin, of which the next argument says from where on."""
    return [location(context, b, signature.args[i], args[i], args[i + 1]) for i in places]


_long, _float = types.int64, types.float32


@intrinsic  # type: ignore[untyped-decorator]
def rotate(
    context: Any, x: Any, x_at: Any, half: Any, cos: Any, cos_at: Any, sin: Any, sin_at: Any, scale: Any, sign: Any,
    out: Any, to: Any,
) -> Any:  # fmt: skip
    """out, in bf16: scale times x (2 half,), whose halves turn by cos and sign sin (half,); x: bf16's bits or fp32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x_start, cos_start, sin_start, into = _starts(context, b, signature, args, 0, 3, 5, 9)
        half, scale = args[2], spread(b, args[7], LANES)
        signed = _times(b, scale, spread(b, args[8], LANES))

        def body(at: Any, _: list[Any]) -> list[Any]:
            other, bf16 = b.add(at, half), x.dtype == types.uint16
            u, v = _load(b, x_start, at, bf16), _load(b, x_start, other, bf16)
            c, s = _times(b, _load(b, cos_start, at, False), scale), _times(b, _load(b, sin_start, at, False), signed)
            _store(b, _narrow(b, _less(b, _times(b, u, c), _times(b, v, s))), into, at)
            _store(b, _narrow(b, _fma(b, v, c, _times(b, u, s))), into, other)
            return []

        repeat(b, half, LANES, [], body)
        return context.get_dummy_value()

    return types.void(x, _long, _long, cos, _long, sin, _long, _float, _float, out, _long), generate


@intrinsic  # type: ignore[untyped-decorator]
def highest(context: Any, scores: Any, at: Any, count: Any, begin: Any, end: Any) -> Any:
    """The greatest of scores (count,), fp32, from `begin` on and in front of `end`."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        (start,) = _starts(context, b, signature, args, 0)

        def body(at: Any, held: list[Any]) -> list[Any]:
            (top,) = held
            seen = b.select(_inside(b, at, args[3], args[4]), _load(b, start, at, False), _same(_LOWEST))
            return [b.select(_compared(b, ">", seen, top), seen, top)]

        (top,) = repeat(b, args[2], LANES, [_same(_LOWEST)], body)
        return call(b, "llvm.vector.reduce.fmax.v16f32", _F32, top)

    return _float(scores, _long, _long, _long, _long), generate


@intrinsic  # type: ignore[untyped-decorator]
def exps(
    context: Any, scores: Any, at: Any, count: Any, begin: Any, end: Any, top: Any, probs: Any, to: Any
) -> Any:  # fmt: skip
    """probs (count,), in bf16: exp(scores - top) from `begin` on and in front of `end`, else 0; gives their sum."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        start, into = _starts(context, b, signature, args, 0, 6)
        top = spread(b, args[5], LANES)

        def body(at: Any, held: list[Any]) -> list[Any]:
            x = _exp(b, _less(b, _load(b, start, at, False), top))
            x = b.select(_inside(b, at, args[3], args[4]), x, _same(0.0))
            _store(b, _narrow(b, x), into, at)
            return [plus(b, held[0], x)]

        (total,) = repeat(b, args[2], LANES, [_same(0.0)], body)
        return _sum(b, total)

    return _float(scores, _long, _long, _long, _long, _float, probs, _long), generate


def _sum(b: Any, x: Any) -> Any:
    kind = ir.FunctionType(_F32, [_F32, _FLOATS])
    name = "llvm.vector.reduce.fadd.v16f32"
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    return b.call(function, [_F32(0.0), x], fastmath=("reassoc",))


@intrinsic  # type: ignore[untyped-decorator]
def slopes_of(
    context: Any, scores: Any, at: Any, count: Any, begin: Any, end: Any, top: Any, along: Any, grads: Any,
    grads_at: Any, out: Any, to: Any,
) -> Any:  # fmt: skip
    """scores (count,) become probabilities exp(scores - top), grads (the gradients of these) the gradients of the
    scores, both 0 where nothing is seen; out: theirs in bf16."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        start, slope, into = _starts(context, b, signature, args, 0, 7, 9)
        top, along = spread(b, args[5], LANES), spread(b, args[6], LANES)

        def body(at: Any, _: list[Any]) -> list[Any]:
            below = _less(b, _load(b, start, at, False), top)
            # Above 0 by rounding alone: exp is made for what is not positive.
            below = b.select(_compared(b, ">", below, _same(0.0)), _same(0.0), below)
            inside = _inside(b, at, args[3], args[4])
            prob = b.select(inside, _exp(b, below), _same(0.0))
            one = b.select(inside, _times(b, prob, _less(b, _load(b, slope, at, False), along)), _same(0.0))
            _store(b, prob, start, at)
            _store(b, one, slope, at)
            _store(b, _narrow(b, one), into, at)
            return []

        repeat(b, args[2], LANES, [], body)
        return context.get_dummy_value()

    signature = types.void(scores, _long, _long, _long, _long, _float, _float, grads, _long, out, _long)
    return signature, generate


@intrinsic  # type: ignore[untyped-decorator]
def row_pairs(context: Any, even: Any, even_at: Any, odd: Any, odd_at: Any, count: Any, out: Any, to: Any) -> Any:
    """out (count,), uint32: two rows, of fp32 or bf16's bits, as pairs in bf16."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        first, second, into = _starts(context, b, signature, args, 0, 2, 5)

        def taken(start: Any, at: Any) -> Any:
            if even.dtype == types.uint16:
                found = b.load(b.bitcast(b.gep(start, [at]), _HALVES.as_pointer()), align=2)
            else:
                found = _narrow(b, _load(b, start, at, False))
            return b.zext(found, _INTS)

        def body(at: Any, _: list[Any]) -> list[Any]:
            high = b.shl(taken(second, at), ir.Constant(_INTS, [16] * LANES))
            _store(b, b.or_(taken(first, at), high), into, at)
            return []

        repeat(b, args[4], LANES, [], body)
        return context.get_dummy_value()

    return types.void(even, _long, odd, _long, _long, out, _long), generate


@intrinsic  # type: ignore[untyped-decorator]
def scaled(context: Any, x: Any, x_at: Any, count: Any, scale: Any, out: Any, to: Any) -> Any:
    """out (count,), in bf16: scale times x, fp32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        start, into = _starts(context, b, signature, args, 0, 4)
        scale = spread(b, args[3], LANES)

        def body(at: Any, _: list[Any]) -> list[Any]:
            _store(b, _narrow(b, _times(b, _load(b, start, at, False), scale)), into, at)
            return []

        repeat(b, args[2], LANES, [], body)
        return context.get_dummy_value()

    return types.void(x, _long, _long, _float, out, _long), generate


@intrinsic  # type: ignore[untyped-decorator]
def dot(context: Any, x: Any, x_at: Any, y: Any, y_at: Any, count: Any) -> Any:
    """The sum of the products of x and y (count,), bf16's bits, in fp32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        first, second = _starts(context, b, signature, args, 0, 2)

        def body(at: Any, held: list[Any]) -> list[Any]:
            return [_fma(b, _load(b, first, at, True), _load(b, second, at, True), held[0])]

        (total,) = repeat(b, args[4], LANES, [_same(0.0)], body)
        return _sum(b, total)

    return _float(x, _long, y, _long, _long), generate
