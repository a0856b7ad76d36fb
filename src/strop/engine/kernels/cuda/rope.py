"""The rotary position embedding as Triton kernels.

`rotate_qk` normalizes and rotates q and k in one kernel. `ApplyRope` only rotates, for models that normalize after the
rotation, rotate interleaved pairs of elements, or scale the queries.

qkv: shape (T, (num_query_heads + 2 num_kv_heads) * size), the heads of q, then of k, then of v. cos, sin: shape (T, m);
the first 2 m elements of each head are rotated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from triton.language import constexpr, tensor

from strop.engine.kernels.cuda.elementwise import rms_norm, rms_norm_backward
from strop.engine.kernels.cuda.launch import as_rows, device_function, kernel, launch, next_power_of_2, warps_for
from strop.engine.train.attention import Heads, as_norm_input

TILE = 2048  # maximum number of elements that a program processes


@device_function
def _norm_weight(
    q_weight: tensor, k_weight: tensor, offset: tensor, is_q: tensor, element: tensor, mask: tensor
) -> tensor:  # fmt: skip
    weight = tl.where(is_q, tl.load(q_weight + element, mask=mask), tl.load(k_weight + element, mask=mask))
    return weight.to(tl.float32) + offset


@kernel()
def _rope(
    x: tensor, cos: tensor, sin: tensor, q_weight: tensor, k_weight: tensor, out: tensor,
    x_row: tensor, eps: tensor, offset: tensor,
    QUERY: constexpr, HEADS: constexpr, SIZE: constexpr, M: constexpr, NORMED: constexpr,
    GROUP: constexpr, HALF: constexpr, REST: constexpr,
) -> None:  # fmt: skip
    """Normalize (with NORMED) and rotate GROUP heads of a row.

    HALF and REST are M and SIZE - 2 M (the elements that are not rotated), rounded up to powers of two or 0.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[:, None]
    is_q = head < QUERY
    x_head, out_head = x + row * x_row + head * SIZE, out + row * (HEADS * SIZE) + head * SIZE
    dtype = out.dtype.element_ty
    squares = tl.zeros((GROUP,), tl.float32)
    if M > 0:
        pair = tl.arange(0, HALF)[None, :]
        pair_mask = (head < HEADS) & (pair < M)
        a = tl.load(x_head + pair, mask=pair_mask, other=0.0).to(tl.float32)
        b = tl.load(x_head + M + pair, mask=pair_mask, other=0.0).to(tl.float32)
        squares += tl.sum(a * a, 1) + tl.sum(b * b, 1)
    if REST > 0:
        rest = 2 * M + tl.arange(0, REST)[None, :]
        rest_mask = (head < HEADS) & (rest < SIZE)
        c = tl.load(x_head + rest, mask=rest_mask, other=0.0).to(tl.float32)
        squares += tl.sum(c * c, 1)
    if NORMED:
        rstd = tl.rsqrt(squares / SIZE + eps)[:, None]
        if M > 0:
            a *= rstd * _norm_weight(q_weight, k_weight, offset, is_q, pair, pair < M)
            b *= rstd * _norm_weight(q_weight, k_weight, offset, is_q, M + pair, pair < M)
        if REST > 0:
            c *= rstd * _norm_weight(q_weight, k_weight, offset, is_q, rest, rest < SIZE)
    if M > 0:
        cosine = tl.load(cos + row * M + pair, mask=pair < M, other=0.0).to(tl.float32)
        sine = tl.load(sin + row * M + pair, mask=pair < M, other=0.0).to(tl.float32)
        tl.store(out_head + pair, (a * cosine - b * sine).to(dtype), mask=pair_mask)
        tl.store(out_head + M + pair, (b * cosine + a * sine).to(dtype), mask=pair_mask)
    if REST > 0:
        tl.store(out_head + rest, c.to(dtype), mask=rest_mask)


@device_function
def _load_grad(
    q_head: tensor, k_head: tensor, v_head: tensor, is_q: tensor, is_k: tensor, is_v: tensor, element: tensor,
    mask: tensor,
) -> tensor:  # fmt: skip
    grad = tl.load(q_head + element, mask=is_q & mask, other=0.0).to(tl.float32)
    grad += tl.load(k_head + element, mask=is_k & mask, other=0.0).to(tl.float32)
    grad += tl.load(v_head + element, mask=is_v & mask, other=0.0).to(tl.float32)
    return grad


@kernel()
def _rope_backward(
    dq: tensor, dk: tensor, dv: tensor, x: tensor, cos: tensor, sin: tensor, q_weight: tensor, k_weight: tensor,
    out: tensor, dq_row: tensor, dq_head: tensor, dk_row: tensor, dk_head: tensor, dv_row: tensor, dv_head: tensor,
    x_row: tensor, eps: tensor, offset: tensor,
    QUERY: constexpr, HEADS: constexpr, SIZE: constexpr, M: constexpr, NORMED: constexpr,
    GROUP: constexpr, HALF: constexpr, REST: constexpr,
) -> None:  # fmt: skip
    """Compute the gradient of GROUP heads of a row. HEADS: number of q and k heads. Gradients of v are copied."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[:, None]
    is_q, is_k, is_v = head < QUERY, (head >= QUERY) & (head < HEADS), (head >= HEADS) & (head < 2 * HEADS - QUERY)
    head_int64 = head.to(tl.int64)  # the stride between heads may be larger than the whole tensor
    q_head = dq + row * dq_row + head_int64 * dq_head
    k_head = dk + row * dk_row + (head_int64 - QUERY) * dk_head
    v_head, all_heads = dv + row * dv_row + (head_int64 - HEADS) * dv_head, 2 * HEADS - QUERY
    x_head, out_head = x + row * x_row + head * SIZE, out + row * (all_heads * SIZE) + head * SIZE
    dtype = out.dtype.element_ty
    squares, dots = tl.zeros((GROUP,), tl.float32), tl.zeros((GROUP,), tl.float32)
    if M > 0:
        pair = tl.arange(0, HALF)[None, :]
        pair_mask = pair < M
        da = _load_grad(q_head, k_head, v_head, is_q, is_k, is_v, pair, pair_mask)
        db = _load_grad(q_head, k_head, v_head, is_q, is_k, is_v, M + pair, pair_mask)
        cosine = tl.load(cos + row * M + pair, mask=pair_mask, other=0.0).to(tl.float32)
        sine = tl.load(sin + row * M + pair, mask=pair_mask, other=0.0).to(tl.float32)
        cosine, sine = tl.where(is_v, 1.0, cosine), tl.where(is_v, 0.0, sine)
        da, db = da * cosine + db * sine, db * cosine - da * sine  # the gradient of a rotation is the inverse rotation
    if REST > 0:
        rest = 2 * M + tl.arange(0, REST)[None, :]
        rest_mask = rest < SIZE
        dc = _load_grad(q_head, k_head, v_head, is_q, is_k, is_v, rest, rest_mask)
    if NORMED:
        normed = head < HEADS
        if M > 0:
            a = tl.load(x_head + pair, mask=normed & pair_mask, other=0.0).to(tl.float32)
            b = tl.load(x_head + M + pair, mask=normed & pair_mask, other=0.0).to(tl.float32)
            da = tl.where(is_v, da, da * _norm_weight(q_weight, k_weight, offset, is_q, pair, pair_mask))
            db = tl.where(is_v, db, db * _norm_weight(q_weight, k_weight, offset, is_q, M + pair, pair_mask))
            squares += tl.sum(a * a, 1) + tl.sum(b * b, 1)
            dots += tl.sum(a * da, 1) + tl.sum(b * db, 1)
        if REST > 0:
            c = tl.load(x_head + rest, mask=normed & rest_mask, other=0.0).to(tl.float32)
            dc = tl.where(is_v, dc, dc * _norm_weight(q_weight, k_weight, offset, is_q, rest, rest_mask))
            squares += tl.sum(c * c, 1)
            dots += tl.sum(c * dc, 1)
        rstd = tl.rsqrt(squares / SIZE + eps)
        projection = (dots * rstd * rstd / SIZE)[:, None]
        factor = tl.where(is_v, 1.0, rstd[:, None])
        if M > 0:
            da, db = factor * (da - a * projection), factor * (db - b * projection)
        if REST > 0:
            dc = factor * (dc - c * projection)
    if M > 0:
        tl.store(out_head + pair, da.to(dtype), mask=(head < all_heads) & pair_mask)
        tl.store(out_head + M + pair, db.to(dtype), mask=(head < all_heads) & pair_mask)
    if REST > 0:
        tl.store(out_head + rest, dc.to(dtype), mask=(head < all_heads) & rest_mask)


def _launch_constants(heads: Heads, m: int, num_heads: int) -> dict[str, Any]:
    size, num_query_heads, num_kv_heads = heads.size, heads.num_query_heads, heads.num_kv_heads
    half, rest = next_power_of_2(m) if m else 0, next_power_of_2(size - 2 * m) if size > 2 * m else 0
    group = max(1, min(next_power_of_2(num_heads), TILE // max(2 * half + rest, 1)))
    return {
        "QUERY": num_query_heads, "HEADS": num_query_heads + num_kv_heads, "SIZE": size, "M": m,
        "NORMED": has_norms_per_head(heads),
        "GROUP": group, "HALF": half, "REST": rest, "num_warps": warps_for(group * max(half, rest)),
    }  # fmt: skip


def has_norms_per_head(heads: Heads) -> bool:
    """Return whether q and k are normalized per head. OLMo instead normalizes over all heads of a token."""
    return heads.q_norm is not None and heads.q_norm.weight.shape[-1] == heads.size


def rotate_qk(qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q (T, num_query_heads, size) and k (T, num_kv_heads, size), normalized and rotated."""
    x, num_heads = as_rows(qkv), heads.num_query_heads + heads.num_kv_heads
    out = x.new_empty(len(x), num_heads, heads.size)
    q, k = torch.split(out, [heads.num_query_heads, heads.num_kv_heads], 1)
    if heads.q_norm is not None and heads.k_norm is not None and not has_norms_per_head(heads):
        for values, target, norm in zip(heads.views(x), (q, k), (heads.q_norm, heads.k_norm), strict=False):
            rms_norm(as_norm_input(values, norm), norm.weight, norm.eps, norm.offset, target.flatten(1))
        x = out.view(len(x), -1)
    constants, (weights, scalars) = _launch_constants(heads, cos.shape[1], num_heads), _norm_arguments(heads, x)
    grid = len(x), -(-num_heads // constants["GROUP"])
    launch(_rope, grid, x, x, cos, sin, *weights, out, x.stride(0), *scalars, **constants)
    return q, k


def rotate_qk_backward(
    grads: tuple[Tensor, Tensor, Tensor], qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor
) -> Tensor:
    """Return the gradient of qkv. grads: the gradients of the rotated q and k and of v, each (T, heads, size)."""
    x, num_heads = as_rows(qkv), heads.num_query_heads + 2 * heads.num_kv_heads
    dq, dk, dv = (grad if grad.stride(2) == 1 else grad.contiguous() for grad in grads)
    out, strides = x.new_empty(len(x), num_heads * heads.size), [n for grad in (dq, dk, dv) for n in grad.stride()[:2]]
    constants, (weights, scalars) = _launch_constants(heads, cos.shape[1], num_heads), _norm_arguments(heads, x)
    grid = len(x), -(-num_heads // constants["GROUP"])
    launch(
        _rope_backward, grid, x, dq, dk, dv, x, cos, sin, *weights, out, *strides, x.stride(0), *scalars, **constants
    )  # fmt: skip
    if heads.q_norm is not None and heads.k_norm is not None and not has_norms_per_head(heads):
        for target, values, norm in zip(heads.views(out), heads.views(x), (heads.q_norm, heads.k_norm), strict=False):
            target = target.flatten(1)
            rms_norm_backward(target, as_norm_input(values, norm), norm.weight, norm.eps, norm.offset, target)
    replace(heads, q_norm=None, k_norm=None).backward_norms_(heads.views(out), x)  # of v, if it has one
    return out


def _norm_arguments(heads: Heads, like: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
    """Return ((q weight, k weight), (eps, offset)) of the norms per head, or placeholders if there are none."""
    if heads.q_norm is None or heads.k_norm is None or not has_norms_per_head(heads):
        return (like, like), (0.0, 0.0)
    assert (heads.q_norm.eps, heads.q_norm.offset) == (heads.k_norm.eps, heads.k_norm.offset)
    return (heads.q_norm.weight, heads.k_norm.weight), (heads.q_norm.eps, heads.q_norm.offset)


@kernel()
def _rope_only(
    x: tensor, out: tensor, cos: tensor, sin: tensor, factors: tensor, QUERY: constexpr, HEADS: constexpr,
    ALL: constexpr, SIZE: constexpr, M: constexpr, INTERLEAVED: constexpr, SCALED: constexpr, BACKWARD: constexpr,
    GROUP: constexpr, HALF: constexpr, REST: constexpr,
) -> None:  # fmt: skip
    """Rotate GROUP heads of a row, and multiply q by its factor (with SCALED). HALF and REST: as in _rope."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[:, None]
    offset = row * (ALL * SIZE) + head * SIZE
    dtype = out.dtype.element_ty
    factor = tl.full((GROUP, 1), 1.0, tl.float32)
    if SCALED:
        factor = tl.where(head < QUERY, tl.load(factors + row).to(tl.float32), factor)
    if M > 0:
        pair, element = tl.arange(0, HALF)[None, :], tl.arange(0, 2 * HALF)[None, :]
        pair_mask, element_mask = (head < HEADS) & (pair < M), (head < HEADS) & (element < 2 * M)
        if INTERLEAVED and not BACKWARD:
            elements = tl.load(x + offset + element, mask=element_mask, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(elements, (GROUP, HALF, 2)))
        else:
            a = tl.load(x + offset + pair, mask=pair_mask, other=0.0).to(tl.float32)
            b = tl.load(x + offset + M + pair, mask=pair_mask, other=0.0).to(tl.float32)
        cosine = tl.load(cos + row * M + pair, mask=pair < M, other=0.0).to(tl.float32)
        sine = tl.load(sin + row * M + pair, mask=pair < M, other=0.0).to(tl.float32)
        if BACKWARD:
            sine = -sine
        first, second = (a * cosine - b * sine) * factor, (b * cosine + a * sine) * factor
        if INTERLEAVED and BACKWARD:
            tl.store(out + offset + element, tl.interleave(first, second).to(dtype), mask=element_mask)
        else:
            tl.store(out + offset + pair, first.to(dtype), mask=pair_mask)
            tl.store(out + offset + M + pair, second.to(dtype), mask=pair_mask)
    if REST > 0 and SCALED:
        rest = 2 * M + tl.arange(0, REST)[None, :]
        rest_mask = (head < HEADS) & (rest < SIZE)
        rest_values = tl.load(x + offset + rest, mask=rest_mask, other=0.0).to(tl.float32) * factor
        tl.store(out + offset + rest, rest_values.to(dtype), mask=rest_mask)


def apply_rope(
    backward: bool, x: Tensor, heads: Heads, cos: Tensor, sin: Tensor, interleaved: bool, scale: Tensor | None
) -> Tensor:
    """Return qkv with q and k rotated. backward: return the gradient of qkv from x, the gradient of the result."""
    x = x.contiguous()
    out, size, m, num_heads = x.clone(), heads.size, cos.shape[1], heads.num_query_heads + heads.num_kv_heads
    half, rest = next_power_of_2(m) if m else 0, next_power_of_2(size - 2 * m) if size > 2 * m else 0
    group = max(1, min(next_power_of_2(num_heads), TILE // max(2 * half, rest, 1)))
    factors = cos if scale is None else scale.contiguous()
    launch(
        _rope_only, (len(x), -(-num_heads // group)), x, x, out, cos, sin, factors,
        QUERY=heads.num_query_heads, HEADS=num_heads,
        ALL=num_heads + heads.num_kv_heads, SIZE=size, M=m, INTERLEAVED=interleaved, SCALED=scale is not None,
        BACKWARD=backward, GROUP=group, HALF=half, REST=rest, num_warps=warps_for(group * max(half, rest)),
    )  # fmt: skip
    return out


class ApplyRope(Function):
    """The Triton version of train.attention.ApplyRope."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, interleaved: bool, scale: Tensor | None
    ) -> Tensor:
        ctx.arguments = heads, cos, sin, interleaved, scale
        return apply_rope(False, qkv, *ctx.arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return apply_rope(True, grad, *ctx.arguments), None, None, None, None, None
