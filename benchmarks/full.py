"""Train all weights of a model with strop and with TRL's SFTTrainer on the same rows, and compare with LoRA.

    python benchmarks/full.py speed --model FOLDER --data CHAT.jsonl [--steps 25] [--repeats 3] [--out FILE]
    python benchmarks/full.py quality --snips FOLDER [--rows 350] [--epochs 2] [--rates 0.03 0.1 0.3] [--out FILE]

`speed`: each tool runs in its own process, in turn, in fp32 with AdamW and batches of 4 rows, which TRL gets in strop's
order; all tokens are supervised. Prints medians of tokens/s (real tokens, never padding), and the largest relative
difference between the losses of a step. `quality`: exact answers on held-out rows for learning rates that are shares of
LoRA's rule; `lora` is LoRA with its own rate. Prints a Markdown table; the file is updated after each run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measured import child, run_jobs, write

BATCH, RATE = 4, 1e-5


def train_with_strop(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import strop
    from strop.runs.events import read_events

    options = {
        "train.method": args.method, "train.max_steps": args.steps, "train.batch_size": BATCH,
        "model.dtype": args.dtype,
        "train.learning_rate": RATE, "train.lr_scheduler": "constant", "train.warmup": 0, "data.loss": "all",
        "model.device": "cpu", "train.epochs": 1,
    }  # fmt: skip
    done = strop.train(model=str(args.model), data=str(args.data), out=str(folder / "run"), **options)
    steps = [event for event in read_events(done.folder / "events.jsonl") if event["event"] == "step"]
    counts = [event["tokens"] for event in steps]
    tokens = [end - begin for begin, end in zip([0, *counts], counts, strict=False)]
    seconds = [n / event["tokens_per_s"] for n, event in zip(tokens, steps, strict=True)]
    return {
        "losses": [event["loss"] for event in steps], "tokens": tokens, "seconds": seconds,
        "peak_bytes": done.report["memory"]["measured_peak_bytes"],
        "predicted_bytes": done.report["memory"]["predicted_peak_bytes"],
    }  # fmt: skip


def train_with_trl(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train on the rows in the order of strop's batches."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = load_dataset("json", data_files=str(args.ordered), split="train")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    begun, seconds, tokens = 0.0, list[float](), list[int]()

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            nonlocal begun
            begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - begun)

    config = SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=args.dtype == "bf16", per_device_train_batch_size=BATCH,
        learning_rate=RATE, lr_scheduler_type="constant", max_steps=args.steps, logging_steps=1, save_strategy="no",
        report_to="none", max_length=1024, gradient_checkpointing=False, train_sampling_strategy="sequential",
        weight_decay=0.0, adam_beta2=0.999, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, callbacks=[Clock()])
    original = trainer.training_step

    def counted(module: Any, inputs: Any, *more: Any, **named: Any) -> Any:
        tokens.append(int(inputs["attention_mask"].sum()))
        return original(module, inputs, *more, **named)

    trainer.training_step = counted
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "tokens": tokens, "seconds": seconds}


def write_in_order(args: argparse.Namespace, file: Path) -> None:
    """Write the chat rows in the order in which strop's batches have them."""
    from strop.config.load import resolve
    from strop.training.state import batch_stream

    rows = Path(args.data).read_text(encoding="utf-8").splitlines()
    options = {"model": "demo", "data": "-", "train.max_steps": args.steps, "train.batch_size": BATCH}
    recipe = resolve(None, options).recipe
    stream = batch_stream(recipe, len(rows))
    file.write_text("".join(f"{rows[row]}\n" for batch in stream for row in batch.rows), encoding="utf-8")


def measure_speed(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ordered = Path(folder, "ordered.jsonl")
        write_in_order(args, ordered)
        common = [
            "--model",
            str(args.model),
            "--data",
            str(args.data),
            "--steps",
            str(args.steps),
            "--dtype",
            args.dtype,
        ]
        results: dict[str, list[dict[str, Any]]] = {"strop": [], "trl": [], "lora": []}
        for _ in range(args.repeats):
            for tool, found in results.items():
                method = ["--method", "lora" if tool == "lora" else "full"]
                command = [sys.executable, __file__, "speed", *common, "--ordered", str(ordered), *method]
                found.append(child([*command, "--one", "trl" if tool == "trl" else "strop"]))
    rates = {tool: [sum(run["tokens"][2:]) / sum(run["seconds"][2:]) for run in runs] for tool, runs in results.items()}
    pairs = zip(results["strop"][0]["losses"], results["trl"][0]["losses"], strict=True)
    difference = max(abs(a - b) / b for a, b in pairs)
    ratio = statistics.median(a / b for a, b in zip(rates["strop"], rates["trl"], strict=True))
    for tool, values in rates.items():
        print(f"| {tool} | {statistics.median(values):,.0f} tokens/s | {', '.join(f'{x:,.0f}' for x in values)} |")
    print(f"strop / TRL: {ratio:.2f}; losses differ by at most {difference:.1e}")
    if args.out:
        write(args.out, {"rates": rates, "ratio": ratio, "loss_difference": difference, "runs": results})


def run_quality(args: argparse.Namespace, name: str) -> dict[str, Any]:
    import strop

    train, held_out = args.snips / f"train_{args.rows}.jsonl", args.snips / "test_210.jsonl"
    options: dict[str, Any] = {"train.epochs": args.epochs}
    if name != "lora":
        usual = strop.plan(model="demo", data=str(train), **options).resolved.recipe.train.learning_rate
        options |= {"train.method": "full", "train.learning_rate": float(f"{float(name) * usual:.2g}")}
    with tempfile.TemporaryDirectory() as folder:
        done = strop.train(model="demo", data=str(train), out=f"{folder}/run", **options)
        result = strop.evaluate(done.folder, str(held_out), metric="exact_json")
    return {
        "name": name, "rows": args.rows, "epochs": args.epochs, "rate": options.get("train.learning_rate"),
        "tuned": result["tuned"], "interval": result["intervals"]["tuned"], "tokens": done.report["tokens"],
        "memory": done.report["memory"]["measured_peak_bytes"],
    }  # fmt: skip


def quality_row(one: dict[str, Any]) -> str:
    low, high = one["interval"]
    score = f"{100 * one['tuned']['exact_json']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    return f"| {one['name']} | {one['rows']} x {one['epochs']} | {score} | {one['tuned']['loss']:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "quality"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--snips", type=Path)
    parser.add_argument("--rows", type=int, default=350)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--rates", nargs="+", default=["0.03", "0.1", "0.3"])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--out", type=Path)
    for hidden in ("--ordered", "--method", "--one"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one and args.what == "speed":
        train = {"strop": train_with_strop, "trl": train_with_trl}[args.one]
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(train(args, Path(folder))))
    elif args.one:
        print(json.dumps(run_quality(args, args.one)))
    elif args.what == "speed":
        measure_speed(args)
    else:
        results: list[dict[str, Any]] = []
        if args.out and args.out.is_file():
            results = json.loads(args.out.read_text(encoding="utf-8"))["results"]
        finished = {(one["name"], one["rows"], one["epochs"]) for one in results}
        jobs = [(name,) for name in ["lora", *args.rates] if (name, args.rows, args.epochs) not in finished]
        command = [sys.executable, __file__, "quality", "--snips", str(args.snips), "--rows", str(args.rows)]
        run_jobs([*command, "--epochs", str(args.epochs)], jobs, results, quality_row, args.out)
        print("\n".join(map(quality_row, results)))


if __name__ == "__main__":
    main()
