"""What an adapter makes of its base, tensor by tensor: linear layers, experts, embedding rows, whole modules."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from torch import Tensor

from strop.errors import ModelError
from strop.models.adapter_config import WEIGHTS_FILE, check_adapter_fits, peft_load_errors, read_adapter_config
from strop.models.experts import split_by_expert
from strop.models.load import load_without_weights
from strop.models.lora import embedding_paths, extend_rows, ignore_peft_warnings
from strop.models.source import Source, read_safetensors_header
from strop.models.tokenizer import trained_token_rows

NEW_ROWS = "token_adapter.trainable_tokens_delta"  # embedding rows that were trained, whole
PREFIX = "base_model.model."  # of the base's names in an adapter file
PLAIN = ("lora_A.weight", "lora_B.weight")
LENGTHS = ("lora_magnitude_vector", "lora_magnitude_vector.weight")  # of DoRA's rows, by peft's version


def changes(source: Source, folder: Path) -> Callable[[str, Tensor], Tensor]:
    """What the adapter makes of a base tensor, by its name; fp32 where it changes something.

    Raises ModelError for what no merged weight can hold: what is trained besides LoRA layers, new rows and whole
    tensors, what has no place in the base, and an adapter on a layer whose weight is another's too (a head that is the
    embedding).
    """
    saved = read_weights(folder)
    rows, bare = trained_token_rows(read_adapter_config(folder)), load_without_weights(source)
    places_with = Counter(id(one) for _, one in bare.named_parameters(remove_duplicate=False))
    both = [name for name, one in bare.named_parameters() if name in saved and places_with[id(one)] > 1]
    if both and not read_adapter_config(folder).get("ensure_weight_tying"):
        what = f"{folder}: {both[0]} was trained in full, and another module's weight with it in {source.name} was not"
        raise ModelError(what, fix="serve the adapter on its base")
    places = places_of(source, folder)
    own = {name for name, _ in (*bare.named_parameters(), *bare.named_buffers())}  # of a weight in two places, one
    for name, place in places.items():
        if name not in own and f"{place.key}.lora_A.weight" in saved:
            what = f"{folder}: {place.key} has no weight of its own in {source.name}: it shares another's"
            raise ModelError(what, fix="serve the adapter on its base, or train without it")
    held = own | {f"{name.removesuffix('.weight')}.{NEW_ROWS}" for name in own}
    held |= {f"{place.key}.{part}" for place in places.values() for part in PLAIN + LENGTHS}
    if left := saved.keys() - held:
        raise ModelError(f"{folder}: {min(left)} cannot be merged", fix="serve the adapter on its base")
    if rows and not any(name.endswith(NEW_ROWS) for name in saved):
        what = f"{folder}: its config names embedding rows that were trained, and its file holds none"
        raise ModelError(what, fix="take another adapter of the run")
    with_rows, size = embedding_paths(bare), 1 + max((row for found in rows.values() for row in found), default=-1)

    def change(name: str, weight: Tensor) -> Tensor:
        module = name.removesuffix(".weight")
        if module in with_rows and len(weight) < size:
            weight = extend_rows(weight, size)
        if f"{module}.{NEW_ROWS}" in saved:
            weight = weight.float().clone()
            weight[rows[module.rpartition(".")[2]]] = saved[f"{module}.{NEW_ROWS}"].float()
            return weight
        if name in saved and not torch.equal(saved[name].float(), weight.float()):  # else it stays as it is stored
            weight = saved[name].float()
        place = places.get(name)
        if place is None or f"{place.key}.lora_A.weight" not in saved:
            return weight
        a, b = (saved[f"{place.key}.lora_{part}.weight"].float() for part in "AB")
        if place.experts:
            return place.onto_experts(weight.float(), a, b)
        merged = (weight.t() if place.transposed else weight).float().addmm(b, a, alpha=place.scale)  # (out, in)
        magnitude = next((saved[key] for key in (f"{place.key}.{part}" for part in LENGTHS) if key in saved), None)
        if magnitude is not None:  # DoRA, arXiv:2402.09353: the rows keep their learned length
            merged *= (magnitude.float() / merged.norm(dim=1))[:, None]
        return merged.t() if place.transposed else merged

    return change


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter file: what is trained whole under the base's own names, the rest under its layer's."""
    return {under_base(key): tensor for key, tensor in load_file(folder / WEIGHTS_FILE).items()}


def names_in(folder: Path) -> list[str]:
    """The names of what `read_weights` reads, from the header."""
    return [under_base(key) for key in read_safetensors_header(folder / WEIGHTS_FILE)]


def beyond_lora(folder: Path) -> list[str]:
    """The names of what is no plain LoRA matrix: of DoRA, biases, whole modules, new tokens."""
    return [name for name in names_in(folder) if not name.endswith(tuple(f".{part}" for part in PLAIN))]


def under_base(key: str) -> str:
    """A name in an adapter file without what peft puts around it: the bias of a layer that has LoRA is saved as
    `base_layer.bias`. Keys of LoRA itself keep `base_layer`, by which those of several parameters are told apart."""
    key = key.removeprefix(PREFIX)
    return key if ".lora_" in key else key.replace(".base_layer.", ".")


@dataclass(frozen=True)
class Place:
    """Where an adapter's weights are in its file, and how they change a parameter. experts: how many the parameter
    holds, 0 for a matrix. transposed: the parameter is (.., in, out)."""

    key: str
    scale: float
    experts: int = 0
    transposed: bool = False

    def onto_experts(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """weight (experts, .., ..); a, b: as peft saves them."""
        a, b = split_by_expert(a, b, self.experts)
        one, two = (a.transpose(1, 2), b.transpose(1, 2)) if self.transposed else (b, a)
        return torch.baddbmm(weight, one, two, alpha=self.scale)


def places_of(source: Source, folder: Path) -> dict[str, Place]:
    """The place of each adapted parameter, by its name; the scale as peft computes it from rank, alpha, patterns and
    rsLoRA. Raises ModelError where the matrices in the folder are not those that its config asks for on this base."""
    config: Any = peft.LoraConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = None  # peft would warn that the skeleton has another name
    config.trainable_token_indices = None  # of rows that the skeleton has not
    with peft_load_errors(folder, source.name), ignore_peft_warnings():
        adapted = peft.get_peft_model(load_without_weights(source), config)
    kept = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    check_adapter_fits({key: weight.shape for key, weight in kept.items()}, folder, source.name, lora_only=True)
    found = {}
    for name, module in adapted.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and module.scaling:
            key, scale = name.removeprefix(PREFIX), float(next(iter(module.scaling.values())))
            assert math.isfinite(scale)
            wrapped = isinstance(module, ParamWrapper)
            parameter = f"{key.replace('.base_layer', '')}.{module.parameter_name if wrapped else 'weight'}"
            if wrapped and module.get_param().dim() == 3:
                found[parameter] = Place(key, scale, module.num_experts, not module._did_swap_in_out_features)
            else:
                found[parameter] = Place(key, scale, transposed=bool(getattr(module, "fan_in_fan_out", False)))
    return found


def module_scales(source: Source, folder: Path) -> dict[str, float]:
    """The scale of each adapted linear layer, by its path."""
    places = places_of(source, folder)
    return {name.removesuffix(".weight"): place.scale for name, place in places.items() if not place.experts}
