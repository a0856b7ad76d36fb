"""What the loops of kernels.py are compiled with: numba on PyTorch's threads, bf16 as its bits, an exp that vectorises.

OpenMP comes first among numba's threading layers: there the loops run on PyTorch's own threads. numba's cache of
compiled loops knows the file of a loop, not this one: after a change here, touch kernels.py.
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

Loop = TypeVar("Loop", bound=Callable[..., Any])

# Numbers in front of a buffer that a loop sums up while it fills it. Where the buffer begins within one vector of the
# row that is read, LLVM takes the loop's scalar form, and the order of the sum depends on where memory happens to lie.
GAP = 256
TASKS = 64  # parts of the rows that a loop with a buffer of its own deals out to the threads

_njit: Any = numba.njit
_config: Any = numba.config


def _start_threads() -> None:
    """Starts as many of numba's threads as PyTorch uses, from OpenMP where it is there.

    numba's OpenMP layer changes the settings of the OpenMP library that PyTorch uses as well: the number of threads,
    and the limit on nested parallel regions. The products inside PyTorch's CPU attention would then start threads
    inside threads and a call take 40 times as long, so both are put back.
    """
    threads = torch.get_num_threads()
    _config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    _config.NUMBA_NUM_THREADS = min(threads, _config.NUMBA_NUM_THREADS)
    try:
        openmp = ctypes.CDLL(torch._C.__file__)  # a symbol is looked up in what it links to as well
        levels = openmp.omp_get_max_active_levels()
    except (OSError, AttributeError):  # a PyTorch without OpenMP shares nothing
        openmp, levels = None, 0
    numba.set_num_threads(_config.NUMBA_NUM_THREADS)
    if openmp is not None:
        openmp.omp_set_max_active_levels(levels)
    torch.set_num_threads(threads)


_start_threads()


def array(x: Tensor) -> Any:
    """The same memory as numpy has it; bf16 as its bits."""
    x = x.detach() if x.requires_grad else x
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def loop(function: Loop) -> Loop:
    compiled: Loop = _njit(parallel=True, fastmath=True, error_model="numpy", cache=True)(function)
    return compiled


def inline(function: Loop) -> Loop:
    compiled: Loop = _njit(fastmath=True, error_model="numpy", cache=True)(function)
    return compiled


def inside(function: Loop) -> Loop:
    """As `inline`, of what is too long for LLVM to take in by itself: loops around it are vectorised then."""
    compiled: Loop = _njit(fastmath=True, error_model="numpy", cache=True, forceinline=True)(function)
    return compiled


def together(function: Loop) -> Loop:
    """What calls loops, one after the other, while other threads of Python go on."""
    compiled: Loop = _njit(nogil=True, error_model="numpy", cache=True)(function)
    return compiled


def chosen(function: Callable[..., Any]) -> Callable[[Loop], Loop]:
    """Makes what is decorated the choice, by types, of the code that stands for `function`."""
    typed: Callable[[Loop], Loop] = overload(function, inline="always")
    return typed


def _emit(result: Any, make: Callable[[Any, Any], Any]) -> Any:
    """A function of compiled code, by the LLVM instructions it stands for: numba would widen 32-bit shifts to 64."""

    def typing(context: Any, x: Any) -> Any:
        return result(x), lambda target, builder, signature, args: make(builder, args[0])

    return intrinsic(typing)


class BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


F32, I32, I16 = ir.FloatType(), ir.IntType(32), ir.IntType(16)


HAS_BF16 = "avx512_bf16" in vector_extensions()  # an instruction that rounds to it


def _emit_from_bf16(b: Any, x: Any) -> Any:
    return b.bitcast(b.shl(b.zext(x, I32), I32(16)), F32)


def _emit_to_bf16(b: Any, x: Any) -> Any:
    if HAS_BF16:
        return b.bitcast(b.fptrunc(x, BFloat()), I16)
    bits = b.bitcast(x, I32)
    odd = b.and_(b.lshr(bits, I32(16)), I32(1))
    return b.trunc(b.lshr(b.add(bits, b.add(odd, I32(0x7FFF))), I32(16)), I16)


_from_bf16 = _emit(types.float32, _emit_from_bf16)
_to_bf16 = _emit(types.uint16, _emit_to_bf16)
_truncate = _emit(types.int32, lambda b, x: b.fptosi(x, I32))
_power = _emit(types.float32, lambda b, n: b.bitcast(b.shl(b.add(n, I32(127)), I32(23)), F32))  # 2 to the n


@intrinsic  # type: ignore[untyped-decorator]
def greater(context: Any, x: Any, y: Any) -> Any:
    """The greater of two fp32: numba's own max is not taken for a reduction, and so not vectorised."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        maxnum = b.module.declare_intrinsic("llvm.maxnum", [F32], ir.FunctionType(F32, [F32, F32]))
        return b.call(maxnum, args, fastmath=("fast",))

    return types.float32(types.float32, types.float32), generate


def wide(x: Any) -> Any:
    """fp32 of an element as it is stored."""


def narrow(x: Any, like: Any) -> Any:
    """fp32 as the array `like` stores it, rounded to nearest even."""


@chosen(wide)
def _wide(x: Any) -> Any:
    def from_bf16(x: Any) -> Any:
        return _from_bf16(x)

    def same(x: Any) -> Any:
        return x

    return from_bf16 if x == types.uint16 else same


@chosen(narrow)
def _narrow(x: Any, like: Any) -> Any:
    def to_bf16(x: Any, like: Any) -> Any:
        return _to_bf16(x)

    def same(x: Any, like: Any) -> Any:
        return x

    return to_bf16 if like.dtype == types.uint16 else same


@inline
def exp(x: Any) -> Any:
    """exp of x <= 0 to 1e-7 (the polynomial of Cephes' expf): libm's would not be vectorised."""
    x = max(x, np.float32(-87.0))
    n = _truncate(x * np.float32(1.44269504) - np.float32(0.5))
    whole = np.float32(n)
    r = x - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + np.float32(1.0)) * _power(n)


@inline
def sigmoid(x: Any) -> Any:
    """sigmoid(x) and sigmoid(-x): one less the first is not the second where a CPU's fast division is off by a bit."""
    e = exp(-abs(x))
    near_one = np.float32(1.0) / (np.float32(1.0) + e)
    near_zero = e * near_one
    return near_one if x >= 0 else near_zero, near_zero if x >= 0 else near_one


@inline
def tanh(x: Any) -> Any:
    """tanh to 1e-7, by `exp`."""
    e = exp(np.float32(-2.0) * abs(x))
    size = (np.float32(1.0) - e) / (np.float32(1.0) + e)
    return size if x >= 0 else -size
