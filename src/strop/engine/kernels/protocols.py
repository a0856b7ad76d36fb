"""Interfaces of the kernels that a device provides to the fast step, and memory helpers that they share."""

from __future__ import annotations

from typing import Any, Protocol, cast

from torch import Tensor
from torch.autograd import Function

from strop.engine.train.buffers import Allocate, Arena, heap_empty
from strop.engine.train.lora import Adapters, Addend
from strop.engine.train.packing import Places

ActivationParameters = tuple[float, float, float, float]  # of xIELU: slopes above and below 0, beta, eps


class Ops(Protocol):
    """Element-wise operations; eager.py is their specification."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None = None) -> Tensor: ...
    def rms_norm_backward(self, grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor: ...
    def glu(self, gate_up: Tensor, activation: str, out: Tensor | None = None) -> Tensor: ...
    def glu_backward(self, grad: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]: ...
    def scale_columns_(self, x: Tensor, gains: Tensor) -> Tensor: ...
    def scale_columns_backward(self, grad: Tensor, y: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]: ...
    def softmax_(self, scores: Tensor, group: int, first: int, window: int, sinks: Tensor | None = None) -> Tensor: ...
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


class CpuOps(Protocol):
    """Element-wise operations with a CPU kernel (cpu/elementwise.py); other devices use PyTorch's."""

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor | None = None
    ) -> Tensor: ...
    def layer_norm_backward(self, grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
    def activated(self, x: Tensor, kind: str, about: ActivationParameters, out: Tensor | None = None) -> Tensor: ...
    def activated_backward(
        self, grad: Tensor, x: Tensor, kind: str, about: ActivationParameters
    ) -> tuple[Tensor, Tensor]: ...


class LoraOps(Protocol):
    """Matrix multiplications by A and B; train/lora.py is their specification."""

    def forward(
        self, z: Tensor, outputs: int, adapters: Adapters, new: Allocate = heap_empty
    ) -> tuple[Addend, tuple[Tensor, ...]]: ...
    def backward(self, grad: Tensor, saved: tuple[Tensor, ...], adapters: Adapters) -> tuple[Addend, Tensor]: ...
    def gradients(
        self, grad: Tensor, z: Tensor, grad_za: Tensor, saved: tuple[Tensor, ...], adapters: Adapters
    ) -> list[Tensor]: ...


class FrozenMatmul(Protocol):
    """x W^T for a frozen weight, plus what is added to it; train.lora.frozen_matmul is the specification."""

    def __call__(
        self, x: Tensor, weight: Tensor, along: bool, y: Tensor, added: Addend | None = None,
        bias: Tensor | None = None, residual: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip


class ReusedBuffer:
    """A buffer for one tensor at a time: a tensor is valid until the next call, by any caller.

    Allocating what a layer needs only briefly would leave holes between the tensors that it keeps. Holes are not
    reused: they were a fifth of the step's memory (docs/log).
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def __call__(self, rows: int, width: int, like: Tensor) -> Tensor:
        """Return an uninitialized tensor (rows, width) with the dtype and device of `like`."""
        if self._buffer is None or self._buffer.numel() < rows * width:
            self._buffer = like.new_empty(rows * width)
        return self._buffer[: rows * width].view(rows, width)


class CopyToArena(Function):
    """Copy x (T, n) to an arena: tensors that live long leave no holes in the heap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, arena: Arena) -> Tensor:
        ctx.arena, ctx.round = arena, arena.round
        return arena(len(x), x.shape[1], x).copy_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.arena.check(ctx.round)
        return grad, None


def apply(function: type[Function], *arguments: Any) -> Tensor:
    """Call function.apply, which PyTorch leaves untyped."""
    result: Tensor = cast(Any, function).apply(*arguments)
    return result
