"""A prompt and an answer of a tiny model through every compiled loop: run as a process by engine.cpu.warm, with a type
of weights."""

from __future__ import annotations

import sys

import numpy as np
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from strop.engine.answers.batch import Batch, answer_all
from strop.engine.answers.decoder import Decoder
from strop.engine.answers.text import Sampling, Text


def exercise(dtype: torch.dtype) -> None:
    """Texts of a Llama with an adapter, and of its base, whose weights are in `dtype`."""
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64,
    }  # fmt: skip
    base = LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear")).eval()
    prompt = np.arange(40, dtype=np.int32)
    sampling = Sampling(1.0, 0.9)
    texts = [Text(prompt, name, most=3, sampling=sampling, logprobs=0) for name in ("default", None)]
    for _ in answer_all(Batch(Decoder(model, 256, warm=False), 2), texts):
        pass


if __name__ == "__main__":
    exercise(getattr(torch, sys.argv[1]))
