"""Check whether the fast step (strop.engine.train.fast) can train a loaded model."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from strop.engine.eligibility import (
    active_dropout,
    why_architecture_unsupported,
    why_config_not_fast,
    why_full_not_fast,
)
from strop.engine.images import image_features
from strop.engine.train.dropout import CounterDropout
from strop.engine.train.peft_modules import base_module, current_module
from strop.models.adapter_config import SCORE_HEAD
from strop.models.experts import is_weight_adapter
from strop.models.families.layers import layer_norms, linear_groups, model_computed_modules, text_decoder
from strop.models.families.table import FAMILIES, Family
from strop.models.introspect import text_filter
from strop.models.quantize import QuantizedLinear

# Substrings of the names of parameters that the fast step can train; `score` is a score head.
TRAINABLE = (".lora_A.", ".lora_B.", ".lora_magnitude_vector.", ".trainable_tokens_delta.", ".score.modules_to_save.")
ADAPTERS = ("lora_", "trainable_tokens_", "modules_to_save.")  # substrings of the names of adapter parameters


def find_model_dropout(model: nn.Module) -> str | None:
    """Return the name of an active dropout of the base model (a config field or a module), or None."""
    modules = (name for name, module in model.named_modules() if type(module) is nn.Dropout and module.p > 0)
    return active_dropout(cast(Any, model).config.get_text_config()) or next(modules, None)


def uses_llama_kernels(model: nn.Module) -> bool:
    """Return whether the model needs no other compiled CPU kernels than a Llama with plain LoRA.

    Others are for LayerNorm, ungated activations, rotary embeddings outside of attention, dropout, DoRA, trained norms.
    """
    text = cast(Any, model).config.get_text_config()
    family, parameters = FAMILIES[text.model_type], dict(model.named_parameters())
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    return (
        family.gated
        and not (family.layer_norm or family.separate_rope)
        and not any(isinstance(module, CounterDropout) and module.p for module in model.modules())
        and not any("magnitude_vector" in name or "modules_to_save" in name for name in parameters)
        and all("lora_" in name or "trainable_tokens_" in name for name in trained)
    )


def why_not_fast(model: nn.Module, dtype: torch.dtype | None = None) -> str | None:
    """Return why the fast step cannot train this model, or None if it can. dtype: see FastLoss."""
    is_adapted = isinstance(model, PeftModel)
    if not is_adapted and not any(parameter.requires_grad for parameter in model.parameters()):
        return "the model has no peft adapter"
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = base.config.get_text_config()
    why = why_config_not_fast(config)
    if why is not None:
        return why
    decoder, config = text_decoder(base)
    family = FAMILIES[config.model_type]
    features = image_features(base)
    why = None if features is None else features.why_model_computes
    why = why or why_base_unsupported(base, decoder, config, family)
    if why is None and not is_adapted:
        why = why_full_not_fast(config, "bf16" if dtype == torch.bfloat16 else "fp32")
    return why or _why_adapters_unsupported(model, base, decoder, family, all_weights=not is_adapted)


def why_adapter_unsupported(name: str, module: LoraLayer, known: set[int]) -> str | None:
    """Return why an adapter is not LoRA or DoRA on one of the linear layers with the ids `known`, or None if it is."""
    if id(module) not in known:
        return f"an adapter on {name}"
    is_on_linear = type(module) is PeftLinear or is_weight_adapter(module)
    has_variant = any(type(variant) is not DoraLinearVariant for variant in module.lora_variant.values())
    if not is_on_linear or has_variant or any(module.lora_bias.values()):
        return f"{name}: a variant of LoRA ({type(module).__name__})"
    return f"{name}: its adapter is merged" if module.merged else None


def why_base_unsupported(base: Any, decoder: Any, config: Any, family: Family) -> str | None:
    """Return why the fast step cannot compute a base model although its family is in the table, or None if it can."""
    for layer in decoder.layers:
        for module in (base_module(module) for group in linear_groups(layer, family) for module in group):
            if type(module) is not nn.Linear and not isinstance(module, QuantizedLinear):
                return f"unknown weights ({type(module).__name__})"
    # Trained biases, and modules that the model's own code computes (fp32 routers), may have another dtype.
    excluded = {id(p) for module in model_computed_modules(decoder, family) for p in module.parameters()}
    weights = [
        p
        for module in (decoder, base.get_output_embeddings())
        for name, p in module.named_parameters()
        if id(p) not in excluded
        and not any(part in name for part in ADAPTERS)
        and p.is_floating_point()
        and not (p.requires_grad and name.endswith("bias"))
    ]
    placements = {(p.dtype, p.device) for p in weights} | {
        (module.dtype, module.weight.device) for module in decoder.modules() if isinstance(module, QuantizedLinear)
    }
    if len(placements) != 1:
        return "base weights of several types or on several devices"
    if weights[0].dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return f"base weights in {weights[0].dtype}"
    if (why := why_architecture_unsupported(config)) is not None:
        return why
    kind, changes_logits = base.config.model_type, family.logit_scale(config) != 1
    changes_logits = changes_logits or bool(getattr(config, "final_logit_softcapping", None))
    if changes_logits and not config.model_type.startswith(kind):  # Aya Vision does not scale its logits as Cohere 2
        return f"{kind} may scale the logits of {config.model_type} differently"
    experts = ("experts", "block_sparse_moe")
    if any(getattr(layer, name, None) is not None for layer in decoder.layers for name in experts):
        return "experts next to the MLP"
    embedding = base_module(decoder.get_input_embeddings())
    if config.model_type.startswith("gemma") and not hasattr(embedding, "embed_scale"):
        return "a transformers version that scales the embeddings outside of them"
    return None


def _why_adapters_unsupported(
    model: Any, base: Any, decoder: Any, family: Family, *, all_weights: bool = False
) -> str | None:
    linear_modules = [module for layer in decoder.layers for group in linear_groups(layer, family) for module in group]
    model_computed = list(model_computed_modules(decoder, family))
    excluded = {id(module) for part in model_computed for module in part.modules()}
    head = base.get_output_embeddings()
    known, is_text = {id(module) for module in (*linear_modules, head)}, text_filter(base)
    for name, module in ((name, module) for name, module in base.named_modules() if is_text(name)):
        if isinstance(module, LoraLayer) and id(module) not in excluded:
            if (why := why_adapter_unsupported(name, module, known)) is not None:
                return why
            if module is head and module.lora_variant:
                return "DoRA on the output head"
            if module.lora_variant and len(module.active_adapters) > 1:
                return f"{name}: DoRA with several adapters"
            dropouts = module.lora_dropout.values()
            if any(type(dropout) not in (nn.Identity, nn.Dropout, CounterDropout) for dropout in dropouts):
                return f"{name}: a custom dropout"
    for name, module in base.named_modules():
        why = _why_tokens_unsupported(name, module, base) if isinstance(module, TrainableTokensWrapper) else None
        if why is not None:
            return why
    dense = [head, decoder.get_input_embeddings(), *layer_norms(decoder, family)]
    trainable_modules = [*(base_module(current_module(module)) for module in dense), *model_computed]
    supported = {id(parameter) for module in trainable_modules for parameter in module.parameters()}
    supported |= {id(base_module(module).bias) for module in linear_modules}
    if all_weights:
        supported |= {id(module.weight) for module in linear_modules}
    for name, parameter in base.named_parameters():
        is_supported = id(parameter) in supported or any(part in f".{name}" for part in TRAINABLE)
        if parameter.requires_grad and not is_supported and is_text(name):
            return f"{name} is trained in full"
    readable = {id(module) for module in dense} | excluded
    for name, module in base.named_modules():  # copies in a loaded adapter, which are not trained any more
        is_copied = isinstance(module, ModulesToSaveWrapper) and id(module) not in readable
        if is_copied and is_text(name) and name != SCORE_HEAD:
            return f"{name} was trained in full"
    return None


def _why_tokens_unsupported(name: str, module: TrainableTokensWrapper, base: Any) -> str | None:
    head = base.get_output_embeddings()
    if module is not head and module is not base.get_input_embeddings():
        return f"rows of {name} are trained"
    if module is head and base_module(module).bias is not None:
        return "new tokens with an output head that has a bias"  # PEFT ignores the bias
    adapter = module.token_adapter
    if len([name for name in adapter.active_adapters if name in adapter.trainable_tokens_delta]) > 1:
        return "new tokens of several adapters"
    return "new tokens that are merged" if adapter.merged else None
