"""Causal attention over packed documents: each document, or its own part behind a shared prefix, sees only itself.

Documents of similar length are padded to one matrix (a bucket) inside attention alone, and matrix products stand around
a softmax written back in place: PyTorch's CPU attention takes 25 % of a step for 4 % of its FLOPs on documents of chat
length. cpu/attention.py is faster where the CPU has AVX512-BF16, card/attention.py is for cards.
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

BLOCK = 256  # queries a product; keys behind the block's last query are skipped
KEEP_PAIRS = (
    512  # documents up to this length keep their probabilities for the backward, longer ones compute them again
)


@dataclass(frozen=True)
class Heads:
    """The shape of one layer's attention. cos, sin (T, m): the rotary embedding of each packed row."""

    ops: Ops
    query: int
    key_value: int
    size: int
    scale: float
    window: int  # a query sees this many keys, itself included; 0: all
    softcap: float  # scores are bent to softcap * tanh(scores / softcap); 0: they are not
    q_norm: Norm | None
    k_norm: Norm | None
    v_norm: Norm | None = None
    new: Allocate = heap_empty  # for what is kept
    sinks: Tensor | None = None  # (query,) fp32: what each head's softmax counts beside the keys

    @property
    def group(self) -> int:
        return self.query // self.key_value

    def views(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of shape (T, heads, size) as views of qkv (T, all)."""
        heads = qkv.view(len(qkv), -1, self.size)
        q, k, v = torch.split(heads, [self.query, self.key_value, self.key_value], dim=1)
        return q, k, v

    def normed(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.views(qkv)
        norms = self.q_norm, self.k_norm, self.v_norm
        q, k, v = (
            norm.forward(as_norm_input(x, norm)).view(x.shape) if norm else x
            for x, norm in zip((q, k, v), norms, strict=True)
        )
        return q, k, v

    def norms_backward_(self, grads: tuple[Tensor, Tensor, Tensor], qkv: Tensor) -> None:
        """Takes the gradients of q, k and v, in place, back through their norms."""
        norms = self.q_norm, self.k_norm, self.v_norm
        for grad, x, norm in zip(grads, self.views(qkv), norms, strict=True):
            if norm:
                grad.copy_(norm.backward(as_norm_input(grad, norm), as_norm_input(x, norm)).view(grad.shape))


def as_norm_input(x: Tensor, norm: Norm) -> Tensor:
    """x (T, heads, size) as the norm takes it: head by head, or all heads as one (OLMo)."""
    return x if norm.weight.shape[-1] == x.shape[-1] else x.flatten(1)


class ApplyRope(Function):
    """qkv with q and k turned by the rotary embedding, where `Attention` cannot do it: in front of their norms, or with
    neighbours in pairs, which then stand as halves (q k^T is the same). Saves nothing of its input.

    cos, sin (T, m); scale (T,) or None: what q is multiplied by.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, neighbours: bool, scale: Tensor | None
    ) -> Tensor:
        ctx.about = heads, cos, sin, neighbours, scale
        out = qkv.clone()
        for x, to, factor in zip(heads.views(qkv), heads.views(out), (scale, None), strict=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            wide = _in_halves(wide, cos.shape[1]) if neighbours else wide
            turned = rotate(wide, cos, sin)
            to.copy_(turned if factor is None else turned * factor[:, None, None])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        heads, cos, sin, neighbours, scale = ctx.about
        out = grad.clone()
        for x, to, factor in zip(heads.views(grad.contiguous()), heads.views(out), (scale, None), strict=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            turned = rotate(wide if factor is None else wide * factor[:, None, None], cos, -sin)
            to.copy_(_in_neighbours(turned, cos.shape[1]) if neighbours else turned)
        return out, None, None, None, None, None


def _in_halves(x: Tensor, m: int) -> Tensor:
    """The first 2 m numbers of each head: every second one, then the others."""
    return torch.cat([x[..., : 2 * m : 2], x[..., 1 : 2 * m : 2], x[..., 2 * m :]], -1)


def _in_neighbours(x: Tensor, m: int) -> Tensor:
    """The inverse of _in_halves."""
    return torch.cat([torch.stack([x[..., :m], x[..., m : 2 * m]], -1).flatten(-2), x[..., 2 * m :]], -1)


def apply_trained_head_norms(qkv: Tensor, heads: Heads) -> tuple[Tensor, Heads]:
    """qkv and heads; where the norms of q and k are trained in full, qkv behind them, and heads without them."""
    if all(norm is None or norm.current is None for norm in (heads.q_norm, heads.k_norm)):
        return qkv, heads
    q_norm, k_norm = (None if norm is None else norm.now() for norm in (heads.q_norm, heads.k_norm))
    trained = [one for norm in (q_norm, k_norm) if norm is not None for one in norm.trained]
    qkv = apply(HeadNorms, qkv, replace(heads, q_norm=q_norm, k_norm=k_norm, v_norm=None), *trained)
    return qkv, replace(heads, q_norm=None, k_norm=None)


class HeadNorms(Function):
    """qkv with the norms of q and k; saves its input. trained: q_norm.trained and k_norm.trained."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, *trained: Tensor) -> Tensor:
        ctx.heads = heads
        ctx.save_for_backward(qkv)
        out = qkv.clone()
        for x, to in zip(heads.normed(qkv), heads.views(out), strict=True):
            to.copy_(x)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        heads, (qkv,) = ctx.heads, ctx.saved_tensors
        out = grad.clone(memory_format=torch.contiguous_format)
        into = heads.views(out)
        found: list[Tensor] = []
        for up, x, norm in zip(into, heads.views(qkv), (heads.q_norm, heads.k_norm), strict=False):
            found += [] if norm is None else norm.gradients(as_norm_input(up, norm), as_norm_input(x, norm))
        heads.norms_backward_(into, qkv)
        return out, None, *found


class Attention(Function):
    """qkv (T, (query + 2 key_value) size) to the heads' output (T, query size); rotary embedding and norms included.

    Saves qkv and, for documents up to KEEP_PAIRS, the probabilities in qkv's type.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, documents: Documents) -> Tensor:
        ops, group, layout = heads.ops, heads.group, documents.layout
        kept: list[Tensor] = []
        spread = _spread(heads, qkv, cos, sin, layout)
        o = torch.empty_like(spread[0])
        for part, (q, k, v, own) in zip(layout.buckets, _parts(heads, layout, *spread, o), strict=True):
            for first, rows, keys in _blocks(part, group):
                keeps = part.keys.shape[1] <= KEEP_PAIRS and ctx.needs_input_grad[0]
                probs = _probs(heads, q[:, rows], k[:, :keys], first, heads.new if keeps else heap_empty)
                _products(probs, v[:, :keys], own[:, rows])
                if keeps:
                    kept.append(probs)
        out = heads.new(len(qkv), heads.query * heads.size, qkv).view(len(qkv), heads.query, heads.size)
        ops.from_heads(o, None, None, 1.0, layout.queries, group, out)
        ctx.heads, ctx.layout = heads, layout
        ctx.save_for_backward(qkv, cos, sin, *kept)
        return out.view(len(qkv), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        heads: Heads = ctx.heads
        layout: Layout = ctx.layout
        ops, group = heads.ops, heads.group
        qkv, cos, sin, *kept = ctx.saved_tensors
        spread = _spread(heads, qkv, cos, sin, layout)
        grads = [torch.empty_like(x) for x in spread]
        grad = grad.reshape(len(qkv), heads.query, heads.size)
        do = ops.to_heads(grad, None, None, 1.0, layout.queries, group)
        parts = zip(layout.buckets, _parts(heads, layout, *spread, do), _parts(heads, layout, *grads), strict=True)
        for part, (q, k, v, own), (dq, dk, dv) in reversed(list(parts)):
            blocks = _blocks(part, group)
            whole = len(blocks) == 1
            terms = []
            for first, rows, keys in reversed(blocks):
                known = kept.pop() if part.keys.shape[1] <= KEEP_PAIRS else None
                probs = _probs(heads, q[:, rows], k[:, :keys], first) if known is None else known
                ds = _products(own[:, rows], v[:, :keys].transpose(1, 2))
                ds = ops.softmax_backward_(ds, probs, group, first, heads.window)
                if heads.softcap:
                    bent = _products(q[:, rows], k[:, :keys].transpose(1, 2)).div_(heads.softcap).tanh_()
                    ds.mul_(1 - bent.square_())
                _products(ds, k[:, :keys], dq[:, rows])
                to_k = _products(ds.transpose(1, 2), q[:, rows], dk if whole else None)
                terms.append((to_k, _products(probs.transpose(1, 2), own[:, rows], dv if whole else None)))
            if not whole:
                for out, more in zip((dk, dv), zip(*terms, strict=True), strict=True):
                    out.copy_(_sum(more))
        result = torch.empty_like(qkv)
        into = heads.views(result)
        turns = ((cos, sin, heads.scale), (cos, sin, 1.0), (None, None, 1.0))
        places = (layout.queries, layout.keys, layout.keys)
        for x, turn, at, of, out in zip(grads, turns, places, (group, 1, 1), into, strict=True):
            ops.from_heads(x, *turn, at, of, out)
        heads.norms_backward_(into, qkv)
        return result, None, None, None, None


def _spread(heads: Heads, qkv: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as eager.to_heads lays them out."""
    q, k, v = heads.normed(qkv)
    return (
        heads.ops.to_heads(q, cos, sin, heads.scale, layout.queries, heads.group),
        heads.ops.to_heads(k, cos, sin, 1.0, layout.keys, 1),
        heads.ops.to_heads(v, None, None, 1.0, layout.keys, 1),
    )


def _parts(heads: Heads, layout: Layout, q: Tensor, k: Tensor, v: Tensor, *like_q: Tensor) -> list[tuple[Tensor, ...]]:
    """Views of each bucket: (D * key_value, Sq * group, size) of q and its like, (D * key_value, Sk, size) of k, v."""

    def views(x: Tensor, slots: list[Tensor], group: int) -> list[Tensor]:
        pieces = torch.split(x, [rows.numel() * heads.key_value * group for rows in slots])
        shapes = [(len(rows) * heads.key_value, rows.shape[1] * group, heads.size) for rows in slots]
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    queries, keys = [b.queries for b in layout.buckets], [b.keys for b in layout.buckets]
    columns = [views(q, queries, heads.group), views(k, keys, 1), views(v, keys, 1)]
    return list(zip(*columns, *(views(x, queries, heads.group) for x in like_q), strict=True))


def _probs(heads: Heads, q: Tensor, k: Tensor, first: int, new: Allocate = heap_empty) -> Tensor:
    scores = new(len(q) * q.shape[1], k.shape[1], q).view(len(q), q.shape[1], k.shape[1])
    _products(q, k.transpose(1, 2), scores)
    if heads.softcap:
        scores.div_(heads.softcap).tanh_().mul_(heads.softcap)
    return heads.ops.softmax_(scores, heads.group, first, heads.window, heads.sinks)


def _products(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, matrix by matrix. bmm deals whole matrices out to the threads: what is left over is split inside."""
    if out is None:
        out = a.new_empty(len(a), a.shape[1], b.shape[2])
    even = len(a) - len(a) % torch.get_num_threads()
    if even:
        torch.bmm(a[:even], b[:even], out=out[:even])
    for i in range(even, len(a)):
        torch.mm(a[i], b[i], out=out[i])
    return out


def _sum(terms: Sequence[Tensor]) -> Tensor:
    """The sum of what the blocks add: the first has all the keys, the others fewer and fewer."""
    total = terms[0].to(torch.promote_types(terms[0].dtype, torch.float32))
    for term in terms[1:]:
        total[:, : term.shape[1]] += term
    return total


def _blocks(part: Bucket, group: int) -> list[tuple[int, slice, int]]:
    """(place of the block's first query among the keys, its rows, number of keys it may see)."""
    queries, prefix = part.queries.shape[1], part.keys.shape[1] - part.queries.shape[1]
    found = []
    for begin in range(0, queries, BLOCK):
        end = min(begin + BLOCK, queries)
        found.append((prefix + begin, slice(begin * group, end * group), prefix + end))
    return found
