"""The families whose layers the fast step knows, one row each, and what it must decline in a model of theirs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import nn

from strop.engine.dropout import CountedDropout
from strop.engine.joined import Quantized, base_of


@dataclass(frozen=True)
class Family:
    """Where a family's decoder layer differs from Llama's."""

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    norm_offset: float = 0.0  # 1: the norms' weights are stored as their difference from 1
    mlp_norm: str = "post_attention_layernorm"
    after_attention: str | None = None  # norms of what a block adds to the residual stream
    after_mlp: str | None = None


GEMMA = Family(
    norm_offset=1.0,
    mlp_norm="pre_feedforward_layernorm",
    after_attention="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
)
FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "phi3": Family(qkv=("qkv_proj",), gate_up=("gate_up_proj",)),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
}


def unsupported(model: nn.Module) -> str | None:
    """Why the fast step cannot compute this model, in words for the user; None where it can."""
    if not isinstance(model, PeftModel):
        return "the model has no peft adapter"
    base: Any = model.get_base_model()
    family = FAMILIES.get(base.config.model_type)
    if family is None:
        return f"model family {base.config.model_type} is not in the table of the fast step"
    return _unsupported_adapter(model, base, family) or _unsupported_base(base, family)


def _unsupported_adapter(model: Any, base: Any, family: Family) -> str | None:
    known = {id(module) for layer in base.model.layers for group in linears(layer, family) for module in group}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and id(module) not in known:
            return f"an adapter on {name}"
        if isinstance(module, LoraLayer):
            variants = [*module.lora_variant.values(), *(b for b in module.lora_bias.values() if b)]
            if type(module) is not PeftLinear or variants:
                return f"{name}: a variant of LoRA (DoRA, trained bias) ({type(module).__name__})"
            if any(type(one) not in (nn.Identity, nn.Dropout, CountedDropout) for one in module.lora_dropout.values()):
                return f"{name}: a dropout of its own"
            if module.merged:
                return f"{name}: its adapter is merged"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_A." not in name and ".lora_B." not in name:
            return f"{name} is trained in full"
    return None


def _unsupported_base(base: Any, family: Family) -> str | None:
    config = base.config
    for layer in base.model.layers:
        for module in (base_of(module) for group in linears(layer, family) for module in group):
            if type(module) is not nn.Linear and not isinstance(module, Quantized):
                return f"unknown weights ({type(module).__name__})"
    weights = [p for p in base.parameters() if not p.requires_grad and p.is_floating_point()]
    kinds = {(p.dtype, p.device) for p in weights} | {
        (module.dtype, module.weight.device) for module in base.modules() if isinstance(module, Quantized)
    }
    if len(kinds) != 1:
        return "base weights of several types or on several devices"
    if weights[0].dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return f"base weights in {weights[0].dtype}"
    activation = activation_of(config)
    if activation not in ("silu", "gelu_pytorch_tanh"):
        return f"activation {activation}"
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop"):
        if getattr(config, name, 0):
            return f"{name} above 0"
    if getattr(config, "use_bidirectional_attention", None):
        return "use_bidirectional_attention"
    if getattr(config, "attn_logit_softcapping", None) and weights[0].device.type != "cpu":
        return "attn_logit_softcapping, which PyTorch's own attention does not know"
    if family is GEMMA and not hasattr(base.model.embed_tokens, "embed_scale"):
        return "a transformers version that scales the embeddings outside of them"
    kind = getattr(base.model.rotary_emb, "rope_type", "default")
    for rope in kind.values() if isinstance(kind, dict) else [kind]:
        if rope in ("dynamic", "longrope"):  # the angles depend on the longest row of the batch
            return f"rotary embedding of type {rope}"
    return None


def linears(layer: Any, family: Family) -> Iterator[list[Any]]:
    """The layer's linear modules, in groups that share their input."""
    yield [getattr(layer.self_attn, name) for name in family.qkv]
    yield [layer.self_attn.o_proj]
    yield [getattr(layer.mlp, name) for name in family.gate_up]
    yield [layer.mlp.down_proj]


def activation_of(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)
