"""Attention over packed documents for devices that have fused kernels for it, through PyTorch's own operations."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from strop.engine import eager
from strop.engine.attention import Heads, over
from strop.engine.functions import RmsNorm, apply
from strop.engine.packed import Documents, Varlen

Turned = Callable[[Tensor, Heads, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def turned(qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (T, heads, size) behind their norms and the rotary embedding, through autograd."""
    q, k, v = heads.views(qkv)
    if heads.q_norm and heads.k_norm:
        q = apply(RmsNorm, over(q, heads.q_norm), heads.q_norm).view(q.shape)
        k = apply(RmsNorm, over(k, heads.k_norm), heads.k_norm).view(k.shape)
    return eager.rotate(q, cos, sin).to(qkv.dtype), eager.rotate(k, cos, sin).to(qkv.dtype), v


def on_card(
    qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, documents: Documents, turn: Turned = turned
) -> Tensor:  # fmt: skip
    """Through kernels of flash attention that take documents of any lengths, else through PyTorch's own attention.
    turn: what gives q, k and v; heads.turned is the same by kernels."""
    varlen = varlen_kernel(qkv)
    if varlen is None:
        return sdpa(qkv, heads, cos, sin, documents, turn)
    q, k, v = turn(qkv, heads, cos, sin)
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


def sdpa(
    qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, documents: Documents, turn: Turned = turned
) -> Tensor:  # fmt: skip
    """The same through PyTorch's own attention and autograd: for devices that have fused kernels for it."""
    q, k, v = turn(qkv, heads, cos, sin)
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
