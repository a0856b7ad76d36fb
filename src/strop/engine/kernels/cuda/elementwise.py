"""The element-wise operations of eager.py (`functions.Ops`) as a card's own kernels, where it pays; the others are
PyTorch's."""

from __future__ import annotations

from strop.engine.kernels.cuda.elementwise import (
    cross_entropy_,
    glu,
    glu_backward,
    rms_norm,
    rms_norm_backward,
    scale_columns_,
    scale_columns_backward,
)
from strop.engine.kernels.eager import (  # attention's, which cards do otherwise
    from_heads,
    softmax_,
    softmax_backward_,
    to_heads,
)

__all__ = ["cross_entropy_", "from_heads", "glu", "glu_backward", "rms_norm", "rms_norm_backward"]
__all__ += ["scale_columns_", "scale_columns_backward", "softmax_", "softmax_backward_", "to_heads"]


# ---- from strop.engine.kernels.cuda.norms ----
"""RMSNorm, gated activations and DoRA's gains on a card: a row, or a piece of one, a program."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from strop.engine.kernels.cuda.launch import kernel, part, power, rows_of, start, warps

TILE = 2048  # numbers of short rows that a program takes together
PIECE = 1024  # columns of a row a program, where numbers do not know of each other
LONG, COLUMNS = 256, 128  # rows and columns a program, where rows are added up


@kernel(free=("rows",))
def _norm(
    x: tensor, weight: tensor, out: tensor, rows: tensor, x_row: tensor, out_row: tensor, eps: tensor, offset: tensor,
    N: constexpr, ROWS: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    there = (row < rows) & (column < N)
    of = tl.load(x + row.to(tl.int64) * x_row + column, mask=there, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32) + offset
    rstd = tl.rsqrt(tl.sum(of * of, 1) / N + eps)[:, None]
    tl.store(out + row.to(tl.int64) * out_row + column, (of * rstd * scale).to(out.dtype.element_ty), mask=there)


@kernel(free=("rows",))
def _norm_backward(
    grad: tensor, x: tensor, weight: tensor, out: tensor, rows: tensor, grad_row: tensor, x_row: tensor,
    out_row: tensor, eps: tensor, offset: tensor,
    N: constexpr, ROWS: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    there = (row < rows) & (column < N)
    of = tl.load(x + row.to(tl.int64) * x_row + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(grad + row.to(tl.int64) * grad_row + column, mask=there, other=0.0).to(tl.float32)
    weighted = up * (tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32) + offset)
    rstd = tl.rsqrt(tl.sum(of * of, 1) / N + eps)[:, None]
    normed = of * rstd
    result = rstd * (weighted - normed * (tl.sum(weighted * normed, 1) / N)[:, None])
    tl.store(out + row.to(tl.int64) * out_row + column, result.to(out.dtype.element_ty), mask=there)


def _shape(n: int) -> dict[str, int]:
    block = power(n)
    rows = max(1, TILE // block)
    return {"N": n, "ROWS": rows, "BLOCK": block, "num_warps": warps(rows * block)}


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None = None) -> Tensor:
    """As eager.rms_norm; `out` is used where it is given."""
    of = rows_of(x)
    out = x.new_empty(x.shape) if out is None else out
    to, shape = rows_of(out), _shape(x.shape[-1])
    grid = (-(-len(of) // shape["ROWS"]),)
    start(_norm, grid, x, of, weight, to, len(of), of.stride(0), to.stride(0), eps, offset, **shape)
    return out


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """As eager.rms_norm_backward; out: may be `grad`."""
    of, up = rows_of(x), rows_of(grad)
    out = x.new_empty(x.shape) if out is None else out
    to, shape = rows_of(out), _shape(x.shape[-1])
    rows = len(of), up.stride(0), of.stride(0), to.stride(0)
    start(_norm_backward, (-(-len(of) // shape["ROWS"]),), x, up, of, weight, to, *rows, eps, offset, **shape)
    return out


@part
def _activated(x: tensor, GELU: constexpr) -> tensor:
    """eager._activate: x sigmoid(z), and its slope."""
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
    there = column < N
    gate = tl.load(x + row * x_row + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_row + N + column, mask=there, other=0.0).to(tl.float32)
    value, _ = _activated(gate, GELU)
    tl.store(out + row * N + column, (value * up).to(out.dtype.element_ty), mask=there)


@kernel()
def _glu_backward(
    grad: tensor, x: tensor, to: tensor, out: tensor, grad_row: tensor, x_row: tensor,
    N: constexpr, GELU: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < N
    gate = tl.load(x + row * x_row + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_row + N + column, mask=there, other=0.0).to(tl.float32)
    wide = tl.load(grad + row * grad_row + column, mask=there, other=0.0).to(tl.float32)
    value, slope = _activated(gate, GELU)
    kind = out.dtype.element_ty
    tl.store(to + row * 2 * N + column, (wide * up * slope).to(kind), mask=there)
    tl.store(to + row * 2 * N + N + column, (wide * value).to(kind), mask=there)
    tl.store(out + row * N + column, (value * up).to(kind), mask=there)


def _gelu(activation: str) -> bool:
    assert activation in ("silu", "gelu_pytorch_tanh"), activation
    return activation == "gelu_pytorch_tanh"


def _piece(n: int) -> dict[str, int]:
    block = min(PIECE, power(n))
    return {"N": n, "BLOCK": block, "num_warps": warps(block)}


def glu(gate_up: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """As eager.glu; gate_up (T, 2 I); `out`, (T, I) without gaps, is used where it is given."""
    x, n = rows_of(gate_up), gate_up.shape[1] // 2
    out, shape = x.new_empty(len(x), n) if out is None else out, _piece(n)
    start(_glu, (len(x), -(-n // shape["BLOCK"])), x, x, out, x.stride(0), GELU=_gelu(activation), **shape)
    return out


def glu_backward(grad: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """As eager.glu_backward."""
    x, up, n = rows_of(gate_up), rows_of(grad), gate_up.shape[1] // 2
    to, out, shape = x.new_empty(len(x), 2 * n), x.new_empty(len(x), n), _piece(n)
    grid = len(x), -(-n // shape["BLOCK"])
    start(_glu_backward, grid, x, up, x, to, out, up.stride(0), x.stride(0), GELU=_gelu(activation), **shape)
    return to, out


@kernel()
def _scale(x: tensor, gains: tensor, x_row: tensor, N: constexpr, BLOCK: constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < N
    of = tl.load(x + row * x_row + column, mask=there, other=0.0).to(tl.float32)
    gain = tl.load(gains + column, mask=there, other=0.0)
    tl.store(x + row * x_row + column, (of * gain).to(x.dtype.element_ty), mask=there)


@kernel(free=("rows",))
def _scale_backward(
    grad: tensor, y: tensor, gains: tensor, out: tensor, sums: tensor, rows: tensor, grad_row: tensor, y_row: tensor,
    N: constexpr, LONG: constexpr, ROWS: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """LONG rows, ROWS of them at a time; sums gets what they add to grad times y."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    gain = tl.load(gains + column, mask=column < N, other=0.0)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, LONG, ROWS):
        row = tl.program_id(0) * LONG + first + tl.arange(0, ROWS)[:, None]
        there, far = (row < rows) & (column < N), row.to(tl.int64)
        up = tl.load(grad + far * grad_row + column, mask=there, other=0.0).to(tl.float32)
        total += up * tl.load(y + far * y_row + column, mask=there, other=0.0).to(tl.float32)
        tl.store(out + far * N + column, (up * gain).to(out.dtype.element_ty), mask=there)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + tl.program_id(0) * N + place, tl.sum(total, 0), mask=place < N)


def scale_columns_(x: Tensor, gains: Tensor) -> Tensor:
    """As eager.scale_columns_; x (T, n) with its numbers side by side in each row."""
    assert x.stride(1) == 1 or x.shape[1] == 1
    shape = _piece(x.shape[1])
    start(_scale, (len(x), -(-x.shape[1] // shape["BLOCK"])), x, x, gains.contiguous(), x.stride(0), **shape)
    return x


def scale_columns_backward(grad: Tensor, y: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """As eager.scale_columns_backward; the sum in the same order each time."""
    up, of, n = rows_of(grad), rows_of(y), grad.shape[1]
    out, block = up.new_empty(len(up), n), min(COLUMNS, power(n))
    parts = -(-len(up) // LONG)
    sums = torch.empty(parts, n, device=up.device)
    shape = {"N": n, "LONG": LONG, "ROWS": TILE // COLUMNS, "BLOCK": block, "num_warps": 8}
    strides = len(up), up.stride(0), of.stride(0)
    start(_scale_backward, (parts, -(-n // block)), up, up, of, gains.contiguous(), out, sums, *strides, **shape)
    return out, sums.sum(0)


# ---- from strop.engine.kernels.cuda.loss ----
"""Cross entropy on a card: a row of logits a program, read twice and written once, with no copy of it."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from strop.engine.kernels.cuda.launch import kernel, part, power, start

BLOCK = 8192  # logits at once
LOWEST = -3.4028234663852886e38


@part
def _bent(x: tensor, softcap: tensor, CAPPED: constexpr) -> tensor:
    """softcap tanh(x / softcap), and its slope; tanh by exp, which does not overflow."""
    slope = 1.0
    if CAPPED:
        e = tl.exp(-2.0 * tl.abs(x) / softcap)
        bent = (1.0 - e) / (1.0 + e)
        x = tl.where(x < 0, -softcap, softcap) * bent
        slope = 1.0 - bent * bent
    return x, slope


@kernel()
def _cross_entropy(
    logits: tensor, labels: tensor, weights: tensor, losses: tensor, row_stride: tensor, softcap: tensor,
    N: constexpr, CAPPED: constexpr, GRADIENT: constexpr, BLOCK: constexpr, LOWEST: constexpr,
) -> None:  # fmt: skip
    """The greatest logit and the sum of exponentials in one pass (Milakov and Gimelshein, arXiv:1805.02867)."""
    row = tl.program_id(0)
    at = logits + row.to(tl.int64) * row_stride
    label, weight = tl.load(labels + row), tl.load(weights + row).to(tl.float32)
    own, _ = _bent(tl.load(at + label).to(tl.float32), softcap, CAPPED)
    greatest, total = LOWEST, 0.0
    for begin in range(0, N, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        x = tl.load(at + column, mask=column < N, other=float("-inf")).to(tl.float32)
        x, _ = _bent(x, softcap, CAPPED)
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
            x, slope = _bent(x, softcap, CAPPED)
            result = (tl.exp(x - across) - tl.where(column == label, 1.0, 0.0)) * weight * slope
            tl.store(at + column, result.to(logits.dtype.element_ty), mask=column < N)


def cross_entropy_(logits: Tensor, labels: Tensor, weights: Tensor, softcap: float, gradient: bool) -> Tensor:
    """As eager.cross_entropy_."""
    assert logits.stride(1) == 1 or logits.shape[1] == 1, "the logits of a row lie side by side"
    losses = torch.empty(len(logits), device=logits.device)
    block = min(BLOCK, power(logits.shape[1]))
    constants = {"N": logits.shape[1], "CAPPED": softcap != 0, "GRADIENT": gradient, "BLOCK": block, "LOWEST": LOWEST}
    start(
        _cross_entropy, (len(logits),), logits, logits, labels.contiguous(), weights.contiguous(), losses,
        logits.stride(0), softcap, num_warps=max(1, min(16, block // 512)), **constants,
    )  # fmt: skip
    return losses
