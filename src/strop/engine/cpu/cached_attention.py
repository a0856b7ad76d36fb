"""Attention of a few rows of many texts over their keys and values, which lie in blocks, as one compiled loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange

from strop.engine.cpu.compiled import exp, greater, inline, loop, narrow
from strop.engine.cpu.dots import LANES, ask_for, block, mix

BLOCK = 32  # positions of a text whose keys and values lie together
_NEVER = np.float32(-3e38)


@inline
def _bent(scores: Any, scale: Any, softcap: Any) -> None:
    for j in range(BLOCK):
        scores[j] = softcap * np.float32(math.tanh(scores[j] * scale / softcap))


@inline
def _seen(scores: Any, first: Any, end: Any, scale: Any, held: Any, top: Any) -> Any:
    """held (BLOCK,) = exp(score - top) of the scores times `scale` from `first` to `end`, with the top so far; the
    others 0. Gives the top, what was held before must be multiplied by, and the sum."""
    highest = top
    for j in range(BLOCK):
        held[j] = scores[j] * scale if (j >= first) & (j < end) else _NEVER
        highest = greater(highest, held[j])
    total = np.float32(0.0)
    for j in range(BLOCK):
        e = exp(held[j] - highest)
        e = e if held[j] > _NEVER else np.float32(0.0)
        held[j] = e
        total += e
    return highest, exp(top - highest), total


@loop
def attend(q: Any, keys: Any, values: Any, shape: Any, rows: Any, out: Any, lanes: Any) -> None:
    """out (T, query size) = softmax(q K^T) V of each row over the keys of its text, up to its own and within the
    window; a block of keys at a time (FlashAttention's sum, arXiv:2205.14135)."""
    kv, all_rows, group, width = q.shape
    size, window, scale, softcap = shape.size, shape.window, shape.scale, shape.softcap
    chunks, table = rows.chunks, rows.table
    qs, ks, vs = q.reshape(-1), keys.reshape(-1), values.reshape(-1)
    most, tasks = 0, len(chunks) * kv
    for c in range(len(chunks)):
        most = max(most, chunks[c, 1] * group)
    for lane in prange(lanes):
        sums, tops, totals = np.empty(most * width, np.float32), np.empty(most, np.float32), np.empty(most, np.float32)
        scores, held = np.empty(most * BLOCK, np.float32), np.empty(most * BLOCK, np.float32)
        for task in range(lane, tasks, lanes):
            chunk, head = task // kv, task % kv
            row, count, at, text = chunks[chunk]
            many, last = count * group, at + count - 1
            next_one = (task + lanes) // kv if task + lanes < tasks else chunk
            next_head, next_at, next_text = (task + lanes) % kv, chunks[next_one, 2], chunks[next_one, 3]
            next_first = max(0, next_at - window + 1) // BLOCK if window else 0
            sums[: many * width] = 0
            tops[:many] = _NEVER
            totals[:many] = 0
            q_at = (head * all_rows + row) * group * width
            for part in range(max(0, at - window + 1) // BLOCK if window else 0, last // BLOCK + 1):
                begin = part * BLOCK
                here, there = (table[text, part] * kv + head) * BLOCK * width, min(BLOCK, last + 1 - begin)
                if part < last // BLOCK:  # what comes behind this block
                    behind = (table[text, part + 1] * kv + head) * BLOCK * width
                else:
                    behind = (table[next_text, next_first] * kv + next_head) * BLOCK * width
                ask_for(ks, behind, BLOCK * width)
                ask_for(vs, behind, BLOCK * width)
                for j in range(0, there, LANES):
                    block(ks, here + j * width, width, qs, q_at, width, scores, j, BLOCK, many, size)
                for i in range(many):
                    own = at + i // group
                    first = max(0, own - window + 1 - begin) if window else 0
                    end = min(BLOCK, own + 1 - begin)
                    mine, weights = scores[i * BLOCK : (i + 1) * BLOCK], held[i * BLOCK : (i + 1) * BLOCK]
                    if first >= end:
                        weights[:] = 0
                        continue
                    if softcap:
                        _bent(mine, scale, softcap)
                        tops[i], fade, total = _seen(mine, first, end, np.float32(1.0), weights, tops[i])
                    else:
                        tops[i], fade, total = _seen(mine, first, end, scale, weights, tops[i])
                    totals[i] = totals[i] * fade + total
                    for d in range(i * width, (i + 1) * width):
                        sums[d] *= fade
                mix(held, 0, BLOCK, vs, here, width, sums, 0, width, many, there, width)
            for i in range(many):
                share = np.float32(1.0) / totals[i]
                to, begin = out[row + i // group], (head * group + i % group) * size
                for d in range(size):
                    to[begin + d] = narrow(sums[i * width + d] * share, out)
