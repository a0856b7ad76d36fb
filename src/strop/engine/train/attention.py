"""Causal attention over packed documents. A document attends to itself and to its shared prefix, if it has one.

Inside attention only, documents of similar length are padded to one length (a bucket). Scores, an in-place softmax and
the output are computed with batched matmuls: on documents of chat length PyTorch's CPU attention takes 25 % of a step
for 4 % of its FLOPs. kernels/cpu/attention.py is faster on CPUs with AVX512-BF16. kernels/cuda/attention.py is for
GPUs.
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
from strop.engine.train.buffers import Allocate, heap_empty
from strop.engine.train.norms import Norm
from strop.engine.train.packing import Bucket, Documents, Layout

BLOCK = 256  # queries of a matmul; keys after the block's last query are skipped
MAX_SAVED_KEYS = 512  # documents with more keys recompute their probabilities in the backward


@dataclass(frozen=True)
class Heads:
    """The heads of one layer's attention.

    query, key_value: numbers of heads. size: features of a head. window: keys that a query attends to, itself included;
    0: all. softcap: scores become softcap * tanh(scores / softcap); 0: unchanged. new: allocates saved tensors. sinks:
    attention sinks (query,), fp32, an extra score in each head's softmax.
    """

    ops: Ops
    query: int
    key_value: int
    size: int
    scale: float
    window: int
    softcap: float
    q_norm: Norm | None
    k_norm: Norm | None
    v_norm: Norm | None = None
    new: Allocate = heap_empty
    sinks: Tensor | None = None

    @property
    def group(self) -> int:
        """The number of query heads that share a key head."""
        return self.query // self.key_value

    def views(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v (T, heads, size) as views of qkv (T, (query + 2 key_value) size)."""
        heads = qkv.view(len(qkv), -1, self.size)
        q, k, v = torch.split(heads, [self.query, self.key_value, self.key_value], dim=1)
        return q, k, v

    def normalized(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v (T, heads, size) after their norms."""
        q, k, v = self.views(qkv)
        norms = self.q_norm, self.k_norm, self.v_norm
        q, k, v = (
            norm.forward(as_norm_input(x, norm)).view(x.shape) if norm else x
            for x, norm in zip((q, k, v), norms, strict=True)
        )
        return q, k, v

    def backward_norms_(self, grads: tuple[Tensor, Tensor, Tensor], qkv: Tensor) -> None:
        """Replace the gradients of normalized q, k and v by those of q, k and v, in place."""
        norms = self.q_norm, self.k_norm, self.v_norm
        for grad, x, norm in zip(grads, self.views(qkv), norms, strict=True):
            if norm:
                grad.copy_(norm.backward(as_norm_input(grad, norm), as_norm_input(x, norm)).view(grad.shape))


def as_norm_input(x: Tensor, norm: Norm) -> Tensor:
    """Return x (T, heads, size) in the shape that the norm expects: unchanged, or (T, heads * size) for OLMo."""
    return x if norm.weight.shape[-1] == x.shape[-1] else x.flatten(1)


class ApplyRope(Function):
    """Apply the rotary embedding to q and k of qkv, in the cases that `Attention` does not cover. Saves no input.

    These are a rotation before the norms of q and k, and interleaved pairs of features (`interleaved`), which are
    reordered into halves. q k^T does not change. cos, sin: (T, m). scale: (T,) or None, a factor of q.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, interleaved: bool, scale: Tensor | None
    ) -> Tensor:
        ctx.args = heads, cos, sin, interleaved, scale
        out = qkv.clone()
        for x, to, factor in zip(heads.views(qkv), heads.views(out), (scale, None), strict=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            wide = _to_halves(wide, cos.shape[1]) if interleaved else wide
            rotated = rotate(wide, cos, sin)
            to.copy_(rotated if factor is None else rotated * factor[:, None, None])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        heads, cos, sin, interleaved, scale = ctx.args
        out = grad.clone()
        for x, to, factor in zip(heads.views(grad.contiguous()), heads.views(out), (scale, None), strict=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            rotated = rotate(wide if factor is None else wide * factor[:, None, None], cos, -sin)
            to.copy_(_from_halves(rotated, cos.shape[1]) if interleaved else rotated)
        return out, None, None, None, None, None


def _to_halves(x: Tensor, m: int) -> Tensor:
    """Reorder the first 2 m features of each head: the even ones, then the odd ones."""
    return torch.cat([x[..., : 2 * m : 2], x[..., 1 : 2 * m : 2], x[..., 2 * m :]], -1)


def _from_halves(x: Tensor, m: int) -> Tensor:
    return torch.cat([torch.stack([x[..., :m], x[..., m : 2 * m]], -1).flatten(-2), x[..., 2 * m :]], -1)


def apply_trained_head_norms(qkv: Tensor, heads: Heads) -> tuple[Tensor, Heads]:
    """Apply the norms of q and k if they are trained in full. Return qkv, and heads without these norms."""
    if all(norm is None or norm.current is None for norm in (heads.q_norm, heads.k_norm)):
        return qkv, heads
    q_norm, k_norm = (None if norm is None else norm.now() for norm in (heads.q_norm, heads.k_norm))
    trained = [weight for norm in (q_norm, k_norm) if norm is not None for weight in norm.trained]
    qkv = apply(HeadNorms, qkv, replace(heads, q_norm=q_norm, k_norm=k_norm, v_norm=None), *trained)
    return qkv, replace(heads, q_norm=None, k_norm=None)


class HeadNorms(Function):
    """Apply the norms of q and k to qkv. Saves its input. trained: q_norm.trained and k_norm.trained."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, *trained: Tensor) -> Tensor:
        ctx.heads = heads
        ctx.save_for_backward(qkv)
        out = qkv.clone()
        for x, to in zip(heads.normalized(qkv), heads.views(out), strict=True):
            to.copy_(x)
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
    """Compute the heads' output (T, query size) from qkv (T, (query + 2 key_value) size), with rope and norms.

    cos, sin: the rotary embedding of each packed row, shape (T, m). Saves qkv, and for documents of up to
    MAX_SAVED_KEYS keys the probabilities in the dtype of qkv.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, documents: Documents) -> Tensor:
        ops, group, layout = heads.ops, heads.group, documents.layout
        saved_probs: list[Tensor] = []
        padded = _to_buckets(heads, qkv, cos, sin, layout)
        o = torch.empty_like(padded[0])
        for bucket, (q, k, v, out_part) in zip(layout.buckets, _bucket_views(heads, layout, *padded, o), strict=True):
            for first, rows, keys in _blocks(bucket, group):
                saves = bucket.keys.shape[1] <= MAX_SAVED_KEYS and ctx.needs_input_grad[0]
                probs = _probs(heads, q[:, rows], k[:, :keys], first, heads.new if saves else heap_empty)
                _bmm(probs, v[:, :keys], out_part[:, rows])
                if saves:
                    saved_probs.append(probs)
        out = heads.new(len(qkv), heads.query * heads.size, qkv).view(len(qkv), heads.query, heads.size)
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
        grad = grad.reshape(len(qkv), heads.query, heads.size)
        do = ops.to_heads(grad, None, None, 1.0, layout.queries, group)
        views = zip(
            layout.buckets, _bucket_views(heads, layout, *padded, do), _bucket_views(heads, layout, *grads), strict=True
        )
        for bucket, (q, k, v, do_part), (dq, dk, dv) in reversed(list(views)):
            blocks = _blocks(bucket, group)
            single = len(blocks) == 1
            terms = []
            for first, rows, keys in reversed(blocks):
                saved = saved_probs.pop() if bucket.keys.shape[1] <= MAX_SAVED_KEYS else None
                probs = _probs(heads, q[:, rows], k[:, :keys], first) if saved is None else saved
                ds = _bmm(do_part[:, rows], v[:, :keys].transpose(1, 2))
                ds = ops.softmax_backward_(ds, probs, group, first, heads.window)
                if heads.softcap:
                    capped = _bmm(q[:, rows], k[:, :keys].transpose(1, 2)).div_(heads.softcap).tanh_()
                    ds.mul_(1 - capped.square_())
                _bmm(ds, k[:, :keys], dq[:, rows])
                dk_term = _bmm(ds.transpose(1, 2), q[:, rows], dk if single else None)
                terms.append((dk_term, _bmm(probs.transpose(1, 2), do_part[:, rows], dv if single else None)))
            if not single:
                for out, block_terms in zip((dk, dv), zip(*terms, strict=True), strict=True):
                    out.copy_(_sum_terms(block_terms))
        result = torch.empty_like(qkv)
        parts = heads.views(result)
        rotations = ((cos, sin, heads.scale), (cos, sin, 1.0), (None, None, 1.0))
        places = (layout.queries, layout.keys, layout.keys)
        for x, rotation, places_of, heads_per_key, out in zip(
            grads, rotations, places, (group, 1, 1), parts, strict=True
        ):
            ops.from_heads(x, *rotation, places_of, heads_per_key, out)
        heads.backward_norms_(parts, qkv)
        return result, None, None, None, None


def _to_buckets(heads: Heads, qkv: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v in the padded order of eager.to_heads."""
    q, k, v = heads.normalized(qkv)
    return (
        heads.ops.to_heads(q, cos, sin, heads.scale, layout.queries, heads.group),
        heads.ops.to_heads(k, cos, sin, 1.0, layout.keys, 1),
        heads.ops.to_heads(v, None, None, 1.0, layout.keys, 1),
    )


def _bucket_views(
    heads: Heads, layout: Layout, q: Tensor, k: Tensor, v: Tensor, *like_q: Tensor
) -> list[tuple[Tensor, ...]]:
    """Return views of each bucket.

    They are (D * key_value, Sq * group, size) for q and like_q, and (D * key_value, Sk, size) for k and v.
    """

    def views(x: Tensor, slots: list[Tensor], group: int) -> list[Tensor]:
        pieces = torch.split(x, [rows.numel() * heads.key_value * group for rows in slots])
        shapes = [(len(rows) * heads.key_value, rows.shape[1] * group, heads.size) for rows in slots]
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    queries, keys = [b.queries for b in layout.buckets], [b.keys for b in layout.buckets]
    columns = [views(q, queries, heads.group), views(k, keys, 1), views(v, keys, 1)]
    return list(zip(*columns, *(views(x, queries, heads.group) for x in like_q), strict=True))


def _probs(heads: Heads, q: Tensor, k: Tensor, first: int, new: Allocate = heap_empty) -> Tensor:
    """Return the attention probabilities (B, Sq, Sk) of queries whose first is at position `first` among the keys."""
    scores = new(len(q) * q.shape[1], k.shape[1], q).view(len(q), q.shape[1], k.shape[1])
    _bmm(q, k.transpose(1, 2), scores)
    if heads.softcap:
        scores.div_(heads.softcap).tanh_().mul_(heads.softcap)
    return heads.ops.softmax_(scores, heads.group, first, heads.window, heads.sinks)


def _bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return a @ b, matrix by matrix.

    torch.bmm assigns whole matrices to threads. A remainder smaller than the number of threads is computed with
    torch.mm, which divides each matrix among the threads.
    """
    if out is None:
        out = a.new_empty(len(a), a.shape[1], b.shape[2])
    even = len(a) - len(a) % torch.get_num_threads()
    if even:
        torch.bmm(a[:even], b[:even], out=out[:even])
    for i in range(even, len(a)):
        torch.mm(a[i], b[i], out=out[i])
    return out


def _sum_terms(terms: Sequence[Tensor]) -> Tensor:
    """Return the sum of the blocks' terms. The first term covers all keys, each later one fewer."""
    total = terms[0].to(torch.promote_types(terms[0].dtype, torch.float32))
    for term in terms[1:]:
        total[:, : term.shape[1]] += term
    return total


def _blocks(bucket: Bucket, group: int) -> list[tuple[int, slice, int]]:
    """Return for each block the position of its first query among the keys, its rows, and the number of its keys."""
    queries, prefix = bucket.queries.shape[1], bucket.keys.shape[1] - bucket.queries.shape[1]
    blocks = []
    for begin in range(0, queries, BLOCK):
        end = min(begin + BLOCK, queries)
        blocks.append((prefix + begin, slice(begin * group, end * group), prefix + end))
    return blocks
