"""Autograd functions with hand-derived gradients: frozen linear layers with LoRA, and RMSNorm.

They save the least that their backward needs, give no gradient to frozen weights, and leave the element-wise work
to `Ops` (eager.py on any device, cpu/kernels.py on a CPU with numba, card/kernels.py on a card with Triton) and LoRA's
own products to `LoraProducts` (lora.py anywhere, lora_tiles.py on a CPU with AVX512-BF16).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from strop.engine.arena import Arena, New, in_heap
from strop.engine.dora import Dora, Dropping
from strop.engine.dropout import Dropped, Drops
from strop.engine.lora import Adapters
from strop.engine.packed import Places

About = tuple[float, float, float, float]  # of an activation (layers.about)


class Ops(Protocol):
    """The element-wise operations; meanings in eager.py."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None = None) -> Tensor: ...
    def rms_norm_backward(self, grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor: ...
    def glu(self, gate_up: Tensor, activation: str, out: Tensor | None = None) -> Tensor: ...
    def glu_backward(self, grad: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]: ...
    def scale_columns_(self, x: Tensor, gains: Tensor) -> Tensor: ...
    def scale_columns_backward(self, grad: Tensor, y: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]: ...
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
        self, z: Tensor, outputs: int, adapters: Adapters, new: New = in_heap
    ) -> tuple[Tensor, tuple[Tensor, ...]]: ...
    def backward(
        self, grad: Tensor, further: bool, kept: tuple[Tensor, ...], adapters: Adapters
    ) -> tuple[Tensor, Tensor | None]: ...
    def gradients(
        self, grad: Tensor, z: Tensor, grad_za: Tensor, kept: tuple[Tensor, ...], adapters: Adapters
    ) -> list[Tensor]: ...


class Room:
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

    def forward(self, x: Tensor, room: Room | None = None) -> Tensor:
        out = None if room is None else room(len(x), x.shape[1], x)
        return self.ops.rms_norm(x, self.weight, self.eps, self.offset, out)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        return self.ops.rms_norm_backward(grad, x, self.weight, self.eps, self.offset)


@dataclass(frozen=True)
class LayerNorm(Norm):
    """LayerNorm in the same place; by loops where there are any."""

    loops: Loops | None = None

    def forward(self, x: Tensor, room: Room | None = None) -> Tensor:
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


@dataclass(frozen=True)
class Glu:
    """activation(gate) * up in front of the down projection, computed again in the backward instead of saved."""

    ops: Ops
    activation: str

    def forward(self, x: Tensor, room: Room | None = None) -> Tensor:
        out = None if room is None else room(len(x), x.shape[1] // 2, x)
        return self.ops.glu(x, self.activation, out)

    def backward(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(gradient with respect to x, the forward's output again)."""
        return self.ops.glu_backward(grad, x, self.activation)


@dataclass(frozen=True)
class Activation:
    """The model's own activation in front of the down projection, computed again in the backward, where autograd has
    its gradient: activation(gate) * up where it is gated, else activation(x)."""

    activation: Callable[[Tensor], Tensor]
    gated: bool

    def forward(self, x: Tensor, room: Room | None = None) -> Tensor:
        if not self.gated:
            return self.activation(x)
        gate, up = x.chunk(2, dim=-1)
        return self.activation(gate) * up

    def backward(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            z = self.forward(x)
        (grad_x,) = torch.autograd.grad(z, x, grad)
        return grad_x, z.detach()


@dataclass(frozen=True)
class LoopedActivation:
    """activation(x), which gates nothing, in the same place, by loops; kind and about: as in cpu/rows.py."""

    loops: Loops
    kind: str
    about: About

    def forward(self, x: Tensor, room: Room | None = None) -> Tensor:
        out = None if room is None else room(len(x), x.shape[1], x)
        return self.loops.activated(x, self.kind, self.about, out)

    def backward(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.loops.activated_backward(grad, x, self.kind, self.about)


InFront = Glu | Activation | LoopedActivation
Enter = Norm | InFront | None


@dataclass(frozen=True)
class Frozen:
    """Frozen linear layers that share their input, as one. bias (n,) or None.

    weight: gives the weight (n, k), which holds until the next weight is asked for (it may be dequantized into a
    buffer that all layers share). arena: where what is kept lies, on a CPU.
    """

    weight: Callable[[], Tensor]
    bias: Tensor | None
    lora: LoraProducts
    columns: tuple[tuple[int, int], ...]  # for each adapter: the outputs it adds to, from and to
    scales: tuple[float, ...]
    room: Room | None = None  # for z, on a CPU
    arena: Arena | None = None
    dropped: Dropped | None = None  # of z, in front of the adapters
    drops: Drops | None = None
    dora: Dora | None = None
    biased: tuple[tuple[int, int], ...] = ()  # the outputs whose bias is trained, from and to

    def spread(self, z: Tensor) -> Tensor:
        """What the adapters take: z, or what their dropout leaves of it, for each its own."""
        return z if self.dropped is None or self.drops is None else self.drops.spread(z, self.dropped)

    def fold(self, grad: Tensor) -> Tensor:
        """The gradient of z from that of `spread`."""
        return grad if self.dropped is None or self.drops is None else self.drops.fold(grad, self.dropped)

    @property
    def factors(self) -> int:
        """Of the adapters, with DoRA's magnitudes."""
        return (2 if self.dora is None else 3) * len(self.scales)

    def split(self, parts: Sequence[Tensor]) -> tuple[Adapters, Sequence[Tensor]]:
        """The adapters, and DoRA's magnitudes."""
        factors = 2 * len(self.scales)
        adapters = Adapters(parts[:factors], self.columns, self.scales, self.dropped is not None)
        return adapters, parts[factors : self.factors]

    def dropping(self, adapters: Adapters) -> Dropping | None:
        """Where DoRA's adapters drop of their input now."""
        return None if self.dora is None or self.dropped is None else Dropping(adapters, self.dropped)

    def of_biases(self, grad: Tensor) -> list[Tensor]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        return [grad[:, start:end].sum(0, dtype=wide) for start, end in self.biased]


def apply(function: type[Function], *arguments: Any) -> Tensor:
    """function.apply, which PyTorch leaves untyped."""
    result: Tensor = cast(Any, function).apply(*arguments)
    return result


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


def normed(x: Tensor, norm: Norm) -> Tensor:
    """x behind the norm as it is now."""
    now = norm.now()
    return apply(RmsNorm, x, now, *now.trained)


class LoraLinear(Function):
    """y = z W^T + bias, and y[:, columns_i] += scale_i (z_i A_i^T) B_i^T for each adapter; z = x, norm(x) or glu(x),
    and z_i = z, or what dropout leaves of it for this adapter (`scales` make up for what is dropped).

    x (T, k), or (T, 2 k) for glu; residual (T, n) or None: what y is added to; parts: A_1 (r_1, k), B_1 (n_1, r_1),
    A_2, ..., for DoRA then m_1 (n_1,), m_2, ..., the biases that are trained, and `trained` of a norm in front. Saves
    x and scale z A^T (T, sum of r); for DoRA also y, which what stands behind saves as well where there is no residual, but not with dropout
    (dora.py has what y is then).

    The frozen product is added to the adapters', and the sum is rounded once. The other way round, what an adapter adds
    to a number that is in bf16 already rounds away below half of its last bit, and a young adapter adds no more.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen: Frozen, enter: Enter, residual: Tensor | None, *parts: Tensor
    ) -> Tensor:  # fmt: skip
        z = x if enter is None else enter.forward(x, frozen.room)
        ctx.frozen, ctx.enter, weight = frozen, enter, frozen.weight()
        new: New = frozen.arena or in_heap
        ctx.round = frozen.arena.round if frozen.arena else 0
        if frozen.scales:
            adapters, magnitudes = frozen.split(parts)
            entered, dora, dropping = frozen.spread(z), frozen.dora, frozen.dropping(adapters)
            y, kept = frozen.lora.forward(entered, len(weight), adapters, new)
            if dora is not None and dropping is not None:
                gains = dora.gains(weight, dropping.undropped, magnitudes)
                dora.changed_(y, entered, weight, gains, dropping)
            y.addmm_(z, weight.t())
            if dora is not None and dropping is None:
                gains = dora.gains(weight, adapters, magnitudes)
                dora.ops.scale_columns_(y, gains)
            if frozen.bias is not None:
                y += frozen.bias
            if dora is not None and dropping is None:
                kept = (gains, y, *kept)
                y = y if residual is None else y + residual
                residual = None
            elif dora is not None:
                kept = (gains, *kept)
            ctx.save_for_backward(x, *parts[: frozen.factors], *kept)
        else:
            ctx.save_for_backward(*([] if enter is None else [x]))
            y = new(len(z), len(weight), z)
            if frozen.bias is None:
                torch.mm(z, weight.t(), out=y)
            else:
                torch.addmm(frozen.bias, z, weight.t(), out=y)
        if residual is not None:
            y += residual
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        frozen, enter = ctx.frozen, ctx.enter
        if frozen.arena:
            frozen.arena.check(ctx.round)
        # Without adapters and with nothing to enter, nothing was saved: the input is not needed.
        x, *saved = ctx.saved_tensors or (grad,)
        whole = isinstance(enter, Norm) and bool(enter.trained)
        grad, grad_z, wanted = grad.contiguous(), None, ctx.needs_input_grad[0] or whole
        residual = grad if ctx.needs_input_grad[3] else None
        of_biases = frozen.of_biases(grad)
        weight, entered, through = None, None, grad  # what the adapters take, and the gradient of what they give
        grads_m: list[Tensor] = []
        if saved:
            parts = frozen.factors
            (adapters, magnitudes), kept = frozen.split(saved[:parts]), tuple(saved[parts:])
            dora, dropping = frozen.dora, frozen.dropping(adapters)
            if dora is not None and dropping is not None:
                gains, *kept = kept
                z = x if enter is None else enter.forward(x, frozen.room)
                weight, entered = frozen.weight(), frozen.spread(z)
                along = dora.along(grad, gains, entered, weight, dropping)
                through = dora.ops.scale_columns_(grad.clone(), gains)
            elif dora is not None:
                (gains, y), kept = kept[:2], kept[2:]
                y = y if frozen.bias is None else y - frozen.bias
                grad, along = dora.ops.scale_columns_backward(grad, y, gains)
                through = grad
            for (start, end), m in zip(frozen.columns, magnitudes, strict=False):
                grads_m.append((along[start:end] / m).to(m.dtype))
            grad_za, grad_z = frozen.lora.backward(through, wanted, tuple(kept), adapters)
            if grad_z is not None:
                if dora is not None and dropping is not None:
                    dora.back_(grad_z, grad, weight, gains, dropping)
                grad_z = frozen.fold(grad_z)
        if wanted:
            weight = frozen.weight() if weight is None else weight
            grad_z = grad @ weight if grad_z is None else grad_z.addmm_(grad, weight)
        z, grad_x = x, grad_z
        if isinstance(enter, InFront) and grad_z is not None:
            grad_x, z = enter.backward(grad_z, x)
        elif enter is not None:
            z = enter.forward(x, frozen.room)
            grad_x = enter.backward(grad_z, x) if isinstance(enter, Norm) and grad_z is not None else None
        of_norm = enter.gradients(grad_z, x) if isinstance(enter, Norm) and grad_z is not None else []
        if not saved:
            return grad_x, None, None, residual, *of_biases, *of_norm
        entered = frozen.spread(z) if entered is None else entered
        of_parts = frozen.lora.gradients(through, entered, grad_za, tuple(kept), adapters)
        return grad_x, None, None, residual, *of_parts, *grads_m, *of_biases, *of_norm
