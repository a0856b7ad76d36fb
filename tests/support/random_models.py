"""Tiny random models of each family, and rows for them: no tokenizer, nothing on disk."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from strop.data.conversation import Example

GEMMA = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
FAMILY_CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": 4}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "phi3": (Phi3Config, {"pad_token_id": 0, "sliding_window": 5}),
    "gemma2": (Gemma2Config, {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3_text": (Gemma3TextConfig, GEMMA),
}


def tiny(config: type = LlamaConfig, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
    return AutoModelForCausalLM.from_config(config(**{**shape, **heads, **changes}))


def example(length: int, seed: int, weights: list[float] | None = None) -> Example:
    rng = np.random.default_rng(seed)
    weight = np.asarray(weights if weights else [0.0] + [1.0] * (length - 1), dtype=np.float32)
    return Example(rng.integers(1, 97, length, dtype=np.int32), weight, "f", seed)
