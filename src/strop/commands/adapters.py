"""`strop adapters`: list, show, compare, add up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strop.errors import RecipeError
from strop.flags import Json, numbers
from strop.terminal import console, print_adapters, print_json, print_pairs


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

    from strop.exporting import adapters as known

    names = names or ["runs"]
    if weights and out is None:
        raise RecipeError("--weights: of a sum that is written nowhere", fix="give --out")
    if out is not None:
        made = known.combine(names, numbers(weights), out)
        console.print(f"[bold]wrote[/]    {made.folder}: rank {made.rank}")
        print_json(asdict(made), as_json)
    elif len(names) == 1 and not known.is_adapter(names[0]):
        found = known.found_in(Path(names[0]))
        print_adapters([asdict(one) for one in found])
        print_json({"adapters": [asdict(one) for one in found]}, as_json)
    elif len(names) == 1:
        shown = {**asdict(known.facts(names[0])), "norm": known.norm(names[0])}
        print_pairs(shown)
        print_json(shown, as_json)
    elif len(names) == 2:
        compared = known.compare(*names)
        print_pairs(compared)
        print_json(compared, as_json)
    else:
        raise RecipeError(f"{len(names)} adapters: two can be compared", fix="add --out and --weights to add them up")
