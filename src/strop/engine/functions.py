"""Autograd functions with hand-derived gradients: frozen linear layers with LoRA, and RMSNorm.

They save the least that their backward needs, give no gradient to frozen weights, and leave the element-wise work
to `Ops` (eager.py on any device, kernels.py on a CPU with numba).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from strop.engine.packed import Places


class Ops(Protocol):
    """The element-wise operations; meanings in eager.py."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor: ...
    def rms_norm_backward(self, grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor: ...
    def glu(self, gate_up: Tensor, activation: str) -> Tensor: ...
    def glu_backward(self, grad: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]: ...
    def softmax_(self, scores: Tensor, group: int, first: int, window: int) -> Tensor: ...
    def softmax_backward_(self, grad: Tensor, probs: Tensor, group: int, first: int, window: int) -> Tensor: ...
    def cross_entropy_(
        self, logits: Tensor, labels: Tensor, weights: Tensor, softcap: float, gradient: bool
    ) -> Tensor: ...
    def to_heads(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float, places: Places, group: int
    ) -> Tensor: ...
    def from_heads(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float, places: Places, group: int, out: Tensor
    ) -> None: ...


@dataclass(frozen=True)
class Norm:
    """RMSNorm in front of a linear layer, computed again in the backward instead of saved."""

    ops: Ops
    weight: Tensor
    eps: float
    offset: float  # 1 where the weight is stored as its difference from 1 (Gemma), else 0

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps, self.offset)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        return self.ops.rms_norm_backward(grad, x, self.weight, self.eps, self.offset)


@dataclass(frozen=True)
class Glu:
    """activation(gate) * up in front of the down projection, computed again in the backward instead of saved."""

    ops: Ops
    activation: str

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.glu(x, self.activation)


@dataclass(frozen=True)
class Frozen:
    """Frozen linear layers that share their input, as one. bias (n,) or None.

    weight: gives the weight (n, k), which holds until the next weight is asked for (it may be dequantized into a
    buffer that all layers share).
    """

    weight: Callable[[], Tensor]
    bias: Tensor | None
    columns: tuple[slice, ...]  # for each adapter: the outputs it adds to
    scales: tuple[float, ...]


def apply(function: type[Function], *arguments: Any) -> Tensor:
    """function.apply, which PyTorch leaves untyped."""
    result: Tensor = cast(Any, function).apply(*arguments)
    return result


class RmsNorm(Function):
    """Norm.forward with its gradient; saves x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x)
        return norm.forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.norm.backward(grad.contiguous(), *ctx.saved_tensors), None


class LoraLinear(Function):
    """y = z W^T + bias, and y[:, columns_i] += scale_i (z A_i^T) B_i^T for each adapter; z = x, norm(x) or glu(x).

    x (T, k), or (T, 2 k) for glu; adapters: A_1 (r_1, k), B_1 (n_1, r_1), A_2, ... The A stand in one matrix and the B
    in another, zeros around them: two narrow products, not two an adapter. Saves x and scale z A^T (T, sum of r).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: Frozen, enter: Norm | Glu | None, *adapters: Tensor) -> Tensor:
        z = x if enter is None else enter.forward(x)
        y = F.linear(z, frozen.weight(), frozen.bias)
        ctx.frozen, ctx.enter, ctx.ranks = frozen, enter, [b.shape[1] for b in adapters[1::2]]
        if not adapters:
            ctx.save_for_backward(*([] if enter is None else [x]))
            return y
        # Scaled before they are rounded: what is computed in bf16 would be rounded once more.
        a = torch.cat([(part * scale).to(z.dtype) for part, scale in zip(adapters[::2], frozen.scales, strict=True)])
        b = _beside(adapters[1::2], frozen.columns, y)
        za = z @ a.t()
        y.addmm_(za, b.t())
        ctx.save_for_backward(x, za, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        frozen, enter = ctx.frozen, ctx.enter
        # Without adapters and with nothing to enter, nothing was saved: the input is not needed.
        x, *saved = ctx.saved_tensors or (grad,)
        grad = grad.contiguous()
        grad_z = grad @ frozen.weight() if ctx.needs_input_grad[0] else None
        if saved:
            za, a, b = saved
            grad_za = grad @ b
            if grad_z is not None:
                grad_z.addmm_(grad_za, a)
        z, grad_x = x, grad_z
        if isinstance(enter, Glu) and grad_z is not None:
            grad_x, z = enter.ops.glu_backward(grad_z, x, enter.activation)
        elif enter is not None:
            z = enter.forward(x)
            grad_x = enter.backward(grad_z, x) if isinstance(enter, Norm) and grad_z is not None else None
        if not saved:
            return grad_x, None, None
        grads: list[Tensor] = []
        grad_as = torch.split(grad_za.t() @ z, ctx.ranks)
        parts = zip(frozen.columns, frozen.scales, torch.split(za, ctx.ranks, 1), grad_as, strict=True)
        for columns, scale, part, grad_a in parts:
            grads += [grad_a * scale, (part.t() @ grad[:, columns]).t()]
        # The adapters are fp32 and autograd casts a gradient to the type of its input.
        return grad_x, None, None, *grads


def _beside(parts: Sequence[Tensor], columns: Sequence[slice], like: Tensor) -> Tensor:
    """(n, sum of r), in the type of `like` (T, n): each B in the rows of its outputs and in columns of its own."""
    whole, at = like.new_zeros(like.shape[1], sum(part.shape[1] for part in parts)), 0
    for rows, part in zip(columns, parts, strict=True):
        whole[rows, at : at + part.shape[1]].copy_(part)
        at += part.shape[1]
    return whole
