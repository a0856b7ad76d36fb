"""Attention over packed documents on a GPU: flash attention where the GPU has it.

Flash attention (Dao, arXiv:2307.08691) saves its output and one value for each row and head; q and k are rotated again
in the backward, and the gradients are written into one tensor. Elsewhere (GPUs before Ampere, fp32) PyTorch's attention
takes padded documents. On Hopper, flash attention 3 (Shah et al., arXiv:2407.08608) is used where it is installed:
newer PyTorch versions can use it in place of theirs, and do so only on request.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol, cast

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from strop.engine.kernels import eager
from strop.engine.kernels.protocols import apply
from strop.engine.train.attention import Heads
from strop.engine.train.packing import Documents, Varlen

LOG = logging.getLogger(__name__)

LARGEST, ALIGNED = 256, 8  # flash attention takes heads of at most LARGEST elements, in multiples of ALIGNED
FIRST_FLASH = (8, 0)  # compute capability (Ampere)
FLASH3, FLASH3_PACKAGE, HOPPER = "FA3", "flash_attn_interface", 9
TOLERANCE = 2e-2  # for values around 1 in bf16, each rounded several times


class RopeOps(Protocol):
    """The rotary embedding of q and k after their norms, and its gradient; EagerRope is the specification."""

    def rotate_qk(self, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]: ...
    def rotate_qk_backward(
        self, grads: tuple[Tensor, Tensor, Tensor], qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor
    ) -> Tensor: ...


class EagerRope:
    """RopeOps in PyTorch's own operations."""

    def rotate_qk(self, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return q (T, query, size) and k (T, key_value, size), normalized and rotated.

        cos, sin (T, m): the first 2 m elements of a head are rotated.
        """
        q, k, _ = heads.normalized(qkv)
        if heads.q_norm is None and heads.k_norm is None:  # contiguous: one call for both
            both = qkv.view(len(qkv), -1, heads.size)[:, : heads.query + heads.key_value]
            q, k = torch.split(_rotate(both, cos, sin), [heads.query, heads.key_value], 1)
            return q, k
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    def rotate_qk_backward(
        self, grads: tuple[Tensor, Tensor, Tensor], qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Return the gradient of qkv (T, all) from those of q and k as `rotate_qk` returns them and of v."""
        result = torch.empty_like(qkv)
        views = heads.views(result)
        for to, grad in zip(views, (_rotate(grads[0], cos, -sin), _rotate(grads[1], cos, -sin), grads[2]), strict=True):
            to.copy_(grad)
        heads.backward_norms_(views, qkv)
        return result


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return eager.rotate(wide, cos, sin).to(x.dtype)


EAGER_ROPE = EagerRope()


def attention_on_gpu(
    qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, documents: Documents, rope: RopeOps | None = None
) -> Tensor:
    """Compute attention: qkv (T, all) to (T, query * size). rope: Triton's kernels, where the GPU has them."""
    rope = rope or EAGER_ROPE
    if supports_flash(qkv, heads):
        return apply(FlashAttention, qkv, heads, cos, sin, documents.varlen, rope)
    return padded_attention(qkv, heads, cos, sin, documents, rope)


def supports_flash(like: Tensor, heads: Heads) -> bool:
    """Return whether PyTorch's flash attention takes these heads, on this GPU and in this dtype."""
    return (
        like.device.type == "cuda"
        and torch.version.hip is None
        and like.dtype in (torch.bfloat16, torch.float16)
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(like.device) >= FIRST_FLASH
        and heads.size <= LARGEST
        and heads.size % ALIGNED == 0
    )


class FlashAttention(Function):
    """Attention of documents of any lengths, with rotary embedding and norms.

    Saves qkv, the output, and one value for each row and head.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, varlen: Varlen, rope: RopeOps) -> Tensor:
        out, *saved = flash_forward(*_flash_inputs(qkv, heads, cos, sin, varlen, rope), varlen, heads)
        ctx.arguments = heads, varlen, rope
        ctx.save_for_backward(qkv, cos, sin, out, *saved)
        return out.view(len(qkv), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        heads, varlen, rope = ctx.arguments
        qkv, cos, sin, out, *saved = ctx.saved_tensors
        q, k, v = _flash_inputs(qkv, heads, cos, sin, varlen, rope)
        dq, dk, dv = flash_backward(grad.reshape(out.shape), (q, k, v), out, saved, varlen, heads)
        if varlen.keys is not None:
            dk, dv = (_sum_by_row(x, varlen.keys, len(qkv)) for x in (dk, dv))
        return rope.rotate_qk_backward((dq, dk, dv), qkv, heads, cos, sin), None, None, None, None, None


def _flash_inputs(
    qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, varlen: Varlen, rope: RopeOps
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q of each packed row, and k and v of each place: a shared prefix precedes each document's keys."""
    q, k = rope.rotate_qk(qkv, heads, cos, sin)
    v = heads.views(qkv)[2]
    return (q, k, v) if varlen.keys is None else (q, k[varlen.keys], v[varlen.keys])


def _sum_by_row(grad: Tensor, rows: Tensor, number: int) -> Tensor:
    """Return the gradient of each packed row: for a prefix the sum over the documents that see it, rounded once."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = grad.new_zeros(number, *grad.shape[1:], dtype=wide)
    return total.index_add_(0, rows, grad.to(wide)).to(grad.dtype)


def _window(heads: Heads) -> dict[str, int]:
    """Return the window: the last query sees the last key, and a window counts the keys before the query's."""
    return {"window_size_left": heads.window - 1 if heads.window else -1, "window_size_right": 0}


def flash_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, heads: Heads) -> tuple[Tensor, ...]:
    """Return the output (T, query, size), and what flash_backward needs."""
    operation = torch.ops.aten._flash_attention_forward  # varlen_attn takes grouped heads from PyTorch 2.12 on
    return tuple(operation(
        q, k, v, varlen.query_ends, varlen.key_ends, varlen.longest_query, varlen.longest_key, 0.0,
        not heads.window, False, scale=heads.scale, **_window(heads),
    )[:4])  # fmt: skip


def flash_backward(
    grad: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, saved: Any, varlen: Varlen, heads: Heads
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    sums, *random = saved
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad, *qkv, out, sums, varlen.query_ends, varlen.key_ends, varlen.longest_query, varlen.longest_key, 0.0,
        not heads.window, *random, scale=heads.scale, **_window(heads),
    )  # fmt: skip
    return dq, dk, dv


class RotateQk(Function):
    """Split qkv into q, k and v (T, heads, size), with q and k rotated; saves only qkv."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, rope: RopeOps) -> Any:
        ctx.arguments = heads, rope
        ctx.save_for_backward(qkv, cos, sin)
        return *rope.rotate_qk(qkv, heads, cos, sin), heads.views(qkv)[2].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        heads, rope = ctx.arguments
        qkv, cos, sin = ctx.saved_tensors
        return rope.rotate_qk_backward(grads, qkv, heads, cos, sin), None, None, None, None


def padded_attention(
    qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, documents: Documents, rope: RopeOps
) -> Tensor:
    """Compute attention of padded documents with PyTorch's attention and autograd.

    On a GPU the keys and values of a group are repeated for each query head: with a mask or in fp32, the kernels that
    store no scores take no groups, and the others need memory quadratic in the length.
    """
    q, k, v = RotateQk.apply(qkv, heads, cos, sin, rope)  # type: ignore[no-untyped-call]
    repeated = heads.group > 1 and qkv.device.type == "cuda"
    out = qkv.new_zeros(len(qkv) + 1, heads.query, heads.size)  # the last row receives the padding (row -1)
    for part in documents.layout.buckets:
        length, keys = part.queries.shape[1], part.keys.shape[1]
        windowed = 0 < heads.window < keys
        mask = (
            ~eager.causal_mask(length, keys, keys - length, heads.window, qkv.device)
            if windowed or keys > length
            else None
        )
        places = ((q, part.queries), (k, part.keys), (v, part.keys))
        part_q, part_k, part_v = (x[rows.clamp(min=0)].transpose(1, 2) for x, rows in places)
        if repeated:
            part_k, part_v = (x.repeat_interleave(heads.group, 1) for x in (part_k, part_v))
        o = F.scaled_dot_product_attention(
            part_q, part_k, part_v, mask, is_causal=mask is None, scale=heads.scale,
            enable_gqa=heads.group > 1 and not repeated,
        )  # fmt: skip
        out = out.index_put((part.queries,), o.transpose(1, 2))
    return out[:-1].flatten(1)


@cache
def activate_flash3(device: torch.device) -> str | None:
    """Have this process compute attention with flash attention 3; return None, or why it cannot, in one line."""
    module: Any = torch.nn.attention
    if torch.cuda.get_device_capability(device)[0] != HOPPER:
        return "it needs a Hopper GPU"
    if not hasattr(module, "activate_flash_attention_impl") or FLASH3 not in module.list_flash_attention_impls():
        return "this PyTorch version does not support it"
    if find_spec(FLASH3_PACKAGE) is None:
        return "it is not installed"
    expected = _flash_results(device)
    try:
        module.activate_flash_attention_impl(FLASH3)
        results = zip(_flash_results(device), expected, strict=True)
        close = all(bool(((a.float() - b.float()).abs() <= TOLERANCE).all()) for a, b in results)
        reason = None if close else "its results are wrong on this GPU"
    except Exception as error:  # whatever fails, PyTorch's implementation works
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if reason is not None:
        module.restore_flash_attention_impl()
        LOG.warning("flash attention 3 is installed and cannot be used: %s", reason)
    return reason


def _flash_results(device: torch.device) -> list[Tensor]:
    """Return outputs and gradients of two documents (40 and 24 tokens, 4 query heads on 2), with and without window."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(64, heads, 64, generator=generator).to(device, torch.bfloat16) for heads in (4, 2, 2, 4)
    )  # fmt: skip
    ends, results = torch.tensor([0, 40, 64], dtype=torch.int32).to(device), []
    varlen = Varlen(ends, ends, 40, 40, None)
    for window in (0, 16):
        heads = Heads(cast(Any, None), 4, 2, 64, 0.125, window, 0.0, None, None)
        out, *saved = flash_forward(q, k, v, varlen, heads)
        results += [out, *flash_backward(grad, (q, k, v), out, saved, varlen, heads)]
    return results
