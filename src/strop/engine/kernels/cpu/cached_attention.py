"""Attention of a few rows of many texts over their keys and values, which lie in blocks, as one compiled loop.

Values lie position by position. Keys stand side by side: for each unit of a head, a number in fp32 or two in bf16,
those of all positions of the block, so that a query meets a vector of positions and no sum has to be taken across one.
A query's scores have the same bits beside any others.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from strop.engine.kernels.cpu.compiled import BFloat, exp, greater, inline, loop, narrow
from strop.engine.kernels.cpu.dots import LANES, Kind, ask_for, location, mix, plus, spread

BLOCK = 32  # positions of a text whose keys and values lie together
_NEVER = np.float32(-3e38)
_VECTORS, _PARTS = BLOCK // LANES, 2  # of a block's positions; sums of a score, of even and of odd units
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_SUMS, _NUMBERS, _PAIRS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES), ir.VectorType(BFloat(), 2 * LANES)


@inline
def key_at(begin: Any, slot: Any, d: Any, like: Any) -> Any:
    """Where number d of the key in a block's slot lies; begin: of the block's head; like: keys, for their type."""
    unit = 4 // like.itemsize
    return begin + (d // unit * BLOCK + slot) * unit + d % unit


def _scores(queries: int) -> Any:
    def typing(context: Any, q: Any, q_at: Any, ldq: Any, keys: Any, k_at: Any, c: Any, c_at: Any, width: Any) -> Any:
        long = types.int64
        signature = types.void(q, long, long, keys, long, c, long, long)

        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kinds, kind = signature.args, Kind(keys.dtype, q.dtype)
            unit = 2 if kind.pairs else 1
            q_start, k_start, c_start = (location(context, b, kinds[i], args[i], args[i + 1]) for i in (0, 3, 5))
            q_rows = [b.gep(q_start, [b.mul(args[2], _I64(i))]) for i in range(queries)]

            def one(place: Any) -> Any:
                if not kind.pairs:
                    return spread(b, b.load(place), LANES)
                return b.bitcast(spread(b, b.load(b.bitcast(place, _I32.as_pointer()), align=2), LANES), _PAIRS)

            def some(place: Any) -> Any:
                found = b.load(b.bitcast(place, (_NUMBERS if kind.pairs else _SUMS).as_pointer()), align=4)
                return b.bitcast(found, _PAIRS) if kind.pairs else found

            zeros = [ir.Constant(_SUMS, [0.0] * LANES)] * (_PARTS * queries * _VECTORS)
            before, units, done = b.block, b.append_basic_block("units"), b.append_basic_block("done")
            b.branch(units)
            b.position_at_end(units)
            at, sums, found = b.phi(_I64), [b.phi(_SUMS) for _ in zeros], list[Any]()
            for part in range(_PARTS):
                here = b.add(at, _I64(part * unit))
                row = b.gep(k_start, [b.mul(here, _I64(BLOCK))])
                columns = [some(b.gep(row, [_I64(j * LANES * unit)])) for j in range(_VECTORS)]
                for each in q_rows:
                    same = one(b.gep(each, [here]))
                    for column in columns:
                        found.append(kind.multiply(b, column, same, sums[len(found)]))
            after = b.add(at, _I64(_PARTS * unit))
            for each, first, later in zip([at, *sums], [_I64(0), *zeros], [after, *found], strict=True):
                each.add_incoming(first, before)
                each.add_incoming(later, units)
            b.cbranch(b.icmp_signed("<", after, args[7]), units, done)
            b.position_at_end(done)
            half = len(found) // _PARTS
            for number in range(half):
                place = b.gep(c_start, [_I64(number * LANES)])
                value = plus(b, found[number], found[half + number])
                b.store(value, b.bitcast(place, _SUMS.as_pointer()), align=4)
            return context.get_dummy_value()

        return signature, generate

    typing.__doc__ = f"""c[{queries}, BLOCK] = q_i k_j, for {queries} queries and the keys of a block.

    q, keys: both fp32, or both uint16 with the bits of bf16, keys as `key_at` has them; c: fp32. q_at, k_at, c_at:
    where they begin; ldq: row to row. width: numbers of a query, a multiple of LANES.
    """
    return intrinsic(typing)


_one, _two, _three, _four = (_scores(queries) for queries in (1, 2, 3, 4))


@inline
def _score(q: Any, q_at: Any, keys: Any, k_at: Any, c: Any, many: Any, width: Any) -> None:
    """c (many, BLOCK) = q_i k_j of `many` queries, one behind the other."""
    i = 0
    while LANES == 16 and i + 4 <= many:  # half as many registers hold a quarter of that
        _four(q, q_at + i * width, width, keys, k_at, c, i * BLOCK, width)
        i += 4
    if LANES == 16 and many - i == 3:
        _three(q, q_at + i * width, width, keys, k_at, c, i * BLOCK, width)
        i += 3
    if LANES == 16 and many - i == 2:
        _two(q, q_at + i * width, width, keys, k_at, c, i * BLOCK, width)
        i += 2
    while i < many:
        _one(q, q_at + i * width, width, keys, k_at, c, i * BLOCK, width)
        i += 1


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
    return highest, np.float32(1.0) if highest == top else exp(top - highest), total


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
                _score(qs, q_at, ks, here, scores, many, width)
                ask_for(vs, behind, BLOCK * width)
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
                    if fade != 1:
                        for d in range(i * width, (i + 1) * width):
                            sums[d] *= fade
                mix(held, 0, BLOCK, vs, here, width, sums, 0, width, many, there, width)
            for i in range(many):
                share = np.float32(1.0) / totals[i]
                to, begin = out[row + i // group], (head * group + i % group) * size
                for d in range(size):
                    to[begin + d] = narrow(sums[i * width + d] * share, out)
