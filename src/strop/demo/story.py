"""`strop demo`: the whole story on a small real model: train, compare base and tuned, show answers, what is next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from strop.cli.invocation import as_typed
from strop.cli.tables import print_samples, print_scores
from strop.cli.terminal import answering, console, watching
from strop.config.load import resolve
from strop.demo import data_files
from strop.engine.decode.model import load
from strop.evaluation.compare import compare
from strop.evaluation.held_out import count_train_rows, trained_on
from strop.evaluation.run import add_to_report, read_conversations
from strop.runs.folder import RunFolder, next_numbered
from strop.training.run import train

METRIC = "exact_json"


def run_demo(out: Path | None) -> dict[str, Any]:
    """Trains on the packaged rows with the default recipe and answers the held-out ones; returns what eval returns."""
    rows, held_out = data_files()
    folder = out or next_numbered(Path("runs"), "demo")
    with watching() as watch:
        run = train(resolve(None, {"model": "demo", "data": str(rows), "out": str(folder)}), [watch])
    console.print(f"trained  {run.report['seconds']:.0f} s, {run.report['tokens_per_s']:.0f} tokens/s")
    asked = read_conversations(str(held_out))
    with answering() as advance:
        result = {"run": str(folder), **compare(load(folder), asked, metric=METRIC, advance=advance)}
    count_train_rows(result, trained_on(str(folder), asked))
    add_to_report(RunFolder(folder), result)
    print_scores(result)
    print_samples(_different(result["samples"]))
    console.print(
        f"\nwrote    {folder}/adapter (PEFT format)\n         {folder}/report.html\n         {folder}/report.json"
    )
    strop = as_typed()
    console.print(
        f"\ntalk to it:\n  {strop} chat {folder}\n"
        "now with your own data:\n"
        f"  {strop} check --model demo --data YOURS.jsonl --show 3\n"
        f"  {strop} train --model demo --data YOURS.jsonl --out {folder.parent}/mine",
        markup=False,
    )
    return result


def _different(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Three rows spread over the held-out set."""
    return samples[:: max(1, len(samples) // 3)][:3]
