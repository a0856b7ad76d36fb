"""One step of tiny models through compiled loops: run as processes by engine.cpu.warm, with a type of weights, how many
models (USUAL or ALL, or INTEGERS), and the part whose loops each compiles."""

from __future__ import annotations

import sys
from typing import Any, cast

import numpy as np
import peft
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from strop.data.types import Example
from strop.engine.eligibility import unsupported
from strop.engine.kernels.dispatch import ALL, INTEGERS, USUAL, Processor, save_in_turn
from strop.engine.train.attention import Heads
from strop.engine.train.fast import FastLoss
from strop.engine.train.fused_linear import Joined
from strop.engine.train.norms import Norm

# Family, dropout, DoRA. A Llama's loops are those of most models: fits.usual says of which.
LLAMA = ("llama", 0.0, False)
# With dropout and DoRA; offset norms and soft caps; LayerNorm, an activation that gates nothing; neighbours that turn.
OTHERS = (("llama", 0.1, True), ("gemma2", 0.1, False), ("gpt_neox", 0.0, False), ("glm", 0.0, False))
MODELS = {USUAL: (LLAMA,), ALL: (LLAMA, *OTHERS), INTEGERS: (LLAMA,)}


def exercise(dtype: torch.dtype, models: str = ALL, part: str = "") -> None:
    """Forward and backward, with weights in `dtype`."""
    if part == "attention":
        cast(Any, Joined).__call__ = _no_products
        for kind in (Norm, *Norm.__subclasses__()):  # they are among the others' loops
            cast(Any, kind).forward = lambda norm, x, room=None: torch.zeros_like(x)
            cast(Any, kind).backward = lambda norm, grad, x: torch.zeros_like(grad)
    elif part == "products":
        cast(Any, Processor).attention = lambda processor, size: _no_attention
        cast(Any, Processor).aside = lambda processor: None
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    for family, dropout, dora in MODELS[models]:
        own = {"num_key_value_heads": 2} if family == "gpt_neox" else {}  # as many as there are heads, always
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**sizes, **own}))
        config = peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=dropout, use_dora=dora)
        adapted = peft.get_peft_model(base.to(dtype), config)
        if unsupported(adapted) is not None:  # transformers 5.0: no Gemma meets its loops
            continue
        # Alike at their beginning, and long enough for it to be shared.
        rows = [Example(np.arange(n, dtype=np.int32), (np.arange(n) > 0).astype(np.float32), "", 0) for n in (12, 15)]
        step = FastLoss(adapted.train(), warm=False, integers=models == INTEGERS)
        result = step.last_hidden(rows).sum() if part == "attention" else step(rows)
        result.backward()  # type: ignore[no-untyped-call]


def _no_products(joined: Joined, x: Tensor, tokens: Tensor, residual: Tensor | None = None) -> Tensor:
    return x.new_zeros(len(x), joined.outputs).requires_grad_() + x[:, :1]


def _no_attention(qkv: Tensor, heads: Heads, *_: object) -> Tensor:
    return qkv[:, : heads.query * heads.size].contiguous()


if __name__ == "__main__":
    save_in_turn()
    exercise(getattr(torch, sys.argv[1]), *sys.argv[2:])


# ---- from strop.engine.kernels.warmup_decode ----
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

from strop.engine.decode.batch import Batch, answer_all
from strop.engine.decode.decoder import Decoder
from strop.engine.decode.sampling import Sampling, Text
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
    sampled = [Text(prompt, name, most=3, sampling=sampling, logprobs=0) for name in ("default", None)]
    for texts in (sampled, [] if part == "attention" else [Text(prompt, None, most=3)]):
        for _ in answer_all(Batch(Decoder(model, 256, warm=False), 2), texts):
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
