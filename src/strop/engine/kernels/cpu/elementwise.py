"""The element-wise operations of eager.py as loops that numba compiles: for CPUs, in fp32 and bf16.

Each reads and writes memory once, where PyTorch takes several passes and a copy in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numba import prange
from torch import Tensor

from strop.engine.kernels.cpu.compiled import GAP, TASKS, array, inline, loop, narrow, sigmoid, wide
from strop.engine.kernels.cpu.loss import cross_entropy_ as cross_entropy_
from strop.engine.kernels.cpu.loss import exps, scale_into, top
from strop.engine.train.packing import Places


@loop
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


@loop
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


@inline
def activate(x: Any, gelu: Any) -> Any:
    """Value and slope of silu, or of gelu by tanh: x sigmoid(z), as (1 + tanh(u)) / 2 = sigmoid(2 u)."""
    one = np.float32(1.0)
    z, dz = x, one
    if gelu:
        z = TWO_ROOT * (x + CUBIC * x * x * x)
        dz = TWO_ROOT * (one + np.float32(3.0) * CUBIC * x * x)
    share, rest = sigmoid(z)
    value = x * share
    return value, share + value * rest * dz


@loop
def _glu(gate_up: Any, gelu: Any, out: Any) -> None:
    rows, n = out.shape
    for i in prange(rows):
        for j in range(n):
            value, _ = activate(wide(gate_up[i, j]), gelu)
            out[i, j] = narrow(value * wide(gate_up[i, n + j]), out)


@inline
def _glu_backward_row(grad: Any, gate_up: Any, gelu: Any, grad_in: Any, out: Any) -> None:
    n = len(out)
    for j in range(n):
        up, upstream = wide(gate_up[n + j]), wide(grad[j])
        value, slope = activate(wide(gate_up[j]), gelu)
        out[j] = narrow(value * up, out)
        grad_in[j] = narrow(upstream * up * slope, grad_in)
        grad_in[n + j] = narrow(upstream * value, grad_in)


@loop
def _glu_backward(grad: Any, gate_up: Any, gelu: Any, grad_in: Any, out: Any) -> None:
    for i in prange(len(out)):
        if gelu:  # a constant in either call, or the loop would not be vectorised: 7 times as slow
            _glu_backward_row(grad[i], gate_up[i], True, grad_in[i], out[i])
        else:
            _glu_backward_row(grad[i], gate_up[i], False, grad_in[i], out[i])


@loop
def _scale_columns(x: Any, gains: Any) -> None:
    for i in prange(len(x)):
        row = x[i]
        for j in range(len(row)):
            row[j] = narrow(wide(row[j]) * gains[j], x)


@inline
def _scale_columns_row(grad: Any, y: Any, gains: Any, out: Any, sums: Any) -> None:
    for j in range(len(grad)):
        upstream = wide(grad[j])
        sums[j] += upstream * wide(y[j])
        out[j] = narrow(upstream * gains[j], out)


@loop
def _scale_columns_backward(grad: Any, y: Any, gains: Any, out: Any, sums: Any) -> None:
    rows, n = grad.shape
    for task in prange(TASKS):
        total = np.zeros(GAP + n, dtype=np.float32)[GAP:]
        for i in range(task * rows // TASKS, (task + 1) * rows // TASKS):
            _scale_columns_row(grad[i], y[i], gains, out[i], total)
        sums[task, :] = total


@inline
def _seen(i: Any, queries: Any, group: Any, first: Any, window: Any) -> Any:
    """(first key, one behind the last) that the query of row i of the scores sees."""
    end = first + (i % queries) // group + 1
    return (max(end - window, 0) if window else 0), end


@loop
def _softmax(scores: Any, queries: Any, group: Any, first: Any, window: Any, sinks: Any) -> None:
    rows, n = scores.shape
    for task in prange(TASKS):
        held = np.empty(GAP + n, dtype=np.float32)[GAP:]
        for i in range(task * rows // TASKS, (task + 1) * rows // TASKS):
            begin, end = _seen(i, queries, group, first, window)
            row = scores[i, begin:end]
            highest = top(row)
            total = exps(row, highest, held)
            if len(sinks):
                head = i // queries % (len(sinks) // group) * group + i % group
                total += np.exp(sinks[head] - highest)
            scale_into(row, held, np.float32(1.0) / total)
            scores[i, :begin] = 0
            scores[i, end:] = 0


@inline
def _softmax_backward_row(grad: Any, probs: Any) -> None:
    along = np.float32(0.0)
    for j in range(len(grad)):
        along += wide(grad[j]) * wide(probs[j])
    for j in range(len(grad)):
        grad[j] = narrow(wide(probs[j]) * (wide(grad[j]) - along), grad)


@loop
def _softmax_backward(grad: Any, probs: Any, queries: Any, group: Any, first: Any, window: Any) -> None:
    rows, _ = probs.shape
    for i in prange(rows):
        begin, end = _seen(i, queries, group, first, window)
        _softmax_backward_row(grad[i, begin:end], probs[i, begin:end])
        grad[i, :begin] = 0
        grad[i, end:] = 0


@inline
def _row(place: Any, at: Any, length: Any, head: Any, key_value: Any, group: Any) -> Any:
    """As eager._rows."""
    start = (place - at[place]) * key_value + head // group * length[place] + at[place]
    return start * group + head % group


@loop
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


@loop
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


def rows_of(x: Tensor) -> Any:
    return array(x.reshape(-1, x.shape[-1]).contiguous())


def flat(x: Tensor) -> Any:
    """x (T, heads, d), rows anywhere, as one line from its first element to its last."""
    assert x.stride()[1:] == (x.shape[2], 1)
    return array(x.as_strided(((len(x) - 1) * x.stride(0) + x.shape[1] * x.shape[2],), (1,)))


def cache_folder() -> Path:
    """Where numba keeps these loops compiled."""
    return Path(cast(Any, _rms_norm).stats.cache_path)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None = None) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    _rms_norm(rows_of(x), array(weight), np.float32(eps), np.float32(offset), rows_of(out))
    return out


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    _rms_norm_backward(rows_of(grad), rows_of(x), array(weight), np.float32(eps), np.float32(offset), rows_of(out))
    return out


def glu(gate_up: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2) if out is None else out
    _glu(rows_of(gate_up), activation != "silu", array(out))
    return out


def glu_backward(grad: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    grad_in, out = torch.empty_like(gate_up), torch.empty_like(grad)
    _glu_backward(rows_of(grad), rows_of(gate_up), activation != "silu", array(grad_in), array(out))
    return grad_in, out


def scale_columns_(x: Tensor, gains: Tensor) -> Tensor:
    _scale_columns(array(x), array(gains))
    return x


def scale_columns_backward(grad: Tensor, y: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    out, sums = torch.empty_like(grad), torch.empty(TASKS, grad.shape[1])
    _scale_columns_backward(rows_of(grad), rows_of(y), array(gains), array(out), array(sums))
    return out, sums.sum(0)


def softmax_(scores: Tensor, group: int, first: int, window: int, sinks: Tensor | None = None) -> Tensor:
    counted = np.empty(0, np.float32) if sinks is None else array(sinks)
    _softmax(rows_of(scores), scores.shape[1], group, first, window, counted)
    return scores


def softmax_backward_(grad: Tensor, probs: Tensor, group: int, first: int, window: int) -> Tensor:
    _softmax_backward(rows_of(grad), rows_of(probs), probs.shape[1], group, first, window)
    return grad


def _angles(cos: Tensor | None, sin: Tensor | None, tokens: int, scale: float) -> tuple[Any, Any, Any]:
    none = torch.empty(tokens, 0)
    return array(none if cos is None else cos), array(none if sin is None else sin), np.float32(scale)


def to_heads(x: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float, places: Places, group: int) -> Tensor:
    tokens, heads, d = x.shape
    out = x.new_empty(len(places.token) * heads, d)
    into = (array(places.token), array(places.at), array(places.length), heads // group, group, d, array(out))
    _to_heads(flat(x), x.stride(0), *_angles(cos, sin, tokens, scale), *into)
    return out


def from_heads(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float, places: Places, group: int, out: Tensor
) -> None:
    tokens, heads, d = out.shape
    back = (array(places.first), array(places.where), array(places.at), array(places.length))
    shape = (heads // group, group, d)
    _from_heads(array(x), *_angles(cos, sin, tokens, scale), *back, *shape, flat(out), out.stride(0))
