"""Measure what training on one job takes from the rest, with and without train.keep: exact answers and general set.

    python benchmarks/keep.py --snips FOLDER [--tasks demo snips] [--keep none 0.2] [--seeds 0 1 2] [--out FILE]

Tasks: `demo` is the demo's recipe; `snips` has 700 rows, 4 epochs and 210 held-out rows; `gemma` is `snips` on Gemma 3
270M (--gemma FILE.gguf, ChatML template). Each run is a `strop.train` in its own process with all cores, and a `strop
eval --general`. Prints a Markdown table; the file is updated after each run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

from measured import child, write


def run(args: argparse.Namespace, task: str, keep: str, seed: int) -> dict[str, Any]:
    import strop
    from strop.demo import data_files

    train, held_out = (args.snips / "train_700.jsonl", args.snips / "test_210.jsonl")
    if task == "demo":
        train, held_out = data_files()
    options: dict[str, Any] = {"seed": seed, "train.epochs": 3 if task == "demo" else 4}
    if task == "gemma":
        options["data.template"] = "chatml"
    if keep != "none":
        options["train.keep"] = keep if keep == "auto" else float(keep)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        model = str(args.gemma) if task == "gemma" else "demo"
        done = strop.train(model=model, data=str(train), out=f"{folder}/run", **options)
        seconds = time.monotonic() - began
        result = strop.evaluate(done.folder, str(held_out), metric="exact_json", general=True)
        kept = Path(folder, "run", "kept.jsonl")
        rows = len(kept.read_text(encoding="utf-8").splitlines()) if kept.exists() else 0
    general = {name: value for name, value in result["general"].items() if name != "lost"}
    return {
        "task": task, "keep": keep, "seed": seed, "seconds": seconds, "training_s": done.report["seconds"],
        "tokens": done.report["tokens"], "answered_prompts": rows, "tuned": result["tuned"],
        "intervals": result["intervals"], "general": general,
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a row for each run."""
    lines = ["| task | keep | seed | exact | general before | after | training |", "|---|---|---|---|---|---|---|"]
    for one in results:
        low, high = one["intervals"]["tuned"]
        exact = f"{100 * one['tuned']['exact_json']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        general = [f"{100 * one['general'][side]:.1f} %" for side in ("base", "tuned")]
        cells = [one["task"], one["keep"], one["seed"], exact, *general, f"{one['training_s']:.0f} s"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snips", type=Path, required=True)
    parser.add_argument("--gemma", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["demo", "snips"], choices=["demo", "snips", "gemma"])
    parser.add_argument("--keep", nargs="+", default=["none", "auto"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args, args.one[0], args.one[1], int(args.one[2]))))
        return
    results: list[dict[str, Any]] = []
    command = [sys.executable, __file__, "--snips", str(args.snips)]
    command += ["--gemma", str(args.gemma)] if args.gemma else []
    for seed, task, keep in product(args.seeds, args.tasks, args.keep):
        results.append(child([*command, "--one", task, keep, str(seed)]))
        print(table(results[-1:]).splitlines()[-1], flush=True)
        if args.out:
            write(args.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
