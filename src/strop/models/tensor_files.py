"""Weights that are read, or written, one at a time: a model never lies in memory whole in 16 bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from strop.errors import ModelError
from strop.models.experts import PackedExperts, make_quantized, is_experts, pack_experts, quantizable_names
from strop.models.quantize import QuantizedLinear, quantize_weight, set_module, replace_linears
from strop.models.source import DTYPE_BITS, Source, read_headers, refuse_widened
from strop.models.tensor_files import TensorGroup, CheckpointLayout
from strop.runs.folder import new_folder

SHARD_BYTES = 1 << 30
AT_ONCE = 1 << 24  # bytes of two tensors that are compared together
DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8, "I8": torch.int8,
}  # fmt: skip


class CheckpointTensors:
    """The tensors of a folder of safetensors files, each read when it is asked for.

    A file is opened anew for each: what is read stays mapped, and counts as memory, as long as its file is open.
    Raises ModelError for weights that are quantized there in a way that only transformers undoes.
    """

    def __init__(self, folder: Path) -> None:
        refuse_widened(folder)
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, list[int]] = {}
        self._dtypes: dict[str, str] = {}
        self._begins: dict[str, int] = {}
        for file, header in read_headers(folder):
            first = file.stat().st_size - max((entry["data_offsets"][1] for entry in header.values()), default=0)
            for name, entry in header.items():
                self._files[name], self._shapes[name], self._dtypes[name] = file, entry["shape"], entry["dtype"]
                self._begins[name] = first + entry["data_offsets"][0]
        self._owners = {name.rpartition(".")[0] for name in self._files}

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str) -> Tensor:
        """A copy of its own, not a view of the file."""
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name).clone()
        return tensor

    def part(self, name: str, low: int, high: int) -> Tensor:
        """Its bytes from `low` to `high`, (n,) uint8; the others are not read."""
        return torch.from_numpy(np.fromfile(self._files[name], np.uint8, high - low, offset=self._begins[name] + low))

    def dtype(self, name: str) -> torch.dtype | None:
        """Of a tensor, unread; None for a type that no weight here has."""
        return DTYPES.get(self._dtypes[name])

    def kind(self, name: str) -> str:
        """The type of a tensor as its file calls it."""
        return self._dtypes[name]

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same, read some at a time."""
        if (self.kind(name), self.shape(name)) != (self.kind(other), self.shape(other)):
            return False
        size = self.size_bytes(name) // 4 * DTYPE_BITS[self.kind(name)] // 8
        cuts = range(0, size, AT_ONCE)
        pairs = ((self.part(one, at, min(at + AT_ONCE, size)) for one in (name, other)) for at in cuts)
        return all(torch.equal(*pair) for pair in pairs)

    def shape(self, name: str) -> list[int]:
        """Of a tensor, unread."""
        return self._shapes[name]

    def size_bytes(self, name: str) -> int:
        """Bytes of a tensor in 32 bit, unread."""
        return 4 * math.prod(self.shape(name))

    def is_packed(self, name: str) -> bool:
        """Whether a weight is quantized here: it has constants beside it."""
        scale = f"{name.removesuffix('weight')}SCB"
        return scale in self._files or name in self._owners

    def names_under(self, name: str) -> dict[str, str]:
        """Constants of a quantized weight: of `x.weight`, absmax: x.weight.absmax, and SCB: x.SCB."""
        parent = name.removesuffix("weight")
        found = {key.removeprefix(f"{name}."): key for key in self._files if key.startswith(f"{name}.")}
        return found | ({"SCB": f"{parent}SCB"} if f"{parent}SCB" in self._files else {})

    def under(self, name: str) -> dict[str, Tensor]:
        """The same, read."""
        return {short: self.get(key) for short, key in self.names_under(name).items()}


def quantize_folder(
    source: Source,
    skeleton: nn.Module,
    folder: Path,
    scheme: str,
    double: bool,
    dtype: torch.dtype,
    device: str = "cpu",
) -> None:
    """Writes the weights of a 16-bit folder, quantized where `quantizable_names` says so, into another, in small shards, under
    the model's own names. device: which quantizes."""
    chosen, as_type = quantizable_names(skeleton), dtype_caster(skeleton, dtype)
    tensors = CheckpointTensors(source.path)
    layout = CheckpointLayout(skeleton, tensors).check(source.name, tensors)

    def parts(group: TensorGroup) -> dict[str, Tensor]:
        return {
            key: part for name, tensor in layout.read(group, tensors.get).items() for key, part in kept(name, tensor)
        }

    def kept(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        tensor = tensor.to(dtype) if name in chosen else as_type(name, tensor)
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ModelError(f"{source.name}: weight {name} holds NaN or infinity", fix="fetch the model again")
        if name not in chosen:
            yield name, tensor.contiguous()
            return
        quantized = pack_experts if tensor.dim() == 3 else quantize_weight
        for short, part in quantized(tensor, scheme, double=double, device=device).items():
            yield _key(name, short), part.contiguous()

    with new_folder(folder) as temp:
        write_shards(temp, map(parts, layout.groups), {"scheme": scheme})


def dtype_caster(model: Any, dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    """Gives a weight in the type that it is held in: `dtype`, or fp32 where the model's class asks for that."""
    kept = list(model._get_dtype_plan(dtype))

    def as_type(name: str, tensor: Tensor) -> Tensor:
        wide = any(part in name for part in kept)
        return tensor.to(torch.float32 if wide else dtype) if tensor.is_floating_point() else tensor

    return as_type


def write_shards(folder: Path, parts: Iterable[dict[str, Tensor]], metadata: dict[str, str]) -> None:
    """Safetensors files of about SHARD_BYTES, and their index; parts: tensors by name, a few at a time."""
    shard: dict[str, Tensor] = {}
    index: dict[str, str] = {}

    def close() -> None:
        file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(shard, file))
        shard.clear()

    for part in parts:
        shard |= part
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            close()
    if shard:
        close()
    text = json.dumps({"metadata": metadata, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def has_all_weights(folder: Path) -> bool:
    """Whether all weight files are there, each as long as its header says."""
    try:
        return all(header for _, header in read_headers(folder))
    except (OSError, ModelError):
        return False


def build_quantized(make: Any, folder: Path, name: str, scheme: str, dtype: torch.dtype) -> nn.Module:
    """A model whose linear weights are quantized where those of the folder are, filled tensor by tensor.

    make: builds the model without weights; its buffers are real. Raises ModelError where a weight is missing or does
    not fit.
    """
    with init_empty_weights(include_buffers=False):
        model: Any = make()
    tensors = CheckpointTensors(folder)
    layers = replace_linears(model, scheme, dtype, lambda name: tensors.is_packed(f"{name}.weight"))
    missing, as_type = [], dtype_caster(model, dtype)
    for key, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, leaf = key.rpartition(".")
        if key not in tensors:
            missing.append(key)
        elif leaf == "weight" and owner in layers:
            _fill(layers[owner], {"weight": tensors.get(key), **tensors.under(key)}, f"{name}: {key}")
        elif parameter.dim() == 3 and tensors.is_packed(key):
            packed = {"weight": tensors.get(key), **tensors.under(key)}
            make_quantized(model.get_submodule(owner)).hold(leaf, PackedExperts(packed, parameter.shape, scheme, dtype))
        else:
            tensor = tensors.get(key)
            if tensor.shape != parameter.shape:
                raise ModelError(f"{name}: {key} has shape {tuple(tensor.shape)}, {tuple(parameter.shape)} expected")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(as_type(key, tensor), requires_grad=False))
    for key, buffer in list(model.named_buffers()):
        if key in tensors:  # what routers have learned beside their weights, and the like
            owner, _, leaf = key.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = tensors.get(key).to(buffer.dtype)
    model.tie_weights()
    packed_once = {id(layer.weight): layer for layer in layers.values()}
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and id(layer.weight) in packed_once:  # it shares another one's weight
            set_module(model, path, packed_once[id(layer.weight)])
    lost = [key for key in missing if model.get_parameter(key).device.type == "meta"]
    if lost:
        what = f"{name}: {len(lost)} weights are missing or under other names, first {lost[0]}"
        raise ModelError(what, fix="use --model.quantization none")
    module: nn.Module = model
    return module


def check_packed_checkpoint(source: Source, model: nn.Module) -> None:
    """Raises ModelError where a checkpoint that is quantized on disk would make another model than its config says.

    model: without weights (meta tensors)."""
    tensors = CheckpointTensors(source.path)
    packed = {name for name in tensors if name.endswith("weight") and tensors.is_packed(name)}
    if not packed:
        what = f"{source.name}: its config.json says that its weights are quantized, and none of them is"
        raise ModelError(what, fix="take quantization_config out of it")
    if odd := next((name for name in tensors if name.endswith(".weight_format") and tensors.get(name).any()), None):
        raise ModelError(f"{source.name}: {odd} is of an old layout of 8 bit", fix="use the model with 16-bit weights")
    constants = {key for name in packed for key in (f"{name}_format", *tensors.names_under(name).values())}
    CheckpointLayout(model, (name for name in tensors if name not in constants)).check(source.name, tensors)


def repack_layers(model: nn.Module, folder: Path, name: str, scheme: str, dtype: torch.dtype) -> None:
    """Puts packed weights in the place of those that were dequantized, layer by layer; model may carry adapters."""
    tensors = CheckpointTensors(folder)
    for path, module in list(model.named_modules()):
        key = f"{path.replace('.base_layer', '')}.weight"
        constants = tensors.under(key) if type(module) is nn.Linear and key in tensors else {}
        if constants:
            layer = QuantizedLinear(module, scheme, dtype)
            _fill(layer, {"weight": tensors.get(key), **constants}, f"{name}: {key}")
            set_module(model, path, layer.to(module.weight.device))
        for leaf, weight in list(module.named_parameters(recurse=False)) if is_experts(module) else []:
            key = f"{path.replace('.base_layer', '')}.{leaf}"
            if weight.dim() == 3 and key in tensors and tensors.is_packed(key):
                packed = PackedExperts({"weight": tensors.get(key), **tensors.under(key)}, weight.shape, scheme, dtype)
                make_quantized(module).hold(leaf, packed.to(weight.device))


def _fill(layer: QuantizedLinear, packed: dict[str, Tensor], where: str) -> None:
    constants = (tensor for name, tensor in packed.items() if name != "weight" and tensor.is_floating_point())
    if not all(map(is_finite, constants)):
        raise ModelError(f"{where} holds NaN or infinity", fix="fetch the model again")
    try:
        layer.fill(packed)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{where}: not a {layer.scheme} weight ({error})", fix="quantize it again") from None


def _key(name: str, short: str) -> str:
    """bitsandbytes' names on disk: x.weight, x.weight.absmax, and x.SCB."""
    if short == "weight":
        return name
    if not name.endswith("weight"):  # of experts
        return f"{name}.{short}"
    return name.removesuffix("weight") + short if short == "SCB" else f"{name}.{short}"


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity. `torch.isfinite` makes copies: of an embedding of 262,144 rows, enough
    for the peak of a whole run."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())  # NaN where there is any
    return bool(torch.isfinite(low) & torch.isfinite(high))


def floating_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The floating-point parameters, by name."""
    return ((name, p) for name, p in module.named_parameters() if p.is_floating_point())


# ---- from strop.models.tensor_names ----
"""What a checkpoint calls its tensors, and what the model calls them.

transformers 5 renames and joins weights while it loads them: a mixture's experts are a tensor each on disk and one
parameter in the model, a text half lies under another prefix. Its own rules are used here, a few tensors at a time, in
both directions; where names agree, and that is so for most dense families, nothing happens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from strop.errors import ModelError

FLOATS = ("F64", "F32", "F16", "BF16")
_MASKS = ("bias", "masked_bias", "causal_mask")  # of attention, as older checkpoints hold them: no weights


@dataclass
class TensorGroup:
    """Tensors of a file that become parameters together. place: the parameter, or the first of several; None where the
    model has no use for the tensors. pattern: of each tensor, the one that the converter knows it by."""

    place: str | None
    names: list[str] = field(default_factory=list)
    converter: Any = None
    patterns: list[str] = field(default_factory=list)


class CheckpointLayout:
    """How the tensors of a checkpoint become the parameters of a model. model: without weights (meta tensors)."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._model: Any = model
        self._state: dict[str, Tensor] = model.state_dict()
        rules = get_model_conversion_mapping(self._model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        known = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        found: dict[str, TensorGroup] = {}
        self.left: dict[str, str] = {}  # tensors that become no parameter, with what the model would call them
        for name in sorted(names, key=dot_natural_key):
            place, pattern = self._place(name)
            group = found.setdefault(place or f" {name}", TensorGroup(place))
            group.names.append(name)
            if place is not None and pattern is not None:
                group.converter = group.converter or known[pattern]
                group.patterns.append(pattern)
        self.groups = sorted(found.values(), key=lambda group: min(group.names))
        self._model.__dict__["_weight_conversions"] = [rule for rule in rules if rule.was_used()]

    def _place(self, name: str) -> tuple[str | None, str | None]:
        """The parameter that a tensor is (a part of), and the converter's pattern: as transformers' loader finds it."""
        prefix = self._model.base_model_prefix
        place, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        if place not in self._state and name in self._state:
            place, pattern = rename_source_key(name, [], [], prefix, self._state)
        if place in self._state:
            return place, pattern
        self.left[name] = place
        return None, None

    def check(self, name: str, tensors: Any) -> CheckpointLayout:
        """Itself. Raises ModelError where the tensors would make another model than the one that they were saved from.

        name: of the model; tensors: of the checkpoint, as shards.Tensors.
        """
        if all(group.place is None for group in self.groups):
            kind, first = self._model.config.model_type, next(iter(self.left), "none at all")
            raise ModelError(f"{name}: none of its tensors is a weight of a model of type {kind}, first {first}")
        for group in self.groups:
            if group.place is None or not self._state[group.place].is_floating_point():
                continue
            first, *others = group.names
            if others and group.converter is None:
                what = f"{name}: {group.place} is there twice, as {first} and as {others[0]}"
                raise ModelError(what, fix="leave one of them out")
            if tensors.is_packed(first):
                continue
            if odd := next((key for key in group.names if tensors.kind(key) not in FLOATS), None):
                what = f"{name}: {odd} is stored as {tensors.kind(odd)}, and config.json does not say how it is scaled"
                raise ModelError(what, fix="use the model with 16-bit weights")
        alone = [group for group in self.groups if group.place is not None and group.converter is None]
        alone = [one for one in alone if tensors.kind(one.names[0]) == "I8" or not tensors.is_packed(one.names[0])]
        unlike = [one.place for one in alone if tensors.shape(one.names[0]) != list(self._state[str(one.place)].shape)]
        if unlike:
            raise ModelError(f"{name}: {len(unlike)} weights are missing or of another shape, first {unlike[0]}")
        check_unused_tensors(name, self._model, self.left.values())
        for target, source in getattr(self._model, "all_tied_weights_keys", {}).items():
            held = {group.place: group.names[0] for group in self.groups if group.place in (target, source)}
            if len(held) == 2 and not tensors.equal(held[target], held[source]):
                what = f"{name}: {held[target]} and {held[source]} differ, and config.json says that they are one"
                fix = "put tie_word_embeddings: false into config.json, or leave the one out that was not trained"
                raise ModelError(what, fix=fix)
        return self

    def group_of(self, parameter: str) -> TensorGroup:
        """Raises KeyError where the checkpoint does not hold it."""
        found = next((group for group in self.groups if parameter in self.places(group)), None)
        if found is None:
            raise KeyError(parameter)
        return found

    def places(self, group: TensorGroup) -> list[str]:
        """The parameters that a group becomes, unread."""
        if group.place is None:
            return []
        if group.converter is None or len(group.converter.target_patterns) == 1:
            return [group.place]
        first, *others = group.converter.target_patterns
        plain = re.sub(r"\\(.)", r"\1", first)
        return [group.place, *(group.place.replace(plain, re.sub(r"\\(.)", r"\1", other)) for other in others)]

    def read(self, group: TensorGroup, get: Any) -> dict[str, Tensor]:
        """The parameters of a group, by the model's names. get: gives a tensor of the checkpoint by its name."""
        if group.place is None:
            return {}
        if group.converter is None:
            return {group.place: get(group.names[0])}
        converter = deepcopy(group.converter)
        for name, pattern in zip(group.names, group.patterns, strict=True):
            converter.add_tensor(group.place, name, pattern, get(name))
        made = converter.convert(group.place, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def write(self, group: TensorGroup, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a group, by the checkpoint's names, out of its parameters.

        Raises ModelError where transformers cannot turn its conversion round.
        """
        if group.converter is None:
            assert group.place is not None
            return {group.names[0]: parameters[group.place].contiguous()}
        with torch.no_grad():
            made = revert_weight_conversion(self._model, dict(parameters))
        if set(made) != set(group.names):
            what = f"{group.place}: transformers does not give it back as {group.names[0]}"
            raise ModelError(what, fix="serve the adapter on its base")
        return {name: tensor.contiguous() for name, tensor in made.items()}


def check_unused_tensors(name: str, model: Any, left: Iterable[str]) -> None:
    """Raises ModelError where tensors that no parameter takes (by the model's own names) are part of what it computes:
    further decoder layers, or parts of its layers. Others are of a head or a tower that a language model has not."""
    state, modules = model.state_dict(), dict(model.named_modules())
    passed = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq$"]
    more = int(getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0)
    kinds = {_starred(key) for key in state}
    layers = {match[0] for key in state if (match := re.match(r".*?\.\d+\.", key))}

    def is_computed(place: str) -> bool:
        owner, _, leaf = place.rpartition(".")
        if owner in modules and next(modules[owner].parameters(recurse=False), None) is not None:
            return True
        inside = re.match(r".*?\.\d+\.", place)
        return inside is not None and (
            (inside[0] in layers and leaf not in _MASKS) or (_starred(place) in kinds and not more)
        )

    found = [place for place in left if not any(re.search(one, place) for one in passed) and is_computed(place)]
    if found:
        what = f"{name}: {len(found)} of its tensors have no place in the model that config.json describes, first "
        raise ModelError(what + min(found, key=dot_natural_key), fix="put back the config.json of these weights")


def _starred(place: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", place)
