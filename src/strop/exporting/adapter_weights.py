"""Read the weights of an adapter and merge them into base tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from torch import Tensor

from strop.errors import ModelError
from strop.models.adapter_config import (
    SCORE_HEAD,
    STORED_BASE,
    WEIGHTS_FILE,
    check_adapter_fits,
    count_outputs,
    peft_load_errors,
    read_adapter_config,
)
from strop.models.experts import split_by_expert
from strop.models.load import load_without_weights
from strop.models.lora import add_score_head, check_head_bias, embedding_paths, extend_rows, ignore_peft_warnings
from strop.models.source import Source, read_safetensors_header
from strop.models.tokenizer import trained_token_rows

TOKEN_ROWS = "token_adapter.trainable_tokens_delta"  # trained embedding rows; despite the name, not differences
PREFIX = "base_model.model."  # peft's prefix of the base's names in an adapter file
LORA_MATRICES = ("lora_A.weight", "lora_B.weight")
MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")  # DoRA in older and newer versions of peft


def load_merger(source: Source, folder: Path) -> Callable[[str, Tensor], Tensor]:
    """Return a function (name, base tensor) -> merged tensor: in fp32 if the adapter changes it, else unchanged."""
    saved = read_weights(folder)
    rows, meta_model = trained_token_rows(read_adapter_config(folder)), load_without_weights(source)
    uses = Counter(id(parameter) for _, parameter in meta_model.named_parameters(remove_duplicate=False))
    parameters = meta_model.named_parameters(remove_duplicate=False)
    shared = [name for name, parameter in parameters if name in saved and uses[id(parameter)] > 1]
    if shared and not read_adapter_config(folder).get("ensure_weight_tying"):
        what = f"{folder}: {shared[0]} was trained in full, but another module of {source.name} shares its weight"
        raise ModelError(what, fix="serve the adapter on its base")
    targets = find_targets(source, folder)
    names = {name for name, _ in (*meta_model.named_parameters(), *meta_model.named_buffers())}  # one per shared weight
    for name, target in targets.items():
        if name not in names and f"{target.key}.lora_A.weight" in saved:
            what = f"{folder}: {target.key} shares its weight with another module of {source.name}"
            raise ModelError(what, fix="serve the adapter on its base, or train without it")
    mergeable = names | {f"{name.removesuffix('.weight')}.{TOKEN_ROWS}" for name in names}
    mergeable |= {f"{target.key}.{suffix}" for target in targets.values() for suffix in LORA_MATRICES + MAGNITUDES}
    if unsupported := saved.keys() - mergeable - {f"{SCORE_HEAD}.weight"}:
        raise ModelError(f"{folder}: {min(unsupported)} cannot be merged", fix="serve the adapter on its base")
    if rows and not any(name.endswith(TOKEN_ROWS) for name in saved):
        what = f"{folder}: its config lists trained embedding rows, but its file has none"
        raise ModelError(what, fix="use another adapter of the run")
    if rows:
        check_head_bias(meta_model)
    embedding_names = embedding_paths(meta_model)
    vocabulary_size = 1 + max((row for indices in rows.values() for row in indices), default=-1)

    def merge_tensor(name: str, weight: Tensor) -> Tensor:
        module = name.removesuffix(".weight")
        if module in embedding_names and len(weight) < vocabulary_size:
            weight = extend_rows(weight, vocabulary_size)
        if f"{module}.{TOKEN_ROWS}" in saved:
            weight = weight.float().clone()
            weight[rows[module.rpartition(".")[2]]] = saved[f"{module}.{TOKEN_ROWS}"].float()
            return weight
        if name in saved and not torch.equal(saved[name].float(), weight.float()):  # trained in full
            weight = saved[name].float()
        target = targets.get(name)
        if target is None or f"{target.key}.lora_A.weight" not in saved:
            return weight
        a, b = (saved[f"{target.key}.{suffix}"].float() for suffix in LORA_MATRICES)
        if target.experts:
            a, b = split_by_expert(a, b, target.experts)
            left, right = (a.transpose(1, 2), b.transpose(1, 2)) if target.transposed else (b, a)
            return torch.baddbmm(weight.float(), left, right, alpha=target.scale)
        merged = (weight.t() if target.transposed else weight).float().addmm(b, a, alpha=target.scale)  # (out, in)
        magnitudes = [saved[key] for key in (f"{target.key}.{suffix}" for suffix in MAGNITUDES) if key in saved]
        if magnitudes:  # DoRA, arXiv:2402.09353: scale each row to its learned magnitude
            merged *= (magnitudes[0].float() / merged.norm(dim=1))[:, None]
        return merged.t() if target.transposed else merged

    return merge_tensor


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter file. Tensors that were trained in full have the base's names."""
    tensors = {_remove_peft_names(key): tensor for key, tensor in load_file(folder / WEIGHTS_FILE).items()}
    return {name: tensor for name, tensor in tensors.items() if not _is_repeated(name, tensors)}


def read_names(folder: Path) -> list[str]:
    """Read the keys of `read_weights` without reading the tensors."""
    names = list(map(_remove_peft_names, read_safetensors_header(folder / WEIGHTS_FILE)))
    return [name for name in names if not _is_repeated(name, names)]


def _is_repeated(name: str, names: Container[str]) -> bool:
    """Return whether a tensor is there a second time. PEFT saves the biases of modules trained in full three times."""
    wrappers = (".modules_to_save.", ".original_module.")
    return any(wrapper in name and name.replace(wrapper, ".") in names for wrapper in wrappers)


def find_non_lora(folder: Path) -> list[str]:
    """Return the names of trained tensors that are not LoRA matrices: DoRA, biases, full modules, new tokens."""
    other = (STORED_BASE, *(f".{suffix}" for suffix in LORA_MATRICES))
    keys = read_safetensors_header(folder / WEIGHTS_FILE)
    return [_remove_peft_names(key) for key in keys if not key.endswith(other)]


def _remove_peft_names(key: str) -> str:
    """Remove peft's prefix and `base_layer`, except from LoRA matrices, whose names would no longer be unique."""
    key = key.removeprefix(PREFIX)
    return key if ".lora_" in key else key.replace(".base_layer.", ".")


@dataclass(frozen=True)
class Target:
    """A parameter of the base that has LoRA matrices."""

    key: str  # prefix of the LoRA matrices in the adapter file
    scale: float
    experts: int = 0  # 0 for the matrix of a linear layer
    transposed: bool = False  # whether the weight has the shape (.., in, out)


def find_targets(source: Source, folder: Path) -> dict[str, Target]:
    """Return the adapted parameters by name. Raises ModelError if the adapter's file does not match its config."""
    config: Any = peft.LoraConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = None  # otherwise peft warns that the model has another name
    config.trainable_token_indices = None  # the model without weights has no rows for new tokens
    with peft_load_errors(folder, source.name), ignore_peft_warnings():
        bare = load_without_weights(source)
        if outputs := count_outputs(folder):
            add_score_head(bare, outputs)
        adapted = peft.get_peft_model(bare, config)
    state = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    check_adapter_fits({key: weight.shape for key, weight in state.items()}, folder, source.name, lora_only=True)
    targets = {}
    for name, module in adapted.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and module.scaling:
            key, scale = name.removeprefix(PREFIX), float(next(iter(module.scaling.values())))
            assert math.isfinite(scale)
            is_wrapper = isinstance(module, ParamWrapper)
            parameter = f"{key.replace('.base_layer', '')}.{module.parameter_name if is_wrapper else 'weight'}"
            if is_wrapper and module.get_param().dim() == 3:
                targets[parameter] = Target(key, scale, module.num_experts, not module._did_swap_in_out_features)
            else:
                targets[parameter] = Target(key, scale, transposed=bool(getattr(module, "fan_in_fan_out", False)))
    return targets


def read_scales(source: Source, folder: Path) -> dict[str, float]:
    """Return the scale of each adapted linear layer by its module name."""
    targets = find_targets(source, folder)
    return {name.removesuffix(".weight"): target.scale for name, target in targets.items() if not target.experts}
