"""Load a random model in the shape of an 8B Llama in nf4 and take two training steps of 128 tokens.

    python benchmarks/big_model.py FOLDER [--layers 32 --hidden 4096 ...]

Prints the time and the peak memory of each part. The 16-bit model (about 16 GB) is written to FOLDER layer by layer
and reused if it exists. Peaks exclude the memory of the process after its imports. The first run quantizes while it
loads; later runs find the quantized base in the cache.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from strop.config.schema import LoraSection
from strop.data.types import Example
from strop.engine.device import prepare_process
from strop.engine.step import step_for
from strop.machine.memory import start_peak
from strop.models.load import load_base
from strop.models.lora import add_lora, trainable_parameters
from strop.models.source import Source


def write_model(folder: Path, config: LlamaConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.hidden_size // config.num_attention_heads
    narrow = config.num_key_value_heads * size
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    index = {}
    random = torch.Generator().manual_seed(0)

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file)
        index.update(dict.fromkeys(tensors, file))

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).mul_(0.02).bfloat16()

    for number in range(config.num_hidden_layers):
        name = f"model.layers.{number}."
        norms = {
            f"{name}{norm}.weight": torch.ones(hidden, dtype=torch.bfloat16)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        write(
            f"model-{number:05d}.safetensors",
            norms | {f"{name}{key}.weight": weight(*shape) for key, shape in shapes.items()},
        )
    ends = {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
    ends |= {key: weight(config.vocab_size, hidden) for key in ("model.embed_tokens.weight", "lm_head.weight")}
    write("model-ends.safetensors", ends)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-value-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--scheme", default="nf4")
    parser.add_argument("--resident-layers", type=int, default=0)
    options = parser.parse_args()
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=options.inner,
        num_hidden_layers=options.layers, num_attention_heads=options.heads,
        num_key_value_heads=options.key_value_heads, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    if not (options.folder / "model.safetensors.index.json").is_file():
        write_model(options.folder, config)
    prepare_process()
    source = Source(str(options.folder), "folder", options.folder)
    memory, started = start_peak("cpu"), time.perf_counter()
    more = {} if options.scheme == "none" else {"resident_layers": options.resident_layers}
    model = load_base(source, torch.bfloat16, "cpu", quantization=options.scheme, **more)
    result = {"load": {"seconds": time.perf_counter() - started, "peak_bytes": memory.peak_bytes()}}
    weight_bytes = sum(p.nbytes for p in model.parameters())
    adapted = add_lora(model, LoraSection(r=16, alpha=32.0), None).train()
    step = step_for(adapted)
    optimizer = torch.optim.AdamW(list(trainable_parameters(adapted).values()), lr=1e-4, fused=True)
    ids = np.random.default_rng(0).integers(1, options.vocabulary, options.tokens).astype(np.int32)
    example = Example(ids, np.float32(np.arange(options.tokens) > 0), "", 0)
    for number in (1, 2):
        started = time.perf_counter()
        loss = step.token_loss([example]) / example.supervised
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        result[f"step {number}"] = {"seconds": time.perf_counter() - started, "loss": loss.item(), "step": step.name}
    result["held_bytes"] = weight_bytes
    result["peak_bytes"] = memory.peak_bytes()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
