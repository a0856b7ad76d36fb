"""The element-wise operations of eager.py as loops that numba compiles: for CPUs, in fp32 and bf16.

Each reads and writes memory once, where PyTorch takes several passes and a copy in fp32. bf16 is handled as its bits
(uint16). OpenMP comes first among numba's threading layers: there the loops run on PyTorch's own threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic, overload
from torch import Tensor

from strop.engine import eager
from strop.engine.packed import Places

Loop = TypeVar("Loop", bound=Callable[..., Any])

_njit: Any = numba.njit
_config: Any = numba.config


TASKS = 64  # parts of the rows that a loop with a buffer of its own deals out to the threads


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


def _loop(function: Loop) -> Loop:
    compiled: Loop = _njit(parallel=True, fastmath=True, error_model="numpy", cache=True)(function)
    return compiled


def _inline(function: Loop) -> Loop:
    compiled: Loop = _njit(fastmath=True, error_model="numpy", cache=True)(function)
    return compiled


def _overload(function: Callable[..., Any]) -> Callable[[Loop], Loop]:
    typed: Callable[[Loop], Loop] = overload(function, inline="always")
    return typed


def _emit(result: Any, make: Callable[[Any, Any], Any]) -> Any:
    """A function of compiled code, by the LLVM instructions it stands for: numba would widen 32-bit shifts to 64."""

    def typing(context: Any, x: Any) -> Any:
        return result(x), lambda target, builder, signature, args: make(builder, args[0])

    return intrinsic(typing)


F32, I32, I16 = ir.FloatType(), ir.IntType(32), ir.IntType(16)


def _emit_from_bf16(b: Any, x: Any) -> Any:
    return b.bitcast(b.shl(b.zext(x, I32), I32(16)), F32)


def _emit_to_bf16(b: Any, x: Any) -> Any:
    bits = b.bitcast(x, I32)
    odd = b.and_(b.lshr(bits, I32(16)), I32(1))
    return b.trunc(b.lshr(b.add(bits, b.add(odd, I32(0x7FFF))), I32(16)), I16)


_from_bf16 = _emit(types.float32, _emit_from_bf16)
_to_bf16 = _emit(types.uint16, _emit_to_bf16)
_truncate = _emit(types.int32, lambda b, x: b.fptosi(x, I32))
_power = _emit(types.float32, lambda b, n: b.bitcast(b.shl(b.add(n, I32(127)), I32(23)), F32))  # 2 to the n


@intrinsic  # type: ignore[untyped-decorator]
def _max(context: Any, x: Any, y: Any) -> Any:
    """The greater of two fp32: numba's own max is not taken for a reduction, and so not vectorised."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        maxnum = b.module.declare_intrinsic("llvm.maxnum", [F32], ir.FunctionType(F32, [F32, F32]))
        return b.call(maxnum, args, fastmath=("fast",))

    return types.float32(types.float32, types.float32), generate


def wide(x: Any) -> Any:
    """fp32 of an element as it is stored."""


def narrow(x: Any, like: Any) -> Any:
    """fp32 as the array `like` stores it, rounded to nearest even."""


@_overload(wide)
def _wide(x: Any) -> Any:
    def from_bf16(x: Any) -> Any:
        return _from_bf16(x)

    def same(x: Any) -> Any:
        return x

    return from_bf16 if x == types.uint16 else same


@_overload(narrow)
def _narrow(x: Any, like: Any) -> Any:
    def to_bf16(x: Any, like: Any) -> Any:
        return _to_bf16(x)

    def same(x: Any, like: Any) -> Any:
        return x

    return to_bf16 if like.dtype == types.uint16 else same


@_inline
def _exp(x: Any) -> Any:
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


@_inline
def _sigmoid(x: Any) -> Any:
    e = _exp(-abs(x))
    return (np.float32(1.0) if x >= 0 else e) / (np.float32(1.0) + e)


@_loop
def _rms_norm(x: Any, weight: Any, eps: Any, offset: Any, out: Any) -> None:
    rows, n = x.shape
    for i in prange(rows):
        total = np.float32(0.0)
        for j in range(n):
            value = wide(x[i, j])
            total += value * value
        rstd = np.float32(1.0) / np.sqrt(total / np.float32(n) + eps)
        for j in range(n):
            out[i, j] = narrow(wide(x[i, j]) * rstd * (wide(weight[j]) + offset), out)


@_loop
def _rms_norm_backward(grad: Any, x: Any, weight: Any, eps: Any, offset: Any, out: Any) -> None:
    rows, n = x.shape
    for i in prange(rows):
        total, along = np.float32(0.0), np.float32(0.0)
        for j in range(n):
            value = wide(x[i, j])
            total += value * value
            along += wide(grad[i, j]) * (wide(weight[j]) + offset) * value
        rstd = np.float32(1.0) / np.sqrt(total / np.float32(n) + eps)
        shrink = along * rstd * rstd / np.float32(n)
        for j in range(n):
            weighted = wide(grad[i, j]) * (wide(weight[j]) + offset)
            out[i, j] = narrow(rstd * (weighted - wide(x[i, j]) * shrink), out)


TWO_ROOT, CUBIC = np.float32(2 * 0.7978845608028654), np.float32(0.044715)  # 2 sqrt(2 / pi)


@_inline
def _activate(x: Any, gelu: Any) -> Any:
    """Value and slope of silu, or of gelu by tanh: x sigmoid(z), as (1 + tanh(u)) / 2 = sigmoid(2 u)."""
    one = np.float32(1.0)
    z, dz = x, one
    if gelu:
        z = TWO_ROOT * (x + CUBIC * x * x * x)
        dz = TWO_ROOT * (one + np.float32(3.0) * CUBIC * x * x)
    sigmoid = _sigmoid(z)
    value = x * sigmoid
    return value, sigmoid + value * (one - sigmoid) * dz


@_loop
def _glu(gate_up: Any, gelu: Any, out: Any) -> None:
    rows, n = out.shape
    for i in prange(rows):
        for j in range(n):
            value, _ = _activate(wide(gate_up[i, j]), gelu)
            out[i, j] = narrow(value * wide(gate_up[i, n + j]), out)


@_inline
def _glu_backward_row(grad: Any, gate_up: Any, gelu: Any, grad_in: Any, out: Any) -> None:
    n = len(out)
    for j in range(n):
        up, upstream = wide(gate_up[n + j]), wide(grad[j])
        value, slope = _activate(wide(gate_up[j]), gelu)
        out[j] = narrow(value * up, out)
        grad_in[j] = narrow(upstream * up * slope, grad_in)
        grad_in[n + j] = narrow(upstream * value, grad_in)


@_loop
def _glu_backward(grad: Any, gate_up: Any, gelu: Any, grad_in: Any, out: Any) -> None:
    for i in prange(len(out)):
        if gelu:  # a constant in either call, or the loop would not be vectorised: 7 times as slow
            _glu_backward_row(grad[i], gate_up[i], True, grad_in[i], out[i])
        else:
            _glu_backward_row(grad[i], gate_up[i], False, grad_in[i], out[i])


@_inline
def _top(row: Any) -> Any:
    top = np.float32(-3e38)
    for j in range(len(row)):
        top = _max(top, wide(row[j]))
    return top


@_inline
def _exps(row: Any, top: Any, out: Any) -> Any:
    """exp(row - top) into `out`; returns their sum."""
    total = np.float32(0.0)
    for j in range(len(row)):
        e = _exp(wide(row[j]) - top)
        out[j] = e
        total += e
    return total


@_inline
def _scale_into(row: Any, values: Any, scale: Any) -> None:
    for j in range(len(row)):
        row[j] = narrow(values[j] * scale, row)


@_loop
def _softmax(scores: Any, queries: Any, group: Any, first: Any, window: Any) -> None:
    rows, n = scores.shape
    for task in prange(TASKS):
        exps = np.empty(n, dtype=np.float32)
        for i in range(task * rows // TASKS, (task + 1) * rows // TASKS):
            end = first + (i % queries) // group + 1
            begin = max(end - window, 0) if window else 0
            row = scores[i, begin:end]
            total = _exps(row, _top(row), exps)
            _scale_into(row, exps, np.float32(1.0) / total)
            scores[i, :begin] = 0
            scores[i, end:] = 0


@_inline
def _softmax_backward_row(grad: Any, probs: Any) -> None:
    along = np.float32(0.0)
    for j in range(len(grad)):
        along += wide(grad[j]) * wide(probs[j])
    for j in range(len(grad)):
        grad[j] = narrow(wide(probs[j]) * (wide(grad[j]) - along), grad)


@_loop
def _softmax_backward(grad: Any, probs: Any, queries: Any, group: Any, first: Any, window: Any) -> None:
    rows, _ = probs.shape
    for i in prange(rows):
        end = first + (i % queries) // group + 1
        begin = max(end - window, 0) if window else 0
        _softmax_backward_row(grad[i, begin:end], probs[i, begin:end])
        grad[i, :begin] = 0
        grad[i, end:] = 0


@_loop
def _cross_entropy(logits: Any, labels: Any, weights: Any, gradient: Any, losses: Any) -> None:
    rows, n = logits.shape
    for task in prange(TASKS):
        exps = np.empty(n, dtype=np.float32)
        for i in range(task * rows // TASKS, (task + 1) * rows // TASKS):
            top = _top(logits[i])
            total = _exps(logits[i], top, exps)
            at = wide(logits[i, labels[i]])
            losses[i] = weights[i] * (np.log(total) + top - at)
            if gradient:
                scale = weights[i] / total
                _scale_into(logits[i], exps, scale)
                logits[i, labels[i]] = narrow(exps[labels[i]] * scale - weights[i], logits)


@_inline
def _row(place: Any, at: Any, length: Any, head: Any, key_value: Any, group: Any) -> Any:
    """As eager._rows."""
    start = (place - at[place]) * key_value + head // group * length[place] + at[place]
    return start * group + head % group


@_loop
def _to_heads(
    x: Any,
    stride: Any,
    cos: Any,
    sin: Any,
    scale: Any,
    token: Any,
    at: Any,
    length: Any,
    key_value: Any,
    group: Any,
    d: Any,
    out: Any,
) -> None:
    m = cos.shape[1]
    for place in prange(len(token)):
        row = token[place]
        for head in range(key_value * group):
            to = out[_row(place, at, length, head, key_value, group)]
            if row < 0:
                to[:] = 0
                continue
            begin = row * stride + head * d
            source = x[begin : begin + d]
            for j in range(m):
                a, b = wide(source[j]), wide(source[m + j])
                c, s = cos[row, j] * scale, sin[row, j] * scale
                to[j] = narrow(a * c - b * s, out)
                to[m + j] = narrow(b * c + a * s, out)
            for j in range(2 * m, d):
                to[j] = narrow(wide(source[j]) * scale, out)


@_loop
def _from_heads(
    x: Any,
    cos: Any,
    sin: Any,
    scale: Any,
    first: Any,
    where: Any,
    at: Any,
    length: Any,
    key_value: Any,
    group: Any,
    d: Any,
    out: Any,
    stride: Any,
) -> None:
    m = cos.shape[1]
    rows = len(first) - 1
    for task in prange(TASKS):
        total = np.empty(d, dtype=np.float32)
        for row in range(task * rows // TASKS, (task + 1) * rows // TASKS):
            for head in range(key_value * group):
                total[:] = 0
                for n in range(first[row], first[row + 1]):
                    source = x[_row(where[n], at, length, head, key_value, group)]
                    for j in range(d):
                        total[j] += wide(source[j])
                begin = row * stride + head * d
                to = out[begin : begin + d]
                for j in range(m):
                    a, b = total[j], total[m + j]
                    c, s = cos[row, j] * scale, sin[row, j] * scale
                    to[j] = narrow(a * c + b * s, out)
                    to[m + j] = narrow(b * c - a * s, out)
                for j in range(2 * m, d):
                    to[j] = narrow(total[j] * scale, out)


def _array(x: Tensor) -> Any:
    x = x.detach()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _rows(x: Tensor) -> Any:
    return _array(x.reshape(-1, x.shape[-1]).contiguous())


def _flat(x: Tensor) -> Any:
    """x (T, heads, d), rows anywhere, as one line from its first element to its last."""
    assert x.stride()[1:] == (x.shape[2], 1)
    return _array(x.as_strided(((len(x) - 1) * x.stride(0) + x.shape[1] * x.shape[2],), (1,)))


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    _rms_norm(_rows(x), _array(weight), np.float32(eps), np.float32(offset), _rows(out))
    return out


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    _rms_norm_backward(_rows(grad), _rows(x), _array(weight), np.float32(eps), np.float32(offset), _rows(out))
    return out


def glu(gate_up: Tensor, activation: str) -> Tensor:
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _glu(_rows(gate_up), activation != "silu", _array(out))
    return out


def glu_backward(grad: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    grad_in, out = torch.empty_like(gate_up), torch.empty_like(grad)
    _glu_backward(_rows(grad), _rows(gate_up), activation != "silu", _array(grad_in), _array(out))
    return grad_in, out


def softmax_(scores: Tensor, group: int, first: int, window: int) -> Tensor:
    _softmax(_rows(scores), scores.shape[1], group, first, window)
    return scores


def softmax_backward_(grad: Tensor, probs: Tensor, group: int, first: int, window: int) -> Tensor:
    _softmax_backward(_rows(grad), _rows(probs), probs.shape[1], group, first, window)
    return grad


def cross_entropy_(logits: Tensor, labels: Tensor, weights: Tensor, softcap: float, gradient: bool) -> Tensor:
    if softcap:  # Gemma 2's alone
        return eager.cross_entropy_(logits, labels, weights, softcap, gradient)
    losses = torch.empty(len(logits))
    _cross_entropy(_array(logits), _array(labels), _array(weights), gradient, _array(losses))
    return losses.sum()


def _angles(cos: Tensor | None, sin: Tensor | None, tokens: int, scale: float) -> tuple[Any, Any, Any]:
    none = torch.empty(tokens, 0)
    return _array(none if cos is None else cos), _array(none if sin is None else sin), np.float32(scale)


def to_heads(x: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float, places: Places, group: int) -> Tensor:
    tokens, heads, d = x.shape
    out = x.new_empty(len(places.token) * heads, d)
    into = (_array(places.token), _array(places.at), _array(places.length), heads // group, group, d, _array(out))
    _to_heads(_flat(x), x.stride(0), *_angles(cos, sin, tokens, scale), *into)
    return out


def from_heads(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float, places: Places, group: int, out: Tensor
) -> None:
    tokens, heads, d = out.shape
    back = (_array(places.first), _array(places.where), _array(places.at), _array(places.length))
    shape = (heads // group, group, d)
    _from_heads(_array(x), *_angles(cos, sin, tokens, scale), *back, *shape, _flat(out), out.stride(0))
