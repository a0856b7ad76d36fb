"""LoftQ's first values (arXiv:2310.08659, one round): the adapter begins as what quantization took from each weight.

peft's own replace_lora_weights_loftq needs a CUDA device and leaves LoRA's scale out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor

from strop.errors import ModelError
from strop.models.load import skeleton, weights_folder
from strop.models.quantize import QuantizedLinear
from strop.models.source import Source, prequantized
from strop.models.tensor_files import Tensors
from strop.models.tensor_names import Layout

ROUNDS, SPARE = 8, 8  # of the power iteration, and directions beyond the rank that it is given (arXiv:0909.4061)


def fill_in(model: peft.PeftModel, source: Source) -> None:
    """Sets A and B of each quantized layer to the nearest scale B A to its 16-bit weight less its quantized one.

    Reads the 16-bit weights one at a time. Draws from torch's generator. Raises ModelError where there are none.
    """
    if prequantized(source.config()):
        raise ModelError(
            f"{source.name}: its weights are quantized already, what was lost is not known",
            fix="use --lora.init default",
        )
    tensors = Tensors(weights_folder(source))
    layout = Layout(skeleton(source), tensors)
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, PeftLinear):
            held = module.base_layer
            now = held.dequantized() if isinstance(held, QuantizedLinear) else held.weight
            whole = layout.read(layout.group_of(f"{path}.weight"), tensors.get)[f"{path}.weight"]
            lost = whole.to(now.device).float() - now.detach().float()
            if lost.any():
                for name in module.active_adapters:
                    _set(module, name, lost)


def _set(module: PeftLinear, name: str, lost: Tensor) -> None:
    rank = min(module.r[name], *lost.shape)
    u, s, v = torch.svd_lowrank(lost, q=min(rank + SPARE, *lost.shape), niter=ROUNDS)
    u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    share = (s / module.scaling[name]).sqrt()
    module.lora_A[name].weight.data[:rank] = share[:, None] * v.t()
    module.lora_B[name].weight.data[:, :rank] = u * share


def moved_base(config: Mapping[str, Any]) -> str | None:
    """Of an adapter's config: why it does not belong to its base as that is stored. Some ways to begin take the first
    weights out of the base (PiSSA, arXiv:2404.02948), and what was trained stands on the rest."""
    start = str(config.get("init_lora_weights", True)).lower()
    if not start.startswith(("pissa", "corda", "olora", "lora_ga", "loftq")):
        return None
    convert = "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    return f"trained with init_lora_weights {start} on a base that peft changed: make it plain LoRA there, by {convert}"
