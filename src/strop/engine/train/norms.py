"""RMSNorm and LayerNorm with hand-derived gradients: as separate functions, or fused into the next linear layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from strop.engine.kernels.protocols import CpuOps, Ops, ReusedBuffer, apply


@dataclass(frozen=True)
class Norm:
    """RMSNorm. The backward recomputes the output instead of saving it."""

    ops: Ops
    weight: Tensor
    eps: float
    offset: float  # 1 if the weight is stored as its difference from 1 (Gemma), else 0
    bias: Tensor | None = None
    # returns the weight and bias in use; None if the norm is frozen
    trained_weights: Callable[[], tuple[Tensor, Tensor | None]] | None = None
    weight_trained: bool = False
    bias_trained: bool = False
    trained: tuple[Tensor, ...] = ()  # the weight and the bias, as far as they are trained

    def with_current_weights(self) -> Norm:
        """Return the norm with the weights that are in use now. They change when adapters are disabled."""
        if self.trained_weights is None:
            return self
        weight, bias = self.trained_weights()
        trained = tuple(x for x in (weight, bias) if x is not None and x.requires_grad)
        return replace(
            self, weight=weight.detach(), bias=None if bias is None else bias.detach(), trained=trained,
            weight_trained=weight.requires_grad, bias_trained=bias is not None and bias.requires_grad,
        )  # fmt: skip

    def gradients(self, grad: Tensor, x: Tensor) -> list[Tensor]:
        """Return the gradients of `trained`: sums over rows of grad times normalized x, and of grad for the bias."""
        n, wide = len(self.weight), torch.promote_types(x.dtype, torch.float32)
        grads: list[Tensor] = []
        if self.weight_trained:
            ones = torch.ones(n, dtype=wide, device=x.device)
            normalized = replace(self, weight=ones.to(x.dtype), offset=0.0, bias=None).forward(x.contiguous())
            rows = grad.reshape(-1, n).contiguous()
            grads.append(self.ops.scale_columns_backward(rows, normalized.view(-1, n), ones)[1])
        if self.bias_trained:
            grads.append(grad.reshape(-1, n).sum(0, dtype=wide))
        return grads

    def forward(self, x: Tensor, buffer: ReusedBuffer | None = None) -> Tensor:
        out = None if buffer is None else buffer(len(x), x.shape[1], x)
        return self.ops.rms_norm(x, self.weight, self.eps, self.offset, out)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        return self.ops.rms_norm_backward(grad, x, self.weight, self.eps, self.offset)


@dataclass(frozen=True)
class LayerNorm(Norm):
    """LayerNorm. cpu_ops: the compiled kernels, on a CPU."""

    cpu_ops: CpuOps | None = None

    def forward(self, x: Tensor, buffer: ReusedBuffer | None = None) -> Tensor:
        if self.cpu_ops is not None:
            out = None if buffer is None else buffer(len(x), x.shape[1], x)
            return self.cpu_ops.layer_norm(x, self.weight, self.bias, self.eps, out)
        dtypes = [x.dtype, self.weight.dtype, *([] if self.bias is None else [self.bias.dtype])]
        wide = reduce(torch.promote_types, dtypes)
        weight, bias = self.weight.to(wide), None if self.bias is None else self.bias.to(wide)
        return F.layer_norm(x.to(wide), weight.shape, weight, bias, self.eps).to(x.dtype)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        if self.cpu_ops is not None:
            return self.cpu_ops.layer_norm_backward(grad, x, self.weight, self.eps)
        shape, mask = list(self.weight.shape), [True, False, False]
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        x_wide, grad = x.to(wide).contiguous(), grad.to(wide).contiguous()
        _, mean, rstd = torch.native_layer_norm(x_wide, shape, self.weight, None, self.eps)
        native = torch.ops.aten.native_layer_norm_backward
        grad_x: Tensor = native(grad, x_wide, shape, mean, rstd, self.weight, None, mask)[0]
        return grad_x.to(x.dtype)


class NormFunction(Function):
    """Compute norm.forward(x), with gradients of x and of norm.trained. Saves only x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm, *trained: Tensor) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x)
        return norm.forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,), grad = ctx.saved_tensors, grad.contiguous()
        grad_x = ctx.norm.backward(grad, x) if ctx.needs_input_grad[0] else None
        return grad_x, None, *ctx.norm.gradients(grad, x)


def normalize(x: Tensor, norm: Norm | None) -> Tensor:
    """Apply the norm with its current weights. Return x if norm is None."""
    if norm is None:
        return x
    norm = norm.with_current_weights()
    return apply(NormFunction, x, norm, *norm.trained)
