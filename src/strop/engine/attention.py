"""Causal attention over packed documents: each document, or its own part behind a shared prefix, sees only itself.

Documents of similar length are padded to one matrix (a bucket) inside attention alone. PyTorch's CPU attention takes
25 % of a step for 4 % of its FLOPs on documents of chat length; matrix products around a softmax written back in
place take a third of that, the gradient by hand included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from strop.engine import eager
from strop.engine.functions import Norm, Ops, RmsNorm, apply
from strop.engine.packed import Bucket

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
    q_norm: Norm | None
    k_norm: Norm | None

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


class Attention(Function):
    """qkv (T, (query + 2 key_value) size) to the heads' output (T, query size); rotary embedding and norms included.

    Saves qkv and, for documents up to KEEP_PAIRS, the probabilities in qkv's type.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, parts: Sequence[Bucket]) -> Tensor:
        ops, group = heads.ops, heads.group
        out = qkv.new_zeros(len(qkv), heads.query, heads.size)
        kept: list[Tensor] = []
        normed = heads.normed(qkv)
        for part in parts:
            q, k, v = _spread(heads, normed, cos, sin, part)
            o = torch.empty_like(q)
            for first, rows, keys in _blocks(part, group):
                probs = _probs(heads, q[:, rows], k[:, :keys], part, first)
                torch.bmm(probs, v[:, :keys], out=o[:, rows])
                if part.keys.shape[1] <= KEEP_PAIRS and ctx.needs_input_grad[0]:
                    kept.append(probs)
            ops.from_heads_(out, o, part.queries, group)
        ctx.heads, ctx.parts = heads, parts
        ctx.save_for_backward(qkv, cos, sin, *kept)
        return out.view(len(qkv), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        heads: Heads = ctx.heads
        ops, group = heads.ops, heads.group
        qkv, cos, sin, *kept = ctx.saved_tensors
        grad = grad.reshape(len(qkv), heads.query, heads.size)
        wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
        total = torch.zeros(qkv.shape, dtype=wide, device=qkv.device)
        grad_q, grad_k, grad_v = heads.views(total)
        normed = heads.normed(qkv)
        for part in reversed(ctx.parts):
            q, k, v = _spread(heads, normed, cos, sin, part)
            do = ops.to_heads(grad, None, None, 1.0, part.queries, group)
            dq, dk, dv = torch.empty_like(q), None, None
            for first, rows, keys in reversed(_blocks(part, group)):
                known = kept.pop() if part.keys.shape[1] <= KEEP_PAIRS else None
                probs = _probs(heads, q[:, rows], k[:, :keys], part, first) if known is None else known
                ds = torch.bmm(do[:, rows], v[:, :keys].transpose(1, 2))
                ds = ops.softmax_backward_(ds, probs, group, first, heads.window)
                torch.bmm(ds, k[:, :keys], out=dq[:, rows])
                dk = _onto(dk, torch.bmm(ds.transpose(1, 2), q[:, rows]))
                dv = _onto(dv, torch.bmm(probs.transpose(1, 2), do[:, rows]))
            assert dk is not None and dv is not None
            ops.from_heads_(grad_q, dq, part.queries, group)
            ops.from_heads_(grad_k, dk, part.keys, 1)
            ops.from_heads_(grad_v, dv, part.keys, 1)
        result = torch.empty_like(qkv)
        ops.turn_back(total, cos, sin, heads.scale, heads.query, heads.key_value, result)
        q, k, _ = heads.views(qkv)
        result_q, result_k, _ = heads.views(result)
        if heads.q_norm:
            result_q.copy_(heads.q_norm.backward(result_q, q))
        if heads.k_norm:
            result_k.copy_(heads.k_norm.backward(result_k, k))
        return result, None, None, None, None


def _spread(
    heads: Heads, normed: tuple[Tensor, Tensor, Tensor], cos: Tensor, sin: Tensor, part: Bucket
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = normed
    return (
        heads.ops.to_heads(q, cos, sin, heads.scale, part.queries, heads.group),
        heads.ops.to_heads(k, cos, sin, 1.0, part.keys, 1),
        heads.ops.to_heads(v, None, None, 1.0, part.keys, 1),
    )


def _probs(heads: Heads, q: Tensor, k: Tensor, part: Bucket, first: int) -> Tensor:
    return heads.ops.softmax_(torch.bmm(q, k.transpose(1, 2)), heads.group, first, heads.window)


def _onto(total: Tensor | None, more: Tensor) -> Tensor:
    """The sum of what the blocks add, from the last, which has all the keys, to the first, which has the fewest."""
    if total is None:
        return more
    total = total.to(torch.promote_types(total.dtype, torch.float32))
    total[:, : more.shape[1]] += more
    return total


def _blocks(part: Bucket, group: int) -> list[tuple[int, slice, int]]:
    """(place of the block's first query among the keys, its rows, number of keys it may see)."""
    queries, prefix = part.queries.shape[1], part.keys.shape[1] - part.queries.shape[1]
    found = []
    for begin in range(0, queries, BLOCK):
        end = min(begin + BLOCK, queries)
        found.append((prefix + begin, slice(begin * group, end * group), prefix + end))
    return found


def sdpa(qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, parts: Sequence[Bucket]) -> Tensor:
    """The same through PyTorch's own attention and autograd: for devices that have fused kernels for it."""
    q, k, v = heads.views(qkv)
    if heads.q_norm and heads.k_norm:
        q, k = apply(RmsNorm, q, heads.q_norm), apply(RmsNorm, k, heads.k_norm)
    q, k = eager.rotate(q, cos, sin).to(qkv.dtype), eager.rotate(k, cos, sin).to(qkv.dtype)
    out = qkv.new_zeros(len(qkv), heads.query, heads.size)
    for part in parts:
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
