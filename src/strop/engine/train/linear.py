"""Frozen linear layers with LoRA or DoRA as one autograd function, fused with the preceding norm or activation.

The gradients are derived by hand, with none for frozen weights. Element-wise work is done by `Ops` (the reference is
kernels/eager.py), the adapters' matmuls by `LoraOps` (lora.py), and frozen matmuls by `FrozenMatmul`
(lora.frozen_matmul).

DoRA (Liu et al., arXiv:2402.09353) computes y = g (z W^T + s z A^T B^T) + bias. Here s is the scale of the adapter, and
g = m / |W + s B A| the ratio of the trained magnitude of an output feature to the norm of its row of the weight. The
norm is a constant in the gradient (section 4.3 of the paper). PEFT and the authors' code apply dropout only to the
change that DoRA makes. With z' for z after dropout: y = z W^T + (g - 1) z' W^T + g s z' A^T B^T + bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from strop.engine.kernels.protocols import ActivationParameters, CpuOps, FrozenMatmul, LoraOps, Ops, ReusedBuffer, apply
from strop.engine.train import lora
from strop.engine.train.buffers import Allocate, Arena, allocate_from_heap
from strop.engine.train.dropout import DropoutOps, DropoutSpec, keep_scale
from strop.engine.train.lora import Adapters, Addend, InPlace, frozen_matmul
from strop.engine.train.norms import Norm
from strop.engine.train.peft_modules import ActiveAdapters, base_module, dropout_spec, find_active_adapters
from strop.models.quantize import QuantizedLinear

LoraOpsFor = Callable[[Sequence[int]], Callable[[Sequence[Tensor]], LoraOps]]
# Takes two functions, which return the dense weight and (int8 weight, scale) or None. Returns `FrozenLinear.weight`.
PrepareWeight = Callable[[Callable[[], Tensor], Callable[[], "tuple[Tensor, Tensor] | None"]], Callable[[], Any]]


@dataclass(frozen=True)
class Glu:
    """Computes activation(gate) * up before the down projection. The backward recomputes it."""

    ops: Ops
    activation: str

    def forward(self, x: Tensor, buffer: ReusedBuffer | None = None) -> Tensor:
        out = None if buffer is None else buffer(len(x), x.shape[1] // 2, x)
        return self.ops.glu(x, self.activation, out)

    def backward(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of x, and the output of the forward."""
        return self.ops.glu_backward(grad, x, self.activation)


@dataclass(frozen=True)
class Activation:
    """Computes activation(x), or activation(gate) * up if gated, with the model's module and autograd."""

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
    """Computes an ungated activation with compiled CPU kernels."""

    ops: CpuOps
    kind: str
    parameters: ActivationParameters

    def forward(self, x: Tensor, buffer: ReusedBuffer | None = None) -> Tensor:
        out = None if buffer is None else buffer(len(x), x.shape[1], x)
        return self.ops.activate(x, self.kind, self.parameters, out)

    def backward(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.ops.activate_backward(grad, x, self.kind, self.parameters)


ActivationModule = Glu | Activation | CompiledActivation
Prologue = Norm | ActivationModule | None


@dataclass(frozen=True)
class DroppedAdapters:
    """DoRA's adapters and the dropout of their inputs.

    The adapters' inputs z' are masked, but not multiplied by dropout's factor 1 / (1 - p). The scales of `adapters`
    include this factor instead.
    """

    adapters: Adapters
    dropped: DropoutSpec

    @property
    def undropped(self) -> Adapters:
        """The adapters without the factor 1 / (1 - p) in their scales."""
        pairs = zip(self.adapters.scales, self.dropped.thresholds, strict=True)
        return replace(self.adapters, scales=tuple(scale / keep_scale(threshold) for scale, threshold in pairs))

    def split(self, z: Tensor) -> Iterator[tuple[tuple[int, int], Tensor, float, Adapters]]:
        """Yield the output range of each adapter, its masked z' (a view), the factor 1 / (1 - p), and the adapter."""
        adapters = self.adapters
        for i, (columns, z_i) in enumerate(zip(adapters.columns, torch.split(z, adapters.width, 1), strict=True)):
            start, end = columns
            adapter = Adapters(adapters.parts[2 * i : 2 * i + 2], ((0, end - start),), adapters.scales[i : i + 1])
            yield columns, z_i, keep_scale(self.dropped.thresholds[i]), adapter


@dataclass(frozen=True)
class Dora:
    """The computations of DoRA. squared_norms (n,): |W|^2 of each row of the weight, fp32."""

    ops: Ops
    squared_norms: Tensor

    def gains(self, weight: Tensor, adapters: Adapters, magnitudes: Sequence[Tensor]) -> Tensor:
        """Return g (n,), which is 1 for outputs without an adapter. adapters: see DroppedAdapters.undropped.

        |W + s B A|^2 is computed from smaller matmuls than W + s B A, which has the size of W.
        """
        wide = self.squared_norms.dtype
        gains = torch.ones_like(self.squared_norms)
        for (a, b, scale), (start, end), m in zip(adapters, adapters.columns, magnitudes, strict=True):
            a, b = a.to(wide), b.to(wide)
            cross = (weight[start:end] @ a.t().to(weight.dtype)).to(wide)
            change = 2 * scale * (cross * b).sum(1) + scale**2 * ((b @ (a @ a.t())) * b).sum(1)
            gains[start:end] = m.to(wide) / (self.squared_norms[start:end] + change).clamp_(min=0).sqrt_()
        return gains

    def apply_(self, y: Tensor, z: Tensor, weight: Tensor, gains: Tensor, parts: DroppedAdapters) -> None:
        """Turn y (T, n) = s z' A^T B^T into (g - 1) z' W^T + g s z' A^T B^T. z: (T, adapters * k), each z'."""
        self.ops.scale_columns_(y, gains)
        for (start, end), z_i, factor, _ in parts.split(z):
            product = z_i @ weight[start:end].t()
            y[:, start:end] += self.ops.scale_columns_(product, (gains[start:end] - 1) * factor)

    def gains_gradient(self, grad: Tensor, gains: Tensor, z: Tensor, weight: Tensor, parts: DroppedAdapters) -> Tensor:
        """Return the gradient of g (n,), multiplied by g. Recomputes z' W^T + s z' A^T B^T, the factor of g."""
        grad_gains = torch.zeros_like(gains)
        for (start, end), z_i, factor, adapter in parts.split(z):
            product = z_i.new_empty(len(z_i), end - start)
            lora.forward(z_i, end - start, adapter)[0].into(product)
            product.addmm_(z_i, weight[start:end].t(), alpha=factor)
            upstream = grad[:, start:end].contiguous()
            grad_gains[start:end] = self.ops.scale_columns_backward(upstream, product, gains[start:end])[1]
        return grad_gains.mul_(gains)

    def add_input_gradient_(
        self, grad_z: Tensor, grad: Tensor, weight: Tensor, gains: Tensor, parts: DroppedAdapters
    ) -> None:
        """Add the gradient through (g - 1) z' W^T to grad_z (T, adapters * k)."""
        for (start, end), grad_z_i, factor, _ in parts.split(grad_z):
            upstream = grad[:, start:end].clone(memory_format=torch.contiguous_format)
            grad_z_i.addmm_(self.ops.scale_columns_(upstream, (gains[start:end] - 1) * factor), weight[start:end])


@dataclass(frozen=True)
class FrozenLinear:
    """The arguments of LoraLinear that are not differentiated: fused frozen linear layers and their adapters.

    Attributes:
        weight: returns the weight (n, k) in the form that `matmul` takes (a tensor for DoRA). The weight is valid until
            another one is requested, because all layers may be dequantized into the same buffer.
        columns: the output range of each adapter.
        buffer: memory for z, on a CPU.
        arena: memory for saved tensors, on a CPU.
        dropped: the dropout of z before the adapters.
        trained_biases: the output ranges whose bias is trained.
        trained_sizes: the number of outputs of each layer whose weight is trained; empty if the weight is frozen.
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
    trained_sizes: tuple[int, ...] = ()

    def adapter_inputs(self, z: Tensor) -> Tensor:
        """Return z. With dropout, return the concatenation of a masked copy of z for each adapter."""
        return z if self.dropped is None or self.dropout_ops is None else self.dropout_ops.apply_masks(z, self.dropped)

    def adapter_inputs_backward(self, grad: Tensor) -> Tensor:
        """Return the gradient of z, given the gradient of `adapter_inputs`."""
        if self.dropped is None or self.dropout_ops is None:
            return grad
        return self.dropout_ops.apply_masks_backward(grad, self.dropped)

    @property
    def num_parts(self) -> int:
        """The number of tensors of the adapters: A and B, and the magnitudes of DoRA."""
        return (2 if self.dora is None else 3) * len(self.scales)

    def split(self, parts: Sequence[Tensor]) -> tuple[Adapters, Sequence[Tensor]]:
        """Return the adapters and the magnitudes of DoRA."""
        factors = 2 * len(self.scales)
        adapters = Adapters(parts[:factors], self.columns, self.scales, self.dropped is not None)
        return adapters, parts[factors : self.num_parts]

    def dropped_dora(self, adapters: Adapters) -> DroppedAdapters | None:
        """Return the adapters with their dropout for DoRA with dropout, else None."""
        return None if self.dora is None or self.dropped is None else DroppedAdapters(adapters, self.dropped)

    def bias_gradients(self, grad: Tensor) -> list[Tensor]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        return [grad[:, start:end].sum(0, dtype=wide) for start, end in self.trained_biases]

    def weight_gradients(self, grad: Tensor, z: Tensor) -> list[Tensor]:
        """Return grad^T z of each trained layer, (n_i, k). Autograd casts it to the weight's dtype."""
        return [part.t() @ z for part in torch.split(grad, [*self.trained_sizes], 1)] if self.trained_sizes else []


class LoraLinear(Function):
    """Compute y = z W^T + bias + residual, and add scale_i (z_i A_i^T) B_i^T to y[:, columns_i] for each adapter i.

    z is the output of the prologue (a norm or an activation) for x, or x itself. z_i is z, or z after the dropout of
    adapter i.

    Args:
        x: (T, k), or (T, 2 k) for a gated activation.
        residual: (T, n), or None.
        parts: A_1 (r_1, k), B_1 (n_1, r_1), A_2, ..., the magnitudes of DoRA m_1 (n_1,), m_2, ..., the trained biases,
            the trained weights of a norm in the prologue, and the trained weights of the layers, which then have no
            adapters.

    Saves x and scale z A^T (T, sum of r). DoRA without dropout also saves y. Without a residual this takes no memory,
    because the next operation saves y too.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen: FrozenLinear, prologue: Prologue, residual: Tensor | None, *parts: Tensor
    ) -> Tensor:  # fmt: skip
        z = x if prologue is None else prologue.forward(x, frozen.buffer)
        ctx.frozen, ctx.prologue, weight = frozen, prologue, frozen.weight()
        new: Allocate = frozen.arena or allocate_from_heap
        ctx.generation = frozen.arena.generation if frozen.arena else 0
        y = new(len(z), len(weight), z)
        if not frozen.scales:
            ctx.save_for_backward(*([] if prologue is None and not frozen.trained_sizes else [x]))
            return frozen.matmul(z, weight, True, y, None, frozen.bias, residual)
        adapters, magnitudes = frozen.split(parts)
        inputs, dora, dropped = frozen.adapter_inputs(z), frozen.dora, frozen.dropped_dora(adapters)
        added, saved_by_lora = frozen.lora.forward(inputs, len(weight), adapters, new)
        if dora is not None and dropped is None:
            frozen.matmul(z, weight, True, y, added)
            gains = dora.gains(weight, adapters, magnitudes)
            dora.ops.scale_columns_(y, gains)
            if frozen.bias is not None:
                y += frozen.bias
            saved_by_lora = (gains, y, *saved_by_lora)
            y = y if residual is None else y + residual
        else:
            if dora is not None and dropped is not None:
                added.into(y)
                gains = dora.gains(weight, dropped.undropped, magnitudes)
                dora.apply_(y, inputs, weight, gains, dropped)
                added, saved_by_lora = InPlace(), (gains, *saved_by_lora)
            frozen.matmul(z, weight, True, y, added, frozen.bias, residual)
        ctx.save_for_backward(x, *parts[: frozen.num_parts], *saved_by_lora)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        frozen, prologue = ctx.frozen, ctx.prologue
        if frozen.arena:
            frozen.arena.check_generation(ctx.generation)
        x, *saved = ctx.saved_tensors or (grad,)  # without adapters and prologue, x is not needed
        norm_trained = isinstance(prologue, Norm) and bool(prologue.trained)
        grad, grad_z, needs_grad_z = grad.contiguous(), None, ctx.needs_input_grad[0] or norm_trained
        grad_residual = grad if ctx.needs_input_grad[3] else None
        bias_grads = frozen.bias_gradients(grad)
        added: Addend | None = None
        weight, inputs, upstream = None, None, grad  # inputs of the adapters, and the gradient of their outputs
        magnitude_grads: list[Tensor] = []
        if saved:
            count = frozen.num_parts
            (adapters, magnitudes), saved_by_lora = frozen.split(saved[:count]), tuple(saved[count:])
            dora, dropped = frozen.dora, frozen.dropped_dora(adapters)
            if dora is not None and dropped is not None:
                gains, saved_by_lora = saved_by_lora[0], saved_by_lora[1:]
                z = x if prologue is None else prologue.forward(x, frozen.buffer)
                weight, inputs = frozen.weight(), frozen.adapter_inputs(z)
                grad_gains = dora.gains_gradient(grad, gains, inputs, weight, dropped)
                upstream = dora.ops.scale_columns_(grad.clone(), gains)
            elif dora is not None:
                (gains, y), saved_by_lora = saved_by_lora[:2], saved_by_lora[2:]
                y = y if frozen.bias is None else y - frozen.bias
                grad, grad_gains = dora.ops.scale_columns_backward(grad, y, gains)
                upstream = grad
            for (start, end), m in zip(frozen.columns, magnitudes, strict=False):
                magnitude_grads.append((grad_gains[start:end] / m).to(m.dtype))
            added, grad_za = frozen.lora.backward(upstream, saved_by_lora, adapters)
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
            return grad_x, None, None, grad_residual, *bias_grads, *norm_grads, *frozen.weight_gradients(grad, z)
        inputs = frozen.adapter_inputs(z) if inputs is None else inputs
        part_grads = frozen.lora.gradients(upstream, inputs, grad_za, saved_by_lora, adapters)
        return grad_x, None, None, grad_residual, *part_grads, *magnitude_grads, *bias_grads, *norm_grads


class Workspace:
    """Buffers that all layers of a model share, for one dequantized weight and one prologue output at a time."""

    def __init__(self) -> None:
        self.prologue_output = ReusedBuffer()
        self._weights = ReusedBuffer()

    def dequantize(self, bases: Sequence[Any]) -> Tensor:
        """Return the dequantized weights of linear layers with the same input, concatenated to (n, k)."""
        quantized = next(base for base in bases if isinstance(base, QuantizedLinear))
        sizes = [base.out_features for base in bases]
        like = quantized.weight.new_empty(0, dtype=quantized.dtype)
        fused = self._weights(sum(sizes), quantized.in_features, like)
        for base, part in zip(bases, torch.split(fused, sizes), strict=True):
            if isinstance(base, QuantizedLinear):
                base.dequantize(part)
            else:
                part.copy_(base.weight.detach())
        return fused

    def cast(self, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return weights (n_i, k), concatenated to (n, k) in another dtype."""
        sizes = [len(weight) for weight in weights]
        fused = self._weights(sum(sizes), weights[0].shape[1], weights[0].new_empty(0, dtype=dtype))
        for weight, part in zip(weights, torch.split(fused, sizes), strict=True):
            part.copy_(weight.detach())
        return fused


class FusedLinear:
    """Linear modules with the same input, fused to one layer, and their active adapters.

    The modules' weights become views of the fused weight. Quantized modules, and trained modules in another dtype, are
    unchanged, and are converted when the weight is needed.
    """

    def __init__(
        self, modules: list[Any], prologue: Prologue, workspace: Workspace, lora_ops_for: LoraOpsFor,
        matmul_for: Callable[[Sequence[int]], FrozenMatmul], prepare_weight: PrepareWeight, dropout_ops: DropoutOps,
        ops: Ops, dtype: torch.dtype, arena: Arena | None = None,
    ) -> None:  # fmt: skip
        """Fuse the modules' weights.

        lora_ops_for, matmul_for, prepare_weight: Backend.lora, Backend.matmul and Backend.weight_loader. arena: memory
        for the output, which is saved for the backward, on a CPU. dtype: of the computation.
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
            self.weight = prepare_weight(lambda: workspace.dequantize(self.bases), self._fuse_int8_weight)
        elif weights[0].dtype != dtype:
            self.weight = lambda: workspace.cast([base.weight for base in self.bases], dtype)
        else:
            if not _are_contiguous(weights):
                _fuse(weights)
            # The weights may be loaded later, so the view is created at the first call.
            self.weight = prepare_weight(cache(lambda: _fuse(weights)), lambda: None)
        self._locations = [_location(base.weight) for base in self.bases]
        is_trained = all(weight.requires_grad for weight in weights)
        self._trained_sizes = tuple(base.out_features for base in self.bases) if is_trained else ()
        self.prepared_lora_ops: LoraOps | None = None  # set by kernels.cuda.lora.prepare_adapters

    def _fuse_int8_weight(self) -> tuple[Tensor, Tensor] | None:
        """Return the fused weight, int8 (n, k), and its scale (n,), or None unless all modules have int8 weights."""
        packed = [base.packed_weight() if isinstance(base, QuantizedLinear) else None for base in self.bases]
        scales = [weight.scale for weight in packed if weight is not None and weight.code is None]
        if len(scales) < len(self.bases):
            return None
        return _fuse([base.weight for base in self.bases]), torch.cat(scales)

    @property
    def out_features(self) -> int:
        return sum(base.out_features for base in self.bases)

    def active_adapters(self) -> ActiveAdapters:
        return find_active_adapters(self.modules, self.bases)

    def __call__(self, x: Tensor, token_keys: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply LoraLinear to x (T, k). token_keys (T,): for dropout, see dropout.token_keys."""
        for base, location in zip(self.bases, self._locations, strict=True):
            assert _location(base.weight) == location, (
                "the model's weights were moved or replaced after the training step was created"
            )
        active, prologue = self.active_adapters(), self.prologue
        prologue = prologue.with_current_weights() if isinstance(prologue, Norm) else prologue
        lora_ops = self.prepared_lora_ops or self._lora_ops(active.parts)
        dropped = dropout_spec(active.dropouts, token_keys)
        bias, trained_ranges, trained_biases = self._fuse_biases(x) if self._bias_trained else (self.bias, (), [])
        frozen = FrozenLinear(
            self.weight, bias, lora_ops, active.columns, active.scales, self._buffer, self._arena, dropped,
            self._dropout_ops, self._dora_for(active.magnitudes), trained_ranges, self._matmul, self._trained_sizes,
        )  # fmt: skip
        norm_weights = prologue.trained if isinstance(prologue, Norm) else ()
        trained_weights = [base.weight for base in self.bases] if self._trained_sizes else []
        parts = (*active.parts, *active.magnitudes, *trained_biases, *norm_weights, *trained_weights)
        return apply(LoraLinear, x, frozen, prologue, residual, *parts)

    def _fuse_biases(self, x: Tensor) -> tuple[Tensor, tuple[tuple[int, int], ...], list[Tensor]]:
        """Return the fused bias in the dtype of x, and the ranges and the tensors of the trained biases."""
        biases = [base.bias for base in self.bases]
        ends = accumulate(map(len, biases))
        ranges = tuple((end - len(b), end) for b, end in zip(biases, ends, strict=True) if b.requires_grad)
        trained = [bias for bias in biases if bias.requires_grad]
        return torch.cat([bias.detach().to(x.dtype) for bias in biases]), ranges, trained

    def _dora_for(self, magnitudes: list[Tensor]) -> Dora | None:
        """Return a cached Dora if there are magnitudes, else None."""
        if magnitudes and self._dora is None:
            weight = self.weight()
            wide = torch.promote_types(weight.dtype, torch.float32)
            self._dora = Dora(self._ops, torch.linalg.vector_norm(weight, dim=1, dtype=wide).square())
        return self._dora if magnitudes else None


def _location(weight: Tensor) -> tuple[int, int]:
    """Return (identifier of the weight's storage, offset). The identifier stays the same if the memory is replaced."""
    return weight.untyped_storage()._cdata, int(weight.storage_offset())


def _are_contiguous(parts: list[nn.Parameter]) -> bool:
    """Return whether the parts follow each other in memory without gaps."""
    storage, offset = _location(parts[0])
    for part in parts:
        if _location(part) != (storage, offset) or not part.is_contiguous():
            return False
        offset += part.numel()
    return True


def _fuse(parts: list[nn.Parameter]) -> Tensor:
    """Concatenate the rows of all parts, and make the parts views of the result."""
    first = parts[0].data
    if len(parts) == 1:
        return first
    if _are_contiguous(parts):
        return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
    fused = torch.cat([part.data for part in parts])
    for part, view in zip(parts, torch.split(fused, [len(part) for part in parts]), strict=True):
        part.data = view
    return fused
