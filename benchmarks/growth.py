"""Measure how the cost of the fast step grows with the tokens of a micro-batch, document length and model size.

    python benchmarks/growth.py --out benchmarks/results/growth_DATE.json --plot docs/growth.svg

Random weights and rows, bf16, r 16 on all linear layers, forward and backward, every token supervised. Each point runs
in its own process: one warm-up step, then the median of three. Peak memory is resident memory beyond that before the
first step: `peak_bytes` with the default allocator; `needed_bytes` with an allocator that returns freed memory at once
(glibc keeps small blocks, in fragments that may be unusable).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import measured

SIZES: dict[str, dict[str, int]] = {  # Llama models with the sizes of SmolLM2; the smallest has half of its layers
    "77M": {"hidden_size": 576, "intermediate_size": 1536, "layers": 15, "heads": 9, "kv": 3},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "layers": 30, "heads": 9, "kv": 3},
    "360M": {"hidden_size": 960, "intermediate_size": 2560, "layers": 32, "heads": 15, "kv": 5},
}
TOKENS = [256, 512, 1024, 2048, 4096, 8192]
LENGTHS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
RANK = 16


def config_of(size: str) -> Any:
    import transformers

    shape = SIZES[size]
    return transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )


def point(size: str, tokens: int, length: int) -> dict[str, Any]:
    """Return tokens/s and memory of one step over `tokens` tokens in documents of `length`."""
    import numpy as np
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from strop.data.types import Example
    from strop.engine.train.fast import FastLoss
    from strop.machine.memory import start_peak

    base = transformers.AutoModelForCausalLM.from_config(config_of(size), dtype=torch.bfloat16)
    loss = FastLoss(get_peft_model(base, LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear")))
    rng = np.random.default_rng(0)
    weights = np.ones(length, dtype=np.float32)
    weights[0] = 0
    rows = [Example(rng.integers(1, 49152, length, dtype=np.int32), weights, "", i) for i in range(tokens // length)]
    loss.token_loss(rows[:1]).backward()
    before, seconds = start_peak("cpu"), []
    for _ in range(4):
        started = time.perf_counter()
        (loss.token_loss(rows) / tokens).backward()
        seconds.append(time.perf_counter() - started)
    return {
        "size": size,
        "tokens": tokens,
        "length": length,
        "tokens_per_s": tokens / statistics.median(seconds[1:]),
        "peak_bytes": before.peak_bytes(),
    }


def saved_bytes_per_token(size: str, length: int) -> float:
    """Return the bytes that the step saves for its backward, as `strop plan` counts them."""
    from strop.machine.probe import probe
    from strop.models.families.shape import ModelShape
    from strop.planning.activations import MicroBatch, layer_bytes
    from strop.planning.workload import AdapterWeights, BaseWeights, Compute, Workload

    shape = ModelShape.from_config(config_of(size).to_dict())
    tiles = probe().has_tiles(shape.head_size)
    workload = Workload(
        base=BaseWeights(shape=shape, parameters=shape.parameters),
        adapter=AdapterWeights(ranks=(RANK,) * len(shape.linears)),
        compute=Compute(attention_tiles=tiles),
    )
    return shape.layers * layer_bytes(workload, MicroBatch.rows([length]), length) / length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the points here as JSON")
    parser.add_argument("--plot", type=Path, help="draw them here")
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(point(options.point[0], int(options.point[1]), int(options.point[2]))))
        return

    def point_of(size: str, tokens: int, length: int, **settings: str) -> dict[str, Any]:
        words = [sys.executable, __file__, "--point", size, str(tokens), str(length)]
        return dict(measured.child(words, settings))

    expected = {
        "tokens": [("135M", tokens, 128) for tokens in TOKENS],
        "length": [("135M", 4096, length) for length in LENGTHS],
        "size": [(size, 2048, 128) for size in SIZES],
    }
    results: dict[str, list[dict[str, Any]]] = {}
    for axis, points in expected.items():
        results[axis] = []
        for size, tokens, length in points:
            results[axis].append(point_of(size, tokens, length))
            if axis == "tokens":
                trimmed = point_of(size, tokens, length, MALLOC_MMAP_THRESHOLD_="65536")
                results[axis][-1]["needed_bytes"] = trimmed["peak_bytes"]
            print(results[axis][-1], file=sys.stderr)
    many = results["tokens"][1:]  # the smallest fits into memory that the process already had
    slopes = {
        kind: statistics.linear_regression([p["tokens"] for p in many], [p[kind] for p in many]).slope
        for kind in ("peak_bytes", "needed_bytes")
    }
    report = {**results, "per_token": {**slopes, "formula_bytes": saved_bytes_per_token("135M", 128)}}
    print(json.dumps({key: value for key, value in report.items() if key not in results}, indent=2))
    if options.out:
        measured.write(options.out, report)
    if options.plot:
        plot(report, options.plot)


def plot(report: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
    labels = {"tokens": "tokens of a micro-batch", "length": "tokens of a document", "size": "parameters"}
    for axis, (key, label) in zip(axes, labels.items(), strict=False):
        names = [str(p[key]) for p in report[key]]
        axis.plot(names, [p["tokens_per_s"] for p in report[key]], marker="o")
        axis.set(xlabel=label, ylabel="tokens/s", ylim=(0, None))
    many, gib = report["tokens"], 2**30
    tokens, first = [p["tokens"] for p in many], many[1]
    for kind, label in (("peak_bytes", "as it is"), ("needed_bytes", "what is freed given back")):
        axes[3].plot(tokens, [p[kind] / gib for p in many], marker="o", label=label)
    rate = report["per_token"]["formula_bytes"]
    line = [(first["needed_bytes"] + rate * (count - first["tokens"])) / gib for count in tokens]
    axes[3].plot(tokens, line, linestyle="--", label="saved activations, by the formula")
    axes[3].set(xlabel=labels["tokens"], ylabel="GiB above the model", ylim=(0, None))
    axes[3].legend(loc="lower right")
    figure.savefig(file)


if __name__ == "__main__":
    main()
