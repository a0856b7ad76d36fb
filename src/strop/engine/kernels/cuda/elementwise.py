"""Element-wise operations of eager.py as Triton kernels; those of attention, which GPUs do not use, are PyTorch's."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from strop.engine.kernels.cuda.launch import device_function, kernel, launch, next_power_of_2, rows_of, warps_for
from strop.engine.kernels.eager import from_heads as from_heads
from strop.engine.kernels.eager import softmax_ as softmax_
from strop.engine.kernels.eager import softmax_backward_ as softmax_backward_
from strop.engine.kernels.eager import to_heads as to_heads

TILE = 2048  # elements of short rows that a program takes together
PIECE = 1024  # columns of a row a program, where elements are independent
LONG, COLUMNS = 256, 128  # rows and columns a program, where rows are summed
LOGITS = 8192  # logits that a program reads at once
LOWEST = -3.4028234663852886e38


@kernel(unspecialized=("rows",))
def _norm(
    x: tensor, weight: tensor, out: tensor, rows: tensor, x_row: tensor, out_row: tensor, eps: tensor, offset: tensor,
    N: constexpr, ROWS: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < N)
    values = tl.load(x + row.to(tl.int64) * x_row + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32) + offset
    rstd = tl.rsqrt(tl.sum(values * values, 1) / N + eps)[:, None]
    tl.store(out + row.to(tl.int64) * out_row + column, (values * rstd * scale).to(out.dtype.element_ty), mask=inside)


@kernel(unspecialized=("rows",))
def _norm_backward(
    grad: tensor, x: tensor, weight: tensor, out: tensor, rows: tensor, grad_row: tensor, x_row: tensor,
    out_row: tensor, eps: tensor, offset: tensor,
    N: constexpr, ROWS: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < N)
    values = tl.load(x + row.to(tl.int64) * x_row + column, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(grad + row.to(tl.int64) * grad_row + column, mask=inside, other=0.0).to(tl.float32)
    weighted = upstream * (tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32) + offset)
    rstd = tl.rsqrt(tl.sum(values * values, 1) / N + eps)[:, None]
    normed = values * rstd
    result = rstd * (weighted - normed * (tl.sum(weighted * normed, 1) / N)[:, None])
    tl.store(out + row.to(tl.int64) * out_row + column, result.to(out.dtype.element_ty), mask=inside)


def _shape(n: int) -> dict[str, int]:
    block = next_power_of_2(n)
    rows = max(1, TILE // block)
    return {"N": n, "ROWS": rows, "BLOCK": block, "num_warps": warps_for(rows * block)}


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None = None) -> Tensor:
    """Compute eager.rms_norm, into `out` if given."""
    values = rows_of(x)
    out = x.new_empty(x.shape) if out is None else out
    to, shape = rows_of(out), _shape(x.shape[-1])
    grid = (-(-len(values) // shape["ROWS"]),)
    launch(_norm, grid, x, values, weight, to, len(values), values.stride(0), to.stride(0), eps, offset, **shape)
    return out


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Compute eager.rms_norm_backward, into `out` if given, which may be `grad`."""
    values, grads = rows_of(x), rows_of(grad)
    out = x.new_empty(x.shape) if out is None else out
    to, shape = rows_of(out), _shape(x.shape[-1])
    rows = len(values), grads.stride(0), values.stride(0), to.stride(0)
    grid = (-(-len(values) // shape["ROWS"]),)
    launch(_norm_backward, grid, x, grads, values, weight, to, *rows, eps, offset, **shape)
    return out


@device_function
def _activated(x: tensor, GELU: constexpr) -> tensor:
    """Return the activation of x and its derivative, as eager._activate."""
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
    inside = column < N
    gate = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_row + N + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activated(gate, GELU)
    tl.store(out + row * N + column, (value * up).to(out.dtype.element_ty), mask=inside)


@kernel()
def _glu_backward(
    grad: tensor, x: tensor, to: tensor, out: tensor, grad_row: tensor, x_row: tensor,
    N: constexpr, GELU: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    gate = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_row + N + column, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(grad + row * grad_row + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activated(gate, GELU)
    kind = out.dtype.element_ty
    tl.store(to + row * 2 * N + column, (wide * up * slope).to(kind), mask=inside)
    tl.store(to + row * 2 * N + N + column, (wide * value).to(kind), mask=inside)
    tl.store(out + row * N + column, (value * up).to(kind), mask=inside)


def _gelu(activation: str) -> bool:
    assert activation in ("silu", "gelu_pytorch_tanh"), activation
    return activation == "gelu_pytorch_tanh"


def _piece(n: int) -> dict[str, int]:
    block = min(PIECE, next_power_of_2(n))
    return {"N": n, "BLOCK": block, "num_warps": warps_for(block)}


def glu(gate_up: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """Compute eager.glu of gate_up (T, 2 n), into `out` (T, n), contiguous, if given."""
    x, n = rows_of(gate_up), gate_up.shape[1] // 2
    out, shape = x.new_empty(len(x), n) if out is None else out, _piece(n)
    launch(_glu, (len(x), -(-n // shape["BLOCK"])), x, x, out, x.stride(0), GELU=_gelu(activation), **shape)
    return out


def glu_backward(grad: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Compute eager.glu_backward."""
    x, grads, n = rows_of(gate_up), rows_of(grad), gate_up.shape[1] // 2
    to, out, shape = x.new_empty(len(x), 2 * n), x.new_empty(len(x), n), _piece(n)
    grid = len(x), -(-n // shape["BLOCK"])
    launch(_glu_backward, grid, x, grads, x, to, out, grads.stride(0), x.stride(0), GELU=_gelu(activation), **shape)
    return to, out


@kernel()
def _scale(x: tensor, gains: tensor, x_row: tensor, N: constexpr, BLOCK: constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    values = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(gains + column, mask=inside, other=0.0)
    tl.store(x + row * x_row + column, (values * gain).to(x.dtype.element_ty), mask=inside)


@kernel(unspecialized=("rows",))
def _scale_backward(
    grad: tensor, y: tensor, gains: tensor, out: tensor, sums: tensor, rows: tensor, grad_row: tensor, y_row: tensor,
    N: constexpr, LONG: constexpr, ROWS: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """Scale LONG rows, ROWS at a time, and write the sum of grad times y over them to a row of `sums`."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    gain = tl.load(gains + column, mask=column < N, other=0.0)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, LONG, ROWS):
        row = tl.program_id(0) * LONG + first + tl.arange(0, ROWS)[:, None]
        inside, far = (row < rows) & (column < N), row.to(tl.int64)
        upstream = tl.load(grad + far * grad_row + column, mask=inside, other=0.0).to(tl.float32)
        total += upstream * tl.load(y + far * y_row + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + far * N + column, (upstream * gain).to(out.dtype.element_ty), mask=inside)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + tl.program_id(0) * N + place, tl.sum(total, 0), mask=place < N)


def scale_columns_(x: Tensor, gains: Tensor) -> Tensor:
    """Compute eager.scale_columns_; the elements of a row of x (T, n) are contiguous."""
    assert x.stride(1) == 1 or x.shape[1] == 1
    shape = _piece(x.shape[1])
    launch(_scale, (len(x), -(-x.shape[1] // shape["BLOCK"])), x, x, gains.contiguous(), x.stride(0), **shape)
    return x


def scale_columns_backward(grad: Tensor, y: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """Compute eager.scale_columns_backward; the order of the sum is the same each time."""
    grads, values, n = rows_of(grad), rows_of(y), grad.shape[1]
    out, block = grads.new_empty(len(grads), n), min(COLUMNS, next_power_of_2(n))
    parts = -(-len(grads) // LONG)
    sums = torch.empty(parts, n, device=grads.device)
    shape = {"N": n, "LONG": LONG, "ROWS": TILE // COLUMNS, "BLOCK": block, "num_warps": 8}
    strides = len(grads), grads.stride(0), values.stride(0)
    grid = parts, -(-n // block)
    launch(_scale_backward, grid, grads, grads, values, gains.contiguous(), out, sums, *strides, **shape)
    return out, sums.sum(0)


@device_function
def _cap(x: tensor, softcap: tensor, CAPPED: constexpr) -> tensor:
    """Return softcap * tanh(x / softcap) and its derivative; tanh by an exp that does not overflow."""
    slope = 1.0
    if CAPPED:
        e = tl.exp(-2.0 * tl.abs(x) / softcap)
        t = (1.0 - e) / (1.0 + e)
        x = tl.where(x < 0, -softcap, softcap) * t
        slope = 1.0 - t * t
    return x, slope


@kernel()
def _cross_entropy(
    logits: tensor, labels: tensor, weights: tensor, losses: tensor, row_stride: tensor, softcap: tensor,
    N: constexpr, CAPPED: constexpr, GRADIENT: constexpr, BLOCK: constexpr, LOWEST: constexpr,
) -> None:  # fmt: skip
    """Compute a row's loss and gradient; maximum and sum in one pass (Milakov and Gimelshein, arXiv:1805.02867)."""
    row = tl.program_id(0)
    at = logits + row.to(tl.int64) * row_stride
    label, weight = tl.load(labels + row), tl.load(weights + row).to(tl.float32)
    own, _ = _cap(tl.load(at + label).to(tl.float32), softcap, CAPPED)
    greatest, total = LOWEST, 0.0
    for begin in range(0, N, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        x = tl.load(at + column, mask=column < N, other=float("-inf")).to(tl.float32)
        x, _ = _cap(x, softcap, CAPPED)
        x = tl.where(column < N, x, float("-inf"))
        higher = tl.maximum(greatest, tl.max(x, 0))
        total = total * tl.exp(greatest - higher) + tl.sum(tl.exp(x - higher), 0)
        greatest = higher
    across = greatest + tl.log(total)
    tl.store(losses + row, (across - own) * weight)
    if GRADIENT:
        for begin in range(0, N, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            x = tl.load(at + column, mask=column < N, other=0.0).to(tl.float32)
            x, slope = _cap(x, softcap, CAPPED)
            result = (tl.exp(x - across) - tl.where(column == label, 1.0, 0.0)) * weight * slope
            tl.store(at + column, result.to(logits.dtype.element_ty), mask=column < N)


def cross_entropy_(logits: Tensor, labels: Tensor, weights: Tensor, softcap: float, gradient: bool) -> Tensor:
    """Compute eager.cross_entropy_: a row of logits a program, read twice and written once, without a copy."""
    assert logits.stride(1) == 1 or logits.shape[1] == 1, "the logits of a row are contiguous"
    losses = torch.empty(len(logits), device=logits.device)
    block = min(LOGITS, next_power_of_2(logits.shape[1]))
    constants = {"N": logits.shape[1], "CAPPED": softcap != 0, "GRADIENT": gradient, "BLOCK": block, "LOWEST": LOWEST}
    launch(
        _cross_entropy, (len(logits),), logits, logits, labels.contiguous(), weights.contiguous(), losses,
        logits.stride(0), softcap, num_warps=max(1, min(16, block // 512)), **constants,
    )  # fmt: skip
    return losses
