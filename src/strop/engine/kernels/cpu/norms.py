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
