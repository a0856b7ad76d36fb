"""Tiny random models of each family in the table, and rows for them, without tokenizer or files.

A new family needs one entry in FAMILY_CONFIGS: the config fields that its tiny model needs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from strop.config.schema import LoraSection
from strop.data.types import Example
from strop.models.experts import expert_parameters
from strop.models.load import keep_attention_softcap
from strop.models.lora import add_lora
from strop.models.quantize import directly_read_leaves

GEMMA = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
SAME = {"num_key_value_heads": 2}  # as many as query heads
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "attention_dropout": 0.0, "pad_token_id": 0,
}  # fmt: skip
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
STATES = {
    "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8,
    "pad_token_id": 0,
}  # fmt: skip
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {},
    "phi3": {"pad_token_id": 0, "sliding_window": 5},
    "gemma": SAME,
    "gemma2": {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": GEMMA,
    "gemma4_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4,
        "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97,
        "global_head_dim": 16, "num_global_key_value_heads": 2, "pad_token_id": 0,
    },
    "smollm3": {
        "no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 4, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "olmo2": {"pad_token_id": 0, "eos_token_id": 2},
    "olmo3": {**GEMMA, "pad_token_id": 0, "eos_token_id": 2},
    "granite": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 2.0,
    },
    "cohere": {"logit_scale": 0.25, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "cohere2": {**GEMMA, "logit_scale": 0.25, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "glm": {"pad_token_id": 0, "attention_bias": True},
    "glm4": {"pad_token_id": 0, "attention_bias": True},
    "phi": {**SAME, "partial_rotary_factor": 0.5},
    "stablelm": {"use_qkv_bias": True, "use_parallel_residual": True},
    "starcoder2": {"sliding_window": 4},
    "exaone4": GEMMA,
    "ministral": {**GEMMA, "pad_token_id": 0},
    "ministral3": {
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5,
            "original_max_position_embeddings": 8,
        },
    },
    "arcee": {},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0, "pad_token_id": 0},
    "helium": {"pad_token_id": 0},
    "hunyuan_v1_dense": {"pad_token_id": 0},
    "ernie4_5": {"use_bias": True},
    "apertus": {"pad_token_id": 0},
    "gpt_neox": {**SAME, "use_parallel_residual": True},
    "nanochat": {"final_logit_softcapping": 3.0},
    "mixtral": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**EXPERTS, "mlp_only_layers": [0]},
    "olmoe": EXPERTS,
    "glm4_moe": {**EXPERTS, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "pad_token_id": 0},
    "dots1": {**EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, **GEMMA},
    "ernie4_5_moe": {**EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "gpt_oss": {**EXPERTS, **GEMMA},
    "qwen3_next": {**EXPERTS, **LINEAR},
    "lfm2": {"layer_types": ["conv", "full_attention"], "pad_token_id": 0},
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "bamba": {**STATES, "attn_layer_indices": [1]},
    "jamba": {
        **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "granitemoehybrid": {
        **STATES, "layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 24,
        "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 2.0,
    },
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16},
}  # fmt: skip

# Text models of models that read images, without a class of their own: tests/engine/test_images.py covers them.
WITHIN_OTHERS = {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "glm4v_text"}


def tiny_of(family: str, **changes: object) -> PreTrainedModel:
    """Return a tiny model of a family in the table."""
    return tiny(type(AutoConfig.for_model(family)), **{**FAMILY_CONFIGS[family], **changes})


def tiny(config: type = LlamaConfig, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
    model = AutoModelForCausalLM.from_config(config(**{**shape, **heads, **changes}))
    keep_attention_softcap(model)
    return model


def adapted(config: type | str = LlamaConfig, lora: dict[str, Any] | None = None, **changes: Any) -> PeftModel:
    """Return a tiny model of a config class or family, with adapters whose two factors are not zero."""
    base = tiny_of(config, **changes) if isinstance(config, str) else tiny(config, **changes)
    for name, parameter in base.named_parameters():
        if "bias" in name or "norm" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    options = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **(lora or {})}
    if next(expert_parameters(base), None) or directly_read_leaves(base):  # PEFT's all-linear selects other layers here
        model = add_lora(base, LoraSection(r=3, alpha=5, **(lora or {})), None)
    else:
        model = get_peft_model(base, LoraConfig(**options))
    std = 0.3 if base.config.get_text_config().num_hidden_layers == 2 else 0.1  # rounding grows with depth
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def example(length: int, seed: int, weights: list[float] | None = None) -> Example:
    rng = np.random.default_rng(seed)
    weight = np.asarray(weights if weights else [0.0] + [1.0] * (length - 1), dtype=np.float32)
    return Example(rng.integers(1, 97, length, dtype=np.int32), weight, "f", seed)
