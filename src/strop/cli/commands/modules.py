"""`strop modules`: list the layers that an adapter can be applied to."""

from __future__ import annotations

from typing import Annotated

import typer

from strop.cli.options import Json
from strop.cli.progress import status_line
from strop.cli.tables import console, print_json


def modules(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, run folder, or demo.")],
    as_json: Json = False,
) -> None:
    """List the linear layers of a model, and the presets that adapt them."""
    from rich.table import Table

    with status_line("reading the model's config"):
        from strop.planning.plan import list_layers

        kinds, rows = list_layers(model)
    table = Table("name", "type", "in", "out", "count", "picked by preset", "quantized")
    for kind, row in zip(kinds, rows, strict=True):
        sizes = (str(kind.in_features), str(kind.out_features), str(kind.count))
        quantized = f"no: {kind.kept_16_bit}" if kind.kept_16_bit else "yes"
        table.add_row(kind.name, kind.type, *sizes, ", ".join(row["presets"]) or "none", quantized)
    console.print(table)
    print_json({"modules": rows}, as_json)
