"""Check from a model's config and the LoRA settings whether the fast step (strop.engine.train.fast) can train it.

`strop plan` uses these functions without loading PyTorch or weights. train/eligibility.py also uses them when a run
starts, before it checks the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from strop.config.schema import LoraSection
from strop.models.families.shape import EMBEDDINGS, EXPERT_FIELDS
from strop.models.families.table import FAMILIES, Family

# Dropout of the model itself. Unlike the dropout of adapters, its masks depend on the micro-batch.
DROPOUT_FIELDS = (
    "attention_dropout", "resid_pdrop", "embd_pdrop", "residual_dropout", "hidden_dropout", "embedding_dropout",
    "router_jitter_noise",
)  # fmt: skip
LONG_ROPE = {"su", "yarn"}  # older names of longrope in configs of Phi-3


def why_config_not_fast(config: Any, *, lora: LoraSection | None = None, targets: Sequence[str] = ()) -> str | None:
    """Return why the fast step cannot train a model, or None if the config and the settings do not rule it out.

    config: the text config, from transformers or as a mapping. lora: None skips the checks of LoRA settings.
    targets: the names of the modules that get adapters.
    """
    why = why_architecture_unsupported(config) or _why_loss_unsupported(config)
    if why is None and lora is not None:
        why = _why_lora_unsupported(lora, targets, FAMILIES[_get(config, "model_type")])
    return why


def why_architecture_unsupported(config: Any) -> str | None:
    """Return why the layers of a model differ from its entry in the families table, or None."""
    name = _get(config, "model_type")
    family = FAMILIES.get(name)
    if family is None:
        return f"model family {name} is not in the table strop.models.families.table"
    for field in (
        "qk_layernorm",
        "use_qk_norm",
    ):  # one weight per head and feature (StableLM, Cohere)
        if family.layer_norm and _get(config, field):
            return f"{field}: norms of q and k that are not RMSNorm"
    if _get(config, "use_bidirectional_attention") in (
        True,
        "all",
    ):  # Gemma 4's "vision" does not apply to text
        return "use_bidirectional_attention"
    if _get(config, "clip_qkv"):
        return "clip_qkv"
    has_experts = any((_get(config, field) or 1) > 1 for field in EXPERT_FIELDS)
    if has_experts and _get(config, "enable_moe_block") is not False and not family.moe:
        return "experts next to the MLP"
    for rope in rope_types(config):
        if rope in ("dynamic", "longrope"):  # the angles depend on the longest row of the batch
            return f"rotary embedding of type {rope}"
    return None


def active_dropout(config: Any) -> str | None:
    """Return the name of a dropout rate above 0 in the model's config, or None."""
    return next((field for field in DROPOUT_FIELDS if _get(config, field)), None)


def rope_types(config: Any) -> list[str]:
    """Return the types of rotary embedding in a config."""
    section = _get(config, "rope_parameters") or _get(config, "rope_scaling")
    if not isinstance(section, Mapping):
        return []
    nested = all(isinstance(value, Mapping) for value in section.values())
    types = [str(part.get("rope_type") or part.get("type")) for part in (section.values() if nested else [section])]
    return ["longrope" if _get(config, "model_type") == "phi3" and name in LONG_ROPE else name for name in types]


def why_full_not_fast(config: Any, dtype: str) -> str | None:
    """Return why the fast step cannot train all weights of a model that it can train with adapters, or None."""
    family = FAMILIES[_get(config, "model_type")]
    if family.model_parts and dtype != "fp32":
        return f"{family.model_parts}: trained in full only in fp32"
    reasons = {
        "inputs of each layer trained in full": family.per_layer_inputs,
        "attention sinks trained in full": family.attention_sinks,
        "parameters of the activation trained in full": _get(config, "hidden_act") == "xielu",
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _why_loss_unsupported(config: Any) -> str | None:
    field = active_dropout(config)
    if field is not None:
        return f"{field} above 0"
    if _get(config, "output_router_logits") and _get(config, "router_aux_loss_coef"):
        return "output_router_logits: a loss that balances experts"
    return None


def _why_lora_unsupported(lora: LoraSection, targets: Sequence[str], family: Family) -> str | None:
    on_head = "lm_head" in targets
    if lora.use_dora and on_head:
        return "DoRA on the output head"
    if lora.new_tokens and on_head:
        return "new tokens with an adapter on the output head"
    if lora.new_tokens and family.head_bias:
        return "new tokens with an output head that has a bias"
    trained_kinds = (*EMBEDDINGS, *family.norms, family.q_norm, family.k_norm, family.final_norm)
    # With lora.vision, the projector is among them. It is not a part of the text model, which the fast step computes.
    others = lora.modules_to_save if lora.vision == "none" else ()
    if any(name.rpartition(".")[2] not in trained_kinds for name in others):
        return "linear layers trained in full"
    return None


def _get(config: Any, field: str) -> Any:
    return config.get(field) if isinstance(config, Mapping) else getattr(config, field, None)
