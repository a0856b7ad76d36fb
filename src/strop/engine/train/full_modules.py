"""What is trained beside the adapters: modules in full (peft's modules_to_save), and new tokens: rows of the embedding,
and of the head (peft's trainable tokens).

Of new tokens only these rows have a gradient, where peft's own forward makes a copy of the whole embedding and a
gradient as large.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor


@dataclass(frozen=True)
class NewRows:
    """ids (n,): tokens; rows (n, h): what the embedding holds for them, in the type that is trained."""

    ids: tuple[int, ...]
    rows: Tensor

    def place(self, vocabulary: int) -> Tensor:
        """(vocabulary,): the row of each token, -1 where it has none."""
        return _place(self.ids, vocabulary, self.rows.device)

    def index(self) -> Tensor:
        """(n,): the tokens."""
        return _index(self.ids, self.rows.device)


def without(module: Any) -> Any:
    """The model's own module, under one that is trained in full or new tokens."""
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module


def used(module: Any) -> Any:
    """The module that computes now: where it is trained in full, the copy that is trained; not if adapters are off."""
    if not isinstance(module, ModulesToSaveWrapper):
        return without(module)
    active = module.active_adapters
    if module.disable_adapters or not active or active[0] not in module.modules_to_save:
        return module.original_module
    return module.modules_to_save[active[0]]


def new_rows(module: Any) -> NewRows | None:
    """Of an embedding or a head, where they are trained and active now."""
    if not isinstance(module, TrainableTokensWrapper) or module.disable_adapters:
        return None
    adapter = module.token_adapter
    names = [name for name in adapter.active_adapters if name in adapter.trainable_tokens_delta]
    if not names:
        return None
    return NewRows(tuple(adapter.token_indices[names[0]]), adapter.trainable_tokens_delta[names[0]])


def embedded(module: Any, ids: Tensor) -> Tensor:
    """(T, h) of ids (T,), as the module itself gives it, in the type of the model."""
    found, base = new_rows(module), without(module)
    x: Tensor = used(module)(ids).to(base.weight.dtype)
    if found is None:
        return x
    which = found.place(base.num_embeddings)[ids]
    own = F.embedding(which.clamp(min=0), found.rows).to(x.dtype)
    scale = getattr(base, "embed_scale", None)
    own = own if scale is None else own * scale.to(own.dtype)
    return torch.where((which >= 0)[:, None], own, x)


@lru_cache(4)
def _place(ids: tuple[int, ...], vocabulary: int, device: torch.device) -> Tensor:
    place = torch.full((vocabulary,), -1, device=device)
    place[_index(ids, device)] = torch.arange(len(ids), device=device)
    return place


@lru_cache(4)
def _index(ids: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(ids, device=device)
