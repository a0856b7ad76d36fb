"""`strop plan`: predict memory, time and settings. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from strop import api
from strop.cli.options import Json, RecipeFile
from strop.cli.tables import console, print_json
from strop.errors import RecipeError


def plan(
    recipe: RecipeFile = None,
    memory: Annotated[
        str | None, typer.Option(help="Plan for this much memory, such as 8GB (with --device cuda: GPU memory).")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help='Plan for this GPU, such as "RTX 4090".')] = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices per machine: GPUs, or processes on a CPU.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")] = 1,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare full fine-tuning, 16-bit LoRA and QLoRA for several model sizes.")
    ] = False,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Predict whether training fits, how long it takes, and which settings to use, without weights or a GPU."""
    from strop.planning.tables import print_comparison, print_plan

    if compare and devices * nodes > 1:
        raise RecipeError("--compare: works for one device only", fix="leave out --devices and --nodes")
    if compare:
        rows = api.compare_methods(recipe, memory=memory, gpu=gpu, **(options or {}))
        print_comparison(rows, console)
        print_json({"rows": [row.as_json() for row in rows]}, as_json)
        return
    planned = api.plan(recipe, memory=memory, gpu=gpu, devices=devices, nodes=nodes, **(options or {}))
    print_plan(planned, console)
    result = planned.as_json()
    if not planned.fits:
        fixes = "; ".join(rung.what for rung in planned.ladder)
        result["error"] = {"kind": "DoesNotFit", "message": "the recipe does not fit", "fix": fixes, "where": []}
    print_json(result, as_json)
    if not planned.fits:
        raise typer.Exit(1)
