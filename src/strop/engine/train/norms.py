"""RMSNorm and LayerNorm with hand-derived gradients, in front of a linear layer or by themselves, frozen or trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from strop.engine.kernels.protocols import CpuOps, Ops, Scratch, apply


@dataclass(frozen=True)
class Norm:
    """RMSNorm in front of a linear layer, computed again in the backward instead of saved."""

    ops: Ops
    weight: Tensor
    eps: float
    offset: float  # 1 where the weight is stored as its difference from 1 (Gemma), else 0
    bias: Tensor | None = None
    current: Callable[[], tuple[Tensor, Tensor | None]] | None = None  # where any is trained: weight and bias, as now
    of_weight: bool = False  # which of the two are trained
    of_bias: bool = False
    trained: tuple[Tensor, ...] = ()  # they themselves

    def now(self) -> Norm:
        """With the weights that are active now, where they are not always the same."""
        if self.current is None:
            return self
        weight, bias = self.current()
        flags = weight.requires_grad, bias is not None and bias.requires_grad
        trained = tuple(one for one, flag in zip((weight, bias), flags, strict=True) if flag and one is not None)
        low = None if bias is None else bias.detach()
        return replace(self, weight=weight.detach(), bias=low, of_weight=flags[0], of_bias=flags[1], trained=trained)

    def gradients(self, grad: Tensor, x: Tensor) -> list[Tensor]:
        """Of `trained`: sums over the rows of grad times what is normed, and of grad."""
        n, wide, found = len(self.weight), torch.promote_types(x.dtype, torch.float32), []
        if self.of_weight:
            ones = torch.ones(n, dtype=wide, device=x.device)
            bare = replace(self, weight=ones.to(x.dtype), offset=0.0, bias=None).forward(x.contiguous())
            found.append(self.ops.scale_columns_backward(grad.reshape(-1, n).contiguous(), bare.view(-1, n), ones)[1])
        if self.of_bias:
            found.append(grad.reshape(-1, n).sum(0, dtype=wide))
        return found

    def forward(self, x: Tensor, room: Scratch | None = None) -> Tensor:
        out = None if room is None else room(len(x), x.shape[1], x)
        return self.ops.rms_norm(x, self.weight, self.eps, self.offset, out)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        return self.ops.rms_norm_backward(grad, x, self.weight, self.eps, self.offset)


@dataclass(frozen=True)
class LayerNorm(Norm):
    """LayerNorm in the same place; by loops where there are any."""

    loops: CpuOps | None = None

    def forward(self, x: Tensor, room: Scratch | None = None) -> Tensor:
        if self.loops is not None:
            out = None if room is None else room(len(x), x.shape[1], x)
            return self.loops.layer_norm(x, self.weight, self.bias, self.eps, out)
        kinds = [x.dtype, self.weight.dtype, *([] if self.bias is None else [self.bias.dtype])]
        wide = reduce(torch.promote_types, kinds)
        weight, bias = self.weight.to(wide), None if self.bias is None else self.bias.to(wide)
        return F.layer_norm(x.to(wide), weight.shape, weight, bias, self.eps).to(x.dtype)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        if self.loops is not None:
            return self.loops.layer_norm_backward(grad, x, self.weight, self.eps)
        shape, wanted = list(self.weight.shape), [True, False, False]
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        given, grad = x.to(wide).contiguous(), grad.to(wide).contiguous()
        _, mean, rstd = torch.native_layer_norm(given, shape, self.weight, None, self.eps)
        native = torch.ops.aten.native_layer_norm_backward
        found: Tensor = native(grad, given, shape, mean, rstd, self.weight, None, wanted)[0]
        return found.to(x.dtype)


class RmsNorm(Function):
    """Norm.forward with its gradient; saves x alone. trained: norm.trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm, *trained: Tensor) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x)
        return norm.forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,), grad = ctx.saved_tensors, grad.contiguous()
        of_x = ctx.norm.backward(grad, x) if ctx.needs_input_grad[0] else None
        return of_x, None, *ctx.norm.gradients(grad, x)


def normed(x: Tensor, norm: Norm | None) -> Tensor:
    """x behind the norm as it is now; None: x."""
    if norm is None:
        return x
    now = norm.now()
    return apply(RmsNorm, x, now, *now.trained)
