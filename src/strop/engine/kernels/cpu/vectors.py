"""Operations of attention on rows, in registers of 16 fp32 elements, for CPUs with AVX512-BF16.

LLVM vectorizes a loop for 64 elements and more at once, and computes the rest one by one: a row of a head has 64, and
half of them rotate with the other half. Arrays are one-dimensional and contiguous; counts are multiples of LANES.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from strop.engine.kernels.cpu.compiled import (
    F32,
    I16,
    I32,
    BFloat,
    add_ordered,
    bf16_to_fp32,
    broadcast,
    call_llvm,
    fma,
    pointer,
    repeat,
)

LANES = 16
_FLOATS, _INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
_HALVES, _BF16S = ir.VectorType(I16, LANES), ir.VectorType(BFloat(), LANES)
_LOWEST = -3e38
_long, _float = types.int64, types.float32

# numba gives every operation without flags all of them, which allows LLVM to treat NaN as a number.
_FLAGS = ("contract",)


def _constant(x: float) -> Any:
    return ir.Constant(_FLOATS, [x] * LANES)


def _compare(b: Any, how: str, x: Any, y: Any) -> Any:
    return b.fcmp_ordered(how, x, y, flags=_FLAGS)


def _mul(b: Any, x: Any, y: Any) -> Any:
    return b.fmul(x, y, flags=_FLAGS)


def _sub(b: Any, x: Any, y: Any) -> Any:
    return b.fsub(x, y, flags=_FLAGS)


def _load(b: Any, start: Any, at: Any, bf16: bool) -> Any:
    """Load 16 elements as fp32."""
    kind = _HALVES if bf16 else _FLOATS
    loaded = b.load(b.bitcast(b.gep(start, [at]), kind.as_pointer()), align=2 if bf16 else 4)
    return bf16_to_fp32(b, loaded) if bf16 else loaded


def _round(b: Any, x: Any) -> Any:
    return b.bitcast(b.fptrunc(x, _BF16S), _HALVES)


def _store(b: Any, x: Any, start: Any, at: Any) -> None:
    b.store(x, b.bitcast(b.gep(start, [at]), x.type.as_pointer()), align=2 if x.type == _HALVES else 4)


def _exp(b: Any, x: Any) -> Any:
    """Emit compiled.exp, for x <= 0; NaN stays NaN."""
    x = b.select(_compare(b, "<", x, _constant(-87.0)), _constant(-87.0), x)
    n = b.fptosi(fma(b, x, _constant(1.44269504), _constant(-0.5)), _INTS)
    whole = b.sitofp(n, _FLOATS)
    r = fma(b, whole, _constant(2.12194440e-4), fma(b, whole, _constant(-0.693359375), x))
    p = _constant(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        p = fma(b, p, r, _constant(factor))
    bias, bits = ir.Constant(_INTS, [127] * LANES), ir.Constant(_INTS, [23] * LANES)
    return _mul(b, p, b.bitcast(b.shl(b.add(n, bias), bits), _FLOATS))


def _sum(b: Any, x: Any) -> Any:
    kind = ir.FunctionType(F32, [F32, _FLOATS])
    name = "llvm.vector.reduce.fadd.v16f32"
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    return b.call(function, [F32(0.0), x], fastmath=("reassoc",))


def _inside(b: Any, at: Any, begin: Any, end: Any) -> Any:
    """Return the mask of the 16 places from `at` that are within [begin, end)."""
    places = b.add(broadcast(b, b.trunc(at, I32), LANES), ir.Constant(_INTS, list(range(LANES))))
    first, last = (broadcast(b, b.trunc(x, I32), LANES) for x in (begin, end))
    return b.and_(b.icmp_signed(">=", places, first), b.icmp_signed("<", places, last))


def _starts(context: Any, b: Any, signature: Any, args: Any, *places: int) -> list[Any]:
    """Return pointers into the arrays at these argument places; the argument after each is its first element."""
    return [pointer(context, b, signature.args[i], args[i], args[i + 1]) for i in places]


@intrinsic  # type: ignore[untyped-decorator]
def rotate(
    context: Any, x: Any, x_at: Any, half: Any, cos: Any, cos_at: Any, sin: Any, sin_at: Any, scale: Any, sign: Any,
    out: Any, to: Any,
) -> Any:  # fmt: skip
    """Write scale times x (2 half,), with its halves rotated by cos and sign * sin (half,), to `out` in bf16.

    x: bf16 bits or fp32; cos, sin: fp32.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x_start, cos_start, sin_start, target = _starts(context, b, signature, args, 0, 3, 5, 9)
        half, scale = args[2], broadcast(b, args[7], LANES)
        signed = _mul(b, scale, broadcast(b, args[8], LANES))

        def body(at: Any, _: list[Any]) -> list[Any]:
            second, bf16 = b.add(at, half), x.dtype == types.uint16
            u, v = _load(b, x_start, at, bf16), _load(b, x_start, second, bf16)
            c, s = _mul(b, _load(b, cos_start, at, False), scale), _mul(b, _load(b, sin_start, at, False), signed)
            _store(b, _round(b, _sub(b, _mul(b, u, c), _mul(b, v, s))), target, at)
            _store(b, _round(b, fma(b, v, c, _mul(b, u, s))), target, second)
            return []

        repeat(b, half, LANES, [], body)
        return context.get_dummy_value()

    return types.void(x, _long, _long, cos, _long, sin, _long, _float, _float, out, _long), generate


@intrinsic  # type: ignore[untyped-decorator]
def max_within(context: Any, scores: Any, at: Any, count: Any, begin: Any, end: Any) -> Any:
    """Return the greatest of scores (count,), fp32, at places within [begin, end)."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        (start,) = _starts(context, b, signature, args, 0)

        def body(at: Any, carried: list[Any]) -> list[Any]:
            (top,) = carried
            masked = b.select(_inside(b, at, args[3], args[4]), _load(b, start, at, False), _constant(_LOWEST))
            return [b.select(_compare(b, ">", masked, top), masked, top)]

        (top,) = repeat(b, args[2], LANES, [_constant(_LOWEST)], body)
        return call_llvm(b, "llvm.vector.reduce.fmax.v16f32", F32, top)

    return _float(scores, _long, _long, _long, _long), generate


@intrinsic  # type: ignore[untyped-decorator]
def exp_within(
    context: Any, scores: Any, at: Any, count: Any, begin: Any, end: Any, top: Any, probs: Any, to: Any
) -> Any:  # fmt: skip
    """Write exp(scores - top) to probs (count,), in bf16, and return the sum; 0 at places outside [begin, end)."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        start, target = _starts(context, b, signature, args, 0, 6)
        top = broadcast(b, args[5], LANES)

        def body(at: Any, carried: list[Any]) -> list[Any]:
            x = _exp(b, _sub(b, _load(b, start, at, False), top))
            x = b.select(_inside(b, at, args[3], args[4]), x, _constant(0.0))
            _store(b, _round(b, x), target, at)
            return [add_ordered(b, carried[0], x)]

        (total,) = repeat(b, args[2], LANES, [_constant(0.0)], body)
        return _sum(b, total)

    return _float(scores, _long, _long, _long, _long, _float, probs, _long), generate


@intrinsic  # type: ignore[untyped-decorator]
def softmax_gradient(
    context: Any, scores: Any, at: Any, count: Any, begin: Any, end: Any, logsumexp: Any, dot: Any, grads: Any,
    grads_at: Any, out: Any, to: Any,
) -> Any:  # fmt: skip
    """Replace scores (count,) by probabilities, and the gradients of the probabilities by those of the scores.

    probs = exp(scores - logsumexp); grads = probs * (grads - dot), both 0 outside [begin, end). out: grads in bf16.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        start, grad, target = _starts(context, b, signature, args, 0, 7, 9)
        top, dot = broadcast(b, args[5], LANES), broadcast(b, args[6], LANES)

        def body(at: Any, _: list[Any]) -> list[Any]:
            x = _sub(b, _load(b, start, at, False), top)
            # Rounding alone can make x positive, and exp is for x <= 0.
            x = b.select(_compare(b, ">", x, _constant(0.0)), _constant(0.0), x)
            inside = _inside(b, at, args[3], args[4])
            prob = b.select(inside, _exp(b, x), _constant(0.0))
            slope = b.select(inside, _mul(b, prob, _sub(b, _load(b, grad, at, False), dot)), _constant(0.0))
            _store(b, prob, start, at)
            _store(b, slope, grad, at)
            _store(b, _round(b, slope), target, at)
            return []

        repeat(b, args[2], LANES, [], body)
        return context.get_dummy_value()

    signature = types.void(scores, _long, _long, _long, _long, _float, _float, grads, _long, out, _long)
    return signature, generate


@intrinsic  # type: ignore[untyped-decorator]
def pair_rows(context: Any, even: Any, even_at: Any, odd: Any, odd_at: Any, count: Any, out: Any, to: Any) -> Any:
    """Write the bf16 pairs of two rows (count,), fp32 or bf16 bits, to `out`, uint32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        first, second, target = _starts(context, b, signature, args, 0, 2, 5)

        def load(start: Any, at: Any) -> Any:
            if even.dtype == types.uint16:
                bits = b.load(b.bitcast(b.gep(start, [at]), _HALVES.as_pointer()), align=2)
            else:
                bits = _round(b, _load(b, start, at, False))
            return b.zext(bits, _INTS)

        def body(at: Any, _: list[Any]) -> list[Any]:
            high = b.shl(load(second, at), ir.Constant(_INTS, [16] * LANES))
            _store(b, b.or_(load(first, at), high), target, at)
            return []

        repeat(b, args[4], LANES, [], body)
        return context.get_dummy_value()

    return types.void(even, _long, odd, _long, _long, out, _long), generate


@intrinsic  # type: ignore[untyped-decorator]
def scale_row(context: Any, x: Any, x_at: Any, count: Any, scale: Any, out: Any, to: Any) -> Any:
    """Write scale times x (count,), fp32, to `out` in bf16."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        start, target = _starts(context, b, signature, args, 0, 4)
        scale = broadcast(b, args[3], LANES)

        def body(at: Any, _: list[Any]) -> list[Any]:
            _store(b, _round(b, _mul(b, _load(b, start, at, False), scale)), target, at)
            return []

        repeat(b, args[2], LANES, [], body)
        return context.get_dummy_value()

    return types.void(x, _long, _long, _float, out, _long), generate


@intrinsic  # type: ignore[untyped-decorator]
def dot(context: Any, x: Any, x_at: Any, y: Any, y_at: Any, count: Any) -> Any:
    """Return the dot product of x and y (count,), bf16 bits, in fp32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        first, second = _starts(context, b, signature, args, 0, 2)

        def body(at: Any, carried: list[Any]) -> list[Any]:
            return [fma(b, _load(b, first, at, True), _load(b, second, at, True), carried[0])]

        (total,) = repeat(b, args[4], LANES, [_constant(0.0)], body)
        return _sum(b, total)

    return _float(x, _long, y, _long, _long), generate
