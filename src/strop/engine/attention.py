"""Causal attention over packed documents: each document, or its own part behind a shared prefix, sees only itself.

PyTorch's CPU attention takes 25 % of a step for 4 % of its FLOPs on documents of chat length. TileAttention is one
compiled loop (tiles.py), for CPUs with AVX512-BF16. Attention is for all others: documents of similar length are padded
to one matrix (a bucket) inside attention alone, and matrix products stand around a softmax written back in place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from strop.engine import eager
from strop.engine.functions import Norm, Ops, RmsNorm, apply
from strop.engine.packed import Bucket, Documents, Layout, Varlen

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
    tiled: bool = False  # TileAttention computes it

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
        return (self.q_norm.forward(q) if self.q_norm else q), (self.k_norm.forward(k) if self.k_norm else k), v

    def norms_backward_(self, grads: tuple[Tensor, Tensor, Tensor], qkv: Tensor) -> None:
        """Takes the gradients of q and k, in place, back through their norms."""
        q, k, _ = self.views(qkv)
        if self.q_norm:
            grads[0].copy_(self.q_norm.backward(grads[0], q))
        if self.k_norm:
            grads[1].copy_(self.k_norm.backward(grads[1], k))


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
                probs = _probs(heads, q[:, rows], k[:, :keys], first)
                _products(probs, v[:, :keys], own[:, rows])
                if part.keys.shape[1] <= KEEP_PAIRS and ctx.needs_input_grad[0]:
                    kept.append(probs)
        out = qkv.new_empty(len(qkv), heads.query, heads.size)
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


class TileAttention(Function):
    """Attention, in bf16 and without a softcap, by tiles.py; saves qkv, the output and a number for each row and head.

    Gradients beyond the norms of q and k are written in place, of the prefix's rows after the sum over documents.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, documents: Documents) -> Tensor:
        from strop.engine.cpu import attention_tiles as tiles  # needs the CPU's instructions

        out = qkv.new_empty(len(qkv), heads.query * heads.size)
        sums = torch.empty(len(qkv), heads.query)
        tiles.attend(heads.normed(qkv), _turn(heads, cos, sin), _work(heads, documents), out, sums)
        ctx.heads, ctx.documents = heads, documents
        ctx.save_for_backward(qkv, cos, sin, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        from strop.engine.cpu import attention_tiles as tiles

        heads: Heads = ctx.heads
        qkv, cos, sin, out, sums = ctx.saved_tensors
        result = torch.empty_like(qkv)
        into = heads.views(result)
        grad = grad.reshape(len(qkv), heads.query, heads.size)
        work = _work(heads, ctx.documents)
        tiles.attend_backward(grad, out, sums, heads.normed(qkv), _turn(heads, cos, sin), work, into)
        heads.norms_backward_(into, qkv)
        return result, None, None, None, None


def _turn(heads: Heads, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, np.float32]:
    return cos, sin, np.float32(heads.scale)


def _work(heads: Heads, documents: Documents) -> tuple[Any, Any, Any, int, int, int, int]:
    shares = documents.shares(heads.key_value, torch.get_num_threads())
    return documents.spans, *shares, heads.key_value, heads.group, heads.size, heads.window


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


def _probs(heads: Heads, q: Tensor, k: Tensor, first: int) -> Tensor:
    scores = _products(q, k.transpose(1, 2))
    if heads.softcap:
        scores.div_(heads.softcap).tanh_().mul_(heads.softcap)
    return heads.ops.softmax_(scores, heads.group, first, heads.window)


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


def on_card(qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, documents: Documents) -> Tensor:
    """The same through kernels of flash attention that take documents of any lengths, else PyTorch's own attention."""
    varlen = varlen_kernel(qkv)
    if varlen is None:
        return sdpa(qkv, heads, cos, sin, documents)
    q, k, v = _turned(qkv, heads, cos, sin)
    cut = documents.varlen
    if cut.keys is not None:  # a shared prefix stands in front of each document's own keys
        k, v = k[cut.keys], v[cut.keys]
    out = varlen(q, k, v, cut, heads)
    return out.reshape(len(qkv), -1)


def varlen_kernel(like: Tensor) -> Callable[[Tensor, Tensor, Tensor, Varlen, Heads], Tensor] | None:
    """PyTorch's flash attention of packed documents, on cards and in types that have it (PyTorch 2.10, Ampere)."""
    if (
        like.device.type != "cuda"
        or like.dtype != torch.bfloat16
        or torch.cuda.get_device_capability(like.device) < (8, 0)
    ):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if not {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor, cut: Varlen, heads: Heads) -> Tensor:
        # The last query sees the last key; a window counts the keys on the left of the query's own.
        window = (heads.window - 1 if heads.window else -1, 0)
        result = varlen_attn(
            q, k, v, cut.query_ends, cut.key_ends, cut.longest_query, cut.longest_key,
            scale=heads.scale, window_size=window, enable_gqa=heads.group > 1,
        )  # fmt: skip
        assert isinstance(result, Tensor)
        return result

    return attend


def _turned(qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (T, heads, size) behind their norms and the rotary embedding, through autograd."""
    q, k, v = heads.views(qkv)
    if heads.q_norm and heads.k_norm:
        q, k = apply(RmsNorm, q, heads.q_norm), apply(RmsNorm, k, heads.k_norm)
    return eager.rotate(q, cos, sin).to(qkv.dtype), eager.rotate(k, cos, sin).to(qkv.dtype), v


def sdpa(qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, documents: Documents) -> Tensor:
    """The same through PyTorch's own attention and autograd: for devices that have fused kernels for it."""
    q, k, v = _turned(qkv, heads, cos, sin)
    out = qkv.new_zeros(len(qkv), heads.query, heads.size)
    for part in documents.layout.buckets:
        length, keys = part.queries.shape[1], part.keys.shape[1]
        windowed = 0 < heads.window < keys
        mask = (
            ~eager.hidden(length, keys, keys - length, heads.window, qkv.device) if windowed or keys > length else None
        )
        places = ((q, part.queries), (k, part.keys), (v, part.keys))
        own_q, own_k, own_v = (x[rows.clamp(min=0)].transpose(1, 2) for x, rows in places)
        o = F.scaled_dot_product_attention(
            own_q, own_k, own_v, mask, is_causal=mask is None, scale=heads.scale, enable_gqa=heads.group > 1
        )
        used = part.queries >= 0
        out = out.index_put((part.queries[used],), o.transpose(1, 2)[used])
    return out.view(len(qkv), -1)
