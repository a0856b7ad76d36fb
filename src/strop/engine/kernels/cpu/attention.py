"""Causal attention over packed documents in one compiled loop, for CPUs with AVX512-BF16: no buckets, no padding.

A task is a document and a key-value head. Its keys and values are turned, packed as the tile product wants them, and
stay in the cache while blocks of queries pass over them; scores are fp32 and never leave the cache. The backward
computes the probabilities again from the kept log-sum-exp (arXiv:2205.14135), so nothing grows with length squared.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange
from torch import Tensor

from strop.engine.kernels.cpu.attention import bend, bent_slopes
from strop.engine.kernels.cpu.compiled import GAP, SIDE, array, inline, loop, narrow, turn, wide
from strop.engine.kernels.cpu.elementwise import flat
from strop.engine.kernels.cpu.tile import COLUMNS, ROWS, claim, product, release
from strop.engine.kernels.cpu.vectors import LANES, dot, exps, highest, rotate, row_pairs, scaled, slopes_of

BLOCK = 64  # rows (a query's heads one behind the other) that pass over the keys together


@inline
def _turned(x: Any, begin: Any, d: Any, cos: Any, sin: Any, row: Any, scale: Any, out: Any, to: Any) -> None:
    """One head's row, turned by the rotary embedding and scaled."""
    m = cos.shape[1]
    if m % LANES == 0 and 2 * m == d:
        rotate(x, begin, m, cos, row * m, sin, row * m, scale, np.float32(1.0), out, to)
        return
    source, target = x[begin : begin + d], out[to : to + d]
    c, s = cos[row], sin[row]
    for j in range(m):
        a, b = wide(source[j]), wide(source[m + j])
        target[j] = narrow((a * c[j] - b * s[j]) * scale, out)
        target[m + j] = narrow((b * c[j] + a * s[j]) * scale, out)
    for j in range(2 * m, d):
        target[j] = narrow(wide(source[j]) * scale, out)


@inline
def _turned_back(x: Any, begin: Any, d: Any, cos: Any, sin: Any, row: Any, scale: Any, out: Any, to: Any) -> None:
    """The gradient of _turned, from fp32."""
    m = cos.shape[1]
    if m % LANES == 0 and 2 * m == d:
        rotate(x, begin, m, cos, row * m, sin, row * m, scale, np.float32(-1.0), out, to)
        return
    source, target = x[begin : begin + d], out[to : to + d]
    c, s = cos[row], sin[row]
    for j in range(m):
        a, b = source[j] * scale, source[m + j] * scale
        target[j] = narrow(a * c[j] + b * s[j], out)
        target[m + j] = narrow(b * c[j] - a * s[j], out)
    for j in range(2 * m, d):
        target[j] = narrow(source[j] * scale, out)


@inline
def _paired_rows(rows: Any, count: Any, n: Any, out: Any) -> None:
    """rows (count, n) bf16, count even: out[i, j] = the pair of rows[2 i, j] and rows[2 i + 1, j]."""
    for i in range(0, count, 2):
        row_pairs(rows, i * n, rows, (i + 1) * n, n, out, i // 2 * n)


@inline
def _by_columns(pairs: Any, count: Any, half: Any, out: Any) -> None:
    """pairs (count, half), multiples of COLUMNS and SIDE: blocks of COLUMNS rows, each turned to (half, COLUMNS)."""
    for first in range(0, count, COLUMNS):
        for i in range(0, COLUMNS, SIDE):
            for j in range(0, half, SIDE):
                turn(pairs, (first + i) * half + j, half, out, first * half + j * COLUMNS + i, COLUMNS)


@inline
def _turned_over(x: Any, at: Any, step: Any, count: Any, n: Any, out: Any, to: Any, width: Any) -> None:
    """x (count, n), rows `step` apart, multiples of SIDE, to (n, count), rows `width` apart."""
    for i in range(0, count, SIDE):
        for j in range(0, n, SIDE):
            turn(x, at + i * step + j, step, out, to + j * width + i, width)


@inline
def _up(n: Any, to: Any) -> Any:
    return (n + to - 1) // to * to


@inline
def _key_row(n: Any, prefix: Any, start: Any, front: Any) -> Any:
    """The packed row of a document's n-th key; front: that of the first."""
    return front + n if n < prefix else start + n - prefix


@inline
def _load_keys(
    k: Any, step: Any, head: Any, d: Any, cos: Any, sin: Any, prefix: Any, start: Any, front: Any, count: Any,
    padded: Any, out: Any,
) -> None:  # fmt: skip
    """A document's keys of one head as rows of `out`, turned, zeros behind them."""
    for n in range(count):
        row = _key_row(n, prefix, start, front)
        _turned(k, row * step + head * d, d, cos, sin, row, np.float32(1.0), out, n * d)
    out[count * d : padded * d] = 0


@inline
def _load_values(
    v: Any, step: Any, head: Any, d: Any, prefix: Any, start: Any, front: Any, count: Any, padded: Any, out: Any
) -> None:  # fmt: skip
    for n in range(count):
        begin = _key_row(n, prefix, start, front) * step + head * d
        source, to = v[begin : begin + d], out[n * d : (n + 1) * d]
        for j in range(d):
            to[j] = source[j]
    out[count * d : padded * d] = 0


@inline
def _seen(row: Any, group: Any, prefix: Any, window: Any) -> Any:
    """(first key, one behind the last) that row `row` of the document's queries sees."""
    end = prefix + row // group + 1
    return (max(end - window, 0) if window else 0), end


@loop
def _attend(
    q: Any, q_step: Any, k: Any, k_step: Any, v: Any, v_step: Any, cos: Any, sin: Any, scale: Any, docs: Any,
    tasks: Any, lanes: Any, key_value: Any, group: Any, d: Any, window: Any, softcap: Any, sinks: Any, out: Any,
    sums: Any,
) -> None:  # fmt: skip
    """q, k, v: flat, their rows `*_step` apart, head behind head. docs (D, 5): as
    Documents.table.

    tasks (N,): document * key_value + head, thread by thread; lanes (threads + 1,): where each thread's begin.
    softcap, sinks (heads,) or (0,): as in Heads. out (T, heads * d), sums (T, heads): the log of each row's sum of
    exponentials.
    """
    half, block, one = d // 2, d // 2 * COLUMNS, np.float32(1.0)
    longest = 0
    for doc in range(len(docs)):
        longest = max(longest, _up(docs[doc, 1] + docs[doc, 2], COLUMNS))
    for lane in prange(len(lanes) - 1):
        claim()
        rows16 = np.zeros(longest * d + GAP, np.uint16)
        keys = np.zeros(longest * half + GAP, np.uint32)
        values = np.zeros(longest // 2 * d + GAP, np.uint32)
        asked = np.zeros(BLOCK * d + GAP, np.uint16)
        scores = np.zeros(BLOCK * longest + GAP, np.float32)
        probs = np.zeros(BLOCK * longest + GAP, np.uint16)
        mixed = np.zeros(BLOCK * d + GAP, np.float32)
        tops, totals = np.zeros(BLOCK + GAP, np.float32), np.zeros(BLOCK + GAP, np.float32)
        pairs, questions, weights = rows16.view(np.uint32), asked.view(np.uint32), probs.view(np.uint32)
        for place in range(lanes[lane], lanes[lane + 1]):
            doc, head = tasks[place] // key_value, tasks[place] % key_value
            start, own, prefix, front = docs[doc, 0], docs[doc, 1], docs[doc, 2], docs[doc, 3]
            count = prefix + own
            padded = _up(count, COLUMNS)
            _load_keys(k, k_step, head, d, cos, sin, prefix, start, front, count, padded, rows16)
            _by_columns(pairs, padded, half, keys)
            _load_values(v, v_step, head, d, prefix, start, front, count, padded, rows16)
            _paired_rows(rows16, padded, d, values)
            for first in range(0, own * group, BLOCK):
                last = min(first + BLOCK, own * group)
                rows = _up(last - first, ROWS)
                for r in range(first, last):
                    row = start + r // group
                    at = row * q_step + (head * group + r % group) * d
                    _turned(q, at, d, cos, sin, row, scale, asked, (r - first) * d)
                asked[(last - first) * d : rows * d] = 0
                width = _up(_seen(last - 1, group, prefix, window)[1], COLUMNS)
                product(questions, 0, half, keys, 0, COLUMNS, block, scores, 0, width, rows, width, half, False)
                for r in range(rows):
                    begin, end = _seen(min(first + r, last - 1), group, prefix, window)
                    at = r * width
                    if softcap > 0:
                        bend(scores[at + begin : at + end], softcap)
                    tops[r] = highest(scores, at, width, begin, end)
                    totals[r] = exps(scores, at, width, begin, end, tops[r], probs, at)
                    if len(sinks):
                        totals[r] += np.exp(sinks[head * group + min(first + r, last - 1) % group] - tops[r])
                product(weights, 0, width // 2, values, 0, d, COLUMNS, mixed, 0, d, rows, d, width // 2, False)
                for r in range(first, last):
                    row, to = start + r // group, (head * group + r % group) * d
                    scaled(mixed, (r - first) * d, d, one / totals[r - first], out, row * out.shape[1] + to)
                    sums[row, head * group + r % group] = tops[r - first] + np.log(totals[r - first])
        release()


@loop
def _attend_backward(
    grad: Any, grad_step: Any, out: Any, sums: Any, q: Any, q_step: Any, k: Any, k_step: Any, v: Any, v_step: Any,
    cos: Any, sin: Any, scale: Any, docs: Any, tasks: Any, lanes: Any, key_value: Any, group: Any, d: Any, window: Any,
    softcap: Any, sinks: Any, dq: Any, dk: Any, dv: Any, into_step: Any, shared: Any,
) -> None:  # fmt: skip
    """Writes the gradients to dq, dk, dv, flat with rows `into_step` apart, as q, k, v are in _attend.

    shared (D, key_value, 2, prefix, d) fp32: what each document adds to the prefix's keys and values.
    """
    half, block, one, none = d // 2, d // 2 * COLUMNS, np.float32(1.0), np.float32(0.0)
    longest = 0
    for doc in range(len(docs)):
        longest = max(longest, _up(docs[doc, 1] + docs[doc, 2], COLUMNS))
    for lane in prange(len(lanes) - 1):
        claim()
        rows16 = np.zeros(longest * d + GAP, np.uint16)
        keys = np.zeros(longest * half + GAP, np.uint32)  # for the scores
        key_rows = np.zeros(longest // 2 * d + GAP, np.uint32)  # for dq
        values = np.zeros(longest * half + GAP, np.uint32)
        asked = np.zeros(BLOCK * d + GAP, np.uint16)
        asked_pairs = np.zeros(BLOCK // 2 * d + GAP, np.uint32)
        asked_over = np.zeros(BLOCK // 2 * d + GAP, np.uint32)
        given = np.zeros(BLOCK * d + GAP, np.uint16)
        given_over = np.zeros(BLOCK // 2 * d + GAP, np.uint32)
        scores = np.zeros(BLOCK * longest + GAP, np.float32)
        slopes = np.zeros(BLOCK * longest + GAP, np.float32)
        slopes16 = np.zeros(BLOCK * longest + GAP, np.uint16)
        score_pairs = np.zeros(BLOCK // 2 * longest + GAP, np.uint32)
        slope_pairs = np.zeros(BLOCK // 2 * longest + GAP, np.uint32)
        along = np.zeros(BLOCK + GAP, np.float32)
        mixed = np.zeros(BLOCK * d + GAP, np.float32)
        dk_over = np.zeros(longest * d + GAP, np.float32)
        dv_over = np.zeros(longest * d + GAP, np.float32)
        lines = np.zeros(SIDE * 2 * d + GAP, np.float32)
        pairs, questions = rows16.view(np.uint32), asked.view(np.uint32)
        answers, slope_rows = given.view(np.uint32), slopes16.view(np.uint32)
        for place in range(lanes[lane], lanes[lane + 1]):
            doc, head = tasks[place] // key_value, tasks[place] % key_value
            start, own, prefix, front = docs[doc, 0], docs[doc, 1], docs[doc, 2], docs[doc, 3]
            count = prefix + own
            padded = _up(count, COLUMNS)
            common = prefix + own * docs[doc, 4]  # of its keys, those that other documents see as well
            _load_keys(k, k_step, head, d, cos, sin, prefix, start, front, count, padded, rows16)
            _by_columns(pairs, padded, half, keys)
            _paired_rows(rows16, padded, d, key_rows)
            _load_values(v, v_step, head, d, prefix, start, front, count, padded, rows16)
            _by_columns(pairs, padded, half, values)
            dk_over[: padded * d] = none
            dv_over[: padded * d] = none
            for first in range(0, own * group, BLOCK):
                last = min(first + BLOCK, own * group)
                rows = _up(last - first, ROWS)
                asked[(last - first) * d :] = 0
                given[(last - first) * d :] = 0
                for r in range(first, last):
                    row, each = start + r // group, head * group + r % group
                    _turned(q, row * q_step + each * d, d, cos, sin, row, scale, asked, (r - first) * d)
                    at = row * grad_step + each * d
                    source, to = grad[at : at + d], given[(r - first) * d : (r - first + 1) * d]
                    for j in range(d):
                        to[j] = source[j]
                    along[r - first] = dot(grad, at, out, row * out.shape[1] + each * d, d)
                _paired_rows(asked, BLOCK, d, asked_pairs)
                _turned_over(asked_pairs, 0, d, BLOCK // 2, d, asked_over, 0, BLOCK // 2)
                _paired_rows(given, BLOCK, d, asked_pairs)
                _turned_over(asked_pairs, 0, d, BLOCK // 2, d, given_over, 0, BLOCK // 2)
                width = _up(_seen(last - 1, group, prefix, window)[1], COLUMNS)
                product(questions, 0, half, keys, 0, COLUMNS, block, scores, 0, width, rows, width, half, False)
                product(answers, 0, half, values, 0, COLUMNS, block, slopes, 0, width, rows, width, half, False)
                for r in range(rows):
                    begin, end = _seen(min(first + r, last - 1), group, prefix, window)
                    if first + r >= last:
                        end = begin
                    row = start + min(first + r, last - 1) // group
                    top = sums[row, head * group + min(first + r, last - 1) % group]
                    from_, to = r * width, (r + 1) * width
                    if softcap > 0:
                        given_row, slope_row = scores[from_:to], slopes[from_:to]
                        bent_slopes(given_row, slope_row, begin, end, top, along[r], softcap, slopes16[from_:to])
                    else:
                        slopes_of(scores, from_, width, begin, end, top, along[r], slopes, from_, slopes16, from_)
                for r in range(0, rows, 2):
                    at, odd = r * width, (r + 1) * width
                    row_pairs(scores, at, scores, odd, width, score_pairs, r // 2 * width)
                    row_pairs(slopes, at, slopes, odd, width, slope_pairs, r // 2 * width)
                product(slope_rows, 0, width // 2, key_rows, 0, d, COLUMNS, mixed, 0, d, rows, d, width // 2, False)
                step, deep = BLOCK // 2, rows // 2
                product(asked_over, 0, step, slope_pairs, 0, width, COLUMNS, dk_over, 0, padded, d, width, deep, True)
                product(given_over, 0, step, score_pairs, 0, width, COLUMNS, dv_over, 0, padded, d, width, deep, True)
                for r in range(first, last):
                    row, each = start + r // group, head * group + r % group
                    _turned_back(mixed, (r - first) * d, d, cos, sin, row, scale, dq, row * into_step + each * d)
            for n in range(count):
                if n % SIDE == 0:
                    _turned_over(dk_over, n, padded, d, SIDE, lines, 0, 2 * d)
                    _turned_over(dv_over, n, padded, d, SIDE, lines, d, 2 * d)
                line = lines[n % SIDE * 2 * d : (n % SIDE + 1) * 2 * d]
                row = _key_row(n, prefix, start, front)
                if n < common:
                    for j in range(d):
                        shared[doc, head, 0, n, j] = line[j]
                        shared[doc, head, 1, n, j] = line[d + j]
                else:
                    to = row * into_step + head * d
                    _turned_back(line, 0, d, cos, sin, row, one, dk, to)
                    scaled(line, d, d, one, dv, to)
        release()


@loop
def _add_shared(
    shared: Any, docs: Any, rows: Any, cos: Any, sin: Any, d: Any, dk: Any, dv: Any, into_step: Any
) -> None:  # fmt: skip
    """The gradients of the prefixes' keys and values: the sum of what the documents behind each add.

    rows (P, 2): each packed row of a prefix, and the prefix's first.
    """
    for place in prange(len(rows)):
        row, front = rows[place, 0], rows[place, 1]
        total = np.zeros(2 * d + GAP, np.float32)
        for head in range(shared.shape[1]):
            total[: 2 * d] = np.float32(0.0)
            for doc in range(len(docs)):
                if docs[doc, 3] == front and (docs[doc, 2] or docs[doc, 4]):
                    for j in range(d):
                        total[j] += shared[doc, head, 0, row - front, j]
                        total[d + j] += shared[doc, head, 1, row - front, j]
            to = row * into_step + head * d
            _turned_back(total, 0, d, cos, sin, row, np.float32(1.0), dk, to)
            scaled(total, d, d, np.float32(1.0), dv, to)


Turn = tuple[Tensor, Tensor, np.float32]  # cos, sin (T, m), and what q is scaled by
# docs, tasks, lanes, key_value, group, d, window, softcap, sinks
Work = tuple[Any, Any, Any, int, int, int, int, Any, Any]


def attend(qkv: tuple[Tensor, Tensor, Tensor], turn: Turn, work: Work, out: Tensor, sums: Tensor) -> None:
    """q (T, heads, d), k, v (T, key_value, d), in bf16, to out (T, heads * d); sums (T, heads): for the backward."""
    _attend(*_each(qkv), *_angles(turn), *work, array(out), array(sums))


def attend_backward(
    grad: Tensor, out: Tensor, sums: Tensor, qkv: tuple[Tensor, Tensor, Tensor], turn: Turn, work: Work,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """grad (T, heads, d): the gradient of attend's output. Writes those of q, k and v into views of one tensor."""
    docs, _, _, key_value, _, d, *_ = work
    prefix = int(docs[:, 2].max())
    shared = np.empty((len(docs) if prefix else 0, key_value, 2, prefix, d), np.float32)
    dq, dk, dv = (flat(x) for x in into)
    step, angles = into[0].stride(0), _angles(turn)
    _attend_backward(
        flat(grad), grad.stride(0), array(out), array(sums), *_each(qkv), *angles, *work, dq, dk, dv, step, shared
    )  # fmt: skip
    if prefix:
        fronts = dict(docs[docs[:, 2] > 0][:, [3, 2]].tolist())
        rows = np.array([(row, front) for front, n in fronts.items() for row in range(front, front + n)], np.int64)
        _add_shared(shared, docs, rows, *angles[:2], d, dk, dv, step)


def _each(qkv: tuple[Tensor, Tensor, Tensor]) -> tuple[Any, int, Any, int, Any, int]:
    q, k, v = qkv
    return flat(q), q.stride(0), flat(k), k.stride(0), flat(v), v.stride(0)


def _angles(turn: Turn) -> tuple[Any, Any, Any]:
    cos, sin, scale = turn
    return array(cos), array(sin), scale


# ---- from strop.engine.kernels.cpu.attention_scores ----
"""Rows of attention's scores that are bent (soft caps), in fp32: parts of the loops of attention_tiles."""

from __future__ import annotations

from typing import Any

import numpy as np

from strop.engine.kernels.cpu.compiled import exp, greater, inline, narrow, tanh


@inline
def bend(scores: Any, softcap: Any) -> None:
    for j in range(len(scores)):
        scores[j] = softcap * tanh(scores[j] / softcap)


@inline
def bent_slopes(
    scores: Any, slopes: Any, begin: Any, end: Any, top: Any, along: Any, softcap: Any, out: Any
) -> None:  # fmt: skip
    """As vectors.slopes_of, where scores are bent first."""
    none = np.float32(0.0)
    scores[:begin] = none
    scores[end:] = none
    slopes[:begin] = none
    slopes[end:] = none
    # Loops from 0 on slices: numba looks for negative places in others, and they are not vectorised.
    probs, grads = scores[begin:end], slopes[begin:end]
    for j in range(len(probs)):
        bent = tanh(probs[j] / softcap)
        # Above 0 by rounding alone: exp is made for what is not positive.
        probs[j] = exp(-greater(top - softcap * bent, none))
        grads[j] = probs[j] * (grads[j] - along) * (np.float32(1.0) - bent * bent)
    for j in range(len(slopes)):
        out[j] = narrow(slopes[j], out)


# ---- from strop.engine.kernels.cpu.attention ----
"""Attention over packed documents as one compiled loop, for CPUs with AVX512-BF16."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from strop.engine.kernels.cpu.attention import Work, attend, attend_backward
from strop.engine.kernels.cpu.compiled import array
from strop.engine.train.attention import Heads
from strop.engine.train.packing import Documents


class TileAttention(Function):
    """Attention, in bf16; saves qkv, the output and a number for each row and head.

    Gradients beyond the norms of q and k are written in place, of the prefix's rows after the sum over documents.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, documents: Documents) -> Tensor:
        out = heads.new(len(qkv), heads.query * heads.size, qkv)
        sums = heads.new(len(qkv), heads.query, cos)
        attend(heads.normed(qkv), _turn(heads, cos, sin), _work(heads, documents), out, sums)
        ctx.heads, ctx.documents = heads, documents
        ctx.save_for_backward(qkv, cos, sin, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        heads: Heads = ctx.heads
        qkv, cos, sin, out, sums = ctx.saved_tensors
        result = torch.empty_like(qkv)
        into = heads.views(result)
        grad = grad.reshape(len(qkv), heads.query, heads.size)
        work = _work(heads, ctx.documents)
        attend_backward(grad, out, sums, heads.normed(qkv), _turn(heads, cos, sin), work, into)
        heads.norms_backward_(into, qkv)
        return result, None, None, None, None


def _turn(heads: Heads, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, np.float32]:
    return cos, sin, np.float32(heads.scale)


def _work(heads: Heads, documents: Documents) -> Work:
    shares = documents.shares(heads.key_value, torch.get_num_threads())
    shape = heads.key_value, heads.group, heads.size, heads.window
    sinks = np.empty(0, np.float32) if heads.sinks is None else array(heads.sinks)
    return documents.table, *shares, *shape, np.float32(heads.softcap), sinks
