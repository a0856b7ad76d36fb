"""Several adapters on one base, in one batch: each token goes through the adapter of the request it belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from strop.engine.train.transfer import sent
from strop.models.lora import adapter_delta, add_to_base


def can_mix(model: Any) -> bool:
    """Are all adapters of a model plain LoRA on linear layers? Others (DoRA, trained rows or modules) change more.

    The head sees the last tokens of texts alone, so that `MixedLora` could not tell there whose they are.
    """
    if isinstance(model.get_output_embeddings(), LoraLayer):
        return False
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return False
        if isinstance(module, LoraLayer):
            variants = [*module.lora_variant.values(), *(bias for bias in module.lora_bias.values() if bias)]
            if type(module) is not PeftLinear or variants or module.merged:
                return False
    return True


class MixedLora:
    """Takes the place of peft's forward on every LoRA layer of a model.

    `tokens`: for each adapter, which tokens of the batch, counted through its rows, are its own; None: all of them.
    """

    def __init__(self, model: Any) -> None:
        assert can_mix(model)
        self.tokens: dict[str, Tensor | None] = {}
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.forward = partial(self._forward, module)

    def choose(self, adapters: Iterable[str | None], device: torch.device) -> None:
        """The adapter of each token of the next batch; None: the base alone."""
        of = np.array([name or "" for name in adapters])
        names = sorted(set(of.tolist()) - {""})
        if len(names) == 1 and (of == names[0]).all():
            self.tokens = {names[0]: None}
        else:
            self.tokens = dict(zip(names, sent([np.flatnonzero(of == name) for name in names], device), strict=True))

    def _forward(self, module: Any, x: Tensor) -> Tensor:
        change: Tensor | None = None
        for name, own in self.tokens.items():
            if name not in module.lora_A:
                continue
            if own is None:
                change = adapter_delta(module, name, x)
                continue
            some = adapter_delta(module, name, x.flatten(0, -2)[own])
            if change is None:
                change = some.new_zeros(*x.shape[:-1], some.shape[-1])
            change.view(-1, some.shape[-1])[own] = some
        result: Tensor = module.base_layer(x) if change is None else add_to_base(module.base_layer, x, change)
        return result
