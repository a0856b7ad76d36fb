"""Weights that are read, or written, one at a time: a model never lies in memory whole in 16 bit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from strop.errors import ModelError
from strop.model.facts import Source, weight_files
from strop.model.quantize import QuantizedLinear, pack, quantizable, replace_linears
from strop.runs.folder import new_folder

SHARD_BYTES = 1 << 30


class Tensors:
    """The tensors of a folder of safetensors files, read when asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._files = {}
        for file in weight_files(folder):
            handle = stack.enter_context(safe_open(file, "pt"))
            self._files.update(dict.fromkeys(handle.keys(), handle))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def size_bytes(self, name: str) -> int:
        """Bytes of a tensor in 32 bit, unread."""
        shape: list[int] = self._files[name].get_slice(name).get_shape()
        return 4 * math.prod(shape)

    def under(self, name: str) -> dict[str, Tensor]:
        """Constants of a quantized weight: of `x.weight`, x.weight.absmax as absmax, and x.SCB as SCB."""
        parent = name.removesuffix("weight")
        found = {key: key.removeprefix(f"{name}.") for key in self._files if key.startswith(f"{name}.")}
        found |= {f"{parent}SCB": "SCB"} if f"{parent}SCB" in self._files else {}
        return {short: self.get(key) for key, short in found.items()}


def quantize_folder(
    source: Source, skeleton: nn.Module, folder: Path, scheme: str, double: bool, dtype: torch.dtype
) -> None:
    """Writes the weights of a 16-bit folder, quantized where `quantizable` says so, into another, in small shards."""
    chosen = {f"{name}.weight" for name, _ in quantizable(skeleton)}
    with ExitStack() as stack, new_folder(folder) as temp:
        tensors, number, size = Tensors(source.path, stack), 0, 0
        shard: dict[str, Tensor] = {}
        index: dict[str, str] = {}
        names = list(tensors)
        for name in names:
            tensor = tensors.get(name)
            if tensor.is_floating_point() and not is_finite(tensor):
                raise ModelError(f"{source.name}: weight {name} holds NaN or infinity", fix="fetch the model again")
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
            parts = {name: tensor}
            if name in chosen:
                packed = pack(tensor, scheme, double=double)
                parts = {_key(name, short): part.contiguous() for short, part in packed.items()}
            shard |= parts
            size += sum(part.nbytes for part in parts.values())
            if size > SHARD_BYTES or name == names[-1]:
                number += 1
                file = f"model-{number:05d}.safetensors"
                save_file(shard, temp / file)
                index |= dict.fromkeys(shard, file)
                shard, size = {}, 0
        text = json.dumps({"metadata": {"scheme": scheme}, "weight_map": index})
        (temp / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def is_whole(folder: Path) -> bool:
    return (folder / "model.safetensors.index.json").is_file()


def build(make: Any, folder: Path, name: str, scheme: str, dtype: torch.dtype) -> nn.Module:
    """A model whose linear weights are quantized, filled tensor by tensor.

    make: builds the model without weights; its buffers are real. Raises ModelError where a weight is missing or does
    not fit.
    """
    with init_empty_weights(include_buffers=False):
        model: Any = make()
    layers = replace_linears(model, scheme, dtype)
    with ExitStack() as stack:
        tensors = Tensors(folder, stack)
        missing = []
        for key, parameter in list(model.named_parameters(remove_duplicate=False)):
            owner, _, leaf = key.rpartition(".")
            if key not in tensors:
                missing.append(key)
            elif leaf == "weight" and owner in layers:
                _fill(layers[owner], {"weight": tensors.get(key), **tensors.under(key)}, f"{name}: {key}")
            else:
                tensor = tensors.get(key)
                if tensor.shape != parameter.shape:
                    raise ModelError(
                        f"{name}: {key} has shape {tuple(tensor.shape)}, {tuple(parameter.shape)} expected"
                    )
                value = tensor.to(dtype) if tensor.is_floating_point() else tensor
                setattr(model.get_submodule(owner), leaf, nn.Parameter(value.clone(), requires_grad=False))
    model.tie_weights()
    lost = [key for key in missing if model.get_parameter(key).device.type == "meta"]
    if lost:
        what = f"{name}: {len(lost)} weights are missing or under other names, first {lost[0]}"
        raise ModelError(what, fix="use --model.quantization none")
    module: nn.Module = model
    return module


def _fill(layer: QuantizedLinear, packed: dict[str, Tensor], where: str) -> None:
    try:
        layer.fill({name: tensor.clone() for name, tensor in packed.items()})  # not a view of the mapped file
    except (KeyError, ValueError) as error:
        raise ModelError(f"{where}: not a {layer.scheme} weight ({error})", fix="quantize it again") from None


def _key(name: str, short: str) -> str:
    """bitsandbytes' names on disk: x.weight, x.weight.absmax, and x.SCB."""
    if short == "weight":
        return name
    return name.removesuffix("weight") + short if short == "SCB" else f"{name}.{short}"


def is_finite(tensor: Tensor) -> bool:
    """By its ends, through which NaN goes as well: isfinite makes copies twice as large as a 16-bit weight, which for
    an embedding of 262,144 rows was the peak of a whole run."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def floats(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The floating-point parameters, by name."""
    return ((name, p) for name, p in module.named_parameters() if p.is_floating_point())
