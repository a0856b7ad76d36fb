"""The frozen base out of a Source, of which this process reads and keeps one share (strop.models.sharding).

Of weights that lie in the file as they are computed with, and of quantized ones, the bytes of the share alone are read;
others (another type, a mixture's experts that are joined while loading, layers that are dequantized once) are made one
tensor after the other, and the share is kept. What is small, norms and biases, is there whole.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from strop.errors import ModelError
from strop.models.experts import PackedExperts, as_quantized
from strop.models.load import finished, from_config, load_config, packed_folder, refuse_prequantized, skeleton
from strop.models.load import weights_folder as whole_folder
from strop.models.quantize import QuantizedLinear, layer_number, put_module, replace_linears
from strop.models.sharding import Parts, Slot, cut, dense, of_whole
from strop.models.source import BITS, Source
from strop.models.tensor_files import Tensors, is_finite, typed
from strop.models.tensor_names import Group, Layout

LOG = logging.getLogger(__name__)
LARGE = ("weight", "absmax", "nested_absmax", "SCB")  # of a quantized weight; its other constants are there whole


def load_share(
    source: Source,
    dtype: torch.dtype,
    device: str,
    rank: int,
    world: int,
    *,
    quantization: str = "none",
    double: bool = True,
    resident_layers: int = 0,
) -> tuple[nn.Module, Parts]:
    """The model in eval mode, whose large weights are empty until they are gathered, and this process's share of them.

    Arguments as for `load_base`. Raises ModelError where weights are missing, do not fit or are not finite.
    """
    LOG.info("loading 1/%d of the weights of %s", world, source.name)
    if quantization == "none":
        refuse_prequantized(source)
    folder = whole_folder(source) if quantization == "none" else packed_folder(source, quantization, double, dtype)
    with init_empty_weights(include_buffers=False):
        model: Any = from_config(load_config(source))
    model.tie_weights()
    reader = _Reader(model, source, folder, dtype, device, quantization, resident_layers)
    parts = cut(model, reader.slots, rank, world, device)
    for key, weight in list(model.named_parameters()):
        if weight.device.type == "meta" and (found := reader.small(key)) is not None:
            owner, _, leaf = key.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(found, requires_grad=False))
    for key, buffer in list(model.named_buffers()):
        owner, _, leaf = key.rpartition(".")
        kept = reader.tensors.get(key).to(buffer.dtype) if key in reader.tensors else buffer
        model.get_submodule(owner)._buffers[leaf] = kept.to(device)
    model.tie_weights()
    lost = [key for key, weight in model.named_parameters() if weight.device.type == "meta"]
    if lost:
        what = f"{source.name}: {len(lost)} weights are missing or of another shape, first {lost[0]}"
        raise ModelError(what, fix="use --model.placement replicated")
    return finished(model, source), parts


class _Reader:
    """How each parameter of a model without weights is read."""

    def __init__(
        self, model: Any, source: Source, folder: Any, dtype: torch.dtype, device: str, scheme: str, resident: int
    ) -> None:
        self.model, self.source, self.scheme, self.resident = model, source, scheme, resident
        self.tensors, self.dtype, self.device = Tensors(folder), dtype, device
        self._typed = typed(model, dtype)
        self._linears: dict[str, QuantizedLinear] = {}
        self._groups: dict[str, Group] = {}
        self._read: tuple[Group | None, dict[str, Tensor]] = (None, {})
        if scheme == "none":
            self._layout = Layout(skeleton(source), self.tensors).check(source.name, self.tensors)
            self._groups = {place: group for group in self._layout.groups for place in self._layout.places(group)}
        else:
            packed = self.tensors.is_packed
            self._linears = replace_linears(model, scheme, dtype, lambda name: packed(f"{name}.weight"))

    def slots(self, key: str, weight: nn.Parameter) -> list[Slot] | None:
        """None: it is small, or not there."""
        path, _, leaf = key.rpartition(".")
        if path in self._linears and leaf == "weight":
            return self._of_linear(key, path, self._linears[path])
        if weight.dim() == 3 and self.scheme != "none" and self.tensors.is_packed(key):
            return self._of_experts(key, path, leaf, weight.shape)
        if weight.dim() < 2 or not self._there(key, weight.shape):
            return None
        wanted = self._typed(key, torch.empty(0, dtype=self.dtype)).dtype
        owner = self.model.get_submodule(path)
        return [dense(key, owner, leaf, wanted, weight.shape, self._reading(key, wanted))]

    def small(self, key: str) -> Tensor | None:
        weight = self.model.get_parameter(key)
        if not self._there(key, weight.shape):
            return None
        found = self._whole(key).to(self.device)
        if not is_finite(found):
            raise ModelError(f"{self.source.name}: weight {key} holds NaN or infinity", fix="fetch the model again")
        return found

    def _there(self, key: str, shape: torch.Size) -> bool:
        if self.scheme == "none":
            group = self._groups.get(key)
            return group is not None and (group.converter is not None or self._fits(group.names[0], shape))
        return key in self.tensors and self._fits(key, shape)

    def _fits(self, name: str, shape: torch.Size) -> bool:
        return self.tensors.shape(name) == list(shape)

    def _reading(self, key: str, wanted: torch.dtype) -> Callable[[int, int], Tensor]:
        """The bytes of the share alone where they lie in the file as they are wanted."""
        group = self._groups.get(key)
        name = key if group is None else group.names[0]
        plain = group is None or group.converter is None
        if plain and self.tensors.dtype(name) == wanted:
            return partial(self.tensors.part, name)
        return of_whole(partial(self._whole, key))

    def _whole(self, key: str) -> Tensor:
        """A parameter as the model holds it."""
        if self.scheme != "none":
            return self._typed(key, self.tensors.get(key))
        group = self._groups[key]
        if self._read[0] is not group:  # what is joined while it loads may become several parameters
            self._read = group, self._layout.read(group, self.tensors.get)
        return self._typed(key, self._read[1][key])

    def _of_linear(self, key: str, path: str, layer: QuantizedLinear) -> list[Slot]:
        number = layer_number(path)
        if number is None or number < self.resident:
            with torch.device("meta"):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.bias = layer.bias
            put_module(self.model, path, plain)
            shape = (layer.out_features, layer.in_features)
            return [dense(key, plain, "weight", self.dtype, shape, of_whole(partial(self._dequantized, key, plain)))]
        names = {"weight": key, **self.tensors.names_under(key)}
        small = {short: self.tensors.get(name) for short, name in names.items() if short not in LARGE}
        try:
            layer.fill({"weight": torch.empty(0, dtype=torch.uint8), **small}, self._sizes(names))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{key}: not a {self.scheme} weight ({error})", fix="quantize it again") from None
        layer.constants = {short: tensor.to(self.device) for short, tensor in layer.constants.items()}

        def put(short: str, view: Tensor) -> None:
            if short == "weight":
                layer.weight = nn.Parameter(view, requires_grad=False)
            else:
                layer.constants[short] = view

        return self._packed(names, put)

    def _sizes(self, names: dict[str, str]) -> dict[str, int]:
        """Bytes of a packed weight, numbers of each constant."""
        sizes = {short: math.prod(self.tensors.shape(name)) for short, name in names.items()}
        return {**sizes, "weight": sizes["weight"] * BITS[self.tensors.kind(names["weight"])] // 8}

    def _dequantized(self, key: str, like: nn.Linear) -> Tensor:
        layer = QuantizedLinear(like, self.scheme, self.dtype)
        layer.fill({"weight": self.tensors.get(key), **self.tensors.under(key)})
        return layer.dequantized()

    def _of_experts(self, key: str, path: str, leaf: str, shape: torch.Size) -> list[Slot]:
        names, number = {"weight": key, **self.tensors.names_under(key)}, layer_number(path)
        owner = self.model.get_submodule(path)
        if number is None or number < self.resident:

            def whole() -> Tensor:
                packed = {short: self.tensors.get(name) for short, name in names.items()}
                return PackedExperts(packed, shape, self.scheme, self.dtype).whole()

            return [dense(key, owner, leaf, self.dtype, shape, of_whole(whole))]
        empty = torch.empty(0, dtype=torch.uint8)
        small = {short: empty if short in LARGE else self.tensors.get(name) for short, name in names.items()}
        held = PackedExperts(small, shape, self.scheme, self.dtype).to(torch.device(self.device))
        as_quantized(owner).hold(leaf, held)
        return self._packed(names, held.packed.__setitem__)

    def _packed(self, names: dict[str, str], put: Callable[[str, Tensor], None]) -> list[Slot]:
        """Slots of the bytes, and of the constants that are many."""
        found = []
        for short, name in names.items():
            if short in LARGE:
                kind = self.tensors.dtype(name)
                assert kind is not None, name
                found.append(
                    Slot(name, self.tensors.shape(name), kind, partial(put, short), partial(self.tensors.part, name))
                )
        return found
