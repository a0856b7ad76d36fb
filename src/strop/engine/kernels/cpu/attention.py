"""Causal attention over packed documents in one compiled kernel, for CPUs with AVX512-BF16, without padding.

A task is one document and one key-value head. Its keys (rotated) and values are packed for the tile multiplication and
stay in the CPU cache while blocks of queries are multiplied with them; so do the scores, in fp32. The backward
recomputes the probabilities from the saved log-sum-exp (arXiv:2205.14135), so memory is linear in the length.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.autograd import Function

from strop.engine.kernels.cpu.compiled import (
    GAP,
    SIDE,
    array,
    exp,
    from_fp32,
    kernel,
    maximum,
    subroutine,
    tanh,
    to_fp32,
    transpose,
)
from strop.engine.kernels.cpu.elementwise import flatten, visible
from strop.engine.kernels.cpu.tile import COLUMNS, ROWS, claim, matmul, release
from strop.engine.kernels.cpu.vectors import (
    LANES,
    dot,
    exp_within,
    max_within,
    pair_rows,
    rotate,
    scale_row,
    softmax_gradient,
)
from strop.engine.train.attention import Heads
from strop.engine.train.packing import Documents

BLOCK = 64  # query rows (the heads of a token one after another) that are multiplied with the keys together


@subroutine
def _rotate(x: Any, begin: Any, d: Any, cos: Any, sin: Any, row: Any, scale: Any, out: Any, to: Any) -> None:
    """Apply the rotary embedding of a row to one head, and scale it."""
    m = cos.shape[1]
    if m % LANES == 0 and 2 * m == d:
        rotate(x, begin, m, cos, row * m, sin, row * m, scale, np.float32(1.0), out, to)
        return
    source, target = x[begin : begin + d], out[to : to + d]
    c, s = cos[row], sin[row]
    for j in range(m):
        a, b = to_fp32(source[j]), to_fp32(source[m + j])
        target[j] = from_fp32((a * c[j] - b * s[j]) * scale, out)
        target[m + j] = from_fp32((b * c[j] + a * s[j]) * scale, out)
    for j in range(2 * m, d):
        target[j] = from_fp32(to_fp32(source[j]) * scale, out)


@subroutine
def _rotate_backward(x: Any, begin: Any, d: Any, cos: Any, sin: Any, row: Any, scale: Any, out: Any, to: Any) -> None:
    """Write the gradient of _rotate's input; x: the gradient of its output, fp32."""
    m = cos.shape[1]
    if m % LANES == 0 and 2 * m == d:
        rotate(x, begin, m, cos, row * m, sin, row * m, scale, np.float32(-1.0), out, to)
        return
    source, target = x[begin : begin + d], out[to : to + d]
    c, s = cos[row], sin[row]
    for j in range(m):
        a, b = source[j] * scale, source[m + j] * scale
        target[j] = from_fp32(a * c[j] + b * s[j], out)
        target[m + j] = from_fp32(b * c[j] - a * s[j], out)
    for j in range(2 * m, d):
        target[j] = from_fp32(source[j] * scale, out)


@subroutine
def _cap(scores: Any, softcap: Any) -> None:
    for j in range(len(scores)):
        scores[j] = softcap * tanh(scores[j] / softcap)


@subroutine
def _capped_softmax_gradient(
    scores: Any, grads: Any, begin: Any, end: Any, logsumexp: Any, dot: Any, softcap: Any, out: Any
) -> None:  # fmt: skip
    """Compute vectors.softmax_gradient for scores to which the soft cap is not applied yet."""
    zero = np.float32(0.0)
    scores[:begin] = zero
    scores[end:] = zero
    grads[:begin] = zero
    grads[end:] = zero
    # Loops over slices from 0: numba checks other ranges for negative indices, and they are not vectorized.
    probs, grad_scores = scores[begin:end], grads[begin:end]
    for j in range(len(probs)):
        t = tanh(probs[j] / softcap)
        # Rounding alone can make the difference negative, and exp is for x <= 0.
        probs[j] = exp(-maximum(logsumexp - softcap * t, zero))
        grad_scores[j] = probs[j] * (grad_scores[j] - dot) * (np.float32(1.0) - t * t)
    for j in range(len(grads)):
        out[j] = from_fp32(grads[j], out)


@subroutine
def _pair_all_rows(rows: Any, count: Any, n: Any, out: Any) -> None:
    """Pack rows (count, n) of bf16, count even: out[i, j] = the pair of rows[2 i, j] and rows[2 i + 1, j]."""
    for i in range(0, count, 2):
        pair_rows(rows, i * n, rows, (i + 1) * n, n, out, i // 2 * n)


@subroutine
def _transpose_blocks(pairs: Any, count: Any, half: Any, out: Any) -> None:
    """Transpose each block of COLUMNS rows of pairs (count, half) to (half, COLUMNS); multiples of COLUMNS and SIDE."""
    for first in range(0, count, COLUMNS):
        for i in range(0, COLUMNS, SIDE):
            for j in range(0, half, SIDE):
                transpose(pairs, (first + i) * half + j, half, out, first * half + j * COLUMNS + i, COLUMNS)


@subroutine
def _transpose(x: Any, at: Any, step: Any, count: Any, n: Any, out: Any, to: Any, width: Any) -> None:
    """Transpose x (count, n), with rows `step` apart, to (n, count), with rows `width` apart; multiples of SIDE."""
    for i in range(0, count, SIDE):
        for j in range(0, n, SIDE):
            transpose(x, at + i * step + j, step, out, to + j * width + i, width)


@subroutine
def _round_up(n: Any, to: Any) -> Any:
    return (n + to - 1) // to * to


@subroutine
def _key_row(n: Any, prefix: Any, start: Any, prefix_start: Any) -> Any:
    """Return the packed row of a document's n-th key."""
    return prefix_start + n if n < prefix else start + n - prefix


@subroutine
def _load_keys(
    k: Any, step: Any, head: Any, d: Any, cos: Any, sin: Any, prefix: Any, start: Any, prefix_start: Any, count: Any,
    padded: Any, out: Any,
) -> None:  # fmt: skip
    """Write a document's rotated keys of one head as rows of `out`, followed by zeros."""
    for n in range(count):
        row = _key_row(n, prefix, start, prefix_start)
        _rotate(k, row * step + head * d, d, cos, sin, row, np.float32(1.0), out, n * d)
    out[count * d : padded * d] = 0


@subroutine
def _load_values(
    v: Any, step: Any, head: Any, d: Any, prefix: Any, start: Any, prefix_start: Any, count: Any, padded: Any, out: Any
) -> None:  # fmt: skip
    for n in range(count):
        begin = _key_row(n, prefix, start, prefix_start) * step + head * d
        source, target = v[begin : begin + d], out[n * d : (n + 1) * d]
        for j in range(d):
            target[j] = source[j]
    out[count * d : padded * d] = 0


@kernel
def _attend(
    q: Any, q_step: Any, k: Any, k_step: Any, v: Any, v_step: Any, cos: Any, sin: Any, scale: Any, docs: Any,
    tasks: Any, lanes: Any, key_value: Any, group: Any, d: Any, window: Any, softcap: Any, sinks: Any, out: Any,
    logsumexps: Any,
) -> None:  # fmt: skip
    """Compute attention of all documents.

    q, k, v: one-dimensional, with rows `*_step` apart and heads one after another. docs (D, 5): Documents.table. tasks
    (N,): document * key_value + head, thread by thread; lanes (threads + 1,): where each thread's tasks begin. softcap,
    sinks (heads,) or (0,): as in Heads. out (T, heads * d); logsumexps (T, heads): log of each row's sum of
    exponentials.
    """
    half, block, one = d // 2, d // 2 * COLUMNS, np.float32(1.0)
    longest = 0
    for doc in range(len(docs)):
        longest = max(longest, _round_up(docs[doc, 1] + docs[doc, 2], COLUMNS))
    for lane in prange(len(lanes) - 1):
        claim()
        rows16 = np.zeros(longest * d + GAP, np.uint16)
        keys = np.zeros(longest * half + GAP, np.uint32)
        values = np.zeros(longest // 2 * d + GAP, np.uint32)
        queries = np.zeros(BLOCK * d + GAP, np.uint16)
        scores = np.zeros(BLOCK * longest + GAP, np.float32)
        probs = np.zeros(BLOCK * longest + GAP, np.uint16)
        block_out = np.zeros(BLOCK * d + GAP, np.float32)
        row_max, totals = np.zeros(BLOCK + GAP, np.float32), np.zeros(BLOCK + GAP, np.float32)
        row_pairs, query_pairs, prob_pairs = rows16.view(np.uint32), queries.view(np.uint32), probs.view(np.uint32)
        for place in range(lanes[lane], lanes[lane + 1]):
            doc, head = tasks[place] // key_value, tasks[place] % key_value
            start, length, prefix, prefix_start = docs[doc, 0], docs[doc, 1], docs[doc, 2], docs[doc, 3]
            count = prefix + length
            padded = _round_up(count, COLUMNS)
            _load_keys(k, k_step, head, d, cos, sin, prefix, start, prefix_start, count, padded, rows16)
            _transpose_blocks(row_pairs, padded, half, keys)
            _load_values(v, v_step, head, d, prefix, start, prefix_start, count, padded, rows16)
            _pair_all_rows(rows16, padded, d, values)
            for first in range(0, length * group, BLOCK):
                last = min(first + BLOCK, length * group)
                rows = _round_up(last - first, ROWS)
                for r in range(first, last):
                    row = start + r // group
                    at = row * q_step + (head * group + r % group) * d
                    _rotate(q, at, d, cos, sin, row, scale, queries, (r - first) * d)
                queries[(last - first) * d : rows * d] = 0
                width = _round_up(visible(last - 1, group, prefix, window)[1], COLUMNS)
                matmul(query_pairs, 0, half, keys, 0, COLUMNS, block, scores, 0, width, rows, width, half, False)
                for r in range(rows):
                    begin, end = visible(min(first + r, last - 1), group, prefix, window)
                    at = r * width
                    if softcap > 0:
                        _cap(scores[at + begin : at + end], softcap)
                    row_max[r] = max_within(scores, at, width, begin, end)
                    totals[r] = exp_within(scores, at, width, begin, end, row_max[r], probs, at)
                    if len(sinks):
                        totals[r] += np.exp(sinks[head * group + min(first + r, last - 1) % group] - row_max[r])
                matmul(prob_pairs, 0, width // 2, values, 0, d, COLUMNS, block_out, 0, d, rows, d, width // 2, False)
                for r in range(first, last):
                    row, to = start + r // group, (head * group + r % group) * d
                    scale_row(block_out, (r - first) * d, d, one / totals[r - first], out, row * out.shape[1] + to)
                    logsumexps[row, head * group + r % group] = row_max[r - first] + np.log(totals[r - first])
        release()


@kernel
def _attend_backward(
    grad: Any, grad_step: Any, out: Any, logsumexps: Any, q: Any, q_step: Any, k: Any, k_step: Any, v: Any, v_step: Any,
    cos: Any, sin: Any, scale: Any, docs: Any, tasks: Any, lanes: Any, key_value: Any, group: Any, d: Any, window: Any,
    softcap: Any, sinks: Any, dq: Any, dk: Any, dv: Any, out_step: Any, prefix_grads: Any,
) -> None:  # fmt: skip
    """Write the gradients of q, k, v to dq, dk, dv: one-dimensional, with rows `out_step` apart; the rest as _attend.

    prefix_grads (D, key_value, 2, prefix, d) fp32: each document's term of the gradients of its prefix's keys and
    values.
    """
    half, block, one, zero = d // 2, d // 2 * COLUMNS, np.float32(1.0), np.float32(0.0)
    longest = 0
    for doc in range(len(docs)):
        longest = max(longest, _round_up(docs[doc, 1] + docs[doc, 2], COLUMNS))
    for lane in prange(len(lanes) - 1):
        claim()
        rows16 = np.zeros(longest * d + GAP, np.uint16)
        keys = np.zeros(longest * half + GAP, np.uint32)  # for the scores
        key_rows = np.zeros(longest // 2 * d + GAP, np.uint32)  # for dq
        values = np.zeros(longest * half + GAP, np.uint32)
        queries = np.zeros(BLOCK * d + GAP, np.uint16)
        block_pairs = np.zeros(BLOCK // 2 * d + GAP, np.uint32)
        queries_t = np.zeros(BLOCK // 2 * d + GAP, np.uint32)  # transposed
        grads = np.zeros(BLOCK * d + GAP, np.uint16)
        grads_t = np.zeros(BLOCK // 2 * d + GAP, np.uint32)
        scores = np.zeros(BLOCK * longest + GAP, np.float32)
        grad_scores = np.zeros(BLOCK * longest + GAP, np.float32)
        grad_scores16 = np.zeros(BLOCK * longest + GAP, np.uint16)
        score_pairs = np.zeros(BLOCK // 2 * longest + GAP, np.uint32)
        grad_score_pairs = np.zeros(BLOCK // 2 * longest + GAP, np.uint32)
        dots = np.zeros(BLOCK + GAP, np.float32)
        dq_block = np.zeros(BLOCK * d + GAP, np.float32)
        dk_t = np.zeros(longest * d + GAP, np.float32)
        dv_t = np.zeros(longest * d + GAP, np.float32)
        transposed = np.zeros(SIDE * 2 * d + GAP, np.float32)
        row_pairs, query_pairs = rows16.view(np.uint32), queries.view(np.uint32)
        grad_pairs, grad_score_rows = grads.view(np.uint32), grad_scores16.view(np.uint32)
        for place in range(lanes[lane], lanes[lane + 1]):
            doc, head = tasks[place] // key_value, tasks[place] % key_value
            start, length, prefix, prefix_start = docs[doc, 0], docs[doc, 1], docs[doc, 2], docs[doc, 3]
            count = prefix + length
            padded = _round_up(count, COLUMNS)
            num_shared = prefix + length * docs[doc, 4]  # keys that other documents also attend to
            _load_keys(k, k_step, head, d, cos, sin, prefix, start, prefix_start, count, padded, rows16)
            _transpose_blocks(row_pairs, padded, half, keys)
            _pair_all_rows(rows16, padded, d, key_rows)
            _load_values(v, v_step, head, d, prefix, start, prefix_start, count, padded, rows16)
            _transpose_blocks(row_pairs, padded, half, values)
            dk_t[: padded * d] = zero
            dv_t[: padded * d] = zero
            for first in range(0, length * group, BLOCK):
                last = min(first + BLOCK, length * group)
                rows = _round_up(last - first, ROWS)
                queries[(last - first) * d :] = 0
                grads[(last - first) * d :] = 0
                for r in range(first, last):
                    row, query = start + r // group, head * group + r % group
                    _rotate(q, row * q_step + query * d, d, cos, sin, row, scale, queries, (r - first) * d)
                    at = row * grad_step + query * d
                    source, target = grad[at : at + d], grads[(r - first) * d : (r - first + 1) * d]
                    for j in range(d):
                        target[j] = source[j]
                    dots[r - first] = dot(grad, at, out, row * out.shape[1] + query * d, d)
                _pair_all_rows(queries, BLOCK, d, block_pairs)
                _transpose(block_pairs, 0, d, BLOCK // 2, d, queries_t, 0, BLOCK // 2)
                _pair_all_rows(grads, BLOCK, d, block_pairs)
                _transpose(block_pairs, 0, d, BLOCK // 2, d, grads_t, 0, BLOCK // 2)
                width = _round_up(visible(last - 1, group, prefix, window)[1], COLUMNS)
                matmul(query_pairs, 0, half, keys, 0, COLUMNS, block, scores, 0, width, rows, width, half, False)
                matmul(grad_pairs, 0, half, values, 0, COLUMNS, block, grad_scores, 0, width, rows, width, half, False)
                for r in range(rows):
                    begin, end = visible(min(first + r, last - 1), group, prefix, window)
                    if first + r >= last:
                        end = begin
                    row = start + min(first + r, last - 1) // group
                    top = logsumexps[row, head * group + min(first + r, last - 1) % group]
                    from_, to = r * width, (r + 1) * width
                    if softcap > 0:
                        row_scores, row_grads, row_out = (
                            scores[from_:to],
                            grad_scores[from_:to],
                            grad_scores16[from_:to],
                        )
                        _capped_softmax_gradient(row_scores, row_grads, begin, end, top, dots[r], softcap, row_out)
                    else:
                        softmax_gradient(
                            scores, from_, width, begin, end, top, dots[r], grad_scores, from_, grad_scores16, from_
                        )
                for r in range(0, rows, 2):
                    at, odd = r * width, (r + 1) * width
                    pair_rows(scores, at, scores, odd, width, score_pairs, r // 2 * width)
                    pair_rows(grad_scores, at, grad_scores, odd, width, grad_score_pairs, r // 2 * width)
                matmul(
                    grad_score_rows, 0, width // 2, key_rows, 0, d, COLUMNS, dq_block, 0, d, rows, d, width // 2, False
                )
                step, num_pairs = BLOCK // 2, rows // 2
                matmul(
                    queries_t, 0, step, grad_score_pairs, 0, width, COLUMNS, dk_t, 0, padded, d, width, num_pairs, True
                )
                matmul(grads_t, 0, step, score_pairs, 0, width, COLUMNS, dv_t, 0, padded, d, width, num_pairs, True)
                for r in range(first, last):
                    row, query = start + r // group, head * group + r % group
                    _rotate_backward(dq_block, (r - first) * d, d, cos, sin, row, scale, dq, row * out_step + query * d)
            for n in range(count):
                if n % SIDE == 0:
                    _transpose(dk_t, n, padded, d, SIDE, transposed, 0, 2 * d)
                    _transpose(dv_t, n, padded, d, SIDE, transposed, d, 2 * d)
                line = transposed[n % SIDE * 2 * d : (n % SIDE + 1) * 2 * d]
                row = _key_row(n, prefix, start, prefix_start)
                if n < num_shared:
                    for j in range(d):
                        prefix_grads[doc, head, 0, n, j] = line[j]
                        prefix_grads[doc, head, 1, n, j] = line[d + j]
                else:
                    to = row * out_step + head * d
                    _rotate_backward(line, 0, d, cos, sin, row, one, dk, to)
                    scale_row(line, d, d, one, dv, to)
        release()


@kernel
def _add_shared(
    prefix_grads: Any, docs: Any, rows: Any, cos: Any, sin: Any, d: Any, dk: Any, dv: Any, out_step: Any
) -> None:  # fmt: skip
    """Write the gradients of the prefixes' keys and values, summed over the documents that share each prefix.

    rows (P, 2): each packed row of a prefix, and the prefix's first row.
    """
    for place in prange(len(rows)):
        row, prefix_start = rows[place, 0], rows[place, 1]
        total = np.zeros(2 * d + GAP, np.float32)
        for head in range(prefix_grads.shape[1]):
            total[: 2 * d] = np.float32(0.0)
            for doc in range(len(docs)):
                if docs[doc, 3] == prefix_start and (docs[doc, 2] or docs[doc, 4]):
                    for j in range(d):
                        total[j] += prefix_grads[doc, head, 0, row - prefix_start, j]
                        total[d + j] += prefix_grads[doc, head, 1, row - prefix_start, j]
            to = row * out_step + head * d
            _rotate_backward(total, 0, d, cos, sin, row, np.float32(1.0), dk, to)
            scale_row(total, d, d, np.float32(1.0), dv, to)


class TiledAttention(Function):
    """Attention in bf16: qkv (T, (query + 2 key_value) * size) to (T, query * size).

    Saves qkv, the output, and the log-sum-exp of each row and head. Gradients are written in place; those of the rows
    of a shared prefix after the sum over documents.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, documents: Documents) -> Tensor:
        out = heads.new(len(qkv), heads.query * heads.size, qkv)
        logsumexps = heads.new(len(qkv), heads.query, cos)
        inputs = _inputs(heads.normalized(qkv), heads, cos, sin)
        cast(Any, _attend)(*inputs, *_work(heads, documents), array(out), array(logsumexps))
        ctx.heads, ctx.documents = heads, documents
        ctx.save_for_backward(qkv, cos, sin, out, logsumexps)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        heads: Heads = ctx.heads
        qkv, cos, sin, out, logsumexps = ctx.saved_tensors
        result = torch.empty_like(qkv)
        views = heads.views(result)
        grad = grad.reshape(len(qkv), heads.query, heads.size)
        work, inputs = _work(heads, ctx.documents), _inputs(heads.normalized(qkv), heads, cos, sin)
        docs, prefix = work[0], int(work[0][:, 2].max())
        prefix_grads = np.empty((len(docs) if prefix else 0, heads.key_value, 2, prefix, heads.size), np.float32)
        targets = *(flatten(x) for x in views), views[0].stride(0)
        cast(Any, _attend_backward)(
            flatten(grad), grad.stride(0), array(out), array(logsumexps), *inputs, *work, *targets, prefix_grads
        )  # fmt: skip
        if prefix:
            lengths = dict(docs[docs[:, 2] > 0][:, [3, 2]].tolist())
            pairs = [(row, start) for start, n in lengths.items() for row in range(start, start + n)]
            _add_shared(prefix_grads, docs, np.array(pairs, np.int64), array(cos), array(sin), heads.size, *targets[1:])
        heads.backward_norms_(views, qkv)
        return result, None, None, None, None


def _inputs(qkv: tuple[Tensor, Tensor, Tensor], heads: Heads, cos: Tensor, sin: Tensor) -> tuple[Any, ...]:
    """Return the arguments of _attend from q to scale; q, k, v: (T, heads, size)."""
    q, k, v = qkv
    flat = flatten(q), q.stride(0), flatten(k), k.stride(0), flatten(v), v.stride(0)
    return *flat, array(cos), array(sin), np.float32(heads.scale)


def _work(heads: Heads, documents: Documents) -> tuple[Any, ...]:
    """Return the arguments of _attend from docs to sinks."""
    shares = documents.thread_tasks(heads.key_value, torch.get_num_threads())
    shape = heads.key_value, heads.group, heads.size, heads.window
    sinks = np.empty(0, np.float32) if heads.sinks is None else array(heads.sinks)
    return documents.table, *shares, *shape, np.float32(heads.softcap), sinks
