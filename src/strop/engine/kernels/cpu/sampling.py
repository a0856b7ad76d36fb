"""Loops over logits: the likeliest token, and one that is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from strop.engine.kernels.cpu.compiled import exp, greater, inline, loop, together

_SIGNLESS, _INFINITE = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_LOWEST = np.float32(-3e38)
_SUMMED = 512  # numbers that are summed in fp32
_FIRST_DEPTH = 12.0  # nats below the likeliest: where the search for those that count begins


@loop
def likeliest(logits: Any, found: Any, finite: Any) -> None:
    """Of each row of logits (P, n) fp32: the first of the greatest, and whether all are numbers, none infinite but
    below."""
    bits = logits.view(np.uint32)  # a loop may take for granted that numbers are finite
    for i in prange(len(logits)):
        row, best, at, bad = logits[i], logits[i, 0], 0, False
        for j in range(1, len(row)):
            if row[j] > best:
                best, at = row[j], j
        for j in range(len(row)):
            bad |= (bits[i, j] & _SIGNLESS) > _INFINITE or bits[i, j] == _INFINITE
        found[i] = at
        finite[i] = not bad and best > _LOWEST


@inline
def _mass(row: Any, top: Any, scale: Any) -> Any:
    total = 0.0
    for j in range(len(row)):
        total += np.exp((np.float64(row[j]) - top) * scale)
    return total


@loop
def logprobs_of(logits: Any, tokens: Any, found: Any) -> None:
    """found (P,) fp64 = log softmax(logits)[token] of each row of logits (P, n) fp32."""
    n = logits.shape[1]
    for i in prange(len(logits)):
        row, top, total = logits[i], logits[i, 0], 0.0
        for j in range(1, n):
            top = greater(top, row[j])
        for begin in range(0, n, _SUMMED):
            part = np.float32(0.0)
            for j in range(begin, min(n, begin + _SUMMED)):
                part += exp(row[j] - top)
            total += np.float64(part)
        found[i] = np.float64(row[tokens[i]]) - np.float64(top) - np.log(total)


@together
def draw(row: Any, temperature: Any, top_k: Any, top_p: Any, u: Any) -> Any:
    """A token of logits (n,) by softmax(row / temperature), among the top_k likeliest (0: all) and of these among the
    fewest that hold top_p of the mass (Holtzman et al., arXiv:1904.09751). u: a number from [0, 1)."""
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
    # Those that count are among the few not far below the likeliest; which, shows when enough of them are seen.
    depth, most = _FIRST_DEPTH, n if top_k <= 0 else min(top_k, n)
    while True:
        floor = top - depth / scale
        seen = np.nonzero(row >= floor)[0] if depth < 1e6 else np.arange(n)
        values = row[seen]
        order = np.argsort(-values, kind="mergesort")
        weights = np.exp((values[order].astype(np.float64) - top) * scale)
        enough = len(seen) == n or (len(seen) >= most if top_k > 0 else weights.sum() >= top_p * mass)
        if enough:
            break
        depth = depth * 4.0 if depth < 1e5 else 1e7
    kept = min(len(order), most)
    whole = weights[:kept].sum() if top_k > 0 else mass
    before, count = 0.0, 0
    while count < kept and before < top_p * whole:
        before += weights[count]
        count += 1
    left = u * before
    for place in range(count):
        left -= weights[place]
        if left < 0.0:
            return seen[order[place]]
    return seen[order[count - 1]]


# ---- from strop.engine.kernels.cpu.exact_argmax ----
"""The likeliest token without the whole head: its logits nearly, from the head in 8 bit, and in full those that may be
the greatest.

A logit w z of a row w of the head and the nearly right one v z, v being what 8 bit hold of w, are no further apart than
|w - v| |z| (Cauchy and Schwarz). Rows whose logit cannot reach another's are left out; of the others, a few in most
passes, logits are computed as they would be among all. The token is the same, from half of the head's bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from strop.engine.kernels.cpu.compiled import greater, inline, loop, wide
from strop.engine.kernels.cpu.decode_matmul import TILES as TILES
from strop.engine.kernels.cpu.decode_matmul import Dense as Dense
from strop.engine.kernels.cpu.decode_matmul import Packed as Packed
from strop.engine.kernels.cpu.decode_matmul import alone as alone
from strop.engine.kernels.cpu.decode_matmul import integers as integers
from strop.engine.kernels.cpu.decode_matmul import packed as packed
from strop.engine.kernels.cpu.dots import LANES as LANES
from strop.engine.kernels.cpu.int8_dots import AS_HELD as AS_HELD
from strop.engine.kernels.cpu.int8_dots import fits as fits
from strop.engine.kernels.cpu.int8_dots import in_whole as in_whole

MOST = 512  # rows of the head whose logits are computed in full, of a pass: with more, all are
_TOGETHER = 256  # logits that are looked at together
_LONGER = np.float32(1.001)  # what is computed of a length may be a little less than it is


@inline
def _length(z: Any) -> Any:
    total = np.float32(0)
    for j in range(len(z)):
        total += wide(z[j]) * wide(z[j])
    return np.sqrt(total) * _LONGER


@loop
def within_reach(near: Any, reach: Any, z: Any, lengths: Any, chosen: Any, counts: Any) -> None:
    """chosen (P, MOST), counts (P,): the rows of the head whose logits may be the greatest of a row of z (P, k); a
    count beyond MOST: too many. near (P, n or more): logits, nearly; reach (n,): how far off they are, for a row of
    length 1; lengths (P,): of the rows of z."""
    n = len(reach)
    for i in prange(len(near)):
        row, length, count = near[i], _length(z[i]), 0
        lengths[i] = length
        low = row[0] - length * reach[0]
        for j in range(1, n):
            low = greater(low, row[j] - length * reach[j])
        for begin in range(0, n, _TOGETHER):
            end, high = min(n, begin + _TOGETHER), row[begin] + length * reach[begin]
            for j in range(begin + 1, end):
                high = greater(high, row[j] + length * reach[j])
            if high >= low:
                for j in range(begin, end):
                    if row[j] + length * reach[j] >= low:
                        if count < MOST:
                            chosen[i, count] = j
                        count += 1
        counts[i] = count
