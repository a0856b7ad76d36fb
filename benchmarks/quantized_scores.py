"""Measure the effect of quantized bases on quality: exact answers and loss of runs on SNIPS with several seeds.

    python benchmarks/quantized_scores.py --snips FOLDER [--schemes none nf4 int8] [--seeds 0 1 2] [--out FILE]

Each run is a `strop.train` with the default recipe (700 rows, 4 epochs) in its own process with one thread, --jobs of
them at once, followed by `strop eval` on the 210 held-out rows. The file is updated after each run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any

from measured import child, write

TRAIN, HELD_OUT, EPOCHS = "train_700.jsonl", "test_210.jsonl", 4


def run(snips: Path, scheme: str, seed: int) -> dict[str, Any]:
    import strop

    options = {"train.epochs": EPOCHS, "seed": seed, "model.dtype": "bf16", "model.quantization": scheme}
    with tempfile.TemporaryDirectory() as folder:
        done = strop.train(model="demo", data=str(snips / TRAIN), out=f"{folder}/run", **options)
        result = strop.evaluate(done.folder, str(snips / HELD_OUT), metric="exact_json")
    return {
        "scheme": scheme, "seed": seed, "seconds": done.report["seconds"], "tuned": result["tuned"],
        "base": result["base"], "intervals": result["intervals"],
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table of exact answers with their intervals by seed, and the means of answers and loss."""
    seeds = sorted({one["seed"] for one in results})
    lines = [f"| | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | loss |", "|---|" + "---|" * (len(seeds) + 2)]
    for scheme in dict.fromkeys(one["scheme"] for one in results):
        mine = {one["seed"]: one for one in results if one["scheme"] == scheme}
        cells = [_cell(mine[seed]) if seed in mine else "" for seed in seeds]
        means = [sum(one["tuned"][name] for one in mine.values()) / len(mine) for name in ("exact_json", "loss")]
        name = "16 bit" if scheme == "none" else scheme
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * means[0]:.1f} | {means[1]:.3f} |")
    return "\n".join(lines)


def _cell(one: dict[str, Any]) -> str:
    low, high = one["intervals"]["tuned"]
    return f"{100 * one['tuned']['exact_json']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snips", type=Path, required=True)
    parser.add_argument("--schemes", nargs="+", default=["none", "nf4", "int8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args.snips, args.one[0], int(args.one[1]))))
        return
    results: list[dict[str, Any]] = []
    command = [sys.executable, __file__, "--snips", str(args.snips), "--one"]
    with ThreadPoolExecutor(args.jobs) as pool:
        one = {**os.environ, "OMP_NUM_THREADS": "1"}
        tries = product(args.seeds, args.schemes)
        runs = [pool.submit(child, [*command, scheme, str(seed)], one) for seed, scheme in tries]
        for done in as_completed(runs):
            results.append(done.result())
            results.sort(key=lambda one: (args.schemes.index(one["scheme"]), one["seed"]))
            if args.out:
                write(args.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
