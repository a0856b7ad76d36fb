"""Causal attention over packed documents. A document attends to itself and to its shared prefix, if it has one.

Documents of similar length are padded to one length (a bucket) for batched matmuls and an in-place softmax. For short
documents this is faster than PyTorch's CPU attention, which takes 25 % of the time of a step for 4 % of the FLOPs.
CPUs with AVX512-BF16 use kernels/cpu/attention.py instead, and GPUs kernels/cuda/attention.py, except for scores with a
soft cap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from strop.engine.kernels.eager import rotate
from strop.engine.kernels.protocols import Ops, apply
from strop.engine.train.buffers import Allocate, allocate_from_heap
from strop.engine.train.norms import Norm
from strop.engine.train.packing import Bucket, Documents, Layout

BLOCK = 256  # queries per matmul; the keys after the last query of a block are skipped
MAX_SAVED_KEYS = 512  # on a CPU; other probabilities are recomputed in the backward


@dataclass(frozen=True)
class Heads:
    """The attention heads of a layer.

    Attributes:
        size: number of features of a head.
        window: number of keys that a query attends to, its own included; 0 for all.
        softcap: scores are replaced by softcap * tanh(scores / softcap), unless it is 0.
        new: allocates saved tensors.
        sinks: attention sinks (num_query_heads,), fp32: an additional score in the softmax of each head.
    """

    ops: Ops
    num_query_heads: int
    num_kv_heads: int
    size: int
    scale: float
    window: int
    softcap: float
    q_norm: Norm | None
    k_norm: Norm | None
    v_norm: Norm | None = None
    new: Allocate = allocate_from_heap
    sinks: Tensor | None = None

    @property
    def group(self) -> int:
        """The number of query heads per key-value head."""
        return self.num_query_heads // self.num_kv_heads

    def views(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v (T, heads, size) as views of qkv (T, (num_query_heads + 2 num_kv_heads) size)."""
        heads = qkv.view(len(qkv), -1, self.size)
        q, k, v = torch.split(heads, [self.num_query_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return q, k, v

    def normalized(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v (T, heads, size) after their norms."""
        q, k, v = self.views(qkv)
        return _apply_norm(q, self.q_norm), _apply_norm(k, self.k_norm), _apply_norm(v, self.v_norm)

    def values(self, qkv: Tensor) -> Tensor:
        """Return v (T, num_kv_heads, size) after its norm."""
        return _apply_norm(self.views(qkv)[2], self.v_norm)

    def backward_norms_(self, grads: tuple[Tensor, Tensor, Tensor], qkv: Tensor) -> None:
        """Turn the gradients of the normalized q, k and v into the gradients of q, k and v, in place."""
        norms = self.q_norm, self.k_norm, self.v_norm
        for grad, x, norm in zip(grads, self.views(qkv), norms, strict=True):
            if norm:
                grad.copy_(norm.backward(as_norm_input(grad, norm), as_norm_input(x, norm)).view(grad.shape))


def _apply_norm(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else norm.forward(as_norm_input(x, norm)).view(x.shape)


def as_norm_input(x: Tensor, norm: Norm) -> Tensor:
    """Return x (T, heads, size), or x as (T, heads * size) if the norm is over all heads (OLMo)."""
    return x if norm.weight.shape[-1] == x.shape[-1] else x.flatten(1)


class ApplyRope(Function):
    """Apply the rotary embedding to q and k of qkv, for models whose attention cannot include it.

    These models rotate before the norms of q and k, rotate interleaved pairs of features, or scale q. The interleaved
    features are reordered to halves, which does not change q k^T. cos, sin: (T, m). scale: factors (T,) of q, or None.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, interleaved: bool, scale: Tensor | None
    ) -> Tensor:
        ctx.args = heads, cos, sin, interleaved, scale
        out = qkv.clone()
        for x, target, factor in zip(heads.views(qkv), heads.views(out), (scale, None), strict=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            wide = _to_halves(wide, cos.shape[1]) if interleaved else wide
            rotated = rotate(wide, cos, sin)
            target.copy_(rotated if factor is None else rotated * factor[:, None, None])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        heads, cos, sin, interleaved, scale = ctx.args
        out = grad.clone()
        for x, target, factor in zip(heads.views(grad.contiguous()), heads.views(out), (scale, None), strict=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            rotated = rotate(wide if factor is None else wide * factor[:, None, None], cos, -sin)
            target.copy_(_from_halves(rotated, cos.shape[1]) if interleaved else rotated)
        return out, None, None, None, None, None


def _to_halves(x: Tensor, m: int) -> Tensor:
    """Reorder the first 2 m features of each head: first the even ones, then the odd ones."""
    return torch.cat([x[..., : 2 * m : 2], x[..., 1 : 2 * m : 2], x[..., 2 * m :]], -1)


def _from_halves(x: Tensor, m: int) -> Tensor:
    return torch.cat([torch.stack([x[..., :m], x[..., m : 2 * m]], -1).flatten(-2), x[..., 2 * m :]], -1)


def apply_trained_head_norms(qkv: Tensor, heads: Heads) -> tuple[Tensor, Heads]:
    """Apply the norms of q and k if one of them is trained. Return qkv, and heads without these norms."""
    if all(norm is None or norm.trained_weights is None for norm in (heads.q_norm, heads.k_norm)):
        return qkv, heads
    q_norm, k_norm = (norm and norm.with_current_weights() for norm in (heads.q_norm, heads.k_norm))
    trained = [weight for norm in (q_norm, k_norm) if norm is not None for weight in norm.trained]
    qkv = apply(HeadNorms, qkv, replace(heads, q_norm=q_norm, k_norm=k_norm, v_norm=None), *trained)
    return qkv, replace(heads, q_norm=None, k_norm=None)


class HeadNorms(Function):
    """Apply the norms of q and k to qkv. trained: q_norm.trained and k_norm.trained."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, *trained: Tensor) -> Tensor:
        ctx.heads = heads
        ctx.save_for_backward(qkv)
        out = qkv.clone()
        for x, target in zip(heads.normalized(qkv), heads.views(out), strict=True):
            target.copy_(x)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        heads, (qkv,) = ctx.heads, ctx.saved_tensors
        out = grad.clone(memory_format=torch.contiguous_format)
        parts = heads.views(out)
        grads: list[Tensor] = []
        for upstream, x, norm in zip(parts, heads.views(qkv), (heads.q_norm, heads.k_norm), strict=False):
            grads += [] if norm is None else norm.gradients(as_norm_input(upstream, norm), as_norm_input(x, norm))
        heads.backward_norms_(parts, qkv)
        return out, None, *grads


class Attention(Function):
    """Compute attention, with norms and rotary embedding, of qkv (T, (num_query_heads + 2 num_kv_heads) size).

    cos, sin: (T, m). Returns (T, num_query_heads size). Saves qkv and, on a CPU, the probabilities of documents
    with at most MAX_SAVED_KEYS keys.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, documents: Documents) -> Tensor:
        ops, group, layout = heads.ops, heads.group, documents.layout
        saved_probs: list[Tensor] = []
        padded = _to_buckets(heads, qkv, cos, sin, layout)
        o = torch.empty_like(padded[0])
        for bucket, (q, k, v, bucket_out) in zip(layout.buckets, _view_buckets(heads, layout, *padded, o), strict=True):
            for first, rows, keys in _split_blocks(bucket, group):
                is_saved = _saves_probs(bucket) and ctx.needs_input_grad[0]
                probs = _compute_probs(
                    heads, q[:, rows], k[:, :keys], first, heads.new if is_saved else allocate_from_heap
                )
                _bmm(probs, v[:, :keys], bucket_out[:, rows])
                if is_saved:
                    saved_probs.append(probs)
        out = heads.new(len(qkv), heads.num_query_heads * heads.size, qkv)
        out = out.view(len(qkv), heads.num_query_heads, heads.size)
        ops.from_heads(o, None, None, 1.0, layout.queries, group, out)
        ctx.heads, ctx.layout = heads, layout
        ctx.save_for_backward(qkv, cos, sin, *saved_probs)
        return out.view(len(qkv), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        heads: Heads = ctx.heads
        layout: Layout = ctx.layout
        ops, group = heads.ops, heads.group
        qkv, cos, sin, *saved_probs = ctx.saved_tensors
        padded = _to_buckets(heads, qkv, cos, sin, layout)
        grads = [torch.empty_like(x) for x in padded]
        grad = grad.reshape(len(qkv), heads.num_query_heads, heads.size)
        do = ops.to_heads(grad, None, None, 1.0, layout.queries, group)
        inputs, outputs = _view_buckets(heads, layout, *padded, do), _view_buckets(heads, layout, *grads)
        views = list(zip(layout.buckets, inputs, outputs, strict=True))
        for bucket, (q, k, v, bucket_do), (dq, dk, dv) in reversed(views):
            blocks = _split_blocks(bucket, group)
            is_single = len(blocks) == 1
            terms = []
            for first, rows, keys in reversed(blocks):
                saved = saved_probs.pop() if _saves_probs(bucket) else None
                probs = _compute_probs(heads, q[:, rows], k[:, :keys], first) if saved is None else saved
                ds = _bmm(bucket_do[:, rows], v[:, :keys].transpose(1, 2))
                ds = ops.softmax_backward_(ds, probs, group, first, heads.window)
                if heads.softcap:
                    capped = _bmm(q[:, rows], k[:, :keys].transpose(1, 2)).div_(heads.softcap).tanh_()
                    ds.addcmul_(ds, capped.square_(), value=-1)
                _bmm(ds, k[:, :keys], dq[:, rows])
                dk_term = _bmm(ds.transpose(1, 2), q[:, rows], dk if is_single else None)
                terms.append((dk_term, _bmm(probs.transpose(1, 2), bucket_do[:, rows], dv if is_single else None)))
            if not is_single:
                for out, block_terms in zip((dk, dv), zip(*terms, strict=True), strict=True):
                    out.copy_(_sum_terms(block_terms))
        result = torch.empty_like(qkv)
        parts = heads.views(result)
        ops.from_heads(grads[0], cos, sin, heads.scale, layout.queries, group, parts[0])
        ops.from_heads(grads[1], cos, sin, 1.0, layout.keys, 1, parts[1])
        ops.from_heads(grads[2], None, None, 1.0, layout.keys, 1, parts[2])
        heads.backward_norms_(parts, qkv)
        return result, None, None, None, None


def _saves_probs(bucket: Bucket) -> bool:
    return bucket.keys.device.type == "cpu" and bucket.keys.shape[1] <= MAX_SAVED_KEYS


def _to_buckets(heads: Heads, qkv: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v, normalized, rotated and padded, in the layout of eager.to_heads."""
    q, k, v = heads.normalized(qkv)
    return (
        heads.ops.to_heads(q, cos, sin, heads.scale, layout.queries, heads.group),
        heads.ops.to_heads(k, cos, sin, 1.0, layout.keys, 1),
        heads.ops.to_heads(v, None, None, 1.0, layout.keys, 1),
    )


def _view_buckets(
    heads: Heads, layout: Layout, q: Tensor, k: Tensor, v: Tensor, *like_q: Tensor
) -> list[tuple[Tensor, ...]]:
    """Return views for each bucket.

    They are (D * num_kv_heads, Sq * group, size) for q and like_q, and (D * num_kv_heads, Sk, size) for k and v, with D
    documents, Sq queries and Sk keys, as in packing.Bucket.
    """

    def views(x: Tensor, row_tensors: list[Tensor], group: int) -> list[Tensor]:
        pieces = torch.split(x, [rows.numel() * heads.num_kv_heads * group for rows in row_tensors])
        shapes = [(len(rows) * heads.num_kv_heads, rows.shape[1] * group, heads.size) for rows in row_tensors]
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    queries, keys = [b.queries for b in layout.buckets], [b.keys for b in layout.buckets]
    columns = [views(q, queries, heads.group), views(k, keys, 1), views(v, keys, 1)]
    return list(zip(*columns, *(views(x, queries, heads.group) for x in like_q), strict=True))


def _compute_probs(heads: Heads, q: Tensor, k: Tensor, first: int, new: Allocate = allocate_from_heap) -> Tensor:
    """Return the attention probabilities (B, Sq * group, Sk). B: D * num_kv_heads, as in _view_buckets.

    first: the position of the first query among the keys.
    """
    scores = new(len(q) * q.shape[1], k.shape[1], q).view(len(q), q.shape[1], k.shape[1])
    _bmm(q, k.transpose(1, 2), scores)
    if heads.softcap:
        scores.div_(heads.softcap).tanh_().mul_(heads.softcap)
    return heads.ops.softmax_(scores, heads.group, first, heads.window, heads.sinks)


def _bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return torch.bmm(a, b), computed faster on a CPU.

    There torch.bmm assigns whole matrices to threads. A remainder smaller than the number of threads is computed with
    torch.mm, which uses all threads for one matrix.
    """
    if out is None:
        out = a.new_empty(len(a), a.shape[1], b.shape[2])
    if a.device.type != "cpu":
        return torch.bmm(a, b, out=out)
    num_batched = len(a) - len(a) % torch.get_num_threads()
    if num_batched:
        torch.bmm(a[:num_batched], b[:num_batched], out=out[:num_batched])
    for i in range(num_batched, len(a)):
        torch.mm(a[i], b[i], out=out[i])
    return out


def _sum_terms(terms: Sequence[Tensor]) -> Tensor:
    """Return the sum of the terms of all blocks. The first term covers all keys, and each later one fewer keys."""
    total = terms[0].to(torch.promote_types(terms[0].dtype, torch.float32))
    for term in terms[1:]:
        total[:, : term.shape[1]] += term
    return total


def _split_blocks(bucket: Bucket, group: int) -> list[tuple[int, slice, int]]:
    """Return (position of the first query among the keys, rows of q, number of keys) of each block of queries."""
    queries, prefix = bucket.queries.shape[1], bucket.keys.shape[1] - bucket.queries.shape[1]
    blocks = []
    for begin in range(0, queries, BLOCK):
        end = min(begin + BLOCK, queries)
        blocks.append((prefix + begin, slice(begin * group, end * group), prefix + end))
    return blocks
