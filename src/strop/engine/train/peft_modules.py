"""Read PEFT's wrappers: base modules, active adapters, modules that are trained in full, and new tokens.

New tokens are trained rows of the embedding and of the output head (PEFT's trainable tokens). PEFT's own forward copies
the whole embedding and computes a gradient of the same size. The functions here compute only the rows' gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor

from strop.engine.train.dropout import CounterDropout, DropoutSpec, keep_scale


@dataclass(frozen=True)
class NewRows:
    """Trained rows (n, h) of an embedding or output head, for the n tokens `ids`."""

    ids: tuple[int, ...]
    rows: Tensor

    def token_ids(self) -> Tensor:
        """Return the tokens as a tensor, shape (n,)."""
        return _token_ids(self.ids, self.rows.device)


@dataclass(frozen=True)
class ActiveAdapters:
    """The active adapters of linear modules with the same input.

    parts, columns, scales: as in lora.Adapters. magnitudes: the magnitude vector of each adapter with DoRA, or empty.
    dropouts: the dropout module of each adapter.
    """

    parts: list[Tensor]
    magnitudes: list[Tensor]
    columns: tuple[tuple[int, int], ...]
    scales: tuple[float, ...]
    dropouts: list[Any]


def unwrap(module: Any) -> Any:
    """Return the original module under PEFT's wrapper for modules trained in full or for new tokens."""
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module


def base_module(module: Any) -> Any:
    """Return the original module under an adapter or any other PEFT wrapper."""
    return module.base_layer if isinstance(module, LoraLayer) else unwrap(module)


def current_module(module: Any) -> Any:
    """Return the active trained copy of a module that is trained in full, or else the original module."""
    if not isinstance(module, ModulesToSaveWrapper):
        return unwrap(module)
    active = module.active_adapters
    if module.disable_adapters or not active or active[0] not in module.modules_to_save:
        return module.original_module
    return module.modules_to_save[active[0]]


def new_rows(module: Any) -> NewRows | None:
    """Return the active trained rows of an embedding or output head, or None."""
    if not isinstance(module, TrainableTokensWrapper) or module.disable_adapters:
        return None
    adapter = module.token_adapter
    names = [name for name in adapter.active_adapters if name in adapter.trainable_tokens_delta]
    if not names:
        return None
    return NewRows(tuple(adapter.token_indices[names[0]]), adapter.trainable_tokens_delta[names[0]])


def embed(module: Any, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the embeddings (T, h) of tokens (T,). Equal to the module's own forward in this dtype."""
    trained, base = new_rows(module), unwrap(module)
    if base.weight.dtype != dtype:  # the weights are trained in fp32
        cast, scale = F.embedding(ids, base.weight, base.padding_idx).to(dtype), getattr(base, "embed_scale", None)
        return cast if scale is None else cast * scale.to(dtype)
    x: Tensor = current_module(module)(ids).to(dtype)
    if trained is None:
        return x
    row = _row_of_token(trained.ids, base.num_embeddings, trained.rows.device)[ids]
    new = F.embedding(row.clamp(min=0), trained.rows).to(x.dtype)
    scale = getattr(base, "embed_scale", None)
    new = new if scale is None else new * scale.to(new.dtype)
    return torch.where((row >= 0)[:, None], new, x)


def find_active_adapters(modules: Sequence[Any], bases: Sequence[Any]) -> ActiveAdapters:
    """Return the adapters that are active on the modules. bases: the base_module of each module."""
    parts: list[Tensor] = []
    magnitudes, columns, scales, dropouts, end = [], [], [], [], 0
    for module, base in zip(modules, bases, strict=True):
        start, end = end, end + base.out_features
        if not isinstance(module, LoraLayer) or module.disable_adapters or module.merged:
            continue
        for name in module.active_adapters:
            if name in module.lora_A:
                parts += [module.lora_A[name].weight, module.lora_B[name].weight]
                if name in module.lora_magnitude_vector:
                    magnitudes.append(module.lora_magnitude_vector[name].weight)
                columns.append((start, end))
                dropouts.append(module.lora_dropout[name])
                scales.append(float(module.scaling[name]) * keep_scale(_threshold(dropouts[-1])))
    return ActiveAdapters(parts, magnitudes, tuple(columns), tuple(scales), dropouts)


def dropout_spec(dropouts: Sequence[Any], token_keys: Tensor) -> DropoutSpec | None:
    """Return the masks for the dropout modules (CounterDropout or Identity) of adapters, or None without dropout.

    token_keys (T,): the key of each input row, see dropout.token_keys.
    """
    thresholds = tuple(map(_threshold, dropouts))
    if not any(thresholds):
        return None
    masks = next(dropout.masks for dropout in dropouts if isinstance(dropout, CounterDropout))
    numbers = tuple(getattr(dropout, "number", 0) for dropout in dropouts)
    return DropoutSpec(masks.seed, masks.step, token_keys, numbers, thresholds)


def _threshold(dropout: Any) -> int:
    return dropout.threshold if isinstance(dropout, CounterDropout) else 0


@lru_cache(4)
def _row_of_token(ids: tuple[int, ...], vocabulary: int, device: torch.device) -> Tensor:
    """Return the index of each token in ids, shape (vocabulary,), with -1 for tokens that are not in ids."""
    rows = torch.full((vocabulary,), -1, device=device)
    rows[_token_ids(ids, device)] = torch.arange(len(ids), device=device)
    return rows


@lru_cache(4)
def _token_ids(ids: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(ids, device=device)
