"""`strop resume`: continue a run from its newest complete checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from strop import api
from strop.cli.options import Devices, Json, Memory
from strop.cli.progress import console_for, is_main_process, run_progress
from strop.cli.tables import console, print_run_summary
from strop.engine.kernels import warmup


def resume(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(
            help="What may differ from the start of the run: lr, schedule, base, data, template, versions, or a field."
        ),
    ] = None,
    devices: Devices = None,
    memory: Memory = None,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Resume a run from its newest complete checkpoint; recipe flags change values that --allow-changed names."""
    from strop.config.load import read_resolved
    from strop.distributed.launch import count_processes, launch_processes
    from strop.runs.folder import open_run

    folder = open_run(run)
    if number := count_processes(devices, read_resolved(folder.recipe).recipe.model.device if devices else "auto"):
        launch_processes(number, sys.argv[1:])
        return
    main, finished = is_main_process(), folder.finished
    with run_progress(console_for(main)) as progress:
        warmup.load(warmup.TRAIN if main else None)
        report = api.resume(
            run, callback=progress, allow_changed=allow_changed or (), memory=memory, **(options or {})
        ).report
    if main:
        if finished:
            console.print(f"{run} is finished; nothing to resume", markup=False)
        print_run_summary(report, as_json)
