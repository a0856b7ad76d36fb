"""Measure the peak memory of loading and training with 16-bit, NF4 (streamed and resident) and int8 bases.

    python benchmarks/quantized_memory.py [--model demo] --data ROWS.jsonl [--steps 4 --tokens 1024] [--out RESULT.json]
    python benchmarks/quantized_memory.py --make FOLDER     # random weights in the shape of Llama-3.2-1B, for --model

Each case runs in its own process. `loading`: peak beyond that of the imports while the base loads from the quantized
cache, next to 1.3 times the quantized size and the largest shard. `training`: `measured_peak_bytes` of the run's
report. `kept of what the weights say`: the reduction of the training peak relative to 16 bit, as a share of the
reduction of the weights.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measured

from strop.models.load import weights_folder
from strop.models.source import locate, read_safetensors_header, weight_files

METHODS = {
    "16 bit": ("none", 0),
    "nf4 streamed": ("nf4", 0),
    "nf4 resident": ("nf4", 999),
    "int8 streamed": ("int8", 0),
}
LOAD = """
import sys, torch
from strop.engine.device import prepare_process
from strop.machine.memory import start_peak
from strop.models.source import locate
from strop.models import load
prepare_process()
model, scheme, layers = sys.argv[1], sys.argv[2], int(sys.argv[3])
source = locate(model)
folder = (
    load.weights_folder(source)
    if scheme == "none"
    else load.quantized_folder(source, scheme, True, torch.bfloat16)
)
import bitsandbytes, peft  # libraries are not part of the base
torch.ones(8, 8).bfloat16() @ torch.ones(8, 8).bfloat16()
before = start_peak("cpu")
base = load.load_base(source, torch.bfloat16, "cpu", quantization=scheme, resident_layers=layers)
print(before.peak_bytes(), folder)
"""
TRAIN = """
import sys, json, strop
model, scheme, layers, data, out, steps, tokens, rows = sys.argv[1:]
options = {"model.quantization": scheme, "train.micro_batch_tokens": int(tokens), "train.max_steps": int(steps)}
options |= {"train.gradient_checkpointing": "off", "train.batch_size": int(rows), "model.dtype": "bf16"}
if scheme != "none":
    options["model.resident_layers"] = int(layers)
run = strop.train(model=model, data=data, out=out, **options)
print(run.report["memory"]["measured_peak_bytes"])
"""


def process(code: str, *words: Any) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.splitlines()[-1].split()


def weights_bytes(folder: Path) -> tuple[int, int]:
    """Return the size of all weights of a folder, and of its largest file."""
    files = weight_files(folder)
    ends = [entry["data_offsets"] for file in files for entry in read_safetensors_header(file).values()]
    return sum(end - start for start, end in ends), max(file.stat().st_size for file in files)


def make(folder: Path) -> None:
    import torch
    from merge_memory import SHAPE
    from transformers import AutoModelForCausalLM, LlamaConfig

    from strop.models.tokenizer import load_tokenizer

    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1GB")
    load_tokenizer(locate("demo")).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--make", type=Path)
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.make:
        make(options.make)
        return
    whole = weights_bytes(weights_folder(locate(options.model)))[0]
    results: dict[str, Any] = {}
    for name in options.methods.split(","):
        scheme, layers = METHODS[name]
        process(LOAD, options.model, scheme, layers)  # fills the cache
        peak, folder = process(LOAD, options.model, scheme, layers)
        size, shard = weights_bytes(Path(folder))
        peaks = []
        for _ in range(options.repeats):
            with tempfile.TemporaryDirectory() as out:
                words = (options.data, f"{out}/run", options.steps, options.tokens, options.rows)
                peaks.append(int(process(TRAIN, options.model, scheme, layers, *words)[0]))
        one = results[name] = {
            "weights_bytes": whole if layers else size, "loading_peak_bytes": int(peak),
            "loading_limit_bytes": int(1.3 * size + shard), "training_peak_bytes": int(statistics.median(peaks)),
            "training_peaks_bytes": peaks,
        }  # fmt: skip
        saved = results["16 bit"]["training_peak_bytes"] - one["training_peak_bytes"]
        weights_saved = results["16 bit"]["weights_bytes"] - one["weights_bytes"]
        one["kept"] = saved / weights_saved if weights_saved else None
        mib = {
            key: f"{value / 2**20:,.0f}"
            for key, value in one.items()
            if key.endswith("_bytes") and isinstance(value, int)
        }
        share = "" if one["kept"] is None else f", kept of what the weights say {one['kept']:.0%}"
        print(f"{name:14} MiB: " + ", ".join(f"{key[:-6]} {value}" for key, value in mib.items()) + share, flush=True)
    if options.out:
        measured.write(options.out, results)


if __name__ == "__main__":
    main()
