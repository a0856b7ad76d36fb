"""The rotary embedding by itself on a card (attention.ApplyRope): in front of the norms of q and k, with neighbours in
pairs, or with a factor of its own for each row's q. One kernel each way, beside a copy of what is not turned."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from triton.language import constexpr, tensor

from strop.engine.kernels.cuda.launch import kernel, power, start, warps
from strop.engine.train.attention import Heads

TILE = 2048  # numbers of a row's heads a program


@kernel()
def _turn_aside(
    x: tensor, out: tensor, cos: tensor, sin: tensor, factors: tensor, QUERY: constexpr, HEADS: constexpr,
    ALL: constexpr, SIZE: constexpr, M: constexpr, NEIGHBOURS: constexpr, SCALED: constexpr, BACK: constexpr,
    GROUP: constexpr, HALF: constexpr, REST: constexpr,
) -> None:  # fmt: skip
    """GROUP of a row's heads of q and k; HALF is a power of two from M on, REST one from SIZE - 2 M on, or 0."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[:, None]
    at = row * (ALL * SIZE) + head * SIZE
    kind = out.dtype.element_ty
    factor = tl.full((GROUP, 1), 1.0, tl.float32)
    if SCALED:
        factor = tl.where(head < QUERY, tl.load(factors + row).to(tl.float32), factor)
    if M > 0:
        place, pair = tl.arange(0, HALF)[None, :], tl.arange(0, 2 * HALF)[None, :]
        there, both = (head < HEADS) & (place < M), (head < HEADS) & (pair < 2 * M)
        if NEIGHBOURS and not BACK:
            two = tl.load(x + at + pair, mask=both, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(two, (GROUP, HALF, 2)))
        else:
            a = tl.load(x + at + place, mask=there, other=0.0).to(tl.float32)
            b = tl.load(x + at + M + place, mask=there, other=0.0).to(tl.float32)
        cosine = tl.load(cos + row * M + place, mask=place < M, other=0.0).to(tl.float32)
        sine = tl.load(sin + row * M + place, mask=place < M, other=0.0).to(tl.float32)
        if BACK:
            sine = -sine
        first, second = (a * cosine - b * sine) * factor, (b * cosine + a * sine) * factor
        if NEIGHBOURS and BACK:
            tl.store(out + at + pair, tl.interleave(first, second).to(kind), mask=both)
        else:
            tl.store(out + at + place, first.to(kind), mask=there)
            tl.store(out + at + M + place, second.to(kind), mask=there)
    if REST > 0 and SCALED:
        behind = 2 * M + tl.arange(0, REST)[None, :]
        left = (head < HEADS) & (behind < SIZE)
        rest = tl.load(x + at + behind, mask=left, other=0.0).to(tl.float32) * factor
        tl.store(out + at + behind, rest.to(kind), mask=left)


def turned(
    back: bool, x: Tensor, heads: Heads, cos: Tensor, sin: Tensor, neighbours: bool, scale: Tensor | None
) -> Tensor:
    """x (T, all), or back, the gradient of it from that of what this gives."""
    x = x.contiguous()
    out, size, m, many = x.clone(), heads.size, cos.shape[1], heads.query + heads.key_value
    half, rest = power(m) if m else 0, power(size - 2 * m) if size > 2 * m else 0
    group = max(1, min(power(many), TILE // max(2 * half, rest, 1)))
    factors = cos if scale is None else scale.contiguous()
    start(
        _turn_aside, (len(x), -(-many // group)), x, x, out, cos, sin, factors, QUERY=heads.query, HEADS=many,
        ALL=many + heads.key_value, SIZE=size, M=m, NEIGHBOURS=neighbours, SCALED=scale is not None, BACK=back,
        GROUP=group, HALF=half, REST=rest, num_warps=warps(group * max(half, rest)),
    )  # fmt: skip
    return out


class ApplyRope(Function):
    """As attention.Turned."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, neighbours: bool, scale: Tensor | None
    ) -> Tensor:
        ctx.about = heads, cos, sin, neighbours, scale
        return turned(False, qkv, *ctx.about)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return turned(True, grad, *ctx.about), None, None, None, None, None
