"""Frozen linear layers with LoRA as one autograd function with hand-derived gradients, and what stands in front.

It saves the least that its backward needs, gives no gradient to frozen weights, and leaves the element-wise work
to `Ops` (eager.py on any device, cpu/kernels.py on a CPU with numba, card/kernels.py on a card with Triton) and LoRA's
own products to `LoraProducts` (lora.py anywhere, cpu/lora_tiles.py on a CPU with AVX512-BF16), the frozen ones to
`FrozenProduct` (lora.product anywhere, cpu/frozen.py on such a CPU without AMX).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from strop.engine.kernels.protocols import About, FrozenProduct, Loops, LoraProducts, Ops, ReusedBuffer
from strop.engine.train.buffers import Allocate, Arena, heap_empty
from strop.engine.train.dropout import DropoutOps, DropoutSpec
from strop.engine.train.linear import Dora, Dropping
from strop.engine.train.lora import Adapters, Addend, InPlace, product
from strop.engine.train.norms import Norm


@dataclass(frozen=True)
class Glu:
    """activation(gate) * up in front of the down projection, computed again in the backward instead of saved."""

    ops: Ops
    activation: str

    def forward(self, x: Tensor, room: ReusedBuffer | None = None) -> Tensor:
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

    def forward(self, x: Tensor, room: ReusedBuffer | None = None) -> Tensor:
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
class CompiledActivation:
    """activation(x), which gates nothing, in the same place, by loops; kind and about: as in cpu/rows.py."""

    loops: Loops
    kind: str
    about: About

    def forward(self, x: Tensor, room: ReusedBuffer | None = None) -> Tensor:
        out = None if room is None else room(len(x), x.shape[1], x)
        return self.loops.activated(x, self.kind, self.about, out)

    def backward(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.loops.activated_backward(grad, x, self.kind, self.about)


ActivationModule = Glu | Activation | CompiledActivation
Prologue = Norm | ActivationModule | None


@dataclass(frozen=True)
class FrozenLinear:
    """Frozen linear layers that share their input, as one. bias (n,) or None.

    weight: gives the weight (n, k), which holds until the next weight is asked for (it may be dequantized into a
    buffer that all layers share), as `product` takes it; DoRA takes a tensor. arena: where what is kept lies, on a CPU.
    """

    weight: Callable[[], Any]
    bias: Tensor | None
    lora: LoraProducts
    columns: tuple[tuple[int, int], ...]  # for each adapter: the outputs it adds to, from and to
    scales: tuple[float, ...]
    room: ReusedBuffer | None = None  # for z, on a CPU
    arena: Arena | None = None
    dropped: DropoutSpec | None = None  # of z, in front of the adapters
    drops: DropoutOps | None = None
    dora: Dora | None = None
    biased: tuple[tuple[int, int], ...] = ()  # the outputs whose bias is trained, from and to
    product: FrozenProduct = product

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
        ctx: Any, x: Tensor, frozen: FrozenLinear, enter: Prologue, residual: Tensor | None, *parts: Tensor
    ) -> Tensor:  # fmt: skip
        z = x if enter is None else enter.forward(x, frozen.room)
        ctx.frozen, ctx.enter, weight = frozen, enter, frozen.weight()
        new: Allocate = frozen.arena or heap_empty
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
                added, kept = InPlace(), (gains, *kept)
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
        added: Addend | None = None
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
                grad_z, added = frozen.fold(grad_z), InPlace()
        if wanted:
            weight = frozen.weight() if weight is None else weight
            grad_z = grad.new_empty(len(grad), weight.shape[1]) if grad_z is None else grad_z
            frozen.product(grad, weight, False, grad_z, added)
        z, grad_x = x, grad_z
        if isinstance(enter, ActivationModule) and grad_z is not None:
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


# ---- from strop.engine.train.fused_linear ----
"""Frozen linear layers of a model that share their input, laid side by side, with the adapters on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from strop.engine.kernels.protocols import FrozenProduct, LoraProducts, Ops, ReusedBuffer, apply
from strop.engine.train.buffers import Arena
from strop.engine.train.dropout import CounterDropout, DropoutOps, DropoutSpec, keep_scale
from strop.engine.train.linear import Dora, FrozenLinear, LoraLinear, Prologue
from strop.engine.train.norms import Norm
from strop.engine.train.peft_modules import without


class Quantized(ABC):
    """A frozen linear layer that holds its weight in another form (model.quantize.QuantizedLinear).

    No protocol: from Python 3.12 on a check against one does not see what nn.Module keeps aside, as a weight.
    """

    dtype: torch.dtype
    weight: Tensor
    in_features: int

    @abstractmethod
    def dequantized(self, out: Tensor | None = None) -> Tensor: ...

    @abstractmethod
    def packed(self) -> PackedWeight | None: ...


@dataclass(frozen=True)
class PackedWeight:
    """A weight (n, k) in small numbers. int8 (n, k), times scale (n,) fp32.

    Or, with a `code` (16,) fp32: bytes (n k / 2) with two places in it each, the first in the upper half; each `share`
    of these numbers, which does not go over the end of a row, is times one of `scale`.
    """

    weight: Tensor
    scale: Tensor
    code: Tensor | None = None
    share: int = 0


ProductsOf = Callable[[Sequence[int]], Callable[[Sequence[Tensor]], LoraProducts]]
InPlace = Callable[[Callable[[], Tensor], Callable[[], "tuple[Tensor, Tensor] | None"]], Callable[[], Any]]


def base_of(module: Any) -> Any:
    """The model's own module, under an adapter, new tokens or a copy that is trained in full."""
    return module.base_layer if isinstance(module, LoraLayer) else without(module)


def adapts_linear_weight(module: nn.Module) -> bool:
    """Whether this is peft's adapter on a linear layer's weight (a mixture's dense and shared layers): the same sum."""
    return type(module) is ParamWrapper and module.parameter_name == "weight" and bool(module.num_experts == 1)


@dataclass(frozen=True)
class ActiveAdapters:
    """The adapters on linear modules that share their input: A_1, B_1, A_2, ..., DoRA's magnitudes, the columns and
    scales of Adapters, and the module of each that drops."""

    parts: list[Tensor]
    magnitudes: list[Tensor]
    columns: tuple[tuple[int, int], ...]
    scales: tuple[float, ...]
    dropouts: list[Any]


def find_active_adapters(modules: Sequence[Any], bases: Sequence[Any]) -> ActiveAdapters:
    """Those that are active now. bases: base_of each module."""
    adapters: list[Tensor] = []
    dropouts: list[Any] = []
    magnitudes: list[Tensor] = []
    columns, scales, at = [], [], 0
    for module, base in zip(modules, bases, strict=True):
        width = base.out_features
        if isinstance(module, LoraLayer) and not module.disable_adapters and not module.merged:
            for name in module.active_adapters:
                if name in module.lora_A:
                    adapters += [module.lora_A[name].weight, module.lora_B[name].weight]
                    if name in module.lora_magnitude_vector:
                        magnitudes.append(module.lora_magnitude_vector[name].weight)
                    columns.append((at, at + width))
                    dropouts.append(module.lora_dropout[name])
                    scales.append(float(module.scaling[name]) * keep_scale(_level(dropouts[-1])))
        at += width
    return ActiveAdapters(adapters, magnitudes, tuple(columns), tuple(scales), dropouts)


class FusedLinear:
    """Linear modules that share their input, as one frozen weight, with the adapters that are active on them now.

    Quantized modules stay as they are, and give their weight when it is needed.
    """

    def __init__(
        self,
        modules: list[Any],
        enter: Prologue,
        workspace: Workspace,
        products_of: ProductsOf,
        product_of: Callable[[Sequence[int]], FrozenProduct],
        held: InPlace,
        drops: DropoutOps,
        ops: Ops,
        arena: Arena | None = None,
    ) -> None:
        """products_of, product_of: give LoRA's products and the frozen one for layers of these sizes (Processor.lora,
        Processor.product); held: what the latter takes as the weight (Processor.held). drops: draws the masks. arena:
        where the output lies, which is kept for the backward, on a CPU."""
        self.modules, self.enter, self.drops, self._ops, self._arena = modules, enter, drops, ops, arena
        self._dora: Dora | None = None
        self.room = workspace.entered if base_of(modules[0]).weight.device.type == "cpu" else None
        self.bases = [base_of(module) for module in modules]
        sizes = [size for base in self.bases for size in (base.in_features, base.out_features)]
        self._products, self._product = products_of(sizes), product_of(sizes)
        biases = [base.bias for base in self.bases]
        self._trained = any(bias is not None and bias.requires_grad for bias in biases)
        self.bias = _side_by_side(biases) if biases[0] is not None and not self._trained else None
        weights = [base.weight for base in self.bases]
        if any(isinstance(base, Quantized) for base in self.bases):
            self.weight = held(lambda: workspace.side_by_side(self.bases), self._eight_bit)
        else:
            if not _lie_so(weights):
                _side_by_side(weights)
            # taken once they are there, and a view from then on
            self.weight = held(cache(lambda: _side_by_side(weights)), lambda: None)
        self.places = [_location(base.weight) for base in self.bases]
        self.operands: LoraProducts | None = None  # of the adapters, where they are laid out beforehand

    def _eight_bit(self) -> tuple[Tensor, Tensor] | None:
        """int8 (n, k) and scale (n,) of all modules, which become views of them; None where one is not in 8 bit."""
        packed = [base.packed() if isinstance(base, Quantized) else None for base in self.bases]
        scales = [one.scale for one in packed if one is not None and one.code is None]
        if len(scales) < len(self.bases):
            return None
        return _side_by_side([base.weight for base in self.bases]), torch.cat(scales)

    @property
    def outputs(self) -> int:
        return sum(base.out_features for base in self.bases)

    def active_adapters(self) -> ActiveAdapters:
        """The adapters that are active now."""
        return find_active_adapters(self.modules, self.bases)

    def __call__(self, x: Tensor, tokens: Tensor, residual: Tensor | None = None) -> Tensor:
        """tokens: the key of each row of x (dropout.token_keys)."""
        for base, place in zip(self.bases, self.places, strict=True):
            assert _location(base.weight) == place, "the model's weights were moved or replaced after FastLoss"
        now, enter = self.active_adapters(), self.enter
        enter = enter.now() if isinstance(enter, Norm) else enter
        products, dropped = self.operands or self._products(now.parts), dropout_spec(now.dropouts, tokens)
        lies = now.columns, now.scales, self.room, self._arena, dropped, self.drops
        bias, biased, trained = self._biases(x) if self._trained else (self.bias, (), [])
        frozen = FrozenLinear(self.weight, bias, products, *lies, self._dora_of(now.magnitudes), biased, self._product)
        whole = enter.trained if isinstance(enter, Norm) else ()
        return apply(LoraLinear, x, frozen, enter, residual, *now.parts, *now.magnitudes, *trained, *whole)

    def _biases(self, x: Tensor) -> tuple[Tensor, tuple[tuple[int, int], ...], list[Tensor]]:
        """The biases as they are now, side by side in the type of x; where the trained ones stand in them; these."""
        biases, at, columns, trained = [base.bias for base in self.bases], 0, [], []
        for bias in biases:
            if bias.requires_grad:
                columns.append((at, at + len(bias)))
                trained.append(bias)
            at += len(bias)
        return torch.cat([bias.detach().to(x.dtype) for bias in biases]), tuple(columns), trained

    def _dora_of(self, magnitudes: list[Tensor]) -> Dora | None:
        """The frozen rows' squares are taken once."""
        if magnitudes and self._dora is None:
            weight = self.weight()
            wide = torch.promote_types(weight.dtype, torch.float32)
            self._dora = Dora(self._ops, torch.linalg.vector_norm(weight, dim=1, dtype=wide).square())
        return self._dora if magnitudes else None


def _level(dropout: Any) -> int:
    return dropout.level if isinstance(dropout, CounterDropout) else 0


def dropout_spec(dropouts: Sequence[Any], tokens: Tensor) -> DropoutSpec | None:
    """What the adapters with these dropouts, each CountedDropout or Identity, drop now; None: nothing."""
    levels = tuple(map(_level, dropouts))
    counted = [dropout for dropout in dropouts if isinstance(dropout, CounterDropout)]
    if not any(levels):
        return None
    masks, numbers = counted[0].masks, tuple(getattr(dropout, "number", 0) for dropout in dropouts)
    return DropoutSpec(masks.seed, masks.step, tokens, numbers, levels)


class Workspace:
    """What the layers of a model compute in, one after the other: a weight that quantized layers give, and what a norm
    or a GLU hands to the products behind it."""

    def __init__(self) -> None:
        self.entered = ReusedBuffer()
        self._weights = ReusedBuffer()

    def side_by_side(self, bases: Sequence[Any]) -> Tensor:
        """The weights of linear layers with the same input, dequantized, as rows of one (n, k)."""
        like = next(base for base in bases if isinstance(base, Quantized))
        rows = sum(base.out_features for base in bases)
        whole, at = self._weights(rows, like.in_features, like.weight.new_empty(0, dtype=like.dtype)), 0
        for base in bases:  # one at a time: two of an 8B model's are 235 MB
            place = whole[at : at + base.out_features]
            if isinstance(base, Quantized):
                base.dequantized(place)
            else:
                place.copy_(base.weight.detach())
            at += base.out_features
        return whole


def _location(weight: Tensor) -> tuple[int, int]:
    """Which memory holds it, and where in it: that memory may be emptied and filled again."""
    return weight.untyped_storage()._cdata, int(weight.storage_offset())


def _lie_so(parts: list[nn.Parameter]) -> bool:
    """Whether the rows of each follow those of the one before."""
    memory, at = _location(parts[0])
    for part in parts:
        if _location(part) != (memory, at) or not part.is_contiguous():
            return False
        at += part.numel()
    return True


def _side_by_side(parts: list[nn.Parameter]) -> Tensor:
    """One tensor with the rows of all parts, which become views of it (or are already)."""
    first = parts[0].data
    if len(parts) == 1:
        return first
    if _lie_so(parts):
        return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
    joined = torch.cat([part.data for part in parts])
    for part, view in zip(parts, torch.split(joined, [len(part) for part in parts]), strict=True):
        part.data = view
    return joined


# ---- from strop.engine.train.dora ----
"""DoRA (Liu et al., arXiv:2402.09353) on frozen linear layers with one adapter each.

y = g (z W^T + s z A^T B^T) + bias, with g = m / |W + s B A|, row by row, and the norm a constant in the gradient
(section 4.3). Dropout leaves z' of z for an adapter. Then peft and the authors' own code drop of what DoRA changes, and
not of the frozen layer: y = z W^T + (g - 1) z' W^T + g s z' A^T B^T + bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.engine.kernels.protocols import Ops
from strop.engine.train import lora
from strop.engine.train.dropout import DropoutSpec, keep_scale
from strop.engine.train.lora import Adapters


@dataclass(frozen=True)
class Dora:
    """squares (n,): |W|^2 of each row, fp32."""

    ops: Ops
    squares: Tensor

    def gains(self, weight: Tensor, adapters: Adapters, magnitudes: Sequence[Tensor]) -> Tensor:
        """g (n,), in the type of `squares`; 1 where no adapter is. |W + s B A|^2 without W + s B A: (n, k) is large.
        s is without what makes up for dropout (`undropped`)."""
        wide = self.squares.dtype
        gains = torch.ones_like(self.squares)
        for (a, b, scale), (start, end), m in zip(adapters, adapters.columns, magnitudes, strict=True):
            a, b = a.to(wide), b.to(wide)
            across = (weight[start:end] @ a.t().to(weight.dtype)).to(wide)
            change = 2 * scale * (across * b).sum(1) + scale**2 * ((b @ (a @ a.t())) * b).sum(1)
            gains[start:end] = m.to(wide) / (self.squares[start:end] + change).clamp_(min=0).sqrt_()
        return gains

    def changed_(self, y: Tensor, z: Tensor, weight: Tensor, gains: Tensor, parts: Dropping) -> None:
        """y (T, n), which is s z' A^T B^T, becomes (g - 1) z' W^T + g s z' A^T B^T: each term as small as the change,
        which is rounded once more with the frozen product. z (T, m k): z' of each adapter."""
        self.ops.scale_columns_(y, gains)
        for (start, end), own, up, _ in parts.each(z):
            product = own @ weight[start:end].t()
            y[:, start:end] += self.ops.scale_columns_(product, (gains[start:end] - 1) * up)

    def along(self, grad: Tensor, gains: Tensor, z: Tensor, weight: Tensor, parts: Dropping) -> Tensor:
        """The gradients of g, times g (n,). What g multiplies, z' W^T + s z' A^T B^T, is computed again."""
        along = torch.zeros_like(gains)
        for (start, end), own, up, adapter in parts.each(z):
            product = own.new_empty(len(own), end - start)
            lora.forward(own, end - start, adapter)[0].into(product)
            product.addmm_(own, weight[start:end].t(), alpha=up)
            upstream = grad[:, start:end].contiguous()
            along[start:end] = self.ops.scale_columns_backward(upstream, product, gains[start:end])[1]
        return along.mul_(gains)

    def back_(self, grad_z: Tensor, grad: Tensor, weight: Tensor, gains: Tensor, parts: Dropping) -> None:
        """Adds to the gradients of the z' (T, m k) what comes through (g - 1) z' W^T."""
        for (start, end), own, up, _ in parts.each(grad_z):
            through = grad[:, start:end].clone(memory_format=torch.contiguous_format)
            own.addmm_(self.ops.scale_columns_(through, (gains[start:end] - 1) * up), weight[start:end])


@dataclass(frozen=True)
class Dropping:
    """The adapters with what their dropout does; scales of the adapters: with what makes up for it."""

    adapters: Adapters
    dropped: DropoutSpec

    @property
    def undropped(self) -> Adapters:
        """With the scales of the adapters themselves."""
        now = self.adapters
        scales = tuple(s / keep_scale(level) for s, level in zip(now.scales, self.dropped.levels, strict=True))
        return Adapters(now.parts, now.columns, scales, now.apart)

    def each(self, z: Tensor) -> Iterator[tuple[tuple[int, int], Tensor, float, Adapters]]:
        """Of each adapter: its outputs, from and to; its z' (a view, not scaled up); by what z' is to be scaled up; and
        the adapter alone."""
        now = self.adapters
        for i, (span, own) in enumerate(zip(now.columns, torch.split(z, now.width, 1), strict=True)):
            alone = Adapters(now.parts[2 * i : 2 * i + 2], ((0, span[1] - span[0]),), now.scales[i : i + 1])
            yield span, own, keep_scale(self.dropped.levels[i]), alone
