"""Measure whether GRPO in an environment teaches a model to call the right tool.

    python benchmarks/environment.py [--model demo] [--seeds 0] [--steps 24] [--out FILE]

The environment is tool_office.py. The model is fine-tuned on a few written traces with two of six phrasings for each
tool, and merged. GRPO then trains it on questions in all phrasings. `strop eval` compares both on other questions:
mean reward with its 95 % interval, and the difference paired by row.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from measured import write
from tool_office import NAMES, NUMBERS, OPERATIONS

import strop
from strop.evaluation.environments import load_environment
from strop.runs.events import read_events

SHOWN = ("reward", "turns", "tool_calls", "tool_errors")  # means over steps
ENVIRONMENT = f"{Path(__file__).with_name('tool_office.py')}:Office"
SUMS = (
    ("What is {a} plus {b}?", "+"), ("How much is {a} times {b}?", "*"),
    ("What is left of {a} after taking away {b}?", "-"),
    ("Tom has {a} cups and buys {b} more. How many cups has he?", "+"),
    ("A box holds {a} pens. How many pens are in {b} boxes?", "*"), ("Please subtract {b} from {a}.", "-"),
)  # fmt: skip
CALLS = (
    "What is the number of {name}?", "Please look up {name}.", "How do I reach {name} by telephone?",
    "I want to call {name}. What do I dial?", "{name} is not in today. Which extension was it?",
    "Under which number does {name} answer?",
)  # fmt: skip


def question(random_: random.Random, phrasing: int, tool: str) -> dict[str, Any]:
    """Return a row: the prompt, the tool that answers it, its arguments, and the right number."""
    if tool == "look_up":
        name = random_.choice(NAMES)
        text = CALLS[phrasing].format(name=name)
        return {"prompt": text, "tool": tool, "arguments": {"name": name}, "number": NUMBERS[name]}
    text, operation = SUMS[phrasing]
    a, b = random_.randint(20, 99), random_.randint(3, 19)
    arguments = {"a": a, "operation": operation, "b": b}
    return {
        "prompt": text.format(a=a, b=b), "tool": tool, "arguments": arguments, "number": OPERATIONS[operation](a, b),
    }  # fmt: skip


def questions(random_: random.Random, number: int, phrasings: int, seen: set[str]) -> list[dict[str, Any]]:
    """Return rows that are not in `seen`, half of them for each tool, and add them to it."""
    rows: list[dict[str, Any]] = []
    while len(rows) < number:
        row = question(random_, random_.randrange(phrasings), ("calculate", "look_up")[len(rows) % 2])
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            rows.append(row)
    return rows


def as_trace(row: dict[str, Any], tools: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a question as a written trace: the call, its result, and the answer."""
    call = {"type": "function", "function": {"name": row["tool"], "arguments": row["arguments"]}}
    return {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": row["tool"], "content": str(row["number"])},
            {"role": "assistant", "content": f"It is {row['number']}."},
        ],
        "tools": tools,
    }


def save(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--traces", type=int, default=16, help="written traces for fine-tuning")
    parser.add_argument("--epochs", type=float, default=2, help="of fine-tuning")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=4, help="of a step")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--rows", type=int, default=150, help="held-out questions")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tools = list(load_environment(ENVIRONMENT, 60.0).schemas.values())
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in args.seeds:
            random_, seen = random.Random(seed), set[str]()
            held_out = save(folder / f"held-out-{seed}.jsonl", questions(random_, args.rows, 6, seen))
            traces = [as_trace(row, tools) for row in questions(random_, args.traces, 2, seen)]
            asked = questions(random_, min(args.steps * args.prompts, 300), 6, seen)
            sft = strop.train(
                model=args.model, data=save(folder / f"traces-{seed}.jsonl", traces), template="chatml", seed=seed,
                epochs=args.epochs, out=folder / f"sft-{seed}",
            )  # fmt: skip
            start = strop.merge(sft, folder / f"start-{seed}")
            started = time.perf_counter()
            run = strop.train(
                model=start.out, data=save(folder / f"asked-{seed}.jsonl", asked), objective="grpo", format="prompt",
                environment=ENVIRONMENT, turns=3, answer_tokens=48, max_length=512, group=args.group,
                batch_size=args.prompts, max_steps=args.steps, learning_rate=args.rate, beta=0, seed=seed,
                out=folder / f"grpo-{seed}",
            )  # fmt: skip
            minutes = (time.perf_counter() - started) / 60
            steps = [event for event in read_events(run.folder / "events.jsonl") if event["event"] == "step"]
            evaluated = strop.evaluate(run, held_out)
            ends = {"first": steps[:10], "last": steps[-10:]}
            results.append({
                "seed": seed, "minutes": round(minutes, 1), "rows": evaluated["rows"],
                **{side: evaluated[side] | {"interval": evaluated["intervals"][side]} for side in ("base", "tuned")},
                "difference": evaluated["difference"], "train_rows": evaluated["train_rows"],
                "of_ten_steps": {
                    side: {key: sum(event[key] for event in part) / len(part) for key in SHOWN}
                    for side, part in ends.items()
                },
                "samples": [
                    {key: value for key, value in sample.items() if key != "place"}
                    for sample in evaluated["samples"][:4]
                ],
            })  # fmt: skip
            print(json.dumps(results[-1], indent=1), flush=True)
    if args.out is not None:
        write(args.out, results)


if __name__ == "__main__":
    main()
