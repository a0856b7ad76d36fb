"""`strop resume`: go on from the newest complete checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from strop.cli.options import Devices, Json, Memory
from strop.cli.terminal import console, print_end, speaker, watching
from strop.engine.kernels import warmup


def resume(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(
            help="What may differ from the run's start: lr, schedule, base, data, template, versions, a field."
        ),
    ] = None,
    devices: Devices = None,
    memory: Memory = None,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Go on with a run from its newest complete checkpoint. Recipe flags change a value, where that is allowed."""
    from strop.config.load import read_resolved
    from strop.distributed.launch import joined, start, to_start
    from strop.runs.folder import open_run

    folder = open_run(run)
    if number := to_start(devices, read_resolved(folder.recipe).recipe.model.device if devices else "auto"):
        start(number, sys.argv[1:])
        return
    with joined() as group:
        finished = folder.finished
        changed = allow_changed or ()
        with watching(speaker(group.main)) as watch:
            warmup.load(warmup.TRAIN if group.main else None)
            from strop.machine.memory import limit_bytes
            from strop.training.run import resume as go_on

            report = go_on(
                run, [watch], options=options, allow_changed=changed, memory=limit_bytes(memory), devices=group
            ).report
    if group.main:
        if finished:
            console.print(f"{run} is finished; nothing to resume", markup=False)
        print_end(report, as_json)
