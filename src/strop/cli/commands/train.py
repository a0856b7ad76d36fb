"""`strop train`: train a recipe."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from strop import api
from strop.cli.options import Devices, Json, Memory, RecipeFile
from strop.cli.progress import console_for, is_main_process, run_progress
from strop.cli.tables import print_json, print_run_summary
from strop.engine.kernels import warmup


def train(
    recipe: RecipeFile = None,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print every value with its origin, without training.")
    ] = False,
    resume_existing: Annotated[
        bool, typer.Option("--resume", help="Resume the run if --out already contains it, for restarted jobs.")
    ] = False,
    devices: Devices = None,
    memory: Memory = None,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Fine-tune a model and write a run folder."""
    from strop.config.load import resolve
    from strop.distributed.launch import count_processes, launch_processes

    resolved = resolve(recipe, options)
    number = count_processes(devices, resolved.recipe.model.device)
    if print_recipe:
        from strop.machine.memory import limit_bytes
        from strop.training.preflight import preview

        complete = preview(resolved, memory=limit_bytes(memory), devices=number or 1)
        if as_json:
            choices = [asdict(choice) for choice in complete.choices.values()]
            print_json({"recipe": complete.recipe.model_dump(), "choices": choices}, as_json)
        else:
            print(complete.as_yaml(), end="")
        return
    if number:
        launch_processes(number, sys.argv[1:])
        return
    main = is_main_process()
    with run_progress(console_for(main)) as progress:
        warmup.load(warmup.TRAIN if main else None)
        run = api.train(recipe, callback=progress, memory=memory, resume_existing=resume_existing, **(options or {}))
    if main:
        print_run_summary(run.report, as_json)
