"""Load a frozen base of which each process keeps one share, and gather its weights unit by unit."""

# A unit is the weights of a decoder layer, or of an embedding, as contiguous bytes cut into equal shares; bytes are
# stored, sent and compared, so 4-bit weights are never seen as floats. The modules' weights are views of a buffer that
# is empty but while all shares are gathered; the views stay valid, so what autograd saved of them is right when the
# bytes are back. For quantized weights, and those stored as they are computed with, a process reads only its share's
# bytes. Others (another dtype, experts joined while loading, resident layers) are made one tensor at a time, and only
# the share is kept. Small tensors, norms and biases, are loaded whole.

from __future__ import annotations

import logging
import math
import mmap
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from strop.errors import ModelError
from strop.models.experts import PackedExperts, make_quantized
from strop.models.families.layers import text_decoder
from strop.models.load import (
    build_from_config,
    check_not_prequantized,
    load_config,
    load_without_weights,
    prepare_frozen,
    quantized_folder,
    weights_folder,
)
from strop.models.quantize import QuantizedLinear, dequantize_weight, layer_index, replace_linears, set_attribute
from strop.models.source import DTYPE_BITS, Source
from strop.models.tensor_files import (
    CheckpointLayout,
    CheckpointTensors,
    TensorGroup,
    dtype_caster,
    is_finite,
    load_packed,
)

LOG = logging.getLogger(__name__)

EMBEDDING, HEAD = "embedding", "head"
ModuleKey = int | str  # the index of a decoder layer, EMBEDDING or HEAD
GRAIN = 64  # bytes; shares are multiples of it, so that no element is cut
DIGEST_WORDS = 1 << 20  # processed at a time
WORD = torch.int32
LARGE = ("weight", "absmax", "nested_absmax", "SCB")  # sharded parts of a quantized weight; the others are loaded whole


@dataclass(frozen=True)
class ShardedTensor:
    """One tensor of a unit."""

    name: str
    shape: Sequence[int]
    dtype: torch.dtype
    put: Callable[[Tensor], None]  # sets the tensor in its module
    read: Callable[[int, int], Tensor]  # returns its bytes from `low` to `high`, shape (high - low,), uint8

    @property
    def size(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


class ShardedUnit:
    """The tensors of one module that are gathered together."""

    # shard: this process's share, (n,) uint8. whole: all shares, (world * n,) uint8, between `allocate` and `free`.

    def __init__(self, name: str, tensors: Sequence[ShardedTensor], rank: int, world: int, device: str) -> None:
        """Read this process's share. Raises ModelError where a weight in it is not finite."""
        self.name = name
        tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # so that each tensor is aligned
        self.size = sum(tensor.size for tensor in tensors)
        share = -(-self.size // (GRAIN * world)) * GRAIN
        self.begin = rank * share
        self._pages: mmap.mmap | None = None
        if device == "cpu" and sys.platform == "linux":
            # Not on the heap, where allocating and freeing would leave holes between the activations that stay.
            self._pages = mmap.mmap(-1, world * share, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.whole = torch.frombuffer(self._pages, dtype=torch.uint8)
        else:
            self.whole = torch.empty(world * share, dtype=torch.uint8, device=device)
        self.shard = torch.zeros(share, dtype=torch.uint8, device=device)
        start = 0
        for tensor in tensors:
            low, high = max(start, self.begin), min(start + tensor.size, self.begin + share)
            if low < high:
                part = self.shard[low - self.begin : high - self.begin]
                part.copy_(tensor.read(low - start, high - start))
                if tensor.dtype.is_floating_point and not is_finite(part.view(tensor.dtype)):
                    raise ModelError(f"weight {tensor.name} holds NaN or infinity", fix="download the model again")
            # .data: otherwise autograd would treat gathering as an in-place change of the weights
            tensor.put(self.whole[start : start + tensor.size].data.view(tensor.dtype).view(*tensor.shape))
            start += tensor.size
        self.free()

    def allocate(self) -> Tensor:
        self.is_gathered = True
        if self._pages is None:
            self.whole.untyped_storage().resize_(self.whole.numel())
        return self.whole

    def free(self) -> None:
        """Free the memory of `whole`; its address stays reserved."""
        self.is_gathered = False
        if self._pages is not None:
            self._pages.madvise(mmap.MADV_DONTNEED)
        else:
            self.whole.untyped_storage().resize_(0)

    def shard_digest(self) -> int:
        """Return this share's part of the unit's digest; the parts of all shares add up to it, modulo 2^64."""
        return digest(self.shard, self.begin)

    def digest(self) -> int:
        return digest(self.whole, 0)


def digest(data: Tensor, begin: int) -> int:
    """Return the sum over 32-bit words of word * (2 * index + 1), modulo 2^64, which any changed word changes."""
    words, first, total = data.view(WORD), begin // WORD.itemsize, 0
    for start in range(0, len(words), DIGEST_WORDS):
        chunk = words[start : start + DIGEST_WORDS].long()
        indices = torch.arange(first + start, first + start + len(chunk), device=data.device)
        total += int((chunk * (2 * indices + 1)).sum())
    return total % (1 << 64)


@dataclass(frozen=True)
class ModelShards:
    """The units of a model and their modules, in the order in which a forward needs them."""

    units: dict[ModuleKey, ShardedUnit]
    modules: dict[ModuleKey, nn.Module]
    whole_bytes: int  # size of all sharded weights
    held_bytes: int  # this process's share of them, in memory between two steps

    @property
    def forward(self) -> list[ModuleKey]:
        """The order of a forward; a unit shared by embedding and head appears twice."""
        layers = [key for key in self.units if isinstance(key, int)]
        return [key for key in (EMBEDDING, *layers, HEAD) if key in self.units]

    def distinct(self) -> list[ShardedUnit]:
        return list({id(unit): unit for unit in self.units.values()}.values())


def shard_model(
    model: Any,
    tensors_of: Callable[[str, nn.Parameter], list[ShardedTensor] | None],
    rank: int,
    world: int,
    device: str,
) -> ModelShards:
    """Shard a model on meta tensors over `world` processes. tensors_of: None for parameters loaded whole."""
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules: dict[ModuleKey, nn.Module] = {EMBEDDING: inputs, **dict(enumerate(_decoder_layers(model))), HEAD: head}
    paths = {id(module): path for path, module in model.named_modules()}
    units: dict[ModuleKey, ShardedUnit] = {}
    unit_of: dict[int, tuple[ShardedUnit, nn.Parameter]] = {}  # holds the weight, so that its id is not reused
    whole_bytes = held_bytes = 0
    for key, module in modules.items():
        tensors: list[ShardedTensor] = []
        new = [(name, weight) for name, weight in module.named_parameters() if id(weight) not in unit_of]
        shared = [unit_of[id(weight)][0] for _, weight in module.named_parameters() if id(weight) in unit_of]
        sharded: list[nn.Parameter] = []
        for name, weight in new:
            parts = tensors_of(f"{paths[id(module)]}.{name}", weight)
            tensors += parts or []
            sharded += [weight] if parts else []
        if tensors:
            name = f"layer {key}" if isinstance(key, int) else f"the {key}"
            units[key] = ShardedUnit(name, tensors, rank, world, device)
            unit_of |= {id(weight): (units[key], weight) for weight in sharded}
            whole_bytes, held_bytes = whole_bytes + units[key].size, held_bytes + units[key].shard.numel()
        elif shared:
            units[key] = shared[0]
    return ModelShards(units, {key: modules[key] for key in units}, whole_bytes, held_bytes)


def _decoder_layers(model: Any) -> nn.ModuleList:
    decoder = text_decoder(model)[0]
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList):
        return layers
    return max((module for module in decoder.modules() if isinstance(module, nn.ModuleList)), key=len)


def load_sharded(
    source: Source,
    dtype: torch.dtype,
    device: str,
    rank: int,
    world: int,
    *,
    quantization: str = "none",
    double: bool = True,
    resident_layers: int = 0,
) -> tuple[nn.Module, ModelShards]:
    """Return the model in eval mode, its large weights empty until gathered, and this process's share of them."""
    LOG.info("loading 1/%d of the weights of %s", world, source.name)
    if quantization == "none":
        check_not_prequantized(source)
        folder = weights_folder(source)
    else:
        folder = quantized_folder(source, quantization, double, dtype)
    with init_empty_weights(include_buffers=False):
        model: Any = build_from_config(load_config(source))
    model.tie_weights()
    reader = _ShardReader(model, source, folder, dtype, device, quantization, resident_layers)
    shards = shard_model(model, reader.sharded_tensors, rank, world, device)
    for key, weight in list(model.named_parameters()):
        if weight.device.type == "meta" and (small := reader.read_small(key)) is not None:
            set_attribute(model, key, nn.Parameter(small, requires_grad=False))
    for key, buffer in list(model.named_buffers()):
        value = reader.tensors.get(key).to(buffer.dtype) if key in reader.tensors else buffer
        set_attribute(model, key, value.to(device))
    model.tie_weights()
    lost = [key for key, weight in model.named_parameters() if weight.device.type == "meta"]
    if lost:
        what = f"{source.name}: {len(lost)} weights are missing or of another shape, first {lost[0]}"
        raise ModelError(what, fix="use --model.placement replicated")
    return prepare_frozen(model, source), shards


class _ShardReader:
    def __init__(
        self, model: Any, source: Source, folder: Path, dtype: torch.dtype, device: str, scheme: str, resident: int
    ) -> None:
        self.model, self.source, self.scheme, self.resident = model, source, scheme, resident
        self.tensors, self.dtype, self.device = CheckpointTensors(folder), dtype, device
        self._cast = dtype_caster(model, dtype)
        self._linears: dict[str, QuantizedLinear] = {}
        self._groups: dict[str, TensorGroup] = {}
        self._last_read: tuple[TensorGroup | None, dict[str, Tensor]] = (None, {})
        if scheme == "none":
            self._layout = CheckpointLayout(load_without_weights(source), self.tensors)
            self._layout.check(source.name, self.tensors)
            self._groups = {name: group for group in self._layout.groups for name in self._layout.parameters(group)}
        else:
            is_packed = self.tensors.is_packed
            self._linears = replace_linears(model, scheme, dtype, lambda name: is_packed(f"{name}.weight"))

    def sharded_tensors(self, key: str, weight: nn.Parameter) -> list[ShardedTensor] | None:
        """Return how to read a parameter's tensors; None if it is small or not in the checkpoint."""
        path, _, leaf = key.rpartition(".")
        if path in self._linears and leaf == "weight":
            return self._linear_tensors(key, path, self._linears[path])
        if weight.dim() == 3 and self.scheme != "none" and self.tensors.is_packed(key):
            return self._experts_tensors(key, path, leaf, weight.shape)
        if weight.dim() < 2 or not self._is_stored(key, weight.shape):
            return None
        dtype = self._cast(key, torch.empty(0, dtype=self.dtype)).dtype
        return [self._parameter_tensor(key, dtype, weight.shape, self._read_function(key, dtype))]

    def read_small(self, key: str) -> Tensor | None:
        weight = self.model.get_parameter(key)
        if not self._is_stored(key, weight.shape):
            return None
        tensor = self._read_whole(key).to(self.device)
        if not is_finite(tensor):
            raise ModelError(f"{self.source.name}: weight {key} holds NaN or infinity", fix="download the model again")
        return tensor

    def _is_stored(self, key: str, shape: torch.Size) -> bool:
        group, name = self._groups.get(key), key
        if self.scheme == "none":
            if group is None or group.converter is not None:
                return group is not None
            name = group.names[0]
        return name in self.tensors and self.tensors.shape(name) == list(shape)

    def _read_function(self, key: str, dtype: torch.dtype) -> Callable[[int, int], Tensor]:
        """Read only the share's bytes where the file has the dtype that is needed."""
        group = self._groups.get(key)
        name = key if group is None else group.names[0]
        is_unconverted = group is None or group.converter is None
        if is_unconverted and self.tensors.dtype(name) == dtype:
            return partial(self.tensors.read_bytes, name)
        return _slice_of_whole(partial(self._read_whole, key))

    def _read_whole(self, key: str) -> Tensor:
        """Return a parameter in the model's dtype."""
        if self.scheme != "none":
            return self._cast(key, self.tensors.get(key))
        group = self._groups[key]
        if self._last_read[0] is not group:  # one group may become several parameters
            self._last_read = group, self._layout.read(group, self.tensors.get)
        return self._cast(key, self._last_read[1][key])

    def _linear_tensors(self, key: str, path: str, layer: QuantizedLinear) -> list[ShardedTensor]:
        index = layer_index(path)
        if index is None or index < self.resident:
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.bias = layer.bias
            set_attribute(self.model, path, plain)
            shape = plain.weight.shape

            def dequantize() -> Tensor:
                return dequantize_weight(self.tensors.get_packed(key), self.scheme, shape, self.dtype)

            return [self._parameter_tensor(key, self.dtype, shape, _slice_of_whole(dequantize))]
        names = {"weight": key, **self.tensors.constant_names(key)}
        small = {short: self.tensors.get(name) for short, name in names.items() if short not in LARGE}
        packed = {"weight": torch.empty(0, dtype=torch.uint8), **small}
        sizes = {short: math.prod(self.tensors.shape(name)) for short, name in names.items()}  # elements
        sizes["weight"] = sizes["weight"] * DTYPE_BITS[self.tensors.stored_dtype(key)] // 8  # bytes
        load_packed(layer, packed, f"{self.source.name}: {key}", sizes)
        layer.constants = {short: tensor.to(self.device) for short, tensor in layer.constants.items()}

        def put(short: str, view: Tensor) -> None:
            if short == "weight":
                layer.weight = nn.Parameter(view, requires_grad=False)
            else:
                layer.constants[short] = view

        return self._packed_tensors(names, put)

    def _experts_tensors(self, key: str, path: str, leaf: str, shape: torch.Size) -> list[ShardedTensor]:
        names, index = {"weight": key, **self.tensors.constant_names(key)}, layer_index(path)
        if index is None or index < self.resident:

            def read_whole() -> Tensor:
                return PackedExperts(self.tensors.get_packed(key), shape, self.scheme, self.dtype).dequantize_all()

            return [self._parameter_tensor(key, self.dtype, shape, _slice_of_whole(read_whole))]
        empty = torch.empty(0, dtype=torch.uint8)
        small = {short: empty if short in LARGE else self.tensors.get(name) for short, name in names.items()}
        packed_experts = PackedExperts(small, shape, self.scheme, self.dtype).to(torch.device(self.device))
        make_quantized(self.model.get_submodule(path)).set_packed(leaf, packed_experts)
        return self._packed_tensors(names, packed_experts.packed.__setitem__)

    def _parameter_tensor(
        self, key: str, dtype: torch.dtype, shape: Sequence[int], read: Callable[[int, int], Tensor]
    ) -> ShardedTensor:
        def put(view: Tensor) -> None:
            set_attribute(self.model, key, nn.Parameter(view, requires_grad=False))

        return ShardedTensor(key, shape, dtype, put, read)

    def _packed_tensors(self, names: dict[str, str], put: Callable[[str, Tensor], None]) -> list[ShardedTensor]:
        tensors = []
        for short, name in names.items():
            if short in LARGE:
                dtype = self.tensors.dtype(name)
                assert dtype is not None, name
                read = partial(self.tensors.read_bytes, name)
                tensors.append(ShardedTensor(name, self.tensors.shape(name), dtype, partial(put, short), read))
        return tensors


def _slice_of_whole(make: Callable[[], Tensor]) -> Callable[[int, int], Tensor]:
    """Return a function that reads bytes of a tensor that can only be made whole."""
    return lambda low, high: make().contiguous().flatten().view(torch.uint8)[low:high]
