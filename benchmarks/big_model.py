"""Train a random model of the shape of a large one, in memory or streamed from disk, within a memory limit.

    python benchmarks/big_model.py FOLDER --shape 8B --placement streamed --limit 4 [--quantization nf4] [--out FILE]

Writes the 16-bit model (8B: 16 GB) to FOLDER layer by layer, or reuses it, and trains 3 steps of 512 tokens (`--steps`,
`--tokens`) in a process of its own. `--limit N`: in a cgroup of N GiB (Linux, root), whose limit includes the file
cache. Prints and stores tokens per second and those that the plan expects (run `strop doctor` before), seconds in which
the run waited for the disk, and the measured and the predicted peak of resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measured import child, write

GIB = 1 << 30
CGROUPS = Path("/sys/fs/cgroup")
# layers, hidden size, size within the MLP, heads, heads of keys and values, vocabulary
SHAPES = {"1.7B": (24, 2048, 8192, 32, 8, 49152), "8B": (32, 4096, 14336, 32, 8, 128256)}


def write_model(folder: Path, shape: str) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from strop.models.source import locate
    from strop.models.tokenizer import load_tokenizer

    layers, hidden, inner, heads, kv_heads, vocabulary = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=False, dtype="bfloat16",
        max_position_embeddings=8192, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    load_tokenizer(locate("demo")).save_pretrained(folder)
    narrow = kv_heads * hidden // heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    index: dict[str, str] = {}
    random, one = torch.Generator().manual_seed(0), torch.ones(hidden, dtype=torch.bfloat16)

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    def weight(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=random).mul_(0.02).bfloat16()

    for number in range(layers):
        name = f"model.layers.{number}."
        norms = {f"{name}{norm}.weight": one.clone() for norm in ("input_layernorm", "post_attention_layernorm")}
        weights = {f"{name}{key}.weight": weight(*size) for key, size in shapes.items()}
        save(f"model-{number:05d}.safetensors", norms | weights)
    ends = {key: weight(vocabulary, hidden) for key in ("model.embed_tokens.weight", "lm_head.weight")}
    save("model-ends.safetensors", ends | {"model.norm.weight": one})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@contextmanager
def memory_limit(gib: float | None) -> Iterator[Path | None]:
    """Yield the file through which a process joins a new cgroup with this limit, or None without a limit."""
    if gib is None:
        yield None
        return
    is_v2 = (CGROUPS / "cgroup.controllers").is_file()
    group = (CGROUPS if is_v2 else CGROUPS / "memory") / f"strop-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.max" if is_v2 else "memory.limit_in_bytes")).write_text(str(round(gib * GIB)))
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def train(options: argparse.Namespace) -> dict[str, Any]:
    import strop

    if options.join:
        Path(options.join).write_text(str(os.getpid()))
    # two rows of half of the tokens each
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "far", "away"]
    length = options.tokens // 4 - 12
    texts = [" ".join(words[(i * j + j) % len(words)] for j in range(length)) for i in range(8)]
    rows = [{"prompt": text, "completion": text} for text in texts]
    recipe = {
        "model.placement": options.placement, "model.quantization": options.quantization, "model.dtype": "bf16",
        "data.max_length": options.tokens, "train.batch_size": 2, "train.max_steps": options.steps,
        "train.micro_batch_tokens": 2048,
    }  # fmt: skip
    events: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        report = strop.train(
            model=options.folder, data=rows, out=f"{folder}/run", callback=events.append, progress=False, **recipe
        ).report
    planned = strop.plan(model=options.folder, data=rows, **recipe)
    steps = [event for event in events if event["event"] == "step"]
    memory, first, last = report["memory"], steps[0], steps[-1]
    return {
        "shape": options.shape, "placement": options.placement, "quantization": options.quantization,
        "limit_gib": options.limit, "steps": len(steps), "losses": [event["loss"] for event in steps],
        "tokens_per_s": (last["tokens"] - first["tokens"]) / (last["time"] - first["time"]),  # without the first step
        "planned_tokens_per_s": planned.tokens_per_s, "rates": planned.rate.source,
        "seconds": report["seconds"], "waited_s": report.get("disk_wait_s", 0.0),
        "measured_peak_bytes": memory["measured_peak_bytes"], "predicted_peak_bytes": memory["predicted_peak_bytes"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="8B", choices=SHAPES)
    parser.add_argument("--placement", nargs="+", default=["streamed"])
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--limit", type=float)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--join", help=argparse.SUPPRESS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        (options.placement,) = options.placement
        print(json.dumps(train(options)))
        return
    if not (options.folder / "model.safetensors.index.json").is_file():
        write_model(options.folder, options.shape)
    results = json.loads(options.out.read_text())["results"] if options.out and options.out.is_file() else []
    for placement in options.placement:
        with memory_limit(options.limit) as join:
            command = [sys.executable, *sys.argv, "--placement", placement, "--one"]
            results.append(child(command + (["--join", str(join)] if join else [])))
        print(json.dumps(results[-1]))
        if options.out:
            write(options.out, results)


if __name__ == "__main__":
    main()
