"""`strop adapters`: list, show, compare, add up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from strop.cli.options import Json, numbers
from strop.cli.progress import alive
from strop.cli.terminal import console, print_adapters, print_json, print_notes, print_pairs
from strop.errors import RecipeError


def adapters(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FOLDER|ADAPTER...]", help="None or a folder: list; one or two: show."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write a weighted sum of the adapters here.")] = None,
    weights: Annotated[str, typer.Option(help="Of the sum, one for each adapter: 0.7,0.3.")] = "",
    as_json: Json = False,
) -> None:
    """List adapters, show one, compare two, or add several up."""
    from dataclasses import asdict

    names = names or ["runs"]
    if weights and out is None:
        raise RecipeError("--weights: of a sum that is written nowhere", fix="give --out")
    if out is None and len(names) > 2:
        raise RecipeError(f"{len(names)} adapters: two can be compared", fix="add --out and --weights to add them up")
    told: dict[str, Any]
    with alive(console, "loading the libraries") as sign:
        from strop.export import adapters as known

        sign.now("reading the adapters")
        if out is not None:
            told = {**asdict(known.combine(names, numbers(weights), out)), "notes": known.told_apart(names)}
        elif len(names) == 2:
            told = known.compare(*names)
        elif known.is_adapter(names[0]):
            told = {**asdict(known.facts(names[0])), "norm": known.norm(names[0])}
            told["not_measured"] = known.unmeasured(names[0])
        else:
            told = {"adapters": [asdict(one) for one in known.found_in(Path(names[0]))]}
    if out is not None:
        print_notes(told["notes"])
        console.print(f"[bold]wrote[/]    {escape(str(told['folder']))}: rank {told['rank']}")
    elif "adapters" in told:
        print_adapters(told["adapters"])
    else:
        print_pairs(told)
    print_json(told, as_json)
