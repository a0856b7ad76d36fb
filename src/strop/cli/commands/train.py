"""`strop train`: one run, from recipe to report."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from strop.cli.options import Devices, Json, Memory, RecipeFile
from strop.cli.terminal import print_end, print_json, speaker, watching
from strop.engine.kernels import warmup


def train(
    recipe: RecipeFile = None,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Show every value with its origin; train nothing.")
    ] = False,
    go_on: Annotated[
        bool, typer.Option("--resume", help="Where --out holds this run already, go on with it: for restarted jobs.")
    ] = False,
    devices: Devices = None,
    memory: Memory = None,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Fine-tune a model; writes a run folder."""
    from strop.config.load import resolve
    from strop.machine.memory import limit_bytes

    resolved = resolve(recipe, options)
    from strop.distributed.launch import joined, start, to_start

    number = to_start(devices, resolved.recipe.model.device)
    if print_recipe:
        from strop.training.preflight import preview

        complete = preview(resolved, memory=limit_bytes(memory), devices=number or 1)
        if as_json:
            choices = [asdict(choice) for choice in complete.choices.values()]
            print_json({"recipe": complete.recipe.model_dump(), "choices": choices}, as_json)
        else:
            print(complete.as_yaml(), end="")
        return
    if number:
        start(number, sys.argv[1:])
        return
    with joined() as group, watching(speaker(group.main)) as watch:
        warmup.load(warmup.TRAIN if group.main else None)
        from strop.training.run import train as run_training

        run = run_training(resolved, [watch], memory=limit_bytes(memory), devices=group, go_on=go_on)
    if group.main:
        print_end(run.report, as_json)
