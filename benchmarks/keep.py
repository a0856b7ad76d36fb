"""Measure what training on one job takes from the rest, and what helps: exact answers against the general set.

    python benchmarks/keep.py --snips FOLDER [--tasks demo snips gemma] [--variants none auto] [--seeds 0] [--out FILE]
    python benchmarks/keep.py --out FILE --plot docs/pictures/keep.svg

Tasks: `demo` is the demo's recipe; `snips` has 700 rows, 4 epochs and 210 held-out rows; `gemma` is `snips` on Gemma 3
270M (--gemma FILE.gguf, ChatML template). Variants: VARIANTS, a share of train.keep such as 0.2, or `scale0.5`: the
adapter of `none`, half as strong. Each run is a `strop.train` in its own process, and a `strop eval --general`. Prints
a Markdown table. The file is updated after each run, and runs that are in it are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from measured import child, run_jobs

OFF = {"train.keep": "off"}
VARIANTS: dict[str, dict[str, Any]] = {
    "none": OFF, "auto": {"train.keep": "auto"}, "epochs": {"epochs": 1, **OFF}, "rate": {"rate": 1 / 3, **OFF},
    "rank": {"lora.r": 4, **OFF},
}  # fmt: skip
LABELS = {"none": ((-6, 8), "right"), "auto": ((-6, 8), "right"), "rank": ((8, -3), "left")}  # offsets in points
MEANINGS = {
    "none": "off",
    "auto": "train.keep",
    "epochs": "1 epoch",
    "rate": "a third of the rate",
    "rank": "rank 4",
    "scale0.5": "half as strong",
}


def run(args: argparse.Namespace, task: str, variant: str, seed: int) -> dict[str, Any]:
    import strop
    from strop.demo import data_files

    train, held_out = (args.snips / "train_700.jsonl", args.snips / "test_210.jsonl")
    if task == "demo":
        train, held_out = data_files()
    own: dict[str, Any] = {"seed": seed, "train.epochs": 3 if task == "demo" else 4}
    if task == "gemma":
        own["data.template"] = "chatml"
    scale = float(variant.removeprefix("scale")) if variant.startswith("scale") else None
    known = OFF if scale else VARIANTS[variant] if variant in VARIANTS else {"train.keep": float(variant)}
    options = {**own, **known}
    if "epochs" in options:
        options["train.epochs"] = options.pop("epochs")
    model = str(args.gemma) if task == "gemma" else "demo"
    if "rate" in options:
        usual = strop.plan(model=model, data=str(train), **own).resolved.recipe.train.learning_rate
        options["train.learning_rate"] = usual * options.pop("rate")
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        done = strop.train(model=model, data=str(train), out=f"{folder}/run", **options)
        seconds = time.monotonic() - began
        tuned: Any = done.folder
        if scale:
            tuned = Path(folder, "scaled")
            child([sys.executable, "-m", "strop", "adapters", str(done.folder), "--weights", str(scale), "--out",
                   str(tuned), "--json"])  # fmt: skip
        result = strop.evaluate(tuned, str(held_out), metric="exact_json", general=True)
    general = {name: value for name, value in result["general"].items() if name != "lost"}
    return {
        "task": task, "variant": variant, "seed": seed, "seconds": seconds, "training_s": done.report["seconds"],
        "tokens": done.report["tokens"], "tuned": result["tuned"], "intervals": result["intervals"], "general": general,
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a row for each run."""
    lines = ["| task | variant | seed | exact | general before | after | tokens |", "|---|---|---|---|---|---|---|"]
    for one in results:
        low, high = one["intervals"]["tuned"]
        exact = f"{100 * one['tuned']['exact_json']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        general = [f"{100 * one['general'][side]:.1f} %" for side in ("base", "tuned")]
        cells = [one["task"], one["variant"], one["seed"], exact, *general, f"{one['tokens']:,}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], out: Path) -> None:
    """Draw exact answers over the general set: a dot for each run, and the mean of each variant with its name."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "strop", "font.size": 9, "svg.fonttype": "none"})
    tasks = list(dict.fromkeys(one["task"] for one in results))
    figure, panels = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3), sharey=True, squeeze=False)
    for panel, task in zip(panels[0], tasks, strict=True):
        runs = [one for one in results if one["task"] == task]
        for variant in dict.fromkeys(one["variant"] for one in runs):
            chosen = [one for one in runs if one["variant"] == variant]
            points = [(100 * one["general"]["tuned"], 100 * one["tuned"]["exact_json"]) for one in chosen]
            colour = "#2f6f4f" if variant == "auto" else "#777777"
            panel.scatter(*zip(*points, strict=True), s=14, color=colour, alpha=0.5)
            mean = tuple(fmean(axis) for axis in zip(*points, strict=True))
            panel.scatter(*mean, s=40, color=colour)
            offset, side = LABELS.get(variant, ((-6, -14), "right"))
            text = MEANINGS.get(variant, variant)
            panel.annotate(text, mean, offset, textcoords="offset points", ha=side, color=colour)
        before = 100 * runs[0]["general"]["base"]
        panel.axvline(before, color="#777777", linewidth=0.8, linestyle=":")
        panel.annotate("before training", (before, 4), (-4, 0), textcoords="offset points", rotation=90, ha="right")
        panel.set(title=task, xlabel="general set, % right", xlim=(0, before + 12), ylim=(0, 100))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("task, % exact")
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snips", type=Path)
    parser.add_argument("--gemma", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["demo", "snips"], choices=["demo", "snips", "gemma"])
    parser.add_argument("--variants", nargs="+", default=["none", "auto"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args, args.one[0], args.one[1], int(args.one[2]))))
        return
    results: list[dict[str, Any]] = []
    if args.out and args.out.is_file():
        results = json.loads(args.out.read_text(encoding="utf-8"))["results"]
    if args.plot:
        plot(results, args.plot)
        return
    command = [sys.executable, __file__, "--snips", str(args.snips)]
    command += ["--gemma", str(args.gemma)] if args.gemma else []
    finished = {(one["task"], one["variant"], one["seed"]) for one in results}
    jobs = ((task, variant, seed) for seed, task, variant in product(args.seeds, args.tasks, args.variants))
    left = [job for job in jobs if job not in finished]
    run_jobs(command, left, results, lambda one: table([one]).splitlines()[-1], args.out)
    print(table(results))


if __name__ == "__main__":
    main()
