"""Measure classifiers against TF-IDF with logistic regression, and against a model that writes the intent as JSON.

    python benchmarks/classify.py --snips FOLDER [--tasks snips modules json] [--rates 5e-4] [--seeds 0 1] [--out FILE]

Tasks: `snips` classifies the seven intents of SNIPS (700 training rows, 210 held-out rows, 3 epochs); `json` is the
generative run on the same rows and epochs, scored by its intent; `modules` tells from which of 15 modules of Python's
standard library a paragraph of documentation is. Those paragraphs are read from the docstrings of the Python that runs
this file (the results say which); paragraphs that name their module are left out, and a docstring is either in the
training rows or held out. Each run is a `strop.train` in its own process with all cores, and a `strop.evaluate`. Needs
scikit-learn. Prints a Markdown table; the file is updated after each run.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from measured import run_jobs

MODULES = (
    "argparse", "asyncio", "collections", "datetime", "decimal", "email", "http", "logging", "pathlib",
    "sqlite3", "ssl", "statistics", "subprocess", "threading", "unittest",
)  # fmt: skip
EXTRA = {
    "collections": ["collections.abc"],
    "email": [
        "email.message",
        "email.policy",
        "email.headerregistry",
        "email.header",
        "email.utils",
        "email.generator",
    ],
    "http": ["http.client", "http.server", "http.cookies", "http.cookiejar"],
    "logging": ["logging.handlers", "logging.config"],
    "unittest": ["unittest.mock", "unittest.case"],
    "asyncio": ["asyncio.streams", "asyncio.events", "asyncio.tasks", "asyncio.queues"],
}
TRAINING_ROWS, HELD_OUT_ROWS = 60, 20  # of a module, at most


def docstrings(module: str) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and its functions, each once."""
    seen: set[str] = set()
    stack: list[Any] = [importlib.import_module(name) for name in (module, *EXTRA.get(module, ()))]
    while stack:
        thing = stack.pop()
        text = inspect.getdoc(thing) or ""
        if text and text not in seen:
            seen.add(text)
            yield text
        if inspect.ismodule(thing) or inspect.isclass(thing):
            for name, member in sorted(vars(thing).items()):
                origin = getattr(member, "__module__", "") or ""
                own = origin.lstrip("_").partition(".")[0] == module or inspect.isclass(thing)
                if own and not name.startswith("__") and (callable(member) or isinstance(member, property)):
                    stack.append(member)


def module_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return training and held-out rows with a paragraph of 6 to 60 words and its module."""
    training: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    known: dict[str, str] = {}
    for module in MODULES:
        parts: tuple[list[str], list[str]] = ([], [])
        for text in docstrings(module):
            is_held_out = hashlib.sha256(text.encode()).digest()[0] < 64  # a quarter of the docstrings
            for paragraph in re.split(r"\n\s*\n", text):
                words = paragraph.split()
                line = " ".join(words)
                if (
                    6 <= len(words) <= 60
                    and module.lower() not in line.lower()
                    and known.setdefault(line, module) == module
                ):
                    parts[is_held_out].append(line)
        for rows, texts, most in zip((training, held_out), parts, (TRAINING_ROWS, HELD_OUT_ROWS), strict=True):
            texts = sorted(dict.fromkeys(texts), key=lambda text: hashlib.sha256(text.encode()).hexdigest())
            rows += [{"text": text, "label": module} for text in texts[:most]]
    shown = {row["text"] for row in training}
    return training, [row for row in held_out if row["text"] not in shown]


def snips_rows(file: Path) -> list[dict[str, str]]:
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        *_, question, answer = json.loads(line)["messages"]
        rows.append({"text": question["content"], "label": json.loads(answer["content"])["intent"]})
    return rows


def run(args: argparse.Namespace, task: str, rate: str, seed: int) -> dict[str, Any]:
    import sklearn

    import strop

    options: dict[str, Any] = {"seed": seed, "train.epochs": args.epochs}
    files = [args.snips / "train_700.jsonl", args.snips / "test_210.jsonl"]
    with tempfile.TemporaryDirectory() as folder:
        if task != "json":
            options["train.objective"] = "classify"
            parts = module_rows() if task == "modules" else tuple(map(snips_rows, files))
            files = [Path(folder, name) for name in ("train.jsonl", "held_out.jsonl")]
            for file, rows in zip(files, parts, strict=True):
                file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            if rate != "default":
                options["train.learning_rate"] = float(rate)
        began = time.monotonic()
        done = strop.train(model=args.model, data=str(files[0]), out=f"{folder}/run", **options)
        seconds = time.monotonic() - began
        result = strop.evaluate(done.folder, str(files[1]), metric="exact_json" if task == "json" else "accuracy")
    recipe = {choice["field"]: choice["value"] for choice in done.report["recipe"]}
    kept = ("rows", "train_rows", "tuned", "baseline", "baseline_difference", "intervals", "classes", "confusion")
    return {
        "task": task, "rate": recipe["train.learning_rate"], "seed": seed, "seconds": seconds,
        "training_s": done.report["seconds"], "training_rows": done.report["data"]["used"], "epochs": args.epochs,
        "model": args.model, "python": platform.python_version(), "scikit_learn": sklearn.__version__,
        **{name: result[name] for name in kept if name in result},
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a row for each run."""
    heads = [
        "task",
        "rate",
        "seed",
        "rows",
        "accuracy",
        "macro F1",
        "calibration error",
        "baseline",
        "difference",
        "training",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one in results:
        tuned, baseline, difference = one["tuned"], one.get("baseline"), one.get("baseline_difference")
        low, high = one["intervals"]["tuned"]
        rate = tuned["intent"] if one["task"] == "json" else tuned["accuracy"]
        ends = f" ({100 * low:.1f} to {100 * high:.1f})" if one["task"] != "json" else " (intent)"
        points = "{:+.1f} ({:+.1f} to {:+.1f})"
        cells = [
            one["task"], f"{one['rate']:g}", one["seed"], f"{one['training_rows']}, {one['rows']}",
            f"{100 * rate:.1f} %{ends}", f"{100 * tuned['macro_f1']:.1f} %" if "macro_f1" in tuned else "",
            f"{100 * tuned['calibration_error']:.1f} %" if "calibration_error" in tuned else "",
            f"{100 * baseline['accuracy']:.1f} %" if baseline else "",
            points.format(*(100 * difference[end] for end in ("value", "low", "high"))) if difference else "",
            f"{one['training_s']:.0f} s",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snips", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--tasks", nargs="+", default=["snips", "modules", "json"], choices=["snips", "modules", "json"]
    )
    parser.add_argument("--rates", nargs="+", default=["default"])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args, args.one[0], args.one[1], int(args.one[2]))))
        return
    results: list[dict[str, Any]] = []
    command = [sys.executable, __file__, "--snips", str(args.snips), "--model", args.model]
    command += ["--epochs", str(args.epochs)]
    jobs = ((task, rate, seed) for seed, task, rate in product(args.seeds, args.tasks, args.rates))
    run_jobs(command, jobs, results, lambda one: table([one]).splitlines()[-1], args.out)
    print(table(results))


if __name__ == "__main__":
    main()
