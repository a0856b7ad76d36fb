"""Measure whether GRPO improves a fine-tuned model on SNIPS, with rewards for exact JSON and per slot.

    python benchmarks/grpo_learn.py TRAIN.jsonl TEST.jsonl [--seeds 0] [--sft-rows 350] [--steps 60] [--out FILE]

TRAIN: rows of messages whose last turn is a JSON object (SNIPS train_1400). The first --sft-rows are used for
fine-tuning over --sft-epochs; GRPO samples completions for the prompts of the other rows. Both models are evaluated on
TEST: exact JSON with its 95 % interval, and the difference paired by row. `more sft`: supervised training on the same
later rows instead of GRPO.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measured import write

import strop
from strop.evaluation.compare import Side, compare
from strop.evaluation.metrics import paired_difference, wilson_interval
from strop.evaluation.run import read_conversations
from strop.runs.events import read_events

METRIC = "exact_json"


def hits(run: Path, rows: Path, answers: int) -> list[bool]:
    """Return, for each row, whether the tuned model's greedy answer is right."""
    rows_ = read_conversations(str(rows))[:answers]
    nobody = Side({METRIC: 0.0, "loss": 0.0}, [False] * len(rows_), [""] * len(rows_))
    result = compare(strop.load(run), rows_, metric=METRIC, max_new_tokens=80, base=nobody)
    return [sample["tuned_hit"] for sample in result["samples"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sft-rows", type=int, default=350)
    parser.add_argument("--sft-epochs", type=float, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=8, help="of a step")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--rate", type=float, help="learning rate of GRPO")
    parser.add_argument("--rewards", default=f"{METRIC},{Path(__file__).with_name('slot_reward.py')}:share")
    parser.add_argument("--beta", type=float)
    parser.add_argument("--answers", type=int, default=210, help="of the test rows that are answered")
    parser.add_argument("--more-sft", action="store_true", help="train on the later rows' answers too, for comparison")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = args.train.read_text(encoding="utf-8").splitlines(keepends=True)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, later = folder / "first.jsonl", folder / "later.jsonl"
        first.write_text("".join(lines[: args.sft_rows]), encoding="utf-8")
        later.write_text("".join(lines[args.sft_rows :]), encoding="utf-8")
        for seed in args.seeds:
            common = {"model": args.model, "seed": seed}
            sft = strop.train(data=str(first), out=str(folder / f"sft-{seed}"), **common, **{
                "train.epochs": args.sft_epochs,
            }).folder  # fmt: skip
            before = hits(sft, args.test, args.answers)
            results.append({"seed": seed, "objective": "sft", **_rate(before)})
            print(json.dumps(results[-1]), flush=True)
            options: dict[str, Any] = {
                "train.objective": "grpo", "train.rewards": args.rewards, "train.max_steps": args.steps,
                "model.adapter": str(sft), "train.batch_size": args.prompts, "train.group": args.group,
                "train.answer_tokens": 80,
            }  # fmt: skip
            options |= {"train.learning_rate": args.rate} if args.rate else {}
            options |= {"train.beta": args.beta} if args.beta is not None else {}
            started = time.perf_counter()
            run = strop.train(data=str(later), out=str(folder / f"grpo-{seed}"), **common, **options)
            took = time.perf_counter() - started
            after = hits(run.folder, args.test, args.answers)
            events = list(read_events(run.folder / "events.jsonl"))
            step_events = [
                {
                    name: event[name]
                    for name in ("step", "reward", "equal_groups", "kl", "off", "stop_rate")
                    if name in event
                }
                for event in events
                if event["event"] == "step"
            ]
            results.append({
                "seed": seed, "objective": "grpo", **_rate(after), "change": asdict(paired_difference(before, after)),
                "seconds": took, "drawing_seconds": sum(e["seconds"] for e in events if e["event"] == "answers"),
                "prompts_per_s": args.steps * args.prompts / took,
                "measured_peak_bytes": run.report["memory"]["measured_peak_bytes"],
                "predicted_peak_bytes": run.report["memory"]["predicted_peak_bytes"], "told": step_events,
            })  # fmt: skip
            print(json.dumps({name: value for name, value in results[-1].items() if name != "told"}), flush=True)
            if args.more_sft:
                more = strop.train(data=str(later), out=str(folder / f"more-{seed}"), **common, **{
                    "model.adapter": str(sft), "train.epochs": 1,
                }).folder  # fmt: skip
                others = hits(more, args.test, args.answers)
                change = asdict(paired_difference(before, others))
                results.append({"seed": seed, "objective": "more sft", **_rate(others), "change": change})
                print(json.dumps(results[-1]), flush=True)
    if args.out:
        write(args.out, results)


def _rate(hits_: list[bool]) -> dict[str, Any]:
    return {METRIC: sum(hits_) / len(hits_), "interval": list(wilson_interval(sum(hits_), len(hits_)))}


if __name__ == "__main__":
    main()
