"""`strop runs`: the runs in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from strop.flags import Json
from strop.terminal import console, print_json


def runs(
    folder: Annotated[Path, typer.Argument(help="The folder that holds run folders.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs in a folder."""
    from strop.runs.folder import find_runs

    rows = []
    for run in find_runs(folder):
        report = json.loads(run.report.read_text(encoding="utf-8")) if run.report.is_file() else {}
        steps = [step for step, _ in run.checkpoints()]
        rows.append(
            {"run": str(run.path), "finished": run.finished, "step": report.get("steps", max(steps, default=0))}
        )
    for row in rows:
        console.print(f"{row['run']}  {'finished' if row['finished'] else 'not finished'}, step {row['step']}")
    if not rows:
        console.print(f"no runs in {folder}")
    print_json({"runs": rows}, as_json)
