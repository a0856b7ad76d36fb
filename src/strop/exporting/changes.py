"""What an adapter makes of its base, tensor by tensor: linear layers, experts, embedding rows, whole modules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from torch import Tensor

from strop.adapters import WEIGHTS_FILE, read_adapter_config
from strop.errors import ModelError
from strop.model.experts import by_expert
from strop.model.facts import Source
from strop.model.load import skeleton
from strop.model.lora import embeddings, grown
from strop.model.tokenizer import new_rows

NEW_ROWS = "token_adapter.trainable_tokens_delta"  # embedding rows that were trained, whole


def changes(source: Source, folder: Path) -> Callable[[str, Tensor], Tensor]:
    """What the adapter makes of a base tensor, by its name; fp32 where it changes something.

    Raises ModelError for what no merged weight can hold: what is trained besides LoRA layers and whole modules, and an
    adapter on a layer whose weight is another's too (a head that is the embedding).
    """
    saved = {_plain(key): tensor for key, tensor in load_file(folder / WEIGHTS_FILE).items()}
    places = places_of(source, peft.LoraConfig.from_pretrained(str(folder)))
    known = {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_magnitude_vector.weight"}
    for key in saved:
        if not any(key.endswith(f".{part}") for part in (*known, NEW_ROWS, "weight", "bias")):
            raise ModelError(f"{folder}: {key} cannot be merged", fix="serve the adapter on its base")

    rows, bare = new_rows(read_adapter_config(folder)), skeleton(source)
    own = {name for name, _ in bare.named_parameters()}  # of a weight in two places, the first
    for name, place in places.items():
        if name not in own and f"{place.key}.lora_A.weight" in saved:
            what = f"{folder}: {place.key} has no weight of its own in {source.name}: it shares another's"
            raise ModelError(what, fix="serve the adapter on its base, or train without it")
    with_rows, size = embeddings(bare), 1 + max((row for found in rows.values() for row in found), default=-1)

    def change(name: str, weight: Tensor) -> Tensor:
        module = name.removesuffix(".weight")
        if module in with_rows and len(weight) < size:
            weight = grown(weight, size)
        if f"{module}.{NEW_ROWS}" in saved:
            weight = weight.float().clone()
            weight[rows[module.rpartition(".")[2]]] = saved[f"{module}.{NEW_ROWS}"].float()
            return weight
        if name in saved:
            return saved[name].float()
        place = places.get(name)
        if place is None or f"{place.key}.lora_A.weight" not in saved:
            return weight
        a, b = (saved[f"{place.key}.lora_{part}.weight"].float() for part in "AB")
        if place.experts:
            return place.onto_experts(weight.float(), a, b)
        merged = weight.float()
        merged = (
            merged.t().addmm(b, a, alpha=place.scale).t() if place.transposed else merged.addmm(b, a, alpha=place.scale)
        )
        magnitude = saved.get(f"{module}.lora_magnitude_vector", saved.get(f"{module}.lora_magnitude_vector.weight"))
        if magnitude is not None:  # DoRA, arXiv:2402.09353: the rows keep their learned length
            merged *= (magnitude.float() / merged.norm(dim=1))[:, None]
        return merged

    return change


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
        a, b = by_expert(a, b, self.experts)
        one, two = (a.transpose(1, 2), b.transpose(1, 2)) if self.transposed else (b, a)
        return torch.baddbmm(weight, one, two, alpha=self.scale)


def _plain(key: str) -> str:
    return key.removeprefix("base_model.model.")


def places_of(source: Source, config: Any) -> dict[str, Place]:
    """The place of each adapted parameter, by its name; the scale as peft computes it from rank, alpha, patterns and
    rsLoRA."""
    config.base_model_name_or_path = None  # peft would warn that the skeleton has another name
    config.trainable_token_indices = None  # of rows that the skeleton has not
    adapted = peft.get_peft_model(skeleton(source), config)
    found = {}
    for name, module in adapted.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and module.scaling:
            key, scale = _plain(name), float(next(iter(module.scaling.values())))
            assert math.isfinite(scale)
            wrapped = isinstance(module, ParamWrapper)
            parameter = f"{key.replace('.base_layer', '')}.{module.parameter_name if wrapped else 'weight'}"
            if wrapped and module.get_param().dim() == 3:
                found[parameter] = Place(key, scale, module.num_experts, not module._did_swap_in_out_features)
            else:
                found[parameter] = Place(key, scale, transposed=bool(getattr(module, "fan_in_fan_out", False)))
    return found


def module_scales(source: Source, config: Any) -> dict[str, float]:
    """The scale of each adapted linear layer, by its path."""
    places = places_of(source, config)
    return {name.removesuffix(".weight"): place.scale for name, place in places.items() if not place.experts}
