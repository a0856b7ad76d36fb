"""Compiled CPU kernels for fp32 and bf16: norms, activations, softmax, cross entropy and the rotary embedding.

eager.py specifies what most of them compute. Each kernel reads and writes memory once, where PyTorch would make several
passes and an fp32 copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.autograd import Function

from strop.engine.kernels.cpu.compiled import (
    GAP,
    TASKS,
    array,
    exp,
    force_inline,
    from_fp32,
    kernel,
    maximum,
    sigmoid,
    subroutine,
    tanh,
    to_fp32,
)
from strop.engine.kernels.protocols import ActivationParameters
from strop.engine.train.attention import Heads
from strop.engine.train.packing import Slots

SILU, GELU_TANH, GELU, RELU2, RELU, XIELU = range(6)
KINDS = {"SILU": SILU, "GELU_TANH": GELU_TANH, "GELU": GELU, "RELU2": RELU2, "RELU": RELU, "XIELU": XIELU}
# elements of a row that are summed in fp32; more would lose small ones: 3e-5 of a loss over 262,144 tokens
SUM_BLOCK = 1024
GELU_SCALE, GELU_CUBIC = np.float32(2 * 0.7978845608028654), np.float32(0.044715)  # 2 sqrt(2 / pi)
_INV_SQRT_2, _INV_SQRT_2PI = np.float32(0.7071067811865476), np.float32(0.3989422804014327)


def as_rows(x: Tensor) -> Any:
    """Return x (.., n) as a contiguous NumPy array (T, n)."""
    return array(x.reshape(-1, x.shape[-1]).contiguous())


def flatten(x: Tensor) -> Any:
    """Return x (T, heads, d) as a 1-D array without a copy; it includes any memory between the rows of x."""
    assert x.stride()[1:] == (x.shape[2], 1)
    return array(x.as_strided(((len(x) - 1) * x.stride(0) + x.shape[1] * x.shape[2],), (1,)))


def numba_cache_folder() -> Path:
    """Return the folder where numba caches the compiled kernels of this package."""
    return Path(cast(Any, _rms_norm).stats.cache_path)


@kernel
def _rms_norm(x: Any, weight: Any, eps: Any, offset: Any, out: Any) -> None:
    rows, n = x.shape
    for i in prange(rows):
        sum_squares = np.float32(0.0)
        for j in range(n):
            value = to_fp32(x[i, j])
            sum_squares += value * value
        rstd = np.float32(1.0) / np.sqrt(sum_squares / np.float32(n) + eps)
        for j in range(n):
            out[i, j] = from_fp32(to_fp32(x[i, j]) * rstd * (to_fp32(weight[j]) + offset), out)


@kernel
def _rms_norm_backward(grad: Any, x: Any, weight: Any, eps: Any, offset: Any, out: Any) -> None:
    rows, n = x.shape
    for i in prange(rows):
        sum_squares, dot = np.float32(0.0), np.float32(0.0)
        for j in range(n):
            value = to_fp32(x[i, j])
            sum_squares += value * value
            dot += to_fp32(grad[i, j]) * (to_fp32(weight[j]) + offset) * value
        rstd = np.float32(1.0) / np.sqrt(sum_squares / np.float32(n) + eps)
        projection = dot * rstd * rstd / np.float32(n)
        for j in range(n):
            weighted = to_fp32(grad[i, j]) * (to_fp32(weight[j]) + offset)
            out[i, j] = from_fp32(rstd * (weighted - to_fp32(x[i, j]) * projection), out)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None = None) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    _rms_norm(as_rows(x), array(weight), np.float32(eps), np.float32(offset), as_rows(out))
    return out


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    _rms_norm_backward(as_rows(grad), as_rows(x), array(weight), np.float32(eps), np.float32(offset), as_rows(out))
    return out


@kernel
def _layer_norm(x: Any, weight: Any, bias: Any, eps: Any, out: Any) -> None:
    """Write the LayerNorm of x (T, n) to `out`; an empty `bias` means no bias."""
    rows, n = x.shape
    for i in prange(rows):
        mean, sum_squares = np.float32(0.0), np.float32(0.0)
        for j in range(n):
            mean += to_fp32(x[i, j])
        mean /= np.float32(n)
        for j in range(n):
            centered = to_fp32(x[i, j]) - mean
            sum_squares += centered * centered
        rstd = np.float32(1.0) / np.sqrt(sum_squares / np.float32(n) + eps)
        if len(bias):
            for j in range(n):
                out[i, j] = from_fp32((to_fp32(x[i, j]) - mean) * rstd * to_fp32(weight[j]) + to_fp32(bias[j]), out)
        else:
            for j in range(n):
                out[i, j] = from_fp32((to_fp32(x[i, j]) - mean) * rstd * to_fp32(weight[j]), out)


@kernel
def _layer_norm_backward(grad: Any, x: Any, weight: Any, eps: Any, out: Any) -> None:
    rows, n = x.shape
    for i in prange(rows):
        mean, sum_squares = np.float32(0.0), np.float32(0.0)
        for j in range(n):
            mean += to_fp32(x[i, j])
        mean /= np.float32(n)
        mean_grad, dot = np.float32(0.0), np.float32(0.0)
        for j in range(n):
            centered, weighted = to_fp32(x[i, j]) - mean, to_fp32(grad[i, j]) * to_fp32(weight[j])
            sum_squares += centered * centered
            mean_grad += weighted
            dot += weighted * centered
        rstd = np.float32(1.0) / np.sqrt(sum_squares / np.float32(n) + eps)
        mean_grad /= np.float32(n)
        projection = dot * rstd * rstd / np.float32(n)
        for j in range(n):
            weighted = to_fp32(grad[i, j]) * to_fp32(weight[j])
            out[i, j] = from_fp32(rstd * (weighted - mean_grad - (to_fp32(x[i, j]) - mean) * projection), out)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor | None = None) -> Tensor:
    """Return the same as torch.nn.functional.layer_norm over the last dimension."""
    out = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    _layer_norm(as_rows(x), array(weight), array(weight[:0] if bias is None else bias), np.float32(eps), as_rows(out))
    return out


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the gradient of layer_norm with respect to x."""
    out = torch.empty(x.shape, dtype=x.dtype)
    _layer_norm_backward(as_rows(grad), as_rows(x), array(weight), np.float32(eps), as_rows(out))
    return out


@subroutine
def _silu_or_gelu(x: Any, gelu: Any) -> Any:
    """Return silu(x), or the tanh approximation of gelu(x), and the derivative.

    silu(x) is x sigmoid(x). The approximation of gelu(x), x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3),
    equals x sigmoid(2 u).
    """
    one = np.float32(1.0)
    z, dz = x, one
    if gelu:
        z = GELU_SCALE * (x + GELU_CUBIC * x * x * x)
        dz = GELU_SCALE * (one + np.float32(3.0) * GELU_CUBIC * x * x)
    sigmoid_z, sigmoid_minus_z = sigmoid(z)
    value = x * sigmoid_z
    return value, sigmoid_z + value * sigmoid_minus_z * dz


@kernel
def _glu(gate_up: Any, gelu: Any, out: Any) -> None:
    rows, n = out.shape
    for i in prange(rows):
        for j in range(n):
            value, _ = _silu_or_gelu(to_fp32(gate_up[i, j]), gelu)
            out[i, j] = from_fp32(value * to_fp32(gate_up[i, n + j]), out)


@subroutine
def _glu_backward_row(grad: Any, gate_up: Any, gelu: Any, grad_in: Any, out: Any) -> None:
    n = len(out)
    for j in range(n):
        up, upstream = to_fp32(gate_up[n + j]), to_fp32(grad[j])
        value, slope = _silu_or_gelu(to_fp32(gate_up[j]), gelu)
        out[j] = from_fp32(value * up, out)
        grad_in[j] = from_fp32(upstream * up * slope, grad_in)
        grad_in[n + j] = from_fp32(upstream * value, grad_in)


@kernel
def _glu_backward(grad: Any, gate_up: Any, gelu: Any, grad_in: Any, out: Any) -> None:
    for i in prange(len(out)):
        if gelu:  # numba vectorizes a call with a constant argument, which is 7 times as fast
            _glu_backward_row(grad[i], gate_up[i], True, grad_in[i], out[i])
        else:
            _glu_backward_row(grad[i], gate_up[i], False, grad_in[i], out[i])


def glu(gate_up: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2) if out is None else out
    _glu(as_rows(gate_up), activation != "silu", array(out))
    return out


def glu_backward(grad: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    grad_in, out = torch.empty_like(gate_up), torch.empty_like(grad)
    _glu_backward(as_rows(grad), as_rows(gate_up), activation != "silu", array(grad_in), array(out))
    return grad_in, out


@force_inline
def _erfc(z: Any) -> Any:
    """Return erfc(z) for z >= 0 with a relative error of 1.2e-7 (Press et al., Numerical Recipes, section 6.2).

    LLVM cannot vectorize a loop that calls erfc of libm.
    """
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


@force_inline
def gelu(x: Any) -> Any:
    """Return x * cdf(x), with the CDF of the standard normal distribution, and its derivative."""
    tail = np.float32(0.5) * _erfc(abs(x) * _INV_SQRT_2)
    cdf = np.float32(1.0) - tail if x >= 0 else tail
    return x * cdf, cdf + x * _INV_SQRT_2PI * exp(np.float32(-0.5) * x * x)


@subroutine
def _xielu(x: Any, parameters: Any) -> Any:
    """Return xIELU (arXiv:2411.13010) and its derivative."""
    positive, negative, beta, eps = parameters
    capped = min(x, eps)
    exp_x = exp(capped)
    slope = negative * ((exp_x if x < eps else np.float32(0.0)) - np.float32(1.0)) + beta
    value = negative * (exp_x - np.float32(1.0) - x) + beta * x
    return (positive * x + beta) * x if x > 0 else value, np.float32(2.0) * positive * x + beta if x > 0 else slope


@force_inline
def _value_and_slope(x: Any, kind: Any, parameters: Any) -> Any:
    """Return an activation of x and its derivative. `kind` must be a constant, or numba does not vectorize the loop."""
    zero = np.float32(0.0)
    if kind == GELU:
        return gelu(x)
    positive = np.float32(0.5) * (x + abs(x))  # max(x, 0) that propagates NaN
    if kind == RELU2:
        return positive * positive, np.float32(2.0) * positive
    if kind == RELU:
        return positive, np.float32(1.0) if x > 0 else zero
    if kind == XIELU:
        return _xielu(x, parameters)
    return _silu_or_gelu(x, kind == GELU_TANH)


@force_inline
def _activation_row(x: Any, kind: Any, parameters: Any, out: Any) -> None:
    for j in range(len(out)):
        value, _ = _value_and_slope(to_fp32(x[j]), kind, parameters)
        out[j] = from_fp32(value, out)


@force_inline
def _activation_backward_row(grad: Any, x: Any, kind: Any, parameters: Any, grad_in: Any, out: Any) -> None:
    for j in range(len(out)):
        value, slope = _value_and_slope(to_fp32(x[j]), kind, parameters)
        out[j] = from_fp32(value, out)
        grad_in[j] = from_fp32(to_fp32(grad[j]) * slope, grad_in)


@kernel
def _activation(x: Any, kind: Any, parameters: Any, out: Any) -> None:
    for i in prange(len(x)):
        if kind == GELU:
            _activation_row(x[i], GELU, parameters, out[i])
        elif kind == GELU_TANH:
            _activation_row(x[i], GELU_TANH, parameters, out[i])
        elif kind == RELU2:
            _activation_row(x[i], RELU2, parameters, out[i])
        elif kind == RELU:
            _activation_row(x[i], RELU, parameters, out[i])
        elif kind == XIELU:
            _activation_row(x[i], XIELU, parameters, out[i])
        else:
            _activation_row(x[i], SILU, parameters, out[i])


@kernel
def _activation_backward(grad: Any, x: Any, kind: Any, parameters: Any, grad_in: Any, out: Any) -> None:
    for i in prange(len(x)):
        if kind == GELU:
            _activation_backward_row(grad[i], x[i], GELU, parameters, grad_in[i], out[i])
        elif kind == GELU_TANH:
            _activation_backward_row(grad[i], x[i], GELU_TANH, parameters, grad_in[i], out[i])
        elif kind == RELU2:
            _activation_backward_row(grad[i], x[i], RELU2, parameters, grad_in[i], out[i])
        elif kind == RELU:
            _activation_backward_row(grad[i], x[i], RELU, parameters, grad_in[i], out[i])
        elif kind == XIELU:
            _activation_backward_row(grad[i], x[i], XIELU, parameters, grad_in[i], out[i])
        else:
            _activation_backward_row(grad[i], x[i], SILU, parameters, grad_in[i], out[i])


def activate(x: Tensor, kind: str, parameters: ActivationParameters, out: Tensor | None = None) -> Tensor:
    """Return the activation named `kind` (a key of KINDS) of x (T, n)."""
    out = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    _activation(as_rows(x), KINDS[kind], _as_fp32(parameters), array(out))
    return out


def activate_backward(grad: Tensor, x: Tensor, kind: str, parameters: ActivationParameters) -> tuple[Tensor, Tensor]:
    """Return the gradient with respect to x, and the output of the forward pass."""
    grad_in, out = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    _activation_backward(as_rows(grad), as_rows(x), KINDS[kind], _as_fp32(parameters), array(grad_in), array(out))
    return grad_in, out


def _as_fp32(parameters: ActivationParameters) -> tuple[Any, ...]:
    return tuple(np.float32(x) for x in parameters)


@kernel
def _scale_columns(x: Any, gains: Any) -> None:
    for i in prange(len(x)):
        row = x[i]
        for j in range(len(row)):
            row[j] = from_fp32(to_fp32(row[j]) * gains[j], x)


@subroutine
def _scale_columns_backward_row(grad: Any, y: Any, gains: Any, out: Any, sums: Any) -> None:
    for j in range(len(grad)):
        upstream = to_fp32(grad[j])
        sums[j] += upstream * to_fp32(y[j])
        out[j] = from_fp32(upstream * gains[j], out)


@kernel
def _scale_columns_backward(grad: Any, y: Any, gains: Any, out: Any, sums: Any) -> None:
    rows, n = grad.shape
    for task in prange(TASKS):
        task_sums = np.zeros(GAP + n, dtype=np.float32)[GAP:]  # GAP: see compiled.py
        for i in range(task * rows // TASKS, (task + 1) * rows // TASKS):
            _scale_columns_backward_row(grad[i], y[i], gains, out[i], task_sums)
        sums[task, :] = task_sums


def scale_columns_(x: Tensor, gains: Tensor) -> Tensor:
    _scale_columns(array(x), array(gains))
    return x


def scale_columns_backward(grad: Tensor, y: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    out, sums = torch.empty_like(grad), torch.empty(TASKS, grad.shape[1])
    _scale_columns_backward(as_rows(grad), as_rows(y), array(gains), array(out), array(sums))
    return out, sums.sum(0)


@subroutine
def row_max(row: Any) -> Any:
    highest = np.float32(-3e38)
    for j in range(len(row)):
        highest = maximum(highest, to_fp32(row[j]))
    return highest


@subroutine
def exp_row(row: Any, highest: Any, out: Any) -> Any:
    """Write exp(row - highest) to `out` and return the sum."""
    total = np.float32(0.0)
    for j in range(len(row)):
        e = exp(to_fp32(row[j]) - highest)
        out[j] = e
        total += e
    return total


@subroutine
def scale_row(row: Any, values: Any, scale: Any) -> None:
    for j in range(len(row)):
        row[j] = from_fp32(values[j] * scale, row)


@subroutine
def visible_keys(i: Any, group: Any, first: Any, window: Any) -> Any:
    """Return the range [begin, end) of keys that row i of the scores attends to.

    group: query heads per key-value head; rows with the same i // group have the same position. first: the position of
    row 0. window: the size of the attention window, 0 for none.
    """
    end = first + i // group + 1
    return (max(end - window, 0) if window else 0), end


@kernel
def _softmax(scores: Any, queries: Any, group: Any, first: Any, window: Any, sinks: Any) -> None:
    rows, n = scores.shape
    for task in prange(TASKS):
        buffer = np.empty(GAP + n, dtype=np.float32)[GAP:]  # GAP: see compiled.py
        for i in range(task * rows // TASKS, (task + 1) * rows // TASKS):
            begin, end = visible_keys(i % queries, group, first, window)
            row = scores[i, begin:end]
            highest = row_max(row)
            total = exp_row(row, highest, buffer)
            if len(sinks):
                head = i // queries % (len(sinks) // group) * group + i % group
                total += np.exp(sinks[head] - highest)
            scale_row(row, buffer, np.float32(1.0) / total)
            scores[i, :begin] = 0
            scores[i, end:] = 0


@subroutine
def _softmax_backward_row(grad: Any, probs: Any) -> None:
    dot = np.float32(0.0)
    for j in range(len(grad)):
        dot += to_fp32(grad[j]) * to_fp32(probs[j])
    for j in range(len(grad)):
        grad[j] = from_fp32(to_fp32(probs[j]) * (to_fp32(grad[j]) - dot), grad)


@kernel
def _softmax_backward(grad: Any, probs: Any, queries: Any, group: Any, first: Any, window: Any) -> None:
    rows, _ = probs.shape
    for i in prange(rows):
        begin, end = visible_keys(i % queries, group, first, window)
        _softmax_backward_row(grad[i, begin:end], probs[i, begin:end])
        grad[i, :begin] = 0
        grad[i, end:] = 0


def softmax_(scores: Tensor, group: int, first: int, window: int, sinks: Tensor | None = None) -> Tensor:
    sink_scores = np.empty(0, np.float32) if sinks is None else array(sinks)
    _softmax(as_rows(scores), scores.shape[1], group, first, window, sink_scores)
    return scores


def softmax_backward_(grad: Tensor, probs: Tensor, group: int, first: int, window: int) -> Tensor:
    _softmax_backward(as_rows(grad), as_rows(probs), probs.shape[1], group, first, window)
    return grad


@subroutine
def _capped_exp_row(row: Any, highest: Any, softcap: Any, out: Any) -> Any:
    """Write exp(softcap * tanh(row / softcap) - highest) to `out` and return the sum."""
    total = np.float32(0.0)
    for j in range(len(row)):
        e = exp(softcap * tanh(to_fp32(row[j]) / softcap) - highest)
        out[j] = e
        total += e
    return total


@subroutine
def _scale_capped(row: Any, values: Any, scale: Any, softcap: Any) -> None:
    """Overwrite the row with values * scale * the derivative of the soft cap at the row's values."""
    for j in range(len(row)):
        t = tanh(to_fp32(row[j]) / softcap)
        row[j] = from_fp32(values[j] * scale * (np.float32(1.0) - t * t), row)


@kernel
def _cross_entropy(logits: Any, labels: Any, weights: Any, softcap: Any, gradient: Any, losses: Any) -> None:
    rows, n = logits.shape
    for task in prange(TASKS):
        buffer = np.empty(GAP + n, dtype=np.float32)[GAP:]
        for i in range(task * rows // TASKS, (task + 1) * rows // TASKS):
            row, label = logits[i], labels[i]
            highest, target_logit, slope = row_max(row), to_fp32(row[label]), np.float32(1.0)
            if softcap > 0:
                t = tanh(target_logit / softcap)
                highest, target_logit, slope = softcap * tanh(highest / softcap), softcap * t, np.float32(1.0) - t * t
            exact_total = 0.0
            for begin in range(0, n, SUM_BLOCK):
                part, out = row[begin : begin + SUM_BLOCK], buffer[begin : begin + SUM_BLOCK]
                exact_total += (
                    _capped_exp_row(part, highest, softcap, out) if softcap > 0 else exp_row(part, highest, out)
                )
            total = np.float32(exact_total)
            losses[i] = weights[i] * (np.log(total) + highest - target_logit)
            if gradient:
                scale = weights[i] / total
                if softcap > 0:
                    _scale_capped(row, buffer, scale, softcap)
                else:
                    scale_row(row, buffer, scale)
                row[label] = from_fp32((buffer[label] * scale - weights[i]) * slope, logits)


def cross_entropy_(logits: Tensor, labels: Tensor, weights: Tensor, softcap: float, gradient: bool) -> Tensor:
    losses = torch.empty(len(logits))
    _cross_entropy(array(logits), array(labels), array(weights), np.float32(softcap), gradient, array(losses))
    return losses


@subroutine
def _output_row(slot: Any, positions: Any, lengths: Any, head: Any, num_kv_heads: Any, group: Any) -> Any:
    """Return the row of to_heads' result for a slot and a head. positions, lengths: as in packing.Slots."""
    start = (slot - positions[slot]) * num_kv_heads + head // group * lengths[slot] + positions[slot]
    return start * group + head % group


@kernel
def _to_heads(
    x: Any, stride: Any, cos: Any, sin: Any, scale: Any, rows: Any, positions: Any, lengths: Any, num_kv_heads: Any,
    group: Any, d: Any, out: Any,
) -> None:  # fmt: skip
    m = cos.shape[1]
    for slot in prange(len(rows)):
        row = rows[slot]
        for head in range(num_kv_heads * group):
            target = out[_output_row(slot, positions, lengths, head, num_kv_heads, group)]
            if row < 0:
                target[:] = 0
                continue
            begin = row * stride + head * d
            source = x[begin : begin + d]
            for j in range(m):
                a, b = to_fp32(source[j]), to_fp32(source[m + j])
                c, s = cos[row, j] * scale, sin[row, j] * scale
                target[j] = from_fp32(a * c - b * s, out)
                target[m + j] = from_fp32(b * c + a * s, out)
            for j in range(2 * m, d):
                target[j] = from_fp32(to_fp32(source[j]) * scale, out)


@kernel
def _from_heads(
    x: Any, cos: Any, sin: Any, scale: Any, starts: Any, slots: Any, positions: Any, lengths: Any, num_kv_heads: Any,
    group: Any, d: Any, out: Any, stride: Any,
) -> None:  # fmt: skip
    m = cos.shape[1]
    num_rows = len(starts) - 1
    for task in prange(TASKS):
        total = np.empty(d, dtype=np.float32)
        for row in range(task * num_rows // TASKS, (task + 1) * num_rows // TASKS):
            for head in range(num_kv_heads * group):
                total[:] = 0
                for i in range(starts[row], starts[row + 1]):
                    source = x[_output_row(slots[i], positions, lengths, head, num_kv_heads, group)]
                    for j in range(d):
                        total[j] += to_fp32(source[j])
                begin = row * stride + head * d
                target = out[begin : begin + d]
                for j in range(m):
                    a, b = total[j], total[m + j]
                    c, s = cos[row, j] * scale, sin[row, j] * scale
                    target[j] = from_fp32(a * c + b * s, out)
                    target[m + j] = from_fp32(b * c - a * s, out)
                for j in range(2 * m, d):
                    target[j] = from_fp32(total[j] * scale, out)


def _angles(cos: Tensor | None, sin: Tensor | None, tokens: int, scale: float) -> tuple[Any, Any, Any]:
    no_angles = torch.empty(tokens, 0)
    return array(no_angles if cos is None else cos), array(no_angles if sin is None else sin), np.float32(scale)


def to_heads(x: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float, slots: Slots, group: int) -> Tensor:
    tokens, heads, d = x.shape
    out = x.new_empty(len(slots.rows) * heads, d)
    layout = array(slots.rows), array(slots.positions), array(slots.lengths), heads // group, group
    _to_heads(flatten(x), x.stride(0), *_angles(cos, sin, tokens, scale), *layout, d, array(out))
    return out


def from_heads(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float, slots: Slots, group: int, out: Tensor
) -> None:
    tokens, heads, d = out.shape
    layout = array(slots.starts), array(slots.slots_by_row), array(slots.positions), array(slots.lengths)
    shape = heads // group, group, d
    _from_heads(array(x), *_angles(cos, sin, tokens, scale), *layout, *shape, flatten(out), out.stride(0))


@subroutine
def _rotate(x: Any, cos: Any, sin: Any, interleaved: Any, factor: Any, out: Any) -> None:
    """Apply the rotary embedding to one head. If interleaved, x[2 j] and x[2 j + 1] go to out[j] and out[m + j]."""
    m = len(cos)
    if interleaved:
        for j in range(m):
            a, b = to_fp32(x[2 * j]) * factor, to_fp32(x[2 * j + 1]) * factor
            out[j] = from_fp32(a * cos[j] - b * sin[j], out)
            out[m + j] = from_fp32(b * cos[j] + a * sin[j], out)
    else:
        for j in range(m):
            a, b = to_fp32(x[j]) * factor, to_fp32(x[m + j]) * factor
            out[j] = from_fp32(a * cos[j] - b * sin[j], out)
            out[m + j] = from_fp32(b * cos[j] + a * sin[j], out)
    for j in range(2 * m, len(x)):
        out[j] = from_fp32(to_fp32(x[j]) * factor, out)


@subroutine
def _rotate_backward(x: Any, cos: Any, sin: Any, interleaved: Any, factor: Any, out: Any) -> None:
    """Apply the transpose of _rotate."""
    m = len(cos)
    if interleaved:
        for j in range(m):
            a, b = to_fp32(x[j]) * factor, to_fp32(x[m + j]) * factor
            out[2 * j] = from_fp32(a * cos[j] + b * sin[j], out)
            out[2 * j + 1] = from_fp32(b * cos[j] - a * sin[j], out)
    else:
        for j in range(m):
            a, b = to_fp32(x[j]) * factor, to_fp32(x[m + j]) * factor
            out[j] = from_fp32(a * cos[j] + b * sin[j], out)
            out[m + j] = from_fp32(b * cos[j] - a * sin[j], out)
    for j in range(2 * m, len(x)):
        out[j] = from_fp32(to_fp32(x[j]) * factor, out)


@kernel
def _rotate_rows(
    x: Any, num_query_heads: Any, num_kv_heads: Any, d: Any, cos: Any, sin: Any, interleaved: Any, factors: Any,
    backward: Any, out: Any,
) -> None:  # fmt: skip
    """Rotate q and k in each row of qkv (T, n) and copy v. factors: a scale of q for each row, or empty."""
    one, rotated = np.float32(1.0), (num_query_heads + num_kv_heads) * d
    for i in prange(len(x)):
        source, target, c, s = x[i], out[i], cos[i], sin[i]
        for head in range(num_query_heads + num_kv_heads):
            begin, end = head * d, (head + 1) * d
            factor = factors[i] if head < num_query_heads and len(factors) else one
            if backward:
                _rotate_backward(source[begin:end], c, s, interleaved, factor, target[begin:end])
            else:
                _rotate(source[begin:end], c, s, interleaved, factor, target[begin:end])
        for j in range(rotated, len(source)):
            target[j] = source[j]


class ApplyRope(Function):
    """Compute the same as train.attention.ApplyRope."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, interleaved: bool, scale: Tensor | None
    ) -> Tensor:
        ctx.args = heads, cos, sin, interleaved, scale
        return _rotate_qkv(qkv, *ctx.args, backward=False, out=heads.new(len(qkv), qkv.shape[1], qkv))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _rotate_qkv(grad, *ctx.args, backward=True, out=torch.empty_like(grad)), None, None, None, None, None


def _rotate_qkv(
    x: Tensor, heads: Heads, cos: Tensor, sin: Tensor, interleaved: bool, scale: Tensor | None, *,
    backward: bool, out: Tensor,
) -> Tensor:  # fmt: skip
    factors = torch.empty(0) if scale is None else scale.float()
    shape = heads.num_query_heads, heads.num_kv_heads, heads.size
    angles = array(cos.float()), array(sin.float()), interleaved, array(factors)
    _rotate_rows(array(x.contiguous()), *shape, *angles, backward, array(out))
    return out
