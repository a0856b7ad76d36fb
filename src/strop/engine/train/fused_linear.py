"""Frozen linear layers of a model that share their input, laid side by side, with the adapters on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from strop.engine.kernels.protocols import FrozenProduct, LoraProducts, Ops, Room, apply
from strop.engine.train.arena import Arena
from strop.engine.train.dora import Dora
from strop.engine.train.dropout import CountedDropout, Dropped, Drops, grown
from strop.engine.train.full_modules import without
from strop.engine.train.lora_linear import Enter, Frozen, LoraLinear
from strop.engine.train.norms import Norm
from strop.models.quantize import QuantizedLinear

ProductsOf = Callable[[Sequence[int]], Callable[[Sequence[Tensor]], LoraProducts]]
Held = Callable[[Callable[[], Tensor], Callable[[], "tuple[Tensor, Tensor] | None"]], Callable[[], Any]]


def base_of(module: Any) -> Any:
    """The model's own module, under an adapter, new tokens or a copy that is trained in full."""
    return module.base_layer if isinstance(module, LoraLayer) else without(module)


@dataclass(frozen=True)
class OnIt:
    """The adapters on linear modules that share their input: A_1, B_1, A_2, ..., DoRA's magnitudes, the columns and
    scales of Adapters, and the module of each that drops."""

    parts: list[Tensor]
    magnitudes: list[Tensor]
    columns: tuple[tuple[int, int], ...]
    scales: tuple[float, ...]
    dropouts: list[Any]


def adapters_on(modules: Sequence[Any], bases: Sequence[Any]) -> OnIt:
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
                    scales.append(float(module.scaling[name]) * grown(_level(dropouts[-1])))
        at += width
    return OnIt(adapters, magnitudes, tuple(columns), tuple(scales), dropouts)


class Joined:
    """Linear modules that share their input, as one frozen weight, with the adapters that are active on them now.

    Quantized modules stay as they are, and give their weight when it is needed.
    """

    def __init__(
        self,
        modules: list[Any],
        enter: Enter,
        workspace: Workspace,
        products_of: ProductsOf,
        product_of: Callable[[Sequence[int]], FrozenProduct],
        held: Held,
        drops: Drops,
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
        if any(isinstance(base, QuantizedLinear) for base in self.bases):
            self.weight = held(lambda: workspace.side_by_side(self.bases), self._eight_bit)
        else:
            if not _lie_so(weights):
                _side_by_side(weights)
            # taken once they are there, and a view from then on
            self.weight = held(cache(lambda: _side_by_side(weights)), lambda: None)
        self.places = [_place(base.weight) for base in self.bases]
        self.operands: LoraProducts | None = None  # of the adapters, where they are laid out beforehand

    def _eight_bit(self) -> tuple[Tensor, Tensor] | None:
        """int8 (n, k) and scale (n,) of all modules, which become views of them; None where one is not in 8 bit."""
        packed = [base.packed_weight() if isinstance(base, QuantizedLinear) else None for base in self.bases]
        scales = [one.scale for one in packed if one is not None and one.code is None]
        if len(scales) < len(self.bases):
            return None
        return _side_by_side([base.weight for base in self.bases]), torch.cat(scales)

    @property
    def outputs(self) -> int:
        return sum(base.out_features for base in self.bases)

    def on_it(self) -> OnIt:
        """The adapters that are active now."""
        return adapters_on(self.modules, self.bases)

    def __call__(self, x: Tensor, tokens: Tensor, residual: Tensor | None = None) -> Tensor:
        """tokens: the key of each row of x (dropout.token_keys)."""
        for base, place in zip(self.bases, self.places, strict=True):
            assert _place(base.weight) == place, "the model's weights were moved or replaced after FastLoss"
        now, enter = self.on_it(), self.enter
        enter = enter.now() if isinstance(enter, Norm) else enter
        products, dropped = self.operands or self._products(now.parts), dropped_by(now.dropouts, tokens)
        lies = now.columns, now.scales, self.room, self._arena, dropped, self.drops
        bias, biased, trained = self._biases(x) if self._trained else (self.bias, (), [])
        frozen = Frozen(self.weight, bias, products, *lies, self._dora_of(now.magnitudes), biased, self._product)
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
    return dropout.level if isinstance(dropout, CountedDropout) else 0


def dropped_by(dropouts: Sequence[Any], tokens: Tensor) -> Dropped | None:
    """What the adapters with these dropouts, each CountedDropout or Identity, drop now; None: nothing."""
    levels = tuple(map(_level, dropouts))
    counted = [dropout for dropout in dropouts if isinstance(dropout, CountedDropout)]
    if not any(levels):
        return None
    masks, numbers = counted[0].masks, tuple(getattr(dropout, "number", 0) for dropout in dropouts)
    return Dropped(masks.seed, masks.step, tokens, numbers, levels)


class Workspace:
    """What the layers of a model compute in, one after the other: a weight that quantized layers give, and what a norm
    or a GLU hands to the products behind it."""

    def __init__(self) -> None:
        self.entered = Room()
        self._weights = Room()

    def side_by_side(self, bases: Sequence[Any]) -> Tensor:
        """The weights of linear layers with the same input, dequantized, as rows of one (n, k)."""
        like = next(base for base in bases if isinstance(base, QuantizedLinear))
        rows = sum(base.out_features for base in bases)
        whole, at = self._weights(rows, like.in_features, like.weight.new_empty(0, dtype=like.dtype)), 0
        for base in bases:  # one at a time: two of an 8B model's are 235 MB
            place = whole[at : at + base.out_features]
            if isinstance(base, QuantizedLinear):
                base.dequantize(place)
            else:
                place.copy_(base.weight.detach())
            at += base.out_features
        return whole


def _place(weight: Tensor) -> tuple[int, int]:
    """Which memory holds it, and where in it: that memory may be emptied and filled again."""
    return weight.untyped_storage()._cdata, int(weight.storage_offset())


def _lie_so(parts: list[nn.Parameter]) -> bool:
    """Whether the rows of each follow those of the one before."""
    memory, at = _place(parts[0])
    for part in parts:
        if _place(part) != (memory, at) or not part.is_contiguous():
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
