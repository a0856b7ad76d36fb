"""Building blocks of the compiled CPU kernels: numba decorators, bf16 conversion, math functions and LLVM helpers.

numba uses OpenMP as its threading layer if available, so that kernels run on PyTorch's threads.

numba caches a compiled kernel until the file that defines it changes, and does not check the files that it imports.
`warmup.compile_once` clears the cache when any file of this package has changed; without it, touch the files that
import this one after a change here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from llvmlite import ir
from llvmlite.binding import Linkage
from numba import types
from numba.core.codegen import CPUCodeLibrary, JITCPUCodegen, get_host_cpu_features
from numba.extending import intrinsic, overload
from torch import Tensor

from strop.machine.probe import vector_extensions

Function = TypeVar("Function", bound=Callable[..., Any])

# Unused elements around a buffer. Without them, the buffer may begin less than one vector after the row that a loop
# reads. LLVM then takes the scalar version of the loop, so the order of a sum would depend on memory addresses.
GAP = 256
TASKS = 64  # parts of the rows in kernels that need a buffer per part

_config: Any = numba.config


def _start_threads() -> None:
    """Start as many numba threads as PyTorch uses, with OpenMP where it is available.

    numba changes the number of threads and the limit on nested parallel regions in the OpenMP library that PyTorch also
    uses. With these settings the matmuls in PyTorch's CPU attention would start nested threads and take 40 times as
    long, so both settings are restored.
    """
    threads = torch.get_num_threads()
    _config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    _config.NUMBA_NUM_THREADS = min(threads, _config.NUMBA_NUM_THREADS)
    try:
        openmp = ctypes.CDLL(torch._C.__file__)  # finds symbols in the linked libraries as well
        levels = openmp.omp_get_max_active_levels()
    except (OSError, AttributeError):  # PyTorch was built without OpenMP
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


_compiles_entry = ContextVar("_compiles_entry", default=False)
_PARTS = ("__numba_parfor_gufunc", "parallelgufuncwrapper", "<numba.np.ufunc.wrappers._GufuncWrapper")


def _decorator(*, is_entry: bool = False, **options: Any) -> Callable[[Function], Function]:
    """Return numba's decorator. is_entry: Python calls the functions, not only other compiled functions."""

    def decorate(function: Function) -> Function:
        dispatcher: Any = numba.njit(error_model="numpy", cache=True, **options)(function)
        compile_function = dispatcher._compiler.compile

        def compile_in_context(*args: Any) -> Any:
            token = _compiles_entry.set(is_entry)
            try:
                return compile_function(*args)
            finally:
                _compiles_entry.reset(token)

        dispatcher._compiler.compile = compile_in_context
        return cast(Function, dispatcher)

    return decorate


def _change_libraries() -> None:
    """Change how numba makes the library of a function that is called from Python.

    Loops are compiled only as parts of their kernel, which takes half of the time. numba makes a library of a loop's
    body, of each of two functions around it, and of the kernel. It optimizes and compiles each of them, and links it
    into the next one, so that a body is compiled four times. Here only the last library is compiled. Nothing calls the
    others.

    A library calls its own copies of the functions that are linked into it. numba lets a process that has compiled such
    a function by itself call that one, which may be optimized in another way; the next process, which finds only the
    library in the cache, would have other bits.
    """
    optimize, finalize = CPUCodeLibrary._optimize_final_module, CPUCodeLibrary._finalize_final_module
    set_env = JITCPUCodegen.set_env

    def is_part(library: Any) -> bool:
        return _compiles_entry.get() and library.name.startswith(_PARTS)

    def optimize_unless_part(library: Any) -> None:
        if is_part(library):
            return
        for function in library._final_module.functions if _compiles_entry.get() else ():
            if function.linkage == Linkage.linkonce_odr:
                function.linkage = Linkage.internal
        optimize(library)

    def finalize_unless_part(library: Any) -> None:
        if is_part(library):
            library._finalize_dynamic_globals()
            library._finalized = True
        else:
            finalize(library)

    def set_env_if_defined(codegen: Any, name: str, env: Any) -> None:  # of exceptions: kernels raise none
        if codegen._engine.is_symbol_defined(name):
            set_env(codegen, name, env)

    CPUCodeLibrary._optimize_final_module = optimize_unless_part
    CPUCodeLibrary._finalize_final_module = finalize_unless_part
    JITCPUCodegen.set_env = set_env_if_defined


_change_libraries()
kernel = _decorator(is_entry=True, parallel=True, fastmath=True)  # its `prange` loops run on all threads
kernel_sequence = _decorator(is_entry=True, nogil=True)  # calls kernels one after another without holding the GIL
subroutine = _decorator(fastmath=True)  # is called by kernels
force_inline = _decorator(fastmath=True, forceinline=True)  # for long subroutines in loops that must be vectorized


def specialization_of(function: Callable[..., Any]) -> Callable[[Function], Function]:
    """Register a function that returns the implementation of `function` for given numba types."""
    decorator: Callable[[Function], Function] = overload(function, inline="always")
    return decorator


class BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's type bfloat, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


F32, I8, I16, I32, I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
ARM_BF16 = "bf16" in vector_extensions()  # FEAT_BF16: Graviton 3, Grace, Apple M2 and later
HAS_BF16 = ARM_BF16 or "avx512_bf16" in vector_extensions()  # instructions that round to bf16 and multiply it
if ARM_BF16 and not _config.CPU_FEATURES:  # LLVM knows the extension only of CPUs whose name it knows
    _config.CPU_FEATURES = f"{get_host_cpu_features()},+bf16"


def _unary(result: Any, emit: Callable[[Any, Any], Any]) -> Any:
    """Return an intrinsic with one argument. (Python code would not do: numba widens 32-bit shifts to 64 bits.)"""

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
    """Return the greater of two fp32 values. LLVM does not vectorize loops with Python's max."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        maxnum = b.module.declare_intrinsic("llvm.maxnum", [F32], ir.FunctionType(F32, [F32, F32]))
        return b.call(maxnum, args, fastmath=("fast",))

    return types.float32(types.float32, types.float32), generate


def to_fp32(x: Any) -> Any:
    """Convert an array element, fp32 or bf16 bits (uint16), to fp32."""


def from_fp32(x: Any, like: Any) -> Any:
    """Convert an fp32 value to the dtype of the array `like`, fp32 or bf16 bits rounded to nearest even."""


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
    """Return exp(x) for x <= 0 with an error of 1e-7 (Cephes' expf). LLVM does not vectorize calls of libm."""
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

    On CPUs with an inexact fast division, 1 - sigmoid(x) would differ from sigmoid(-x).
    """
    e = exp(-abs(x))
    near_one = np.float32(1.0) / (np.float32(1.0) + e)
    near_zero = e * near_one
    return near_one if x >= 0 else near_zero, near_zero if x >= 0 else near_one


@subroutine
def tanh(x: Any) -> Any:
    """Return tanh(x) with an error of 1e-7."""
    e = exp(np.float32(-2.0) * abs(x))
    magnitude = (np.float32(1.0) - e) / (np.float32(1.0) + e)
    return magnitude if x >= 0 else -magnitude


# Helpers for intrinsics that emit LLVM instructions. `b` is llvmlite's IRBuilder.


def pointer(context: Any, b: Any, kind: Any, array: Any, index: Any) -> Any:
    """Return a pointer to an element of a one-dimensional numba array of type `kind`."""
    return b.gep(context.make_array(kind)(context, b, array).data, [index])


def call_llvm(b: Any, name: str, result: Any, *args: Any) -> Any:
    """Emit a call of an LLVM intrinsic, given its full name."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), args)


def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """Return x * y + z of fp32 vectors, rounded once."""
    return call_llvm(b, f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)


def pair_dots(b: Any, sums: Any, x: Any, y: Any) -> Any:
    """Return sums[i] + x[2i] y[2i] + x[2i + 1] y[2i + 1] of bf16 vectors x and y and an fp32 vector."""
    if not ARM_BF16:
        return call_llvm(b, "llvm.x86.avx512bf16.dpbf16ps.512", sums.type, sums, x, y)
    lanes, register = sums.type.count, ir.VectorType(F32, 4)

    def part(vector: Any, begin: int, size: int) -> Any:
        return b.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, size), list(range(begin, begin + size))))

    parts = []
    for i in range(0, lanes, 4):
        operands = part(sums, i, 4), part(x, 2 * i, 8), part(y, 2 * i, 8)
        parts.append(call_llvm(b, "llvm.aarch64.neon.bfdot.v4f32.v8bf16", register, *operands))
    while len(parts) > 1:
        indices = list(range(2 * parts[0].type.count))
        kind = ir.Constant(ir.VectorType(I32, len(indices)), indices)
        parts = [b.shuffle_vector(u, v, kind) for u, v in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def add_ordered(b: Any, x: Any, y: Any) -> Any:
    """Return x + y. The flag replaces numba's fastmath flags, which let LLVM reorder sums."""
    return b.fadd(x, y, flags=("contract",))


def broadcast(b: Any, x: Any, count: int) -> Any:
    """Return a vector of `count` copies of x."""
    kind = ir.VectorType(x.type, count)
    first = b.insert_element(ir.Constant(kind, ir.Undefined), x, I32(0))
    return b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(I32, count), [0] * count))


def load(b: Any, start: Any, index: Any, kind: Any) -> Any:
    """Emit the load of a vector of type `kind` from element `index` on."""
    return b.load(b.bitcast(b.gep(start, [index]), kind.as_pointer()), align=_alignment(kind))


def store(b: Any, x: Any, start: Any, index: Any) -> None:
    """Emit the store of a vector to element `index` and the following ones."""
    b.store(x, b.bitcast(b.gep(start, [index]), x.type.as_pointer()), align=_alignment(x.type))


def _alignment(kind: Any) -> int:
    return {I8: 1, I16: 2, BFloat(): 2}.get(kind.element, 4)


def bf16_to_fp32(b: Any, x: Any) -> Any:
    """Convert a vector of bf16 bits (i16) to fp32."""
    bits = ir.VectorType(I32, x.type.count)
    shifted = b.shl(b.zext(x, bits), ir.Constant(bits, [16] * bits.count))
    return b.bitcast(shifted, ir.VectorType(F32, bits.count))


def prefetch(b: Any, address: Any) -> None:
    """Emit the prefetch of a cache line into the L2 cache."""
    address = b.bitcast(address, I8.as_pointer())
    call_llvm(b, "llvm.prefetch.p0i8", ir.VoidType(), address, I32(0), I32(2), I32(1))


def repeat(
    b: Any, count: Any, step: int, carried: list[Any], body: Callable[[Any, list[Any]], list[Any] | None], *,
    may_be_empty: bool = False,
) -> list[Any]:  # fmt: skip
    """Emit a loop over the indices 0, step, 2 step, ... < count, and return the last carried values.

    Args:
        count: end of the loop, a multiple of `step`; greater than 0 unless `may_be_empty`.
        carried: initial values of the variables that are carried from one iteration to the next.
        body: called once with the index and the carried values; emits the loop body and returns the new values, if any.
        may_be_empty: also emit a check that skips the loop if count <= 0.
    """
    before, loop, done = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
    if may_be_empty:
        b.cbranch(b.icmp_signed(">", count, I64(0)), loop, done)
    else:
        b.branch(loop)
    b.position_at_end(loop)
    index, values = b.phi(I64), [b.phi(value.type) for value in carried]
    results = body(index, values) or []
    next_index, end = b.add(index, I64(step)), b.block
    for phi, first, following in zip([index, *values], [I64(0), *carried], [next_index, *results], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(following, end)
    b.cbranch(b.icmp_signed("<", next_index, count), loop, done)
    b.position_at_end(done)
    return _merge(b, (carried, before), (results, end)) if may_be_empty else results


def update_if(b: Any, condition: Any, values: list[Any], compute: Callable[[], list[Any]]) -> list[Any]:
    """Emit a branch, and return the values of compute() if the condition holds, else `values`."""
    before, then, done = b.block, b.append_basic_block("then"), b.append_basic_block("done")
    b.cbranch(condition, then, done)
    b.position_at_end(then)
    computed = compute()
    end = b.block
    b.branch(done)
    b.position_at_end(done)
    return _merge(b, (values, before), (computed, end))


def _merge(b: Any, *origins: tuple[list[Any], Any]) -> list[Any]:
    """Emit phi nodes at the start of a block, given the values in each preceding block."""
    phis = [b.phi(value.type) for value in origins[0][0]]
    for values, block in origins:
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(value, block)
    return phis


SIDE = 16
_ROW = ir.VectorType(I32, SIDE)


@intrinsic  # type: ignore[untyped-decorator]
def transpose(context: Any, a: Any, a_at: Any, lda: Any, c: Any, c_at: Any, ldc: Any) -> Any:
    """Transpose a block of SIDE by SIDE 32-bit elements: c[c_at + j * ldc + i] = a[a_at + i * lda + j].

    a, c: one-dimensional arrays. lda, ldc: distance between rows.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> None:
        source, target = (pointer(context, b, signature.args[i], args[i], args[i + 1]) for i in (0, 3))

        rows, distance = [load(b, source, b.mul(args[2], I64(i)), _ROW) for i in range(SIDE)], 1
        while distance < SIDE:  # exchange blocks of distance by distance elements across the diagonal
            low = [SIDE + j - distance if j & distance else j for j in range(SIDE)]
            high = [SIDE + j if j & distance else j + distance for j in range(SIDE)]
            for i in (i for i in range(SIDE) if not i & distance):
                pair = rows[i], rows[i + distance]
                rows[i] = b.shuffle_vector(*pair, ir.Constant(_ROW, low))
                rows[i + distance] = b.shuffle_vector(*pair, ir.Constant(_ROW, high))
            distance *= 2
        for j, row in enumerate(rows):
            store(b, row, target, b.mul(args[5], I64(j)))

    return types.void(a, types.int64, types.int64, c, types.int64, types.int64), generate
