"""Compare DPO in strop and in TRL's DPOTrainer on pairs with a long shared prompt, in pairs/s.

    python benchmarks/preferences.py --trl PYTHON [--pairs 24] [--out FILE]    PYTHON: one that has trl and torch

Both train SmolLM2-135M (the demo model) in bf16 with LoRA r 16 on all linear layers, 8 pairs per step, without gradient
checkpointing, on pairs with a prompt of 200 tokens and answers of 60. strop's time covers the steps and the reference,
which it computes once; TRL computes the reference in each step, or before training with --precompute.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measured import child, peak_rss_bytes, write

PROMPT_TOKENS, ANSWER_TOKENS, BATCH = 200, 60, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_pairs(path: Path, number: int, tokenizer: Any) -> None:
    """Write texts of a known number of tokens, from words of one token each."""
    numbers = random.Random(0)
    words = [f" {name}" for name in ("house", "river", "green", "seven", "music", "paper", "winter")]
    assert all(len(tokenizer.encode(word, add_special_tokens=False)) == 1 for word in words)

    def text(tokens: int) -> str:
        return "".join(numbers.choice(words) for _ in range(tokens)).strip()

    with path.open("w", encoding="utf-8") as file:
        for _ in range(number):
            row = {"prompt": text(PROMPT_TOKENS), "chosen": text(ANSWER_TOKENS), "rejected": text(ANSWER_TOKENS)}
            file.write(json.dumps(row) + "\n")


def strop_run(data: str, steps: int) -> dict[str, Any]:
    import strop
    from strop.runs.events import read_events

    with tempfile.TemporaryDirectory() as folder:
        options = {"train.objective": "dpo", "train.batch_size": BATCH, "train.max_steps": steps, "model.dtype": "bf16"}
        run = strop.train(model="demo", data=data, out=f"{folder}/run", **options)
        events = list(read_events(Path(folder) / "run" / "events.jsonl"))
    reference = sum(event["seconds"] for event in events if event["event"] == "reference")
    seconds = run.report["seconds"] + reference
    memory = run.report["memory"]
    return {
        "pairs_per_s": steps * BATCH / seconds, "seconds": seconds, "reference_seconds": reference,
        "peak_rss_bytes": peak_rss_bytes(), "loss": run.report["loss"]["last"],
        "predicted_peak_bytes": memory["predicted_peak_bytes"], "measured_peak_bytes": memory["measured_peak_bytes"],
    }  # fmt: skip


def trl_run(model: str, data: str, steps: int, micro: int, precompute: bool) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    rows = load_dataset("json", data_files=data, split="train").map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1,
            per_device_train_batch_size=micro, gradient_accumulation_steps=BATCH // micro, max_steps=steps,
            gradient_checkpointing=False, max_length=1024, precompute_ref_log_probs=precompute,
        )  # fmt: skip
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
            args=args,
            train_dataset=rows,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS),
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    return {
        "pairs_per_s": steps * BATCH / seconds,
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "loss": loss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="a Python with trl")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--micro", type=int, default=4, help="pairs of TRL's micro-batch")
    parser.add_argument("--precompute", action="store_true", help="have TRL compute its reference before training")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, metavar=("TOOL", "MODEL", "DATA"))
    args = parser.parse_args()
    steps = args.pairs // BATCH
    if args.child:
        tool, model, data = args.child
        result = strop_run(data, steps) if tool == "strop" else trl_run(model, data, steps, args.micro, args.precompute)
        print(json.dumps(result))
        return
    from strop.models.load import weights_folder
    from strop.models.source import locate
    from strop.models.tokenizer import load_tokenizer

    source = locate("demo")
    tokenizer = load_tokenizer(source)
    with tempfile.TemporaryDirectory() as folder:
        data, model = Path(folder) / "pairs.jsonl", Path(folder) / "model"
        write_pairs(data, args.pairs, tokenizer)
        tokenizer.save_pretrained(model)
        for file in weights_folder(source).iterdir():
            (model / file.name).symlink_to(file)
        common = [__file__, "--pairs", str(args.pairs), "--micro", str(args.micro)]
        common += ["--precompute"] if args.precompute else []
        results = {"strop": child([sys.executable, *common, "--child", "strop", str(model), str(data)])}
        if args.trl:
            results["trl"] = child([args.trl, *common, "--child", "trl", str(model), str(data)])
    for tool, result in results.items():
        print(tool, json.dumps(result))
    if args.out:
        write(args.out, results)


if __name__ == "__main__":
    main()
