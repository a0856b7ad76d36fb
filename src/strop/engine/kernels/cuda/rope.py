"""The rotary embedding on a GPU, as Triton kernels.

`rotate_qk` normalizes and rotates q and k in one kernel; its backward writes one tensor with the gradients of q, k and
v. `ApplyRope` only rotates. It serves models that normalize after the rotation, have interleaved pairs, or scale q by
row.

qkv: shape (T, (query + 2 key_value) * size), the heads of q, then those of k and v. cos, sin: shape (T, m); the first
2 m elements of each head are rotated.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from triton.language import constexpr, tensor

from strop.engine.kernels.cuda.elementwise import rms_norm, rms_norm_backward
from strop.engine.kernels.cuda.launch import kernel, launch, next_power_of_2, rows_of, warps_for
from strop.engine.train.attention import Heads, as_norm_input

TILE = 2048  # elements that one program processes


@kernel()
def _rope(
    x: tensor, cos: tensor, sin: tensor, q_weight: tensor, k_weight: tensor, out: tensor,
    x_row: tensor, eps: tensor, offset: tensor,
    QUERY: constexpr, HEADS: constexpr, SIZE: constexpr, M: constexpr, NORMED: constexpr,
    GROUP: constexpr, HALF: constexpr, REST: constexpr,
) -> None:  # fmt: skip
    """Normalize (with NORMED) and rotate GROUP heads. HALF >= M and REST >= SIZE - 2 M: powers of two, or REST = 0."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[:, None]
    is_q = head < QUERY
    at, to = x + row * x_row + head * SIZE, out + row * (HEADS * SIZE) + head * SIZE
    kind = out.dtype.element_ty
    squares = tl.zeros((GROUP,), tl.float32)
    if M > 0:
        place = tl.arange(0, HALF)[None, :]
        active = (head < HEADS) & (place < M)
        a = tl.load(at + place, mask=active, other=0.0).to(tl.float32)
        b = tl.load(at + M + place, mask=active, other=0.0).to(tl.float32)
        squares += tl.sum(a * a, 1) + tl.sum(b * b, 1)
    if REST > 0:
        behind = 2 * M + tl.arange(0, REST)[None, :]
        left = (head < HEADS) & (behind < SIZE)
        c = tl.load(at + behind, mask=left, other=0.0).to(tl.float32)
        squares += tl.sum(c * c, 1)
    if NORMED:
        rstd = tl.rsqrt(squares / SIZE + eps)[:, None]
        if M > 0:
            for_a = tl.where(is_q, tl.load(q_weight + place, mask=place < M), tl.load(k_weight + place, mask=place < M))
            for_b = tl.where(
                is_q, tl.load(q_weight + M + place, mask=place < M), tl.load(k_weight + M + place, mask=place < M)
            )
            a *= rstd * (for_a.to(tl.float32) + offset)
            b *= rstd * (for_b.to(tl.float32) + offset)
        if REST > 0:
            for_c = tl.where(
                is_q, tl.load(q_weight + behind, mask=behind < SIZE), tl.load(k_weight + behind, mask=behind < SIZE)
            )
            c *= rstd * (for_c.to(tl.float32) + offset)
    if M > 0:
        cosine = tl.load(cos + row * M + place, mask=place < M, other=0.0).to(tl.float32)
        sine = tl.load(sin + row * M + place, mask=place < M, other=0.0).to(tl.float32)
        tl.store(to + place, (a * cosine - b * sine).to(kind), mask=active)
        tl.store(to + M + place, (b * cosine + a * sine).to(kind), mask=active)
    if REST > 0:
        tl.store(to + behind, c.to(kind), mask=left)


@kernel()
def _rope_backward(
    dq: tensor, dk: tensor, dv: tensor, x: tensor, cos: tensor, sin: tensor, q_weight: tensor, k_weight: tensor,
    out: tensor, dq_row: tensor, dq_head: tensor, dk_row: tensor, dk_head: tensor, dv_row: tensor, dv_head: tensor,
    x_row: tensor, eps: tensor, offset: tensor,
    QUERY: constexpr, HEADS: constexpr, SIZE: constexpr, M: constexpr, NORMED: constexpr,
    GROUP: constexpr, HALF: constexpr, REST: constexpr,
) -> None:  # fmt: skip
    """Write the gradient of GROUP heads. HEADS: number of q and k heads. Gradients of v are copied."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[:, None]
    is_q, is_k, is_v = head < QUERY, (head >= QUERY) & (head < HEADS), (head >= HEADS) & (head < 2 * HEADS - QUERY)
    far = head.to(tl.int64)  # int64, because the stride between heads may be larger than the whole tensor
    from_q, from_k = dq + row * dq_row + far * dq_head, dk + row * dk_row + (far - QUERY) * dk_head
    from_v, all_heads = dv + row * dv_row + (far - HEADS) * dv_head, 2 * HEADS - QUERY
    at, to = x + row * x_row + head * SIZE, out + row * (all_heads * SIZE) + head * SIZE
    kind = out.dtype.element_ty
    squares, along = tl.zeros((GROUP,), tl.float32), tl.zeros((GROUP,), tl.float32)
    if M > 0:
        place = tl.arange(0, HALF)[None, :]
        inside = place < M
        da = tl.load(from_q + place, mask=is_q & inside, other=0.0).to(tl.float32)
        da += tl.load(from_k + place, mask=is_k & inside, other=0.0).to(tl.float32)
        da += tl.load(from_v + place, mask=is_v & inside, other=0.0).to(tl.float32)
        db = tl.load(from_q + M + place, mask=is_q & inside, other=0.0).to(tl.float32)
        db += tl.load(from_k + M + place, mask=is_k & inside, other=0.0).to(tl.float32)
        db += tl.load(from_v + M + place, mask=is_v & inside, other=0.0).to(tl.float32)
        cosine = tl.load(cos + row * M + place, mask=inside, other=0.0).to(tl.float32)
        sine = tl.load(sin + row * M + place, mask=inside, other=0.0).to(tl.float32)
        cosine, sine = tl.where(is_v, 1.0, cosine), tl.where(is_v, 0.0, sine)
        da, db = da * cosine + db * sine, db * cosine - da * sine  # the gradient of a rotation is the inverse rotation
    if REST > 0:
        behind = 2 * M + tl.arange(0, REST)[None, :]
        left = behind < SIZE
        dc = tl.load(from_q + behind, mask=is_q & left, other=0.0).to(tl.float32)
        dc += tl.load(from_k + behind, mask=is_k & left, other=0.0).to(tl.float32)
        dc += tl.load(from_v + behind, mask=is_v & left, other=0.0).to(tl.float32)
    if NORMED:
        normed = head < HEADS
        if M > 0:
            a = tl.load(at + place, mask=normed & inside, other=0.0).to(tl.float32)
            b = tl.load(at + M + place, mask=normed & inside, other=0.0).to(tl.float32)
            for_a = tl.where(is_q, tl.load(q_weight + place, mask=inside), tl.load(k_weight + place, mask=inside))
            for_b = tl.where(
                is_q, tl.load(q_weight + M + place, mask=inside), tl.load(k_weight + M + place, mask=inside)
            )
            da = tl.where(is_v, da, da * (for_a.to(tl.float32) + offset))
            db = tl.where(is_v, db, db * (for_b.to(tl.float32) + offset))
            squares += tl.sum(a * a, 1) + tl.sum(b * b, 1)
            along += tl.sum(a * da, 1) + tl.sum(b * db, 1)
        if REST > 0:
            c = tl.load(at + behind, mask=normed & left, other=0.0).to(tl.float32)
            for_c = tl.where(is_q, tl.load(q_weight + behind, mask=left), tl.load(k_weight + behind, mask=left))
            dc = tl.where(is_v, dc, dc * (for_c.to(tl.float32) + offset))
            squares += tl.sum(c * c, 1)
            along += tl.sum(c * dc, 1)
        rstd = tl.rsqrt(squares / SIZE + eps)
        share = (along * rstd * rstd / SIZE)[:, None]
        factor = tl.where(is_v, 1.0, rstd[:, None])
        if M > 0:
            da, db = factor * (da - a * share), factor * (db - b * share)
        if REST > 0:
            dc = factor * (dc - c * share)
    if M > 0:
        tl.store(to + place, da.to(kind), mask=(head < all_heads) & inside)
        tl.store(to + M + place, db.to(kind), mask=(head < all_heads) & inside)
    if REST > 0:
        tl.store(to + behind, dc.to(kind), mask=(head < all_heads) & left)


def _shape(heads: Heads, m: int, many: int) -> dict[str, Any]:
    size, query, key_value = heads.size, heads.query, heads.key_value
    half, rest = next_power_of_2(m) if m else 0, next_power_of_2(size - 2 * m) if size > 2 * m else 0
    group = max(1, min(next_power_of_2(many), TILE // max(2 * half + rest, 1)))
    return {
        "QUERY": query, "HEADS": query + key_value, "SIZE": size, "M": m, "NORMED": norms_by_head(heads),
        "GROUP": group, "HALF": half, "REST": rest, "num_warps": warps_for(group * max(half, rest)),
    }  # fmt: skip


def norms_by_head(heads: Heads) -> bool:
    """Return whether q and k are normalized per head. OLMo normalizes over all heads of a row instead."""
    return heads.q_norm is not None and heads.q_norm.weight.shape[-1] == heads.size


def rotate_qk(qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q (T, query, size) and k (T, key_value, size), normalized and rotated: views of one tensor."""
    x, many = rows_of(qkv), heads.query + heads.key_value
    out = x.new_empty(len(x), many, heads.size)
    q, k = torch.split(out, [heads.query, heads.key_value], 1)
    if heads.q_norm is not None and heads.k_norm is not None and not norms_by_head(heads):
        for values, to, norm in zip(heads.views(x), (q, k), (heads.q_norm, heads.k_norm), strict=False):
            rms_norm(as_norm_input(values, norm), norm.weight, norm.eps, norm.offset, to.flatten(1))
        x = out.view(len(x), -1)
    shape, (weights, scalars) = _shape(heads, cos.shape[1], many), _norms_of(heads, x)
    grid = len(x), -(-many // shape["GROUP"])
    launch(_rope, grid, x, x, cos, sin, *weights, out, x.stride(0), *scalars, **shape)
    return q, k


def rotate_qk_backward(
    grads: tuple[Tensor, Tensor, Tensor], qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor
) -> Tensor:
    """Return the gradient of qkv. grads: of the q and k that `rotate_qk` returned, and of v, (T, heads, size) each."""
    x, many = rows_of(qkv), heads.query + 2 * heads.key_value
    dq, dk, dv = (grad if grad.stride(2) == 1 else grad.contiguous() for grad in grads)
    out, strides = x.new_empty(len(x), many * heads.size), [n for grad in (dq, dk, dv) for n in grad.stride()[:2]]
    shape, (weights, scalars) = _shape(heads, cos.shape[1], many), _norms_of(heads, x)
    grid = len(x), -(-many // shape["GROUP"])
    launch(
        _rope_backward, grid, x, dq, dk, dv, x, cos, sin, *weights, out, *strides, x.stride(0), *scalars, **shape
    )  # fmt: skip
    if heads.q_norm is not None and heads.k_norm is not None and not norms_by_head(heads):
        for to, values, norm in zip(heads.views(out), heads.views(x), (heads.q_norm, heads.k_norm), strict=False):
            to = to.flatten(1)
            rms_norm_backward(to, as_norm_input(values, norm), norm.weight, norm.eps, norm.offset, to)
    return out


def _norms_of(heads: Heads, like: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
    """Return ((q weight, k weight), (eps, offset)) of per-head norms; placeholders if there are none."""
    if heads.q_norm is None or heads.k_norm is None or not norms_by_head(heads):
        return (like, like), (0.0, 0.0)
    assert (heads.q_norm.eps, heads.q_norm.offset) == (heads.k_norm.eps, heads.k_norm.offset)
    return (heads.q_norm.weight, heads.k_norm.weight), (heads.q_norm.eps, heads.q_norm.offset)


@kernel()
def _separate_rope(
    x: tensor, out: tensor, cos: tensor, sin: tensor, factors: tensor, QUERY: constexpr, HEADS: constexpr,
    ALL: constexpr, SIZE: constexpr, M: constexpr, INTERLEAVED: constexpr, SCALED: constexpr, BACKWARD: constexpr,
    GROUP: constexpr, HALF: constexpr, REST: constexpr,
) -> None:  # fmt: skip
    """Rotate GROUP heads of a row. HALF >= M and REST >= SIZE - 2 M are powers of two; REST may be 0."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[:, None]
    at = row * (ALL * SIZE) + head * SIZE
    kind = out.dtype.element_ty
    factor = tl.full((GROUP, 1), 1.0, tl.float32)
    if SCALED:
        factor = tl.where(head < QUERY, tl.load(factors + row).to(tl.float32), factor)
    if M > 0:
        place, pair = tl.arange(0, HALF)[None, :], tl.arange(0, 2 * HALF)[None, :]
        active, both = (head < HEADS) & (place < M), (head < HEADS) & (pair < 2 * M)
        if INTERLEAVED and not BACKWARD:
            two = tl.load(x + at + pair, mask=both, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(two, (GROUP, HALF, 2)))
        else:
            a = tl.load(x + at + place, mask=active, other=0.0).to(tl.float32)
            b = tl.load(x + at + M + place, mask=active, other=0.0).to(tl.float32)
        cosine = tl.load(cos + row * M + place, mask=place < M, other=0.0).to(tl.float32)
        sine = tl.load(sin + row * M + place, mask=place < M, other=0.0).to(tl.float32)
        if BACKWARD:
            sine = -sine
        first, second = (a * cosine - b * sine) * factor, (b * cosine + a * sine) * factor
        if INTERLEAVED and BACKWARD:
            tl.store(out + at + pair, tl.interleave(first, second).to(kind), mask=both)
        else:
            tl.store(out + at + place, first.to(kind), mask=active)
            tl.store(out + at + M + place, second.to(kind), mask=active)
    if REST > 0 and SCALED:
        behind = 2 * M + tl.arange(0, REST)[None, :]
        left = (head < HEADS) & (behind < SIZE)
        rest = tl.load(x + at + behind, mask=left, other=0.0).to(tl.float32) * factor
        tl.store(out + at + behind, rest.to(kind), mask=left)


def apply_rope(
    backward: bool, x: Tensor, heads: Heads, cos: Tensor, sin: Tensor, interleaved: bool, scale: Tensor | None
) -> Tensor:
    """Return qkv with q and k rotated; backward: x is the gradient of the result, and that of qkv is returned."""
    x = x.contiguous()
    out, size, m, many = x.clone(), heads.size, cos.shape[1], heads.query + heads.key_value
    half, rest = next_power_of_2(m) if m else 0, next_power_of_2(size - 2 * m) if size > 2 * m else 0
    group = max(1, min(next_power_of_2(many), TILE // max(2 * half, rest, 1)))
    factors = cos if scale is None else scale.contiguous()
    launch(
        _separate_rope, (len(x), -(-many // group)), x, x, out, cos, sin, factors, QUERY=heads.query, HEADS=many,
        ALL=many + heads.key_value, SIZE=size, M=m, INTERLEAVED=interleaved, SCALED=scale is not None,
        BACKWARD=backward, GROUP=group, HALF=half, REST=rest, num_warps=warps_for(group * max(half, rest)),
    )  # fmt: skip
    return out


class ApplyRope(Function):
    """Apply the rotary embedding to a copy of qkv, as train.attention.ApplyRope does."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, interleaved: bool, scale: Tensor | None
    ) -> Tensor:
        ctx.arguments = heads, cos, sin, interleaved, scale
        return apply_rope(False, qkv, *ctx.arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return apply_rope(True, grad, *ctx.arguments), None, None, None, None, None
