"""Frozen linear layers with LoRA as one autograd function with hand-derived gradients, and what stands in front.

It saves the least that its backward needs, gives no gradient to frozen weights, and leaves the element-wise work
to `Ops` (eager.py on any device, cpu/kernels.py on a CPU with numba, card/kernels.py on a card with Triton) and LoRA's
own products to `LoraOps` (lora.py anywhere, cpu/lora_tiles.py on a CPU with AVX512-BF16), the frozen ones to
`FrozenMatmul` (lora.product anywhere, cpu/frozen.py on such a CPU without AMX).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from strop.engine.kernels.protocols import ActivationParameters, CpuOps, FrozenMatmul, LoraOps, Ops, Scratch
from strop.engine.train.arena import Arena, New, in_heap
from strop.engine.train.dora import Dora, Dropping
from strop.engine.train.dropout import Dropped, Drops
from strop.engine.train.lora import Adapters, Added, Held, product
from strop.engine.train.norms import Norm


@dataclass(frozen=True)
class Glu:
    """activation(gate) * up in front of the down projection, computed again in the backward instead of saved."""

    ops: Ops
    activation: str

    def forward(self, x: Tensor, room: Scratch | None = None) -> Tensor:
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

    def forward(self, x: Tensor, room: Scratch | None = None) -> Tensor:
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

    loops: CpuOps
    kind: str
    about: ActivationParameters

    def forward(self, x: Tensor, room: Scratch | None = None) -> Tensor:
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
    buffer that all layers share), as `product` takes it; DoRA takes a tensor. arena: where what is kept lies, on a CPU.
    """

    weight: Callable[[], Any]
    bias: Tensor | None
    lora: LoraOps
    columns: tuple[tuple[int, int], ...]  # for each adapter: the outputs it adds to, from and to
    scales: tuple[float, ...]
    room: Scratch | None = None  # for z, on a CPU
    arena: Arena | None = None
    dropped: Dropped | None = None  # of z, in front of the adapters
    drops: Drops | None = None
    dora: Dora | None = None
    biased: tuple[tuple[int, int], ...] = ()  # the outputs whose bias is trained, from and to
    product: FrozenMatmul = product

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


class LoraLinear(Function):
    """y = z W^T + bias, and y[:, columns_i] += scale_i (z_i A_i^T) B_i^T for each adapter; z = x, norm(x) or glu(x),
    and z_i = z, or what dropout leaves of it for this adapter (`scales` make up for what is dropped).

    x (T, k), or (T, 2 k) for glu; residual (T, n) or None: what y is added to; parts: A_1 (r_1, k), B_1 (n_1, r_1),
    A_2, ..., for DoRA then m_1 (n_1,), m_2, ..., the biases that are trained, and `trained` of a norm in front. Saves
    x and scale z A^T (T, sum of r); for DoRA also y, which what stands behind saves as well where there is no residual,
    but not with dropout (dora.py has what y is then).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen: Frozen, enter: Enter, residual: Tensor | None, *parts: Tensor
    ) -> Tensor:  # fmt: skip
        z = x if enter is None else enter.forward(x, frozen.room)
        ctx.frozen, ctx.enter, weight = frozen, enter, frozen.weight()
        new: New = frozen.arena or in_heap
        ctx.round = frozen.arena.round if frozen.arena else 0
        y = new(len(z), len(weight), z)
        if not frozen.scales:
            ctx.save_for_backward(*([] if enter is None else [x]))
            return frozen.product(z, weight, True, y, None, frozen.bias, residual)
        adapters, magnitudes = frozen.split(parts)
        entered, dora, dropping = frozen.spread(z), frozen.dora, frozen.dropping(adapters)
        added, kept = frozen.lora.forward(entered, len(weight), adapters, new)
        if dora is not None and dropping is None:
            frozen.product(z, weight, True, y, added)
            gains = dora.gains(weight, adapters, magnitudes)
            dora.ops.scale_columns_(y, gains)
            if frozen.bias is not None:
                y += frozen.bias
            kept = (gains, y, *kept)
            y = y if residual is None else y + residual
        else:
            if dora is not None and dropping is not None:
                added.into(y)
                gains = dora.gains(weight, dropping.undropped, magnitudes)
                dora.changed_(y, entered, weight, gains, dropping)
                added, kept = Held(), (gains, *kept)
            frozen.product(z, weight, True, y, added, frozen.bias, residual)
        ctx.save_for_backward(x, *parts[: frozen.factors], *kept)
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
        added: Added | None = None
        weight, entered, through = None, None, grad  # what the adapters take, and the gradient of what they give
        grads_m: list[Tensor] = []
        if saved:
            parts = frozen.factors
            (adapters, magnitudes), kept = frozen.split(saved[:parts]), tuple(saved[parts:])
            dora, dropping = frozen.dora, frozen.dropping(adapters)
            if dora is not None and dropping is not None:
                gains, kept = kept[0], kept[1:]
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
            added, grad_za = frozen.lora.backward(through, kept, adapters)
            if not wanted:
                added.alone()
            elif frozen.dropped is not None:
                grad_z = grad.new_empty(len(grad), adapters.entered)
                added.into(grad_z)
                if dora is not None and dropping is not None:
                    dora.back_(grad_z, grad, weight, gains, dropping)
                grad_z, added = frozen.fold(grad_z), Held()
        if wanted:
            weight = frozen.weight() if weight is None else weight
            grad_z = grad.new_empty(len(grad), weight.shape[1]) if grad_z is None else grad_z
            frozen.product(grad, weight, False, grad_z, added)
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
        of_parts = frozen.lora.gradients(through, entered, grad_za, kept, adapters)
        return grad_x, None, None, residual, *of_parts, *grads_m, *of_biases, *of_norm
