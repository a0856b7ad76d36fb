"""Several adapters on one base, in one batch: each token goes through the adapter of the request it belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor


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
        of = list(adapters)
        names = sorted({name for name in of if name is not None})
        self.tokens = {
            name: None
            if set(of) == {name}
            else torch.tensor([place for place, own in enumerate(of) if own == name], device=device)
            for name in names
        }

    def _forward(self, module: Any, x: Tensor) -> Tensor:
        result: Tensor = module.base_layer(x)
        for name, own in self.tokens.items():
            if name not in module.lora_A:
                continue
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            kind = result.dtype
            if own is None:
                change = F.linear(F.linear(x.to(a.dtype), a), b) * module.scaling[name]
                result = (result + change).to(kind)
                continue
            some = x.reshape(-1, x.shape[-1])[own].to(a.dtype)
            change = F.linear(F.linear(some, a), b) * module.scaling[name]
            flat = result.view(-1, result.shape[-1])
            flat[own] = (flat[own] + change).to(kind)
        return result
