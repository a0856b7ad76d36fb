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
