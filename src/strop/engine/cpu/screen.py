"""The likeliest token without the whole head: its logits nearly, from the head in 8 bit, and in full those that may be
the greatest.

A logit w z of a row w of the head and the nearly right one v z, v being what 8 bit hold of w, are no further apart than
|w - v| |z| (Cauchy and Schwarz). Rows whose logit cannot reach another's are left out; of the others, a few in most
passes, logits are computed as they would be among all. The token is the same, from half of the head's bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from strop.engine.cpu.compiled import greater, inline, loop, together, wide
from strop.engine.cpu.dots import LANES as LANES
from strop.engine.cpu.integer_dots import AS_HELD as AS_HELD
from strop.engine.cpu.integer_dots import fits as fits
from strop.engine.cpu.products import TILES as TILES
from strop.engine.cpu.products import Dense, alone, prepare, weigh
from strop.engine.cpu.products import Packed as Packed

MOST = 512  # rows of the head whose logits are computed in full, of a pass: with more, all are
_TOGETHER = 256  # logits that are looked at together
_INFINITE = np.uint32(0x7F800000)
_LONGER = np.float32(1.001)  # what is computed of a length may be a little less than it is


class Space(NamedTuple):
    """As passes.Room, as far as products of the head go."""

    x: Any
    scales: Any
    like: Any


@inline
def _length(z: Any) -> Any:
    total = np.float32(0)
    for j in range(len(z)):
        total += wide(z[j]) * wide(z[j])
    return np.sqrt(total) * _LONGER


@loop
def _reach(near: Any, reach: Any, z: Any, lengths: Any, chosen: Any, counts: Any) -> None:
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


@together
def likeliest(head: Any, small: Any, reach: Any, z: Any, like: Any, scale: Any, found: Any, lanes: Any) -> Any:
    """found (P,): the places of the greatest of the logits scale (head z), for rows z (P, k). small: the head in 8 bit,
    of rows in whole LANES; reach (n,): as _reach has it; like: as in passes.Room. False where found says nothing: too
    many may be the greatest, or a row has no numbers that such sums can be made of."""
    rows, k = z.shape
    n = len(reach)
    space = Space(np.empty(z.size, np.int16), np.empty(rows, np.float32), like)
    near = np.empty((rows, small.n), np.float32)
    prepare((small,), space, z)
    weigh(small, space, z, z[:0], near, 0, lanes)
    lengths, counts = np.empty(rows, np.float32), np.empty(rows, np.int64)
    chosen = np.empty((rows, MOST), np.int64)
    _reach(near, reach, z, lengths, chosen, counts)
    bits, marked, total = lengths.view(np.uint32), np.zeros(n, np.bool_), 0
    for i in range(rows):
        if bits[i] >= _INFINITE or counts[i] > MOST:
            return False
        for place in range(counts[i]):
            total += not marked[chosen[i, place]]
            marked[chosen[i, place]] = True
    if total == 0 or total > MOST:
        return False
    places = np.nonzero(marked)[0]
    some = np.empty(((total + LANES - 1) // LANES * LANES, k), head.dtype)
    for place in range(len(some)):  # what fills the last block up is the last one again
        some[place] = head[places[min(place, total - 1)]]
    logits = np.empty((rows, len(some)), np.float32)
    alone(Dense(some), z, logits, lanes)
    for i in range(rows):
        best = 0
        for place in range(1, total):
            if logits[i, place] * scale > logits[i, best] * scale:
                best = place
        found[i] = places[best]
    numbers = logits.view(np.uint32)
    for i in range(rows):
        for place in range(total):
            if numbers[i, place] & _INFINITE == _INFINITE:
                return False
    return True
