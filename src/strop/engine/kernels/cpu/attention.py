"""Causal attention over packed documents in one compiled kernel, for CPUs with AVX512-BF16, without padding.

A thread computes one document and one key-value head at a time. The keys, after the rotary embedding, and the values
are packed for `tile.matmul` and stay in the CPU cache while blocks of queries are multiplied with them. The backward
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
from strop.engine.kernels.cpu.elementwise import flatten, visible_keys
from strop.engine.kernels.cpu.tile import COLUMNS, ROWS, claim_tiles, matmul, release_tiles
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

BLOCK = 64  # query rows per matmul; a token has one row for each query head of the group
# Buffers are allocated with GAP extra elements, which are not used; the reason is explained at GAP in compiled.py.


@subroutine
def _rotate(x: Any, x_at: Any, d: Any, cos: Any, sin: Any, row: Any, scale: Any, out: Any, out_at: Any) -> None:
    """Apply the rotary embedding of a packed row to one head of x and multiply by `scale`.

    x_at, out_at: index of the head's first element. d: head size.
    """
    m = cos.shape[1]
    if m % LANES == 0 and 2 * m == d:
        rotate(x, x_at, m, cos, row * m, sin, row * m, scale, np.float32(1.0), out, out_at)
        return
    source, target = x[x_at : x_at + d], out[out_at : out_at + d]
    c, s = cos[row], sin[row]
    for j in range(m):
        a, b = to_fp32(source[j]), to_fp32(source[m + j])
        target[j] = from_fp32((a * c[j] - b * s[j]) * scale, out)
        target[m + j] = from_fp32((b * c[j] + a * s[j]) * scale, out)
    for j in range(2 * m, d):
        target[j] = from_fp32(to_fp32(source[j]) * scale, out)


@subroutine
def _rotate_backward(
    x: Any, x_at: Any, d: Any, cos: Any, sin: Any, row: Any, scale: Any, out: Any, out_at: Any
) -> None:  # fmt: skip
    """Write the gradient with respect to the input of _rotate. x: the gradient of its output, fp32."""
    m = cos.shape[1]
    if m % LANES == 0 and 2 * m == d:
        rotate(x, x_at, m, cos, row * m, sin, row * m, scale, np.float32(-1.0), out, out_at)
        return
    source, target = x[x_at : x_at + d], out[out_at : out_at + d]
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
    """Apply the soft cap to the scores, then compute the same as vectors.softmax_gradient."""
    zero = np.float32(0.0)
    scores[:begin] = zero
    scores[end:] = zero
    grads[:begin] = zero
    grads[end:] = zero
    # These loops start at 0, because numba checks other ranges for negative indices and does not vectorize them.
    probs, grad_scores = scores[begin:end], grads[begin:end]
    for j in range(len(probs)):
        t = tanh(probs[j] / softcap)
        # Rounding can make the difference negative, but exp requires x <= 0.
        probs[j] = exp(-maximum(logsumexp - softcap * t, zero))
        grad_scores[j] = probs[j] * (grad_scores[j] - dot) * (np.float32(1.0) - t * t)
    for j in range(len(grads)):
        out[j] = from_fp32(grads[j], out)


@subroutine
def _pair_all_rows(rows: Any, count: Any, n: Any, out: Any) -> None:
    """Write pairs of adjacent rows (count, n), bf16: out[i, j] packs rows[2 i, j] and rows[2 i + 1, j]."""
    for i in range(0, count, 2):
        pair_rows(rows, i * n, rows, (i + 1) * n, n, out, i // 2 * n)


@subroutine
def _transpose(x: Any, x_at: Any, step: Any, count: Any, n: Any, out: Any, out_at: Any, out_step: Any) -> None:
    """Transpose x (count, n) to `out`. count, n: multiples of SIDE; step, out_step: distances between rows."""
    for i in range(0, count, SIDE):
        for j in range(0, n, SIDE):
            transpose(x, x_at + i * step + j, step, out, out_at + j * out_step + i, out_step)


@subroutine
def _transpose_blocks(pairs: Any, count: Any, half: Any, out: Any) -> None:
    """Transpose each block of COLUMNS rows of pairs (count, half) to (half, COLUMNS)."""
    for first in range(0, count, COLUMNS):
        _transpose(pairs, first * half, half, COLUMNS, half, out, first * half, COLUMNS)


@subroutine
def _round_up(n: Any, multiple: Any) -> Any:
    return (n + multiple - 1) // multiple * multiple


@subroutine
def _key_row(n: Any, prefix: Any, start: Any, prefix_start: Any) -> Any:
    """Return the packed row of key n of a document, counted from the start of its prefix."""
    return prefix_start + n if n < prefix else start + n - prefix


@subroutine
def _load_keys(
    k: Any, step: Any, head: Any, d: Any, cos: Any, sin: Any, prefix: Any, start: Any, prefix_start: Any, count: Any,
    padded: Any, out: Any,
) -> None:  # fmt: skip
    """Write the rotated keys of a document and head to `out` (padded, d), with zeros after the last key."""
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
    tasks: Any, task_starts: Any, num_kv_heads: Any, group: Any, d: Any, window: Any, softcap: Any, sinks: Any,
    out: Any, logsumexps: Any,
) -> None:  # fmt: skip
    """Compute the attention of all documents.

    q, k, v: results of `flatten`; q_step, k_step, v_step: the distances between their rows. docs: the result of
    Documents.table, whose columns are start, length, prefix, prefix_start and is_prefix. tasks, task_starts: results of
    Documents.thread_tasks. sinks: as in Heads, or empty. out: output, (T, heads * d). logsumexps: output, (T, heads),
    the log-sum-exp of the scores of each row and head.
    """
    half, block, one = d // 2, d // 2 * COLUMNS, np.float32(1.0)
    max_keys = 0
    for doc in range(len(docs)):
        max_keys = max(max_keys, _round_up(docs[doc, 1] + docs[doc, 2], COLUMNS))
    for thread in prange(len(task_starts) - 1):
        claim_tiles()
        rows_bf16 = np.zeros(max_keys * d + GAP, np.uint16)
        keys = np.zeros(max_keys * half + GAP, np.uint32)
        values = np.zeros(max_keys // 2 * d + GAP, np.uint32)
        queries = np.zeros(BLOCK * d + GAP, np.uint16)
        scores = np.zeros(BLOCK * max_keys + GAP, np.float32)
        probs = np.zeros(BLOCK * max_keys + GAP, np.uint16)
        block_out = np.zeros(BLOCK * d + GAP, np.float32)
        row_max, totals = np.zeros(BLOCK + GAP, np.float32), np.zeros(BLOCK + GAP, np.float32)
        row_pairs, query_pairs, prob_pairs = rows_bf16.view(np.uint32), queries.view(np.uint32), probs.view(np.uint32)
        for index in range(task_starts[thread], task_starts[thread + 1]):
            doc, kv_head = tasks[index] // num_kv_heads, tasks[index] % num_kv_heads
            start, length, prefix, prefix_start = docs[doc, 0], docs[doc, 1], docs[doc, 2], docs[doc, 3]
            count = prefix + length
            padded = _round_up(count, COLUMNS)
            _load_keys(k, k_step, kv_head, d, cos, sin, prefix, start, prefix_start, count, padded, rows_bf16)
            _transpose_blocks(row_pairs, padded, half, keys)
            _load_values(v, v_step, kv_head, d, prefix, start, prefix_start, count, padded, rows_bf16)
            _pair_all_rows(rows_bf16, padded, d, values)
            for first in range(0, length * group, BLOCK):
                last = min(first + BLOCK, length * group)
                rows = _round_up(last - first, ROWS)
                for r in range(first, last):
                    row = start + r // group
                    offset = row * q_step + (kv_head * group + r % group) * d
                    _rotate(q, offset, d, cos, sin, row, scale, queries, (r - first) * d)
                queries[(last - first) * d : rows * d] = 0
                width = _round_up(visible_keys(last - 1, group, prefix, window)[1], COLUMNS)
                matmul(query_pairs, 0, half, keys, 0, COLUMNS, block, scores, 0, width, rows, width, half, False)
                for r in range(rows):
                    begin, end = visible_keys(min(first + r, last - 1), group, prefix, window)
                    offset = r * width
                    if softcap > 0:
                        _cap(scores[offset + begin : offset + end], softcap)
                    row_max[r] = max_within(scores, offset, width, begin, end)
                    totals[r] = exp_within(scores, offset, width, begin, end, row_max[r], probs, offset)
                    if len(sinks):
                        totals[r] += np.exp(sinks[kv_head * group + min(first + r, last - 1) % group] - row_max[r])
                matmul(prob_pairs, 0, width // 2, values, 0, d, COLUMNS, block_out, 0, d, rows, d, width // 2, False)
                for r in range(first, last):
                    row, offset = start + r // group, (kv_head * group + r % group) * d
                    scale_row(block_out, (r - first) * d, d, one / totals[r - first], out, row * out.shape[1] + offset)
                    logsumexps[row, kv_head * group + r % group] = row_max[r - first] + np.log(totals[r - first])
        release_tiles()


@kernel
def _attend_backward(
    grad: Any, grad_step: Any, out: Any, logsumexps: Any, q: Any, q_step: Any, k: Any, k_step: Any, v: Any, v_step: Any,
    cos: Any, sin: Any, scale: Any, docs: Any, tasks: Any, task_starts: Any, num_kv_heads: Any, group: Any, d: Any,
    window: Any, softcap: Any, sinks: Any, dq: Any, dk: Any, dv: Any, out_step: Any, prefix_grads: Any,
) -> None:  # fmt: skip
    """Compute the gradients of q, k and v: dq, dk and dv. Most arguments are those of _attend.

    grad: the gradient of the output. grad_step, out_step: distances between rows of grad, and of dq, dk and dv.
    prefix_grads: output, (D, num_kv_heads, 2, prefix, d) fp32, the contribution of each document to the gradients of
    the keys and values of its prefix, which _add_prefix_grads sums.
    """
    half, block, one, zero = d // 2, d // 2 * COLUMNS, np.float32(1.0), np.float32(0.0)
    max_keys = 0
    for doc in range(len(docs)):
        max_keys = max(max_keys, _round_up(docs[doc, 1] + docs[doc, 2], COLUMNS))
    for thread in prange(len(task_starts) - 1):
        claim_tiles()
        rows_bf16 = np.zeros(max_keys * d + GAP, np.uint16)
        keys = np.zeros(max_keys * half + GAP, np.uint32)  # for the scores
        key_rows = np.zeros(max_keys // 2 * d + GAP, np.uint32)  # for dq
        values = np.zeros(max_keys * half + GAP, np.uint32)
        queries = np.zeros(BLOCK * d + GAP, np.uint16)
        block_pairs = np.zeros(BLOCK // 2 * d + GAP, np.uint32)
        queries_t = np.zeros(BLOCK // 2 * d + GAP, np.uint32)  # transposed
        grads = np.zeros(BLOCK * d + GAP, np.uint16)
        grads_t = np.zeros(BLOCK // 2 * d + GAP, np.uint32)
        scores = np.zeros(BLOCK * max_keys + GAP, np.float32)
        ds = np.zeros(BLOCK * max_keys + GAP, np.float32)
        ds_bf16 = np.zeros(BLOCK * max_keys + GAP, np.uint16)
        prob_pairs = np.zeros(BLOCK // 2 * max_keys + GAP, np.uint32)
        ds_pairs = np.zeros(BLOCK // 2 * max_keys + GAP, np.uint32)
        dots = np.zeros(BLOCK + GAP, np.float32)
        dq_block = np.zeros(BLOCK * d + GAP, np.float32)
        dk_t = np.zeros(max_keys * d + GAP, np.float32)
        dv_t = np.zeros(max_keys * d + GAP, np.float32)
        transposed = np.zeros(SIDE * 2 * d + GAP, np.float32)
        row_pairs, query_pairs = rows_bf16.view(np.uint32), queries.view(np.uint32)
        grad_pairs, ds_rows = grads.view(np.uint32), ds_bf16.view(np.uint32)
        for index in range(task_starts[thread], task_starts[thread + 1]):
            doc, kv_head = tasks[index] // num_kv_heads, tasks[index] % num_kv_heads
            start, length, prefix, prefix_start = docs[doc, 0], docs[doc, 1], docs[doc, 2], docs[doc, 3]
            count = prefix + length
            padded = _round_up(count, COLUMNS)
            is_prefix = docs[doc, 4]  # 0 or 1
            num_shared = prefix + length * is_prefix  # keys that other documents also attend to
            _load_keys(k, k_step, kv_head, d, cos, sin, prefix, start, prefix_start, count, padded, rows_bf16)
            _transpose_blocks(row_pairs, padded, half, keys)
            _pair_all_rows(rows_bf16, padded, d, key_rows)
            _load_values(v, v_step, kv_head, d, prefix, start, prefix_start, count, padded, rows_bf16)
            _transpose_blocks(row_pairs, padded, half, values)
            dk_t[: padded * d] = zero
            dv_t[: padded * d] = zero
            for first in range(0, length * group, BLOCK):
                last = min(first + BLOCK, length * group)
                rows = _round_up(last - first, ROWS)
                queries[(last - first) * d :] = 0
                grads[(last - first) * d :] = 0
                for r in range(first, last):
                    row, query = start + r // group, kv_head * group + r % group
                    _rotate(q, row * q_step + query * d, d, cos, sin, row, scale, queries, (r - first) * d)
                    offset = row * grad_step + query * d
                    source, target = grad[offset : offset + d], grads[(r - first) * d : (r - first + 1) * d]
                    for j in range(d):
                        target[j] = source[j]
                    dots[r - first] = dot(grad, offset, out, row * out.shape[1] + query * d, d)
                _pair_all_rows(queries, BLOCK, d, block_pairs)
                _transpose(block_pairs, 0, d, BLOCK // 2, d, queries_t, 0, BLOCK // 2)
                _pair_all_rows(grads, BLOCK, d, block_pairs)
                _transpose(block_pairs, 0, d, BLOCK // 2, d, grads_t, 0, BLOCK // 2)
                width = _round_up(visible_keys(last - 1, group, prefix, window)[1], COLUMNS)
                matmul(query_pairs, 0, half, keys, 0, COLUMNS, block, scores, 0, width, rows, width, half, False)
                matmul(grad_pairs, 0, half, values, 0, COLUMNS, block, ds, 0, width, rows, width, half, False)
                for r in range(rows):
                    begin, end = visible_keys(min(first + r, last - 1), group, prefix, window)
                    if first + r >= last:
                        end = begin
                    row = start + min(first + r, last - 1) // group
                    lse = logsumexps[row, kv_head * group + min(first + r, last - 1) % group]
                    low, high = r * width, (r + 1) * width
                    if softcap > 0:
                        _capped_softmax_gradient(
                            scores[low:high], ds[low:high], begin, end, lse, dots[r], softcap, ds_bf16[low:high]
                        )
                    else:
                        softmax_gradient(scores, low, width, begin, end, lse, dots[r], ds, low, ds_bf16, low)
                for r in range(0, rows, 2):
                    even, odd = r * width, (r + 1) * width
                    pair_rows(scores, even, scores, odd, width, prob_pairs, r // 2 * width)
                    pair_rows(ds, even, ds, odd, width, ds_pairs, r // 2 * width)
                matmul(ds_rows, 0, width // 2, key_rows, 0, d, COLUMNS, dq_block, 0, d, rows, d, width // 2, False)
                step, num_pairs = BLOCK // 2, rows // 2
                matmul(queries_t, 0, step, ds_pairs, 0, width, COLUMNS, dk_t, 0, padded, d, width, num_pairs, True)
                matmul(grads_t, 0, step, prob_pairs, 0, width, COLUMNS, dv_t, 0, padded, d, width, num_pairs, True)
                for r in range(first, last):
                    row, query = start + r // group, kv_head * group + r % group
                    _rotate_backward(dq_block, (r - first) * d, d, cos, sin, row, scale, dq, row * out_step + query * d)
            for n in range(count):
                if n % SIDE == 0:
                    _transpose(dk_t, n, padded, d, SIDE, transposed, 0, 2 * d)
                    _transpose(dv_t, n, padded, d, SIDE, transposed, d, 2 * d)
                line = transposed[n % SIDE * 2 * d : (n % SIDE + 1) * 2 * d]
                row = _key_row(n, prefix, start, prefix_start)
                if n < num_shared:
                    for j in range(d):
                        prefix_grads[doc, kv_head, 0, n, j] = line[j]
                        prefix_grads[doc, kv_head, 1, n, j] = line[d + j]
                else:
                    offset = row * out_step + kv_head * d
                    _rotate_backward(line, 0, d, cos, sin, row, one, dk, offset)
                    scale_row(line, d, d, one, dv, offset)
        release_tiles()


@kernel
def _add_prefix_grads(
    prefix_grads: Any, docs: Any, rows: Any, cos: Any, sin: Any, d: Any, dk: Any, dv: Any, out_step: Any
) -> None:  # fmt: skip
    """Sum prefix_grads over the documents that share each prefix and write the results to dk and dv.

    rows: (P, 2), each packed row of a prefix and the first row of that prefix.
    """
    for index in prange(len(rows)):
        row, prefix_start = rows[index, 0], rows[index, 1]
        total = np.zeros(2 * d + GAP, np.float32)
        for head in range(prefix_grads.shape[1]):
            total[: 2 * d] = np.float32(0.0)
            for doc in range(len(docs)):
                if docs[doc, 3] == prefix_start and (docs[doc, 2] or docs[doc, 4]):
                    for j in range(d):
                        total[j] += prefix_grads[doc, head, 0, row - prefix_start, j]
                        total[d + j] += prefix_grads[doc, head, 1, row - prefix_start, j]
            offset = row * out_step + head * d
            _rotate_backward(total, 0, d, cos, sin, row, np.float32(1.0), dk, offset)
            scale_row(total, d, d, np.float32(1.0), dv, offset)


class TiledAttention(Function):
    """Compute the attention output (T, num_query_heads * size) in bf16.

    qkv: (T, (num_query_heads + 2 num_kv_heads) * size). Saves qkv, the output, and the log-sum-exp of each row and
    head.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, documents: Documents) -> Tensor:
        out = heads.new(len(qkv), heads.num_query_heads * heads.size, qkv)
        logsumexps = heads.new(len(qkv), heads.num_query_heads, cos)
        inputs = _inputs(heads.normalized(qkv), heads, cos, sin)
        cast(Any, _attend)(*inputs, *_layout(heads, documents), array(out), array(logsumexps))
        ctx.heads, ctx.documents = heads, documents
        ctx.save_for_backward(qkv, cos, sin, out, logsumexps)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        heads: Heads = ctx.heads
        qkv, cos, sin, out, logsumexps = ctx.saved_tensors
        result = torch.empty_like(qkv)
        views = heads.views(result)
        grad = grad.reshape(len(qkv), heads.num_query_heads, heads.size)
        inputs, layout = _inputs(heads.normalized(qkv), heads, cos, sin), _layout(heads, ctx.documents)
        docs, prefix = layout[0], int(layout[0][:, 2].max())
        prefix_grads = np.empty((len(docs) if prefix else 0, heads.num_kv_heads, 2, prefix, heads.size), np.float32)
        targets = *(flatten(x) for x in views), views[0].stride(0)
        cast(Any, _attend_backward)(
            flatten(grad), grad.stride(0), array(out), array(logsumexps), *inputs, *layout, *targets, prefix_grads
        )  # fmt: skip
        if prefix:
            lengths = dict(docs[docs[:, 2] > 0][:, [3, 2]].tolist())
            rows = np.array([(row, start) for start, n in lengths.items() for row in range(start, start + n)], np.int64)
            _add_prefix_grads(prefix_grads, docs, rows, array(cos), array(sin), heads.size, *targets[1:])
        heads.backward_norms_(views, qkv)
        return result, None, None, None, None


def _inputs(qkv: tuple[Tensor, Tensor, Tensor], heads: Heads, cos: Tensor, sin: Tensor) -> tuple[Any, ...]:
    """Return the first arguments of _attend, from q to scale."""
    q, k, v = qkv
    flat = flatten(q), q.stride(0), flatten(k), k.stride(0), flatten(v), v.stride(0)
    return *flat, array(cos), array(sin), np.float32(heads.scale)


def _layout(heads: Heads, documents: Documents) -> tuple[Any, ...]:
    """Return the next arguments of _attend, from docs to sinks."""
    tasks = documents.thread_tasks(heads.num_kv_heads, torch.get_num_threads())
    shape = heads.num_kv_heads, heads.group, heads.size, heads.window
    sinks = np.empty(0, np.float32) if heads.sinks is None else array(heads.sinks)
    return documents.table, *tasks, *shape, np.float32(heads.softcap), sinks
