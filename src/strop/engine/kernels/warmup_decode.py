"""A prompt and an answer of a tiny model through every compiled loop: run as processes by engine.cpu.warm, with a type
of weights, and the part whose loops each compiles."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from strop.engine.decode.batch import Batch, decode_all
from strop.engine.decode.decoder import CompiledDecoder
from strop.engine.decode.sampling import Sampling, SequenceState
from strop.engine.kernels.dispatch import answering_loops, save_in_turn

PARTS: Mapping[str, Sequence[str]] = {  # the loops that a layer calls; who compiles them all finds these of both parts
    "products": ("products", "place"),
    "attention": ("attend", "enter", "leave", "activate"),
}


def exercise(dtype: torch.dtype, part: str = "") -> None:
    """Texts of a Llama with an adapter, and of its base, whose weights are in `dtype`."""
    if part:
        _apart(answering_loops(), part)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64,
    }  # fmt: skip
    base = LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear")).eval()
    prompt = np.arange(40, dtype=np.int32)
    sampling = Sampling(1.0, 0.9)
    sampled = [
        SequenceState(prompt, name, max_new_tokens=3, sampling=sampling, num_logprobs=0) for name in ("default", None)
    ]
    for texts in (sampled, [] if part == "attention" else [SequenceState(prompt, None, max_new_tokens=3)]):
        for _ in decode_all(Batch(CompiledDecoder(model, 256, warm=False), 2), texts):
            pass


def _apart(loops: Any, part: str) -> None:
    """Has a layer call its loops from Python, and leave out those of other parts."""
    loops.through = loops.through.py_func
    loops.Held = lambda layer, keys, values: SimpleNamespace(layer=layer, keys=keys, values=values)
    loops.HeldRoom = lambda room: SimpleNamespace(room=room)
    for name in (name for other, names in PARTS.items() if other != part for name in names):
        setattr(loops, name, lambda *_: None)


if __name__ == "__main__":
    save_in_turn()
    exercise(getattr(torch, sys.argv[1]), *sys.argv[2:])
