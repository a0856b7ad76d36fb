"""Find the submodules of a model that the family table names. This module does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from strop.models.families.table import Family

# activation in a config -> activation in strop.engine.kernels
ACTIVATIONS = {
    "silu": "SILU", "swish": "SILU", "gelu_pytorch_tanh": "GELU_TANH", "gelu_new": "GELU_TANH",
    "gelu_fast": "GELU_TANH", "gelu": "GELU", "relu2": "RELU2", "relu": "RELU", "xielu": "XIELU",
}  # fmt: skip


def linear_groups(layer: Any, family: Family) -> Iterator[list[Any]]:
    """Yield a layer's linears in groups with the same input: (q, k, v), (o), (gate, up), (down)."""
    # Groups are empty where another module replaces attention or the MLP.
    has_mixer, has_moe = mixer_module(layer, family) is not None, moe_module(layer, family) is not None
    attention = getattr(layer, family.attention, None)
    # Some layers of Gemma 4 have no v_proj and no k_proj.
    qkv = (getattr(attention, name, None) for name in family.qkv)
    yield [] if has_mixer else [module for module in qkv if module is not None]
    yield [] if has_mixer else [getattr(attention, family.o)]
    mlp = getattr(layer, family.mlp)
    yield [] if has_moe else [getattr(mlp, name) for name in family.gate_up]
    yield [] if has_moe else [getattr(mlp, family.down)]


def find_rotary(decoder: Any) -> Any | None:
    return next((getattr(decoder, name) for name in ("rotary_emb", "pos_emb") if hasattr(decoder, name)), None)


def mixer_module(layer: Any, family: Family) -> Any | None:
    """Return the module that replaces attention in this layer, or None."""
    return getattr(layer, family.mixer, None) if family.mixer else None


def moe_module(layer: Any, family: Family) -> Any | None:
    """Return the mixture of experts that replaces the MLP in this layer, or None."""
    mlp = getattr(layer, family.mlp)
    return mlp if family.moe and not hasattr(mlp, family.down) else None


def model_computed_modules(decoder: Any, family: Family) -> Iterator[Any]:
    """Yield all modules whose own forward is called by the fast training step, as it has no kernels for them."""
    for layer in decoder.layers:
        names = ("per_layer_input_gate", "per_layer_projection") if family.per_layer_inputs else ()
        parts = mixer_module(layer, family), moe_module(layer, family), *(getattr(layer, name, None) for name in names)
        yield from (part for part in parts if part is not None)
    if family.per_layer_inputs and hasattr(decoder, "per_layer_model_projection"):
        yield decoder.per_layer_model_projection


def load_balancing_coefficient(config: Any) -> float:
    """Return the coefficient of a mixture-of-experts' load-balancing loss, or 0 if the config disables it."""
    text = config.get_text_config()
    return float(getattr(text, "router_aux_loss_coef", 0) or 0) if getattr(text, "output_router_logits", False) else 0.0


def layer_norms(decoder: Any, family: Family) -> Iterator[Any]:
    for layer in decoder.layers:
        attention = getattr(layer, family.attention, None)
        owners = [*((layer, name) for name in family.norms), (attention, family.q_norm), (attention, family.k_norm)]
        yield from (getattr(owner, name) for owner, name in owners if getattr(owner, name, None) is not None)
    yield getattr(decoder, family.final_norm)


def text_decoder(base: Any) -> tuple[Any, Any]:
    """Return (decoder, config) of a causal language model, or of a multimodal model's language model."""
    # Llama 4 has no attribute of this name, and with images it has its language model itself.
    inner = getattr(base, base.base_model_prefix, None) or getattr(base, "model", base)
    candidates = (getattr(inner, name, None) for name in ("language_model", "text_model"))
    return next((module for module in candidates if module is not None), inner), base.config.get_text_config()


def activation_name(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu"))
