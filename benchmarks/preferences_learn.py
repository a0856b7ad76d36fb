"""Measure whether DPO and KTO on the demo's pairs improve a model that was fine-tuned on its rows for one epoch.

    python benchmarks/preferences_learn.py [--seeds 0 1 2] [--objectives dpo kto] [--rates 1e-5 1e-4] [--out FILE]

--rates, --sft-weights: values to try, by default those of the plan. `more sft`: a second epoch of fine-tuning on the
same rows instead.

Each model is evaluated on the demo's 176 held-out rows: exact JSON, and how often the right answer has a higher
log-probability per token than its near miss (`preference`), both with 95 % intervals, and the difference to
fine-tuning alone, paired by row.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from measured import write

import strop
from strop.demo import data_files
from strop.demo import pairs as demo_pairs
from strop.evaluation.compare import Side, compare
from strop.evaluation.metrics import paired_difference, wilson_interval
from strop.evaluation.preferences import compare_preferences
from strop.evaluation.run import read_conversations


def evaluate_hits(run: Path, rows: Path, pairs: Path, answers: int) -> dict[str, list[bool]]:
    """Return, for each row, whether the tuned model is right."""
    model, rows_ = strop.load(run), read_conversations(str(rows))[:answers]
    nobody = Side({"exact_json": 0.0, "loss": 0.0}, [False] * len(rows_), [""] * len(rows_))
    answered = compare(model, rows_, metric="exact_json", max_new_tokens=60, base=nobody)
    preferred = compare_preferences(model, read_conversations(str(pairs)))
    return {
        "exact_json": [sample["tuned_hit"] for sample in answered["samples"]],
        "preference": [sample["tuned_hit"] for sample in preferred["samples"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", default=["dpo"])
    parser.add_argument("--rows", type=int, default=693, help="of the demo's training rows")
    parser.add_argument("--answers", type=int, default=176, help="of the held-out rows that are answered")
    parser.add_argument("--rates", type=float, nargs="+", default=[None], help="learning rates of the objectives")
    parser.add_argument("--sft-weights", type=float, nargs="+", default=[None], help="of objectives that have one")
    parser.add_argument("--more-sft", action="store_true", help="a second epoch of fine-tuning, for comparison")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, pairs, held_out = folder / "rows.jsonl", folder / "pairs.jsonl", folder / "held.jsonl"
        demo_pairs.write_pairs(pairs, held_out)
        for source, out in ((data_files()[0], rows), (pairs, pairs)):
            lines = source.read_text(encoding="utf-8").splitlines()[: args.rows]
            out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        for seed in args.seeds:
            common = {"model": "demo", "train.epochs": 1, "seed": seed}
            first = strop.train(data=str(rows), out=str(folder / f"sft-{seed}"), **common).folder
            before = evaluate_hits(first, data_files()[1], held_out, args.answers)
            results.append({"seed": seed, "objective": "sft", **_rates(before)})
            print(json.dumps(results[-1]), flush=True)
            tries = [(one, *rest) for one in args.objectives for rest in product(args.rates, args.sft_weights)]
            tries += [("more sft", None, None)] if args.more_sft else []
            for number, (objective, rate, weight) in enumerate(tries):
                options = {"train.learning_rate": rate, "train.sft_weight": None if objective == "kto" else weight}
                options = {name: value for name, value in options.items() if value is not None}
                options |= {"train.objective": objective} if objective != "more sft" else {}
                out, source = str(folder / f"run-{seed}-{number}"), rows if objective == "more sft" else pairs
                run = strop.train(data=str(source), out=out, **common, **options, **{"model.adapter": str(first)})
                after = evaluate_hits(run.folder, data_files()[1], held_out, args.answers)
                changed = {name: asdict(paired_difference(before[name], after[name])) for name in before}
                last = run.report["objective"]["last"] if objective != "more sft" else None
                settings = {"seed": seed, "objective": objective, "rate": rate, "sft_weight": weight}
                results.append({**settings, **_rates(after), "change": changed, "last": last})
                print(json.dumps(results[-1]), flush=True)
                if args.out:
                    write(args.out, results)


def _rates(hits: dict[str, list[bool]]) -> dict[str, Any]:
    return {
        name: {"rate": sum(hit) / len(hit), "interval": list(wilson_interval(sum(hit), len(hit)))}
        for name, hit in hits.items()
    }


if __name__ == "__main__":
    main()
