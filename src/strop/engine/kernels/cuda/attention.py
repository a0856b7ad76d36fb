"""Attention over packed documents on a GPU.

The default is PyTorch's flash attention (Dao, arXiv:2307.08691). GPUs before Ampere and fp32 models use its
memory-efficient attention (Rabe and Staats, arXiv:2112.05682; xFormers), or where that does not work,
scaled_dot_product_attention on padded documents. On Hopper, flash attention 3 (Shah et al., arXiv:2407.08608) replaces
PyTorch's implementation if it is installed and the PyTorch version supports it. Scores with a soft cap (Gemma 2), which
none of them supports, are computed with matmuls, as on a CPU (train/attention.py).
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
from strop.engine.kernels.operations import EFFICIENT, FLASH
from strop.engine.kernels.protocols import apply
from strop.engine.train.attention import Attention, Heads
from strop.engine.train.packing import Documents, Varlen
from strop.errors import first_line

LOG = logging.getLogger(__name__)

MAX_HEAD_SIZE, HEAD_SIZE_MULTIPLE = 256, 8  # supported by flash attention
FLASH_CAPABILITY = (8, 0)  # minimum compute capability (Ampere)
FROM_LAST_KEY = 2  # the causal mask of memory-efficient attention in which the last query sees the last key
FLASH3, FLASH3_PACKAGE, HOPPER = "FA3", "flash_attn_interface", 9  # 9: major compute capability
TOLERANCE = 2e-2  # maximum difference of two implementations, for bf16 values of magnitude 1


class RopeOps(Protocol):
    """Normalization and rotary embedding of q and k, and the gradient. EagerRope is the specification."""

    def rotate_qk(self, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]: ...
    def rotate_qk_backward(
        self, grads: tuple[Tensor, Tensor, Tensor], qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor
    ) -> Tensor: ...


class EagerRope:
    """RopeOps in plain PyTorch."""

    def rotate_qk(self, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return q (T, num_query_heads, size) and k (T, num_kv_heads, size), normalized and rotated.

        cos, sin (T, m): the first 2 m elements of a head are rotated.
        """
        q, k, _ = heads.normalized(qkv)
        if heads.q_norm is None and heads.k_norm is None:  # q and k are contiguous, so one call rotates both
            both = qkv.view(len(qkv), -1, heads.size)[:, : heads.num_query_heads + heads.num_kv_heads]
            q, k = torch.split(_rotate(both, cos, sin), [heads.num_query_heads, heads.num_kv_heads], 1)
            return q, k
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    def rotate_qk_backward(
        self, grads: tuple[Tensor, Tensor, Tensor], qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Return the gradient of qkv (T, all heads). grads: the gradients of the rotated q and k and of v."""
        grad_qkv = torch.empty_like(qkv)
        dq, dk, dv = heads.views(grad_qkv)
        dq.copy_(_rotate(grads[0], cos, -sin))
        dk.copy_(_rotate(grads[1], cos, -sin))
        dv.copy_(grads[2])
        heads.backward_norms_((dq, dk, dv), qkv)
        return grad_qkv


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return eager.rotate(wide, cos, sin).to(x.dtype)


EAGER_ROPE = EagerRope()


def attention_on_gpu(
    qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, documents: Documents, rope: RopeOps = EAGER_ROPE,
    flash: bool = True, efficient: bool = True, sinks: bool = True,
) -> Tensor:  # fmt: skip
    """Compute attention: qkv (T, all heads) to (T, query * size).

    rope: cuda.rope if its kernels work. flash, efficient: whether flash attention and memory-efficient attention work,
    where they are supported. sinks: whether both do with attention sinks.
    """
    if not heads.softcap and (sinks or heads.sinks is None):
        if flash and supports_flash(qkv, heads):
            return apply(PackedAttention, qkv, heads, cos, sin, documents.varlen, rope, FLASH)
        if efficient and supports_efficient(qkv, heads):
            return apply(PackedAttention, qkv, heads, cos, sin, documents.varlen, rope, EFFICIENT)
        if heads.sinks is None:
            return padded_attention(qkv, heads, cos, sin, documents, rope)
    return apply(Attention, qkv, heads, cos, sin, documents)


def supports_flash(like: Tensor, heads: Heads) -> bool:
    """Return whether flash attention supports these heads with the device and dtype of `like`."""
    return (
        has_flash(like.device)
        and like.dtype in (torch.bfloat16, torch.float16)
        and heads.size <= MAX_HEAD_SIZE
        and heads.size % HEAD_SIZE_MULTIPLE == 0
    )


def has_flash(device: torch.device) -> bool:
    """Return whether PyTorch has flash attention for a device."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
    )


def supports_efficient(like: Tensor, heads: Heads) -> bool:
    """Return whether memory-efficient attention supports these heads with the device and dtype of `like`."""
    is_nvidia = like.device.type == "cuda" and torch.version.hip is None
    if not is_nvidia or heads.size % HEAD_SIZE_MULTIPLE or like.dtype == torch.float64:
        return False
    return like.dtype != torch.bfloat16 or torch.cuda.get_device_capability(like.device) >= FLASH_CAPABILITY


class PackedAttention(Function):
    """Attention of packed documents by one of PyTorch's kernels, FLASH or EFFICIENT, with rotary embedding and norms.

    Saves qkv, the output, and one value per token and head. The backward rotates q and k again.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, varlen: Varlen, rope: RopeOps, kernel: str
    ) -> Tensor:
        compute = flash_forward if kernel == FLASH else efficient_forward
        out, *saved = compute(*_rotate_flash_inputs(qkv, heads, cos, sin, varlen, rope), varlen, heads)
        if heads.sinks is not None:
            out, saved[0] = add_sinks(out, saved[0], varlen, heads.sinks)
        ctx.arguments = heads, varlen, rope, kernel
        ctx.save_for_backward(qkv, cos, sin, out, *saved)
        return out.view(len(qkv), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        heads, varlen, rope, kernel = ctx.arguments
        qkv, cos, sin, out, *saved = ctx.saved_tensors
        q, k, v = _rotate_flash_inputs(qkv, heads, cos, sin, varlen, rope)
        compute = flash_backward if kernel == FLASH else efficient_backward
        dq, dk, dv = compute(grad.reshape(out.shape), (q, k, v), out, saved, varlen, heads)
        if varlen.keys is not None:
            dk, dv = (_sum_by_row(x, varlen.keys, len(qkv)) for x in (dk, dv))
        return rope.rotate_qk_backward((dq, dk, dv), qkv, heads, cos, sin), None, None, None, None, None, None


def _rotate_flash_inputs(
    qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, varlen: Varlen, rope: RopeOps
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q of each packed row, and k and v in the order of varlen.keys."""
    q, k = rope.rotate_qk(qkv, heads, cos, sin)
    v = heads.values(qkv)
    return (q, k, v) if varlen.keys is None else (q, k[varlen.keys], v[varlen.keys])


def add_sinks(out: Tensor, logsumexp: Tensor, varlen: Varlen, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Add an additional score of each head to the softmax: return the output and the logsumexp of the scores with it.

    The backward of both kernels computes the probabilities from the logsumexp, and their sum with the gradient from the
    output (arXiv:2205.14135, algorithm 4). With those of this function it therefore returns the gradients with sinks.

    out: (T, num_query_heads, size). logsumexp: of flash attention (num_query_heads, T), of memory-efficient attention
    (documents, num_query_heads, longest document or more). sinks: (num_query_heads,), fp32.
    """
    with_sinks = torch.logaddexp(logsumexp, sinks[:, None].to(logsumexp.dtype))
    shares = (logsumexp - with_sinks).exp()
    if shares.dim() == 2:
        shares = shares.T
    else:
        rows = torch.arange(len(out), dtype=torch.int32, device=out.device)
        document = torch.searchsorted(varlen.query_ends, rows, right=True) - 1
        shares = shares[document, :, rows - varlen.query_ends[document]]
    return (out * shares[..., None]).to(out.dtype), with_sinks


def _sum_by_row(grad: Tensor, rows: Tensor, number: int) -> Tensor:
    """Return the sums of `grad` by packed row, of which there are `number`: a shared prefix has several gradients."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = grad.new_zeros(number, *grad.shape[1:], dtype=wide)
    return total.index_add_(0, rows, grad.to(wide)).to(grad.dtype)


def _window_arguments(heads: Heads) -> dict[str, int]:
    """Return the window arguments of flash attention, which count the keys on both sides of a query's own key."""
    return {"window_size_left": heads.window - 1 if heads.window else -1, "window_size_right": 0}


def flash_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, heads: Heads) -> tuple[Tensor, ...]:
    """Return the output (T, num_query_heads, size), and the tensors that flash_backward needs."""
    operation = torch.ops.aten._flash_attention_forward  # varlen_attn supports grouped heads only since PyTorch 2.12
    return tuple(operation(
        q, k, v, varlen.query_ends, varlen.key_ends, varlen.longest_query, varlen.longest_key, 0.0,
        not heads.window, False, scale=heads.scale, **_window_arguments(heads),
    )[:4])  # fmt: skip


def flash_backward(
    grad: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, saved: Any, varlen: Varlen, heads: Heads
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v. saved: the tensors that flash_forward returned after the output."""
    logsumexp, *rng_state = saved
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad, *qkv, out, logsumexp, varlen.query_ends, varlen.key_ends, varlen.longest_query, varlen.longest_key, 0.0,
        not heads.window, *rng_state, scale=heads.scale, **_window_arguments(heads),
    )  # fmt: skip
    return dq, dk, dv


def efficient_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, heads: Heads) -> tuple[Tensor, ...]:
    """Return the output (T, num_query_heads, size), and the tensors that efficient_backward needs."""
    inputs = (x[None] for x in (q, *_repeat_heads(k, v, heads)))
    out, *saved = torch.ops.aten._efficient_attention_forward(
        *inputs, None, varlen.query_ends, varlen.key_ends, varlen.longest_query, varlen.longest_key, 0.0,
        FROM_LAST_KEY, True, scale=heads.scale, window_size=heads.window or None,
    )[:4]  # fmt: skip
    return (out[0], *saved)


def efficient_backward(
    grad: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, saved: Any, varlen: Varlen, heads: Heads
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v. saved: the tensors that efficient_forward returned after the output."""
    logsumexp, seed, offset = saved
    q, k, v = qkv
    inputs = (x[None] for x in (grad, q, *_repeat_heads(k, v, heads)))
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
        *inputs, None, out[None], varlen.query_ends, varlen.key_ends, varlen.longest_query, varlen.longest_key,
        logsumexp, 0.0, seed, offset, FROM_LAST_KEY, False, scale=heads.scale, window_size=heads.window or None,
    )  # fmt: skip
    if heads.group > 1:
        parts = (x.view(*k.shape[:2], heads.group, heads.size) for x in (dk[0], dv[0]))
        dk, dv = (part.sum(2, dtype=torch.float32).to(part.dtype)[None] for part in parts)
    return dq[0], dk[0], dv[0]


def _repeat_heads(k: Tensor, v: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """Return keys and values (T, num_query_heads, size) for each query head."""
    if heads.group == 1:
        return k, v
    return k.repeat_interleave(heads.group, 1), v.repeat_interleave(heads.group, 1)


class RotateQk(Function):
    """Return q, k and v (T, heads, size), with q and k normalized and rotated. Saves only qkv."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, rope: RopeOps) -> Any:
        ctx.arguments = heads, rope
        ctx.save_for_backward(qkv, cos, sin)
        v = heads.views(qkv)[2].clone() if heads.v_norm is None else heads.values(qkv)
        return *rope.rotate_qk(qkv, heads, cos, sin), v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        heads, rope = ctx.arguments
        qkv, cos, sin = ctx.saved_tensors
        return rope.rotate_qk_backward(grads, qkv, heads, cos, sin), None, None, None, None


def padded_attention(
    qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, documents: Documents, rope: RopeOps
) -> Tensor:
    """Compute attention with scaled_dot_product_attention, on documents padded to buckets of similar length.

    On a GPU the keys and values are repeated for each query head, because the memory-efficient kernels do not support
    grouped heads with a mask or in fp32.
    """
    q, k, v = RotateQk.apply(qkv, heads, cos, sin, rope)  # type: ignore[no-untyped-call]
    repeats_keys = heads.group > 1 and qkv.device.type == "cuda"
    out = qkv.new_zeros(len(qkv) + 1, heads.num_query_heads, heads.size)  # the last row receives the padding (row -1)
    for bucket in documents.layout.buckets:
        num_queries, num_keys = bucket.queries.shape[1], bucket.keys.shape[1]
        mask = None
        if num_keys > num_queries or 0 < heads.window < num_keys:
            mask = ~eager.causal_mask(num_queries, num_keys, num_keys - num_queries, heads.window, qkv.device)
        inputs = ((q, bucket.queries), (k, bucket.keys), (v, bucket.keys))
        bucket_q, bucket_k, bucket_v = (x[rows.clamp(min=0)].transpose(1, 2) for x, rows in inputs)
        if repeats_keys:
            bucket_k, bucket_v = (x.repeat_interleave(heads.group, 1) for x in (bucket_k, bucket_v))
        o = F.scaled_dot_product_attention(
            bucket_q, bucket_k, bucket_v, mask, is_causal=mask is None, scale=heads.scale,
            enable_gqa=heads.group > 1 and not repeats_keys,
        )  # fmt: skip
        out = out.index_put((bucket.queries,), o.transpose(1, 2))
    return out[:-1].flatten(1)


@cache
def activate_flash3(device: torch.device) -> str | None:
    """Make this process use flash attention 3. Return None, or the reason why it cannot be used, in one line."""
    module: Any = torch.nn.attention
    if torch.cuda.get_device_capability(device)[0] != HOPPER:
        return "it needs a Hopper GPU"
    if not hasattr(module, "activate_flash_attention_impl") or FLASH3 not in module.list_flash_attention_impls():
        return "this PyTorch version does not support it"
    if find_spec(FLASH3_PACKAGE) is None:
        return "it is not installed"
    expected = _compute_flash_results(device)
    try:
        module.activate_flash_attention_impl(FLASH3)
        results = zip(_compute_flash_results(device), expected, strict=True)
        is_right = all(bool(((a.float() - b.float()).abs() <= TOLERANCE).all()) for a, b in results)
        reason = None if is_right else "its results are wrong on this GPU"
    except Exception as error:  # whatever fails, training continues with PyTorch's implementation
        reason = first_line(error)
    if reason is not None:
        module.restore_flash_attention_impl()
        LOG.warning("flash attention 3 is installed and cannot be used: %s", reason)
    return reason


def _compute_flash_results(device: torch.device) -> list[Tensor]:
    """Return outputs and gradients for two documents (40 and 24 tokens), without and with a window."""
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
