"""Compiles the loops of kernels.py in a process of its own, once for a machine and a type of weights.

The process that compiles a loop runs other machine code than one that reads it from numba's cache: it calls the body
of a parallel loop as it was compiled alone, not the copy that was optimised once more with what surrounds it and then
kept. The results differ in their last bits, and a resumed run would not be bit-identical to one that had compiled.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numba
import torch

from strop.machine.probe import probe
from strop.runs.lock import sha256_text

SOURCES = ("kernels.py", "compiled.py", "attention_tiles.py", "tile.py", "amx.py", "lora_tiles.py")


def compile_once(dtype: torch.dtype, cache: Path) -> None:
    """Sees to it that this process finds every loop for weights of this type in numba's cache, the folder `cache`."""
    name = str(dtype).removeprefix("torch.")
    sources = [Path(__file__).with_name(file).stat().st_mtime_ns for file in SOURCES]
    mark = cache / f"strop-{sha256_text(repr((sources, numba.__version__, probe().cpu)))[:16]}-{name}"
    if not mark.is_file():
        # Where it fails, this process compiles for itself: its last bits may differ from those of the next one.
        subprocess.run([sys.executable, "-m", "strop.engine.cpu.warm", name], capture_output=True, check=False)
        cache.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _exercise(dtype: torch.dtype) -> None:
    """One step of tiny models, through every loop."""
    import numpy as np
    import peft
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

    from strop.data.conversation import Example
    from strop.engine.fast import FastLoss

    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64,
    }  # fmt: skip
    for model in (LlamaForCausalLM(LlamaConfig(**sizes)), Gemma2ForCausalLM(Gemma2Config(**sizes))):
        adapted = peft.get_peft_model(model.to(dtype), peft.LoraConfig(r=2, target_modules="all-linear"))
        # Alike at their beginning, and long enough for it to be shared.
        rows = [Example(np.arange(n, dtype=np.int32), np.float32(np.arange(n) > 0), "", 0) for n in (12, 15)]
        FastLoss(adapted, warm=False)(rows).backward()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    _exercise(getattr(torch, sys.argv[1]))
