"""Read, quantize and write checkpoint tensors one at a time, so that the whole model is never in memory in 16 bit."""

# `CheckpointLayout` maps the checkpoint's tensors to the model's parameters. transformers 5 renames and joins weights
# while loading: for example, the experts of a mixture are separate tensors on disk and one parameter in the model. Its
# conversion rules are applied in both directions. Most dense families have none.

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

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
from strop.models.experts import PackedExperts, is_standard_experts, make_quantized, pack_experts, quantizable_names
from strop.models.quantize import QuantizedLinear, quantize_weight, replace_linears, set_attribute
from strop.models.source import DTYPE_BITS, Source, check_readable, read_headers
from strop.runs.folder import new_folder

SHARD_BYTES = 1 << 30
COMPARED_BYTES = 1 << 24  # read at a time when two tensors are compared
DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8, "I8": torch.int8,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
MASKS = ("bias", "masked_bias", "causal_mask")  # attention masks, which older checkpoints contain


class CheckpointTensors:
    """The tensors of a folder of safetensors files, each read on request."""

    # The file is opened again for each tensor: pages that were read count as used memory until the file is closed.

    def __init__(self, folder: Path) -> None:
        check_readable(folder)
        self._files: dict[str, Path] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._data_starts: dict[Path, int] = {}
        for file, header in read_headers(folder):
            data_bytes = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            self._data_starts[file] = file.stat().st_size - data_bytes
            self._files |= dict.fromkeys(header, file)
            self._entries |= header
        self._parents = {name.rpartition(".")[0] for name in self._files}

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str) -> Tensor:
        """Return a tensor as a copy, not as a view of the file."""
        with safe_open(self._files[name], "pt") as file:
            return cast(Tensor, file.get_tensor(name)).clone()

    def read_bytes(self, name: str, low: int, high: int) -> Tensor:
        """Read only the bytes from `low` to `high` of a tensor, shape (high - low,), uint8."""
        file = self._files[name]
        start = self._data_starts[file] + self._entries[name]["data_offsets"][0]
        return torch.from_numpy(np.fromfile(file, np.uint8, high - low, offset=start + low))

    def dtype(self, name: str) -> torch.dtype | None:
        """Return a tensor's dtype, or None if strop does not support it."""
        return DTYPES.get(self.stored_dtype(name))

    def stored_dtype(self, name: str) -> str:
        return str(self._entries[name]["dtype"])

    def equal(self, name: str, other: str) -> bool:
        """Compare two tensors, reading a few MiB at a time."""
        if (self.stored_dtype(name), self.shape(name)) != (self.stored_dtype(other), self.shape(other)):
            return False
        size = math.prod(self.shape(name)) * DTYPE_BITS[self.stored_dtype(name)] // 8
        parts = ((start, min(start + COMPARED_BYTES, size)) for start in range(0, size, COMPARED_BYTES))
        return all(torch.equal(self.read_bytes(name, *part), self.read_bytes(other, *part)) for part in parts)

    def shape(self, name: str) -> list[int]:
        return list(self._entries[name]["shape"])

    def fp32_bytes(self, name: str) -> int:
        return 4 * math.prod(self.shape(name))

    def is_packed(self, name: str) -> bool:
        """Return whether a weight is quantized, so that there are quantization constants for it."""
        return f"{name.removesuffix('weight')}SCB" in self._files or name in self._parents

    def constant_names(self, name: str) -> dict[str, str]:
        """Return the constants of a quantized weight `x.weight`: {absmax: x.weight.absmax, SCB: x.SCB, ...}."""
        scale = f"{name.removesuffix('weight')}SCB"
        names = {key.removeprefix(f"{name}."): key for key in self._files if key.startswith(f"{name}.")}
        return names | ({"SCB": scale} if scale in self._files else {})

    def get_packed(self, name: str) -> dict[str, Tensor]:
        """Return a quantized weight and its constants in the format of `quantize_weight`."""
        names = {"weight": name, **self.constant_names(name)}
        return {short: self.get(key) for short, key in names.items()}


@dataclass
class TensorGroup:
    """Checkpoint tensors that transformers converts together to one or more parameters."""

    parameter: str | None  # the first parameter; None if the model does not use the tensors
    names: list[str] = field(default_factory=list)
    converter: Any = None
    patterns: list[str] = field(default_factory=list)  # the converter's source pattern that each tensor matches


class CheckpointLayout:
    """The mapping from a checkpoint's tensors to the parameters of a model, which is on the meta device."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._model: Any = model
        self._state: dict[str, Tensor] = model.state_dict()
        rules = get_model_conversion_mapping(self._model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        converters = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        groups: dict[str, TensorGroup] = {}
        self.unused: dict[str, str] = {}  # unused tensors -> the parameter names after transformers' renaming
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
        """Return a tensor's parameter and its converter's pattern, by the rules of transformers' loader."""
        prefix = self._model.base_model_prefix
        parameter, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        if parameter not in self._state and name in self._state:
            parameter, pattern = rename_source_key(name, [], [], prefix, self._state)
        if parameter in self._state:
            return parameter, pattern
        self.unused[name] = parameter
        return None, None

    def check(self, model_name: str, tensors: CheckpointTensors) -> CheckpointLayout:
        """Raise ModelError if the tensors do not fit the model. Returns the layout itself."""
        if all(group.parameter is None for group in self.groups):
            model_type, first = self._model.config.model_type, next(iter(self.unused), "it has none")
            raise ModelError(
                f"{model_name}: none of its tensors is a weight of a model of type {model_type}, first {first}"
            )
        mismatched = []
        for group in self.groups:
            if group.parameter is None:
                continue
            parameter, (first, *others) = self._state[group.parameter], group.names
            is_packed = tensors.is_packed(first)
            if parameter.is_floating_point() and others and group.converter is None:
                what = f"{model_name}: {group.parameter} is stored twice, as {first} and as {others[0]}"
                raise ModelError(what, fix="remove one of them")
            dtypes = {key: tensors.stored_dtype(key) for key in group.names}
            integer = next((key for key, dtype in dtypes.items() if dtype not in FLOATS), None)
            if integer and parameter.is_floating_point() and not is_packed:
                what = f"{model_name}: {integer} is stored as {dtypes[integer]}, and config.json does not give a scale"
                raise ModelError(what, fix="use the model with 16-bit weights")
            has_shape = dtypes[first] == "I8" or not is_packed  # 4-bit weights are stored as a list of bytes
            if group.converter is None and has_shape and tensors.shape(first) != list(parameter.shape):
                mismatched.append(group.parameter)
        if mismatched:
            what = f"{model_name}: {len(mismatched)} weights are missing or of another shape, first {mismatched[0]}"
            raise ModelError(what)
        check_unused_tensors(model_name, self._model, self.unused.values())
        for target, source in getattr(self._model, "all_tied_weights_keys", {}).items():
            stored = {group.parameter: group.names[0] for group in self.groups if group.parameter in (target, source)}
            if len(stored) == 2 and not tensors.equal(stored[target], stored[source]):
                what = f"{model_name}: {stored[target]} and {stored[source]} differ, but config.json ties them"
                fix = "set tie_word_embeddings to false in config.json, or remove the one that was not trained"
                raise ModelError(what, fix=fix)
        return self

    def group_of(self, parameter: str) -> TensorGroup:
        """Return the group of a parameter. Raises KeyError if it is not in the checkpoint."""
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
        """Return a group's parameters by their names in the model. get: reads a checkpoint tensor."""
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
        """Return a group's checkpoint tensors from its parameters. Raises ModelError if transformers cannot do this."""
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
    """Raise ModelError if unused tensors belong to decoder layers; other heads and modalities are accepted."""
    state, modules = model.state_dict(), dict(model.named_modules())
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq$"]
    has_prediction_layers = bool(getattr(model.config.get_text_config(), "num_nextn_predict_layers", None))
    kinds = {_without_numbers(key) for key in state}
    layers = {match[0] for key in state if (match := re.match(r".*?\.\d+\.", key))}

    def is_in_decoder(parameter: str) -> bool:
        owner, _, leaf = parameter.rpartition(".")
        if owner in modules and next(modules[owner].parameters(recurse=False), None) is not None:
            return True
        layer = re.match(r".*?\.\d+\.", parameter)
        return layer is not None and (
            (layer[0] in layers and leaf not in MASKS)
            or (_without_numbers(parameter) in kinds and not has_prediction_layers)
        )

    surplus = [key for key in unused if not any(re.search(pattern, key) for pattern in ignored) and is_in_decoder(key)]
    if surplus:
        what = f"{name}: {len(surplus)} tensors are not part of the model described by config.json, first "
        raise ModelError(what + min(surplus, key=dot_natural_key), fix="restore the config.json of these weights")


def _without_numbers(parameter: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", parameter)


def quantize_folder(
    source: Source, model: nn.Module, folder: Path, scheme: str, double: bool, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Quantize a 16-bit source into a new folder, under the parameter names of `model` (on the meta device)."""
    quantizable, cast_weight = quantizable_names(model), dtype_caster(model, dtype)
    tensors = CheckpointTensors(source.path)
    layout = CheckpointLayout(model, tensors).check(source.name, tensors)

    def convert_group(group: TensorGroup) -> dict[str, Tensor]:
        parameters = layout.read(group, tensors.get)
        return {key: part for name, tensor in parameters.items() for key, part in convert(name, tensor)}

    def convert(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        tensor = tensor.to(dtype) if name in quantizable else cast_weight(name, tensor)
        check_finite(tensor, f"{source.name}: weight {name}")
        if name not in quantizable:
            yield name, tensor.contiguous()
            return
        quantize = pack_experts if tensor.dim() == 3 else quantize_weight
        for short, part in quantize(tensor, scheme, double=double, device=device).items():
            yield _stored_name(name, short), part.contiguous()

    with new_folder(folder) as temp:
        write_shards(temp, map(convert_group, layout.groups), {"scheme": scheme})


def dtype_caster(model: Any, dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    """Return a function that casts a weight to `dtype`, or to fp32 if the model's class requires it for that weight."""
    fp32_names = list(model._get_dtype_plan(dtype))

    def cast_weight(name: str, tensor: Tensor) -> Tensor:
        is_fp32 = any(part in name for part in fp32_names)
        return tensor.to(torch.float32 if is_fp32 else dtype) if tensor.is_floating_point() else tensor

    return cast_weight


def write_shards(folder: Path, parts: Iterable[dict[str, Tensor]], metadata: dict[str, str]) -> None:
    """Write tensors, which `parts` yields a few at a time, to safetensors files of about SHARD_BYTES and an index."""
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
    """Return whether all weight files exist and none is cut short."""
    try:
        return all(header for _, header in read_headers(folder))
    except (OSError, ModelError):
        return False


def build_quantized(build: Callable[[], Any], folder: Path, name: str, scheme: str, dtype: torch.dtype) -> nn.Module:
    """Build a model and load its weights from a folder tensor by tensor, keeping quantized weights packed."""
    # dtype: of the unquantized weights.
    with init_empty_weights(include_buffers=False):
        model: Any = build()
    tensors = CheckpointTensors(folder)
    layers = replace_linears(model, scheme, dtype, lambda path: tensors.is_packed(f"{path}.weight"))
    missing, cast_weight = [], dtype_caster(model, dtype)
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
            set_attribute(model, key, nn.Parameter(cast_weight(key, tensor), requires_grad=False))
    for key, buffer in list(model.named_buffers()):
        if key in tensors:  # a trained buffer, such as a router's bias correction
            set_attribute(model, key, tensors.get(key).to(buffer.dtype))
    model.tie_weights()
    layer_of_weight = {id(layer.weight): layer for layer in layers.values()}
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and id(layer.weight) in layer_of_weight:  # tied to a quantized layer's weight
            set_attribute(model, path, layer_of_weight[id(layer.weight)])
    if lost := [key for key in missing if model.get_parameter(key).device.type == "meta"]:
        what = f"{name}: {len(lost)} weights are missing or under other names, first {lost[0]}"
        raise ModelError(what, fix="use --model.quantization none")
    return cast(nn.Module, model)


def check_packed_checkpoint(source: Source, model: nn.Module) -> None:
    """Raise ModelError if a checkpoint that is quantized on disk does not fit its config."""
    tensors = CheckpointTensors(source.path)
    packed = {name for name in tensors if name.endswith("weight") and tensors.is_packed(name)}
    if not packed:
        what = f"{source.name}: its config.json says that its weights are quantized, but none is"
        raise ModelError(what, fix="remove quantization_config from it")
    formats = (name for name in tensors if name.endswith(".weight_format"))
    if old := next((name for name in formats if tensors.get(name).any()), None):
        raise ModelError(f"{source.name}: {old} is in an old 8-bit layout", fix="use the model with 16-bit weights")
    constants = {key for name in packed for key in (f"{name}_format", *tensors.constant_names(name).values())}
    CheckpointLayout(model, (name for name in tensors if name not in constants)).check(source.name, tensors)


def repack_layers(model: nn.Module, folder: Path, name: str, scheme: str, dtype: torch.dtype) -> None:
    """Replace dequantized weights with the quantized weights in a folder. The model may have adapters."""
    tensors = CheckpointTensors(folder)
    for path, module in list(model.named_modules()):
        key = f"{path.replace('.base_layer', '')}.weight"
        if type(module) is nn.Linear and key in tensors and tensors.is_packed(key):
            layer = QuantizedLinear(module, scheme, dtype)
            load_packed(layer, tensors.get_packed(key), f"{name}: {key}")
            set_attribute(model, path, layer.to(module.weight.device))
        for leaf, weight in list(module.named_parameters(recurse=False)) if is_standard_experts(module) else []:
            key = f"{path.replace('.base_layer', '')}.{leaf}"
            if weight.dim() == 3 and key in tensors and tensors.is_packed(key):
                packed = PackedExperts(tensors.get_packed(key), weight.shape, scheme, dtype)
                make_quantized(module).set_packed(leaf, packed.to(weight.device))


def load_packed(
    layer: QuantizedLinear, packed: dict[str, Tensor], label: str, sizes: Mapping[str, int] | None = None
) -> None:
    """Call `layer.load_packed`. Raises ModelError, beginning with `label`, if it fails or a constant is not finite."""
    for name, tensor in packed.items():
        if name != "weight":
            check_finite(tensor, label)
    try:
        layer.load_packed(packed, sizes)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{label}: not a {layer.scheme} weight ({error})", fix="quantize it again") from None


def _stored_name(name: str, short: str) -> str:
    """Return bitsandbytes' name on disk: x.weight, x.weight.absmax, and x.SCB."""
    if short == "weight":
        return name
    is_linear_scale = short == "SCB" and name.endswith("weight")  # experts' names do not end with weight
    return name.removesuffix("weight") + short if is_linear_scale else f"{name}.{short}"


def check_finite(tensor: Tensor, label: str) -> None:
    if tensor.is_floating_point() and not is_finite(tensor):
        raise ModelError(f"{label} holds NaN or infinity", fix="download the model again")


def is_finite(tensor: Tensor) -> bool:
    # `torch.isfinite` makes a copy, which for an embedding of 262,144 rows determines the peak memory of a run.
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())  # both are NaN if any element is
    return bool(torch.isfinite(low) & torch.isfinite(high))
