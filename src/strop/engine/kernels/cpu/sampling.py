"""Compiled kernels over logits: argmax, log-probabilities, sampling, and the candidates of an exact argmax.

`find_candidates` finds the most likely token without the whole head. A logit w z of a row w of the head and the
estimate v z, where v is w in 8 bits, differ by at most |w - v| |z| (Cauchy and Schwarz). Rows whose logit cannot be the
greatest are left out; the logits of the others, a few in most passes, are computed exactly. The token is the same, and
half of the head's bytes are read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from strop.engine.kernels.cpu.compiled import exp, kernel, maximum, sequence, subroutine, to_fp32
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
_SUMMED = 512  # elements that are summed in fp32
_FIRST_DEPTH = 12.0  # nats below the greatest logit: where the search for the tokens that count begins
MAX_CANDIDATES = 512  # rows of the head whose logits are computed exactly; beyond, all are
_TOGETHER = 256  # logits whose maximum is compared at once
_LENGTH_MARGIN = np.float32(1.001)  # a computed length may be slightly less than the exact one


@kernel
def argmax_rows(logits: Any, indices: Any, finite: Any) -> None:
    """Write the index of the first greatest logit of each row, and whether the row is valid.

    logits (P, n) fp32. A row is valid if it has no NaN, no +infinity, and a finite logit.
    """
    bits = logits.view(np.uint32)  # compiled loops may assume that values are finite
    for i in prange(len(logits)):
        row, best, at, bad = logits[i], logits[i, 0], 0, False
        for j in range(1, len(row)):
            if row[j] > best:
                best, at = row[j], j
        for j in range(len(row)):
            bad |= (bits[i, j] & _SIGNLESS) > _INFINITE or bits[i, j] == _INFINITE
        indices[i] = at
        finite[i] = not bad and best > _LOWEST


@subroutine
def _mass(row: Any, top: Any, scale: Any) -> Any:
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
        for begin in range(0, n, _SUMMED):
            part = np.float32(0.0)
            for j in range(begin, min(n, begin + _SUMMED)):
                part += exp(row[j] - top)
            total += np.float64(part)
        logprobs[i] = np.float64(row[tokens[i]]) - np.float64(top) - np.log(total)


@sequence
def sample(row: Any, temperature: Any, top_k: Any, top_p: Any, u: Any) -> Any:
    """Sample a token of logits (n,) from softmax(row / temperature).

    top_k: sample among the k most likely tokens (0: all); top_p: of these, among the fewest that hold this share of the
    probability (Holtzman et al., arXiv:1904.09751). u: a random number from [0, 1).
    """
    n, scale = len(row), 1.0 / temperature
    top = np.float64(row.max())
    mass = _mass(row, top, scale)
    if top_k <= 0 and top_p >= 1.0:
        left = u * mass
        last = 0
        for j in range(n):
            p = np.exp((np.float64(row[j]) - top) * scale)
            if p > 0.0:
                last = j
                left -= p
                if left < 0.0:
                    return j
        return last
    # Only the few tokens near the greatest logit matter. Widen the search until it holds enough of them.
    depth, most = _FIRST_DEPTH, n if top_k <= 0 else min(top_k, n)
    while True:
        floor = top - depth / scale
        candidates = np.nonzero(row >= floor)[0] if depth < 1e6 else np.arange(n)
        values = row[candidates]
        order = np.argsort(-values, kind="mergesort")
        weights = np.exp((values[order].astype(np.float64) - top) * scale)
        enough = len(candidates) == n or (len(candidates) >= most if top_k > 0 else weights.sum() >= top_p * mass)
        if enough:
            break
        depth = depth * 4.0 if depth < 1e5 else 1e7
    limit = min(len(order), most)
    whole = weights[:limit].sum() if top_k > 0 else mass
    before, count = 0.0, 0
    while count < limit and before < top_p * whole:
        before += weights[count]
        count += 1
    left = u * before
    for place in range(count):
        left -= weights[place]
        if left < 0.0:
            return candidates[order[place]]
    return candidates[order[count - 1]]


@subroutine
def _length(z: Any) -> Any:
    total = np.float32(0)
    for j in range(len(z)):
        total += to_fp32(z[j]) * to_fp32(z[j])
    return np.sqrt(total) * _LENGTH_MARGIN


@kernel
def find_candidates(near: Any, reach: Any, z: Any, lengths: Any, chosen: Any, counts: Any) -> None:
    """Write the rows of the head whose logits may be the greatest of a row of z (P, k).

    near (P, n or more): estimated logits; reach (n,): the greatest error of an estimate for a row of length 1. lengths
    (P,): written, the lengths of the rows of z. chosen (P, MAX_CANDIDATES), counts (P,): written; a count beyond
    MAX_CANDIDATES means too many.
    """
    n = len(reach)
    for i in prange(len(near)):
        row, length, count = near[i], _length(z[i]), 0
        lengths[i] = length
        low = row[0] - length * reach[0]
        for j in range(1, n):
            low = maximum(low, row[j] - length * reach[j])
        for begin in range(0, n, _TOGETHER):
            end, high = min(n, begin + _TOGETHER), row[begin] + length * reach[begin]
            for j in range(begin + 1, end):
                high = maximum(high, row[j] + length * reach[j])
            if high >= low:
                for j in range(begin, end):
                    if row[j] + length * reach[j] >= low:
                        if count < MAX_CANDIDATES:
                            chosen[i, count] = j
                        count += 1
        counts[i] = count
