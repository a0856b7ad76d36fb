"""What a step's arithmetic is made of: the element-wise operations and LoRA's products as protocols, which a processor
fills in, and memory for what passes by."""

from __future__ import annotations

from typing import Any, Protocol, cast

from torch import Tensor
from torch.autograd import Function

from strop.engine.train.buffers import Allocate, Arena, heap_empty
from strop.engine.train.lora import Adapters, Addend
from strop.engine.train.packing import Places

About = tuple[float, float, float, float]  # of an activation (layers.about)


class Ops(Protocol):
    """The element-wise operations; meanings in eager.py."""

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


class Loops(Protocol):
    """Element-wise operations that are loops on a CPU alone, and elsewhere PyTorch's own; meanings in cpu/rows.py."""

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor | None = None
    ) -> Tensor: ...
    def layer_norm_backward(self, grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
    def activated(self, x: Tensor, kind: str, about: About, out: Tensor | None = None) -> Tensor: ...
    def activated_backward(self, grad: Tensor, x: Tensor, kind: str, about: About) -> tuple[Tensor, Tensor]: ...


class LoraProducts(Protocol):
    """The products with A and B; meanings in lora.py."""

    def forward(
        self, z: Tensor, outputs: int, adapters: Adapters, new: Allocate = heap_empty
    ) -> tuple[Addend, tuple[Tensor, ...]]: ...
    def backward(self, grad: Tensor, kept: tuple[Tensor, ...], adapters: Adapters) -> tuple[Addend, Tensor]: ...
    def gradients(
        self, grad: Tensor, z: Tensor, grad_za: Tensor, kept: tuple[Tensor, ...], adapters: Adapters
    ) -> list[Tensor]: ...


class FrozenProduct(Protocol):
    """x W^T and what is added to it; meaning in lora.frozen_matmul."""

    def __call__(
        self, x: Tensor, weight: Tensor, along: bool, y: Tensor, added: Addend | None = None,
        bias: Tensor | None = None, residual: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip


class ReusedBuffer:
    """Memory for one tensor after the other: each holds until the next is asked for, by anyone.

    What a layer needs for a moment would leave a hole between what it keeps, and holes are not filled: a fifth of the
    step's memory (docs/log).
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def __call__(self, rows: int, width: int, like: Tensor) -> Tensor:
        """(rows, width), of the type and on the device of `like`."""
        if self._buffer is None or self._buffer.numel() < rows * width:
            self._buffer = like.new_empty(rows * width)
        return self._buffer[: rows * width].view(rows, width)


class Placed(Function):
    """x (T, n), in an arena: what waits long leaves no hole in the heap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, arena: Arena) -> Tensor:
        ctx.arena, ctx.round = arena, arena.round
        return arena(len(x), x.shape[1], x).copy_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.arena.check(ctx.round)
        return grad, None


def apply(function: type[Function], *arguments: Any) -> Tensor:
    """function.apply, which PyTorch leaves untyped."""
    result: Tensor = cast(Any, function).apply(*arguments)
    return result
