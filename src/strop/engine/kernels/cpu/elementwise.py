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
from strop.engine.kernels.cpu.elementwise import cross_entropy_ as cross_entropy_
from strop.engine.kernels.cpu.elementwise import exps, scale_into, top
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


# ---- from strop.engine.kernels.cpu.norms ----
"""LayerNorm and the activations that gate nothing, as loops that numba compiles: for CPUs, in fp32 and bf16.

Each reads and writes memory once, where PyTorch's own formulas of an activation take up to ten passes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from strop.engine.kernels.cpu.compiled import array, exp, inline, inside, loop, narrow, wide
from strop.engine.kernels.cpu.elementwise import activate, rows_of

SILU, GELU_TANH, GELU, RELU2, RELU, XIELU = range(6)
About = tuple[float, float, float, float]  # xIELU's numbers: its slopes above and below 0, beta, eps

_ROOT_HALF, _PEAK = np.float32(0.7071067811865476), np.float32(0.3989422804014327)  # 1 / sqrt(2), 1 / sqrt(2 pi)


@loop
def _layer_norm(x: Any, weight: Any, bias: Any, eps: Any, out: Any) -> None:
    """bias: (n,) or (0,)."""
    rows, n = x.shape
    for i in prange(rows):
        mean, total = np.float32(0.0), np.float32(0.0)
        for j in range(n):
            mean += wide(x[i, j])
        mean /= np.float32(n)
        for j in range(n):
            off = wide(x[i, j]) - mean
            total += off * off
        rstd = np.float32(1.0) / np.sqrt(total / np.float32(n) + eps)
        if len(bias):
            for j in range(n):
                out[i, j] = narrow((wide(x[i, j]) - mean) * rstd * wide(weight[j]) + wide(bias[j]), out)
        else:
            for j in range(n):
                out[i, j] = narrow((wide(x[i, j]) - mean) * rstd * wide(weight[j]), out)


@loop
def _layer_norm_backward(grad: Any, x: Any, weight: Any, eps: Any, out: Any) -> None:
    rows, n = x.shape
    for i in prange(rows):
        mean, total = np.float32(0.0), np.float32(0.0)
        for j in range(n):
            mean += wide(x[i, j])
        mean /= np.float32(n)
        given, along = np.float32(0.0), np.float32(0.0)
        for j in range(n):
            off, weighted = wide(x[i, j]) - mean, wide(grad[i, j]) * wide(weight[j])
            total += off * off
            given += weighted
            along += weighted * off
        rstd = np.float32(1.0) / np.sqrt(total / np.float32(n) + eps)
        given /= np.float32(n)
        shrink = along * rstd * rstd / np.float32(n)
        for j in range(n):
            weighted = wide(grad[i, j]) * wide(weight[j])
            out[i, j] = narrow(rstd * (weighted - given - (wide(x[i, j]) - mean) * shrink), out)


@inside
def _tail(z: Any) -> Any:
    """erfc(z) of z >= 0, to 1.2e-7 of it (Press et al., Numerical Recipes, section 6.2): libm's is not vectorised."""
    t = np.float32(1.0) / (np.float32(1.0) + np.float32(0.5) * z)
    p = np.float32(0.17087277) * t - np.float32(0.82215223)
    p = p * t + np.float32(1.48851587)
    p = p * t - np.float32(1.13520398)
    p = p * t + np.float32(0.27886807)
    p = p * t - np.float32(0.18628806)
    p = p * t + np.float32(0.09678418)
    p = p * t + np.float32(0.37409196)
    p = p * t + np.float32(1.00002368)
    return t * exp(p * t - np.float32(1.26551223) - z * z)


@inside
def gelu(x: Any) -> Any:
    """Value and slope."""
    half = np.float32(0.5) * _tail(abs(x) * _ROOT_HALF)
    share = np.float32(1.0) - half if x >= 0 else half
    return x * share, share + x * _PEAK * exp(np.float32(-0.5) * x * x)


@inline
def _xielu(x: Any, about: Any) -> Any:
    """Value and slope (arXiv:2411.13010)."""
    positive, negative, beta, eps = about
    below = min(x, eps)
    e = exp(below)
    slope = negative * ((e if x < eps else np.float32(0.0)) - np.float32(1.0)) + beta
    value = negative * (e - np.float32(1.0) - x) + beta * x
    return (positive * x + beta) * x if x > 0 else value, np.float32(2.0) * positive * x + beta if x > 0 else slope


@inside
def _both(x: Any, kind: Any, about: Any) -> Any:
    """Value and slope; kind: a constant where it is called, or the loop would not be vectorised."""
    none = np.float32(0.0)
    if kind == GELU:
        return gelu(x)
    kept = np.float32(0.5) * (x + abs(x))  # a comparison would lose what is not a number
    if kind == RELU2:
        return kept * kept, np.float32(2.0) * kept
    if kind == RELU:
        return kept, np.float32(1.0) if x > 0 else none
    if kind == XIELU:
        return _xielu(x, about)
    return activate(x, kind == GELU_TANH)


@inside
def _values(x: Any, kind: Any, about: Any, out: Any) -> None:
    for j in range(len(out)):
        value, _ = _both(wide(x[j]), kind, about)
        out[j] = narrow(value, out)


@inside
def _slopes(grad: Any, x: Any, kind: Any, about: Any, grad_in: Any, out: Any) -> None:
    for j in range(len(out)):
        value, slope = _both(wide(x[j]), kind, about)
        out[j] = narrow(value, out)
        grad_in[j] = narrow(wide(grad[j]) * slope, grad_in)


@loop
def _activated(x: Any, kind: Any, about: Any, out: Any) -> None:
    for i in prange(len(x)):
        if kind == GELU:
            _values(x[i], GELU, about, out[i])
        elif kind == GELU_TANH:
            _values(x[i], GELU_TANH, about, out[i])
        elif kind == RELU2:
            _values(x[i], RELU2, about, out[i])
        elif kind == RELU:
            _values(x[i], RELU, about, out[i])
        elif kind == XIELU:
            _values(x[i], XIELU, about, out[i])
        else:
            _values(x[i], SILU, about, out[i])


@loop
def _activated_backward(grad: Any, x: Any, kind: Any, about: Any, grad_in: Any, out: Any) -> None:
    for i in prange(len(x)):
        if kind == GELU:
            _slopes(grad[i], x[i], GELU, about, grad_in[i], out[i])
        elif kind == GELU_TANH:
            _slopes(grad[i], x[i], GELU_TANH, about, grad_in[i], out[i])
        elif kind == RELU2:
            _slopes(grad[i], x[i], RELU2, about, grad_in[i], out[i])
        elif kind == RELU:
            _slopes(grad[i], x[i], RELU, about, grad_in[i], out[i])
        elif kind == XIELU:
            _slopes(grad[i], x[i], XIELU, about, grad_in[i], out[i])
        else:
            _slopes(grad[i], x[i], SILU, about, grad_in[i], out[i])


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor | None = None) -> Tensor:
    """As PyTorch's over the last dimension."""
    out = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    _layer_norm(rows_of(x), array(weight), array(weight[:0] if bias is None else bias), np.float32(eps), rows_of(out))
    return out


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient of layer_norm with respect to x."""
    out = torch.empty(x.shape, dtype=x.dtype)
    _layer_norm_backward(rows_of(grad), rows_of(x), array(weight), np.float32(eps), rows_of(out))
    return out


def activated(x: Tensor, kind: str, about: About, out: Tensor | None = None) -> Tensor:
    """activation(x), x (T, I); kind: by the name of one of the constants above."""
    out = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    _activated(rows_of(x), _KINDS[kind], _numbers(about), array(out))
    return out


def activated_backward(grad: Tensor, x: Tensor, kind: str, about: About) -> tuple[Tensor, Tensor]:
    """(gradient with respect to x, the forward's output again)."""
    grad_in, out = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    _activated_backward(rows_of(grad), rows_of(x), _KINDS[kind], _numbers(about), array(grad_in), array(out))
    return grad_in, out


_KINDS = {"SILU": SILU, "GELU_TANH": GELU_TANH, "GELU": GELU, "RELU2": RELU2, "RELU": RELU, "XIELU": XIELU}


def _numbers(about: About) -> tuple[Any, ...]:
    return tuple(np.float32(x) for x in about)


# ---- from strop.engine.kernels.cpu.loss ----
"""Softmax and cross entropy of rows of logits, as loops that numba compiles: for CPUs, in fp32 and bf16."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from strop.engine.kernels.cpu.compiled import GAP, TASKS, array, exp, greater, inline, loop, narrow, tanh, wide


@inline
def top(row: Any) -> Any:
    highest = np.float32(-3e38)
    for j in range(len(row)):
        highest = greater(highest, wide(row[j]))
    return highest


@inline
def exps(row: Any, highest: Any, out: Any) -> Any:
    """exp(row - highest) into `out`; returns their sum."""
    total = np.float32(0.0)
    for j in range(len(row)):
        e = exp(wide(row[j]) - highest)
        out[j] = e
        total += e
    return total


@inline
def scale_into(row: Any, values: Any, scale: Any) -> None:
    for j in range(len(row)):
        row[j] = narrow(values[j] * scale, row)


@inline
def _bent_exps(row: Any, highest: Any, softcap: Any, out: Any) -> Any:
    """exp(bent row - highest) into `out`; returns their sum."""
    total = np.float32(0.0)
    for j in range(len(row)):
        e = exp(softcap * tanh(wide(row[j]) / softcap) - highest)
        out[j] = e
        total += e
    return total


@inline
def _scale_bent(row: Any, values: Any, scale: Any, softcap: Any) -> None:
    """The gradient of the bent row, times how steep it is there."""
    for j in range(len(row)):
        t = tanh(wide(row[j]) / softcap)
        row[j] = narrow(values[j] * scale * (np.float32(1.0) - t * t), row)


@loop
def _cross_entropy(logits: Any, labels: Any, weights: Any, softcap: Any, gradient: Any, losses: Any) -> None:
    rows, n = logits.shape
    for task in prange(TASKS):
        held = np.empty(GAP + n, dtype=np.float32)[GAP:]
        for i in range(task * rows // TASKS, (task + 1) * rows // TASKS):
            row, label = logits[i], labels[i]
            highest, at, steep = top(row), wide(row[label]), np.float32(1.0)
            if softcap > 0:
                t = tanh(at / softcap)
                highest, at, steep = softcap * tanh(highest / softcap), softcap * t, np.float32(1.0) - t * t
                total = _bent_exps(row, highest, softcap, held)
            else:
                total = exps(row, highest, held)
            losses[i] = weights[i] * (np.log(total) + highest - at)
            if gradient:
                scale = weights[i] / total
                if softcap > 0:
                    _scale_bent(row, held, scale, softcap)
                else:
                    scale_into(row, held, scale)
                row[label] = narrow((held[label] * scale - weights[i]) * steep, logits)


def cross_entropy_(logits: Tensor, labels: Tensor, weights: Tensor, softcap: float, gradient: bool) -> Tensor:
    losses = torch.empty(len(logits))
    _cross_entropy(array(logits), array(labels), array(weights), np.float32(softcap), gradient, array(losses))
    return losses


# ---- from strop.engine.kernels.cpu.rope ----
"""attention.Turned as compiled loops: the rotary embedding in a copy of q, k and v, read and written once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.autograd import Function

from strop.engine.kernels.cpu.compiled import array, inline, loop, narrow, wide
from strop.engine.train.attention import Heads


@inline
def _turn(x: Any, cos: Any, sin: Any, neighbours: Any, factor: Any, out: Any) -> None:
    """One head: the pairs that turn stand as halves in `out`."""
    m = len(cos)
    if neighbours:
        for j in range(m):
            a, b = wide(x[2 * j]) * factor, wide(x[2 * j + 1]) * factor
            out[j] = narrow(a * cos[j] - b * sin[j], out)
            out[m + j] = narrow(b * cos[j] + a * sin[j], out)
    else:
        for j in range(m):
            a, b = wide(x[j]) * factor, wide(x[m + j]) * factor
            out[j] = narrow(a * cos[j] - b * sin[j], out)
            out[m + j] = narrow(b * cos[j] + a * sin[j], out)
    for j in range(2 * m, len(x)):
        out[j] = narrow(wide(x[j]) * factor, out)


@inline
def _turn_back(x: Any, cos: Any, sin: Any, neighbours: Any, factor: Any, out: Any) -> None:
    """The transpose of _turn."""
    m = len(cos)
    if neighbours:
        for j in range(m):
            a, b = wide(x[j]) * factor, wide(x[m + j]) * factor
            out[2 * j] = narrow(a * cos[j] + b * sin[j], out)
            out[2 * j + 1] = narrow(b * cos[j] - a * sin[j], out)
    else:
        for j in range(m):
            a, b = wide(x[j]) * factor, wide(x[m + j]) * factor
            out[j] = narrow(a * cos[j] + b * sin[j], out)
            out[m + j] = narrow(b * cos[j] - a * sin[j], out)
    for j in range(2 * m, len(x)):
        out[j] = narrow(wide(x[j]) * factor, out)


@loop
def _rows_turned(
    x: Any, query: Any, key_value: Any, d: Any, cos: Any, sin: Any, neighbours: Any, factors: Any, back: Any, out: Any
) -> None:
    """factors: (T,) or (0,)."""
    one, turned = np.float32(1.0), (query + key_value) * d
    for i in prange(len(x)):
        source, to, c, s = x[i], out[i], cos[i], sin[i]
        for head in range(query + key_value):
            begin, end = head * d, (head + 1) * d
            factor = factors[i] if head < query and len(factors) else one
            if back:
                _turn_back(source[begin:end], c, s, neighbours, factor, to[begin:end])
            else:
                _turn(source[begin:end], c, s, neighbours, factor, to[begin:end])
        for j in range(turned, len(source)):
            to[j] = source[j]


class Turned(Function):
    """As attention.Turned."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, neighbours: bool, scale: Tensor | None
    ) -> Tensor:
        ctx.about = heads, cos, sin, neighbours, scale
        return _turned(qkv, *ctx.about, back=False, out=heads.new(len(qkv), qkv.shape[1], qkv))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _turned(grad, *ctx.about, back=True, out=torch.empty_like(grad)), None, None, None, None, None


def _turned(
    x: Tensor, heads: Heads, cos: Tensor, sin: Tensor, neighbours: bool, scale: Tensor | None, *, back: bool,
    out: Tensor,
) -> Tensor:  # fmt: skip
    factors = torch.empty(0) if scale is None else scale.float()
    shape = heads.query, heads.key_value, heads.size
    angles = array(cos.float()), array(sin.float()), neighbours, array(factors)
    _rows_turned(array(x.contiguous()), *shape, *angles, back, array(out))
    return out
