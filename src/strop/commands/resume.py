"""`strop resume`: go on from the newest complete checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from strop.flags import Json, Memory, limit_bytes
from strop.terminal import console, print_end, watching


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

    if open_run(run).finished:
        console.print(f"{run} is finished; nothing to resume")
    with watching() as watch:
        from strop.training.run import resume as go_on

        report = go_on(
            run, [watch], options=options, allow_changed=allow_changed or (), memory=limit_bytes(memory)
        ).report
    print_end(report, as_json)
