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
