"""Compiled CPU kernels for logits: argmax, log-probabilities and sampling.

`find_candidates` helps to find the argmax without reading the whole output head. Let w be a row of the head, v the row
quantized to 8 bits and z a hidden state. The logit w z and its estimate v z differ by at most |w - v| |z|
(Cauchy-Schwarz). Only the few rows whose logit can be the greatest are then computed exactly. The result is exact, and
half as many bytes are read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from strop.engine.kernels.cpu.compiled import exp, kernel, kernel_sequence, maximum, subroutine, to_fp32
from strop.engine.kernels.cpu.decode_matmul import (
    USES_AMX,
    Dense,
    Quantized,
    dense_matmul,
    int8_matmul,
    quantized_matmul,
)
from strop.engine.kernels.cpu.dots import LANES
from strop.engine.kernels.cpu.int8_dots import INT8_DOTS, quantize_rows, supports_width

__all__ = [
    "INT8_DOTS", "LANES", "MAX_CANDIDATES", "USES_AMX", "Dense", "Quantized", "argmax_rows", "dense_matmul",
    "find_candidates", "int8_matmul", "quantize_rows", "quantized_matmul", "sample", "supports_width",
    "token_logprobs",
]  # fmt: skip

_SIGNLESS, _INFINITE = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_LOWEST = np.float32(-3e38)
_SUM_BLOCK = 512  # elements that are summed in fp32 before they are added to an fp64 total
_INITIAL_DEPTH = 12.0  # `sample` first sorts the tokens whose scaled logit is at most this far below the greatest
MAX_CANDIDATES = 512  # with more candidates, the logits of all rows are computed
_MAX_BLOCK = 256  # logits that are skipped together if their maximum is too low
_NORM_MARGIN = np.float32(1.001)  # covers the rounding error of a computed norm


@kernel
def argmax_rows(logits: Any, indices: Any, finite: Any) -> None:
    """Write the index of the first greatest logit of each row of logits (P, n), fp32, and whether the row is valid.

    A valid row has a finite logit and neither NaN nor +infinity.
    """
    bits = logits.view(np.uint32)  # with fastmath, LLVM may assume that float values are finite
    for i in prange(len(logits)):
        row, best, best_index, invalid = logits[i], logits[i, 0], 0, False
        for j in range(1, len(row)):
            if row[j] > best:
                best, best_index = row[j], j
        for j in range(len(row)):
            invalid |= (bits[i, j] & _SIGNLESS) > _INFINITE or bits[i, j] == _INFINITE
        indices[i] = best_index
        finite[i] = not invalid and best > _LOWEST


@subroutine
def _sum_exp(row: Any, top: Any, scale: Any) -> Any:
    total = 0.0
    for j in range(len(row)):
        total += np.exp((np.float64(row[j]) - top) * scale)
    return total


@kernel
def token_logprobs(logits: Any, tokens: Any, logprobs: Any) -> None:
    """Write log softmax(logits)[token] for each row of logits (P, n) fp32 to logprobs (P,) fp64."""
    n = logits.shape[1]
    for i in prange(len(logits)):
        row, top, total = logits[i], logits[i, 0], 0.0
        for j in range(1, n):
            top = maximum(top, row[j])
        for begin in range(0, n, _SUM_BLOCK):
            part = np.float32(0.0)
            for j in range(begin, min(n, begin + _SUM_BLOCK)):
                part += exp(row[j] - top)
            total += np.float64(part)
        logprobs[i] = np.float64(row[tokens[i]]) - np.float64(top) - np.log(total)


@kernel_sequence
def sample(row: Any, temperature: Any, top_k: Any, top_p: Any, u: Any) -> Any:
    """Sample a token of logits (n,) from softmax(row / temperature).

    top_k: sample among the k most likely tokens (0: all). top_p: keep the smallest set of these tokens whose
    probabilities sum to top_p (arXiv:1904.09751). u: a random number from [0, 1).
    """
    n, scale = len(row), 1.0 / temperature
    top = np.float64(row.max())
    mass = _sum_exp(row, top, scale)
    if top_k <= 0 and top_p >= 1.0:
        remaining = u * mass
        last = 0
        for j in range(n):
            p = np.exp((np.float64(row[j]) - top) * scale)
            if p > 0.0:
                last = j
                remaining -= p
                if remaining < 0.0:
                    return j
        return last
    # Sort only the tokens near the greatest logit, and lower the threshold until there are enough of them.
    depth, max_tokens = _INITIAL_DEPTH, n if top_k <= 0 else min(top_k, n)
    while True:
        floor = top - depth / scale
        candidates = np.nonzero(row >= floor)[0] if depth < 1e6 else np.arange(n)
        values = row[candidates]
        order = np.argsort(-values, kind="mergesort")
        weights = np.exp((values[order].astype(np.float64) - top) * scale)
        enough = len(candidates) == n or (len(candidates) >= max_tokens if top_k > 0 else weights.sum() >= top_p * mass)
        if enough:
            break
        depth = depth * 4.0 if depth < 1e5 else 1e7
    limit = min(len(order), max_tokens)
    kept_mass = weights[:limit].sum() if top_k > 0 else mass
    before, count = 0.0, 0
    while count < limit and before < top_p * kept_mass:
        before += weights[count]
        count += 1
    remaining = u * before
    for i in range(count):
        remaining -= weights[i]
        if remaining < 0.0:
            return candidates[order[i]]
    return candidates[order[count - 1]]


@subroutine
def _norm_bound(z: Any) -> Any:
    total = np.float32(0)
    for j in range(len(z)):
        total += to_fp32(z[j]) * to_fp32(z[j])
    return np.sqrt(total) * _NORM_MARGIN


@kernel
def find_candidates(estimates: Any, error_bounds: Any, z: Any, norms: Any, chosen: Any, counts: Any) -> None:
    """Write the rows of the head whose logits may be the greatest for each row of z (P, k).

    estimates: estimated logits, (P, n or more). error_bounds: (n,), the greatest error of an estimate if z has norm 1.
    Outputs: norms (P,), the norms of the rows of z; chosen (P, MAX_CANDIDATES), the candidates; counts (P,), their
    numbers. If there are more than MAX_CANDIDATES, the others are not in `chosen`.
    """
    n = len(error_bounds)
    for i in prange(len(estimates)):
        row, norm, count = estimates[i], _norm_bound(z[i]), 0
        norms[i] = norm
        low = row[0] - norm * error_bounds[0]
        for j in range(1, n):
            low = maximum(low, row[j] - norm * error_bounds[j])
        for begin in range(0, n, _MAX_BLOCK):
            end, high = min(n, begin + _MAX_BLOCK), row[begin] + norm * error_bounds[begin]
            for j in range(begin + 1, end):
                high = maximum(high, row[j] + norm * error_bounds[j])
            if high >= low:
                for j in range(begin, end):
                    if row[j] + norm * error_bounds[j] >= low:
                        if count < MAX_CANDIDATES:
                            chosen[i, count] = j
                        count += 1
        counts[i] = count
