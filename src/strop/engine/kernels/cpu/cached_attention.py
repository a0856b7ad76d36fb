"""Attention for decoding: a few rows of many sequences over a KV cache in blocks, in one compiled kernel.

A block of values has the shape (position, element). A block of keys is transposed, (element, position), in bf16 with
pairs of elements, so that the lanes of a vector are positions and no horizontal sums are needed. The scores of a query
are bit-identical whatever else is in the batch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from strop.engine.kernels.cpu.compiled import (
    F32,
    I32,
    I64,
    BFloat,
    add_ordered,
    broadcast,
    exp,
    from_fp32,
    kernel,
    maximum,
    pointer,
    repeat,
    subroutine,
)
from strop.engine.kernels.cpu.dots import LANES, Operands, add_weighted_rows, prefetch_array

BLOCK = 32  # positions of a sequence in a cache block
_MASKED = np.float32(-3e38)
_VECTORS, _PARTS = (
    BLOCK // LANES,
    2,
)  # vectors of positions in a block; partial sums of a score (even and odd elements or pairs)
_SUMS, _NUMBERS, _PAIRS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(BFloat(), 2 * LANES)


@subroutine
def key_at(begin: Any, slot: Any, d: Any, like: Any) -> Any:
    """Return the index of element d of the key in a block's slot. begin: index of the block's head; like: the keys."""
    unit = 4 // like.itemsize
    return begin + (d // unit * BLOCK + slot) * unit + d % unit


def _scores(queries: int) -> Any:
    def typing(context: Any, q: Any, q_at: Any, ldq: Any, keys: Any, k_at: Any, c: Any, c_at: Any, width: Any) -> Any:
        long = types.int64
        signature = types.void(q, long, long, keys, long, c, long, long)

        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kinds, operands = signature.args, Operands(keys.dtype, q.dtype)
            unit = 2 if operands.pairs else 1
            q_start, k_start, c_start = (pointer(context, b, kinds[i], args[i], args[i + 1]) for i in (0, 3, 5))
            q_rows = [b.gep(q_start, [b.mul(args[2], I64(i))]) for i in range(queries)]

            def load_query(place: Any) -> Any:
                if not operands.pairs:
                    return broadcast(b, b.load(place), LANES)
                return b.bitcast(broadcast(b, b.load(b.bitcast(place, I32.as_pointer()), align=2), LANES), _PAIRS)

            def load_keys(place: Any) -> Any:
                loaded = b.load(b.bitcast(place, (_NUMBERS if operands.pairs else _SUMS).as_pointer()), align=4)
                return b.bitcast(loaded, _PAIRS) if operands.pairs else loaded

            def body(at: Any, sums: list[Any]) -> list[Any]:
                results: list[Any] = []
                for part in range(_PARTS):
                    here = b.add(at, I64(part * unit))
                    row = b.gep(k_start, [b.mul(here, I64(BLOCK))])
                    columns = [load_keys(b.gep(row, [I64(j * LANES * unit)])) for j in range(_VECTORS)]
                    for query in q_rows:
                        element = load_query(b.gep(query, [here]))
                        for column in columns:
                            results.append(operands.multiply_add(b, column, element, sums[len(results)]))
                return results

            zeros = [ir.Constant(_SUMS, [0.0] * LANES)] * (_PARTS * queries * _VECTORS)
            sums = repeat(b, args[7], _PARTS * unit, zeros, body)
            half = len(sums) // _PARTS
            for number in range(half):
                place = b.gep(c_start, [I64(number * LANES)])
                value = add_ordered(b, sums[number], sums[half + number])
                b.store(value, b.bitcast(place, _SUMS.as_pointer()), align=4)
            return context.get_dummy_value()

        return signature, generate

    typing.__doc__ = f"""Compute c[{queries}, BLOCK] = q_i k_j for {queries} queries and the keys of a block.

    q, keys: both fp32, or both uint16 with the bits of bf16, keys stored as `key_at` describes; c: fp32. q_at, k_at,
    c_at: where they begin; ldq: distance between queries. width: elements of a query, a multiple of LANES.
    """
    return intrinsic(typing)


_scores_1, _scores_2, _scores_3, _scores_4 = (_scores(queries) for queries in (1, 2, 3, 4))


@subroutine
def _score(q: Any, q_at: Any, keys: Any, k_at: Any, c: Any, queries: Any, width: Any) -> None:
    """Compute c (queries, BLOCK) = q_i k_j for contiguous queries."""
    i = 0
    while LANES == 16 and i + 4 <= queries:  # AVX2 has half as many registers of half the width: one query at a time
        _scores_4(q, q_at + i * width, width, keys, k_at, c, i * BLOCK, width)
        i += 4
    if LANES == 16 and queries - i == 3:
        _scores_3(q, q_at + i * width, width, keys, k_at, c, i * BLOCK, width)
        i += 3
    if LANES == 16 and queries - i == 2:
        _scores_2(q, q_at + i * width, width, keys, k_at, c, i * BLOCK, width)
        i += 2
    while i < queries:
        _scores_1(q, q_at + i * width, width, keys, k_at, c, i * BLOCK, width)
        i += 1


@subroutine
def _cap(scores: Any, scale: Any, softcap: Any) -> None:
    for j in range(BLOCK):
        scores[j] = softcap * np.float32(math.tanh(scores[j] * scale / softcap))


@subroutine
def _softmax_block(scores: Any, first: Any, end: Any, scale: Any, weights: Any, top: Any) -> Any:
    """Write exp(score - top) of the scores within [first, end), times `scale`, to weights (BLOCK,), elsewhere 0.

    top: the greatest score so far. Returns the new top, the factor for the weights written before, and the sum.
    """
    highest = top
    for j in range(BLOCK):
        weights[j] = scores[j] * scale if (j >= first) & (j < end) else _MASKED
        highest = maximum(highest, weights[j])
    total = np.float32(0.0)
    for j in range(BLOCK):
        e = exp(weights[j] - highest)
        e = e if weights[j] > _MASKED else np.float32(0.0)
        weights[j] = e
        total += e
    return highest, np.float32(1.0) if highest == top else exp(top - highest), total


@kernel
def attend(q: Any, keys: Any, values: Any, shape: Any, rows: Any, out: Any, lanes: Any) -> None:
    """Compute softmax(q K^T) V of each row over the keys of its sequence, up to its position and within the window.

    q (key_value, T, group, width), keys and values (blocks, key_value, BLOCK, width), out (T, query * size). One block
    of keys at a time, with FlashAttention's running sum (arXiv:2205.14135).
    """
    kv, all_rows, group, width = q.shape
    size, window, scale, softcap = shape.size, shape.window, shape.scale, shape.softcap
    chunks, table = rows.chunks, rows.table
    qs, ks, vs = q.reshape(-1), keys.reshape(-1), values.reshape(-1)
    max_rows, tasks = 0, len(chunks) * kv
    for c in range(len(chunks)):
        max_rows = max(max_rows, chunks[c, 1] * group)
    for lane in prange(lanes):
        sums, row_max, totals = (
            np.empty(max_rows * width, np.float32),
            np.empty(max_rows, np.float32),
            np.empty(max_rows, np.float32),
        )
        scores, weights = np.empty(max_rows * BLOCK, np.float32), np.empty(max_rows * BLOCK, np.float32)
        for task in range(lane, tasks, lanes):
            chunk, head = task // kv, task % kv
            row, count, at, text = chunks[chunk]
            queries, last = count * group, at + count - 1
            next_chunk = (task + lanes) // kv if task + lanes < tasks else chunk
            next_head, next_at, next_text = (task + lanes) % kv, chunks[next_chunk, 2], chunks[next_chunk, 3]
            next_first = max(0, next_at - window + 1) // BLOCK if window else 0
            sums[: queries * width] = 0
            row_max[:queries] = _MASKED
            totals[:queries] = 0
            q_at = (head * all_rows + row) * group * width
            for part in range(max(0, at - window + 1) // BLOCK if window else 0, last // BLOCK + 1):
                begin = part * BLOCK
                here, valid = (table[text, part] * kv + head) * BLOCK * width, min(BLOCK, last + 1 - begin)
                if part < last // BLOCK:  # prefetch the next block of this task or of the next one
                    next_block = (table[text, part + 1] * kv + head) * BLOCK * width
                else:
                    next_block = (table[next_text, next_first] * kv + next_head) * BLOCK * width
                prefetch_array(ks, next_block, BLOCK * width)
                _score(qs, q_at, ks, here, scores, queries, width)
                prefetch_array(vs, next_block, BLOCK * width)
                for i in range(queries):
                    position = at + i // group
                    first = max(0, position - window + 1 - begin) if window else 0
                    end = min(BLOCK, position + 1 - begin)
                    row_scores = scores[i * BLOCK : (i + 1) * BLOCK]
                    row_weights = weights[i * BLOCK : (i + 1) * BLOCK]
                    if first >= end:
                        row_weights[:] = 0
                        continue
                    if softcap:
                        _cap(row_scores, scale, softcap)
                        row_max[i], rescale, total = _softmax_block(
                            row_scores, first, end, np.float32(1.0), row_weights, row_max[i]
                        )
                    else:
                        row_max[i], rescale, total = _softmax_block(
                            row_scores, first, end, scale, row_weights, row_max[i]
                        )
                    totals[i] = totals[i] * rescale + total
                    if rescale != 1:
                        for d in range(i * width, (i + 1) * width):
                            sums[d] *= rescale
                add_weighted_rows(weights, 0, BLOCK, vs, here, width, sums, 0, width, queries, valid, width)
            for i in range(queries):
                share = np.float32(1.0) / totals[i]
                to, begin = out[row + i // group], (head * group + i % group) * size
                for d in range(size):
                    to[begin + d] = from_fp32(sums[i * width + d] * share, out)
