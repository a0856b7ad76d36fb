"""Building blocks of the compiled CPU kernels: numba decorators, bf16 conversion, vectorizable math, LLVM helpers.

numba uses OpenMP as its threading layer where it is available, so that kernels run on PyTorch's threads. numba's cache
of compiled kernels checks the modification time of the file a kernel is defined in, not of this one: after a change
here, touch the files that use it. `warmup.compile_once` clears the cache when any file of this package has changed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

from strop.machine.probe import vector_extensions

Function = TypeVar("Function", bound=Callable[..., Any])

# Unused elements before a buffer that a kernel fills and sums in one loop. If the buffer begins within one vector of
# the row being read, LLVM takes the loop's scalar version, and the order of the sum depends on memory addresses.
GAP = 256
TASKS = 64  # parts into which kernels with a buffer per task split the rows

_config: Any = numba.config


def _start_threads() -> None:
    """Start as many numba threads as PyTorch uses, with OpenMP where it is available.

    numba's OpenMP layer changes settings of the OpenMP library that PyTorch also uses: the number of threads and the
    limit on nested parallel regions. The matmuls inside PyTorch's CPU attention would then start threads inside
    threads, and a call would take 40 times as long, so both settings are restored.
    """
    threads = torch.get_num_threads()
    _config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    _config.NUMBA_NUM_THREADS = min(threads, _config.NUMBA_NUM_THREADS)
    try:
        openmp = ctypes.CDLL(torch._C.__file__)  # symbols are looked up in the linked libraries as well
        levels = openmp.omp_get_max_active_levels()
    except (OSError, AttributeError):  # this PyTorch has no OpenMP, so nothing is shared
        openmp, levels = None, 0
    numba.set_num_threads(_config.NUMBA_NUM_THREADS)
    if openmp is not None:
        openmp.omp_set_max_active_levels(levels)
    torch.set_num_threads(threads)


_start_threads()


def array(x: Tensor) -> Any:
    """Return a NumPy view of a CPU tensor; bf16 is viewed as uint16 with the same bits."""
    x = x.detach() if x.requires_grad else x
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _decorator(**options: Any) -> Callable[[Function], Function]:
    decorator: Callable[[Function], Function] = numba.njit(error_model="numpy", cache=True, **options)
    return decorator


kernel = _decorator(parallel=True, fastmath=True)  # its `prange` loops run on all threads
subroutine = _decorator(fastmath=True)  # kernels call it
force_inline = _decorator(fastmath=True, forceinline=True)  # a long subroutine in a loop that must be vectorized
sequence = _decorator(nogil=True)  # calls kernels one after another, with the GIL released


def specialization_of(function: Callable[..., Any]) -> Callable[[Function], Function]:
    """Register a function that returns the implementation of `function` for given numba types."""
    decorator: Callable[[Function], Function] = overload(function, inline="always")
    return decorator


class BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's type bfloat, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


F32, I8, I16, I32, I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
HAS_BF16 = "avx512_bf16" in vector_extensions()  # the CPU rounds to bf16 and multiplies it in one instruction


def _unary(result: Any, emit: Callable[[Any, Any], Any]) -> Any:
    """Return a function of one argument given by its LLVM instructions: numba would widen 32-bit shifts to 64."""

    def typing(context: Any, x: Any) -> Any:
        return result(x), lambda target, builder, signature, args: emit(builder, args[0])

    return intrinsic(typing)


def _emit_from_bf16(b: Any, x: Any) -> Any:
    return b.bitcast(b.shl(b.zext(x, I32), I32(16)), F32)


def _emit_to_bf16(b: Any, x: Any) -> Any:
    if HAS_BF16:
        return b.bitcast(b.fptrunc(x, BFloat()), I16)
    bits = b.bitcast(x, I32)
    odd = b.and_(b.lshr(bits, I32(16)), I32(1))
    return b.trunc(b.lshr(b.add(bits, b.add(odd, I32(0x7FFF))), I32(16)), I16)


_from_bf16 = _unary(types.float32, _emit_from_bf16)
_to_bf16 = _unary(types.uint16, _emit_to_bf16)
_truncate = _unary(types.int32, lambda b, x: b.fptosi(x, I32))
_power_of_2 = _unary(types.float32, lambda b, n: b.bitcast(b.shl(b.add(n, I32(127)), I32(23)), F32))


@intrinsic  # type: ignore[untyped-decorator]
def maximum(context: Any, x: Any, y: Any) -> Any:
    """Return the greater of two fp32 values; loops with numba's own max are not vectorized."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        maxnum = b.module.declare_intrinsic("llvm.maxnum", [F32], ir.FunctionType(F32, [F32, F32]))
        return b.call(maxnum, args, fastmath=("fast",))

    return types.float32(types.float32, types.float32), generate


def to_fp32(x: Any) -> Any:
    """Return an array element as fp32: bf16 bits (uint16) are converted, fp32 is returned unchanged."""


def from_fp32(x: Any, like: Any) -> Any:
    """Return an fp32 value as the array `like` stores it: bf16 bits rounded to nearest even, or fp32."""


@specialization_of(to_fp32)
def _to_fp32(x: Any) -> Any:
    def from_bf16(x: Any) -> Any:
        return _from_bf16(x)

    def unchanged(x: Any) -> Any:
        return x

    return from_bf16 if x == types.uint16 else unchanged


@specialization_of(from_fp32)
def _from_fp32(x: Any, like: Any) -> Any:
    def to_bf16(x: Any, like: Any) -> Any:
        return _to_bf16(x)

    def unchanged(x: Any, like: Any) -> Any:
        return x

    return to_bf16 if like.dtype == types.uint16 else unchanged


@subroutine
def exp(x: Any) -> Any:
    """Return exp(x) for x <= 0, to 1e-7 (the polynomial of Cephes' expf); libm's is not vectorized."""
    x = max(x, np.float32(-87.0))
    n = _truncate(x * np.float32(1.44269504) - np.float32(0.5))
    whole = np.float32(n)
    r = x - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + np.float32(1.0)) * _power_of_2(n)


@subroutine
def sigmoid(x: Any) -> Any:
    """Return sigmoid(x) and sigmoid(-x).

    1 - sigmoid(x) differs from sigmoid(-x) on CPUs whose fast division is off by a bit.
    """
    e = exp(-abs(x))
    near_one = np.float32(1.0) / (np.float32(1.0) + e)
    near_zero = e * near_one
    return near_one if x >= 0 else near_zero, near_zero if x >= 0 else near_one


@subroutine
def tanh(x: Any) -> Any:
    """Return tanh(x), to 1e-7."""
    e = exp(np.float32(-2.0) * abs(x))
    size = (np.float32(1.0) - e) / (np.float32(1.0) + e)
    return size if x >= 0 else -size


# LLVM helpers for intrinsics. `b` is llvmlite's instruction builder.


def pointer(context: Any, b: Any, kind: Any, array: Any, at: Any) -> Any:
    """Return a pointer to element `at` of a one-dimensional numba array of type `kind`."""
    return b.gep(context.make_array(kind)(context, b, array).data, [at])


def call_llvm(b: Any, name: str, result: Any, *args: Any) -> Any:
    """Call an LLVM intrinsic by its full name."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), args)


def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """Return x * y + z of fp32 vectors, rounded once."""
    return call_llvm(b, f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)


def add_ordered(b: Any, x: Any, y: Any) -> Any:
    """Return x + y. Without an explicit flag, numba would allow LLVM to reorder the sum."""
    return b.fadd(x, y, flags=("contract",))


def broadcast(b: Any, x: Any, count: int) -> Any:
    """Return a vector of `count` copies of x."""
    kind = ir.VectorType(x.type, count)
    first = b.insert_element(ir.Constant(kind, ir.Undefined), x, I32(0))
    return b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(I32, count), [0] * count))


def bf16_to_fp32(b: Any, x: Any) -> Any:
    """Return a vector of bf16 bits (i16) as fp32."""
    bits = ir.VectorType(I32, x.type.count)
    shifted = b.shl(b.zext(x, bits), ir.Constant(bits, [16] * bits.count))
    return b.bitcast(shifted, ir.VectorType(F32, bits.count))


def prefetch(b: Any, place: Any) -> None:
    """Request a cache line for reading, into the second-level cache."""
    place = b.bitcast(place, I8.as_pointer())
    call_llvm(b, "llvm.prefetch.p0i8", ir.VoidType(), place, I32(0), I32(2), I32(1))


def repeat(
    b: Any, count: Any, step: int, carried: list[Any], body: Callable[[Any, list[Any]], list[Any]], *,
    may_be_empty: bool = False,
) -> list[Any]:  # fmt: skip
    """Emit a loop and return the values that its last iteration gave.

    Args:
        count: end of the loop, a multiple of `step`; greater than 0 unless `may_be_empty`.
        carried: initial values that are carried from one iteration to the next.
        body: called once with the index (0, step, 2 step, ...) and the carried values; returns their new values.
        may_be_empty: emit a check for count <= 0, where the initial values are returned.
    """
    before, loop, done = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
    if may_be_empty:
        b.cbranch(b.icmp_signed(">", count, I64(0)), loop, done)
    else:
        b.branch(loop)
    b.position_at_end(loop)
    at, values = b.phi(I64), [b.phi(value.type) for value in carried]
    results = list(body(at, values))
    after, end = b.add(at, I64(step)), b.block
    for phi, first, later in zip([at, *values], [I64(0), *carried], [after, *results], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, end)
    b.cbranch(b.icmp_signed("<", after, count), loop, done)
    b.position_at_end(done)
    return _merge(b, (carried, before), (results, end)) if may_be_empty else results


def update_if(b: Any, condition: Any, values: list[Any], compute: Callable[[], list[Any]]) -> list[Any]:
    """Emit code that returns compute() where the condition holds, else `values`."""
    before, then, done = b.block, b.append_basic_block("then"), b.append_basic_block("done")
    b.cbranch(condition, then, done)
    b.position_at_end(then)
    computed = compute()
    end = b.block
    b.branch(done)
    b.position_at_end(done)
    return _merge(b, (values, before), (computed, end))


def _merge(b: Any, *origins: tuple[list[Any], Any]) -> list[Any]:
    """Return, at the beginning of a block, the values of the block that control came from."""
    phis = [b.phi(value.type) for value in origins[0][0]]
    for values, block in origins:
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(value, block)
    return phis


SIDE = 16
_ROW = ir.VectorType(I32, SIDE)


@intrinsic  # type: ignore[untyped-decorator]
def transpose(context: Any, a: Any, a_at: Any, lda: Any, c: Any, c_at: Any, ldc: Any) -> Any:
    """Transpose a block of SIDE by SIDE 32-bit elements in registers: c[j * ldc + i] = a[i * lda + j].

    a, c: one-dimensional arrays; a_at, c_at: where the block begins; lda, ldc: distance between rows.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, target = (pointer(context, b, signature.args[i], args[i], args[i + 1]) for i in (0, 3))

        def place(start: Any, row: int, step: Any) -> Any:
            return b.bitcast(b.gep(start, [b.mul(step, I64(row))]), _ROW.as_pointer())

        rows, distance = [b.load(place(source, i, args[2]), align=4) for i in range(SIDE)], 1
        while distance < SIDE:  # exchange blocks of distance by distance elements across the diagonal
            low = [SIDE + j - distance if j & distance else j for j in range(SIDE)]
            high = [SIDE + j if j & distance else j + distance for j in range(SIDE)]
            for i in (i for i in range(SIDE) if not i & distance):
                pair = rows[i], rows[i + distance]
                rows[i], rows[i + distance] = (
                    b.shuffle_vector(*pair, ir.Constant(_ROW, places)) for places in (low, high)
                )
            distance *= 2
        for j, row in enumerate(rows):
            b.store(row, place(target, j, args[5]), align=4)
        return context.get_dummy_value()

    return types.void(a, types.int64, types.int64, c, types.int64, types.int64), generate
