"""`strop plan`: will it fit, how long, which settings; imports no torch."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from strop.cli.options import Json, RecipeFile
from strop.cli.terminal import console, print_json
from strop.errors import RecipeError


def plan(
    recipe: RecipeFile = None,
    memory: Annotated[
        str | None, typer.Option(help="Plan for this much memory, such as 8GB; on the card with --device cuda.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help='Plan for this card, such as "RTX 4090".')] = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices of each machine: cards, or processes on a CPU.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    compare: Annotated[
        bool, typer.Option("--compare", help="Full, 16-bit LoRA and QLoRA side by side, in several sizes.")
    ] = False,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """See whether it fits, how long it takes, and which settings: needs no weights and no GPU."""
    from strop import compare_methods
    from strop import plan as make
    from strop.planning.tables import print_comparison, print_plan

    if compare and devices * nodes > 1:
        raise RecipeError("--compare: is about one device", fix="leave --devices and --nodes out")
    if compare:
        rows = compare_methods(recipe, memory=memory, gpu=gpu, **(options or {}))
        print_comparison(rows, console)
        print_json({"rows": [row.as_json() for row in rows]}, as_json)
        return
    found = make(recipe, memory=memory, gpu=gpu, devices=devices, nodes=nodes, **(options or {}))
    print_plan(found, console)
    told = found.as_json()
    if not found.fits:
        fixes = "; ".join(rung.what for rung in found.ladder)
        told["error"] = {"kind": "DoesNotFit", "message": "the recipe does not fit", "fix": fixes, "where": []}
    print_json(told, as_json)
    if not found.fits:
        raise typer.Exit(1)
