"""Compare the fast step with the plain step for each family of the table, in the sizes of SmolLM2.

    python benchmarks/families.py [--layers 30 --rows 4 --rounds 3] [--only llama,glm] [--out RESULT.json]

One batch of random rows with the lengths of chat rows and a shared prefix, r 16 on all linear layers and experts, bf16,
forward and backward without an optimizer. Each family runs in its own process, both steps in turn; medians are
reported, without the first round. The models are random, with the family settings of the tests
(tests/support/random_models.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import measured
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.random_models import FAMILY_CONFIGS

from strop.config.schema import LoraSection
from strop.data.types import Example
from strop.engine.device import prepare_process
from strop.engine.train.fast import FastLoss
from strop.engine.train.plain import PlainLoss
from strop.models.lora import add_lora

SIZES = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 2048,
}  # fmt: skip
WINDOW = 512
MIXED = {  # for mixtures (8 experts, 2 per token), hybrids and Gemma 4
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8, "moe_intermediate_size": 768,
    "shared_expert_intermediate_size": 768, "linear_num_key_heads": 9, "linear_num_value_heads": 9,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64, "vocab_size_per_layer_input": 49152,
    "hidden_size_per_layer_input": 64, "global_head_dim": 64, "num_global_key_value_heads": 3,
    "num_kv_shared_layers": 10, "mamba_n_heads": 18, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_chunk_size": 256,
    "shared_intermediate_size": 1536,
}  # fmt: skip


def model_of(family: str, layers: int) -> Any:
    """Return a random model in bf16 with adapters."""
    own: dict[str, Any] = {}
    for name, value in FAMILY_CONFIGS[family].items():  # settings per layer are for two layers
        own[name] = (value * layers)[:layers] if isinstance(value, list) else value
    own |= {"sliding_window": WINDOW} if own.get("sliding_window") else {}
    own |= {name: value for name, value in MIXED.items() if own.get(name)}
    own["num_hidden_layers"] = layers
    own |= {"num_key_value_heads": SIZES["num_attention_heads"]} if "num_key_value_heads" in own else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **own})
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return add_lora(base, LoraSection(r=16, alpha=32), None).train()


def rows(number: int) -> list[Example]:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(160), 0.55, number), 46, 574).astype(int)
    system = rng.integers(1, 40000, 20)
    texts = [np.concatenate([system, rng.integers(1, 40000, n - 20)]).astype(np.int32) for n in lengths]
    return [Example(text, np.float32(np.arange(len(text)) > 0), "", 0) for text in texts]


def point(family: str, options: argparse.Namespace) -> dict[str, float]:
    """Return tokens/s of both steps."""
    prepare_process()
    model, batch = model_of(family, options.layers), rows(options.rows)
    ways = {"fast": FastLoss(model), "plain": PlainLoss(model)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds + 1):
        for name, loss in ways.items():
            with measured.Clock() as clock:
                loss.token_loss(batch).backward()
            model.zero_grad(set_to_none=True)
            seconds[name].append(clock.seconds)
    tokens = sum(len(row) for row in batch)
    return {name: tokens / statistics.median(taken[1:]) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="families, with commas between them")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(point(options.point, options)))
        return
    results = {}
    for family in options.only.split(",") if options.only else FAMILY_CONFIGS:
        result = measured.child([sys.executable, __file__, *sys.argv[1:], "--point", family])
        results[family] = {**result, "times": result["fast"] / result["plain"]}
        print(
            f"| {family} | {result['fast']:.0f} | {result['plain']:.0f} | {results[family]['times']:.1f} |", flush=True
        )
    if options.out:
        threads = torch.get_num_threads()
        measured.write(options.out, results, layers=options.layers, rows=options.rows, threads=threads)


if __name__ == "__main__":
    main()
