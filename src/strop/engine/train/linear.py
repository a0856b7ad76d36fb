"""Frozen linear layers with LoRA or DoRA as one autograd function, with what precedes them fused in.

The function has hand-derived gradients. It saves only what its backward needs and computes no gradient for frozen
weights. Element-wise work is done by `Ops` (kernels/eager.py is the reference), the adapters' matmuls by `LoraOps`
(reference: lora.py), and the frozen ones by `FrozenMatmul` (reference: lora.frozen_matmul).

DoRA (Liu et al., arXiv:2402.09353) computes y = g (z W^T + s z A^T B^T) + bias with g = m / |W + s B A|, row by row.
The norm is a constant in the gradient (section 4.3 of the paper). With dropout, which leaves z' of z for an adapter,
PEFT and the authors' code drop from what DoRA changes and not from the frozen layer:
y = z W^T + (g - 1) z' W^T + g s z' A^T B^T + bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from strop.engine.kernels.protocols import ActivationParameters, CpuOps, FrozenMatmul, LoraOps, Ops, ReusedBuffer, apply
from strop.engine.train import lora
from strop.engine.train.buffers import Allocate, Arena, heap_empty
from strop.engine.train.dropout import DropoutOps, DropoutSpec, keep_scale
from strop.engine.train.lora import Adapters, Addend, InPlace, frozen_matmul
from strop.engine.train.norms import Norm
from strop.engine.train.peft_modules import ActiveAdapters, base_module, dropout_spec, find_active_adapters
from strop.models.quantize import QuantizedLinear

LoraOpsFor = Callable[[Sequence[int]], Callable[[Sequence[Tensor]], LoraOps]]
PrepareWeight = Callable[[Callable[[], Tensor], Callable[[], "tuple[Tensor, Tensor] | None"]], Callable[[], Any]]


@dataclass(frozen=True)
class Glu:
    """activation(gate) * up before the down projection. The backward recomputes it instead of saving it."""

    ops: Ops
    activation: str

    def forward(self, x: Tensor, buffer: ReusedBuffer | None = None) -> Tensor:
        out = None if buffer is None else buffer(len(x), x.shape[1] // 2, x)
        return self.ops.glu(x, self.activation, out)

    def backward(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient with respect to x, and the forward's output again."""
        return self.ops.glu_backward(grad, x, self.activation)


@dataclass(frozen=True)
class Activation:
    """The model's activation before the down projection, differentiated by autograd in the backward.

    gated: compute activation(gate) * up. Otherwise compute activation(x).
    """

    activation: Callable[[Tensor], Tensor]
    gated: bool

    def forward(self, x: Tensor, buffer: ReusedBuffer | None = None) -> Tensor:
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
    """An ungated activation(x) in the same place, by compiled kernels. kind, about: as in CpuOps.activated."""

    loops: CpuOps
    kind: str
    about: ActivationParameters

    def forward(self, x: Tensor, buffer: ReusedBuffer | None = None) -> Tensor:
        out = None if buffer is None else buffer(len(x), x.shape[1], x)
        return self.loops.activated(x, self.kind, self.about, out)

    def backward(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.loops.activated_backward(grad, x, self.kind, self.about)


ActivationModule = Glu | Activation | CompiledActivation
Prologue = Norm | ActivationModule | None


@dataclass(frozen=True)
class DroppedAdapters:
    """DoRA's adapters with the dropout of their inputs. The scales of `adapters` include the dropout's."""

    adapters: Adapters
    dropped: DropoutSpec

    @property
    def undropped(self) -> Adapters:
        """The adapters with their own scales, without the dropout's."""
        adapters = self.adapters
        scales = tuple(s / keep_scale(level) for s, level in zip(adapters.scales, self.dropped.levels, strict=True))
        return Adapters(adapters.parts, adapters.columns, scales, adapters.separate_inputs)

    def split(self, z: Tensor) -> Iterator[tuple[tuple[int, int], Tensor, float, Adapters]]:
        """Yield for each adapter its output range, its unscaled z' (a view), the scale of z', and the adapter alone."""
        adapters = self.adapters
        for i, (span, z_i) in enumerate(zip(adapters.columns, torch.split(z, adapters.width, 1), strict=True)):
            parts, scales = adapters.parts[2 * i : 2 * i + 2], adapters.scales[i : i + 1]
            yield span, z_i, keep_scale(self.dropped.levels[i]), Adapters(parts, ((0, span[1] - span[0]),), scales)


@dataclass(frozen=True)
class Dora:
    """DoRA's change of a frozen layer's output. squares (n,): |W|^2 of each row, fp32."""

    ops: Ops
    squares: Tensor

    def gains(self, weight: Tensor, adapters: Adapters, magnitudes: Sequence[Tensor]) -> Tensor:
        """Return g (n,) in the dtype of `squares`, 1 where there is no adapter. adapters: without the dropout's scale.

        |W + s B A|^2 is computed without W + s B A, because (n, k) is large.
        """
        wide = self.squares.dtype
        gains = torch.ones_like(self.squares)
        for (a, b, scale), (start, end), m in zip(adapters, adapters.columns, magnitudes, strict=True):
            a, b = a.to(wide), b.to(wide)
            cross = (weight[start:end] @ a.t().to(weight.dtype)).to(wide)
            change = 2 * scale * (cross * b).sum(1) + scale**2 * ((b @ (a @ a.t())) * b).sum(1)
            gains[start:end] = m.to(wide) / (self.squares[start:end] + change).clamp_(min=0).sqrt_()
        return gains

    def apply_(self, y: Tensor, z: Tensor, weight: Tensor, gains: Tensor, parts: DroppedAdapters) -> None:
        """Turn y (T, n) = s z' A^T B^T into (g - 1) z' W^T + g s z' A^T B^T. z (T, m k): z' of each adapter.

        Both terms are as small as DoRA's change, and are rounded once more with the frozen product.
        """
        self.ops.scale_columns_(y, gains)
        for (start, end), z_i, up, _ in parts.split(z):
            product = z_i @ weight[start:end].t()
            y[:, start:end] += self.ops.scale_columns_(product, (gains[start:end] - 1) * up)

    def gains_gradient(self, grad: Tensor, gains: Tensor, z: Tensor, weight: Tensor, parts: DroppedAdapters) -> Tensor:
        """Return the gradients of g, multiplied by g (n,). Recomputes z' W^T + s z' A^T B^T, which g multiplies."""
        grad_gains = torch.zeros_like(gains)
        for (start, end), z_i, up, adapter in parts.split(z):
            product = z_i.new_empty(len(z_i), end - start)
            lora.forward(z_i, end - start, adapter)[0].into(product)
            product.addmm_(z_i, weight[start:end].t(), alpha=up)
            upstream = grad[:, start:end].contiguous()
            grad_gains[start:end] = self.ops.scale_columns_backward(upstream, product, gains[start:end])[1]
        return grad_gains.mul_(gains)

    def add_input_gradient_(
        self, grad_z: Tensor, grad: Tensor, weight: Tensor, gains: Tensor, parts: DroppedAdapters
    ) -> None:
        """Add the gradient through (g - 1) z' W^T to grad_z (T, m k)."""
        for (start, end), grad_z_i, up, _ in parts.split(grad_z):
            upstream = grad[:, start:end].clone(memory_format=torch.contiguous_format)
            grad_z_i.addmm_(self.ops.scale_columns_(upstream, (gains[start:end] - 1) * up), weight[start:end])


@dataclass(frozen=True)
class FrozenLinear:
    """The constants of one LoraLinear call: frozen linear layers that share their input, as one, and their adapters.

    weight: returns the weight (n, k) in the form that `matmul` takes (DoRA needs a tensor). It is valid until the next
    weight is requested, since it may be dequantized into a buffer that all layers share. columns: the output range of
    each adapter. buffer: for z, on a CPU. arena: for saved tensors, on a CPU. dropped: the dropout of z before the
    adapters. trained_biases: the output ranges whose bias is trained.
    """

    weight: Callable[[], Any]
    bias: Tensor | None
    lora: LoraOps
    columns: tuple[tuple[int, int], ...]
    scales: tuple[float, ...]
    buffer: ReusedBuffer | None = None
    arena: Arena | None = None
    dropped: DropoutSpec | None = None
    dropout_ops: DropoutOps | None = None
    dora: Dora | None = None
    trained_biases: tuple[tuple[int, int], ...] = ()
    matmul: FrozenMatmul = frozen_matmul

    def adapter_inputs(self, z: Tensor) -> Tensor:
        """Return z, or with dropout a masked copy of it for each adapter."""
        return z if self.dropped is None or self.dropout_ops is None else self.dropout_ops.apply_masks(z, self.dropped)

    def adapter_inputs_backward(self, grad: Tensor) -> Tensor:
        """Return the gradient of z from that of `adapter_inputs`."""
        if self.dropped is None or self.dropout_ops is None:
            return grad
        return self.dropout_ops.apply_masks_backward(grad, self.dropped)

    @property
    def num_parts(self) -> int:
        """The number of adapter factors, DoRA's magnitudes included."""
        return (2 if self.dora is None else 3) * len(self.scales)

    def split(self, parts: Sequence[Tensor]) -> tuple[Adapters, Sequence[Tensor]]:
        """Return the adapters and DoRA's magnitudes."""
        factors = 2 * len(self.scales)
        adapters = Adapters(parts[:factors], self.columns, self.scales, self.dropped is not None)
        return adapters, parts[factors : self.num_parts]

    def dropped_dora(self, adapters: Adapters) -> DroppedAdapters | None:
        """Return the adapters with their dropout if they are DoRA's and drop elements now."""
        return None if self.dora is None or self.dropped is None else DroppedAdapters(adapters, self.dropped)

    def bias_gradients(self, grad: Tensor) -> list[Tensor]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        return [grad[:, start:end].sum(0, dtype=wide) for start, end in self.trained_biases]


class LoraLinear(Function):
    """Compute y = z W^T + bias and add scale_i (z_i A_i^T) B_i^T to y[:, columns_i] for each adapter i.

    z is x, norm(x) or glu(x). z_i is z, or what dropout keeps of it for adapter i (`scales` include the dropout's).

    x: (T, k), or (T, 2 k) for glu. residual: (T, n) or None, added to y. parts: A_1 (r_1, k), B_1 (n_1, r_1), A_2, ...,
    for DoRA then m_1 (n_1,), m_2, ..., then the trained biases, and `trained` of a norm in the prologue.

    Saves x and scale z A^T (T, sum of r). DoRA without dropout also saves y, which the next operation saves as well
    where there is no residual.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen: FrozenLinear, prologue: Prologue, residual: Tensor | None, *parts: Tensor
    ) -> Tensor:  # fmt: skip
        z = x if prologue is None else prologue.forward(x, frozen.buffer)
        ctx.frozen, ctx.prologue, weight = frozen, prologue, frozen.weight()
        new: Allocate = frozen.arena or heap_empty
        ctx.round = frozen.arena.round if frozen.arena else 0
        y = new(len(z), len(weight), z)
        if not frozen.scales:
            ctx.save_for_backward(*([] if prologue is None else [x]))
            return frozen.matmul(z, weight, True, y, None, frozen.bias, residual)
        adapters, magnitudes = frozen.split(parts)
        inputs, dora, dropped = frozen.adapter_inputs(z), frozen.dora, frozen.dropped_dora(adapters)
        added, kept = frozen.lora.forward(inputs, len(weight), adapters, new)
        if dora is not None and dropped is None:
            frozen.matmul(z, weight, True, y, added)
            gains = dora.gains(weight, adapters, magnitudes)
            dora.ops.scale_columns_(y, gains)
            if frozen.bias is not None:
                y += frozen.bias
            kept = (gains, y, *kept)
            y = y if residual is None else y + residual
        else:
            if dora is not None and dropped is not None:
                added.into(y)
                gains = dora.gains(weight, dropped.undropped, magnitudes)
                dora.apply_(y, inputs, weight, gains, dropped)
                added, kept = InPlace(), (gains, *kept)
            frozen.matmul(z, weight, True, y, added, frozen.bias, residual)
        ctx.save_for_backward(x, *parts[: frozen.num_parts], *kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        frozen, prologue = ctx.frozen, ctx.prologue
        if frozen.arena:
            frozen.arena.check(ctx.round)
        # Without adapters and without a prologue nothing was saved: the input is not needed.
        x, *saved = ctx.saved_tensors or (grad,)
        norm_trained = isinstance(prologue, Norm) and bool(prologue.trained)
        grad, grad_z, needs_grad_z = grad.contiguous(), None, ctx.needs_input_grad[0] or norm_trained
        grad_residual = grad if ctx.needs_input_grad[3] else None
        bias_grads = frozen.bias_gradients(grad)
        added: Addend | None = None
        weight, inputs, upstream = None, None, grad  # inputs: of the adapters; upstream: the gradient of their outputs
        magnitude_grads: list[Tensor] = []
        if saved:
            count = frozen.num_parts
            (adapters, magnitudes), kept = frozen.split(saved[:count]), tuple(saved[count:])
            dora, dropped = frozen.dora, frozen.dropped_dora(adapters)
            if dora is not None and dropped is not None:
                gains, kept = kept[0], kept[1:]
                z = x if prologue is None else prologue.forward(x, frozen.buffer)
                weight, inputs = frozen.weight(), frozen.adapter_inputs(z)
                grad_gains = dora.gains_gradient(grad, gains, inputs, weight, dropped)
                upstream = dora.ops.scale_columns_(grad.clone(), gains)
            elif dora is not None:
                (gains, y), kept = kept[:2], kept[2:]
                y = y if frozen.bias is None else y - frozen.bias
                grad, grad_gains = dora.ops.scale_columns_backward(grad, y, gains)
                upstream = grad
            for (start, end), m in zip(frozen.columns, magnitudes, strict=False):
                magnitude_grads.append((grad_gains[start:end] / m).to(m.dtype))
            added, grad_za = frozen.lora.backward(upstream, kept, adapters)
            if not needs_grad_z:
                added.finish_projection()
            elif frozen.dropped is not None:
                grad_z = grad.new_empty(len(grad), adapters.input_columns)
                added.into(grad_z)
                if dora is not None and dropped is not None:
                    dora.add_input_gradient_(grad_z, grad, weight, gains, dropped)
                grad_z, added = frozen.adapter_inputs_backward(grad_z), InPlace()
        if needs_grad_z:
            weight = frozen.weight() if weight is None else weight
            grad_z = grad.new_empty(len(grad), weight.shape[1]) if grad_z is None else grad_z
            frozen.matmul(grad, weight, False, grad_z, added)
        z, grad_x = x, grad_z
        if isinstance(prologue, ActivationModule) and grad_z is not None:
            grad_x, z = prologue.backward(grad_z, x)
        elif prologue is not None:
            z = prologue.forward(x, frozen.buffer)
            grad_x = prologue.backward(grad_z, x) if isinstance(prologue, Norm) and grad_z is not None else None
        norm_grads = prologue.gradients(grad_z, x) if isinstance(prologue, Norm) and grad_z is not None else []
        if not saved:
            return grad_x, None, None, grad_residual, *bias_grads, *norm_grads
        inputs = frozen.adapter_inputs(z) if inputs is None else inputs
        part_grads = frozen.lora.gradients(upstream, inputs, grad_za, kept, adapters)
        return grad_x, None, None, grad_residual, *part_grads, *magnitude_grads, *bias_grads, *norm_grads


class Workspace:
    """Buffers that the layers of a model use in turn: for a dequantized weight, and for the output of a prologue."""

    def __init__(self) -> None:
        self.prologue_output = ReusedBuffer()
        self._weights = ReusedBuffer()

    def dequantize(self, bases: Sequence[Any]) -> Tensor:
        """Return the weights of linear layers with the same input, dequantized, as rows of one tensor (n, k)."""
        like = next(base for base in bases if isinstance(base, QuantizedLinear))
        sizes = [base.out_features for base in bases]
        whole = self._weights(sum(sizes), like.in_features, like.weight.new_empty(0, dtype=like.dtype))
        for base, part in zip(bases, torch.split(whole, sizes), strict=True):  # two of an 8B model's take 235 MB
            if isinstance(base, QuantizedLinear):
                base.dequantize(part)
            else:
                part.copy_(base.weight.detach())
        return whole


class FusedLinear:
    """Linear modules that share their input, as one frozen weight, with the adapters that are active on them.

    The modules' weights become views of the fused weight. Quantized modules are left unchanged and dequantize their
    weight when it is needed.
    """

    def __init__(
        self,
        modules: list[Any],
        prologue: Prologue,
        workspace: Workspace,
        lora_ops_for: LoraOpsFor,
        matmul_for: Callable[[Sequence[int]], FrozenMatmul],
        prepare_weight: PrepareWeight,
        dropout_ops: DropoutOps,
        ops: Ops,
        arena: Arena | None = None,
    ) -> None:
        """Fuse the modules' weights.

        lora_ops_for, matmul_for: return the implementations for layers of these sizes (Backend.lora and .matmul).
        prepare_weight: wraps the weight for the matmul (Backend.weight_loader). arena: for the output, which is saved
        for the backward, on a CPU.
        """
        self.modules, self.prologue = modules, prologue
        self._dropout_ops, self._ops, self._arena = dropout_ops, ops, arena
        self._dora: Dora | None = None
        self._buffer = workspace.prologue_output if base_module(modules[0]).weight.device.type == "cpu" else None
        self.bases = [base_module(module) for module in modules]
        sizes = [size for base in self.bases for size in (base.in_features, base.out_features)]
        self._lora_ops, self._matmul = lora_ops_for(sizes), matmul_for(sizes)
        biases = [base.bias for base in self.bases]
        self._bias_trained = any(bias is not None and bias.requires_grad for bias in biases)
        self.bias = _fuse(biases) if biases[0] is not None and not self._bias_trained else None
        weights = [base.weight for base in self.bases]
        if any(isinstance(base, QuantizedLinear) for base in self.bases):
            self.weight = prepare_weight(lambda: workspace.dequantize(self.bases), self._int8_weight)
        else:
            if not _are_contiguous(weights):
                _fuse(weights)
            # Evaluated when the weights are loaded; a view from then on.
            self.weight = prepare_weight(cache(lambda: _fuse(weights)), lambda: None)
        self._locations = [_location(base.weight) for base in self.bases]
        self.operands: LoraOps | None = None  # the adapters' matmuls, where kernels/cuda prepared them

    def _int8_weight(self) -> tuple[Tensor, Tensor] | None:
        """Return int8 (n, k) and scale (n,) of all modules, which become views; None unless all are in 8 bits."""
        packed = [base.packed_weight() if isinstance(base, QuantizedLinear) else None for base in self.bases]
        scales = [weight.scale for weight in packed if weight is not None and weight.code is None]
        if len(scales) < len(self.bases):
            return None
        return _fuse([base.weight for base in self.bases]), torch.cat(scales)

    @property
    def outputs(self) -> int:
        """The number of output features."""
        return sum(base.out_features for base in self.bases)

    def active_adapters(self) -> ActiveAdapters:
        return find_active_adapters(self.modules, self.bases)

    def __call__(self, x: Tensor, keys: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply LoraLinear to x (T, k). keys: the key of each row of x (dropout.token_keys), shape (T,)."""
        for base, location in zip(self.bases, self._locations, strict=True):
            assert _location(base.weight) == location, "the model's weights were moved or replaced after FastLoss"
        active, prologue = self.active_adapters(), self.prologue
        prologue = prologue.now() if isinstance(prologue, Norm) else prologue
        lora_ops, dropped = self.operands or self._lora_ops(active.parts), dropout_spec(active.dropouts, keys)
        bias, trained_ranges, trained_biases = self._biases(x) if self._bias_trained else (self.bias, (), [])
        frozen = FrozenLinear(
            self.weight, bias, lora_ops, active.columns, active.scales, self._buffer, self._arena, dropped,
            self._dropout_ops, self._dora_for(active.magnitudes), trained_ranges, self._matmul,
        )  # fmt: skip
        of_norm = prologue.trained if isinstance(prologue, Norm) else ()
        parts = (*active.parts, *active.magnitudes, *trained_biases, *of_norm)
        return apply(LoraLinear, x, frozen, prologue, residual, *parts)

    def _biases(self, x: Tensor) -> tuple[Tensor, tuple[tuple[int, int], ...], list[Tensor]]:
        """Return the current biases as one tensor in the dtype of x, the ranges of the trained ones, and these."""
        biases = [base.bias for base in self.bases]
        ends = accumulate(map(len, biases))
        ranges = tuple((end - len(b), end) for b, end in zip(biases, ends, strict=True) if b.requires_grad)
        trained = [bias for bias in biases if bias.requires_grad]
        return torch.cat([bias.detach().to(x.dtype) for bias in biases]), ranges, trained

    def _dora_for(self, magnitudes: list[Tensor]) -> Dora | None:
        """Return DoRA's part if there are magnitudes. The squared norms of the frozen rows are computed once."""
        if magnitudes and self._dora is None:
            weight = self.weight()
            wide = torch.promote_types(weight.dtype, torch.float32)
            self._dora = Dora(self._ops, torch.linalg.vector_norm(weight, dim=1, dtype=wide).square())
        return self._dora if magnitudes else None


def _location(weight: Tensor) -> tuple[int, int]:
    """Return the weight's storage and its offset there. The storage's memory may be released and filled again."""
    return weight.untyped_storage()._cdata, int(weight.storage_offset())


def _are_contiguous(parts: list[nn.Parameter]) -> bool:
    """Return whether the rows of each part follow those of the one before in memory."""
    storage, at = _location(parts[0])
    for part in parts:
        if _location(part) != (storage, at) or not part.is_contiguous():
            return False
        at += part.numel()
    return True


def _fuse(parts: list[nn.Parameter]) -> Tensor:
    """Return one tensor with the rows of all parts, and make the parts views of it if they are not yet."""
    first = parts[0].data
    if len(parts) == 1:
        return first
    if _are_contiguous(parts):
        return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
    fused = torch.cat([part.data for part in parts])
    for part, view in zip(parts, torch.split(fused, [len(part) for part in parts]), strict=True):
        part.data = view
    return fused
