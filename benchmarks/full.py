"""Train all weights of a model with strop and with TRL's SFTTrainer on the same rows, and compare with LoRA.

    python benchmarks/full.py speed --model FOLDER --data CHAT.jsonl [--steps 25] [--repeats 3] [--out FILE]
    python benchmarks/full.py quality --snips FOLDER [--rows 350] [--epochs 2] [--rates 0.03 0.1 0.3] [--out FILE]
    python benchmarks/full.py rounding --snips FOLDER [--rows 350] [--steps 44] [--out FILE]

`speed`: each tool runs in its own process, in turn, in fp32 with AdamW and batches of 4 rows, which TRL gets in strop's
order; all tokens are supervised. Prints medians of tokens/s (real tokens, never padding), and the largest relative
difference between the losses of a step. `quality`: exact answers on held-out rows for learning rates that are shares of
LoRA's rule; `lora` is LoRA with its own rate. Prints a Markdown table; the file is updated after each run. `rounding`:
the loss on held-out rows with weights that are rounded after each step: to bf16, to bf16 stochastically, or not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from measured import child, read_steps, run_jobs, train_timed, write

BATCH, RATE = 4, 1e-5


def train_with_strop(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import strop

    options = {
        "train.method": args.method, "train.max_steps": args.steps, "train.batch_size": BATCH,
        "model.dtype": args.dtype,
        "train.learning_rate": RATE, "train.lr_scheduler": "constant", "train.warmup": 0, "data.loss": "all",
        "model.device": "cpu", "train.epochs": 1,
    }  # fmt: skip
    done = strop.train(model=str(args.model), data=str(args.data), out=str(folder / "run"), **options)
    return {
        **read_steps(done.folder),
        "peak_bytes": done.report["memory"]["measured_peak_bytes"],
        "predicted_bytes": done.report["memory"]["predicted_peak_bytes"],
    }  # fmt: skip


def train_with_trl(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train on the rows in the order of strop's batches."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = load_dataset("json", data_files=str(args.ordered), split="train")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    config = SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=args.dtype == "bf16", per_device_train_batch_size=BATCH,
        learning_rate=RATE, lr_scheduler_type="constant", max_steps=args.steps, logging_steps=1, save_strategy="no",
        report_to="none", max_length=1024, gradient_checkpointing=False, train_sampling_strategy="sequential",
        weight_decay=0.0, adam_beta2=0.999, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows)
    return train_timed(trainer)


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


def run_rounding(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Train with AdamW moments in fp32, and weights that are rounded after each step."""
    import torch

    import strop
    from strop.data.prepare import prepare
    from strop.engine.step import step_for
    from strop.evaluation.compare import mean_loss
    from strop.models.load import load_base
    from strop.models.lora import train_all_weights
    from strop.models.source import locate
    from strop.models.tokenizer import load_tokenizer
    from strop.training.optim import rate_factor
    from strop.training.state import batch_stream

    train, held_out = args.snips / f"train_{args.rows}.jsonl", args.snips / "test_210.jsonl"
    options = {"train.method": "full", "train.max_steps": args.steps}
    recipe = strop.plan(model="demo", data=str(train), **options).resolved.recipe
    source = locate("demo")
    data = prepare(recipe.data.model_copy(update={"eval": str(held_out)}), load_tokenizer(source))
    model = train_all_weights(load_base(source, torch.float32, "cpu"), (), None).train()
    weights, step = list(model.parameters()), step_for(model)
    optimizer = torch.optim.AdamW(weights, lr=recipe.train.learning_rate, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(0)
    for number, batch in enumerate(batch_stream(recipe, len(data.train))):
        examples = [data.train[row] for row in batch.rows]
        (step.token_loss(examples) / sum(float(x.weights.sum()) for x in examples)).backward()
        torch.nn.utils.clip_grad_norm_(weights, recipe.train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = recipe.train.learning_rate * rate_factor(number, args.steps, 2, "cosine")
        optimizer.step()
        optimizer.zero_grad()
        for weight in weights if name != "fp32" else ():
            bits = weight.detach().view(torch.int32)
            if name == "stochastic":
                bits += torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, generator=generator)
                bits &= -(1 << 16)
            else:
                weight.data.copy_(weight.data.bfloat16())
    examples = [data.eval[row] for row in range(len(data.eval))]
    loss = mean_loss(step.token_loss, examples, lambda block: [[row] for row in range(len(block))])
    return {"name": name, "steps": args.steps, "rows": args.rows, "loss": loss}


def row_of(one: dict[str, Any]) -> str:
    """Return a row of a Markdown table."""
    if "tuned" not in one:
        return f"| {one['name']} | {one['steps']} steps | {one['loss']:.4f} |"
    low, high = one["interval"]
    score = f"{100 * one['tuned']['exact_json']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    return f"| {one['name']} | {one['rows']} x {one['epochs']} | {score} | {one['tuned']['loss']:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "quality", "rounding"])
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
        print(json.dumps({"quality": run_quality, "rounding": run_rounding}[args.what](args, args.one)))
    elif args.what == "speed":
        measure_speed(args)
    else:
        results: list[dict[str, Any]] = []
        if args.out and args.out.is_file():
            results = json.loads(args.out.read_text(encoding="utf-8"))["results"]
        is_rounding = args.what == "rounding"
        amount, names = ("steps", ["fp32", "stochastic", "bf16"]) if is_rounding else ("epochs", ["lora", *args.rates])
        finished = {(one["name"], one["rows"], one[amount]) for one in results}
        jobs = [(name,) for name in names if (name, args.rows, getattr(args, amount)) not in finished]
        command = [sys.executable, __file__, args.what, "--snips", str(args.snips), "--rows", str(args.rows)]
        command += [f"--{amount}", str(getattr(args, amount))]
        run_jobs(command, jobs, results, row_of, args.out)
        print("\n".join(map(row_of, results)))


if __name__ == "__main__":
    main()
