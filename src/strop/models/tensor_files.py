"""Read, quantize and write checkpoint tensors one at a time, so that a model is never in memory whole in 16 bit."""

# `CheckpointLayout` maps the checkpoint's tensor names to the model's parameters. transformers 5 renames and joins
# weights while it loads them: a mixture's experts are one tensor each on disk and one parameter in the model, and a
# text half has another prefix. Its own rules are applied in both directions; for most dense families nothing happens.

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import save_file
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
from strop.models.experts import PackedExperts, is_experts, make_quantized, pack_experts, quantizable_names
from strop.models.quantize import QuantizedLinear, quantize_weight, replace_linears, set_attribute
from strop.models.source import DTYPE_BITS, Source, check_not_widened, read_headers
from strop.runs.folder import new_folder

SHARD_BYTES = 1 << 30
COMPARED_BYTES = 1 << 24  # of two tensors at a time
DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8, "I8": torch.int8,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
MASKS = ("bias", "masked_bias", "causal_mask")  # attention buffers in older checkpoints, not weights


class CheckpointTensors:
    """The tensors of a folder of safetensors files, each read on request."""

    # A file is opened anew for each tensor: what is read stays mapped, and counts as memory, until its file is closed.

    def __init__(self, folder: Path) -> None:
        check_not_widened(folder)
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, list[int]] = {}
        self._dtypes: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        for file, header in read_headers(folder):
            data = file.stat().st_size - max((entry["data_offsets"][1] for entry in header.values()), default=0)
            for name, entry in header.items():
                self._files[name], self._shapes[name], self._dtypes[name] = file, entry["shape"], entry["dtype"]
                self._offsets[name] = data + entry["data_offsets"][0]
        self._parents = {name.rpartition(".")[0] for name in self._files}

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str) -> Tensor:
        """Return a copy, not a view of the file."""
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name).clone()
        return tensor

    def read_bytes(self, name: str, low: int, high: int) -> Tensor:
        """Return a tensor's bytes from `low` to `high`, shape (high - low,), uint8; the others are not read."""
        return torch.from_numpy(np.fromfile(self._files[name], np.uint8, high - low, offset=self._offsets[name] + low))

    def dtype(self, name: str) -> torch.dtype | None:
        """Return a tensor's dtype, or None for one that no weight has."""
        return DTYPES.get(self._dtypes[name])

    def stored_dtype(self, name: str) -> str:
        return self._dtypes[name]

    def equal(self, name: str, other: str) -> bool:
        """Compare two tensors, reading a few MiB at a time."""
        if (self.stored_dtype(name), self.shape(name)) != (self.stored_dtype(other), self.shape(other)):
            return False
        size = self.size_bytes(name) // 4 * DTYPE_BITS[self.stored_dtype(name)] // 8
        parts = ((start, min(start + COMPARED_BYTES, size)) for start in range(0, size, COMPARED_BYTES))
        return all(torch.equal(self.read_bytes(name, *part), self.read_bytes(other, *part)) for part in parts)

    def shape(self, name: str) -> list[int]:
        return self._shapes[name]

    def size_bytes(self, name: str) -> int:
        """Return a tensor's size in fp32."""
        return 4 * math.prod(self.shape(name))

    def is_packed(self, name: str) -> bool:
        """Return whether a weight is quantized: it has constants."""
        scale = f"{name.removesuffix('weight')}SCB"
        return scale in self._files or name in self._parents

    def constant_names(self, name: str) -> dict[str, str]:
        """Return the constants of a quantized weight `x.weight`: {absmax: x.weight.absmax, SCB: x.SCB, ...}."""
        parent = name.removesuffix("weight")
        names = {key.removeprefix(f"{name}."): key for key in self._files if key.startswith(f"{name}.")}
        return names | ({"SCB": f"{parent}SCB"} if f"{parent}SCB" in self._files else {})

    def constants(self, name: str) -> dict[str, Tensor]:
        return {short: self.get(key) for short, key in self.constant_names(name).items()}

    def get_packed(self, name: str) -> dict[str, Tensor]:
        """Read a quantized weight with its constants, as `quantize_weight` returns them."""
        return {"weight": self.get(name), **self.constants(name)}


@dataclass
class TensorGroup:
    """Checkpoint tensors that become one or more parameters together."""

    parameter: str | None  # the first of them; None where the model does not use the tensors
    names: list[str] = field(default_factory=list)
    converter: Any = None
    patterns: list[str] = field(default_factory=list)  # for each tensor, the converter's pattern that it matches


class CheckpointLayout:
    """Maps a checkpoint's tensors to a model's parameters; model: on meta tensors."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._model: Any = model
        self._state: dict[str, Tensor] = model.state_dict()
        rules = get_model_conversion_mapping(self._model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        converters = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        groups: dict[str, TensorGroup] = {}
        self.unused: dict[str, str] = {}  # tensors that become no parameter, with the model's name for them
        for name in sorted(names, key=dot_natural_key):
            parameter, pattern = self._find_parameter(name)
            group = groups.setdefault(parameter or f" {name}", TensorGroup(parameter))
            group.names.append(name)
            if parameter is not None and pattern is not None:
                group.converter = group.converter or converters[pattern]
                group.patterns.append(pattern)
        self.groups = sorted(groups.values(), key=lambda group: min(group.names))
        self._model.__dict__["_weight_conversions"] = [rule for rule in rules if rule.was_used()]

    def _find_parameter(self, name: str) -> tuple[str | None, str | None]:
        """Return the parameter that a tensor belongs to, and the converter's pattern, as transformers' loader does."""
        prefix = self._model.base_model_prefix
        parameter, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        if parameter not in self._state and name in self._state:
            parameter, pattern = rename_source_key(name, [], [], prefix, self._state)
        if parameter in self._state:
            return parameter, pattern
        self.unused[name] = parameter
        return None, None

    def check(self, name: str, tensors: CheckpointTensors) -> CheckpointLayout:
        """Return the layout; raise ModelError where the tensors would make another model than they came from."""
        if all(group.parameter is None for group in self.groups):
            model_type, first = self._model.config.model_type, next(iter(self.unused), "it has none")
            raise ModelError(f"{name}: none of its tensors is a weight of a model of type {model_type}, first {first}")
        for group in self.groups:
            if group.parameter is None or not self._state[group.parameter].is_floating_point():
                continue
            first, *others = group.names
            if others and group.converter is None:
                what = f"{name}: {group.parameter} is stored twice, as {first} and as {others[0]}"
                raise ModelError(what, fix="remove one of them")
            if tensors.is_packed(first):
                continue
            if odd := next((key for key in group.names if tensors.stored_dtype(key) not in FLOATS), None):
                what = f"{name}: {odd} is stored as {tensors.stored_dtype(odd)}, and config.json does not give a scale"
                raise ModelError(what, fix="use the model with 16-bit weights")
        wrong = []
        for group in self.groups:
            if group.parameter is None or group.converter is not None:
                continue
            has_shape = tensors.stored_dtype(group.names[0]) == "I8" or not tensors.is_packed(group.names[0])
            if has_shape and tensors.shape(group.names[0]) != list(self._state[group.parameter].shape):
                wrong.append(group.parameter)
        if wrong:
            raise ModelError(f"{name}: {len(wrong)} weights are missing or of another shape, first {wrong[0]}")
        check_unused_tensors(name, self._model, self.unused.values())
        for target, source in getattr(self._model, "all_tied_weights_keys", {}).items():
            stored = {group.parameter: group.names[0] for group in self.groups if group.parameter in (target, source)}
            if len(stored) == 2 and not tensors.equal(stored[target], stored[source]):
                what = f"{name}: {stored[target]} and {stored[source]} differ, but config.json says that they are tied"
                fix = "set tie_word_embeddings to false in config.json, or remove the one that was not trained"
                raise ModelError(what, fix=fix)
        return self

    def group_of(self, parameter: str) -> TensorGroup:
        """Return the group of a parameter. Raises KeyError where the checkpoint does not have it."""
        group = next((group for group in self.groups if parameter in self.parameters(group)), None)
        if group is None:
            raise KeyError(parameter)
        return group

    def parameters(self, group: TensorGroup) -> list[str]:
        if group.parameter is None:
            return []
        if group.converter is None or len(group.converter.target_patterns) == 1:
            return [group.parameter]
        first, *others = (re.sub(r"\\(.)", r"\1", pattern) for pattern in group.converter.target_patterns)
        return [group.parameter, *(group.parameter.replace(first, other) for other in others)]

    def read(self, group: TensorGroup, get: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return the parameters of a group by the model's names; get: reads a checkpoint tensor."""
        if group.parameter is None:
            return {}
        if group.converter is None:
            return {group.parameter: get(group.names[0])}
        converter = deepcopy(group.converter)
        for name, pattern in zip(group.names, group.patterns, strict=True):
            converter.add_tensor(group.parameter, name, pattern, get(name))
        converted = converter.convert(group.parameter, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def write(self, group: TensorGroup, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a group's checkpoint tensors from its parameters, where transformers can reverse its conversion."""
        if group.converter is None:
            assert group.parameter is not None
            return {group.names[0]: parameters[group.parameter].contiguous()}
        with torch.no_grad():
            tensors = revert_weight_conversion(self._model, dict(parameters))
        if set(tensors) != set(group.names):
            what = f"{group.parameter}: transformers cannot convert it back to {group.names[0]}"
            raise ModelError(what, fix="serve the adapter on its base")
        return {name: tensor.contiguous() for name, tensor in tensors.items()}


def check_unused_tensors(name: str, model: Any, unused: Iterable[str]) -> None:
    """Raise ModelError where unused tensors are decoder layers or parts of them; heads and towers are accepted."""
    state, modules = model.state_dict(), dict(model.named_modules())
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq$"]
    has_extra_layers = int(getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0)
    kinds = {_without_numbers(key) for key in state}
    layers = {match[0] for key in state if (match := re.match(r".*?\.\d+\.", key))}

    def is_computed(parameter: str) -> bool:
        owner, _, leaf = parameter.rpartition(".")
        if owner in modules and next(modules[owner].parameters(recurse=False), None) is not None:
            return True
        layer = re.match(r".*?\.\d+\.", parameter)
        return layer is not None and (
            (layer[0] in layers and leaf not in MASKS)
            or (_without_numbers(parameter) in kinds and not has_extra_layers)
        )

    missing = [key for key in unused if not any(re.search(pattern, key) for pattern in ignored) and is_computed(key)]
    if missing:
        what = f"{name}: {len(missing)} tensors are not part of the model described by config.json, first "
        raise ModelError(what + min(missing, key=dot_natural_key), fix="restore the config.json of these weights")


def _without_numbers(parameter: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", parameter)


def quantize_folder(
    source: Source, bare: nn.Module, folder: Path, scheme: str, double: bool, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Quantize a 16-bit source into a new folder of small shards, by the model's names. bare: it, on meta tensors."""
    quantizable, cast = quantizable_names(bare), dtype_caster(bare, dtype)
    tensors = CheckpointTensors(source.path)
    layout = CheckpointLayout(bare, tensors).check(source.name, tensors)

    def convert_group(group: TensorGroup) -> dict[str, Tensor]:
        parameters = layout.read(group, tensors.get)
        return {key: part for name, tensor in parameters.items() for key, part in convert(name, tensor)}

    def convert(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        tensor = tensor.to(dtype) if name in quantizable else cast(name, tensor)
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ModelError(f"{source.name}: weight {name} holds NaN or infinity", fix="download the model again")
        if name not in quantizable:
            yield name, tensor.contiguous()
            return
        quantize = pack_experts if tensor.dim() == 3 else quantize_weight
        for short, part in quantize(tensor, scheme, double=double, device=device).items():
            yield _stored_name(name, short), part.contiguous()

    with new_folder(folder) as temp:
        write_shards(temp, map(convert_group, layout.groups), {"scheme": scheme})


def dtype_caster(model: Any, dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    """Return a function that casts a weight to `dtype`, or to fp32 where the model's class asks for that."""
    fp32_names = list(model._get_dtype_plan(dtype))

    def cast(name: str, tensor: Tensor) -> Tensor:
        is_fp32 = any(part in name for part in fp32_names)
        return tensor.to(torch.float32 if is_fp32 else dtype) if tensor.is_floating_point() else tensor

    return cast


def write_shards(folder: Path, parts: Iterable[dict[str, Tensor]], metadata: dict[str, str]) -> None:
    """Write safetensors files of about SHARD_BYTES and their index; parts: tensors by name, a few at a time."""
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
    """Return whether all weight files are there, each as long as its header says."""
    try:
        return all(header for _, header in read_headers(folder))
    except (OSError, ModelError):
        return False


def build_quantized(make: Callable[[], Any], folder: Path, name: str, scheme: str, dtype: torch.dtype) -> nn.Module:
    """Build a model whose linear weights are quantized where those of the folder are, tensor by tensor."""
    # make: builds the model; its weights are never allocated, its buffers are. dtype: of the unquantized weights.
    with init_empty_weights(include_buffers=False):
        model: Any = make()
    tensors = CheckpointTensors(folder)
    layers = replace_linears(model, scheme, dtype, lambda path: tensors.is_packed(f"{path}.weight"))
    missing, cast = [], dtype_caster(model, dtype)
    for key, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, leaf = key.rpartition(".")
        if key not in tensors:
            missing.append(key)
        elif leaf == "weight" and owner in layers:
            load_packed(layers[owner], tensors.get_packed(key), f"{name}: {key}")
        elif parameter.dim() == 3 and tensors.is_packed(key):
            packed = PackedExperts(tensors.get_packed(key), parameter.shape, scheme, dtype)
            make_quantized(model.get_submodule(owner)).set_packed(leaf, packed)
        else:
            tensor = tensors.get(key)
            if tensor.shape != parameter.shape:
                raise ModelError(f"{name}: {key} has shape {tuple(tensor.shape)}, {tuple(parameter.shape)} expected")
            set_attribute(model, key, nn.Parameter(cast(key, tensor), requires_grad=False))
    for key, buffer in list(model.named_buffers()):
        if key in tensors:  # trained buffers, such as a router's bias correction
            set_attribute(model, key, tensors.get(key).to(buffer.dtype))
    model.tie_weights()
    layer_of_weight = {id(layer.weight): layer for layer in layers.values()}
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and id(layer.weight) in layer_of_weight:  # tied to a quantized layer's weight
            set_attribute(model, path, layer_of_weight[id(layer.weight)])
    lost = [key for key in missing if model.get_parameter(key).device.type == "meta"]
    if lost:
        what = f"{name}: {len(lost)} weights are missing or under other names, first {lost[0]}"
        raise ModelError(what, fix="use --model.quantization none")
    module: nn.Module = model
    return module


def check_packed_checkpoint(source: Source, model: nn.Module) -> None:
    """Raise ModelError where a checkpoint quantized on disk would make another model than its config says."""
    tensors = CheckpointTensors(source.path)
    packed = {name for name in tensors if name.endswith("weight") and tensors.is_packed(name)}
    if not packed:
        what = f"{source.name}: its config.json says that its weights are quantized, but none is"
        raise ModelError(what, fix="remove quantization_config from it")
    if odd := next((name for name in tensors if name.endswith(".weight_format") and tensors.get(name).any()), None):
        raise ModelError(f"{source.name}: {odd} is in an old 8-bit layout", fix="use the model with 16-bit weights")
    constants = {key for name in packed for key in (f"{name}_format", *tensors.constant_names(name).values())}
    CheckpointLayout(model, (name for name in tensors if name not in constants)).check(source.name, tensors)


def repack_layers(model: nn.Module, folder: Path, name: str, scheme: str, dtype: torch.dtype) -> None:
    """Replace dequantized weights by the packed ones of a folder, layer by layer; the model may have adapters."""
    tensors = CheckpointTensors(folder)
    for path, module in list(model.named_modules()):
        key = f"{path.replace('.base_layer', '')}.weight"
        constants = tensors.constants(key) if type(module) is nn.Linear and key in tensors else {}
        if constants:
            layer = QuantizedLinear(module, scheme, dtype)
            load_packed(layer, {"weight": tensors.get(key), **constants}, f"{name}: {key}")
            set_attribute(model, path, layer.to(module.weight.device))
        for leaf, weight in list(module.named_parameters(recurse=False)) if is_experts(module) else []:
            key = f"{path.replace('.base_layer', '')}.{leaf}"
            if weight.dim() == 3 and key in tensors and tensors.is_packed(key):
                packed = PackedExperts(tensors.get_packed(key), weight.shape, scheme, dtype)
                make_quantized(module).set_packed(leaf, packed.to(weight.device))


def load_packed(
    layer: QuantizedLinear, packed: dict[str, Tensor], place: str, sizes: Mapping[str, int] | None = None
) -> None:
    """Call `layer.load_packed`, and raise ModelError where it fails or a constant is not finite."""
    constants = (tensor for name, tensor in packed.items() if name != "weight" and tensor.is_floating_point())
    if not all(map(is_finite, constants)):
        raise ModelError(f"{place} holds NaN or infinity", fix="download the model again")
    try:
        layer.load_packed(packed, sizes)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{place}: not a {layer.scheme} weight ({error})", fix="quantize it again") from None


def _stored_name(name: str, short: str) -> str:
    """Return bitsandbytes' name on disk: x.weight, x.weight.absmax, and x.SCB."""
    if short == "weight":
        return name
    if not name.endswith("weight"):  # experts
        return f"{name}.{short}"
    return name.removesuffix("weight") + short if short == "SCB" else f"{name}.{short}"


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity."""
    # `torch.isfinite` makes a copy, which for an embedding of 262,144 rows sets the peak memory of a whole run.
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())  # NaN where there is any
    return bool(torch.isfinite(low) & torch.isfinite(high))
