"""`strop demo`: train, compare and show answers of a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strop import api
from strop.cli.invocation import command_name
from strop.cli.options import Json
from strop.cli.progress import generation_progress, run_progress
from strop.cli.tables import console, print_json, print_samples, print_scores
from strop.engine.kernels import warmup

METRIC = "exact_json"


def demo(
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/demo-N.")] = None, as_json: Json = False
) -> None:
    """Fine-tune a small real model on this CPU in minutes, and compare it with its base."""
    from strop.demo import data_files
    from strop.runs.folder import next_numbered

    rows, held_out = data_files()
    folder = out or next_numbered(Path("runs"), "demo")
    with run_progress() as progress:
        warmup.load()
        run = api.train(model="demo", data=rows, out=folder, callback=progress)
    console.print(f"trained  {run.report['seconds']:.0f} s, {run.report['tokens_per_s']:.0f} tokens/s")
    with generation_progress() as advance:
        result = api.evaluate(folder, held_out, metric=METRIC, progress=advance)
    print_scores(result)
    samples = result["samples"]
    print_samples(samples[:: max(1, len(samples) // 3)][:3])  # spread over the rows
    console.print(
        f"\nwrote    {folder}/adapter (PEFT format)\n         {folder}/report.html\n         {folder}/report.json"
    )
    strop = command_name()
    console.print(
        f"\ntalk to it:\n  {strop} chat {folder}\n"
        "now with your own data:\n"
        f"  {strop} check --model demo --data YOURS.jsonl --show 3\n"
        f"  {strop} train --model demo --data YOURS.jsonl --out {folder.parent}/mine",
        markup=False,
    )
    print_json(result, as_json)
