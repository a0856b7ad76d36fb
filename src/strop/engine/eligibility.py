"""What the fast step must decline in a model, in words for the user."""

from __future__ import annotations

from itertools import chain
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.other import TrainableTokensWrapper
from torch import nn

from strop.engine.train.dropout import CountedDropout
from strop.engine.train.full_modules import used
from strop.engine.train.fused_linear import base_of
from strop.models.experts import is_weight_adapter
from strop.models.families.layers import (
    find_rotary,
    layer_norms,
    linears,
    load_balancing,
    model_computed_modules,
    text_decoder,
)
from strop.models.families.table import FAMILIES, Family
from strop.models.quantize import QuantizedLinear

TRAINED = (
    ".lora_A.", ".lora_B.", ".lora_magnitude_vector.", ".trainable_tokens_delta.",
    ".score.modules_to_save.",  # a reward's head
)  # fmt: skip
ADAPTERS = ("lora_", "trainable_tokens_", "modules_to_save.")  # in the names of weights that are not the base's
DROPOUTS = (
    "attention_dropout", "resid_pdrop", "embd_pdrop", "residual_dropout", "hidden_dropout", "embedding_dropout",
    "router_jitter_noise",
)  # fmt: skip


def own_dropout(model: nn.Module) -> str | None:
    """Dropout that is the model's own, by name: it is drawn by micro-batch, and not by row as that of adapters is."""
    found = (name for name, module in model.named_modules() if type(module) is nn.Dropout and module.p > 0)
    config: Any = model.config
    active = (name for name in DROPOUTS if getattr(config.get_text_config(), name, 0))
    return next(chain(active, found), None)


def usual(model: nn.Module) -> bool:
    """Whether the step calls no other loops of a CPU than those of a Llama with plain LoRA: no LayerNorm, no activation
    that gates nothing, no rotary embedding aside; no dropout, DoRA or trained norm."""
    text = cast(Any, model).config.get_text_config()
    family, names = FAMILIES[text.model_type], dict(model.named_parameters())
    return (
        family.gated
        and not (family.layer_norm or family.separate_rope)
        and not any(isinstance(module, CountedDropout) and module.p for module in model.modules())
        and not any("magnitude_vector" in name or "modules_to_save" in name for name in names)
        and all("lora_" in name or "trainable_tokens_" in name for name, one in names.items() if one.requires_grad)
    )


def unsupported(model: nn.Module) -> str | None:
    """Why the fast step cannot compute this model; None where it can."""
    if not isinstance(model, PeftModel):
        return "the model has no peft adapter"
    base: Any = model.get_base_model()
    kind = base.config.get_text_config().model_type
    family = FAMILIES.get(kind)
    if family is None:
        return f"model family {kind} is not in the table of the fast step"
    decoder, config = text_decoder(base)
    active = next((f"{name} above 0" for name in DROPOUTS if getattr(config, name, 0)), None)
    active = active or ("output_router_logits: a loss that balances experts" if load_balancing(config) else None)
    return (
        unsupported_base(base, decoder, config, family) or _unsupported_adapter(model, base, decoder, family) or active
    )


def _unsupported_adapter(model: Any, base: Any, decoder: Any, family: Family) -> str | None:
    known = {id(module) for layer in decoder.layers for group in linears(layer, family) for module in group}
    parts = list(model_computed_modules(decoder, family))
    own = {id(module) for part in parts for module in part.modules()}
    head = base.get_output_embeddings()
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and id(module) not in own:
            if (odd := odd_adapter(name, module, {*known, id(head)})) is not None:
                return odd
            if module is head and module.lora_variant:
                return "DoRA on the output head"
            if module.lora_variant and len(module.active_adapters) > 1:
                return f"{name}: DoRA with several adapters"
            if any(type(one) not in (nn.Identity, nn.Dropout, CountedDropout) for one in module.lora_dropout.values()):
                return f"{name}: a dropout of its own"
    for name, module in base.named_modules():
        if isinstance(module, TrainableTokensWrapper) and (odd := _odd_tokens(name, module, base)) is not None:
            return odd
    biases = [base_of(module).bias for layer in decoder.layers for group in linears(layer, family) for module in group]
    whole = [used(module) for module in (head, decoder.get_input_embeddings(), *layer_norms(decoder, family))]
    parameters = [one for module in whole for one in base_of(module).parameters()]
    theirs = [one for part in parts for one in part.parameters()]
    taken = {id(one) for one in (*biases, *parameters, *theirs)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in taken and not any(part in name for part in TRAINED):
            return f"{name} is trained in full"
    return None


def _odd_tokens(name: str, module: TrainableTokensWrapper, base: Any) -> str | None:
    """Why rows that are trained are not those of the embedding or of the head."""
    head = base.get_output_embeddings()
    if module is not head and module is not base.get_input_embeddings():
        return f"rows of {name} are trained"
    if module is head and base_of(module).bias is not None:
        return "new tokens in front of a head with a bias"  # which peft leaves out
    adapter = module.token_adapter
    if len([one for one in adapter.active_adapters if one in adapter.trainable_tokens_delta]) > 1:
        return "new tokens of several adapters"
    return "new tokens that are merged" if adapter.merged else None


def odd_adapter(name: str, module: LoraLayer, known: set[int]) -> str | None:
    """Why a layer with adapters is not LoRA or DoRA on one of the `known` linear layers (by id)."""
    if id(module) not in known:
        return f"an adapter on {name}"
    variants = [x for x in module.lora_variant.values() if type(x) is not DoraLinearVariant]
    usual = type(module) is PeftLinear or is_weight_adapter(module)
    if not usual or variants or any(module.lora_bias.values()):
        return f"{name}: a variant of LoRA ({type(module).__name__})"
    return f"{name}: its adapter is merged" if module.merged else None


def unsupported_base(base: Any, decoder: Any, config: Any, family: Family) -> str | None:
    """Why a model of a known family is not computed by its row of the table, adapters aside."""
    for layer in decoder.layers:
        for module in (base_of(module) for group in linears(layer, family) for module in group):
            if type(module) is not nn.Linear and not isinstance(module, QuantizedLinear):
                return f"unknown weights ({type(module).__name__})"
    parts = [decoder, base.get_output_embeddings()]
    theirs = {
        id(p) for part in model_computed_modules(decoder, family) for p in part.parameters()
    }  # routers are in fp32, in some
    named = [
        (name, p)
        for part in parts
        for name, p in part.named_parameters()
        if id(p) not in theirs and not any(word in name for word in ADAPTERS)
    ]
    weights = [  # a trained bias is in fp32
        p for name, p in named if p.is_floating_point() and not (p.requires_grad and name.endswith("bias"))
    ]
    kinds = {(p.dtype, p.device) for p in weights} | {
        (module.dtype, module.weight.device) for module in decoder.modules() if isinstance(module, QuantizedLinear)
    }
    if len(kinds) != 1:
        return "base weights of several types or on several devices"
    if weights[0].dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return f"base weights in {weights[0].dtype}"
    for name in ("qk_layernorm", "use_qk_norm"):  # a weight for each head and number (StableLM, Cohere), LayerNorms
        if family.layer_norm and getattr(config, name, False):
            return f"{name}: norms of q and k that are not RMS norms"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):  # of Gemma 4 "vision": not of text
        return "use_bidirectional_attention"
    if any(
        getattr(layer, name, None) is not None for layer in decoder.layers for name in ("experts", "block_sparse_moe")
    ):
        return "experts beside the MLP"
    if weights[0].device.type != "cpu":  # PyTorch's own attention knows neither
        if getattr(config, "attn_logit_softcapping", None):
            return "attn_logit_softcapping outside of a CPU"
        if family.attention_sinks:
            return "attention sinks outside of a CPU"
        if family.per_layer_inputs:
            return "norms of values outside of a CPU"
    if getattr(config, "clip_qkv", None):
        return "clip_qkv"
    if config.model_type.startswith("gemma") and not hasattr(base_of(decoder.get_input_embeddings()), "embed_scale"):
        return "a transformers version that scales the embeddings outside of them"
    kind = getattr(find_rotary(decoder), "rope_type", "default")
    for rope in kind.values() if isinstance(kind, dict) else [kind]:
        if rope in ("dynamic", "longrope"):  # the angles depend on the longest row of the batch
            return f"rotary embedding of type {rope}"
    return None
