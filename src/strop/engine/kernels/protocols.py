"""Interfaces of the kernels that the fast step (engine.train.fast) uses on a device, and shared memory helpers."""

from __future__ import annotations

from typing import Any, Protocol, cast

from torch import Tensor
from torch.autograd import Function

from strop.engine.train.buffers import Allocate, Arena, allocate_from_heap
from strop.engine.train.lora import Adapters, Addend
from strop.engine.train.packing import Slots

ActivationParameters = tuple[float, float, float, float]  # xIELU's slopes above and below 0, beta and eps


class Ops(Protocol):
    """Element-wise operations. eager.py is the reference implementation."""

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
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float, slots: Slots, group: int
    ) -> Tensor: ...
    def from_heads(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float, slots: Slots, group: int, out: Tensor
    ) -> None: ...


class CpuOps(Protocol):
    """Element-wise operations that have a kernel on CPUs only. Other devices use PyTorch."""

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor | None = None
    ) -> Tensor: ...
    def layer_norm_backward(self, grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
    def activate(self, x: Tensor, kind: str, parameters: ActivationParameters, out: Tensor | None = None) -> Tensor: ...
    def activate_backward(
        self, grad: Tensor, x: Tensor, kind: str, parameters: ActivationParameters
    ) -> tuple[Tensor, Tensor]: ...


class LoraOps(Protocol):
    """The matrix multiplications of LoRA adapters. train/lora.py is the reference implementation."""

    def forward(
        self, z: Tensor, outputs: int, adapters: Adapters, new: Allocate = allocate_from_heap
    ) -> tuple[Addend, tuple[Tensor, ...]]: ...
    def backward(self, grad: Tensor, saved: tuple[Tensor, ...], adapters: Adapters) -> tuple[Addend, Tensor]: ...
    def gradients(
        self, grad: Tensor, z: Tensor, grad_za: Tensor, saved: tuple[Tensor, ...], adapters: Adapters
    ) -> list[Tensor]: ...


class FrozenMatmul(Protocol):
    """A matrix multiplication by a frozen weight. train.lora.frozen_matmul is the reference implementation."""

    def __call__(
        self, x: Tensor, weight: Tensor, transposed: bool, y: Tensor, added: Addend | None = None,
        bias: Tensor | None = None, residual: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip


class ReusedBuffer:
    """A buffer for one temporary tensor at a time, which is valid until the next call by any caller.

    If temporary tensors were allocated between tensors that are kept, they would leave holes in the heap that are not
    reused, a fifth of the memory of a training step (docs/log).
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def __call__(self, rows: int, width: int, like: Tensor) -> Tensor:
        """Return an uninitialized tensor (rows, width) with the dtype and device of `like`."""
        if self._buffer is None or self._buffer.numel() < rows * width:
            self._buffer = like.new_empty(rows * width)
        return self._buffer[: rows * width].view(rows, width)


class CopyToArena(Function):
    """Copy x (T, n) to an arena, so that a long-lived tensor does not fragment the heap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, arena: Arena) -> Tensor:
        ctx.arena, ctx.generation = arena, arena.generation
        return arena(len(x), x.shape[1], x).copy_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.arena.check_generation(ctx.generation)
        return grad, None


def apply(function: type[Function], *arguments: Any) -> Tensor:
    """Call function.apply, which PyTorch leaves untyped."""
    result: Tensor = cast(Any, function).apply(*arguments)
    return result
