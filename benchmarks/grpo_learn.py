"""Whether rewards teach anything: SNIPS, fine-tuned on some rows, then GRPO on prompts of others, rewarded for exact
JSON, and slot by slot.

    python benchmarks/grpo_learn.py TRAIN.jsonl TEST.jsonl [--seeds 0] [--sft-rows 350] [--steps 60] [--out FILE]

TRAIN: rows of messages whose last turn is a JSON object (SNIPS train_1400); the first --sft-rows of them are fine-tuned
on for --sft-epochs, the prompts of the others are answered and rewarded. Of both models, on TEST: exact JSON with its
95 % interval, and the difference, paired by row. `more sft`: what supervised learning makes of the same later rows.
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
from strop.evaluation.metrics import paired_difference, wilson
from strop.evaluation.run import read_conversations
from strop.runs.events import read_events

METRIC = "exact_json"


def hits(run: Path, rows: Path, answers: int) -> list[bool]:
    """By row, of the tuned model alone, its likeliest answers."""
    held = read_conversations(str(rows))[:answers]
    nobody = Side({METRIC: 0.0, "loss": 0.0}, [False] * len(held), [""] * len(held))
    found = compare(strop.load(run), held, metric=METRIC, max_new_tokens=80, base=nobody)
    return [sample["tuned_hit"] for sample in found["samples"]]


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
    given = parser.parse_args()
    lines = given.train.read_text(encoding="utf-8").splitlines(keepends=True)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, later = folder / "first.jsonl", folder / "later.jsonl"
        first.write_text("".join(lines[: given.sft_rows]), encoding="utf-8")
        later.write_text("".join(lines[given.sft_rows :]), encoding="utf-8")
        for seed in given.seeds:
            common = {"model": given.model, "seed": seed}
            sft = strop.train(data=str(first), out=str(folder / f"sft-{seed}"), **common, **{
                "train.epochs": given.sft_epochs,
            }).folder  # fmt: skip
            before = hits(sft, given.test, given.answers)
            results.append({"seed": seed, "objective": "sft", **_rate(before)})
            print(json.dumps(results[-1]), flush=True)
            options: dict[str, Any] = {
                "train.objective": "grpo", "train.rewards": given.rewards, "train.max_steps": given.steps,
                "model.adapter": str(sft), "train.batch_size": given.prompts, "train.group": given.group,
                "train.answer_tokens": 80,
            }  # fmt: skip
            options |= {"train.learning_rate": given.rate} if given.rate else {}
            options |= {"train.beta": given.beta} if given.beta is not None else {}
            started = time.perf_counter()
            run = strop.train(data=str(later), out=str(folder / f"grpo-{seed}"), **common, **options)
            took = time.perf_counter() - started
            after = hits(run.folder, given.test, given.answers)
            events = list(read_events(run.folder / "events.jsonl"))
            told = [
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
                "prompts_per_s": given.steps * given.prompts / took,
                "measured_peak_bytes": run.report["memory"]["measured_peak_bytes"],
                "predicted_peak_bytes": run.report["memory"]["predicted_peak_bytes"], "told": told,
            })  # fmt: skip
            print(json.dumps({name: value for name, value in results[-1].items() if name != "told"}), flush=True)
            if given.more_sft:
                more = strop.train(data=str(later), out=str(folder / f"more-{seed}"), **common, **{
                    "model.adapter": str(sft), "train.epochs": 1,
                }).folder  # fmt: skip
                others = hits(more, given.test, given.answers)
                change = asdict(paired_difference(before, others))
                results.append({"seed": seed, "objective": "more sft", **_rate(others), "change": change})
                print(json.dumps(results[-1]), flush=True)
    if given.out:
        write(given.out, results)


def _rate(found: list[bool]) -> dict[str, Any]:
    return {METRIC: sum(found) / len(found), "interval": list(wilson(sum(found), len(found)))}


if __name__ == "__main__":
    main()
