"""Measure tokens/s of a LoRA training step: strop's fast step, its plain step, and the share of the FLOP floor.

    python benchmarks/train_step.py [--model FOLDER --data FILE.jsonl] [--out RESULT.json]

Each tool runs in a separate process, and the tools alternate, so that drift of the machine affects all equally; medians
over --repeats. Without --model: random weights in the shape of SmolLM2-135M; without --data: random rows with the
lengths of chat rows. A data file holds chat rows (`messages`), rendered with the model's template; all tokens
supervised unless --supervised says less. Rates count real tokens, never padding. A new tool is one function in TOOLS.
Other tools on the same rows: --peers "unsloth, grouped;trl, tuned" --bench FOLDER --baselines FOLDER (see peers.py).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measured
import numpy as np
import torch
import transformers
from peers import PEERS
from peers import run as peers_run
from peft import LoraConfig, get_peft_model

from strop.data.types import Example
from strop.engine.device import prepare_process
from strop.engine.kernels.cpu.precision import measure
from strop.engine.train.eligibility import why_not_fast
from strop.engine.train.fast import FastLoss
from strop.engine.train.plain import PlainLoss
from strop.models.load import load_base
from strop.models.source import locate

SHAPE = {  # SmolLM2-135M
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
PLACES = ("out", "run", "model", "data", "bench", "baselines")  # options without effect on the results
Result = dict[str, Any]


def fast(options: argparse.Namespace) -> Result:
    return strop(options, lambda model: FastLoss(model))


def integers(options: argparse.Namespace) -> Result:
    """Run with frozen weights in 8-bit integers (train.int8_matmul); with --dtype fp32."""
    return strop(options, lambda model: FastLoss(model, int8_matmul=True))


def unshared(options: argparse.Namespace) -> Result:
    """Run the fast step without prefix sharing: every real token is computed."""
    return strop(options, lambda model: FastLoss(model, prefix_sharing=False))


def plain(options: argparse.Namespace) -> Result:
    return strop(options, PlainLoss)


def dropped(options: argparse.Namespace) -> Result:
    """Run the fast step with dropout, to compare with `fast`."""
    return fast(argparse.Namespace(**{**vars(options), "dropout": options.dropout or 0.05}))


def quantized(scheme: str, resident_layers: int) -> Callable[[argparse.Namespace], Result]:
    """Run the fast step on a quantized base: dequantized once (resident) or for each matmul (streamed)."""

    def tool(options: argparse.Namespace) -> Result:
        return strop(options, lambda model: FastLoss(model), scheme, resident_layers)

    return tool


def dora(options: argparse.Namespace) -> Result:
    return fast(argparse.Namespace(**{**vars(options), "dora": True}))


def plain_dora(options: argparse.Namespace) -> Result:
    """Run DoRA as peft computes it."""
    return plain(argparse.Namespace(**{**vars(options), "dora": True}))


TOOLS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "fast": fast,
    "integers": integers,
    "unshared": unshared,
    "plain": plain,
    "dropped": dropped,
    "dora": dora,
    "plain dora": plain_dora,
    **{
        f"{scheme} {where}": quantized(scheme, layers)
        for scheme in ("nf4", "int8")
        for where, layers in (("resident", 1 << 20), ("streamed", 0))
    },
}


def strop(
    options: argparse.Namespace, make: Callable[[Any], Any], scheme: str = "none", resident_layers: int = 0
) -> Result:
    """Train one pass over the rows with one optimizer step per batch and a cosine from --rate, as the other tools do.

    The first batch is computed once more as a warm-up, without an optimizer step, and is not counted.
    """
    prepare_process()
    model, examples = load_model(options, scheme, resident_layers), load_examples(options)
    reason = why_not_fast(model)
    assert reason is None, reason
    loss = make(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=options.rate, weight_decay=0.0, fused=True)
    batches = [examples[i : i + options.batch] for i in range(0, len(examples), options.batch)]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / len(batches)))
    )
    clock, losses = measured.Clock(), []
    loss.token_loss(batches[0]).backward()
    optimizer.zero_grad(set_to_none=True)
    for batch in batches:
        supervised = sum(example.supervised for example in batch)
        with clock:
            value = loss.token_loss(batch) / supervised
            value.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(value.detach().item())
    tokens = sum(len(example) for example in examples)
    supervised = sum(example.supervised for example in examples)
    return {
        "tokens_per_s": tokens / clock.seconds,
        "supervised_tokens_per_s": supervised / clock.seconds,
        "tokens_per_cpu_s": tokens / clock.cpu_seconds,
        "seconds": clock.seconds,
        "peak_rss_bytes": measured.peak_rss_bytes(),
        "mean_loss": statistics.mean(losses),
        "sixth_loss": losses[min(5, len(losses) - 1)],
    }


def load_model(options: argparse.Namespace, scheme: str, resident_layers: int) -> Any:
    torch.manual_seed(0)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    if scheme != "none":
        base = load_base(
            locate(options.model), dtype, "cpu", quantization=scheme, resident_layers=resident_layers
        )  # needs a folder
    elif options.model:
        base = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    else:
        base = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE), dtype=dtype)
    targets = ATTENTION if options.targets == "attention" else TARGETS
    variant = {"lora_dropout": options.dropout, "use_dora": getattr(options, "dora", False)}
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=targets, **variant)
    return get_peft_model(base, lora).train()


def load_examples(options: argparse.Namespace) -> list[Example]:
    """Return the rows in a fixed random order."""
    rng = np.random.default_rng(0)
    if options.data:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        lines = Path(options.data).read_text(encoding="utf-8").splitlines()
        rows = [tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=False) for line in lines]
    else:
        lengths = np.clip(rng.lognormal(np.log(160), 0.55, 100), 46, 574).astype(int)
        system = rng.integers(1, SHAPE["vocab_size"], 20)
        rows = [np.concatenate([system, rng.integers(1, SHAPE["vocab_size"], n - 20)]) for n in lengths]
    examples = []
    order = rng.permutation(len(rows))[: options.rows]
    if options.order == "grouped":  # like group_by_length in transformers: sorted within groups of several batches
        piece = options.batch * max(1, min(len(order) // (4 * options.batch), 50))
        order = np.concatenate(
            [sorted(order[i : i + piece], key=lambda row: -len(rows[row])) for i in range(0, len(order), piece)]
        )
    for i in order:
        weights = np.ones(len(rows[i]), dtype=np.float32)
        weights[: max(1, round(len(rows[i]) * (1 - options.supervised)))] = 0  # share of prompt tokens
        examples.append(Example(np.asarray(rows[i], dtype=np.int32), weights, "", int(i)))
    return examples


def floor_flops(config: Any, rank: int, examples: list[Example]) -> float:
    """Return the minimum FLOPs per token: matmuls of base (forward, input gradient), LoRA, attention and head."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query_size, kv_size = config.num_attention_heads * size, config.num_key_value_heads * size
    base = hidden * (query_size + 2 * kv_size) + query_size * hidden + 3 * hidden * inner
    ends = (hidden + query_size) + 2 * (hidden + kv_size) + (query_size + hidden) + 3 * (hidden + inner)
    lengths = np.array([len(example) for example in examples], dtype=np.float64)
    mean_length = (lengths**2).sum() / lengths.sum()  # mean document length over tokens
    share = sum(example.supervised for example in examples) / lengths.sum()
    linear = 4 * layers * base - 2 * hidden * (query_size + 2 * kv_size)
    # A causal query sees half the keys: 2 q s FLOPs forward, twice as many backward.
    return float(
        linear
        + 6 * rank * layers * ends
        + 6 * query_size * mean_length * layers
        + 4 * hidden * config.vocab_size * share
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder; default: random weights in the shape of SmolLM2-135M")
    parser.add_argument("--data", help="JSONL of chat rows; needs --model for its tokenizer")
    parser.add_argument("--tools", default="fast,unshared,plain", help=f"which, in turn: {', '.join(TOOLS)}")
    parser.add_argument("--peers", default="", help=f"of {', '.join(PEERS)}; with ; between them")
    parser.add_argument("--bench", help="folder with one virtual environment a peer, and data100/")
    parser.add_argument("--baselines", help="folder with the peers' scripts")
    parser.add_argument("--order", choices=["grouped", "random"], default="grouped", help="grouped: by length")
    parser.add_argument("--batch", type=int, default=4, help="rows a step")
    parser.add_argument("--rows", type=int, default=100, help="rows of the data")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", choices=["all-linear", "attention"], default="all-linear")
    parser.add_argument("--dropout", type=float, default=0.0, help="of strop's tools; of `dropped` 0.05 where it is 0")
    parser.add_argument("--supervised", type=float, default=1.0, help="share of each row that is supervised")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of the frozen weights")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate; peers have 2e-4")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="write the result here as JSON")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # the tool to run in this process
    options = parser.parse_args()
    if options.data and not options.model:
        parser.error("--data needs --model, for the tokenizer")
    torch.set_num_threads(options.threads)
    if options.run:
        print(json.dumps(TOOLS[options.run](options)))
        return
    peers = [name.strip() for name in options.peers.split(";") if name.strip()]
    names = [name for name in options.tools.split(",") if name] + peers
    runs: dict[str, list[Result]] = {name: [] for name in names}
    rates = []
    examples = load_examples(options)
    tokens = sum(len(example) for example in examples)
    for _ in range(options.repeats):
        rates.append(measure("cpu"))
        for name in names:
            if name in PEERS:
                runs[name].append(peers_run(name, options, tokens))
                print(f"{name}: {runs[name][-1]}", file=sys.stderr)
                continue
            runs[name].append(measured.child([sys.executable, __file__, *sys.argv[1:], "--run", name]))
            print(f"{name}: {runs[name][-1]['tokens_per_s']:.0f} tokens/s", file=sys.stderr)
    gemm = max(rate.bf16_flops if options.dtype == "bf16" else rate.fp32_flops for rate in rates)
    results = {
        name: {key: statistics.median(run[key] for run in actual) for key in actual[0]} for name, actual in runs.items()
    }
    floor = floor_flops(
        transformers.AutoConfig.from_pretrained(options.model) if options.model else transformers.LlamaConfig(**SHAPE),
        options.rank,
        examples,
    )
    for result in results.values():
        result["share_of_floor"] = result["tokens_per_s"] * floor / gemm
    about = {
        "options": {
            key: value
            for key, value in vars(options).items()
            if key not in ("out", "run", "model", "data", "bench", "baselines")
        },
        "gemm_flops": gemm,
        "floor_flops_per_token": floor,
        "tokens": tokens,
    }
    print(json.dumps({**about, "results": results}, indent=2))
    if options.out:
        measured.write(options.out, results, **about)


if __name__ == "__main__":
    main()
