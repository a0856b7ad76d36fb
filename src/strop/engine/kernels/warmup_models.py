"""Run tiny models, so that numba compiles and caches the CPU kernels.

`warmup.compile_once` runs this module as a program:

    python -m strop.engine.kernels.warmup_models train DTYPE usual|all|integers [attention|matmuls]
    python -m strop.engine.kernels.warmup_models decode DTYPE [attention|matmuls]

The last argument restricts the run to some of the kernels, so that two processes can share the work.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import peft
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from strop.data.types import Example
from strop.engine.decode.batch import Batch, decode_all
from strop.engine.decode.decoder import CompiledDecoder
from strop.engine.decode.sampling import Sampling, SequenceState
from strop.engine.kernels.dispatch import ALL, INTEGERS, USUAL, Backend, decode_kernels
from strop.engine.kernels.warmup import DECODE, TRAIN, lock_cache_writes
from strop.engine.train.attention import Heads
from strop.engine.train.eligibility import why_not_fast
from strop.engine.train.fast import FastLoss
from strop.engine.train.linear import FusedLinear
from strop.engine.train.norms import Norm

LLAMA = ("llama", 0.0, False)  # family, dropout, DoRA; most models use the same kernels as Llama
OTHERS = (
    ("llama", 0.1, True),  # dropout and DoRA
    ("gemma2", 0.1, False),  # norms with an offset, soft caps
    ("gpt_neox", 0.0, False),  # LayerNorm, ungated activation
    ("glm", 0.0, False),  # interleaved rotary embedding
)
FAMILIES = {USUAL: (LLAMA,), ALL: (LLAMA, *OTHERS), INTEGERS: (LLAMA,)}
DECODE_PARTS: Mapping[str, Sequence[str]] = {  # kernels that decode_layer.layer_forward calls
    "matmuls": ("linear_forward", "split_qkv"),
    "attention": ("attend", "norm_input", "add_residual", "activate_mlp"),
}


def warm_up_training(dtype: torch.dtype, models: str = ALL, part: str = "") -> None:
    """Run forward and backward of tiny models with weights in `dtype`. models: a key of FAMILIES."""
    if part == "attention":
        cast(Any, FusedLinear).__call__ = _skip_linear
        for kind in (Norm, *Norm.__subclasses__()):  # the other part compiles the norms
            cast(Any, kind).forward = lambda norm, x, buffer=None: torch.zeros_like(x)
            cast(Any, kind).backward = lambda norm, grad, x: torch.zeros_like(grad)
    elif part == "matmuls":
        cast(Any, Backend).attention = lambda backend, size: _skip_attention
        cast(Any, Backend).rope = lambda backend: None
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    for family, dropout, dora in FAMILIES[models]:
        kv_option = {"num_key_value_heads": 2} if family == "gpt_neox" else {}  # GPT-NeoX has no grouped heads
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**sizes, **kv_option}))
        config = peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=dropout, use_dora=dora)
        adapted = peft.get_peft_model(base.to(dtype), config)
        if why_not_fast(adapted) is not None:  # with transformers 5.0, FastLoss does not support Gemma
            continue
        # The rows share a prefix that is long enough for prefix sharing.
        rows = [Example(np.arange(n, dtype=np.int32), (np.arange(n) > 0).astype(np.float32), "", 0) for n in (12, 15)]
        step = FastLoss(adapted.train(), warm=False, int8_matmul=models == INTEGERS)
        result = step.last_hidden(rows).sum() if part == "attention" else step.token_loss(rows)
        result.backward()  # type: ignore[no-untyped-call]


def _skip_linear(linear: FusedLinear, x: Tensor, tokens: Tensor, residual: Tensor | None = None) -> Tensor:
    return x.new_zeros(len(x), linear.out_features).requires_grad_() + x[:, :1]


def _skip_attention(qkv: Tensor, heads: Heads, *_: object) -> Tensor:
    return qkv[:, : heads.num_query_heads * heads.size].contiguous()


def warm_up_decoding(dtype: torch.dtype, part: str = "") -> None:
    """Generate with a tiny Llama in `dtype`, with and without an adapter."""
    if part:
        _keep_part(decode_kernels(), part)
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
    for sequences in (sampled, [] if part == "attention" else [SequenceState(prompt, None, max_new_tokens=3)]):
        for _ in decode_all(Batch(CompiledDecoder(model, 256, warm=False), 2), sequences):
            pass


def _keep_part(kernels: Any, part: str) -> None:
    """Replace layer_forward by Python code that calls only the kernels of one part."""
    kernels.layer_forward = kernels.layer_forward.py_func
    kernels.LayerRef = lambda layer, keys, values: SimpleNamespace(layer=layer, keys=keys, values=values)
    kernels.BuffersRef = lambda buffers: SimpleNamespace(buffers=buffers)
    for key, names in DECODE_PARTS.items():
        for name in names if key != part else ():
            setattr(kernels, name, lambda *_: None)


WARM_UPS: dict[str, Callable[..., None]] = {TRAIN: warm_up_training, DECODE: warm_up_decoding}

if __name__ == "__main__":
    lock_cache_writes()
    WARM_UPS[sys.argv[1]](getattr(torch, sys.argv[2]), *sys.argv[3:])
