"""Attention for decoding: a few rows of many sequences over a paged KV cache, in one compiled kernel.

A block of values has the shape (positions, elements). A block of keys is transposed, so that the SIMD lanes of a score
vector are positions and no horizontal sums are needed; in bf16, pairs of elements stay together. The result of a row is
the same bit for bit, whatever else is in the batch.
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
    load,
    maximum,
    pointer,
    repeat,
    store,
    subroutine,
)
from strop.engine.kernels.cpu.dots import LANES, Operands, add_weighted_rows, prefetch_array

BLOCK = 32  # positions of a sequence in a cache block
_MASKED = np.float32(-3e38)
_VECTORS = BLOCK // LANES  # vectors per block of positions
_PARTS = 2  # partial sums of a score: of even and of odd elements (in bf16, of pairs)
_FP32_VECTOR, _INT32_VECTOR = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
_BF16_PAIRS_VECTOR = ir.VectorType(BFloat(), 2 * LANES)


@subroutine
def key_index(begin: Any, slot: Any, d: Any, like: Any) -> Any:
    """Return the index of element d of the key at position `slot` of a block.

    begin: index of the block's first element for the head. like: an array with the dtype of the keys.
    """
    packed = 4 // like.itemsize  # elements that stay together
    return begin + (d // packed * BLOCK + slot) * packed + d % packed


def _scores(queries: int) -> Any:
    def typing(context: Any, q: Any, q_at: Any, ldq: Any, keys: Any, k_at: Any, c: Any, c_at: Any, width: Any) -> Any:
        long = types.int64

        def generate(context: Any, b: Any, signature: Any, args: Any) -> None:
            kinds, operands = signature.args, Operands(keys.dtype, q.dtype)
            packed = 2 if operands.pairs else 1
            q_start, k_start, c_start = (pointer(context, b, kinds[i], args[i], args[i + 1]) for i in (0, 3, 5))
            q_rows = [b.gep(q_start, [b.mul(args[2], I64(i))]) for i in range(queries)]

            def load_query(address: Any) -> Any:
                if not operands.pairs:
                    return broadcast(b, b.load(address), LANES)
                pair = b.load(b.bitcast(address, I32.as_pointer()), align=2)
                return b.bitcast(broadcast(b, pair, LANES), _BF16_PAIRS_VECTOR)

            def load_keys(row: Any, j: int) -> Any:
                loaded = load(b, row, I64(j * LANES * packed), _INT32_VECTOR if operands.pairs else _FP32_VECTOR)
                return b.bitcast(loaded, _BF16_PAIRS_VECTOR) if operands.pairs else loaded

            def body(index: Any, sums: list[Any]) -> list[Any]:
                results: list[Any] = []
                for part in range(_PARTS):
                    offset = b.add(index, I64(part * packed))
                    row = b.gep(k_start, [b.mul(offset, I64(BLOCK))])
                    columns = [load_keys(row, j) for j in range(_VECTORS)]
                    for query in q_rows:
                        element = load_query(b.gep(query, [offset]))
                        for column in columns:
                            results.append(operands.multiply_add(b, column, element, sums[len(results)]))
                return results

            zeros = [ir.Constant(_FP32_VECTOR, [0.0] * LANES)] * (_PARTS * queries * _VECTORS)
            sums = repeat(b, args[7], _PARTS * packed, zeros, body)
            half = len(sums) // _PARTS
            for number in range(half):
                store(b, add_ordered(b, sums[number], sums[half + number]), c_start, I64(number * LANES))

        return types.void(q, long, long, keys, long, c, long, long), generate

    typing.__doc__ = f"""Compute c[i, j] = dot(q_i, k_j) for {queries} queries and the BLOCK keys of a block.

    q, keys: both fp32 or both bf16 bits, the keys in the order of `key_index`. c: fp32. q_at, k_at, c_at: index of the
    first element. ldq: distance between queries. width: length of a query, a multiple of LANES.
    """
    return intrinsic(typing)


_scores_1, _scores_2, _scores_3, _scores_4 = (_scores(queries) for queries in (1, 2, 3, 4))


@subroutine
def _score(q: Any, q_at: Any, keys: Any, k_at: Any, c: Any, queries: Any, width: Any) -> None:
    """Compute c (queries, BLOCK), the dot products of contiguous queries with the keys of a block."""
    i = 0
    while LANES == 16 and i + 4 <= queries:  # AVX2 has half as many registers: one query at a time
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
def _softmax_block(scores: Any, first: Any, end: Any, scale: Any, weights: Any, previous_max: Any) -> Any:
    """Write exp(scale * score - new maximum) of the scores in [first, end) to weights (BLOCK,), and 0 elsewhere.

    previous_max: the maximum of the preceding blocks. Returns the new maximum, the factor for the sums of the preceding
    blocks, and the sum of the weights.
    """
    new_max = previous_max
    for j in range(BLOCK):
        weights[j] = scores[j] * scale if (j >= first) & (j < end) else _MASKED
        new_max = maximum(new_max, weights[j])
    total = np.float32(0.0)
    for j in range(BLOCK):
        weight = exp(weights[j] - new_max)
        weight = weight if weights[j] > _MASKED else np.float32(0.0)
        weights[j] = weight
        total += weight
    return new_max, np.float32(1.0) if new_max == previous_max else exp(previous_max - new_max), total


@kernel
def attend(q: Any, keys: Any, values: Any, shape: Any, rows: Any, out: Any, threads: Any) -> None:
    """Compute attention of each row over the keys of its sequence from its window to its last key (`key_ends`).

    q: (num_kv_heads, T, group, width), where group is the number of query heads per key-value head, and width the head
    size padded to a multiple of LANES. keys, values: (blocks, num_kv_heads, BLOCK, width), with each block of keys in
    the order of `key_index`. shape, rows: decode_layer.Shape and decode_layer.Rows. out: (T, num_query_heads * size).

    Takes one block of keys at a time and keeps a running maximum and sum, as FlashAttention does (arXiv:2205.14135).
    """
    num_kv_heads, all_rows, group, width = q.shape
    size, window, scale, softcap = shape.size, shape.window, shape.scale, shape.softcap
    score_scale = np.float32(1.0) if softcap else scale  # _cap applies the scale
    chunks, block_table, key_ends = rows.chunks, rows.block_table, rows.key_ends
    qs, ks, vs = q.reshape(-1), keys.reshape(-1), values.reshape(-1)
    max_rows, tasks = 0, len(chunks) * num_kv_heads
    for c in range(len(chunks)):
        max_rows = max(max_rows, chunks[c, 1] * group)  # column 1: number of rows
    for thread in prange(threads):
        sums = np.empty(max_rows * width, np.float32)
        row_max, totals = np.empty(max_rows, np.float32), np.empty(max_rows, np.float32)
        scores, weights = np.empty(max_rows * BLOCK, np.float32), np.empty(max_rows * BLOCK, np.float32)
        for task in range(thread, tasks, threads):
            chunk, head = task // num_kv_heads, task % num_kv_heads
            row, count, first_position, sequence = chunks[chunk]
            queries, stop = count * group, key_ends[row + count - 1]
            first_block = max(0, first_position - window + 1) // BLOCK if window else 0
            last_block = (stop - 1) // BLOCK
            next_chunk = (task + threads) // num_kv_heads if task + threads < tasks else chunk
            next_head = (task + threads) % num_kv_heads
            next_position, next_sequence = chunks[next_chunk, 2], chunks[next_chunk, 3]
            next_first = max(0, next_position - window + 1) // BLOCK if window else 0
            sums[: queries * width] = 0
            row_max[:queries] = _MASKED
            totals[:queries] = 0
            q_at = (head * all_rows + row) * group * width
            for number in range(first_block, last_block + 1):
                begin = number * BLOCK
                block = (block_table[sequence, number] * num_kv_heads + head) * BLOCK * width
                valid = min(BLOCK, stop - begin)
                if number < last_block:  # prefetch the next block of this task, or the first one of the next task
                    next_block = (block_table[sequence, number + 1] * num_kv_heads + head) * BLOCK * width
                else:
                    next_block = (block_table[next_sequence, next_first] * num_kv_heads + next_head) * BLOCK * width
                prefetch_array(ks, next_block, BLOCK * width)
                _score(qs, q_at, ks, block, scores, queries, width)
                prefetch_array(vs, next_block, BLOCK * width)
                for i in range(queries):
                    position = first_position + i // group
                    first = max(0, position - window + 1 - begin) if window else 0
                    end = min(BLOCK, key_ends[row + i // group] - begin)
                    row_scores = scores[i * BLOCK : (i + 1) * BLOCK]
                    row_weights = weights[i * BLOCK : (i + 1) * BLOCK]
                    if first >= end:
                        row_weights[:] = 0
                        continue
                    if softcap:
                        _cap(row_scores, scale, softcap)
                    row_max[i], rescale, total = _softmax_block(
                        row_scores, first, end, score_scale, row_weights, row_max[i]
                    )
                    totals[i] = totals[i] * rescale + total
                    if rescale != 1:
                        for d in range(i * width, (i + 1) * width):
                            sums[d] *= rescale
                add_weighted_rows(weights, 0, BLOCK, vs, block, width, sums, 0, width, queries, valid, width)
            for i in range(queries):
                factor = np.float32(1.0) / totals[i]
                target, begin = out[row + i // group], (head * group + i % group) * size
                for d in range(size):
                    target[begin + d] = from_fp32(sums[i * width + d] * factor, out)
