"""Numba intrinsics for the rows of attention, in registers of 16 fp32 elements, for CPUs with AVX512-BF16.

LLVM would vectorize these loops for 64 or more elements at a time and compute the rest one by one, but heads are short:
the two halves of a head of 64 elements have 32 each. Arrays are one-dimensional, x_at is the index of the first element
of x, and counts are multiples of LANES.
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
    load,
    pointer,
    repeat,
    store,
)

LANES = 16
_FP32_VECTOR, _INT32_VECTOR = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
_INT16_VECTOR, _BF16_VECTOR = ir.VectorType(I16, LANES), ir.VectorType(BFloat(), LANES)
_LOWEST = -3e38
_long, _float = types.int64, types.float32

# Without explicit flags, numba adds all fastmath flags, with which LLVM assumes that there are no NaNs.
_FLAGS = ("contract",)


def _constant(x: float) -> Any:
    return ir.Constant(_FP32_VECTOR, [x] * LANES)


def _compare(b: Any, operator: str, x: Any, y: Any) -> Any:
    return b.fcmp_ordered(operator, x, y, flags=_FLAGS)


def _mul(b: Any, x: Any, y: Any) -> Any:
    return b.fmul(x, y, flags=_FLAGS)


def _sub(b: Any, x: Any, y: Any) -> Any:
    return b.fsub(x, y, flags=_FLAGS)


def _load(b: Any, start: Any, index: Any, bf16: bool = False) -> Any:
    """Emit the load of LANES elements as fp32."""
    return bf16_to_fp32(b, load(b, start, index, _INT16_VECTOR)) if bf16 else load(b, start, index, _FP32_VECTOR)


def _round(b: Any, x: Any) -> Any:
    return b.bitcast(b.fptrunc(x, _BF16_VECTOR), _INT16_VECTOR)


def _exp(b: Any, x: Any) -> Any:
    """Emit the same computation as compiled.exp, for x <= 0, but return NaN for NaN."""
    x = b.select(_compare(b, "<", x, _constant(-87.0)), _constant(-87.0), x)
    n = b.fptosi(fma(b, x, _constant(1.44269504), _constant(-0.5)), _INT32_VECTOR)
    whole = b.sitofp(n, _FP32_VECTOR)
    r = fma(b, whole, _constant(2.12194440e-4), fma(b, whole, _constant(-0.693359375), x))
    p = _constant(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        p = fma(b, p, r, _constant(factor))
    bias, bits = ir.Constant(_INT32_VECTOR, [127] * LANES), ir.Constant(_INT32_VECTOR, [23] * LANES)
    return _mul(b, p, b.bitcast(b.shl(b.add(n, bias), bits), _FP32_VECTOR))


def _sum(b: Any, x: Any) -> Any:
    kind = ir.FunctionType(F32, [F32, _FP32_VECTOR])
    name = "llvm.vector.reduce.fadd.v16f32"
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    return b.call(function, [F32(0.0), x], fastmath=("reassoc",))


def _in_range(b: Any, index: Any, begin: Any, end: Any) -> Any:
    """Emit the mask of the LANES indices from `index` that are in [begin, end)."""
    indices = b.add(broadcast(b, b.trunc(index, I32), LANES), ir.Constant(_INT32_VECTOR, list(range(LANES))))
    first, last = (broadcast(b, b.trunc(x, I32), LANES) for x in (begin, end))
    return b.and_(b.icmp_signed(">=", indices, first), b.icmp_signed("<", indices, last))


def _starts(context: Any, b: Any, signature: Any, args: Any, *numbers: int) -> list[Any]:
    """Return pointers into the array arguments with these numbers, each followed by the index of its first element."""
    return [pointer(context, b, signature.args[i], args[i], args[i + 1]) for i in numbers]


@intrinsic  # type: ignore[untyped-decorator]
def rotate(
    context: Any, x: Any, x_at: Any, half: Any, cos: Any, cos_at: Any, sin: Any, sin_at: Any, scale: Any, sign: Any,
    out: Any, out_at: Any,
) -> Any:  # fmt: skip
    """Rotate the pairs (x[i], x[half + i]) of a head by cos and sign * sin, and write scale * the result in bf16.

    x: bf16 bits or fp32. cos, sin: (half,), fp32.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> None:
        x_start, cos_start, sin_start, target = _starts(context, b, signature, args, 0, 3, 5, 9)
        half, scale = args[2], broadcast(b, args[7], LANES)
        signed = _mul(b, scale, broadcast(b, args[8], LANES))

        def body(index: Any, _: list[Any]) -> None:
            second, bf16 = b.add(index, half), x.dtype == types.uint16
            u, v = _load(b, x_start, index, bf16), _load(b, x_start, second, bf16)
            c, s = _mul(b, _load(b, cos_start, index), scale), _mul(b, _load(b, sin_start, index), signed)
            store(b, _round(b, _sub(b, _mul(b, u, c), _mul(b, v, s))), target, index)
            store(b, _round(b, fma(b, v, c, _mul(b, u, s))), target, second)

        repeat(b, half, LANES, [], body)

    return types.void(x, _long, _long, cos, _long, sin, _long, _float, _float, out, _long), generate


@intrinsic  # type: ignore[untyped-decorator]
def max_within(context: Any, scores: Any, scores_at: Any, count: Any, begin: Any, end: Any) -> Any:
    """Return the maximum of scores[begin:end]; scores (count,), fp32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        (start,) = _starts(context, b, signature, args, 0)

        def body(index: Any, carried: list[Any]) -> list[Any]:
            (top,) = carried
            masked = b.select(_in_range(b, index, args[3], args[4]), _load(b, start, index), _constant(_LOWEST))
            return [b.select(_compare(b, ">", masked, top), masked, top)]

        (top,) = repeat(b, args[2], LANES, [_constant(_LOWEST)], body)
        return call_llvm(b, "llvm.vector.reduce.fmax.v16f32", F32, top)

    return _float(scores, _long, _long, _long, _long), generate


@intrinsic  # type: ignore[untyped-decorator]
def exp_within(
    context: Any, scores: Any, scores_at: Any, count: Any, begin: Any, end: Any, top: Any, probs: Any, probs_at: Any
) -> Any:  # fmt: skip
    """Write exp(scores - top) in [begin, end) and 0 elsewhere to probs (count,), in bf16, and return the sum."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        start, target = _starts(context, b, signature, args, 0, 6)
        top = broadcast(b, args[5], LANES)

        def body(index: Any, carried: list[Any]) -> list[Any]:
            x = _exp(b, _sub(b, _load(b, start, index), top))
            x = b.select(_in_range(b, index, args[3], args[4]), x, _constant(0.0))
            store(b, _round(b, x), target, index)
            return [add_ordered(b, carried[0], x)]

        (total,) = repeat(b, args[2], LANES, [_constant(0.0)], body)
        return _sum(b, total)

    return _float(scores, _long, _long, _long, _long, _float, probs, _long), generate


@intrinsic  # type: ignore[untyped-decorator]
def softmax_gradient(
    context: Any, scores: Any, scores_at: Any, count: Any, begin: Any, end: Any, logsumexp: Any, dot: Any, grads: Any,
    grads_at: Any, out: Any, out_at: Any,
) -> Any:  # fmt: skip
    """Replace scores by probs = exp(scores - logsumexp), and grads by probs * (grads - dot).

    Both are (count,), fp32, and 0 outside [begin, end). The new grads are also written to `out` in bf16.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> None:
        start, grad, target = _starts(context, b, signature, args, 0, 7, 9)
        top, dot = broadcast(b, args[5], LANES), broadcast(b, args[6], LANES)

        def body(index: Any, _: list[Any]) -> None:
            x = _sub(b, _load(b, start, index), top)
            # Rounding can make x positive, but _exp requires x <= 0.
            x = b.select(_compare(b, ">", x, _constant(0.0)), _constant(0.0), x)
            in_range = _in_range(b, index, args[3], args[4])
            prob = b.select(in_range, _exp(b, x), _constant(0.0))
            slope = b.select(in_range, _mul(b, prob, _sub(b, _load(b, grad, index), dot)), _constant(0.0))
            store(b, prob, start, index)
            store(b, slope, grad, index)
            store(b, _round(b, slope), target, index)

        repeat(b, args[2], LANES, [], body)

    return types.void(scores, *[_long] * 4, _float, _float, grads, _long, out, _long), generate


@intrinsic  # type: ignore[untyped-decorator]
def pair_rows(context: Any, even: Any, even_at: Any, odd: Any, odd_at: Any, count: Any, out: Any, out_at: Any) -> Any:
    """Round two rows (count,), fp32 or bf16 bits, to bf16, and write their pairs to `out`, uint32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> None:
        first, second, target = _starts(context, b, signature, args, 0, 2, 5)

        def load_bits(start: Any, index: Any) -> Any:
            is_bf16 = even.dtype == types.uint16
            bits = load(b, start, index, _INT16_VECTOR) if is_bf16 else _round(b, _load(b, start, index))
            return b.zext(bits, _INT32_VECTOR)

        def body(index: Any, _: list[Any]) -> None:
            high = b.shl(load_bits(second, index), ir.Constant(_INT32_VECTOR, [16] * LANES))
            store(b, b.or_(load_bits(first, index), high), target, index)

        repeat(b, args[4], LANES, [], body)

    return types.void(even, _long, odd, _long, _long, out, _long), generate


@intrinsic  # type: ignore[untyped-decorator]
def scale_row(context: Any, x: Any, x_at: Any, count: Any, scale: Any, out: Any, out_at: Any) -> Any:
    """Write scale * x (count,), fp32, to `out` in bf16."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> None:
        start, target = _starts(context, b, signature, args, 0, 4)
        scale = broadcast(b, args[3], LANES)

        def body(index: Any, _: list[Any]) -> None:
            store(b, _round(b, _mul(b, _load(b, start, index), scale)), target, index)

        repeat(b, args[2], LANES, [], body)

    return types.void(x, _long, _long, _float, out, _long), generate


@intrinsic  # type: ignore[untyped-decorator]
def dot(context: Any, x: Any, x_at: Any, y: Any, y_at: Any, count: Any) -> Any:
    """Return the dot product of x and y (count,), bf16 bits, in fp32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        first, second = _starts(context, b, signature, args, 0, 2)

        def body(index: Any, carried: list[Any]) -> list[Any]:
            return [fma(b, _load(b, first, index, True), _load(b, second, index, True), carried[0])]

        (total,) = repeat(b, args[4], LANES, [_constant(0.0)], body)
        return _sum(b, total)

    return _float(x, _long, y, _long, _long), generate
