"""Biases that an adapter trained: peft puts them in the place of the base's, and leaves them there without it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn


def biases_of(base: nn.Module) -> dict[str, Tensor]:
    """Copies of all that a model without an adapter has, by name."""
    return {name: bias.detach().clone() for name, bias in base.named_parameters() if name.endswith("bias")}


def keep_biases(model: PeftModel, base: Mapping[str, Tensor]) -> None:
    """Has `without_adapter` put these back, which the model had before its adapter came."""
    named = ((name, name.removeprefix("base_model.model.")) for name, _ in model.named_parameters())
    cast(Any, model).biases_of_base = {
        name: base[plain] for name, one in named if (plain := one.replace(".base_layer.", ".")) in base
    }


def has_own_biases(model: nn.Module) -> bool:
    """Whether an adapter brought biases of its own."""
    return bool(getattr(model, "biases_of_base", None))


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """Inside this block the model is its base: the adapter is off, and biases are the base's."""
    own: Mapping[str, Tensor] = getattr(model, "biases_of_base", {})
    places = {name: weight for name, weight in model.named_parameters() if name in own} if own else {}
    tuned = {name: weight.detach().clone() for name, weight in places.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Careful, disabling adapter")  # it warns of what is done here
        with model.disable_adapter():
            try:
                _copy(own, places)
                yield
            finally:
                _copy(tuned, places)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    for name, place in places.items():
        place.copy_(values[name])
