"""Measure the peak memory of a merge, for a random model with the sizes of Llama-3.2-1B (2.5 GB in bf16).

    python benchmarks/merge_memory.py FOLDER [--dtype bf16] [--out RESULT.json]

Creates the model and a rank-16 adapter in FOLDER (once), merges them in a new process without measuring, and prints its
peak beyond the idle process next to the size of the largest shard.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import peft
import torch
from measured import child, write
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from strop.models.source import locate
from strop.models.tokenizer import load_tokenizer

SHAPE = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip
MERGE = """
import json, sys
from pathlib import Path
from strop.exporting.merge import merge
from strop.machine.memory import start_peak
before = start_peak("cpu")
merge(sys.argv[1], Path(sys.argv[2]), dtype=sys.argv[3], measure=False)
print(json.dumps(before.peak_bytes()))
"""


def make(folder: Path) -> None:
    if (folder / "adapter").is_dir():
        return
    config = LlamaConfig(**SHAPE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model", max_shard_size="1GB")
    load_tokenizer(locate("demo")).save_pretrained(folder / "model")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    weights = {key: torch.randn(value.shape) * 0.02 for key, value in peft.get_peft_model_state_dict(adapted).items()}
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "model")
    adapted.peft_config["default"].save_pretrained(folder / "adapter")
    save_file(weights, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    make(options.folder)
    out = options.folder / "merged"
    shutil.rmtree(out, ignore_errors=True)
    peak = child([sys.executable, "-c", MERGE, str(options.folder / "adapter"), str(out), options.dtype])
    shards = [file.stat().st_size for file in out.glob("*.safetensors")]
    largest = max(shards)
    limit = 1.5 * largest + (1 << 30)
    result = {
        "dtype": options.dtype, "peak_bytes": peak, "largest_shard_bytes": largest, "shards": len(shards),
        "limit_bytes": int(limit), "within": peak <= limit,
    }  # fmt: skip
    print(json.dumps(result))
    if options.out:
        write(options.out, result)


if __name__ == "__main__":
    main()
