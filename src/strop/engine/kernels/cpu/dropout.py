"""Compiled CPU kernels for dropout that generate masks on the fly, bit-identical to train/dropout.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from strop.engine.kernels.cpu.compiled import GAP, TASKS, array, from_fp32, kernel, subroutine, to_fp32
from strop.engine.train.dropout import LOW, MULTIPLIERS, WEYL, DropoutSpec

LOW_32_BITS, HALF = np.uint64(LOW), np.uint64(32)
M0, M1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
W0, W1 = np.uint64(WEYL[0]), np.uint64(WEYL[1])


@subroutine
def _round(a: Any, b: Any, c: Any, d: Any, key0: Any, key1: Any) -> Any:
    """Compute one round of Philox on 32-bit values stored in uint64.

    `& LOW_32_BITS` tells LLVM that the upper bits are zero, which makes it 3 times as fast.
    """
    first, second = a * M0, c * M1
    return (second >> HALF) ^ b ^ key0, second & LOW_32_BITS, (first >> HALF) ^ d ^ key1, first & LOW_32_BITS


@subroutine
def _random_words(seed: Any, step: Any, adapter_number: Any, token: Any, out: Any) -> None:
    """Write the random words of one row and adapter: the first words of all counters, then the second words, ..."""
    count = len(out) // 4
    k, q = np.uint64(seed) & LOW_32_BITS, np.uint64(step) & LOW_32_BITS
    k1, q1 = (k + W0) & LOW_32_BITS, (q + W1) & LOW_32_BITS
    k2, q2 = (k1 + W0) & LOW_32_BITS, (q1 + W1) & LOW_32_BITS
    k3, q3 = (k2 + W0) & LOW_32_BITS, (q2 + W1) & LOW_32_BITS
    k4, q4 = (k3 + W0) & LOW_32_BITS, (q3 + W1) & LOW_32_BITS
    k5, q5 = (k4 + W0) & LOW_32_BITS, (q4 + W1) & LOW_32_BITS
    k6, q6 = (k5 + W0) & LOW_32_BITS, (q5 + W1) & LOW_32_BITS
    adapter, low, high = (
        np.uint64(adapter_number) & LOW_32_BITS,
        np.uint64(token) & LOW_32_BITS,
        np.uint64(token) >> HALF,
    )
    first, second, third, fourth = out[:count], out[count : 2 * count], out[2 * count : 3 * count], out[3 * count :]
    for i in range(count):
        a, b, c, d = _round(np.uint64(i) & LOW_32_BITS, adapter, low, high, k, q)
        a, b, c, d = _round(a, b, c, d, k1, q1)
        a, b, c, d = _round(a, b, c, d, k2, q2)
        a, b, c, d = _round(a, b, c, d, k3, q3)
        a, b, c, d = _round(a, b, c, d, k4, q4)
        a, b, c, d = _round(a, b, c, d, k5, q5)
        a, b, c, d = _round(a, b, c, d, k6, q6)
        first[i], second[i], third[i], fourth[i] = np.uint32(a), np.uint32(b), np.uint32(c), np.uint32(d)


@subroutine
def _copy_kept(source: Any, random: Any, threshold: Any, target: Any) -> None:
    for j in range(len(source)):
        target[j] = source[j] if random[j] >= threshold else from_fp32(np.float32(0.0), target)


@subroutine
def _add_kept(source: Any, random: Any, threshold: Any, sums: Any) -> None:
    for j in range(len(source)):
        sums[j] += to_fp32(source[j]) if random[j] >= threshold else np.float32(0.0)


@kernel
def _apply_masks(z: Any, out: Any, seed: Any, step: Any, tokens: Any, adapter_numbers: Any, thresholds: Any) -> None:
    rows, n = z.shape
    for task in prange(TASKS):
        words = np.empty(GAP + (n + 7) // 8 * 4, dtype=np.uint32)[GAP:]  # GAP: see compiled.py
        halves = words.view(np.uint16)
        for i in range(task * rows // TASKS, (task + 1) * rows // TASKS):
            for adapter in range(len(adapter_numbers)):
                _random_words(seed, step, adapter_numbers[adapter], tokens[i], words)
                _copy_kept(z[i], halves, thresholds[adapter], out[i, adapter * n : (adapter + 1) * n])


@kernel
def _apply_masks_backward(
    grad: Any, out: Any, seed: Any, step: Any, tokens: Any, adapter_numbers: Any, thresholds: Any
) -> None:
    rows, n = out.shape
    for task in prange(TASKS):
        words = np.empty(GAP + (n + 7) // 8 * 4, dtype=np.uint32)[GAP:]
        sums = np.empty(GAP + n, dtype=np.float32)[GAP:]
        halves = words.view(np.uint16)
        for i in range(task * rows // TASKS, (task + 1) * rows // TASKS):
            sums[:] = 0
            for adapter in range(len(adapter_numbers)):
                _random_words(seed, step, adapter_numbers[adapter], tokens[i], words)
                _add_kept(grad[i, adapter * n : (adapter + 1) * n], halves, thresholds[adapter], sums)
            target = out[i]
            for j in range(n):
                target[j] = from_fp32(sums[j], out)


def _arguments(dropped: DropoutSpec) -> Any:
    key = np.uint64(dropped.seed), np.uint64(dropped.step)
    return (
        *key,
        array(dropped.token_keys),
        np.array(dropped.adapter_numbers),
        np.array(dropped.thresholds, dtype=np.uint16),
    )


def apply_masks(z: Tensor, dropped: DropoutSpec) -> Tensor:
    out = z.new_empty(len(z), len(dropped.adapter_numbers) * z.shape[1])
    _apply_masks(array(z.contiguous()), array(out), *_arguments(dropped))
    return out


def apply_masks_backward(grad: Tensor, dropped: DropoutSpec) -> Tensor:
    out = torch.empty(len(grad), grad.shape[1] // len(dropped.adapter_numbers), dtype=grad.dtype)
    _apply_masks_backward(array(grad), array(out), *_arguments(dropped))
    return out
