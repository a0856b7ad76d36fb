"""The element-wise operations of kernels/eager.py as Triton kernels.

The operations for attention are imported from there, because GPUs do not use them.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from strop.engine.kernels.cuda.launch import as_rows, device_function, kernel, launch, next_power_of_2, warps_for
from strop.engine.kernels.eager import from_heads as from_heads
from strop.engine.kernels.eager import softmax_ as softmax_
from strop.engine.kernels.eager import softmax_backward_ as softmax_backward_
from strop.engine.kernels.eager import to_heads as to_heads

# Sizes of the tiles that one program processes:
TILE = 2048  # elements of several short rows, in norms
PIECE = 1024  # columns of one row, in operations without sums
LONG, COLUMNS = 256, 128  # rows and columns, in sums over rows
LOGITS = 8192  # logits read at once, in the cross entropy
LOWEST = -3.4028234663852886e38


@kernel(unspecialized=("rows",))
def _norm(
    x: tensor, weight: tensor, out: tensor, rows: tensor, x_row: tensor, out_row: tensor, eps: tensor, offset: tensor,
    N: constexpr, ROWS: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < N)
    values = tl.load(x + row.to(tl.int64) * x_row + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32) + offset
    rstd = tl.rsqrt(tl.sum(values * values, 1) / N + eps)[:, None]
    tl.store(out + row.to(tl.int64) * out_row + column, (values * rstd * scale).to(out.dtype.element_ty), mask=mask)


@kernel(unspecialized=("rows",))
def _norm_backward(
    grad: tensor, x: tensor, weight: tensor, out: tensor, rows: tensor, grad_row: tensor, x_row: tensor,
    out_row: tensor, eps: tensor, offset: tensor,
    N: constexpr, ROWS: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < N)
    values = tl.load(x + row.to(tl.int64) * x_row + column, mask=mask, other=0.0).to(tl.float32)
    grads = tl.load(grad + row.to(tl.int64) * grad_row + column, mask=mask, other=0.0).to(tl.float32)
    weighted = grads * (tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32) + offset)
    rstd = tl.rsqrt(tl.sum(values * values, 1) / N + eps)[:, None]
    normed = values * rstd
    result = rstd * (weighted - normed * (tl.sum(weighted * normed, 1) / N)[:, None])
    tl.store(out + row.to(tl.int64) * out_row + column, result.to(out.dtype.element_ty), mask=mask)


def _norm_constants(n: int) -> dict[str, int]:
    block = next_power_of_2(n)
    rows = max(1, TILE // block)
    return {"N": n, "ROWS": rows, "BLOCK": block, "num_warps": warps_for(rows * block)}


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None = None) -> Tensor:
    values = as_rows(x)
    out = x.new_empty(x.shape) if out is None else out
    target, constants = as_rows(out), _norm_constants(x.shape[-1])
    rows = len(values), values.stride(0), target.stride(0)
    grid = (-(-len(values) // constants["ROWS"]),)
    launch(_norm, grid, x, values, weight, target, *rows, eps, offset, **constants)
    return out


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Compute eager.rms_norm_backward. out: memory for the result, which may be `grad`."""
    values, grads = as_rows(x), as_rows(grad)
    out = x.new_empty(x.shape) if out is None else out
    target, constants = as_rows(out), _norm_constants(x.shape[-1])
    rows = len(values), grads.stride(0), values.stride(0), target.stride(0)
    grid = (-(-len(values) // constants["ROWS"]),)
    launch(_norm_backward, grid, x, grads, values, weight, target, *rows, eps, offset, **constants)
    return out


@device_function
def _activated(x: tensor, GELU: constexpr) -> tensor:
    """Return the activation of x and its derivative, like eager._activate."""
    if GELU:
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        dz = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        sigmoid = tl.sigmoid(z)
        value = x * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid) * dz
    else:
        sigmoid = tl.sigmoid(x)
        value = x * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid)
    return value, slope


@kernel()
def _glu(x: tensor, out: tensor, x_row: tensor, N: constexpr, GELU: constexpr, BLOCK: constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < N
    gate = tl.load(x + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_row + N + column, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activated(gate, GELU)
    tl.store(out + row * N + column, (value * up).to(out.dtype.element_ty), mask=mask)


@kernel()
def _glu_backward(
    grad: tensor, x: tensor, grad_in: tensor, out: tensor, grad_row: tensor, x_row: tensor,
    N: constexpr, GELU: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < N
    gate = tl.load(x + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_row + N + column, mask=mask, other=0.0).to(tl.float32)
    grads = tl.load(grad + row * grad_row + column, mask=mask, other=0.0).to(tl.float32)
    value, slope = _activated(gate, GELU)
    dtype = out.dtype.element_ty
    tl.store(grad_in + row * 2 * N + column, (grads * up * slope).to(dtype), mask=mask)
    tl.store(grad_in + row * 2 * N + N + column, (grads * value).to(dtype), mask=mask)
    tl.store(out + row * N + column, (value * up).to(dtype), mask=mask)


def _is_gelu(activation: str) -> bool:
    assert activation in ("silu", "gelu_pytorch_tanh"), activation
    return activation == "gelu_pytorch_tanh"


def _piece_constants(n: int) -> dict[str, int]:
    block = min(PIECE, next_power_of_2(n))
    return {"N": n, "BLOCK": block, "num_warps": warps_for(block)}


def glu(gate_up: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    x, n = as_rows(gate_up), gate_up.shape[1] // 2
    out, constants = x.new_empty(len(x), n) if out is None else out, _piece_constants(n)
    launch(_glu, (len(x), -(-n // constants["BLOCK"])), x, x, out, x.stride(0), GELU=_is_gelu(activation), **constants)
    return out


def glu_backward(grad: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    x, grads, n = as_rows(gate_up), as_rows(grad), gate_up.shape[1] // 2
    grad_in, out, constants = x.new_empty(len(x), 2 * n), x.new_empty(len(x), n), _piece_constants(n)
    grid, strides = (len(x), -(-n // constants["BLOCK"])), (grads.stride(0), x.stride(0))
    launch(_glu_backward, grid, x, grads, x, grad_in, out, *strides, GELU=_is_gelu(activation), **constants)
    return grad_in, out


@kernel()
def _scale(x: tensor, gains: tensor, x_row: tensor, N: constexpr, BLOCK: constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < N
    values = tl.load(x + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    gain = tl.load(gains + column, mask=mask, other=0.0)
    tl.store(x + row * x_row + column, (values * gain).to(x.dtype.element_ty), mask=mask)


@kernel(unspecialized=("rows",))
def _scale_backward(
    grad: tensor, y: tensor, gains: tensor, out: tensor, sums: tensor, rows: tensor, grad_row: tensor, y_row: tensor,
    N: constexpr, LONG: constexpr, ROWS: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """Scale LONG rows of grad, ROWS at a time, and write the sum of grad * y over these rows to a row of `sums`."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    gain = tl.load(gains + column, mask=column < N, other=0.0)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, LONG, ROWS):
        row = tl.program_id(0) * LONG + first + tl.arange(0, ROWS)[:, None]
        mask, row_int64 = (row < rows) & (column < N), row.to(tl.int64)
        grads = tl.load(grad + row_int64 * grad_row + column, mask=mask, other=0.0).to(tl.float32)
        total += grads * tl.load(y + row_int64 * y_row + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row_int64 * N + column, (grads * gain).to(out.dtype.element_ty), mask=mask)
    sum_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + tl.program_id(0) * N + sum_column, tl.sum(total, 0), mask=sum_column < N)


def scale_columns_(x: Tensor, gains: Tensor) -> Tensor:
    """Compute eager.scale_columns_. The rows of x must be contiguous."""
    assert x.stride(1) == 1 or x.shape[1] == 1
    constants = _piece_constants(x.shape[1])
    launch(_scale, (len(x), -(-x.shape[1] // constants["BLOCK"])), x, x, gains.contiguous(), x.stride(0), **constants)
    return x


def scale_columns_backward(grad: Tensor, y: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """Compute eager.scale_columns_backward. The sums are deterministic."""
    grads, values, n = as_rows(grad), as_rows(y), grad.shape[1]
    out, block = grads.new_empty(len(grads), n), min(COLUMNS, next_power_of_2(n))
    parts = -(-len(grads) // LONG)
    sums = torch.empty(parts, n, device=grads.device)
    constants = {"N": n, "LONG": LONG, "ROWS": TILE // COLUMNS, "BLOCK": block, "num_warps": 8}
    strides = len(grads), grads.stride(0), values.stride(0)
    grid = parts, -(-n // block)
    launch(_scale_backward, grid, grads, grads, values, gains.contiguous(), out, sums, *strides, **constants)
    return out, sums.sum(0)


@device_function
def _cap(x: tensor, softcap: tensor, CAPPED: constexpr) -> tensor:
    """Return softcap * tanh(x / softcap) and its derivative, with tanh computed from an exp that cannot overflow."""
    slope = 1.0
    if CAPPED:
        exp = tl.exp(-2.0 * tl.abs(x) / softcap)
        tanh = (1.0 - exp) / (1.0 + exp)
        x = tl.where(x < 0, -softcap, softcap) * tanh
        slope = 1.0 - tanh * tanh
    return x, slope


@kernel()
def _cross_entropy(
    logits: tensor, labels: tensor, weights: tensor, losses: tensor, row_stride: tensor, softcap: tensor,
    N: constexpr, CAPPED: constexpr, GRADIENT: constexpr, BLOCK: constexpr, LOWEST: constexpr,
) -> None:  # fmt: skip
    """Compute the loss and gradient of a row, with an online softmax (Milakov and Gimelshein, arXiv:1805.02867)."""
    row = tl.program_id(0)
    row_logits = logits + row.to(tl.int64) * row_stride
    label, weight = tl.load(labels + row), tl.load(weights + row).to(tl.float32)
    label_logit, _ = _cap(tl.load(row_logits + label).to(tl.float32), softcap, CAPPED)
    maximum, total = LOWEST, 0.0
    for begin in range(0, N, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        x = tl.load(row_logits + column, mask=column < N, other=float("-inf")).to(tl.float32)
        x, _ = _cap(x, softcap, CAPPED)
        x = tl.where(column < N, x, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(x, 0))
        total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(x - new_maximum), 0)
        maximum = new_maximum
    logsumexp = maximum + tl.log(total)
    tl.store(losses + row, (logsumexp - label_logit) * weight)
    if GRADIENT:
        for begin in range(0, N, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            x = tl.load(row_logits + column, mask=column < N, other=0.0).to(tl.float32)
            x, slope = _cap(x, softcap, CAPPED)
            result = (tl.exp(x - logsumexp) - tl.where(column == label, 1.0, 0.0)) * weight * slope
            tl.store(row_logits + column, result.to(logits.dtype.element_ty), mask=column < N)


def cross_entropy_(logits: Tensor, labels: Tensor, weights: Tensor, softcap: float, gradient: bool) -> Tensor:
    """Compute eager.cross_entropy_. The logits are read twice and written once."""
    assert logits.stride(1) == 1 or logits.shape[1] == 1, "the rows of logits must be contiguous"
    losses = torch.empty(len(logits), device=logits.device)
    block = min(LOGITS, next_power_of_2(logits.shape[1]))
    constants = {"N": logits.shape[1], "CAPPED": softcap != 0, "GRADIENT": gradient, "BLOCK": block, "LOWEST": LOWEST}
    launch(
        _cross_entropy, (len(logits),), logits, logits, labels.contiguous(), weights.contiguous(), losses,
        logits.stride(0), softcap, num_warps=max(1, min(16, block // 512)), **constants,
    )  # fmt: skip
    return losses
