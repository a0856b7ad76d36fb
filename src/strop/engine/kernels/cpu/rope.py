"""attention.Turned as compiled loops: the rotary embedding in a copy of q, k and v, read and written once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.autograd import Function

from strop.engine.kernels.cpu.compiled import array, inline, loop, narrow, wide
from strop.engine.train.attention import Heads


@inline
def _turn(x: Any, cos: Any, sin: Any, neighbours: Any, factor: Any, out: Any) -> None:
    """One head: the pairs that turn stand as halves in `out`."""
    m = len(cos)
    if neighbours:
        for j in range(m):
            a, b = wide(x[2 * j]) * factor, wide(x[2 * j + 1]) * factor
            out[j] = narrow(a * cos[j] - b * sin[j], out)
            out[m + j] = narrow(b * cos[j] + a * sin[j], out)
    else:
        for j in range(m):
            a, b = wide(x[j]) * factor, wide(x[m + j]) * factor
            out[j] = narrow(a * cos[j] - b * sin[j], out)
            out[m + j] = narrow(b * cos[j] + a * sin[j], out)
    for j in range(2 * m, len(x)):
        out[j] = narrow(wide(x[j]) * factor, out)


@inline
def _turn_back(x: Any, cos: Any, sin: Any, neighbours: Any, factor: Any, out: Any) -> None:
    """The transpose of _turn."""
    m = len(cos)
    if neighbours:
        for j in range(m):
            a, b = wide(x[j]) * factor, wide(x[m + j]) * factor
            out[2 * j] = narrow(a * cos[j] + b * sin[j], out)
            out[2 * j + 1] = narrow(b * cos[j] - a * sin[j], out)
    else:
        for j in range(m):
            a, b = wide(x[j]) * factor, wide(x[m + j]) * factor
            out[j] = narrow(a * cos[j] + b * sin[j], out)
            out[m + j] = narrow(b * cos[j] - a * sin[j], out)
    for j in range(2 * m, len(x)):
        out[j] = narrow(wide(x[j]) * factor, out)


@loop
def _rows_turned(
    x: Any, query: Any, key_value: Any, d: Any, cos: Any, sin: Any, neighbours: Any, factors: Any, back: Any, out: Any
) -> None:
    """factors: (T,) or (0,)."""
    one, turned = np.float32(1.0), (query + key_value) * d
    for i in prange(len(x)):
        source, to, c, s = x[i], out[i], cos[i], sin[i]
        for head in range(query + key_value):
            begin, end = head * d, (head + 1) * d
            factor = factors[i] if head < query and len(factors) else one
            if back:
                _turn_back(source[begin:end], c, s, neighbours, factor, to[begin:end])
            else:
                _turn(source[begin:end], c, s, neighbours, factor, to[begin:end])
        for j in range(turned, len(source)):
            to[j] = source[j]


class ApplyRope(Function):
    """As attention.Turned."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, neighbours: bool, scale: Tensor | None
    ) -> Tensor:
        ctx.about = heads, cos, sin, neighbours, scale
        return _turned(qkv, *ctx.about, back=False, out=heads.new(len(qkv), qkv.shape[1], qkv))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _turned(grad, *ctx.about, back=True, out=torch.empty_like(grad)), None, None, None, None, None


def _turned(
    x: Tensor, heads: Heads, cos: Tensor, sin: Tensor, neighbours: bool, scale: Tensor | None, *, back: bool,
    out: Tensor,
) -> Tensor:  # fmt: skip
    factors = torch.empty(0) if scale is None else scale.float()
    shape = heads.query, heads.key_value, heads.size
    angles = array(cos.float()), array(sin.float()), neighbours, array(factors)
    _rows_turned(array(x.contiguous()), *shape, *angles, back, array(out))
    return out
