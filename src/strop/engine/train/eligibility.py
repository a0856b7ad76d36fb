"""Find out from a model in memory whether the fast step can train it, and why not."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.other import TrainableTokensWrapper
from torch import nn

from strop.engine.eligibility import active_dropout, why_architecture_unsupported, why_config_not_fast
from strop.engine.train.dropout import CounterDropout
from strop.engine.train.peft_modules import base_module, current_module
from strop.models.experts import is_weight_adapter
from strop.models.families.layers import layer_norms, linears, model_computed_modules, text_decoder
from strop.models.families.table import FAMILIES, Family
from strop.models.quantize import QuantizedLinear

# Parts of the names of parameters that the fast step trains.
TRAINED = (
    ".lora_A.", ".lora_B.", ".lora_magnitude_vector.", ".trainable_tokens_delta.",
    ".score.modules_to_save.",  # the head of a reward model
)  # fmt: skip
ADAPTERS = ("lora_", "trainable_tokens_", "modules_to_save.")  # parts of the names of parameters outside the base


def find_model_dropout(model: nn.Module) -> str | None:
    """Return the name of an active dropout of the model itself, in its config or among its modules."""
    modules = (name for name, module in model.named_modules() if type(module) is nn.Dropout and module.p > 0)
    return active_dropout(cast(Any, model).config.get_text_config()) or next(modules, None)


def uses_llama_kernels(model: nn.Module) -> bool:
    """Return whether the step calls only the compiled CPU kernels that a Llama with plain LoRA needs.

    This excludes LayerNorm, ungated activations, rotary embedding outside of attention, dropout, DoRA, trained norms.
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


def why_not_fast(model: nn.Module) -> str | None:
    """Return why the fast step cannot train this model, or None if it can."""
    if not isinstance(model, PeftModel):
        return "the model has no peft adapter"
    base: Any = model.get_base_model()
    config = base.config.get_text_config()
    why = why_config_not_fast(config, device=base.get_output_embeddings().weight.device.type)
    if why is not None:
        return why
    decoder, config = text_decoder(base)
    family = FAMILIES[config.model_type]
    why = why_base_unsupported(base, decoder, config, family)
    return why or _why_adapters_unsupported(model, base, decoder, family)


def why_adapter_unsupported(name: str, module: LoraLayer, known: set[int]) -> str | None:
    """Return why a layer's adapter is not LoRA or DoRA on one of the linear layers `known` (by id)."""
    if id(module) not in known:
        return f"an adapter on {name}"
    variants = [variant for variant in module.lora_variant.values() if type(variant) is not DoraLinearVariant]
    on_linear = type(module) is PeftLinear or is_weight_adapter(module)
    if not on_linear or variants or any(module.lora_bias.values()):
        return f"{name}: a variant of LoRA ({type(module).__name__})"
    return f"{name}: its adapter is merged" if module.merged else None


def why_base_unsupported(base: Any, decoder: Any, config: Any, family: Family) -> str | None:
    """Return why a base model of a known family is not computed as its entry in the table says."""
    for layer in decoder.layers:
        for module in (base_module(module) for group in linears(layer, family) for module in group):
            if type(module) is not nn.Linear and not isinstance(module, QuantizedLinear):
                return f"unknown weights ({type(module).__name__})"
    own = {
        id(p) for part in model_computed_modules(decoder, family) for p in part.parameters()
    }  # some have routers in fp32
    named = [
        (name, p)
        for part in (decoder, base.get_output_embeddings())
        for name, p in part.named_parameters()
        if id(p) not in own and not any(word in name for word in ADAPTERS)
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
    if (why := why_architecture_unsupported(config, weights[0].device.type)) is not None:
        return why
    experts = ("experts", "block_sparse_moe")
    if any(getattr(layer, name, None) is not None for layer in decoder.layers for name in experts):
        return "experts next to the MLP"
    if config.model_type.startswith("gemma") and not hasattr(
        base_module(decoder.get_input_embeddings()), "embed_scale"
    ):
        return "a transformers version that scales the embeddings outside of them"
    return None


def _why_adapters_unsupported(model: Any, base: Any, decoder: Any, family: Family) -> str | None:
    known = {id(module) for layer in decoder.layers for group in linears(layer, family) for module in group}
    parts = list(model_computed_modules(decoder, family))
    own = {id(module) for part in parts for module in part.modules()}
    head = base.get_output_embeddings()
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and id(module) not in own:
            if (why := why_adapter_unsupported(name, module, {*known, id(head)})) is not None:
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
    biases = [
        base_module(module).bias for layer in decoder.layers for group in linears(layer, family) for module in group
    ]
    dense = [current_module(module) for module in (head, decoder.get_input_embeddings(), *layer_norms(decoder, family))]
    dense_parameters = [parameter for module in dense for parameter in base_module(module).parameters()]
    own_parameters = [parameter for part in parts for parameter in part.parameters()]
    supported = {id(parameter) for parameter in (*biases, *dense_parameters, *own_parameters)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in supported and not any(part in name for part in TRAINED):
            return f"{name} is trained in full"
    return None


def _why_tokens_unsupported(name: str, module: TrainableTokensWrapper, base: Any) -> str | None:
    head = base.get_output_embeddings()
    if module is not head and module is not base.get_input_embeddings():
        return f"rows of {name} are trained"
    if module is head and base_module(module).bias is not None:
        return "new tokens with an output head that has a bias"  # which peft ignores
    adapter = module.token_adapter
    if len([name for name in adapter.active_adapters if name in adapter.trainable_tokens_delta]) > 1:
        return "new tokens of several adapters"
    return "new tokens that are merged" if adapter.merged else None
