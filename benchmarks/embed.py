"""Measure embeddings by retrieval against the base with the same pooling, and against TF-IDF.

    python benchmarks/embed.py [--rates 5e-4] [--poolings last mean] [--batches 32] [--seeds 0] [--out FILE]

The task finds a function of Python's standard library by its description: anchors are the first sentences of
docstrings, positives are the names and parameters. They are read from the Python that runs this file (the results
say which). A function is either in the training rows or held out, by a hash of its name, and the held-out functions are
the candidates. Each run is a `strop.train` in its own process, and a `strop.evaluate`. Needs scikit-learn. Prints a
Markdown table; the file is updated after each run.
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
    "argparse", "array", "ast", "asyncio", "base64", "bisect", "calendar", "cmath", "codecs", "collections",
    "configparser", "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "difflib", "dis",
    "email.message", "email.utils", "enum", "fileinput", "fnmatch", "fractions", "ftplib", "functools", "gettext",
    "glob", "gzip", "heapq", "html", "http.client", "http.cookiejar", "imaplib", "importlib.util", "inspect",
    "ipaddress", "itertools", "json", "linecache", "locale", "logging", "logging.handlers", "lzma", "mailbox",
    "math", "mimetypes", "mmap", "multiprocessing", "operator", "os", "os.path", "pathlib", "pdb", "pickle",
    "pkgutil", "platform", "plistlib", "poplib", "pprint", "profile", "queue", "random", "re", "sched", "secrets",
    "selectors", "shelve", "shlex", "shutil", "signal", "smtplib", "socket", "socketserver", "sqlite3", "ssl",
    "statistics", "string", "struct", "subprocess", "symtable", "sys", "tarfile", "tempfile", "textwrap",
    "threading", "time", "timeit", "token", "tokenize", "trace", "traceback", "turtle", "types", "typing",
    "unicodedata", "unittest", "unittest.mock", "urllib.parse", "urllib.request", "uuid", "warnings", "weakref",
    "webbrowser", "xml.dom.minidom", "xml.etree.ElementTree", "zipapp", "zipfile", "zlib",
)  # fmt: skip
TRAINING_ROWS, HELD_OUT_ROWS = 1200, 400  # at most


def functions(name: str) -> Iterator[tuple[str, Any]]:
    """Yield the public functions and methods of a module with their names."""
    module = importlib.import_module(name)
    for key, member in sorted(vars(module).items()):
        if key.startswith("_") or not (getattr(member, "__module__", None) or "").lstrip("_").startswith(name):
            continue
        if inspect.isroutine(member):
            yield f"{name}.{key}", member
        elif inspect.isclass(member):
            for method, function in sorted(vars(member).items()):
                if not method.startswith("_") and inspect.isroutine(function):
                    yield f"{name}.{key}.{method}", getattr(member, method)


def describe(name: str, function: Any) -> dict[str, str] | None:
    """Return a row of a function, or None if its docstring has no sentence of 5 to 40 words."""
    text = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?]) ", text)[0]
    try:
        parameters = str(inspect.signature(function))
    except (TypeError, ValueError):
        return None
    if not 5 <= len(sentence.split()) <= 40 or "->" in sentence or sentence.startswith(name.rpartition(".")[2] + "("):
        return None
    return {"anchor": sentence, "positive": name + parameters[:200]}


def make_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return training and held-out rows. A sentence that describes several functions is left out."""
    rows = [row for module in MODULES for pair in functions(module) if (row := describe(*pair))]
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["anchor"]] = counts.get(row["anchor"], 0) + 1
    parts: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for row in rows:
        if counts[row["anchor"]] == 1:
            is_held_out = hashlib.sha256(row["positive"].partition("(")[0].encode()).digest()[0] < 64  # a quarter
            parts[is_held_out].append(row)
    for part in parts:
        part.sort(key=lambda row: hashlib.sha256(row["positive"].encode()).hexdigest())
    return parts[0][:TRAINING_ROWS], parts[1][:HELD_OUT_ROWS]


def run(args: argparse.Namespace, rate: str, pooling: str, batch: int, seed: int) -> dict[str, Any]:
    import sklearn

    import strop

    options: dict[str, Any] = {"seed": seed, "train.epochs": args.epochs, "train.batch_size": batch}
    options |= {"train.objective": "embed", "train.pooling": pooling}
    options |= {} if rate == "default" else {"train.learning_rate": float(rate)}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("train.jsonl", "held_out.jsonl")]
        for file, rows in zip(files, make_rows(), strict=True):
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        began = time.monotonic()
        done = strop.train(model=args.model, data=str(files[0]), out=f"{folder}/run", **options)
        seconds = time.monotonic() - began
        result = strop.evaluate(done.folder, str(files[1]))
    recipe = {choice["field"]: choice["value"] for choice in done.report["recipe"]}
    excluded = ("samples", "notes", "changed", "run", "loaded_from")
    return {
        "rate": recipe["train.learning_rate"], "pooling": pooling, "batch_size": batch, "seed": seed,
        "seconds": seconds, "training_s": done.report["seconds"], "training_rows": done.report["data"]["used"],
        "epochs": args.epochs, "loss": done.report["loss"], "memory": done.report["memory"], "model": args.model,
        "python": platform.python_version(), "scikit_learn": sklearn.__version__,
        **{name: value for name, value in result.items() if name not in excluded},
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a row for each run."""
    heads = ["pooling", "rate", "batch", "seed", "accuracy@1", "nDCG@10", "base", "TF-IDF", "to base", "to TF-IDF"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one in results:
        name = one["metric"]
        low, high = one["intervals"]["tuned"]
        points = "{:+.1f} ({:+.1f} to {:+.1f})"
        differences = (one["difference"], one["baseline_difference"])
        cells = [
            one["pooling"], f"{one['rate']:g}", one["batch_size"], one["seed"],
            f"{100 * one['tuned'][name]:.1f} % ({100 * low:.1f} to {100 * high:.1f})",
            f"{100 * one['tuned']['ndcg_at_10']:.1f} %",
            *(f"{100 * one[side][name]:.1f} %" for side in ("base", "baseline")),
            *(points.format(*(100 * ends[end] for end in ("value", "low", "high"))) for ends in differences),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rates", nargs="+", default=["default"])
    parser.add_argument("--poolings", nargs="+", default=["last"], choices=["last", "mean"])
    parser.add_argument("--batches", type=int, nargs="+", default=[32])
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        rate, pooling, batch, seed = args.one
        print(json.dumps(run(args, rate, pooling, int(batch), int(seed))))
        return
    results: list[dict[str, Any]] = []
    command = [sys.executable, __file__, "--model", args.model, "--epochs", str(args.epochs)]
    jobs = product(args.rates, args.poolings, args.batches, args.seeds)
    run_jobs(command, jobs, results, lambda one: table([one]).splitlines()[-1], args.out)
    print(table(results))


if __name__ == "__main__":
    main()
