"""Build a tiny random checkpoint of any causal language model class of transformers by shrinking its config.

Sizes are reduced by field name; EXCEPTIONS overrides them by type. `python -m tests.models.walk` uses all classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.support.families import tokenizer

LAYERS = 2
SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "model_dim", "hidden_dim", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "projection_dim", "out_hidden_size", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "moe_intermediate_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "mlp_hidden_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "intermediate_size_mlp", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("shared_intermediate_size", "expert_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_encoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "d_kv", "kv_channels", "attention_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "v_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k", "moe_topk", "num_selected_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "n_group", "topk_group", "num_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim",), 4),
    **dict.fromkeys(("index_head_dim",), 8),
    **dict.fromkeys(("index_n_heads",), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 256),
    **dict.fromkeys(("sliding_window", "attention_window_size", "local_attention"), 16),
    **dict.fromkeys(("image_size", "patch_size", "temporal_patch_size"), 0),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "d_state"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("vocab_size_per_layer_input",), 640),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank"), 8),
    **dict.fromkeys(("num_kv_shared_layers",), 0),
}  # fmt: skip
KEPT = ("image_size", "patch_size", "temporal_patch_size")
# Config fields that must differ from the rules above, by model type or part of one.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 1, "topk_group": 1, "num_experts_per_token": 2},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": "auto"},
    "blt.decoder_config": {"hidden_size_global": 32},
    "blt.encoder_config": {"hidden_size_global": 32},
    "dots3_note": {"adapter_in_dim": 32},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma4_assistant.text_config": {"hidden_size_per_layer_input": 0},
    "inkling2_loop_text": {"unpadded_vocab_size": 620},
    "inkling2_text": {"unpadded_vocab_size": 620},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_experts_per_token": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
        "indexer_compress_ratio": 4, "ngram_vocab_size_base": 100, "split_ngram_parts": 2, "hc_lowrank": 8,
        "ple_embed_dim": 32,
    },
    **{
        kind: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
        for kind in ("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text")
    },
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]
        },
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16]},
    "roc_bert": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64},
    "xlnet": {"initializer_range": 0.2},  # large enough that earlier tokens matter
    "xlm": {"n_words": 640, "emb_dim": 32, "causal": True},
    "zamba": {
        "num_hidden_layers": 6, "layer_types": ["mamba", "hybrid"] * 3, "attn_layer_period": 2, "attn_layer_offset": 1
    },
}  # fmt: skip
# Multimodal classes whose text half is often trained, with the suffix of tests.models.walk.
MULTIMODAL = (
    "gemma3!", "gemma4!", "qwen3_5!", "qwen3_5_moe!", "mistral3!", "llama4!", "qwen3_vl!", "qwen3_vl_moe!",
    "qwen2_5_vl!",
    "qwen2_vl!", "llava!", "llava_next!", "paligemma!", "internvl!", "aya_vision!", "idefics3!", "smolvlm!", "glm4v!",
    "glm4v_moe!", "cohere2_vision!", "mllama!", "aria!", "lfm2_vl!", "lfm3_vl!",
)  # fmt: skip


def text_types() -> dict[str, str]:
    """Return {model type: class name} of transformers' causal language models."""
    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config_of(kind: str) -> Any:
    """Return a tiny config of a model type."""
    return _shrink(CONFIG_MAPPING[kind], kind)


def _shrink(kind: Any, name: str) -> Any:
    """Return a config of a class with small sizes, in its parts too."""
    whole = kind()
    fields: dict[str, Any] = {}
    latent = hasattr(whole, "qk_rope_head_dim")  # DeepSeek's latent attention has other head sizes
    for field, value in whole.to_dict().items():
        if field in SMALL and field not in KEPT and isinstance(value, int) and not isinstance(value, bool) and value:
            fields[field] = min(value, SMALL[field])
        if field in ("num_key_value_heads", "head_dim") and value is None and not latent:
            fields[field] = SMALL[field]
        if field == "is_decoder" and value is False:  # makes BERT-like models causal
            fields[field] = True
    for part, _ in (getattr(kind, "sub_configs", None) or {}).items():
        section = getattr(whole, part, None)
        if section is not None and hasattr(section, "to_dict"):
            fields[part] = _shrink(type(section), f"{name}.{part}").to_dict()
    for ids in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        value = getattr(whole, ids, None)
        if (isinstance(value, int) and value >= 600) or isinstance(value, list):
            fields[ids] = 0
    if latent:
        fields |= {"num_key_value_heads": 4} | ({"head_dim": 4} if getattr(whole, "head_dim", None) else {})
    if isinstance(getattr(whole, "vocab_size", None), int):
        fields["vocab_size"] = 640
    if getattr(whole, "max_window_layers", None):
        fields["max_window_layers"] = 1
    for field, value in (("num_experts_per_tok", 2), ("n_group", 1), ("topk_group", 1)):
        if hasattr(whole, field) and getattr(whole, field) is None:
            fields[field] = value
    fields |= _layer_lists(whole)
    fields |= EXCEPTIONS.get(name, {})
    fields |= EXCEPTIONS.get(str(whole.model_type), {})
    return kind(**fields)


def _layer_lists(whole: Any) -> dict[str, Any]:
    """Shorten lists with one entry per layer so that each kind of entry still has a layer."""
    lists: dict[str, Any] = {}
    layers = getattr(whole, "num_hidden_layers", None)
    for field, value in whole.to_dict().items():
        if isinstance(value, list) and isinstance(layers, int) and len(value) == layers and field != "architectures":
            kinds = list(dict.fromkeys(map(str, value)))
            chosen = [value[list(map(str, value)).index(kind)] for kind in kinds][-LAYERS:]
            lists[field] = (chosen * LAYERS)[:LAYERS]
    return lists


def build(kind: str, *, multimodal: bool = False) -> Any:
    """Build a tiny random model of a type, with weights large enough that predictions differ."""
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    model = auto.from_config(config_of(kind)).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 and weight.is_floating_point() and "norm" not in name:
            weight.mul_(2)
    return model


def save(kind: str, folder: Path, *, multimodal: bool = False) -> int:
    """Save a tiny model with a ChatML tokenizer and return its number of parameters."""
    model = build(kind, multimodal=multimodal)
    model.save_pretrained(folder)
    tokenizer("chatml").save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


def multimodal_types() -> dict[str, str]:
    return dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
