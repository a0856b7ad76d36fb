"""Dropout as Triton kernels that generate the masks where they are used; bit-identical to train/dropout.py."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from strop.engine.kernels.cuda.launch import device_function, kernel, launch, next_power_of_2, rows_of
from strop.engine.train import dropout
from strop.engine.train.dropout import ROUNDS, DropoutSpec

COUNTERS = 256  # of a program: 2,048 features of a row
MAX_ADAPTERS = 4  # of a launch; no family has more adapters on one input
SIGN = 1 << 31
SCALARS = ("seed", "step", "n0", "n1", "n2", "n3", "l0", "l1", "l2", "l3")


@device_function
def _random_halves(
    counter: tensor, number: tensor, token: tensor, seed: tensor, step: tensor, ROUNDS: constexpr
) -> tensor:
    """Return the eight random 16-bit numbers of each counter, word by word, both halves of a word interleaved."""
    a = counter.to(tl.uint32)
    b, c, d = a * 0 + number.to(tl.uint32), a * 0 + token.to(tl.uint32), a * 0 + (token >> 32).to(tl.uint32)
    a, b, c, d = tl.philox_impl(a, b, c, d, seed.to(tl.uint32), step.to(tl.uint32), ROUNDS)
    return (
        tl.interleave(a & 0xFFFF, a >> 16),
        tl.interleave(b & 0xFFFF, b >> 16),
        tl.interleave(c & 0xFFFF, c >> 16),
        tl.interleave(d & 0xFFFF, d >> 16),
    )


@kernel(unspecialized=SCALARS)
def _apply_masks(
    z: tensor, out: tensor, tokens: tensor, z_row: tensor, seed: tensor, step: tensor,
    n0: tensor, n1: tensor, n2: tensor, n3: tensor, l0: tensor, l1: tensor, l2: tensor, l3: tensor,
    N: constexpr, COUNT: constexpr, ADAPTERS: constexpr, ROUNDS: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    counter, feature = first + tl.arange(0, BLOCK), 2 * first + tl.arange(0, 2 * BLOCK)
    numbers, levels = (n0, n1, n2, n3), (l0, l1, l2, l3)
    token = tl.load(tokens + row)
    for number in tl.static_range(ADAPTERS):
        halves = _random_halves(counter, numbers[number], token, seed, step, ROUNDS)
        for word in tl.static_range(4):
            at = 2 * word * COUNT + feature
            inside = (feature < 2 * COUNT) & (at < N)
            values = tl.load(z + row * z_row + at, mask=inside, other=0.0)
            kept = tl.where(halves[word].to(tl.int32) >= levels[number], values, tl.zeros_like(values))
            tl.store(out + row * (ADAPTERS * N) + number * N + at, kept, mask=inside)


@kernel(unspecialized=SCALARS)
def _apply_masks_backward(
    grad: tensor, out: tensor, tokens: tensor, grad_row: tensor, seed: tensor, step: tensor,
    n0: tensor, n1: tensor, n2: tensor, n3: tensor, l0: tensor, l1: tensor, l2: tensor, l3: tensor,
    N: constexpr, COUNT: constexpr, ADAPTERS: constexpr, ROUNDS: constexpr, BLOCK: constexpr,
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
    for number in tl.static_range(ADAPTERS):
        a, b, c, d = _random_halves(counter, numbers[number], token, seed, step, ROUNDS)
        s0, s1, s2, s3 = sums
        at, level = grad + row * grad_row + number * N, levels[number]
        sums = (
            s0 + _load_kept(at, a, level, feature, 0, N, COUNT), s1 + _load_kept(at, b, level, feature, 1, N, COUNT),
            s2 + _load_kept(at, c, level, feature, 2, N, COUNT), s3 + _load_kept(at, d, level, feature, 3, N, COUNT),
        )  # fmt: skip
    for word in tl.static_range(4):
        at = 2 * word * COUNT + feature
        inside = (feature < 2 * COUNT) & (at < N)
        tl.store(out + row * N + at, sums[word].to(out.dtype.element_ty), mask=inside)


@device_function
def _load_kept(
    at: tensor, halves: tensor, level: tensor, feature: tensor, word: constexpr, N: constexpr, COUNT: constexpr
) -> tensor:
    place = 2 * word * COUNT + feature
    values = tl.load(at + place, mask=(feature < 2 * COUNT) & (place < N), other=0.0).to(tl.float32)
    return tl.where(halves.to(tl.int32) >= level, values, 0.0)


def apply_masks(z: Tensor, dropped: DropoutSpec, out: Tensor | None = None) -> Tensor:
    """Compute dropout.apply_masks, into `out`, contiguous, if given."""
    adapters = len(dropped.numbers)
    if adapters > MAX_ADAPTERS:
        return dropout.apply_masks(z, dropped, out)
    x = rows_of(z)
    out = x.new_empty(len(x), adapters * x.shape[1]) if out is None else out
    shape, scalars = _shape(x.shape[1], adapters), _scalars(dropped)
    grid = len(x), -(-shape["COUNT"] // shape["BLOCK"])
    launch(_apply_masks, grid, x, x, out, dropped.tokens.contiguous(), x.stride(0), *scalars, **shape)
    return out


def apply_masks_backward(grad: Tensor, dropped: DropoutSpec) -> Tensor:
    """Compute dropout.apply_masks_backward."""
    adapters = len(dropped.numbers)
    if adapters > MAX_ADAPTERS:
        return dropout.apply_masks_backward(grad, dropped)
    values = rows_of(grad)
    out = values.new_empty(len(values), values.shape[1] // adapters)
    shape, scalars = _shape(out.shape[1], adapters), _scalars(dropped)
    grid = len(values), -(-shape["COUNT"] // shape["BLOCK"])
    launch(
        _apply_masks_backward,
        grid,
        values,
        values,
        out,
        dropped.tokens.contiguous(),
        values.stride(0),
        *scalars,
        **shape,
    )
    return out


def _shape(n: int, adapters: int) -> dict[str, int]:
    count = -(-n // 8)
    block = min(COUNTERS, next_power_of_2(count))
    warps = max(1, block // 128)
    return {"N": n, "COUNT": count, "ADAPTERS": adapters, "ROUNDS": ROUNDS, "BLOCK": block, "num_warps": warps}


def _scalars(dropped: DropoutSpec) -> list[int]:
    """Return seed, step, numbers and levels; 32-bit values are signed, so that large ones need no further kernel."""
    padding = [0] * (MAX_ADAPTERS - len(dropped.numbers))
    key = [(n ^ SIGN) - SIGN for n in (dropped.seed, dropped.step)]
    return [*key, *dropped.numbers, *padding, *dropped.levels, *padding]
