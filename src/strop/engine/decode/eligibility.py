"""What the answering engine must decline in a model, in words for the user."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from strop.engine.eligibility import odd_adapter, unsupported_base
from strop.models.families.layers import ACTIVATIONS, activation_name, linears, text_decoder
from strop.models.families.table import FAMILIES

SEVERAL = "several adapters at once"


def active_adapter(model: nn.Module) -> str | None:
    """The adapter that the model would answer with now; None: the base alone; or SEVERAL."""
    layer = next((module for module in model.modules() if isinstance(module, LoraLayer)), None)
    if layer is None or layer.disable_adapters:
        return None
    return str(layer.active_adapters[0]) if len(layer.active_adapters) == 1 else SEVERAL


def adapters_of(model: nn.Module) -> list[str]:
    return sorted(model.peft_config) if isinstance(model, PeftModel) else []


def unanswerable(model: nn.Module) -> str | None:
    """Why the engine cannot answer with this model; None where it can."""
    if getattr(model, "biases_of_base", None):  # model.biases: base and tuned would not go side by side
        return "biases that the adapter trained"
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    kind = base.config.get_text_config().model_type
    family = FAMILIES.get(kind)
    if family is None:
        return f"model family {kind} is not in the table of the fast step"
    if not family.fully_fused:
        return f"{kind}: {family.model_parts}"
    decoder, config = text_decoder(base)
    known = {id(module) for layer in decoder.layers for group in linears(layer, family) for module in group}
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return f"{name} is trained in full"
        if isinstance(module, LoraLayer) and (odd := odd_adapter(name, module, known)) is not None:
            return odd
    if activation_name(config) not in ACTIVATIONS:
        return f"activation {activation_name(config)}"
    head = base.get_output_embeddings()
    if head.weight.device.type != "cpu" or head.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"weights in {head.weight.dtype} on {head.weight.device.type}: strop's own loops answer on a CPU"
    return unsupported_base(base, decoder, config, family)
