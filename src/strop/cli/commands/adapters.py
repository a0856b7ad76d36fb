"""`strop adapters`: list, show, compare and add adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from strop.cli.options import Json, parse_numbers
from strop.cli.progress import status_line
from strop.cli.tables import console, print_adapters, print_fields, print_json, print_notes
from strop.errors import RecipeError


def adapters(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FOLDER|ADAPTER...]", help="A folder to list (default: runs), or one or two adapters to show."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write a weighted sum of the adapters to this folder.")] = None,
    weights: Annotated[str, typer.Option(help="Weights of the sum, one per adapter, such as 0.7,0.3.")] = "",
    as_json: Json = False,
) -> None:
    """List adapters, show one, compare two, or write a weighted sum of several."""
    names = names or ["runs"]
    if weights and out is None:
        raise RecipeError("--weights: has no effect without --out", fix="give --out")
    if out is None and len(names) > 2:
        raise RecipeError(f"{len(names)} adapters: only two can be compared", fix="add them with --out and --weights")
    result: dict[str, Any]
    with status_line("loading the libraries") as status:
        from strop.exporting import adapters as exporting

        status.update("reading the adapters")
        if out is not None:
            combined = exporting.combine(names, parse_numbers(weights), out)
            result = {**combined, "notes": exporting.find_prompt_differences(names)}
        elif len(names) == 2:
            result = exporting.compare(*names)
        elif exporting.is_adapter(names[0]):
            result = {**exporting.read_info(names[0]), "norm": exporting.compute_norm(names[0])}
            result["not_measured"] = exporting.why_not_measured(names[0])
        else:
            result = {"adapters": exporting.find_adapters(Path(names[0]))}
    if out is not None:
        print_notes(result["notes"])
        console.print(f"[bold]wrote[/]    {escape(str(result['folder']))}: rank {result['rank']}")
    elif "adapters" in result:
        print_adapters(result["adapters"])
    else:
        print_fields(result)
    print_json(result, as_json)
