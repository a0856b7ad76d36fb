"""Dropout masks in CUDA kernels; equal bit for bit to engine/train/dropout.py."""

from __future__ import annotations

from collections.abc import Sequence

import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from strop.engine.kernels.cuda.launch import kernel, part, power, rows_of, start
from strop.engine.train import dropout
from strop.engine.train.dropout import ROUNDS, DropoutSpec

COUNTERS = 256  # a program: 2,048 features of a row
MOST = 4  # adapters a launch; no family has more on one input
SIGN = 1 << 31
FREE = ("seed", "step", "n0", "n1", "n2", "n3", "l0", "l1", "l2", "l3")


@part
def _draws(counter: tensor, number: tensor, token: tensor, seed: tensor, step: tensor, ROUNDS: constexpr) -> tensor:
    """The eight draws of each counter, word by word, those of one counter side by side."""
    a = counter.to(tl.uint32)
    b, c, d = a * 0 + number.to(tl.uint32), a * 0 + token.to(tl.uint32), a * 0 + (token >> 32).to(tl.uint32)
    a, b, c, d = tl.philox_impl(a, b, c, d, seed.to(tl.uint32), step.to(tl.uint32), ROUNDS)
    return (
        tl.interleave(a & 0xFFFF, a >> 16),
        tl.interleave(b & 0xFFFF, b >> 16),
        tl.interleave(c & 0xFFFF, c >> 16),
        tl.interleave(d & 0xFFFF, d >> 16),
    )


@kernel(free=FREE)
def _spread(
    z: tensor, out: tensor, tokens: tensor, z_row: tensor, seed: tensor, step: tensor,
    n0: tensor, n1: tensor, n2: tensor, n3: tensor, l0: tensor, l1: tensor, l2: tensor, l3: tensor,
    N: constexpr, COUNT: constexpr, MANY: constexpr, ROUNDS: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    counter, feature = first + tl.arange(0, BLOCK), 2 * first + tl.arange(0, 2 * BLOCK)
    numbers, levels = (n0, n1, n2, n3), (l0, l1, l2, l3)
    token = tl.load(tokens + row)
    for number in tl.static_range(MANY):
        drawn = _draws(counter, numbers[number], token, seed, step, ROUNDS)
        for word in tl.static_range(4):
            at = 2 * word * COUNT + feature
            there = (feature < 2 * COUNT) & (at < N)
            of = tl.load(z + row * z_row + at, mask=there, other=0.0)
            kept = tl.where(drawn[word].to(tl.int32) >= levels[number], of, tl.zeros_like(of))
            tl.store(out + row * (MANY * N) + number * N + at, kept, mask=there)


@kernel(free=FREE)
def _fold(
    grad: tensor, out: tensor, tokens: tensor, grad_row: tensor, seed: tensor, step: tensor,
    n0: tensor, n1: tensor, n2: tensor, n3: tensor, l0: tensor, l1: tensor, l2: tensor, l3: tensor,
    N: constexpr, COUNT: constexpr, MANY: constexpr, ROUNDS: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    counter, feature = first + tl.arange(0, BLOCK), 2 * first + tl.arange(0, 2 * BLOCK)
    numbers, levels = (n0, n1, n2, n3), (l0, l1, l2, l3)
    token = tl.load(tokens + row)
    sums = (
        tl.zeros((2 * BLOCK,), tl.float32), tl.zeros((2 * BLOCK,), tl.float32),
        tl.zeros((2 * BLOCK,), tl.float32), tl.zeros((2 * BLOCK,), tl.float32),
    )  # fmt: skip
    for number in tl.static_range(MANY):
        a, b, c, d = _draws(counter, numbers[number], token, seed, step, ROUNDS)
        s0, s1, s2, s3 = sums
        at, level = grad + row * grad_row + number * N, levels[number]
        sums = (
            s0 + _kept(at, a, level, feature, 0, N, COUNT), s1 + _kept(at, b, level, feature, 1, N, COUNT),
            s2 + _kept(at, c, level, feature, 2, N, COUNT), s3 + _kept(at, d, level, feature, 3, N, COUNT),
        )  # fmt: skip
    for word in tl.static_range(4):
        at = 2 * word * COUNT + feature
        there = (feature < 2 * COUNT) & (at < N)
        tl.store(out + row * N + at, sums[word].to(out.dtype.element_ty), mask=there)


@part
def _kept(
    at: tensor, drawn: tensor, level: tensor, feature: tensor, word: constexpr, N: constexpr, COUNT: constexpr
) -> tensor:
    place = 2 * word * COUNT + feature
    of = tl.load(at + place, mask=(feature < 2 * COUNT) & (place < N), other=0.0).to(tl.float32)
    return tl.where(drawn.to(tl.int32) >= level, of, 0.0)


def apply_masks(z: Tensor, dropped: DropoutSpec, out: Tensor | None = None) -> Tensor:
    """As dropout.spread; `out`, without gaps, is used where it is given."""
    many = len(dropped.numbers)
    if many > MOST:
        return dropout.apply_masks(z, dropped, out)
    x = rows_of(z)
    out = x.new_empty(len(x), many * x.shape[1]) if out is None else out
    shape, scalars = _shape(x.shape[1], many), _scalars(dropped)
    grid = len(x), -(-shape["COUNT"] // shape["BLOCK"])
    start(_spread, grid, x, x, out, dropped.tokens.contiguous(), x.stride(0), *scalars, **shape)
    return out


def apply_masks_backward(grad: Tensor, dropped: DropoutSpec) -> Tensor:
    """As dropout.fold."""
    many = len(dropped.numbers)
    if many > MOST:
        return dropout.apply_masks_backward(grad, dropped)
    of = rows_of(grad)
    out = of.new_empty(len(of), of.shape[1] // many)
    shape, scalars = _shape(out.shape[1], many), _scalars(dropped)
    grid = len(of), -(-shape["COUNT"] // shape["BLOCK"])
    start(_fold, grid, of, of, out, dropped.tokens.contiguous(), of.stride(0), *scalars, **shape)
    return out


def _shape(n: int, many: int) -> dict[str, int]:
    count = -(-n // 8)
    block = min(COUNTERS, power(count))
    return {"N": n, "COUNT": count, "MANY": many, "ROUNDS": ROUNDS, "BLOCK": block, "num_warps": max(1, block // 128)}


def _scalars(dropped: DropoutSpec) -> list[int]:
    """seed and step as 32 bits with a sign, so that no kernel is compiled for the larger ones, numbers and levels."""
    nothing = [0] * (MOST - len(dropped.numbers))

    def signed(n: int) -> int:
        return (n ^ SIGN) - SIGN

    def four(values: Sequence[int]) -> list[int]:
        return [*values, *nothing]

    return [signed(dropped.seed), signed(dropped.step), *four(dropped.numbers), *four(dropped.levels)]
