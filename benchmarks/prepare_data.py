"""Compare the speed of preparing rows (read, check, render, account, pack) in strop and in TRL.

    python benchmarks/prepare_data.py                       # strop alone
    python benchmarks/prepare_data.py --trl-python PYTHON   # and TRL, in an environment that has trl

Each measurement is a new process; the tools alternate; medians are printed. Peak memory excludes that of the process
after loading the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measured

WORDS = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school",
    "state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week",
    "company", "system", "program", "question", "work", "government", "number", "night", "point", "home",
    "water", "room", "mother", "area", "money", "story", "fact", "month", "lot", "right", "study", "book",
    "eye", "job", "word", "business", "issue", "side", "kind", "head", "house", "service", "friend",
]  # fmt: skip

STROP = """
import json, sys, time
from pathlib import Path
import psutil
from strop.config.schema import DataSection
from strop.data.prepare import prepare
from strop.machine.memory import start_peak
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
tokenizer("warm up")
before, started = start_peak("cpu"), time.perf_counter()
prepared = prepare(DataSection(train=sys.argv[1]), tokenizer, cache=Path(sys.argv[3]))
took = time.perf_counter() - started
print(json.dumps({"seconds": took, "rows": len(prepared.train), "tokens": prepared.report.tokens.all,
                  "peak_bytes": before.peak_bytes(), "padding": prepared.report.padding}))
"""

TRL = """
import json, sys, time, resource
import psutil, torch
from datasets import load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8,
                                     num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1))
settings = SFTConfig(output_dir=sys.argv[3], max_length=1024, packing=True, use_cpu=True, bf16=False, report_to="none")
before, started = psutil.Process().memory_info().rss, time.perf_counter()
rows = load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[3])
trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
took = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
print(json.dumps({"seconds": took, "rows": len(rows), "packs": len(trainer.train_dataset), "peak_bytes": peak}))
"""


def write_rows(path: Path, number: int) -> None:
    """Write chat rows of about 150 tokens in one or two turns; row n always has the same text."""
    draw = random.Random(number)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(number):
            turns = draw.choice((1, 1, 2))
            messages = [{"role": "system", "content": "Answer in one paragraph."}]
            for _ in range(turns):
                messages.append({"role": "user", "content": _text(draw, 30 // turns)})
                messages.append({"role": "assistant", "content": _text(draw, 85 // turns)})
            file.write(json.dumps({"messages": messages}) + "\n")


def _text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(words // 2, 3 * words // 2))).capitalize() + "."


def save_tokenizer(folder: Path) -> None:
    from strop.models.source import locate
    from strop.models.tokenizer import load_tokenizer

    load_tokenizer(locate("demo")).save_pretrained(folder)


def measure(python: str, script: str, rows: Path, tokenizer: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        command = [python, "-c", script, str(rows), str(tokenizer), cache]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{python}: failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**result, "rows_per_s": result["rows"] / result["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--trl-python", help="the Python of an environment with trl")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    tools = {"strop": (sys.executable, STROP)}
    if options.trl_python:
        tools["trl"] = (options.trl_python, TRL)
    result: dict[str, list[dict[str, Any]]] = {name: [] for name in tools}
    with tempfile.TemporaryDirectory() as folder:
        rows, tokenizer = Path(folder) / "rows.jsonl", Path(folder) / "tokenizer"
        write_rows(rows, options.rows)
        save_tokenizer(tokenizer)
        for _ in range(options.runs):
            for name, (python, script) in tools.items():
                result[name].append(measure(python, script, rows, tokenizer))
                print(name, json.dumps(result[name][-1]), flush=True)
    for name, runs in result.items():
        rate = statistics.median(run["rows_per_s"] for run in runs)
        peak = statistics.median(run["peak_bytes"] for run in runs)
        print(f"{name}: {rate:,.0f} rows/s, {peak / 2**20:,.0f} MiB beyond the tokenizer (median of {len(runs)})")
    if options.out:
        measured.write(options.out, result, rows=options.rows)


if __name__ == "__main__":
    main()
