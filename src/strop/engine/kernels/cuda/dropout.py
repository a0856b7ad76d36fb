"""Triton kernels that apply dropout. They generate the same masks as train/dropout.py, without storing them."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from strop.engine.kernels.cuda.launch import as_rows, device_function, kernel, launch, next_power_of_2
from strop.engine.train import dropout
from strop.engine.train.dropout import ROUNDS, DropoutSpec

COUNTERS = 256  # per program, each for eight features of a row
MAX_ADAPTERS = 4  # per launch; no family has more adapters on one input
SIGN = 1 << 31
SCALARS = ("seed", "step", "n0", "n1", "n2", "n3", "l0", "l1", "l2", "l3")


@device_function
def _random_halves(
    counter: tensor, number: tensor, token: tensor, seed: tensor, step: tensor, ROUNDS: constexpr
) -> tensor:
    """Return four tensors, one per Philox word of the counters, with the low and high 16 bits of each word."""
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
    first_counter = tl.program_id(1) * BLOCK
    counters, features = first_counter + tl.arange(0, BLOCK), 2 * first_counter + tl.arange(0, 2 * BLOCK)
    numbers, thresholds = (n0, n1, n2, n3), (l0, l1, l2, l3)
    token = tl.load(tokens + row)
    for number in tl.static_range(ADAPTERS):
        halves = _random_halves(counters, numbers[number], token, seed, step, ROUNDS)
        for word in tl.static_range(4):
            column = 2 * word * COUNT + features
            mask = (features < 2 * COUNT) & (column < N)
            values = tl.load(z + row * z_row + column, mask=mask, other=0.0)
            masked = tl.where(halves[word].to(tl.int32) >= thresholds[number], values, tl.zeros_like(values))
            tl.store(out + row * (ADAPTERS * N) + number * N + column, masked, mask=mask)


@kernel(unspecialized=SCALARS)
def _apply_masks_backward(
    grad: tensor, out: tensor, tokens: tensor, grad_row: tensor, seed: tensor, step: tensor,
    n0: tensor, n1: tensor, n2: tensor, n3: tensor, l0: tensor, l1: tensor, l2: tensor, l3: tensor,
    N: constexpr, COUNT: constexpr, ADAPTERS: constexpr, ROUNDS: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first_counter = tl.program_id(1) * BLOCK
    counters, features = first_counter + tl.arange(0, BLOCK), 2 * first_counter + tl.arange(0, 2 * BLOCK)
    numbers, thresholds = (n0, n1, n2, n3), (l0, l1, l2, l3)
    token = tl.load(tokens + row)
    sums = (
        tl.zeros((2 * BLOCK,), tl.float32), tl.zeros((2 * BLOCK,), tl.float32),
        tl.zeros((2 * BLOCK,), tl.float32), tl.zeros((2 * BLOCK,), tl.float32),
    )  # fmt: skip
    for number in tl.static_range(ADAPTERS):
        a, b, c, d = _random_halves(counters, numbers[number], token, seed, step, ROUNDS)
        s0, s1, s2, s3 = sums
        pointer, threshold = grad + row * grad_row + number * N, thresholds[number]
        sums = (
            s0 + _load_kept(pointer, a, threshold, features, 0, N, COUNT),
            s1 + _load_kept(pointer, b, threshold, features, 1, N, COUNT),
            s2 + _load_kept(pointer, c, threshold, features, 2, N, COUNT),
            s3 + _load_kept(pointer, d, threshold, features, 3, N, COUNT),
        )
    for word in tl.static_range(4):
        column = 2 * word * COUNT + features
        mask = (features < 2 * COUNT) & (column < N)
        tl.store(out + row * N + column, sums[word].to(out.dtype.element_ty), mask=mask)


@device_function
def _load_kept(
    pointer: tensor, halves: tensor, threshold: tensor, features: tensor, word: constexpr, N: constexpr,
    COUNT: constexpr,
) -> tensor:  # fmt: skip
    column = 2 * word * COUNT + features
    values = tl.load(pointer + column, mask=(features < 2 * COUNT) & (column < N), other=0.0).to(tl.float32)
    return tl.where(halves.to(tl.int32) >= threshold, values, 0.0)


def apply_masks(z: Tensor, dropped: DropoutSpec) -> Tensor:
    if len(dropped.adapter_numbers) > MAX_ADAPTERS:
        return dropout.apply_masks(z, dropped)
    x = as_rows(z)
    out = x.new_empty(len(x), len(dropped.adapter_numbers) * x.shape[1])
    return _launch(_apply_masks, x, out, x.shape[1], dropped)


def apply_masks_backward(grad: Tensor, dropped: DropoutSpec) -> Tensor:
    if len(dropped.adapter_numbers) > MAX_ADAPTERS:
        return dropout.apply_masks_backward(grad, dropped)
    values = as_rows(grad)
    out = values.new_empty(len(values), values.shape[1] // len(dropped.adapter_numbers))
    return _launch(_apply_masks_backward, values, out, out.shape[1], dropped)


def _launch(mask_kernel: Any, x: Tensor, out: Tensor, n: int, dropped: DropoutSpec) -> Tensor:
    adapters, count = len(dropped.adapter_numbers), -(-n // 8)
    block = min(COUNTERS, next_power_of_2(count))
    padding = [0] * (MAX_ADAPTERS - adapters)
    # Signed, because Triton would compile another kernel for integers of more than 31 bits.
    key = [(value ^ SIGN) - SIGN for value in (dropped.seed, dropped.step)]
    scalars = [*key, *dropped.adapter_numbers, *padding, *dropped.thresholds, *padding]
    constants = {"N": n, "COUNT": count, "ADAPTERS": adapters, "ROUNDS": ROUNDS, "BLOCK": block}
    launch(
        mask_kernel, (len(x), -(-count // block)), x, x, out, dropped.token_keys.contiguous(), x.stride(0), *scalars,
        num_warps=max(1, block // 128), **constants,
    )  # fmt: skip
    return out
