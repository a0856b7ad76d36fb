"""A frozen base of which this process holds one share in so many.

The weights of a decoder layer, and of the embeddings, lie one behind the other as bytes, cut into equal shares. Bytes
are what is kept, sent and compared: 4-bit weights are never seen as floats on their way. The modules' weights are views
of a memory that is empty until all shares are put there, and is emptied again afterwards: the views stay what they are,
so that what autograd has saved of them is right again when the bytes are back.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from strop.errors import ModelError
from strop.models.families.layers import text_decoder
from strop.models.tensor_files import is_finite

EMBEDDING, HEAD = "embedding", "head"
Where = int | str  # the number of a decoder layer, or one of these two
GRAIN = 64  # bytes: a share is a multiple of it, so that no number is cut
CHECKED = 1 << 20  # words that are looked at together
WORD = torch.int32


@dataclass(frozen=True)
class ShardedTensor:
    """One tensor of a unit. put: gives the module the tensor; read: its bytes from `low` to `high`, (n,) uint8."""

    name: str
    shape: Sequence[int]
    dtype: torch.dtype
    put: Callable[[Tensor], None]
    read: Callable[[int, int], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


class ShardedUnit:
    """What is gathered together: tensors of one module. own: this process's share, (n,) uint8; whole: (world n,) uint8,
    whose memory is there between `take` and `drop`."""

    def __init__(self, name: str, slots: Sequence[ShardedTensor], rank: int, world: int, device: str) -> None:
        """Reads this process's share. Raises ModelError where a weight in it is not finite."""
        self.name = name
        slots = sorted(slots, key=lambda slot: -slot.dtype.itemsize)  # each begins at a multiple of its own numbers
        self.size = sum(slot.size for slot in slots)
        share = -(-self.size // (GRAIN * world)) * GRAIN
        self.begin = rank * share
        self._pages: mmap.mmap | None = None
        if device == "cpu" and sys.platform == "linux":
            # Not from the heap: what comes and goes there leaves holes between the activations that stay.
            self._pages = mmap.mmap(-1, world * share, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.whole = torch.frombuffer(self._pages, dtype=torch.uint8)
        else:
            self.whole = torch.empty(world * share, dtype=torch.uint8, device=device)
        self.own = torch.zeros(share, dtype=torch.uint8, device=device)
        at = 0
        for slot in slots:
            low, high = max(at, self.begin), min(at + slot.size, self.begin + share)
            if low < high:
                part = self.own[low - self.begin : high - self.begin]
                part.copy_(slot.read(low - at, high - at))
                if slot.dtype.is_floating_point and not is_finite(part.view(slot.dtype)):
                    raise ModelError(f"weight {slot.name} holds NaN or infinity", fix="fetch the model again")
            # .data: a tensor of its own for autograd, which would take gathering for a change of the weights
            slot.put(self.whole[at : at + slot.size].data.view(slot.dtype).view(*slot.shape))
            at += slot.size
        self.drop()

    def take(self) -> Tensor:
        """Room for all shares."""
        self.there = True
        if self._pages is None:
            self.whole.untyped_storage().resize_(self.whole.numel())
        return self.whole

    def drop(self) -> None:
        """Gives the memory back; the addresses stay taken."""
        self.there = False
        if self._pages is not None:
            self._pages.madvise(mmap.MADV_DONTNEED)
        else:
            self.whole.untyped_storage().resize_(0)

    def own_digest(self) -> int:
        """This share's part of the digest of the whole: those of all shares add up to it, modulo 2^64."""
        return digest(self.own, self.begin)

    def digest(self) -> int:
        return digest(self.whole, 0)


def digest(data: Tensor, begin: int) -> int:
    """The sum of the words of bytes that stand from `begin` on in a longer row, each times an odd number of its place,
    modulo 2^64: any change of one word changes it."""
    words, first, total = data.view(WORD), begin // WORD.itemsize, 0
    for at in range(0, len(words), CHECKED):
        some = words[at : at + CHECKED].long()
        places = torch.arange(first + at, first + at + len(some), device=data.device)
        total += int((some * (2 * places + 1)).sum())
    return total % (1 << 64)


@dataclass(frozen=True)
class ModelShards:
    """units by what they belong to, in the order in which a forward needs them; modules likewise. whole_bytes: of all
    weights; held_bytes: what of it this process holds between two steps."""

    units: dict[Where, ShardedUnit]
    modules: dict[Where, nn.Module]
    whole_bytes: int
    held_bytes: int

    @property
    def forward(self) -> list[Where]:
        """The order; where input and output share their weights, they are one unit and stand here twice."""
        layers = [where for where in self.units if isinstance(where, int)]
        return [where for where in (EMBEDDING, *layers, HEAD) if where in self.units]

    def distinct(self) -> list[ShardedUnit]:
        return list({id(unit): unit for unit in self.units.values()}.values())


def shard_model(
    model: Any, slots_of: Callable[[str, nn.Parameter], list[ShardedTensor] | None], rank: int, world: int, device: str
) -> ModelShards:
    """Cuts a model without weights (meta tensors). slots_of: of a parameter, by its name, how its tensors are read;
    None for one that is loaded whole."""
    modules, paths = _modules(model), {id(module): path for path, module in model.named_modules()}
    units: dict[Where, ShardedUnit] = {}
    made: dict[int, tuple[ShardedUnit, nn.Parameter]] = {}  # with the weight itself, so that no other gets its id
    whole = held = 0
    for where, module in modules.items():
        found: list[ShardedTensor] = []
        mine = [(name, weight) for name, weight in module.named_parameters() if id(weight) not in made]
        shared = [made[id(weight)][0] for _, weight in module.named_parameters() if id(weight) in made]
        taken: list[nn.Parameter] = []
        for name, weight in mine:
            slots = slots_of(f"{paths[id(module)]}.{name}", weight)
            found += slots or []
            taken += [weight] if slots else []
        if found:
            name = f"layer {where}" if isinstance(where, int) else f"the {where}"
            units[where] = ShardedUnit(name, found, rank, world, device)
            made |= {id(weight): (units[where], weight) for weight in taken}
            whole, held = whole + units[where].size, held + units[where].own.numel()
        elif shared:
            units[where] = shared[0]
    return ModelShards(units, {where: modules[where] for where in units}, whole, held)


def _modules(model: Any) -> dict[Where, nn.Module]:
    """What is gathered one after the other: the embedding, each decoder layer, the output head."""
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    return {EMBEDDING: inputs, **dict(enumerate(_layers(model))), HEAD: head}


def _layers(model: Any) -> nn.ModuleList:
    decoder = text_decoder(model)[0]
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList):
        return layers
    return max((module for module in decoder.modules() if isinstance(module, nn.ModuleList)), key=len)


def dense(name: str, owner: nn.Module, leaf: str, dtype: torch.dtype, shape: Sequence[int], read: Any) -> ShardedTensor:
    """A parameter in the type that it is computed in."""
    return ShardedTensor(name, shape, dtype, partial(_hold, owner, leaf), read)


def _hold(owner: nn.Module, leaf: str, view: Tensor) -> None:
    setattr(owner, leaf, nn.Parameter(view, requires_grad=False))


def read_slice_of(make: Callable[[], Tensor]) -> Callable[[int, int], Tensor]:
    """Reads bytes out of a tensor that can only be made whole."""
    return lambda low, high: make().contiguous().flatten().view(torch.uint8)[low:high]


# ---- from strop.models.load_shard ----
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
from strop.models.experts import PackedExperts, make_quantized
from strop.models.load import prepare_frozen, build_from_config, load_config, quantized_folder, refuse_prequantized, load_without_weights
from strop.models.load import weights_folder as whole_folder
from strop.models.quantize import QuantizedLinear, layer_index, set_module, replace_linears
from strop.models.sharding import ModelShards, ShardedTensor, shard_model, dense, read_slice_of
from strop.models.source import DTYPE_BITS, Source
from strop.models.tensor_files import TensorGroup, CheckpointLayout, CheckpointTensors, is_finite, dtype_caster

LOG = logging.getLogger(__name__)
LARGE = ("weight", "absmax", "nested_absmax", "SCB")  # of a quantized weight; its other constants are there whole


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
    """The model in eval mode, whose large weights are empty until they are gathered, and this process's share of them.

    Arguments as for `load_base`. Raises ModelError where weights are missing, do not fit or are not finite.
    """
    LOG.info("loading 1/%d of the weights of %s", world, source.name)
    if quantization == "none":
        refuse_prequantized(source)
    folder = whole_folder(source) if quantization == "none" else quantized_folder(source, quantization, double, dtype)
    with init_empty_weights(include_buffers=False):
        model: Any = build_from_config(load_config(source))
    model.tie_weights()
    reader = _Reader(model, source, folder, dtype, device, quantization, resident_layers)
    parts = shard_model(model, reader.slots, rank, world, device)
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
    return prepare_frozen(model, source), parts


class _Reader:
    """How each parameter of a model without weights is read."""

    def __init__(
        self, model: Any, source: Source, folder: Any, dtype: torch.dtype, device: str, scheme: str, resident: int
    ) -> None:
        self.model, self.source, self.scheme, self.resident = model, source, scheme, resident
        self.tensors, self.dtype, self.device = CheckpointTensors(folder), dtype, device
        self._typed = dtype_caster(model, dtype)
        self._linears: dict[str, QuantizedLinear] = {}
        self._groups: dict[str, TensorGroup] = {}
        self._read: tuple[TensorGroup | None, dict[str, Tensor]] = (None, {})
        if scheme == "none":
            self._layout = CheckpointLayout(load_without_weights(source), self.tensors).check(source.name, self.tensors)
            self._groups = {place: group for group in self._layout.groups for place in self._layout.places(group)}
        else:
            packed = self.tensors.is_packed
            self._linears = replace_linears(model, scheme, dtype, lambda name: packed(f"{name}.weight"))

    def slots(self, key: str, weight: nn.Parameter) -> list[ShardedTensor] | None:
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
        return read_slice_of(partial(self._whole, key))

    def _whole(self, key: str) -> Tensor:
        """A parameter as the model holds it."""
        if self.scheme != "none":
            return self._typed(key, self.tensors.get(key))
        group = self._groups[key]
        if self._read[0] is not group:  # what is joined while it loads may become several parameters
            self._read = group, self._layout.read(group, self.tensors.get)
        return self._typed(key, self._read[1][key])

    def _of_linear(self, key: str, path: str, layer: QuantizedLinear) -> list[ShardedTensor]:
        number = layer_index(path)
        if number is None or number < self.resident:
            with torch.device("meta"):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.bias = layer.bias
            set_module(self.model, path, plain)
            shape = (layer.out_features, layer.in_features)
            return [dense(key, plain, "weight", self.dtype, shape, read_slice_of(partial(self._dequantized, key, plain)))]
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
        return {**sizes, "weight": sizes["weight"] * DTYPE_BITS[self.tensors.kind(names["weight"])] // 8}

    def _dequantized(self, key: str, like: nn.Linear) -> Tensor:
        layer = QuantizedLinear(like, self.scheme, self.dtype)
        layer.fill({"weight": self.tensors.get(key), **self.tensors.under(key)})
        return layer.dequantized()

    def _of_experts(self, key: str, path: str, leaf: str, shape: torch.Size) -> list[ShardedTensor]:
        names, number = {"weight": key, **self.tensors.names_under(key)}, layer_index(path)
        owner = self.model.get_submodule(path)
        if number is None or number < self.resident:

            def whole() -> Tensor:
                packed = {short: self.tensors.get(name) for short, name in names.items()}
                return PackedExperts(packed, shape, self.scheme, self.dtype).whole()

            return [dense(key, owner, leaf, self.dtype, shape, read_slice_of(whole))]
        empty = torch.empty(0, dtype=torch.uint8)
        small = {short: empty if short in LARGE else self.tensors.get(name) for short, name in names.items()}
        held = PackedExperts(small, shape, self.scheme, self.dtype).to(torch.device(self.device))
        make_quantized(owner).hold(leaf, held)
        return self._packed(names, held.packed.__setitem__)

    def _packed(self, names: dict[str, str], put: Callable[[str, Tensor], None]) -> list[ShardedTensor]:
        """Slots of the bytes, and of the constants that are many."""
        found = []
        for short, name in names.items():
            if short in LARGE:
                kind = self.tensors.dtype(name)
                assert kind is not None, name
                found.append(
                    ShardedTensor(name, self.tensors.shape(name), kind, partial(put, short), partial(self.tensors.part, name))
                )
        return found
