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
