"""Load a frozen base of which each process stores one share, and gather the weights of one layer at a time."""

# A layer (a decoder layer, the embedding or the head) is stored as contiguous bytes, which are cut into one equal share
# per process. Bytes are stored, sent and compared, so 4-bit weights are never treated as floats. The weights of modules
# are views of a buffer that has memory only while all shares are gathered. Its address does not change, so tensors that
# autograd saved are valid again after the next gather. A process reads only its share of quantized weights and of
# weights stored in the model's dtype. Other weights (of another dtype, experts that are joined while loading, and
# resident layers, which are quantized and dequantized while loading) are read whole, one tensor at a time. Small
# tensors, such as norms and biases, are not sharded.

from __future__ import annotations

import logging
import math
import mmap
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from strop.errors import ModelError
from strop.machine.memory import map_pages
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
    check_finite,
    dtype_caster,
    load_packed,
)

LOG = logging.getLogger(__name__)

EMBEDDING, HEAD = "embedding", "head"
ModuleKey = int | str  # the index of a decoder layer, EMBEDDING or HEAD
GRAIN = 64  # bytes; shares are multiples of it, so that no element is cut
DIGEST_WORDS = 1 << 20  # processed at a time
WORD = torch.int32
SHARDED_PARTS = ("weight", "absmax", "nested_absmax", "SCB")  # of a quantized weight; the others are not sharded


@dataclass(frozen=True)
class ShardedTensor:
    """One tensor of a sharded layer.

    assign: sets the tensor in its module.
    read: returns its bytes from `low` to `high`, shape (high - low,), uint8.
    """

    name: str
    shape: Sequence[int]
    dtype: torch.dtype
    assign: Callable[[Tensor], None]
    read: Callable[[int, int], Tensor]

    @property
    def size(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


class ShardedLayer:
    """The tensors of a layer, which are gathered together.

    shard: this process's share, shape (n,), uint8.
    whole: all shares, shape (world * n,), uint8; valid between `allocate` and `free`.
    """

    def __init__(self, name: str, tensors: Sequence[ShardedTensor], rank: int, world: int, device: str) -> None:
        """Read this process's share. Raises ModelError if it contains NaN or infinity."""
        self.name = name
        tensors = in_layer_order(tensors)
        self.size = sum(tensor.size for tensor in tensors)
        share = -(-self.size // (GRAIN * world)) * GRAIN
        self.begin = rank * share
        self._pages: mmap.mmap | None = None
        if device == "cpu" and sys.platform == "linux":
            # Not on the heap, where allocating and freeing would leave holes between activations.
            self._pages = map_pages(world * share)
            self.whole = torch.frombuffer(self._pages, dtype=torch.uint8)
        else:
            self.whole = torch.empty(world * share, dtype=torch.uint8, device=device)
        self.shard = torch.zeros(share, dtype=torch.uint8, device=device)
        start = 0
        assign_views(tensors, self.whole)
        for tensor in tensors:
            low, high = max(start, self.begin), min(start + tensor.size, self.begin + share)
            if low < high:
                part = self.shard[low - self.begin : high - self.begin]
                part.copy_(tensor.read(low - start, high - start))
                check_finite(part.view(tensor.dtype), f"weight {tensor.name}")
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
        if sys.platform != "win32" and self._pages is not None:
            self._pages.madvise(mmap.MADV_DONTNEED)
        else:
            self.whole.untyped_storage().resize_(0)

    def shard_digest(self) -> int:
        """Return the digest of this process's share. The sum over all shares, modulo 2^64, is the layer's digest."""
        return digest(self.shard, self.begin)

    def digest(self) -> int:
        return digest(self.whole, 0)


def in_layer_order(tensors: Sequence[ShardedTensor]) -> list[ShardedTensor]:
    """Return the tensors in the order in which a layer stores them, so that each is aligned."""
    return sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)


def assign_views(tensors: Sequence[ShardedTensor], data: Tensor) -> None:
    """Set the tensors, which are in layer order, to views of a layer's bytes."""
    start = 0
    for tensor in tensors:
        # .data: otherwise autograd would treat gathering as an in-place change of the weights
        tensor.assign(data[start : start + tensor.size].data.view(tensor.dtype).view(*tensor.shape))
        start += tensor.size


def digest(data: Tensor, begin: int) -> int:
    """Return the sum over 32-bit words of word * (2 * index + 1), modulo 2^64, which changes if any one word changes.

    begin: the offset of `data` in the layer, in bytes.
    """
    words, first, total = data.view(WORD), begin // WORD.itemsize, 0
    for start in range(0, len(words), DIGEST_WORDS):
        chunk = words[start : start + DIGEST_WORDS].long()
        indices = torch.arange(first + start, first + start + len(chunk), device=data.device)
        total += int((chunk * (2 * indices + 1)).sum())
    return total % (1 << 64)


@dataclass(frozen=True)
class ModelShards:
    """The sharded layers of a model and their modules, in the order of a forward."""

    layers: dict[ModuleKey, ShardedLayer]
    modules: dict[ModuleKey, nn.Module]
    whole_bytes: int  # size of all sharded weights
    held_bytes: int  # size of this process's share

    @property
    def forward_order(self) -> list[ModuleKey]:
        """The keys in the order of a forward. If embedding and head share their weight, both keys are in it."""
        decoder_layers = [key for key in self.layers if isinstance(key, int)]
        return [key for key in (EMBEDDING, *decoder_layers, HEAD) if key in self.layers]

    def distinct(self) -> list[ShardedLayer]:
        return list({id(layer): layer for layer in self.layers.values()}.values())


L = TypeVar("L")
MakeLayer = Callable[[str, Sequence[ShardedTensor]], L]  # of a layer's name and tensors


def split_by_layer(
    model: Any, reader: _TensorReader, make_layer: MakeLayer[L]
) -> tuple[dict[ModuleKey, L], dict[ModuleKey, nn.Module]]:
    """Return what `make_layer` makes of the large tensors of each layer of a model on the meta device, and the modules.

    Embedding and head have one layer if they share their weight.
    """
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules: dict[ModuleKey, nn.Module] = {EMBEDDING: inputs, **dict(enumerate(_decoder_layers(model))), HEAD: head}
    paths = {id(module): path for path, module in model.named_modules()}
    layers: dict[ModuleKey, L] = {}
    owners: dict[int, tuple[L, nn.Parameter]] = {}  # by id of the weight, stored so that the id stays unique
    for key, module in modules.items():
        tensors: list[ShardedTensor] = []
        sharded: list[nn.Parameter] = []
        shared: list[L] = []
        for name, weight in list(module.named_parameters()):
            if id(weight) in owners:
                shared.append(owners[id(weight)][0])
            elif parts := reader.sharded_tensors(f"{paths[id(module)]}.{name}", weight):
                tensors += parts
                sharded.append(weight)
        if tensors:
            name = f"layer {key}" if isinstance(key, int) else f"the {key}"
            layers[key] = make_layer(name, tensors)
            owners |= {id(weight): (layers[key], weight) for weight in sharded}
        elif shared:
            layers[key] = shared[0]
    return layers, {key: modules[key] for key in layers}


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
    """Return the model in eval mode, whose large weights are empty until gathered, and this process's shards.

    resident_layers: number of quantized layers that are dequantized while loading.
    """
    LOG.info("loading 1/%d of the weights of %s", world, source.name)
    model, layers, modules = load_by_layer(
        source, dtype, device, lambda name, tensors: ShardedLayer(name, tensors, rank, world, device),
        quantization=quantization, double=double, resident_layers=resident_layers,
    )  # fmt: skip
    distinct = {id(layer): layer for layer in layers.values()}.values()
    whole_bytes, held_bytes = sum(layer.size for layer in distinct), sum(layer.shard.numel() for layer in distinct)
    return model, ModelShards(layers, modules, whole_bytes, held_bytes)


def load_by_layer(
    source: Source,
    dtype: torch.dtype,
    device: str,
    make_layer: MakeLayer[L],
    *,
    quantization: str,
    double: bool,
    resident_layers: int = 0,
) -> tuple[nn.Module, dict[ModuleKey, L], dict[ModuleKey, nn.Module]]:
    """Return the model in eval mode, and the layers and modules of its large weights.

    make_layer: sets the large tensors of a layer to views of the memory that it returns.
    """
    model, reader = open_checkpoint(source, dtype, device, quantization, double, resident_layers)
    layers, modules = split_by_layer(model, reader, make_layer)
    for key, weight in list(model.named_parameters()):
        if weight.device.type != "meta":
            continue
        if (small := reader.read_small(key)) is not None:
            set_attribute(model, key, nn.Parameter(small, requires_grad=False))
        else:  # a quantized weight outside of the sharded layers, as in a vision tower
            for tensor in reader.sharded_tensors(key, weight) or ():
                whole = tensor.read(0, tensor.size).to(device).view(tensor.dtype).view(*tensor.shape)
                check_finite(whole, f"{source.name}: weight {tensor.name}")
                tensor.assign(whole)
    for key, buffer in list(model.named_buffers()):
        value = reader.tensors.get(key).to(buffer.dtype) if key in reader.tensors else buffer
        set_attribute(model, key, value.to(device))
    model.tie_weights()
    if missing := [key for key, weight in model.named_parameters() if weight.device.type == "meta"]:
        what = f"{source.name}: {len(missing)} weights are missing or of another shape, first {missing[0]}"
        raise ModelError(what, fix="use --model.placement replicated")
    return prepare_frozen(model, source), layers, modules


def open_checkpoint(
    source: Source, dtype: torch.dtype, device: str, quantization: str, double: bool, resident_layers: int = 0
) -> tuple[Any, _TensorReader]:
    """Return a model on the meta device, and a reader of its weights."""
    if quantization == "none":
        check_not_prequantized(source)
        folder = weights_folder(source)
    else:
        folder = quantized_folder(source, quantization, double, dtype, device)
    with init_empty_weights(include_buffers=False):
        model: Any = build_from_config(load_config(source))
    model.tie_weights()
    return model, _TensorReader(model, source, folder, dtype, device, quantization, resident_layers)


class _TensorReader:
    """Reads the parameters of a checkpoint. Keys are the model's parameter names. scheme: quantization, or "none"."""

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
        """Return a parameter's sharded tensors, or None if it is small or not in the checkpoint."""
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
        check_finite(tensor, f"{self.source.name}: weight {key}")
        return tensor

    def _is_stored(self, key: str, shape: torch.Size) -> bool:
        if self.scheme == "none":
            group = self._groups.get(key)
            if group is None or group.converter is not None:
                return group is not None
            key = group.names[0]
        return key in self.tensors and self.tensors.shape(key) == list(shape)

    def _read_function(self, key: str, dtype: torch.dtype) -> Callable[[int, int], Tensor]:
        """Return a parameter's `read` function, which reads only the requested bytes if no conversion is needed."""
        group = self._groups.get(key)
        name = key if group is None else group.names[0]
        if (group is None or group.converter is None) and self.tensors.dtype(name) == dtype:
            return partial(self.tensors.read_bytes, name)
        return _reader_of_whole(partial(self._read_whole, key))

    def _read_whole(self, key: str) -> Tensor:
        """Return a parameter in the model's dtype."""
        if self.scheme != "none":
            return self._cast(key, self.tensors.get(key))
        group = self._groups[key]
        if self._last_read[0] is not group:  # a group can contain several parameters
            self._last_read = group, self._layout.read(group, self.tensors.get)
        return self._cast(key, self._last_read[1][key])

    def _is_resident(self, path: str) -> bool:
        index = layer_index(path)
        return index is None or index < self.resident

    def _linear_tensors(self, key: str, path: str, layer: QuantizedLinear) -> list[ShardedTensor]:
        if self._is_resident(path):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.bias = layer.bias
            set_attribute(self.model, path, plain)
            options = (self.scheme, plain.weight.shape, self.dtype)
            read = _reader_of_whole(lambda: dequantize_weight(self.tensors.get_packed(key), *options))
            return [self._parameter_tensor(key, self.dtype, plain.weight.shape, read)]
        names = {"weight": key, **self.tensors.constant_names(key)}
        small = {short: self.tensors.get(name) for short, name in names.items() if short not in SHARDED_PARTS}
        packed = {"weight": torch.empty(0, dtype=torch.uint8), **small}
        sizes = {short: math.prod(self.tensors.shape(name)) for short, name in names.items()}  # elements
        sizes["weight"] = sizes["weight"] * DTYPE_BITS[self.tensors.stored_dtype(key)] // 8  # bytes
        load_packed(layer, packed, f"{self.source.name}: {key}", sizes)
        layer.constants = {short: tensor.to(self.device) for short, tensor in layer.constants.items()}

        def assign(short: str, view: Tensor) -> None:
            if short == "weight":
                layer.weight = nn.Parameter(view, requires_grad=False)
            else:
                layer.constants[short] = view

        return self._packed_tensors(names, assign)

    def _experts_tensors(self, key: str, path: str, leaf: str, shape: torch.Size) -> list[ShardedTensor]:
        names = {"weight": key, **self.tensors.constant_names(key)}
        if self._is_resident(path):
            options = (shape, self.scheme, self.dtype)
            read = _reader_of_whole(lambda: PackedExperts(self.tensors.get_packed(key), *options).dequantize_all())
            return [self._parameter_tensor(key, self.dtype, shape, read)]
        empty = torch.empty(0, dtype=torch.uint8)
        small = {short: empty if short in SHARDED_PARTS else self.tensors.get(name) for short, name in names.items()}
        packed_experts = PackedExperts(small, shape, self.scheme, self.dtype).to(torch.device(self.device))
        make_quantized(self.model.get_submodule(path)).set_packed(leaf, packed_experts)
        return self._packed_tensors(names, packed_experts.packed.__setitem__)

    def _parameter_tensor(
        self, key: str, dtype: torch.dtype, shape: Sequence[int], read: Callable[[int, int], Tensor]
    ) -> ShardedTensor:
        def assign(view: Tensor) -> None:
            set_attribute(self.model, key, nn.Parameter(view, requires_grad=False))

        return ShardedTensor(key, shape, dtype, assign, read)

    def _packed_tensors(self, names: dict[str, str], assign: Callable[[str, Tensor], None]) -> list[ShardedTensor]:
        tensors = []
        for short, name in names.items():
            if short in SHARDED_PARTS:
                dtype = self.tensors.dtype(name)
                assert dtype is not None, name
                read = partial(self.tensors.read_bytes, name)
                tensors.append(ShardedTensor(name, self.tensors.shape(name), dtype, partial(assign, short), read))
        return tensors


def _reader_of_whole(read_whole: Callable[[], Tensor]) -> Callable[[int, int], Tensor]:
    """Return a `read` function for a tensor that can only be read whole."""
    return lambda low, high: read_whole().contiguous().flatten().view(torch.uint8)[low:high]
