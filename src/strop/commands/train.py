"""Commands that train, and what they left behind. Heavy imports stay inside."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from strop.flags import Json, Memory, RecipeFile, limit_bytes
from strop.terminal import console, print_json, watching


def train(
    recipe: RecipeFile = None,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Show every value with its origin; train nothing.")
    ] = False,
    memory: Memory = None,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Fine-tune a model; writes a run folder."""
    from strop.config.load import resolve

    resolved = resolve(recipe, options)
    if print_recipe:
        from strop.training.setup import preview

        complete = preview(resolved, memory=limit_bytes(memory))
        if as_json:
            choices = [asdict(choice) for choice in complete.choices.values()]
            print_json({"recipe": complete.recipe.model_dump(), "choices": choices}, as_json)
        else:
            print(complete.as_yaml(), end="")
        return
    from strop.training.run import train as run_training

    with watching() as watch:
        run = run_training(resolved, [watch], memory=limit_bytes(memory))
    _end_of_run(run.report, as_json)


def resume(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(
            help="What may differ from the run's start: lr, schedule, base, data, template, versions, a field."
        ),
    ] = None,
    memory: Memory = None,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Go on with a run from its newest complete checkpoint. Recipe flags change a value, where that is allowed."""
    from strop.runs.folder import open_run
    from strop.training.run import resume as go_on

    if open_run(run).finished:
        console.print(f"{run} is finished; nothing to resume")
    with watching() as watch:
        report = go_on(
            run, [watch], options=options, allow_changed=allow_changed or (), memory=limit_bytes(memory)
        ).report
    _end_of_run(report, as_json)


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


def demo(
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/demo-N.")] = None, as_json: Json = False
) -> None:
    """Fine-tune a small real model on this CPU in minutes, and see what it learned."""
    from strop.demo.story import run_demo

    with watching() as watch:
        result = run_demo(out, watch)
    print_json(result, as_json)


def _end_of_run(report: dict[str, Any], as_json: bool) -> None:
    out = report["run"]
    console.print(
        f"[bold]done[/]     {report['steps']} steps, {report['tokens']:,} tokens in {report['seconds']:.0f} s "
        f"({report['tokens_per_s']:.0f} tokens/s, {report['supervised_tokens_per_s']:.0f} supervised)"
    )
    for finding in report.get("diagnosis", []):
        console.print(f"[yellow]finding[/]  {finding}")
    console.print(f"[bold]adapter[/]  {report['adapter']}\n[bold]report[/]   {out}/report.html")
    print_json(
        {key: value for key, value in report.items() if key not in ("recipe", "lock", "machine", "data_report")},
        as_json,
    )
